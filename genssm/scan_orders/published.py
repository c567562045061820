"""Orders and per-block chains of single papers. Signatures: see the package."""

from typing import Literal

import numpy as np
import torch

from genssm.scan_orders.grid import (
    as_order,
    cells,
    check_path,
    check_sides,
    column,
    local_window,
    raster,
    reverse,
    serpentine_lines,
)

DIM_PATTERNS = (0, -2, 1, -1)
"""DiM's pattern ids in the order of its cycle: raster, raster backwards, columns, columns backwards."""


def crisscross(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Rows, rows backwards, columns, columns backwards: one per layer (Mamba-ND, DiG).

    Mamba-ND in two dimensions (arXiv 2402.05892); DiG (arXiv 2405.18428).
    """
    check_path("crisscross", path, 4)
    return (column if path >= 2 else raster)(h, w, path % 2)


def cross_scan(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Rows, columns, rows backwards, columns backwards: all in every layer (VMamba).

    VMamba is arXiv 2401.10166; MambaIR does the same.
    """
    check_path("cross_scan", path, 4)
    return (column if path % 2 else raster)(h, w, path // 2)


def lamamba(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Serpentines from four corners, all in every layer (LaMamba-Diff).

    Rows downwards; rows upwards; columns to the right, beginning upwards; columns to the left, the same. LaMamba-Diff
    is arXiv 2408.02615.
    """
    check_path("lamamba", path, 4)
    grid = cells(h, w)
    views = (grid, grid[::-1], grid[::-1].T, grid[::-1, ::-1].T)
    return as_order(serpentine_lines(views[path]))


def local_mamba(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Rows, columns, windows of 2, windows of 7, and these backwards: what LocalMamba chooses from.

    LocalMamba is arXiv 2403.09338.
    """
    check_path("local_mamba", path, 8)
    order = (raster(h, w), column(h, w), local_window(h, w, 2), local_window(h, w, 7))[path % 4]
    return reverse(order) if path >= 4 else order


def dim_pattern(h: int, w: int, pattern_id: int) -> torch.Tensor:
    """A pattern of DiM (Teng et al., arXiv 2405.14224) on a grid of ``h`` x ``w`` cells, pad cells included.

    Args:
        pattern_id: 0 raster, -2 raster backwards, 1 columns, -1 columns backwards.
    """
    if pattern_id not in DIM_PATTERNS:
        raise ValueError(f"DiM's patterns are {DIM_PATTERNS}, got {pattern_id!r}")
    return crisscross(h, w, DIM_PATTERNS.index(pattern_id))


def dim_pattern_chain(depth: int, num_patterns: int = 4) -> list[int]:
    """Pattern id of every block: the cycle forwards in the first half, backwards in the second, ending on raster.

    So every long skip meets its decoder block in the order in which it was collected.

    Args:
        depth: number of blocks, odd.
        num_patterns: the first so many of :data:`DIM_PATTERNS`, 1 to 4.
    """
    if depth < 1 or depth % 2 == 0:
        raise ValueError(f"DiM has an odd number of blocks (one, and pairs joined by skips), got {depth}")
    if not 1 <= num_patterns <= len(DIM_PATTERNS):
        raise ValueError(f"DiM cycles through 1 to {len(DIM_PATTERNS)} patterns, got {num_patterns}")
    return [DIM_PATTERNS[min(block, depth - 1 - block) % num_patterns] for block in range(depth)]


def _padded(h: int, w: int, pad: int) -> tuple[int, int]:
    if pad < 0:
        raise ValueError(f"pad is the number of pad columns and rows, at least 0, got {pad}")
    check_sides(h, w)
    return h + pad, w + pad


def dim_image_cells(h: int, w: int, pad: int = 3) -> torch.Tensor:
    """Where the image tokens stand on DiM's padded grid: raster indices of (h + pad, w + pad), (h * w,) int32."""
    return as_order(cells(*_padded(h, w, pad))[:h, :w])


def dim_pad_tokens(
    h: int, w: int, pad: int = 3, layout: Literal["per_side", "row_major_cycle"] = "per_side"
) -> torch.Tensor:
    """Which of the ``pad`` learnable tokens fills each cell of DiM's padded grid; -1 on the image.

    Args:
        layout: "per_side": one token per pad column, and one per pad row, corner included (256 pixels and below);
            "row_major_cycle": the tokens in turn over the pad cells in raster order (512 pixels and upsampling).
    Returns:
        ((h + pad) * (w + pad),) int32.
    """
    rows, cols = _padded(h, w, pad)
    tokens = np.full((rows, cols), -1, dtype=np.int32)
    if layout == "per_side":
        tokens[:h, w:] = np.arange(pad)
        tokens[h:] = np.arange(pad)[:, None]
    elif layout == "row_major_cycle":
        outside = np.ones((rows, cols), dtype=bool)
        outside[:h, :w] = False
        tokens[outside] = np.arange(rows * cols - h * w) % max(pad, 1)
    else:
        raise ValueError(f"unknown pad layout {layout!r}; known: 'per_side', 'row_major_cycle'")
    return as_order(tokens)


def dimsum_spatial(h: int, w: int, block: int = 0, serpentine: bool = False) -> torch.Tensor:
    """DiMSUM's spatial branch without path scans, by block mod 4: rows, columns, each backwards in odd blocks.

    The grid is transposed in blocks 2 and 3, every odd line turned if ``serpentine``, and all reversed in odd blocks.
    DiMSUM: arXiv 2411.04168.
    """
    lines = cells(h, w).T if block % 4 >= 2 else cells(h, w)
    order = as_order(serpentine_lines(lines) if serpentine else lines)
    return reverse(order) if block % 2 else order


def dimsum_frequency(h: int, w: int, block: int = 0, serpentine: bool = False, levels: int = 2) -> torch.Tensor:
    """DiMSUM's wavelet branch: windows, row-first in even blocks, column-first in odd ones.

    Models with path scans or two directions are row-first throughout: give them ``block=0``.

    Args:
        serpentine: turn every odd line of the sequence, read as ``h`` lines of ``w`` tokens (column-first: ``w`` of
            ``h``).
        levels: wavelet levels; windows have the sides h / 2^levels and w / 2^levels.
    """
    cells_per_side = 2**levels
    if h % cells_per_side or w % cells_per_side:
        raise ValueError(f"{levels} wavelet levels need sides that {cells_per_side} divides, got {h} x {w}")
    column_first = block % 2 == 1
    order = local_window(h, w, (h // cells_per_side, w // cells_per_side), column_first)
    if not serpentine:
        return order
    return as_order(serpentine_lines(order.numpy().reshape((w, h) if column_first else (h, w))))


def vfimamba_column_write(h: int, w: int) -> torch.Tensor:
    """Where VFIMamba's released code (arXiv 2407.02315) writes the steps of its column sequence over two frames.

    Trained weights depend on this index error: step s of "interleaved" path 1 (or of the un-reversed path 3) belongs
    to position ``inverse(interleaved(2, h, w, 0))[order[s]]`` of the interleaved row sequence but is put here.

    Returns:
        (2 * h * w,) int32.
    """
    grid = cells(h, w).T.ravel()
    return as_order(np.concatenate([grid, grid + h * w]))
