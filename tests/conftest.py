"""Shared fixtures: where the golden tensors and the real data sets are, and which tests need an accelerator."""

import genssm.threads  # noqa: F401  # isort: skip - before torch: processes that tests start must round like this one
import os
from pathlib import Path

import pytest
import torch

from tests.pretend_graphs import pretend_graphs  # noqa: F401 - a fixture for all

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent


def _shared(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable, ROOT.parent / "shared" / default))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference tensors (environment variable GENSSM_GOLDEN)."""
    path = _shared("GENSSM_GOLDEN", "golden")
    if not path.is_dir():
        pytest.skip(f"no golden tensors at {path}; set GENSSM_GOLDEN")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data sets (environment variable GENSSM_DATA)."""
    path = _shared("GENSSM_DATA", "data")
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}; set GENSSM_DATA")
    return path


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine; a test that takes it runs once per device."""
    return torch.device(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA or ROCm device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
