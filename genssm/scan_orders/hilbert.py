"""Hilbert's curve on any grid."""

from functools import lru_cache

import numpy as np
import torch

from genssm.scan_orders.grid import as_order, check_path, check_sides, inverse

Vector = tuple[int, int]


@lru_cache(maxsize=1024)
def _curve(a: Vector, b: Vector, free_end: bool) -> np.ndarray:
    """Cells (row, column) of a curve through the rectangle spanned by the axis-aligned vectors ``a`` and ``b``.

    It starts at (0, 0) and ends at the other end of ``a``. Colour the cells like a chessboard: each step changes the
    colour, so such a curve exists only if |a| is even or both sides are odd. With |a| odd and |b| even the end moves
    (``free_end``): an even part of ``a`` is walked as usual and the rest along ``b``. Inner rectangles never have
    these sides, because the first part of every cut is even.

    Returns:
        (|a| |b|, 2) int32, read only by convention (it is cached).
    """
    w, h = abs(a[0] + a[1]), abs(b[0] + b[1])
    ua, ub = (a[0] // w, a[1] // w), (b[0] // h, b[1] // h)
    if h == 1 or w == 1:
        steps = np.arange(max(w, h), dtype=np.int32)[:, None]
        return steps * _row(ua if h == 1 else ub)
    odd_even = free_end and w % 2 == 1 and h % 2 == 0
    if odd_even or 2 * w > 3 * h:
        a2 = _even_half(a, w, ua)
        rest = _sub(a, a2)
        turn = odd_even and 2 * abs(rest[0] + rest[1]) <= 3 * h
        return np.concatenate([_curve(a2, b, False), _curve(*((b, rest) if turn else (rest, b)), free_end) + _row(a2)])
    a2, b2 = (a[0] // 2, a[1] // 2), _even_half(b, h, ub)
    corner = (a[0] - ua[0] + b2[0] - ub[0], a[1] - ua[1] + b2[1] - ub[1])
    return np.concatenate(
        [
            _curve(b2, a2, False),
            _curve(a, _sub(b, b2), False) + _row(b2),
            _curve(_sub((0, 0), b2), _sub(a2, a), False) + _row(corner),
        ]
    )


def _even_half(vector: Vector, length: int, unit: Vector) -> Vector:
    """About half of ``vector``, of even length unless ``vector`` is too short."""
    half = (vector[0] // 2, vector[1] // 2)
    if abs(half[0] + half[1]) % 2 == 1 and length > 2:
        return half[0] + unit[0], half[1] + unit[1]
    return half


def _sub(x: Vector, y: Vector) -> Vector:
    return (x[0] - y[0], x[1] - y[1])


def _row(vector: Vector) -> np.ndarray:
    return np.array(vector, dtype=np.int32)


def _visiting_times(h: int, w: int, path: int) -> np.ndarray:
    """Table (h, w) of visiting times of path 0..7: quarter turns (``path // 2`` of them), transposed if odd."""
    check_sides(h, w)
    turns, transposed = divmod(path, 2)
    rows, cols = (h, w) if (turns + transposed) % 2 == 0 else (w, h)
    points = _curve((rows, 0), (0, cols), True)
    times = np.empty((rows, cols), dtype=np.int32)
    times[points[:, 0], points[:, 1]] = np.arange(rows * cols, dtype=np.int32)
    times = np.rot90(times, turns)
    return times.T if transposed else times


def hilbert(h: int, w: int, path: int = 0) -> torch.Tensor:
    """Hilbert's curve on every grid: each token touches the one before it, without exception.

    Path 0 starts in the top left corner and ends in the bottom left one. There is no such curve if ``h`` is odd and
    ``w`` even (a path through such a chessboard ends on the other colour); then it ends elsewhere. On N x N grids this
    is the curve of ZigMa's Hilbert variant, visited in its true order (compare :func:`hilbert_released`).
    8 paths: the curve turned by ``path // 2`` quarter turns counter-clockwise, transposed if ``path`` is odd.
    """
    check_path("hilbert", path, 8)
    return inverse(as_order(_visiting_times(h, w, path)))


def hilbert_released(h: int, w: int, path: int = 0) -> torch.Tensor:
    """What ZigMa's released code scans as Hilbert: the inverse of the curve, which jumps.

    It takes the table of visiting times for the table of visited tokens. Needed for its weights, which are square.
    """
    check_path("hilbert_released", path, 8)
    return as_order(_visiting_times(h, w, path))
