"""Triton kernels of isolated scans over few tokens. Steps are positions along an order, rows the tokens' own positions.

project  a program makes a stretch of one direction's convolved inputs, step sizes and maps
walk     a program scans all directions of a few channels at once, each in SEGS pieces of time

Between them lie, step by step and up to a whole number of pieces: inputs, (Bt, K, padded, E); step sizes, zero after
the last step; and maps, (Bt, K, padded, ROW) float32: B and C in turn, two states of each.

The walk's tensors are (P, NL * EL): a warp has one of the P = directions x SEGS pieces, its lanes EL channels times NL
groups of states, and a lane holds pairs of states, one tensor for each state. Everything is loaded by the lanes that
need it, so that no value changes its lane inside the loops but for the sum over the NL groups.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

import triton
import triton.language as tl

from genssm.kernels.selective_scan.triton_tiles import LOG2E, sigmoid, softplus
from genssm.kernels.triton_launch import TABLES


@triton.jit
def _convolved(
    x, orders, taps, bias, x_l, x_e, k, step, length, e, e_mask, CHANNELS: tl.constexpr, W: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """silu(conv(x)) of the BLOCK_L steps from ``step`` on, (E) each, in the type of ``x``."""
    w = tl.arange(0, TAPS)
    taps = taps + (k * CHANNELS + e)[:, None] * W + w[None, :]
    taps = tl.load(taps, mask=e_mask[:, None] & (w < W)[None, :], other=0.0).to(tl.float32)
    cs = ()
    for t in tl.static_range(BLOCK_L):
        row = step + t - (W - 1) + w
        live = (row >= 0) & (w < W) & (step + t < length)
        if orders is not None:
            row = tl.load(orders + k * length + row, mask=live, other=0)
        place = x + row.to(tl.int64)[None, :] * x_l + e[:, None] * x_e
        y = tl.load(place, mask=live[None, :] & e_mask[:, None], other=0.0).to(tl.float32)
        y = tl.sum(y * taps, 1)
        if bias is not None:
            y += tl.load(bias + k * CHANNELS + e, mask=e_mask, other=0.0).to(tl.float32)
        cs = cs + ((y * sigmoid(y)).to(x.dtype.element_ty),)
    return cs


@triton.jit
def _products(weights, c):
    """W c of weights (O, E) and c (E), rounded to the type of the weights; float32."""
    return tl.sum(weights.to(tl.float32) * c.to(tl.float32)[None, :], 1).to(weights.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["x_b", "length", "padded", "directions", "tiles"], do_not_specialize_on_alignment=TABLES)
def project_kernel(
    x, orders, taps, bias, x_proj, dt_proj, dt_bias, inputs, steps, maps, x_b, x_l, x_e, length, padded, directions,
    tiles, CHANNELS: tl.constexpr, STATES: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, ROW: tl.constexpr,
    COLUMNS: tl.constexpr, RANKS: tl.constexpr, TAPS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """c = silu(conv(x)) of BLOCK_L steps and a part of what is made of it, written step by step.

    Part 0 makes softplus(W_dt r + bias) with r = W_r c, the others COLUMNS each of [B, C] = W_x c. A program is one
    warp, whose lanes share out the channels, so that products are sums over lanes: no value leaves the warp, nothing
    waits for another one, and c, which is little work, is made again by every part. Weights are on their way before.
    """
    tile = tl.program_id(0) % tiles
    k = (tl.program_id(0) // tiles) % directions
    b = tl.program_id(0) // tiles // directions
    step = tile * BLOCK_L
    at = ((b * directions + k) * padded + step).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    e_mask = e < CHANNELS
    shift = b.to(tl.int64) * x_b
    if ALIGNED:  # rows may be read in wide accesses
        shift = tl.multiple_of(shift, 8)
    x += shift
    x_proj += k * (RANK + 2 * STATES) * CHANNELS
    if tl.program_id(1) == 0:
        r = tl.arange(0, RANKS)
        to_rank = x_proj + r[:, None] * CHANNELS + e[None, :]
        to_rank = tl.load(to_rank, mask=(r < RANK)[:, None] & e_mask[None, :], other=0.0)
        step_bias = tl.load(dt_bias + k * CHANNELS + e, mask=e_mask, other=0.0).to(tl.float32)
        cs = _convolved(x, orders, taps, bias, x_l, x_e, k, step, length, e, e_mask, CHANNELS, W, TAPS, BLOCK_L)
        to_step = dt_proj + (k * CHANNELS + e)[:, None] * RANK + r[None, :]
        to_step = tl.load(to_step, mask=(r < RANK)[None, :] & e_mask[:, None], other=0.0)
        for t in tl.static_range(BLOCK_L):
            delta = _products(to_step, _products(to_rank, cs[t]))
            size = tl.where(step + t < length, softplus(delta + step_bias), 0.0)
            tl.store(inputs + (at + t) * CHANNELS + e, cs[t], mask=e_mask)
            tl.store(steps + (at + t) * CHANNELS + e, size, mask=e_mask)
    else:
        column = (tl.program_id(1) - 1) * COLUMNS + tl.arange(0, COLUMNS)
        n = column // 4 * 2 + column % 2
        to_maps = x_proj + (RANK + column % 4 // 2 * STATES + n)[:, None] * CHANNELS + e[None, :]
        to_maps = tl.load(to_maps, mask=(n < STATES)[:, None] & e_mask[None, :], other=0.0)
        cs = _convolved(x, orders, taps, bias, x_l, x_e, k, step, length, e, e_mask, CHANNELS, W, TAPS, BLOCK_L)
        for t in tl.static_range(BLOCK_L):
            tl.store(maps + (at + t) * ROW + column, _products(to_maps, cs[t]))


@triton.jit
def _spread(pointers, zero):
    """Pointers (P, lanes) of an access whose lanes are the lanes of a warp, whatever their addresses are.

    The compiler gives them to the axis with neighbours: two are claimed, and ``zero``, of unknown divisibility, keeps
    any access from being that wide.
    """
    return tl.max_contiguous(pointers + zero, [1, 2])


@triton.jit
def _trip(inputs_at, steps_at, maps_at, CHANNELS: tl.constexpr, ROW: tl.constexpr, NI: tl.constexpr, NL: tl.constexpr,
          UNROLL: tl.constexpr):  # fmt: skip
    """What UNROLL steps read, (P, lanes) each: inputs, step sizes, NI of B and NI of C."""
    us = ()
    ds = ()
    bs = ()
    cs = ()
    for j in tl.static_range(UNROLL):
        us = us + (tl.load(inputs_at + j * CHANNELS).to(tl.float32),)
        ds = ds + (tl.load(steps_at + j * CHANNELS),)
        for i in tl.static_range(NI // 2):
            four = tl.load(maps_at + (j * ROW + i * NL * 4))  # (P, lanes, 4)
            even, odd = tl.split(tl.reshape(four, [four.shape[0], four.shape[1], 2, 2]))
            b_even, c_even = tl.split(even)
            b_odd, c_odd = tl.split(odd)
            bs = bs + (b_even, b_odd)
            cs = cs + (c_even, c_odd)
    return us, ds, bs, cs


@triton.jit
def _advance(h, a2, u, d, bs, j, NI: tl.constexpr):
    """The states one step on: h exp(d A) + d u B, of each of the NI."""
    new = ()
    for i in tl.static_range(NI):
        new = new + (tl.exp2(d * a2[i]) * h[i] + (d * u) * bs[j * NI + i],)
    return new


@triton.jit
def _sum_directions(
    partial, z, out, b, block, z_b, z_l, z_e, length, directions, CHANNELS: tl.constexpr, MOST: tl.constexpr,
    EL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Results of the rows: what the directions, MOST at most, left in ``partial``, added and gated."""
    e = block * EL + tl.arange(0, EL)[None, :]
    for first in range(0, length, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < length) & (e < CHANNELS)
        y = tl.zeros([ROWS, EL], tl.float32)
        for j in tl.static_range(MOST):
            place = partial + (((b * directions + j) * length + row) * CHANNELS + e)
            y += tl.load(place, mask=mask & (j < directions), other=0.0)
        if z is not None:
            gate = z + b.to(tl.int64) * z_b + row.to(tl.int64) * z_l + e * z_e
            gate = tl.load(gate, mask=mask, other=0.0).to(tl.float32)
            y = y * gate * sigmoid(gate)
        tl.store(out + ((b * length + row) * CHANNELS + e), y.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["z_b", "length", "padded", "directions", "span", "zero"], do_not_specialize_on_alignment=TABLES
)
def walk_kernel(
    inputs, steps, maps, a_log, skip, z, orders, partial, carry, out, z_b, z_l, z_e, length, padded, directions, span,
    zero, CHANNELS: tl.constexpr, STATES: tl.constexpr, ROW: tl.constexpr, P: tl.constexpr, SEGS: tl.constexpr,
    NI: tl.constexpr, NL: tl.constexpr, EL: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """h_t = exp(delta_t A) h_{t-1} + delta_t c_t B_t, y_t = C_t h_t + D c_t, summed over directions and gated.

    Each piece of time is walked from zero, which gives what it adds to the state; from these the state before it is
    made, and it is walked again. ``partial`` takes each direction's y, ``carry`` what pieces add. Warps without a
    direction, and lanes without a channel, do what the last one does and store nothing.
    """
    BLOCKS: tl.constexpr = (CHANNELS + EL - 1) // EL
    LANES: tl.constexpr = NL * EL
    block = tl.program_id(0) % BLOCKS
    b = tl.program_id(0) // BLOCKS
    lane = tl.arange(0, LANES)[None, :]
    piece = tl.arange(0, P)[:, None]
    k = tl.minimum(piece // SEGS, directions - 1)
    segment = piece % SEGS
    start = segment * span
    e = tl.minimum(block * EL + lane % EL, CHANNELS - 1)
    left = length - start
    kept = (piece // SEGS < directions) & (block * EL + lane < CHANNELS) & (lane < EL)
    to = partial + ((b * directions + k) * length * CHANNELS + e)
    if orders is not None:
        orders += k * length + start
    at = (b * directions + k) * padded + start
    inputs_at = _spread(inputs + (at * CHANNELS + e), zero)
    steps_at = _spread(steps + (at * CHANNELS + e), zero)
    maps_at = maps + ((at * ROW + lane // EL * 4)[:, :, None] + tl.arange(0, 4)[None, None, :])
    maps_at = tl.max_contiguous(maps_at, [1, 2, 4])  # lanes are given to the second axis, as by _spread
    parameter = k * CHANNELS + e
    a2 = ()
    h = ()
    for i in tl.static_range(NI):
        n = (i // 2 * NL + lane // EL) * 2 + i % 2
        value = tl.load(_spread(a_log + (parameter * STATES + n), zero), mask=n < STATES, other=0.0).to(tl.float32)
        a2 = a2 + (tl.exp(value) * -LOG2E,)
        h = h + (tl.zeros([P, LANES], tl.float32),)
    d = tl.load(_spread(skip + parameter, zero)).to(tl.float32)
    d = tl.where(lane < EL, d, 0.0)

    if SEGS > 1:
        total = tl.zeros([P, LANES], tl.float32)
        for t in range(0, span, UNROLL):
            us, ds, bs, cs = _trip(
                inputs_at + t * CHANNELS, steps_at + t * CHANNELS, maps_at + t * ROW, CHANNELS, ROW, NI, NL, UNROLL
            )
            for j in tl.static_range(UNROLL):
                h = _advance(h, a2, us[j], ds[j], bs, j, NI)
                total += ds[j]
        mine = carry + tl.program_id(0).to(tl.int64) * ((NI + 1) * P * LANES) + lane
        tl.store(_spread(mine + piece * LANES, zero), total)
        for i in tl.static_range(NI):
            tl.store(_spread(mine + (piece + (i + 1) * P) * LANES, zero), h[i])
        tl.debug_barrier()
        h = (tl.zeros([P, LANES], tl.float32),) * NI
        for j in tl.static_range(SEGS - 1):
            other = piece // SEGS * SEGS + j
            decay = tl.load(_spread(mine + other * LANES, zero))
            new = ()
            for i in tl.static_range(NI):
                added = tl.load(_spread(mine + (other + (i + 1) * P) * LANES, zero))
                new = new + (tl.where(segment > j, tl.exp2(decay * a2[i]) * h[i] + added, h[i]),)
            h = new

    for t in range(0, span, UNROLL):
        us, ds, bs, cs = _trip(
            inputs_at + t * CHANNELS, steps_at + t * CHANNELS, maps_at + t * ROW, CHANNELS, ROW, NI, NL, UNROLL
        )
        rows = ()  # looked up before anything is stored: the compiler must assume that this changes them
        for j in tl.static_range(UNROLL):
            row = start + (t + j)
            if orders is not None:
                row = tl.load(orders + (t + j), mask=j < left - t, other=0)
            rows = rows + (row,)
        for j in tl.static_range(UNROLL):
            h = _advance(h, a2, us[j], ds[j], bs, j, NI)
            y = d * us[j]
            for i in tl.static_range(NI):
                y += h[i] * cs[j * NI + i]
            if NL > 1:
                y = tl.sum(tl.reshape(y, [P, NL, EL]), 1)
                y = tl.reshape(tl.broadcast_to(y[:, None, :], [P, NL, EL]), [P, LANES])
            tl.store(_spread(to + rows[j] * CHANNELS, zero), y, mask=kept & (j < left - t))
    tl.debug_barrier()

    _sum_directions(partial, z, out, b, block, z_b, z_l, z_e, length, directions, CHANNELS, P // SEGS, EL, ROWS)
