"""Runs of the shipped debug configurations, and the tokenizer that models of codes are trained on."""

from pathlib import Path

import pytest

import train
from tests.training.conftest import forget_processes

ROOT = Path(__file__).resolve().parents[2]


def run_train(name: str, folder: Path, *overrides: str) -> Path:
    forget_processes()
    config = str(ROOT / "configs" / "debug" / f"{name}.yaml")
    train.main(["--config", config, f"train.output_dir={folder}", *overrides, "--quiet"])
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped debug run of the tokenizer, as it is."""
    return run_train("vq", tmp_path_factory.mktemp("vq") / "run")
