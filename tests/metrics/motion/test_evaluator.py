"""The evaluator's networks: padding, order, published files, and one trained on the spot."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genssm.data.motion.clips import Caption
from genssm.data.motion.words import WordVectors
from genssm.metrics.motion_clips import draw_clips, embed_captions, embed_motions
from genssm.metrics.motion_distances import pair_distances
from genssm.metrics.motion_evaluator import (
    EvaluatorInfo,
    EvaluatorSizes,
    MotionEvaluator,
    load_evaluator,
    load_published,
    save_evaluator,
)
from genssm.metrics.motion_evaluator_training import contrastive_loss, train_evaluator
from genssm.motion import FeatureStatistics
from tests.metrics.motion.conftest import SMALL, make_dataset


@pytest.fixture
def evaluator() -> MotionEvaluator:
    torch.manual_seed(0)
    return MotionEvaluator(SMALL, FeatureStatistics(torch.randn(263), torch.rand(263) + 0.5)).eval()


def test_published_sizes() -> None:
    network = MotionEvaluator(EvaluatorSizes())
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in network.children()]
    assert counts == pytest.approx([1.84, 15.7, 4.10], abs=0.06)


def test_padding_and_batch_do_not_matter(evaluator: MotionEvaluator) -> None:
    x = torch.randn(3, 60, 263)
    lengths = torch.tensor([24, 48, 43])
    found = evaluator.embed_motions(x, lengths)
    spoiled = x.clone()
    spoiled[0, 24:] = 1e3
    spoiled[2, 43:] = torch.nan
    torch.testing.assert_close(evaluator.embed_motions(spoiled, lengths), found)
    longer = torch.cat([x, torch.randn(3, 20, 263)], 1)
    torch.testing.assert_close(evaluator.embed_motions(longer, lengths), found)
    torch.testing.assert_close(evaluator.embed_motions(x[[2, 0]], lengths[[2, 0]]), found[[2, 0]])
    words, classes = torch.randn(2, 3, 22, 20), torch.randn(3, 22, 15)
    texts = evaluator.embed_texts(words[0], classes, torch.tensor([5, 22, 9]))
    words[0, 0, 5:] = 9.0
    torch.testing.assert_close(
        evaluator.embed_texts(words[0, [2, 0]], classes[[2, 0]], torch.tensor([9, 5])), texts[[2, 0]]
    )


def test_embeddings_do_not_depend_on_the_device(evaluator: MotionEvaluator, device: torch.device) -> None:
    motions = [torch.randn(frames, 263) for frames in (24, 40, 36)]
    captions = [Caption.of("a person walks"), Caption.of("someone jumps")]
    vectors, cpu = WordVectors.hashed(20), torch.device("cpu")
    expected = embed_motions(evaluator, motions, 48, cpu), embed_captions(evaluator, captions, vectors, cpu)
    moved = evaluator.to(device)
    found = embed_motions(moved, motions, 48, device, batch_size=2), embed_captions(moved, captions, vectors, device)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_is_refused(evaluator: MotionEvaluator) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        evaluator.embed_motions(torch.zeros(1, 30, 263), torch.tensor([28]))
    with pytest.raises(ValueError, match=r"lengths are 2\.\.2"):
        evaluator.embed_motions(torch.zeros(1, 32, 263), torch.tensor([2]))
    with pytest.raises(ValueError, match="statistics have 251"):
        MotionEvaluator(SMALL, FeatureStatistics(torch.zeros(251), torch.ones(251)))


@pytest.mark.parametrize("layout", ["checkpoints/t2m", "deps/t2m/t2m", "t2m"])
def test_published_files(evaluator: MotionEvaluator, tmp_path: Path, layout: str) -> None:
    weights = tmp_path / layout / "text_mot_match/model/finest.tar"
    meta = tmp_path / layout / "Comp_v6_KLD01/meta"
    weights.parent.mkdir(parents=True)
    meta.mkdir(parents=True)
    parts = ("movement_encoder", "motion_encoder", "text_encoder")
    torch.save({"epoch": 3, **{part: getattr(evaluator, part).state_dict() for part in parts}}, weights)
    evaluator.statistics.save(meta / "mean.npy", meta / "std.npy")
    with pytest.raises(FileNotFoundError, match=r"elsewhere.*finest\.tar"):
        load_published([tmp_path / "elsewhere"])
    found, info = load_published([tmp_path / "elsewhere", tmp_path])
    x, lengths = torch.randn(2, 40, 263), torch.tensor([40, 20])
    assert torch.equal(found.embed_motions(x, lengths), evaluator.embed_motions(x, lengths))
    assert info.published and info.word_vectors == "glove" and found.sizes == SMALL
    (meta / "std.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"std\.npy"):
        load_published([tmp_path])
    torch.save({"motion_encoder": {}}, weights)
    np.save(meta / "std.npy", np.ones(263))
    with pytest.raises(ValueError, match="no movement_encoder, text_encoder"):
        load_published([tmp_path])


def test_own_file(evaluator: MotionEvaluator, tmp_path: Path) -> None:
    info = EvaluatorInfo("own", False, "hashed", "data", seed=3, epochs=2, top1=0.5)
    save_evaluator(tmp_path / "own.safetensors", evaluator, info)
    found, again = load_evaluator(tmp_path / "own.safetensors")
    x, lengths = torch.randn(2, 40, 263), torch.tensor([40, 20])
    assert torch.equal(found.embed_motions(x, lengths), evaluator.embed_motions(x, lengths)) and again == info
    with pytest.raises(FileNotFoundError, match="motion_evaluator_training"):
        load_evaluator(tmp_path / "none.safetensors")


def test_contrastive_loss() -> None:
    texts = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    motions = torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    others = torch.tensor([1, 0])
    far = torch.tensor([True, True])
    # pairs: (1 + 0) / 2; text 0 is 5 from motion 1, text 1 is sqrt(18) from motion 0
    expected = 0.5 + ((10 - 5) ** 2 + (10 - 18**0.5) ** 2) / 2
    assert float(contrastive_loss(texts, motions, others, far, 10.0)) == pytest.approx(expected, rel=1e-5)
    assert float(contrastive_loss(texts, motions, others, ~far, 10.0)) == pytest.approx(0.5)


def test_training_finds_captions_of_unseen_clips() -> None:
    """The motion nearest to a caption is of its kind, for most of four kinds."""
    train, test = make_dataset(0, 32), make_dataset(100, 16)
    options = {"sizes": SMALL, "autoencoder_epochs": 10, "learning_rate": 3e-3, "batch_size": 16}
    vectors, cpu = WordVectors.hashed(20), torch.device("cpu")
    trained, top1 = train_evaluator(train, test, vectors, epochs=120, **options)
    assert 0 <= top1 <= 1 and not trained.training
    clips = draw_clips(test, 0, 0)
    texts = embed_captions(trained, clips.captions, vectors, cpu)
    nearest = pair_distances(texts, embed_motions(trained, clips.features, 60, cpu)).argmin(1).tolist()
    right = [clips.captions[i].text == clips.captions[j].text for i, j in enumerate(nearest)]
    assert np.mean(right) >= 0.75


def test_training_depends_on_the_seed_alone() -> None:
    data = make_dataset(0, 34)
    options = {"sizes": SMALL, "autoencoder_epochs": 2, "epochs": 2, "batch_size": 16}
    torch.manual_seed(1)
    first, again, other = (
        train_evaluator(data, data, WordVectors.hashed(20), seed=seed, **options)[0] for seed in (0, 0, 1)
    )
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a, b) and not torch.equal(a, c)
