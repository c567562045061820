"""Recordings of CMU's database where they are, and small folders of computed ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genssm.data.motion.folders import Described, describe_recordings
from tests.motion.conftest import made_clip


@pytest.fixture(scope="session")
def cmu(data_dir: Path) -> dict[str, Described]:
    """Recordings by name."""
    return {recording.name: recording for recording in describe_recordings(data_dir / "motion")}


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """A folder of joints as .npy with a table."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    rows = ["path,action,captions,split"]
    for number in range(6):
        np.save(folder / f"clip{number}.npy", made_clip(50 + 40 * number, seed=number).numpy())
        action = ("walk", "turn")[number % 2]
        split = "test" if number > 3 else "train"
        rows.append(f"clip{number}.npy,{action},a person turns left | someone moves number {number},{split}")
    (folder / "index.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def joints() -> torch.Tensor:
    return made_clip(30).float()
