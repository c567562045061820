"""Triton kernels of isolated scans over few tokens. Steps are positions along an order, rows the tokens' own positions.

project  a program makes a stretch of one direction's convolved inputs, step sizes and maps
walk     a program scans all directions of a few channels at once, each in SEGS pieces of time

The walk's tensors are (P, NL * EL): a warp has one of the P = directions x SEGS pieces, its lanes EL channels times NL
groups of states, and a lane holds NI states, one tensor each. Everything is loaded by the lanes that need it, so that
no value changes its lane inside the loops but for the sum over the NL groups.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

import triton
import triton.language as tl

from genssm.kernels.selective_scan.triton_tiles import LOG2E, below, sigmoid, softplus


@triton.jit(do_not_specialize=["x_b", "length", "directions", "tiles"])
def project_kernel(
    x, orders, weight, bias, x_proj, dt_proj, dt_bias, inputs, steps, maps, x_b, x_l, x_e, length, directions, tiles,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, RANK: tl.constexpr, W: tl.constexpr, RANKS: tl.constexpr,
    MAPS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """c = silu(conv(x)), [r, B, C] = W_x c and softplus(W_dt r + bias) of BLOCK_L steps, written step by step."""
    tile = tl.program_id(0) % tiles
    k = (tl.program_id(0) // tiles) % directions
    b = tl.program_id(0) // tiles // directions
    step = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    here = step < length
    at = ((b * directions + k) * length + step).to(tl.int64)
    shift = b.to(tl.int64) * x_b
    if ALIGNED:  # rows may be read in wide accesses
        shift = tl.multiple_of(shift, 8)
    x += shift
    for first in range(0, CHANNELS, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        e_mask = e < CHANNELS
        y = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
        if bias is not None:
            y += tl.load(bias + k * CHANNELS + e, mask=e_mask, other=0.0).to(tl.float32)[None, :]
        for w in tl.static_range(W):
            before = step - (W - 1) + w
            live = (before >= 0) & here
            row = before
            if orders is not None:
                row = tl.load(orders + k * length + before, mask=live, other=0)
            place = x + row.to(tl.int64)[:, None] * x_l + e[None, :] * x_e
            value = tl.load(place, mask=live[:, None] & e_mask[None, :], other=0.0).to(tl.float32)
            tap = tl.load(weight + (k * CHANNELS + e) * W + w, mask=e_mask, other=0.0).to(tl.float32)
            y += value * tap[None, :]
        place = inputs + at[:, None] * CHANNELS + e[None, :]
        tl.store(place, (y * sigmoid(y)).to(inputs.dtype.element_ty), mask=here[:, None] & e_mask[None, :])
    tl.debug_barrier()  # read again, or the compiler has each warp make all that its product takes

    rank, column = tl.arange(0, RANKS), tl.arange(0, MAPS)
    x_proj += k * (RANK + 2 * STATES) * CHANNELS
    r = tl.zeros([BLOCK_L, RANKS], tl.float32)
    bc = tl.zeros([BLOCK_L, MAPS], tl.float32)
    for first in range(0, CHANNELS, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        e_mask = e < CHANNELS
        c = inputs + at[:, None] * CHANNELS + e[None, :]
        c = tl.load(c, mask=here[:, None] & e_mask[None, :], other=0.0)
        to_rank = x_proj + rank[None, :] * CHANNELS + e[:, None]
        to_rank = tl.load(to_rank, mask=(rank < RANK)[None, :] & e_mask[:, None], other=0.0)
        to_maps = x_proj + (RANK + column)[None, :] * CHANNELS + e[:, None]
        to_maps = tl.load(to_maps, mask=(column < 2 * STATES)[None, :] & e_mask[:, None], other=0.0)
        r = tl.dot(c, to_rank, r, input_precision="ieee")
        bc = tl.dot(c, to_maps, bc, input_precision="ieee")
    kept = here[:, None] & (column < 2 * STATES)[None, :]
    tl.store(maps + at[:, None] * (2 * STATES) + column[None, :], bc.to(maps.dtype.element_ty), mask=kept)
    r = r.to(inputs.dtype.element_ty)
    for first in range(0, CHANNELS, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        e_mask = e < CHANNELS
        to_step = dt_proj + (k * CHANNELS + e)[None, :] * RANK + rank[:, None]
        to_step = tl.load(to_step, mask=(rank < RANK)[:, None] & e_mask[None, :], other=0.0)
        delta = tl.dot(r, to_step, input_precision="ieee").to(inputs.dtype.element_ty).to(tl.float32)
        delta += tl.load(dt_bias + k * CHANNELS + e, mask=e_mask, other=0.0).to(tl.float32)[None, :]
        place = steps + at[:, None] * CHANNELS + e[None, :]
        tl.store(place, softplus(delta), mask=here[:, None] & e_mask[None, :])


@triton.jit
def _spread(pointers, zero):
    """Pointers (P, lanes) of an access whose lanes are the lanes of a warp, whatever their addresses are.

    The compiler gives them to the axis with neighbours: two are claimed, and ``zero``, of unknown divisibility, keeps
    any access from being that wide.
    """
    return tl.max_contiguous(pointers + zero, [1, 2])


@triton.jit
def _trip(inputs_at, steps_at, maps_at, live, left, e_mask, n_masks, CHANNELS: tl.constexpr, STATES: tl.constexpr,
          NI: tl.constexpr, UNROLL: tl.constexpr, OUTPUT: tl.constexpr):  # fmt: skip
    """What UNROLL steps read, (P, lanes) each: inputs, step sizes, NI of B and NI of C; a dead step has size 0."""
    us = ()
    ds = ()
    bs = ()
    cs = ()
    for j in tl.static_range(UNROLL):
        seen = live & (j < left)
        us = us + (tl.load(inputs_at + j * CHANNELS, mask=seen & e_mask, other=0.0).to(tl.float32),)
        ds = ds + (tl.load(steps_at + j * CHANNELS, mask=seen & e_mask, other=0.0),)
        for i in tl.static_range(NI):
            mask = seen & n_masks[i]
            bs = bs + (tl.load(maps_at + (j * 2 * STATES + i), mask=mask, other=0.0).to(tl.float32),)
            if OUTPUT:
                cs = cs + (tl.load(maps_at + (j * 2 * STATES + STATES + i), mask=mask, other=0.0).to(tl.float32),)
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


@triton.jit(do_not_specialize=["z_b", "length", "directions", "span", "zero"])
def walk_kernel(
    inputs, steps, maps, a_log, skip, z, orders, partial, carry, out, z_b, z_l, z_e, length, directions, span, zero,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, P: tl.constexpr, SEGS: tl.constexpr, NI: tl.constexpr,
    NL: tl.constexpr, EL: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """h_t = exp(delta_t A) h_{t-1} + delta_t c_t B_t, y_t = C_t h_t + D c_t, summed over directions and gated.

    Each piece of time is walked from zero, which gives what it adds to the state; from these the state before it is
    made, and it is walked again. ``partial`` takes each direction's y, ``carry`` what pieces add.
    """
    BLOCKS: tl.constexpr = (CHANNELS + EL - 1) // EL
    LANES: tl.constexpr = NL * EL
    block = tl.program_id(0) % BLOCKS
    b = tl.program_id(0) // BLOCKS
    lane = tl.arange(0, LANES)[None, :]
    piece = tl.arange(0, P)[:, None]
    k = piece // SEGS
    segment = piece % SEGS
    start = segment * span
    e = block * EL + lane % EL
    e_mask = below(e, CHANNELS, CHANNELS % EL == 0)
    n = (lane // EL) * NI
    live = (k < directions) & (start < length)
    ends = tl.minimum(span, length - start)  # steps of a piece
    direction = (b * directions + k) * length  # first step of a direction, and its first row
    at = direction + start
    inputs_at = _spread(inputs + (at * CHANNELS + e), zero)
    steps_at = _spread(steps + (at * CHANNELS + e), zero)
    maps_at = _spread(maps + (at * (2 * STATES) + n), zero)
    parameter = k * CHANNELS + e
    a2 = ()
    h = ()
    n_masks = ()
    for i in tl.static_range(NI):
        n_masks = n_masks + (below(n + i, STATES, STATES == NL * NI),)
        value = _spread(a_log + (parameter * STATES + (n + i)), zero)
        value = tl.load(value, mask=live & e_mask & n_masks[i], other=0.0).to(tl.float32)
        a2 = a2 + (tl.exp(value) * -LOG2E,)
        h = h + (tl.zeros([P, LANES], tl.float32),)
    d = tl.load(_spread(skip + parameter, zero), mask=live & e_mask & (lane < EL), other=0.0).to(tl.float32)

    if SEGS > 1:
        total = tl.zeros([P, LANES], tl.float32)
        for t in range(0, span, UNROLL):
            us, ds, bs, cs = _trip(
                inputs_at + t * CHANNELS,
                steps_at + t * CHANNELS,
                maps_at + t * (2 * STATES),
                live,
                ends - t,
                e_mask,
                n_masks,
                CHANNELS,
                STATES,
                NI,
                UNROLL,
                False,
            )
            for j in tl.static_range(UNROLL):
                h = _advance(h, a2, us[j], ds[j], bs, j, NI)
                total += ds[j]
        kept = carry + tl.program_id(0).to(tl.int64) * ((NI + 1) * P * LANES) + lane
        tl.store(_spread(kept + piece * LANES, zero), total)
        for i in tl.static_range(NI):
            tl.store(_spread(kept + (piece + (i + 1) * P) * LANES, zero), h[i])
        tl.debug_barrier()
        h = (tl.zeros([P, LANES], tl.float32),) * NI
        for j in tl.static_range(SEGS - 1):
            other = k * SEGS + j
            decay = tl.load(_spread(kept + other * LANES, zero))
            new = ()
            for i in tl.static_range(NI):
                added = tl.load(_spread(kept + (other + (i + 1) * P) * LANES, zero))
                new = new + (tl.where(segment > j, tl.exp2(decay * a2[i]) * h[i] + added, h[i]),)
            h = new

    for t in range(0, span, UNROLL):
        us, ds, bs, cs = _trip(
            inputs_at + t * CHANNELS,
            steps_at + t * CHANNELS,
            maps_at + t * (2 * STATES),
            live,
            ends - t,
            e_mask,
            n_masks,
            CHANNELS,
            STATES,
            NI,
            UNROLL,
            True,
        )
        for j in tl.static_range(UNROLL):
            h = _advance(h, a2, us[j], ds[j], bs, j, NI)
            y = d * us[j]
            for i in tl.static_range(NI):
                y += h[i] * cs[j * NI + i]
            if NL > 1:
                y = tl.sum(tl.reshape(y, [P, NL, EL]), 1)
                y = tl.reshape(tl.broadcast_to(y[:, None, :], [P, NL, EL]), [P, LANES])
            seen = live & (t + j < ends)
            row = start + (t + j)
            if orders is not None:
                row = tl.load(orders + (k * length + row), mask=seen, other=0)
            place = _spread(partial + ((direction + row) * CHANNELS + e), zero)
            tl.store(place, y, mask=seen & e_mask & (lane < EL))
    tl.debug_barrier()

    _sum_directions(partial, z, out, b, block, z_b, z_l, z_e, length, directions, CHANNELS, P // SEGS, EL, ROWS)
