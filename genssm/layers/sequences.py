"""Lengths of padded sequences."""

from collections.abc import Sequence

import torch


def as_lengths(
    lengths: torch.Tensor | Sequence[int] | None, like: torch.Tensor, longest: int | None = -1
) -> torch.Tensor:
    """Lengths as a tensor, checked.

    Args:
        lengths: (B,) whole numbers; None means the full length everywhere.
        like: padded batch (B, T, ...), which shows B, T and the device.
        longest: bound of the lengths; -1 takes T, None sets no bound.
    Returns:
        (B,), int64, on the device of ``like``.
    Raises:
        ValueError: not one length per sequence, or one outside 1..T. Values on an accelerator are not looked at.
    """
    longest = like.shape[1] if longest == -1 else longest
    if lengths is None:
        return torch.full((len(like),), longest, device=like.device)
    lengths = torch.as_tensor(lengths)
    if lengths.shape != (len(like),) or lengths.is_floating_point():
        raise ValueError(f"lengths are {tuple(lengths.shape)} {lengths.dtype}; expected {len(like)} whole numbers")
    if lengths.device.type == "cpu":
        low, high = int(lengths.min()), int(lengths.max())
        if low < 1 or (longest is not None and high > longest):
            raise ValueError(f"lengths are {low}..{high}; expected 1..{'any' if longest is None else longest}")
    return lengths.to(like.device, torch.int64)


def valid_frames(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """Mask (B, T) bool of ``lengths`` (B,): True for frames 0..length-1 of T = ``longest``."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]
