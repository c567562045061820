"""Positions that are computed from the tokens or turned into them, for grids of any size."""

import torch
from torch import nn

from genssm.layers.modulation import LayerNorm, Modulation, modulate, upcast


class ConvPositions(nn.Module):
    """Conditional positions: modulate(norm(x + depthwise 3 x 3 convolution of x)) (CPVT, arXiv:2102.10882).

    Args:
        hidden_size: width D.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)
        self.norm = LayerNorm(hidden_size, 1e-5)
        self.modulation = Modulation(hidden_size, 2, zero=False)

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Map tokens (B, L, D), conditioned on (B, D), to (B, L, D)."""
        image = x.transpose(1, 2).unflatten(2, grid)  # (B, D, gh, gw)
        x = x + self.conv(image).flatten(2).transpose(1, 2)
        return modulate(self.norm(x), *self.modulation(conditioning))


def rotary_table(dim: int, height: int, width: int) -> torch.Tensor:
    """Cosines and sines of the 2-D rotary encoding (Su et al. 2021, RoFormer, in two dimensions).

    The first dim/4 angles are column w_j, the last dim/4 are row w_j, with w_j = 10000^(-j/(dim/4)), in float64.

    Args:
        dim: width D of the tokens, a multiple of 4.
        height: rows of the token grid.
        width: columns of the token grid.

    Returns:
        (2, height * width, dim/2), float32: cosines, then sines.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    angles = torch.cat([columns[:, None] * omega, rows[:, None] * omega], dim=1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbouring channels of ``x`` (B, L, D) by the angle of ``table`` (2, L, D/2), in float32."""
    a, b = upcast(x).unflatten(-1, (-1, 2)).unbind(-1)  # (B, L, D/2) each
    cos, sin = table.to(a.dtype)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
