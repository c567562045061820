"""What the scan's Triton kernels share: where the elements of a state tile live, how large tiles are, scalar functions.

A program is one warp. Its tile of states has EC x EL channels and NL x NI states; a lane holds EC x NI of them, the
channels ``ec * EL + el`` and the states ``nl * NI + ni``, and the NL * EL lanes of the warp hold the rest:

    tile (EC, NI, NL, EL), EC and NI inside a lane, NL and EL across lanes

so that sums over states cost log2(NL) shuffles and sums over channels log2(EL), and nothing needs shared memory
except the exchange of the (EC, EL) vectors when NL > 1. The compiler picks the layout of a tile from the pointers it
is loaded through. They are therefore written as (EC, NI, NL * EL) with the lanes on the axis that is contiguous in
memory, and with an offset ``zero`` of unknown divisibility, which keeps it from giving a lane several neighbours.
The numbers of channels and states are constants of a compiled kernel; lengths and batch sizes are not.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

import dataclasses

import triton
import triton.language as tl

from genssm.kernels.triton_launch import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LANES = 32


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a warp holds channels and states."""

    EC: int
    NI: int
    NL: int
    EL: int

    @property
    def channels(self) -> int:
        return self.EC * self.EL

    def blocks(self, channels: int) -> int:
        return -(-channels // self.channels)


def forward_tile(channels: int, states: int, block_e: int | None = None, state_lanes: int | None = None) -> Tile:
    """Up to 32 states in a lane, so that most sums over states need no shuffle; two channels where that wastes none."""
    padded = next_power_of_2(states)
    if block_e is None and padded <= 16 and channels % (2 * LANES) == 0:
        block_e = 2 * LANES
    return _tile(padded, state_lanes or max(1, padded // 32), block_e)


def backward_tile(states: int, block_e: int | None = None, state_lanes: int | None = None) -> Tile:
    """About 16 elements in a lane, split so that the sums over states and over channels share the shuffles."""
    padded = next_power_of_2(states)
    lanes = state_lanes or min(padded, 4 if padded <= 32 else 8 if padded <= 64 else 16)
    channels_per_lane = 1 if padded == 1 else min(4, max(1, 16 * lanes // padded))
    return _tile(padded, lanes, block_e or channels_per_lane * (LANES // lanes))


def _tile(padded_states: int, state_lanes: int, block_e: int | None) -> Tile:
    channel_lanes = LANES // state_lanes
    return Tile(
        max(1, (block_e or channel_lanes) // channel_lanes), padded_states // state_lanes, state_lanes, channel_lanes
    )


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(w), w = exp(-|x|), to 3e-8 of itself however small (before rounding).

    log1p(w) / w is a polynomial fitted on [0, 1]: no logarithm, whose expansion costs more than the rest.
    """
    w = tl.exp2(tl.abs(x) * -LOG2E)
    p = -0.0295051597 + w * 0.00523267314
    p = 0.0782258362 + w * p
    p = -0.136632368 + w * p
    p = 0.191060036 + w * p
    p = -0.24842982 + w * p
    p = 0.333190978 + w * p
    p = -0.499994934 + w * p
    p = 0.99999994 + w * p
    return tl.maximum(x, 0.0) + w * p


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def vector_channels(EC: tl.constexpr, EL: tl.constexpr):
    """Channels inside the block of the (EC, EL) vectors."""
    return tl.arange(0, EC)[:, None] * EL + tl.arange(0, EL)[None, :]


@triton.jit
def vector_states(NI: tl.constexpr, NL: tl.constexpr):
    """States of the (NI, NL) vectors."""
    return tl.arange(0, NI)[:, None] + tl.arange(0, NL)[None, :] * NI


@triton.jit
def tile_channels(EC: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr):
    """Channels inside the block of the pointers of a tile, (EC, 1, NL * EL)."""
    return (tl.arange(0, EC)[:, None] * EL + (tl.arange(0, NL * EL) % EL)[None, :])[:, None, :]


@triton.jit
def tile_states(NI: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr):
    """States of the pointers of a tile, (1, NI, NL * EL)."""
    return (tl.arange(0, NI)[:, None] + (tl.arange(0, NL * EL) // EL)[None, :] * NI)[None, :, :]


@triton.jit
def tile_offsets(STRIDE: tl.constexpr, EC: tl.constexpr, NI: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr):
    """Offsets of a tile in an (N, STRIDE) buffer, (EC, NI, NL * EL): what the lane decides, plus constants.

    The constants end in the immediate field of the instruction, so a tile costs one address and not EC x NI.
    """
    lane = tl.arange(0, NL * EL)
    lane = ((lane % EL) + (lane // EL) * (NI * STRIDE)).to(tl.int64)
    constant = tl.arange(0, EC)[:, None] * EL + tl.arange(0, NI)[None, :] * STRIDE
    return lane[None, None, :] + constant[:, :, None]


@triton.jit
def private_offsets(zero, EC: tl.constexpr, NI: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr):
    """Offsets of a tile that only one program sees: the lanes of an access are neighbours.

    Where a lane holds at least four states, four are one access, of 16 bytes, and the shape is (EC * NI / 4, 4,
    NL * EL); else it is the usual (EC, NI, NL * EL). The 2 claimed of the lanes is below that 4, so no access follows
    it; it only tells the compiler to give the lanes of the warp to that axis.
    """
    if NI % 4 == 0:
        fours = tl.arange(0, EC * NI // 4)[:, None] * (4 * NL * EL) + tl.arange(0, 4)[None, :]
        lane = tl.arange(0, NL * EL) * 4
        offsets = tl.max_contiguous(fours[:, :, None] + lane[None, None, :], [1, 4, 2])
    else:
        offsets = tile_offsets(EC * EL, EC, NI, NL, EL) + zero
    return offsets


@triton.jit
def tile_mask(
    inside,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    EC: tl.constexpr,
    NI: tl.constexpr,
    NL: tl.constexpr,
    EL: tl.constexpr,
):
    """Elements of the tile at channel ``inside`` of a group of CHANNELS that exist, (EC, NI, NL * EL)."""
    if CHANNELS % (EC * EL) == 0 and STATES == NI * NL:
        mask = tl.full([EC, NI, NL * EL], 1, tl.int1)
    else:
        mask = (tile_channels(EC, NL, EL) + inside < CHANNELS) & (tile_states(NI, NL, EL) < STATES)
    return mask


@triton.jit
def only(mask, condition):
    """A mask where a scalar condition holds. The comparison keeps the mask boolean in Triton's interpreter."""
    return (mask & condition) != 0


@triton.jit
def load_tile(pointers, mask, EC: tl.constexpr, NI: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr):
    """(EC, NI, NL * EL) pointers -> float32 tile (EC, NI, NL, EL), zero where masked."""
    return tl.reshape(tl.load(pointers, mask=mask, other=0.0).to(tl.float32), [EC, NI, NL, EL])


@triton.jit
def store_tile(pointers, tile, mask, EC: tl.constexpr, NI: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr):
    tl.store(pointers, tl.reshape(tile, [EC, NI, NL * EL]).to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def over_states(vector):
    """(EC, EL) -> (EC, 1, 1, EL), to meet a tile."""
    return vector[:, None, None, :]


@triton.jit
def over_channels(vector):
    """(NI, NL) -> (1, NI, NL, 1), to meet a tile."""
    return vector[None, :, :, None]


@triton.jit
def sum_states(tile):
    """(EC, NI, NL, EL) -> (EC, EL)."""
    return tl.sum(tl.sum(tile, 1), 1)


@triton.jit
def sum_channels(tile):
    """(EC, NI, NL, EL) -> (NI, NL)."""
    return tl.sum(tl.sum(tile, 0), 2)


@triton.jit
def load_vector(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_at(orders, step, WIDE: tl.constexpr):
    """Row visited at a step; ``orders`` None means first to last."""
    if orders is None:
        row = step
    else:
        row = tl.load(orders + step)
    if WIDE:  # offsets inside one batch row pass 2^31
        row = row.to(tl.int64)
    return row


@triton.jit
def below(index, size, EXACT: tl.constexpr):
    """index < size; EXACT says that it always is, which leaves wide loads whole."""
    if EXACT:
        mask = tl.full(index.shape, 1, tl.int1)
    else:
        mask = index < size
    return mask


@triton.jit
def trip_rows(orders, base, stop, WIDE: tl.constexpr, UNROLL: tl.constexpr):
    """Rows of the UNROLL steps from ``base`` on; past the end, the last step again."""
    rows = ()
    for i in tl.static_range(UNROLL):
        rows = rows + (row_at(orders, tl.minimum(base + i, stop - 1), WIDE),)
    return rows


@triton.jit
def steps_rows(orders, steps, low, high, WIDE: tl.constexpr):
    """Rows of a vector of steps, those outside of [low, high) taken as the nearest inside."""
    steps = tl.maximum(tl.minimum(steps, high - 1), low)
    if orders is None:
        rows = steps
    else:
        rows = tl.load(orders + steps)
    if WIDE:
        rows = rows.to(tl.int64)
    return rows


@triton.jit
def prefetch(base, rows, row_stride, column_stride, columns, WIDTH: tl.constexpr):
    """Bring ``columns`` (at most WIDTH) elements of each of the rows into the nearest cache, on NVIDIA devices.

    Asked for some steps before a loop reads these rows, which then waits for no memory and needs no registers for
    what lies ahead.
    """
    EACH: tl.constexpr = 256 // base.dtype.element_ty.primitive_bitwidth  # a cache loads 32 bytes at a time
    SECTORS: tl.constexpr = (WIDTH + EACH - 1) // EACH
    column = tl.minimum(tl.arange(0, SECTORS) * EACH, columns - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [base + (rows[:, None] * row_stride + column[None, :] * column_stride)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_tile(base, SIZE: tl.constexpr):
    """Bring SIZE float32 from ``base`` on into the nearest cache, on NVIDIA devices."""
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [base + tl.arange(0, SIZE // 8) * 8],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
