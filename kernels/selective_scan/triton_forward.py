"""Triton kernels of the scan's forward pass. Shapes as in `genssm.kernels.selective_scan`; tiles as in `triton_tiles`.

steps    positions along an order; rows are the tokens' own positions
chunk    CHUNK steps, counted from step 0 of the batch row; the state before each one but a sequence's first is kept for
         the backward
segment  SEGMENT chunks of one sequence, scanned by its own program where channels alone do not fill the device
block    EC * EL channels of one group
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

import triton
import triton.language as tl

from genssm.kernels.selective_scan.triton_tiles import (
    LOG2E,
    below,
    load_tile,
    load_vector,
    only,
    over_channels,
    over_states,
    prefetch,
    sigmoid,
    softplus,
    steps_rows,
    store_tile,
    sum_states,
    tile_channels,
    tile_mask,
    tile_offsets,
    tile_states,
    trip_rows,
    vector_channels,
    vector_states,
)
from genssm.kernels.triton_launch import TABLES

# Lengths and batch sizes never enter a compiled kernel: not as a constant, not through their divisibility.
_RUNTIME = [
    "u_b",
    "u_k",
    "d_b",
    "d_k",
    "z_b",
    "z_k",
    "b_b",
    "b_k",
    "c_b",
    "c_k",
    "a_k",
    "skip_k",
    "bias_k",
    "i_s",
    "i_k",
    "out_b",
    "out_k",
    "length",
    "sequences",
    "directions",
    "first_direction",
    "direction_programs",
    "segments",
    "segment_programs",
    "segment_chunks",
    "chunks",
    "zero",
]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def scan_forward_kernel(
    u,
    delta,
    a,
    b,
    c,
    skip,
    z,
    bias,
    orders,
    initial,
    lengths,
    first_steps,
    borders,
    out,
    last,
    saved,
    carry,
    decay,
    u_b,
    u_k,
    u_l,
    u_e,
    d_b,
    d_k,
    d_l,
    d_e,
    z_b,
    z_k,
    z_l,
    z_e,
    b_b,
    b_k,
    b_l,
    b_g,
    b_n,
    c_b,
    c_k,
    c_l,
    c_g,
    c_n,
    a_k,
    skip_k,
    bias_k,
    i_s,
    i_k,
    i_e,
    i_n,
    out_b,
    out_k,
    length,
    sequences,
    directions,
    direction_programs,
    segments,
    segment_programs,
    segment_chunks,
    chunks,
    zero,
    SOFTPLUS: tl.constexpr,
    OUTPUT: tl.constexpr,
    SEGMENTED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    PREFETCH: tl.constexpr,
    UNROLL: tl.constexpr,
    EC: tl.constexpr,
    NI: tl.constexpr,
    NL: tl.constexpr,
    EL: tl.constexpr,
):
    """Scan one segment of one sequence for one block of channels.

    With OUTPUT: from the right initial state, writes results, checkpoints and the last state. Without: from zero,
    writes only the segment's last state (``carry``) and its sum of delta (``decay``); the last segment takes no part.
    ACCUMULATE: this program takes the directions one after the other and adds them in ``out``.
    """
    BLOCK: tl.constexpr = EC * EL
    GROUP_BLOCKS: tl.constexpr = (GROUP_CHANNELS + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = GROUP_BLOCKS * (CHANNELS // GROUP_CHANNELS)
    block = tl.program_id(0) % BLOCKS
    work = tl.program_id(0) // BLOCKS
    first_direction = work % direction_programs
    work = work // direction_programs
    segment = work % segment_programs
    s = (work // segment_programs).to(tl.int64)
    group = block // GROUP_BLOCKS
    inside = (block % GROUP_BLOCKS) * BLOCK  # first channel of the block, inside its group
    origin = (inside + group * GROUP_CHANNELS).to(tl.int64)

    ev = vector_channels(EC, EL)
    ev_mask = below(ev + inside, GROUP_CHANNELS, GROUP_CHANNELS % BLOCK == 0)
    nv = vector_states(NI, NL)
    nv_mask = below(nv, STATES, STATES == NI * NL)
    own = tile_offsets(CHANNELS, EC, NI, NL, EL)
    own_mask = tile_mask(inside, GROUP_CHANNELS, STATES, EC, NI, NL, EL)
    et = tile_channels(EC, NL, EL)
    nt = tile_states(NI, NL, EL)
    if WIDE:
        ev = ev.to(tl.int64)
        et = et.to(tl.int64)

    row_batch = s
    if borders is not None:
        row_batch = s * 0
    limit = length
    if lengths is not None:
        limit = tl.load(lengths + s)

    for k in range(first_direction, directions, direction_programs):
        k64 = tl.full([], 0, tl.int64) + k
        sk = s * directions + k64
        order = orders
        if orders is not None:
            order = orders + k64 * length
        if borders is None:
            first = tl.full([], 0, tl.int32)
            end = length
        else:
            first = tl.load(first_steps + k64 * sequences + s)
            end = first + tl.load(borders + s + 1) - tl.load(borders + s)
        if SEGMENTED & OUTPUT:
            place = carry + ((s * segments + segment) * directions + k64) * (STATES * CHANNELS) + (origin + zero)
            h = load_tile(place + own, own_mask, EC, NI, NL, EL)
        elif OUTPUT & (initial is not None):
            place = initial + s * i_s + k64 * i_k + origin * i_e
            h = load_tile(place + (et * i_e + nt * i_n), own_mask, EC, NI, NL, EL)
        else:
            h = tl.zeros([EC, NI, NL, EL], tl.float32)
        # The last tile loaded decides the layout of the states: keep this load after that of the initial state.
        a2 = load_tile(a + k64 * a_k + (origin + zero) + own, own_mask, EC, NI, NL, EL) * LOG2E
        if bias is not None:
            bias_e = load_vector(bias + k64 * bias_k + origin + ev, ev_mask)
        if OUTPUT & (skip is not None):
            skip_e = load_vector(skip + k64 * skip_k + origin + ev, ev_mask)

        u_near = u + row_batch * u_b + k64 * u_k + (origin * u_e + zero)
        d_near = delta + row_batch * d_b + k64 * d_k + (origin * d_e + zero)
        u_at = u_near + ev * u_e
        d_at = d_near + ev * d_e
        b_shift = row_batch * b_b + k64 * b_k + group * b_g
        c_shift = row_batch * c_b + k64 * c_k + group * c_g
        if ALIGNED:  # lets a lane fetch its states of B and C with wide loads
            b_shift = tl.multiple_of(b_shift, 8)
            c_shift = tl.multiple_of(c_shift, 8)
        b_at = b + b_shift + nv * b_n
        c_at = c + c_shift + nv * c_n
        if OUTPUT:
            if z is not None:
                z_near = z + row_batch * z_b + k64 * z_k + (origin * z_e + zero)
                z_at = z_near + ev * z_e
            out_near = out + row_batch * out_b + k64 * out_k + (origin + zero)
            out_at = out_near + ev
            kept = saved + (row_batch * directions + k64) * chunks * (STATES * CHANNELS) + (origin + zero)
        total = tl.zeros([EC, EL], tl.float32)

        low = first // CHUNK + segment * segment_chunks
        high = tl.minimum(low + segment_chunks, tl.cdiv(end, CHUNK))
        bottom = tl.maximum(low * CHUNK, first)
        top = tl.maximum(tl.minimum(high * CHUNK, end), bottom + 1)
        columns = tl.minimum(GROUP_CHANNELS - inside, BLOCK)
        if PREFETCH:
            rows_ahead = steps_rows(order, bottom + WINDOW + tl.arange(0, WINDOW), bottom, top, WIDE)
        for chunk in range(low, high):
            if OUTPUT:
                at = kept + (chunk - 1) * (STATES * CHANNELS)
                store_tile(at + own, h, only(own_mask, chunk * CHUNK > first), EC, NI, NL, EL)
            stop = tl.minimum((chunk + 1) * CHUNK, end)
            start = tl.maximum(chunk * CHUNK, first)
            next_rows = trip_rows(order, start, stop, WIDE, UNROLL)
            for window in range(start, stop, WINDOW):
                if PREFETCH:  # what the next window reads, and the rows of the one after it
                    prefetch(u_near, rows_ahead, u_l, u_e, columns, BLOCK)
                    prefetch(d_near, rows_ahead, d_l, d_e, columns, BLOCK)
                    prefetch(b + b_shift, rows_ahead, b_l, b_n, STATES, NI * NL)
                    if OUTPUT:
                        prefetch(c + c_shift, rows_ahead, c_l, c_n, STATES, NI * NL)
                        if z is not None:
                            prefetch(z_near, rows_ahead, z_l, z_e, columns, BLOCK)
                        if ACCUMULATE:
                            prefetch(out_near, rows_ahead, CHANNELS, 1, columns, BLOCK)
                    rows_ahead = steps_rows(order, window + 2 * WINDOW + tl.arange(0, WINDOW), bottom, top, WIDE)
                past = tl.minimum(window + WINDOW, stop)
                for base in range(window, past, UNROLL):
                    # All loads of the trip before its arithmetic: a store may alias them, so nothing moves them up.
                    rows = next_rows
                    next_rows = trip_rows(order, base + UNROLL, stop, WIDE, UNROLL)
                    seen = ()
                    us = ()
                    ds = ()
                    zs = ()
                    bs = ()
                    cs = ()
                    sums = ()
                    for i in tl.static_range(UNROLL):
                        live = base + i < past
                        row = rows[i]
                        e_mask = ev_mask
                        n_mask = nv_mask
                        if lengths is not None:  # padding may hold anything
                            live = live & (row < limit)
                            e_mask = only(ev_mask, live)
                            n_mask = only(nv_mask, live)
                        seen = seen + (live,)
                        us = us + (load_vector(u_at + row * u_l, e_mask),)
                        ds = ds + (load_vector(d_at + row * d_l, e_mask),)
                        bs = bs + (load_vector(b_at + row * b_l, n_mask),)
                        if OUTPUT:
                            cs = cs + (load_vector(c_at + row * c_l, n_mask),)
                            if z is not None:
                                zs = zs + (load_vector(z_at + row * z_l, e_mask),)
                            if ACCUMULATE:
                                sums = sums + (load_vector(out_at + row * CHANNELS, only(ev_mask, k64 > 0)),)
                    for i in tl.static_range(UNROLL):
                        step = ds[i]
                        if bias is not None:
                            step = step + bias_e
                        if SOFTPLUS:
                            step = softplus(step)
                        step = tl.where(seen[i], step, 0.0)
                        h = tl.exp2(over_states(step) * a2) * h + over_states(step * us[i]) * over_channels(bs[i])
                        if OUTPUT:
                            y = sum_states(h * over_channels(cs[i]))
                            if skip is not None:
                                y = y + skip_e * us[i]
                            if z is not None:
                                y = y * zs[i] * sigmoid(zs[i])
                            mask = only(ev_mask, base + i < past)
                            if ACCUMULATE:
                                y = y + sums[i]
                            tl.store(out_at + rows[i] * CHANNELS, y.to(out.dtype.element_ty), mask=mask)
                        else:
                            total = total + step

        if OUTPUT:
            if last is not None:
                written = only(own_mask, segment == segments - 1)
                place = last + (sk * CHANNELS + origin) * STATES
                store_tile(place + (et * STATES + nt), h, written, EC, NI, NL, EL)
        else:
            place = (s * segments + segment) * directions + k64
            store_tile(carry + place * (STATES * CHANNELS) + (origin + zero) + own, h, own_mask, EC, NI, NL, EL)
            tl.store(decay + place * CHANNELS + (origin + zero) + ev, total, mask=ev_mask)


@triton.jit(do_not_specialize=["a_k", "i_s", "i_k", "directions", "segments"])
def chain_kernel(
    carry,
    decay,
    a,
    seed,
    a_k,
    i_s,
    i_k,
    i_e,
    i_n,
    directions,
    segments,
    REVERSE: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace what each segment adds to a zero state (``carry``) by the state it really starts from.

    x_0 = seed, x_{i+1} = exp(A decay_i) x_i + carry_i, then carry_i = x_i; from the last segment back with REVERSE.
    Every state is a chain of its own, so a program takes BLOCK of the N x E as they come.
    """
    sk = tl.program_id(1).to(tl.int64)
    k64 = sk % directions
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = own < STATES * CHANNELS
    e = own % CHANNELS
    x = tl.zeros([BLOCK], tl.float32)
    if seed is not None:
        natural = seed + (sk // directions) * i_s + k64 * i_k + e.to(tl.int64) * i_e + (own // CHANNELS) * i_n
        x = tl.load(natural, mask=mask, other=0.0).to(tl.float32)
    a2 = tl.load(a + k64 * a_k + own, mask=mask, other=0.0) * LOG2E
    first = (sk // directions) * segments * directions + k64  # a direction of a segment lies behind the one before it
    carry = carry + first * (STATES * CHANNELS) + own
    decay = decay + first * CHANNELS + e
    for base in range(0, segments, UNROLL):
        added = ()
        decays = ()
        for i in tl.static_range(UNROLL):
            at = tl.minimum(base + i, segments - 1)
            if REVERSE:
                at = segments - 1 - at
            added = added + (tl.load(carry + at.to(tl.int64) * directions * (STATES * CHANNELS), mask=mask, other=0.0),)
            decays = decays + (tl.load(decay + at.to(tl.int64) * directions * CHANNELS, mask=mask, other=0.0),)
        for i in tl.static_range(UNROLL):
            at = tl.minimum(base + i, segments - 1)
            if REVERSE:
                at = segments - 1 - at
            live = mask & (base + i < segments)
            tl.store(carry + at.to(tl.int64) * directions * (STATES * CHANNELS), x, mask=live)
            x = tl.exp2(decays[i] * a2) * x + added[i]
