"""Clips that are computed: a body that walks in a curve, and one that does anything."""

import pytest
import torch

from genssm.motion import T2M, forward_kinematics
from genssm.motion.rotations import expmap_to_quaternion


def made_clip(frames: int, seed: int = 0, amount: float = 0.25) -> torch.Tensor:
    """Joints (T, 22, 3) float64 of the target body: smooth random rotations, a root that moves on and turns."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 3, frames, dtype=torch.float64)
    phase = torch.rand(22, 3, generator=generator, dtype=torch.float64) * 6
    turns = amount * torch.sin(t[:, None, None] * 3 + phase)  # (T, 22, 3)
    turns[:, 0] = torch.stack([torch.zeros_like(t), 0.4 * t, torch.zeros_like(t)], -1)
    root = torch.stack([t.sin(), 0.95 + 0.02 * (5 * t).cos(), t], -1)
    return forward_kinematics(expmap_to_quaternion(turns), root, T2M.offsets(turns), T2M)


@pytest.fixture
def clip() -> torch.Tensor:
    return made_clip(60)
