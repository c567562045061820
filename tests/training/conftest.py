"""Training runs for tests: in this process where that is enough, it saves the start of an interpreter."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

import train
from genssm.metrics.classifier import ClassifierInfo, SmallClassifier, save_classifier

ROOT = Path(__file__).resolve().parents[2]
DEBUG = ROOT / "configs" / "debug" / "zigma.yaml"

# 24 steps of 64 images from 1,442: a checkpoint at step 10 lies inside the first epoch, the run ends in the second.
SHORT = ("train.max_train_steps=24", "train.checkpointing_steps=10", "log.sample_every=0", "log.log_every=6")


def forget_processes() -> None:
    """Let the next run in this process set up accelerate anew, with a precision of its own."""
    for state in (AcceleratorState, PartialState):
        state._reset_state()


def run_train(folder: Path, *overrides: str, flags: tuple[str, ...] = ("--quiet",)) -> Path:
    """The command ``train.py`` in this process."""
    forget_processes()
    train.main(["--config", str(DEBUG), *SHORT, f"train.output_dir={folder}", *overrides, *flags])
    return folder


def weights(run: Path, step: int, part: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """Weights in a checkpoint."""
    return load_file(run / "checkpoints" / f"step_{step:07d}" / part)


EMA_WEIGHTS = "pipeline/denoiser/diffusion_pytorch_model.safetensors"


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two sets of weights."""
    assert a.keys() == b.keys() and a
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(autouse=True)
def _logger_as_before() -> None:
    logger = logging.getLogger("genssm")
    yield
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps without interruption."""
    return run_train(tmp_path_factory.mktemp("straight") / "run")


@pytest.fixture
def command() -> Callable[[Path], list[str]]:
    """Arguments of ``train.py`` for the short run in a process of its own."""
    return lambda folder: ["--config", str(DEBUG), *SHORT, f"train.output_dir={folder}", "--quiet"]


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained classifier of 8x8 images: any fixed network gives a distance."""
    torch.manual_seed(0)
    network = SmallClassifier(1, (8, 8), 10, width=8, feature_dim=8).eval()
    torch.nn.init.normal_(network.project.weight, std=30.0)
    info = ClassifierInfo("digits", 1, (8, 8), 10, 8, 8, 0, 0, 0, 0, 0.1)
    file = tmp_path_factory.mktemp("classifier") / "c.safetensors"
    save_classifier(file, network, info)
    return file
