"""Training on motion: the debug runs learn, resume exactly and draw; options of KMM; what does not fit is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import train
from genssm.config import load_config
from genssm.data.motion.synthetic import ACTIONS, synthetic_dataset
from genssm.models.motion_alignment import MotionAlignment, contrastive_loss
from genssm.models.motion_vae import MotionPosterior
from genssm.pipelines import MotionReconstructionPipeline, TextToMotionPipeline
from genssm.tasks import build_task
from genssm.training.checkpoint import resolve_pipeline
from genssm.training.key_frames import key_frame_mask, key_frame_scores
from tests.training.conftest import ROOT, forget_processes, largest_difference, metrics, weights

CONFIGS = ROOT / "configs" / "debug"


def run(name: str, folder: Path, *overrides: str) -> Path:
    """``train.py`` on a debug configuration, in this process."""
    forget_processes()
    options = [f"train.output_dir={folder}", *overrides, "--quiet"]
    train.main(["--config", str(CONFIGS / f"{name}.yaml"), *options])
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug VAE, half as long."""
    steps = ("train.max_train_steps=75", "train.checkpointing_steps=75", "log.sample_every=75")
    return run("motion_vae", tmp_path_factory.mktemp("vae") / "run", *steps)


SHORT = ("train.max_train_steps=40", "train.checkpointing_steps=20", "log.sample_every=40", "log.num_samples=2",
         "log.log_every=10", "log.num_inference_steps=3")  # fmt: skip


@pytest.fixture(scope="session")
def latent(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Motion Mamba in its latents, with a learned text encoder and the text-motion contrast."""
    options = (*SHORT, f"motion.vae={vae}", "motion.contrastive_weight=0.5")
    return run("motion_mamba", tmp_path_factory.mktemp("latent") / "run", *options)


def test_vae_learns(vae: Path) -> None:
    lines = metrics(vae)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert np.asarray(Image.open(vae / "samples" / "step_0000075.png")).std() > 5
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(vae))
    assert type(pipe) is MotionReconstructionPipeline and pipe.config.max_frames == 48
    clips = [clip.features[:48] for clip in synthetic_dataset().clips[:2]]
    joints = pipe(clips).motions
    assert [len(motion) for motion in joints] == [len(clip) for clip in clips]
    assert pipe(clips, output_type="latent").motions[0].shape == (2, 32)
    with pytest.raises(ValueError, match="empty"):
        pipe([])


def test_denoiser_in_latents_learns_from_captions(latent: Path) -> None:
    lines = metrics(latent)
    assert lines[-1]["loss"] < lines[0]["loss"]
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(latent))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is TextToMotionPipeline and pipe.vae is not None
    motion = pipe("a person walks forward", seconds=2.0, num_inference_steps=2).motions[0]
    assert motion.shape == (40, 22, 3) and motion.isfinite().all()
    similarity = pipe.similarity(
        ["a person walks forward", "someone is jumping"], [synthetic_dataset().clips[0].features]
    )
    assert similarity.shape == (2, 1) and similarity.abs().max() <= 1 + 1e-5
    card = (resolve_pipeline(latent) / "README.md").read_text()
    assert "latents of the VAE saved here" in card


def test_text_acts_on_the_loss(vae: Path) -> None:
    """Right captions explain latents, others do not; without latents of little noise neither would (next test)."""
    own = task("motion_mamba", f"motion.vae={vae}")
    assert own.latent_noise < 0.2 and "% noise" in own.describe()["input"]
    optimizer = torch.optim.AdamW(own.model.parameters(), 4e-3)
    count = len(own.dataset)

    def losses(key: int, shift: int = 0, dropped: float | None = None) -> torch.Tensor:
        batch = torch.utils.data.default_collate([own.dataset.item(i, 100 * key + i) for i in range(count)])
        batch["text"] = [*batch["text"][shift:], *batch["text"][:shift]]
        numbers = own.random_numbers(count, torch.Generator().manual_seed(key))
        if dropped is not None:
            numbers["dropout"] = torch.full((count,), dropped)
        return own.loss(own.model, batch, numbers)

    for step in range(30):
        losses(step).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    own.model.eval()
    with torch.no_grad():
        right, wrong = (
            torch.stack([losses(1000 + key, shift, dropped=1.0) for key in range(3)]).mean() for shift in (0, 24)
        )
    assert right < 0.95 * wrong, (right, wrong)


def test_latents_of_noise_are_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published form of the posterior, trained for a moment: its log variances leave through a norm."""
    short = ("train.max_train_steps=2", "train.checkpointing_steps=2", "log.sample_every=0")
    folder = run("motion_vae", tmp_path / "run", *short, "model.args.mlp_dist=false")
    assert metrics(folder)[-1]["latent_noise"] > 0.4
    monkeypatch.setattr(logging.getLogger("genssm"), "propagate", True)
    own = task("motion_mamba", f"motion.vae={folder}")
    assert own.latent_noise > 0.4 and "mlp_dist" in caplog.text
    share = MotionPosterior(mean=torch.tensor([[0.0], [2.0]])[..., None], std=torch.ones(2, 1, 1)).noise_share()
    assert float(share) == pytest.approx(0.5)


def test_resumes_exactly(vae: Path, latent: Path, tmp_path: Path) -> None:
    options = [*SHORT, f"motion.vae={vae}", "motion.contrastive_weight=0.5", "log.sample_every=0"]
    folder = run("motion_mamba", tmp_path / "run", *options, "train.max_train_steps=20")
    run("motion_mamba", folder, *options)
    assert largest_difference(weights(latent, 40), weights(folder, 40)) == 0
    average = "pipeline/alignment/diffusion_pytorch_model.safetensors"
    assert largest_difference(weights(latent, 40, average), weights(folder, 40, average)) == 0


def test_a_run_that_starts_from_another_keeps_its_tokenizer(vae: Path, latent: Path) -> None:
    """Captions of other words must not change what a token number means to the encoder that is taken over."""
    options = (f"motion.vae={vae}", "motion.contrastive_weight=0.5", "text.vocab_size=290")
    own = task("motion_mamba", f"train.init_from={latent}", *options)
    before = DiffusionPipeline.from_pretrained(resolve_pipeline(latent))
    assert own.tokenizer.backend.to_str() == before.tokenizer.backend.to_str()
    own.start_from(latent)
    for a, b in zip(before.text_encoder.parameters(), own.text_encoder.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [(), ("motion.key_frame_ratio=0.3",)], ids=["plain", "key frames"])
def test_denoiser_of_frames_learns(options: tuple[str, ...], tmp_path: Path) -> None:
    small = ("train.train_batch_size=8", "train.learning_rate=4e-3", "train.max_train_steps=30")
    folder = run("motion_frames", tmp_path / "run", *SHORT, *small, *options)
    lines = metrics(folder)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(folder))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.class_names == sorted(pipe.config.class_names, key=[a.name for a in ACTIONS].index)
    assert pipe(class_labels="jump", seconds=3.0, num_inference_steps=2).motions[0].shape == (60, 22, 3)


def task(name: str, *overrides: str):
    return build_task(load_config(CONFIGS / f"{name}.yaml", overrides), torch.device("cpu"))


def batch_of(own, count: int) -> dict:
    items = [own.dataset.item(i, 7 * i) for i in range(count)]
    return torch.utils.data.default_collate(items)


def test_padding_does_not_count() -> None:
    """The loss of a clip on frames is the same in a longer padded batch."""
    losses = []
    for longest in (48, 64):
        own = task("motion_frames", f"motion.max_frames={longest}", "motion.min_frames=24")
        torch.manual_seed(0)
        motion = torch.randn(1, 24, 263)
        noise = torch.randn(1, 24, 263)
        pad = lambda x, n=longest: torch.nn.functional.pad(x, (0, 0, 0, n - 24))  # noqa: E731
        batch = {"motion": pad(motion), "length": torch.tensor([24]), "class_labels": torch.tensor([1])}
        numbers = {"timesteps": torch.tensor([300]), "noise": pad(noise) + pad(torch.ones(1, 24, 263)) * 0}
        numbers["noise"][:, 24:] = 9.0  # drawn for the padding, too
        with torch.no_grad():
            losses.append(own.loss(own.model, batch, numbers))
    torch.testing.assert_close(*losses)


def test_texts_are_dropped_to_the_empty_one(vae: Path) -> None:
    own = task("motion_mamba", f"motion.vae={vae}", "text.dropout_prob=0.5")
    batch = batch_of(own, 2)
    condition = own._condition(batch, {"dropout": torch.tensor([0.2, 0.7])})
    empty, kept = condition["attention_mask"].sum(1).tolist()
    assert empty == 1 and kept > 1  # the start token alone
    assert torch.equal(condition["input_ids"][0], own.tokens[0][0])


def test_hidden_key_frames_are_not_seen() -> None:
    options = ("motion.key_frame_ratio=0.25", "motion.key_frame_prob=1.0", "train.class_dropout_prob=0")
    own = task("motion_frames", *options, "log.guidance_scale=1")
    batch, seen = batch_of(own, 3), []
    numbers = own.random_numbers(3, torch.Generator().manual_seed(0))

    class Spy(torch.nn.Module):
        def forward(self, x, t, **condition):
            seen.append(x)
            return own.model(x, t, **condition)

    own.loss(Spy(), batch, numbers)
    hidden = (seen[0] == 0).all(-1) & (torch.arange(48) < batch["length"][:, None])
    assert hidden.sum(1).tolist() == [int(0.25 * n) for n in batch["length"].tolist()]


def test_key_frames_do_not_hold_every_difference() -> None:
    """196 frames of 263 features, 64 clips: the differences of all pairs would be 2.6 GB."""
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    tokens = torch.randn(2, 48, 263, generator=torch.Generator().manual_seed(0))
    with Largest():
        density, _, _ = key_frame_scores(tokens, bandwidth=263.0)
    assert largest == 2 * 48 * 48
    distances = (tokens[:, :, None] - tokens[:, None]).square().sum(-1)
    torch.testing.assert_close(density, (-distances / 263).exp().sum(-1))


def test_key_frame_scores_by_hand() -> None:
    """Two clusters on a line: their centres are the key frames, and the padding never is one."""
    x = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 9.9])[None, :, None]
    density, distance, score = key_frame_scores(x, lengths=torch.tensor([6]))
    assert density[0, 1] == pytest.approx(1 + 2 * np.exp(-0.01), rel=1e-3)
    assert distance[0, 0] == pytest.approx(0.1) and score[0, 6] == 0
    assert score[0].topk(2).indices.sort().values.tolist() == [1, 4]
    mask = key_frame_mask(x, torch.tensor([6]), 0.34, bandwidth=1.0)
    assert mask[0].tolist() == [False, True, False, False, True, False, False]
    with pytest.raises(ValueError, match="bandwidth"):
        key_frame_scores(x, bandwidth=0.0)


def test_contrast_pulls_pairs_together() -> None:
    same = torch.eye(3, dtype=torch.bool)
    good, bad = 10 * torch.eye(3), 10 * torch.eye(3).roll(1, 0)
    assert contrastive_loss(good, same).max() < 0.01 < 5 < contrastive_loss(bad, same).min()
    twins = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    shared = torch.tensor([[5.0, 5.0, -5.0], [5.0, 5.0, -5.0], [-5.0, -5.0, 5.0]])
    assert contrastive_loss(shared, twins)[0] == pytest.approx(2 * np.log(2), abs=1e-3)
    uneven, pairs = torch.randn(3, 3), torch.arange(3)
    both = [cross_entropy(similarity, pairs, reduction="none") for similarity in (uneven, uneven.T)]
    assert contrastive_loss(uneven, same).tolist() == pytest.approx((both[0] + both[1]).tolist(), rel=1e-5)
    alignment = MotionAlignment(7, 5, 8)
    padded = torch.randn(2, 12, 7)
    changed = padded.clone()
    changed[1, 5:] = 7.0
    text = torch.randn(2, 5)
    lengths = torch.tensor([12, 5])
    for a, b in zip(alignment(text, padded, lengths), alignment(text, changed, lengths)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("motion_vae", ["data.name=digits"], "holds no motion"),
        ("motion_vae", ["data.resolution=8"], "data.resolution means nothing"),
        ("motion_vae", ["data.name=motion"], "needs data.path"),
        ("motion_vae", ["model.args.in_channels=251"], "in_channels is 251"),
        ("motion_vae", ["motion.max_frames=96"], "positions for 60"),
        ("motion_frames", ["motion.contrastive_weight=0.5"], "text.encoder=learned"),
        ("motion_frames", ["model.args.num_classes=3"], "the data have 7"),
        ("motion_frames", ["motion.key_frame_ratio=0.2", "objective.prediction_type=epsilon"], "type=sample"),
        ("motion_frames", ["train.class_dropout_prob=0"], "needs a condition that training drops"),
        ("motion_frames", ["text.dropout_prob=0.1"], "for models that read text"),
        ("motion_mamba", ["motion.vae=null"], "set motion.vae"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(name, *overrides)


def test_vae_of_other_latents_is_refused(vae: Path) -> None:
    with pytest.raises(ValueError, match="latents of 2 x 32, the denoiser reads"):
        task("motion_mamba", f"motion.vae={vae}", "model.args.latent_tokens=1")


def test_synthetic_clips() -> None:
    """Always the same, told apart by what they do."""
    one, two = synthetic_dataset(), synthetic_dataset()
    assert len(one) == 8 * len(ACTIONS) and torch.equal(one[3]["motion"], two[3]["motion"])
    speed = {clip.label: float(clip.features[:, 2].mean()) for clip in one.clips}
    assert speed["run"] > speed["walk"] > 0 > speed["back"] and abs(speed["wave"]) < 1e-3
    turn = {clip.label: float(clip.features[:, 0].mean()) for clip in one.clips}
    assert turn["left"] * turn["right"] < 0
    with pytest.raises(ValueError, match="split"):
        synthetic_dataset("everything")
