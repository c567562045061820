"""A run that starts from the weights of another: the same size, a higher resolution, and what cannot be."""

import shutil
from pathlib import Path

import pytest
import torch

import train
from genssm.models import DiM, ZigMa
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.training.objectives import DiffusionObjective
from genssm.training.start import start_from
from tests.training.conftest import forget_processes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "debug" / "dim.yaml"
TINY = {"sample_size": 4, "in_channels": 1, "patch_size": 2, "hidden_size": 16, "num_layers": 3, "d_state": 2}


def save(denoiser: torch.nn.Module, folder: Path) -> Path:
    ClassConditionalImagePipeline(denoiser, DiffusionObjective().scheduler()).save_pretrained(folder)
    return folder


def run(folder: Path, *overrides: str) -> DiM:
    """One step of the debug run with a learning rate that moves nothing; the averaged weights."""
    settings = ("train.max_train_steps=1", "train.train_batch_size=4", "train.learning_rate=1e-20")
    settings += (f"train.output_dir={folder}", "log.sample_every=0", *overrides)
    forget_processes()
    train.main(["--config", str(CONFIG), *settings, "--quiet"])
    return DiM.from_pretrained(folder / "checkpoints" / "step_0000001" / "pipeline", subfolder="denoiser")


def test_high_resolution_starts_from_low(tmp_path: Path) -> None:
    weak = run(tmp_path / "weak")
    larger = ("model.args.sample_size=16", "data.resolution=16", "model.args.pad_layout=row_major_cycle")
    start = f"train.init_from={tmp_path / 'weak'}"
    strong = run(tmp_path / "strong", *larger, start, "train.seed=5")
    expected = weak.resized(16, "row_major_cycle").state_dict()
    assert strong.config.pad_layout == "row_major_cycle" and strong.positions.shape == (1, 2 + 64, 48)
    for name, value in strong.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)
    # A run that has a checkpoint of its own needs its start no more.
    shutil.rmtree(tmp_path / "weak")
    run(tmp_path / "strong", *larger, start, "train.seed=5")


def test_same_size_of_any_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, model = ZigMa(**TINY), ZigMa(**TINY)
    assert start_from(model, save(source, tmp_path)) == tmp_path
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_what_cannot_be(tmp_path: Path) -> None:
    folder = save(DiM(**TINY), tmp_path / "dim")
    with pytest.raises(ValueError, match="a ZigMa cannot start from"):
        start_from(ZigMa(**TINY), folder)
    with pytest.raises(ValueError, match="hidden_size 16 -> 32"):
        start_from(DiM(**{**TINY, "hidden_size": 32}), folder)
    with pytest.raises(ValueError, match="size mismatch"):
        start_from(ZigMa(**{**TINY, "sample_size": 8}), save(ZigMa(**TINY), tmp_path / "zigma"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "run", "train.init_from=nowhere")
    assert not (tmp_path / "run").exists()
