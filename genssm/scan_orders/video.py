"""Orders of a video of F frames, h x w tokens each; a token's index is (frame * h + row) * w + column."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Literal, NamedTuple

import numpy as np
import torch

from genssm.scan_orders.grid import as_order, cells, check_path, raster, reverse, zigzag


class VideoLayer(NamedTuple):
    """What one layer of a factorised video model scans."""

    kind: Literal["spatial", "temporal"]
    path: int
    """Spatial: path of the image order, within each frame. Temporal: 0 forward in time, 1 backward, at each cell."""


class Factorised(NamedTuple):
    """Many short scans laid end to end."""

    order: torch.Tensor
    """(F * h * w,) int32, over the tokens of all frames."""
    cu_seqlens: torch.Tensor
    """(S + 1,) int32: borders 0, ..., F * h * w of the short scans, counted in steps of ``order``."""


def video_kinds(pattern: str, depth: int, num_paths: int = 8) -> list[VideoLayer]:
    """Layers of a factorised video model (ZigMa, arXiv 2403.13802, section 3.3).

    Args:
        pattern: "s" for a spatial and "t" for a temporal layer, repeated over the depth; must hold both.
        depth: number of layers.
        num_paths: spatial paths to cycle through.
    Returns:
        One entry per layer: the j-th spatial layer takes path j mod ``num_paths``, the j-th temporal one runs forward
        if j is even and backward if it is odd.
    """
    if set(pattern) != {"s", "t"}:
        raise ValueError(
            f"a video pattern is made of both letters 's' (space) and 't' (time), such as 'sst'; got {pattern!r}"
        )
    if depth < 1 or num_paths < 1:
        raise ValueError(f"depth and num_paths are at least 1, got {depth} and {num_paths}")
    layers = []
    for kind in (pattern * math.ceil(depth / len(pattern)))[:depth]:
        name = "spatial" if kind == "s" else "temporal"
        before = sum(layer.kind == name for layer in layers)
        layers.append(VideoLayer(name, before % (num_paths if kind == "s" else 2)))
    return layers


def factorised(
    layer: VideoLayer,
    frames: int,
    h: int,
    w: int,
    order: Callable[..., torch.Tensor] = zigzag,
) -> Factorised:
    """A factorised layer as one scan over all tokens of a clip: the order, and where each frame or cell begins.

    A spatial layer visits frame after frame, so its borders are also borders of rows in memory and fit the
    ``cu_seqlens`` of the scan. A temporal layer visits one cell through all frames, then the next one: lay the tokens
    out along ``temporal(frames, h, w)`` (or as a batch of cells), then the borders are borders of rows.

    Args:
        order: image order of the spatial layers.
    """
    if layer.kind == "spatial":
        return Factorised(spatial(frames, h, w, layer.path, order), _borders(frames, h * w))
    return Factorised(temporal(frames, h, w, layer.path), _borders(h * w, frames))


def _borders(count: int, length: int) -> torch.Tensor:
    return as_order(np.arange(count + 1) * length)


def _clip(frames: int, h: int, w: int) -> np.ndarray:
    """Index of every token, (frames, h, w)."""
    if not isinstance(frames, Integral) or frames < 1:
        raise ValueError(f"a video needs at least 1 frame, got {frames!r}")
    return cells(frames, cells(h, w).size).reshape(frames, h, w)


def spatial(frames: int, h: int, w: int, path: int = 0, order: Callable[..., torch.Tensor] = zigzag) -> torch.Tensor:
    """Frame after frame, each along an image order: the spatial layer of a factorised model (ZigMa).

    Args:
        path: path of the image order.
        order: an image order, such as the values of `genssm.scan_orders.ORDERS`.
    """
    clip = _clip(frames, h, w)
    return as_order(clip.reshape(frames, h * w)[:, order(h, w, path).numpy()])


def temporal(frames: int, h: int, w: int, path: int = 0) -> torch.Tensor:
    """Cell after cell, each through all frames; path 1 goes back in time: the temporal layer (ZigMa)."""
    check_path("temporal", path, 2)
    return as_order(_clip(frames, h, w)[:: 1 - 2 * path].transpose(1, 2, 0))


def time_mirror(frames: int, h: int, w: int) -> torch.Tensor:
    """Index of the same cell in the mirrored frame: what ZigMa's released temporal layers do to their output."""
    return as_order(_clip(frames, h, w)[::-1])


def raster_3d(frames: int, h: int, w: int, path: int = 0) -> torch.Tensor:
    """All tokens as they lie; path 1 is the same backwards."""
    check_path("raster_3d", path, 2)
    return raster(frames, _clip(frames, h, w)[0].size, path)


def zigzag_3d(frames: int, h: int, w: int, path: int = 0) -> torch.Tensor:
    """To and fro through space and time: each token touches the one before it, across frames too.

    Frames alternate between spatial path ``path`` mod 8 of :func:`zigzag` and the same backwards. 16 paths; the
    frames come last to first where ``path + path // 8`` is odd, so that time turns round from layer to layer and 16
    layers meet each spatial path in both directions of time. The order is ours: ZigMa names one but publishes no code.
    """
    check_path("zigzag_3d", path, 16)
    clip = _clip(frames, h, w).reshape(frames, h * w)[:, zigzag(h, w, path % 8).numpy()].copy()
    clip = clip[::-1] if (path + path // 8) % 2 else clip
    clip[1::2] = clip[1::2, ::-1].copy()
    return as_order(clip)


def mamba_nd_3d(frames: int, h: int, w: int, path: int = 0) -> torch.Tensor:
    """Six orders of the axes, one per layer (Mamba-ND).

    Axes, slowest first: (time, row, column), (time, column, row), (column, row, time); odd paths are the even ones
    before them backwards. Mamba-ND: arXiv 2402.05892.
    """
    check_path("mamba_nd_3d", path, 6)
    order = as_order(_clip(frames, h, w).transpose(((0, 1, 2), (0, 2, 1), (2, 1, 0))[path // 2]))
    return reverse(order) if path % 2 else order


def rotary_major(frames: int, h: int, w: int, path: int = 0) -> torch.Tensor:
    """Four orders of the axes, one per layer, each to be run in both directions (LinGen).

    Axes, slowest first: (time, row, column), (time, column, row), (row, column, time), (column, row, time). The paper
    (arXiv 2412.09856) describes them in words only; the exact axes are our reading.
    """
    check_path("rotary_major", path, 4)
    return as_order(_clip(frames, h, w).transpose(((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0))[path]))


def interleaved(frames: int, h: int, w: int, path: int = 0) -> torch.Tensor:
    """All frames of a cell, then the next cell: by rows, by columns, both backwards (VFIMamba).

    All four in every layer; VFIMamba (arXiv 2407.02315) has two frames.
    """
    check_path("interleaved", path, 4)
    order = as_order(_clip(frames, h, w).transpose((2, 1, 0) if path % 2 else (1, 2, 0)))
    return reverse(order) if path >= 2 else order
