"""Alignment with a vision encoder: the loss by hand, the projector in the checkpoint, the model saved alone."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from genssm.config import AlignConfig
from genssm.models import MODELS
from genssm.training.alignment import AlignedModel, VisionEncoder, build_alignment
from tests.training.conftest import EMA_WEIGHTS, ROOT, largest_difference, metrics, run_train, weights

STEPS = 24
SMALL = {"sample_size": 8, "in_channels": 1, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_classes": 3}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    folder = tmp_path_factory.mktemp("encoder")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def options(folder: Path, *more: str) -> tuple[str, ...]:
    return (f"align.encoder={folder}", "align.projector_width=16", *more)


def test_encoder_sees_one_patch_for_each_token(encoder_folder: Path) -> None:
    encoder = VisionEncoder(encoder_folder)
    pixels = torch.rand(2, 1, 8, 8) * 2 - 1
    features = encoder(pixels, (4, 4))
    assert features.shape == (2, 16, 12) and not features.requires_grad
    assert encoder(pixels, (2, 3)).shape == (2, 6, 12)
    changed = pixels.clone()
    changed[:, :, :2, :2] = 1
    moved = (encoder(changed, (4, 4)) - features).norm(dim=-1)
    assert (moved.argmax(1) == 0).all()  # the first token stands for the first patch


@pytest.mark.parametrize("name", ["zigma", "dimsum"])
def test_loss_by_hand(name: str, encoder_folder: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name](**SMALL).train()
    aligned = AlignedModel(model, model, 2, 12, 16)
    target = torch.randn(2, 16, 12)
    arguments = (torch.randn(2, 1, 8, 8), torch.tensor([100.0, 700.0]), torch.tensor([0, 1]))
    seen = []
    model.blocks[1].register_forward_hook(lambda _, __, output: seen.append(output))
    torch.manual_seed(1)
    output = aligned(*arguments, alignment_target=target).sample
    h = sum(seen[0]) if isinstance(seen[0], tuple) else seen[0]
    expected = 1 - F.cosine_similarity(aligned.projector(h), target, dim=-1)
    torch.testing.assert_close(aligned.alignment, expected.mean(1))
    torch.manual_seed(1)
    torch.testing.assert_close(output, model(*arguments).sample)
    aligned(*arguments)
    assert aligned.alignment is None
    for call in (model, aligned, partial(aligned, alignment_target=target)):
        call(*arguments)
        assert aligned._seen is None  # nothing keeps the activations of a block alive
    assert not any(name.startswith("projector") for name, _ in model.named_parameters())


def test_a_run_with_it(straight: Path, tmp_path: Path, encoder_folder: Path) -> None:
    """Stopped and resumed, the same bits; the saved model is the plain one; the alignment loss falls."""
    run = run_train(tmp_path / "run", *options(encoder_folder))
    assert weights(run, STEPS).keys() == weights(straight, STEPS).keys()
    assert largest_difference(weights(straight, STEPS), weights(run, STEPS)) > 1e-4
    again = run_train(tmp_path / "again", *options(encoder_folder), "train.max_train_steps=13")
    state = torch.load(again / "checkpoints/step_0000013/state.pt", weights_only=True)
    assert set(state["task"]) == {"projector"}
    run_train(again, *options(encoder_folder))
    for part in ("model.safetensors", EMA_WEIGHTS):
        assert largest_difference(weights(run, STEPS, part), weights(again, STEPS, part)) == 0
    extra = [aligned["loss"] - plain["loss"] for aligned, plain in zip(metrics(run), metrics(straight))]
    assert extra[-1] < 0.9 * extra[0]
    assert 0 < extra[-1] < 0.5 * 2


def test_beside_a_text_encoder(tmp_path: Path, encoder_folder: Path) -> None:
    """A learned text encoder and a projector, both resumed exactly; only the first is in the pipeline."""
    pytest.importorskip("tokenizers")
    text = ("--quiet", "--config", str(ROOT / "configs" / "debug" / "text.yaml"))
    more = ("log.sample_every=0", "train.checkpointing_steps=3", "train.max_train_steps=6", "train.layer_shuffle=0.3")
    run = run_train(tmp_path / "run", *options(encoder_folder, *more), flags=text)
    state = torch.load(run / "checkpoints/step_0000003/state.pt", weights_only=True)["task"]
    assert set(state) == {"projector", "tokenizer"}
    other = run_train(tmp_path / "other", *options(encoder_folder, *more), "train.max_train_steps=3", flags=text)
    run_train(other, *options(encoder_folder, *more), flags=text)
    assert largest_difference(weights(run, 6), weights(other, 6)) == 0
    assert not any("projector" in name for name in weights(run, 6))


@pytest.mark.slow
def test_two_processes(tmp_path: Path, encoder_folder: Path, command: Callable[[Path], list[str]]) -> None:
    """The projector's gradients are exchanged too."""
    one = run_train(tmp_path / "one", *options(encoder_folder, "train.max_train_steps=8"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    arguments = [*command(tmp_path / "two"), *options(encoder_folder, "train.max_train_steps=8")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert largest_difference(weights(one, 8), weights(tmp_path / "two", 8)) < 1e-5
    states = [
        torch.load(run / "checkpoints/step_0000008/state.pt", weights_only=True)["task"]["projector"]
        for run in (one, tmp_path / "two")
    ]
    assert largest_difference(*states) < 1e-5


def test_mistakes(tmp_path: Path, encoder_folder: Path) -> None:
    def refused(message: str, error: type[Exception], *overrides: str) -> None:
        with pytest.raises(error, match=message):
            run_train(tmp_path / "run", *overrides)
        assert not (tmp_path / "run").exists()

    refused(r"no config\.json there", FileNotFoundError, "align.encoder=nowhere")
    refused("blocks 1..2", ValueError, *options(encoder_folder, "align.layer=3"))
    refused("expected more than 0", ValueError, *options(encoder_folder, "align.weight=0"))
    refused(r"train\.compile=false", ValueError, *options(encoder_folder, "train.compile=true"))
    arguments = "{sample_size: 8, in_channels: 1, patch_size: 2, hidden_size: 48, num_layers: 3, num_classes: 10}"
    dim = ("model.name=dim", f"model.args={arguments}")
    refused("one token for each patch", ValueError, *options(encoder_folder), *dim)
    aim = ("--quiet", "--config", str(ROOT / "configs" / "debug" / "aim.yaml"))
    with pytest.raises(ValueError, match=r"for denoisers of images, not for model\.name=aim"):
        run_train(tmp_path / "run", *options(encoder_folder), flags=aim)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    refused("holds a clip network", ValueError, f"align.encoder={tmp_path / 'clip'}")


def test_default_layer(encoder_folder: Path) -> None:
    model = MODELS["zigma"](**SMALL | {"num_layers": 9})
    config = AlignConfig(encoder=str(encoder_folder), projector_width=8)
    _, aligned = build_alignment(config, model, model)
    assert sum(len(block._forward_hooks) for block in model.blocks) == 1 and model.blocks[2]._forward_hooks
    assert aligned.projector[-1].out_features == 12
    assert math.prod(aligned.projector[0].weight.shape) == 8 * 32
