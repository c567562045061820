"""Orders of a grid: lines, diagonals, windows, and what can be done to any order. Signatures: see the package."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch


def check_sides(h: int, w: int) -> None:
    if not all(isinstance(side, Integral) and side >= 1 for side in (h, w)):
        raise ValueError(f"a grid needs whole sides of at least 1, got {h!r} x {w!r}")


def cells(h: int, w: int) -> np.ndarray:
    """Raster index of every cell, (h, w), int32."""
    check_sides(h, w)
    return np.arange(h * w, dtype=np.int32).reshape(h, w)


def as_order(indices: np.ndarray) -> torch.Tensor:
    """The entries of ``indices`` in memory order as a new (L,) int32 tensor on the CPU."""
    # numpy until here: a default device, a meta or a fake-tensor mode around a model must not reach the tables.
    return torch.from_numpy(indices.astype(np.int32).ravel())


def check_path(name: str, path: int, count: int) -> None:
    if not 0 <= path < count:
        raise ValueError(f"order {name!r} has the paths 0..{count - 1}, got path {path}; layer l takes l mod {count}")


def reverse(order: torch.Tensor) -> torch.Tensor:
    """The same order backwards: last visited token first. ``order`` (..., L)."""
    return order.flip(-1)


def inverse(order: torch.Tensor) -> torch.Tensor:
    """Visiting times: ``inverse(order)[order[t]] == t``; undoes a gather along ``order``.

    Args:
        order: permutations of 0..L-1, (..., L), any integer type and device.
    Returns:
        The inverse permutations, same shape, dtype and device.
    Raises:
        ValueError: a row is no permutation.
    """
    length = order.shape[-1]
    steps = torch.arange(length, dtype=order.dtype, device=order.device).expand(order.shape)
    inside = order.numel() == 0 or (order.min() >= 0 and order.max() < length)
    times = torch.full_like(order, -1).scatter_(-1, order.long(), steps) if inside else None
    if times is None or (times < 0).any():
        raise ValueError(f"not a permutation of 0..{length - 1}: every index must occur exactly once")
    return times


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """One order for two in a row: walk along ``second`` through the sequence that ``first`` has laid out, (L,)."""
    if first.shape != second.shape:
        raise ValueError(f"orders of different lengths cannot follow each other: {first.shape[-1]}, {second.shape[-1]}")
    return first[second.long()]


def with_prefix(order: torch.Tensor, count: int) -> torch.Tensor:
    """Order of a sequence that starts with ``count`` further tokens (class, time, text) which stay in front.

    Args:
        order: order of the grid tokens, (..., L).
        count: number of leading tokens, visited first to last.
    Returns:
        (..., count + L), same dtype.
    """
    front = torch.arange(count, dtype=order.dtype, device=order.device).expand(*order.shape[:-1], count)
    return torch.cat([front, order + count], dim=-1)


def step_distances(order: torch.Tensor, *sides: int) -> torch.Tensor:
    """How far each token lies from the one before it, in grid steps (sum over the axes); 1 means that they touch.

    Args:
        order: permutations of the raster indices, (..., L).
        sides: sides of the grid, slowest first: h, w, or frames, h, w; their product is L.
    Returns:
        (..., L - 1), dtype of ``order``.
    """
    distance, rest = torch.zeros_like(order[..., 1:]), order
    for side in reversed(sides):
        distance += (rest % side).diff(dim=-1).abs()
        rest = rest // side
    return distance


def raster(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Rows, each left to right; path 1 is the same backwards (Vision Mamba takes both)."""
    check_path("raster", path, 2)
    return as_order(cells(h, w).ravel()[:: 1 - 2 * path])


def column(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Columns, each top to bottom; path 1 is the same backwards."""
    check_path("column", path, 2)
    return as_order(cells(h, w).T.ravel()[:: 1 - 2 * path])


def _seen_from(h: int, w: int, path: int) -> np.ndarray:
    """The grid as path 0..7 sees it: corner ``path // 2`` at the top left (0 top left, 1 top right, 2 bottom left,
    3 bottom right); odd paths look at the transposed grid, so that its lines are columns."""
    grid = cells(h, w)
    corner = path // 2
    grid = grid[::-1] if corner >= 2 else grid
    grid = grid[:, ::-1] if corner % 2 else grid
    return grid.T if path % 2 else grid


def serpentine_lines(lines: np.ndarray) -> np.ndarray:
    """Every odd line backwards, (lines, length)."""
    lines = lines.copy()
    lines[1::2] = lines[1::2, ::-1]
    return lines


def sweep(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Lines that all run the same way, from every corner (DiMSUM's "sweep").

    8 paths: corner ``path // 2`` as for :func:`zigzag`, rows if even, columns if odd. DiMSUM: arXiv 2411.04168.
    """
    check_path("sweep", path, 8)
    return as_order(_seen_from(h, w, path))


def zigzag(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Lines to and fro, from every corner, so that each token touches the one before it (ZigMa).

    8 paths: corner ``path // 2`` (0 top left, 1 top right, 2 bottom left, 3 bottom right), rows if even, columns if
    odd. ZigMa (arXiv 2403.13802), section 3.2; DiMSUM's "zigma". Layer l uses path l mod 8.
    """
    check_path("zigzag", path, 8)
    return as_order(serpentine_lines(_seen_from(h, w, path)))


def jpeg(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Anti-diagonals to and fro, from every corner, as JPEG reads its coefficients (DiMSUM's "jpeg").

    8 paths: corner ``path // 2`` as for :func:`zigzag`; even paths leave it along the row, odd ones along the column.
    DiMSUM's released code is right for even squares only, this one for every grid.
    """
    check_path("jpeg", path, 8)
    grid = _seen_from(h, w, path)
    row, col = np.indices(grid.shape)
    diagonal = row + col
    along = np.where(diagonal % 2, row, -row)
    return as_order(grid.ravel()[np.lexsort((along.ravel(), diagonal.ravel()))])


def _sides(window: int | Sequence[int]) -> tuple[int, int]:
    sides = (window, window) if isinstance(window, int) else tuple(window)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"window is a side of at least 1 or a pair (rows, columns), got {window!r}")
    return sides


def local_window_padded(h: int, w: int, window: int | Sequence[int] = 4, column_first: bool = False) -> torch.Tensor:
    """:func:`local_window` on the grid padded at the bottom and right to whole windows; -1 stands for padding.

    LocalMamba (arXiv 2403.09338) inserts zeros at these steps; a scan that skips them needs :func:`local_window`.

    Returns:
        (ceil(h / window) * ceil(w / window) * window ** 2,) int32.
    """
    rows, cols = _sides(window)
    grid = cells(h, w)
    grid = np.pad(grid, ((0, -h % rows), (0, -w % cols)), constant_values=-1)
    blocks = grid.reshape(grid.shape[0] // rows, rows, grid.shape[1] // cols, cols)
    return as_order(blocks.transpose(2, 0, 3, 1) if column_first else blocks.transpose(0, 2, 1, 3))


def local_window(h: int, w: int, window: int | Sequence[int] = 4, column_first: bool = False) -> torch.Tensor:
    """Window by window, and row by row inside each (LocalMamba, DiMSUM).

    Args:
        window: side of the square windows, or (rows, columns). Windows at the bottom and right edge of a grid that
            it does not divide are cut off.
        column_first: windows one below the other and columns inside them, instead of rows.
    Returns:
        (h * w,) int32.
    """
    padded = local_window_padded(h, w, window, column_first)
    return padded[padded >= 0]


def local(h: int, w: int, path: int = 0, window: int | Sequence[int] = 4) -> torch.Tensor:
    """Windows: row-first, the same backwards, column-first, the same backwards (LocalMamba).

    Args:
        window: see :func:`local_window`.
    """
    check_path("local", path, 4)
    order = local_window(h, w, window, column_first=path >= 2)
    return reverse(order) if path % 2 else order
