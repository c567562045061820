"""What the Mamba-2 scan's Triton kernels share: operands of the matrix products, decays of a chunk, tiles in memory.

A program works on chunks of CHUNK steps of one head (or of the heads of a group, one after the other), as README.md
derives. Tiles are (CHUNK, NB) for B and C, (CHUNK, PB) for x and the like, (NB, PB) for states and (CHUNK, CHUNK)
for pairs of steps; NB is the padded number of states, PB a block of the channels of a head.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, in bfloat16 products where HALF, in float32 sums always."""
    if HALF:
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def exponent_sums(step, a2):
    """Running sums over (CHUNK,) steps of the exponents step * a2, to base 2: multiples of 1/16, exact, and the rest.

    The difference of two sums is then as good as the sum between, also behind a step that wiped the state out. An
    exponent below -1000 is taken as -1000, which is zero all the same.
    """
    exponent = step * a2
    exponent = tl.where(exponent < -1000.0, -1000.0, exponent)
    coarse = tl.floor(exponent * 16.0 + 0.5) * 0.0625
    return tl.cumsum(coarse, 0), tl.cumsum(exponent - coarse, 0)


@triton.jit
def last_of(vector, CHUNK: tl.constexpr):
    """The last element of (CHUNK,)."""
    return tl.sum(tl.where(tl.arange(0, CHUNK) == CHUNK - 1, vector, 0.0), 0)


@triton.jit
def decay_between(coarse, fine, CHUNK: tl.constexpr):
    """Decay of what step s leaves at step t, (t, s); zero for the steps of the future."""
    i = tl.arange(0, CHUNK)
    gap = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.exp2(tl.where(i[:, None] >= i[None, :], gap, float("-inf")))


@triton.jit
def shifted(offset, ALIGNED: tl.constexpr):
    """An offset in elements; ALIGNED promises a multiple of 8, which allows wide loads."""
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return offset


@triton.jit
def load_rows(base, row, live, row_stride, column, column_stride, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """Tile of rows (CHUNK,) by columns below SIZE; zero where a row is not live. EXACT: all columns are."""
    mask = live[:, None]
    if not EXACT:
        mask = mask & (column < SIZE)[None, :]
    return tl.load(base + row[:, None] * row_stride + column[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def store_rows(base, row, inside, row_stride, column, value, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """Store a tile with dense columns."""
    mask = inside[:, None]
    if not EXACT:
        mask = mask & (column < SIZE)[None, :]
    tl.store(base + row[:, None] * row_stride + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def state_offsets(n, p, n_stride, p_stride):
    """Offsets of an (NB, PB) tile."""
    return n[:, None] * n_stride + p[None, :] * p_stride


@triton.jit
def visited(orders, step, inside, limit, WIDE: tl.constexpr):
    """(rows of the steps, which of them are live): inside the sequence and above the limit of valid rows."""
    if orders is None:
        row = step
    else:
        row = tl.load(orders + step, mask=inside, other=0)
    live = inside & (row < limit)
    if WIDE:  # offsets inside one batch row pass 2^31
        row = row.to(tl.int64)
    return row, live
