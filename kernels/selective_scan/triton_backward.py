"""Triton kernels of the scan's backward pass; words and tiles as in `triton_forward` and `triton_tiles`.

With lambda_t = dLoss/dh_t (the adjoint state) and g_t the gradient that reaches C_t h_t + D u_t,

    lambda_t = g_t C_t + exp(delta_{t+1} A) lambda_{t+1}
    dB_t = sum over channels of delta_t u_t lambda_t            dC_t = sum over channels of g_t h_t
    du_t = delta_t <lambda_t, B_t> + D g_t                      dA   = sum_t delta_t lambda_t exp(delta_t A) h_{t-1}
    ddelta_t = <lambda_t, A exp(delta_t A) h_{t-1}> + u_t <lambda_t, B_t>

The states come back chunk by chunk from the checkpoints of the forward: a first walk keeps the state before every
UNROLL steps in a scratch tile of the program's own, then, from the last of these back, the states between two of them
are computed again, held in registers and consumed in reverse.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

import triton
import triton.language as tl

from genssm.kernels.selective_scan.triton_tiles import (
    LN2,
    LOG2E,
    below,
    load_tile,
    load_vector,
    only,
    over_channels,
    over_states,
    prefetch,
    prefetch_tile,
    private_offsets,
    row_at,
    sigmoid,
    softplus,
    steps_rows,
    store_tile,
    sum_channels,
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

_RUNTIME = [
    "g_b",
    "g_k",
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
    "gl_s",
    "gl_k",
    "du_b",
    "du_k",
    "dd_b",
    "dd_k",
    "dz_b",
    "dz_k",
    "length",
    "sequences",
    "directions",
    "first_direction",
    "direction_programs",
    "batch",
    "block_programs",
    "works",
    "work_programs",
    "segments",
    "segment_chunks",
    "kept_b",
    "kept_k",
    "kept_c",
    "zero",
]


@triton.jit
def _activated(raw, bias_e, seen, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """(delta before softplus, delta), the latter zero where the step is not seen."""
    if HAS_BIAS:
        raw = raw + bias_e
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    return raw, tl.where(seen, step, 0.0)


@triton.jit
def _emit(value, final_at, mask, k64, ACCUMULATE: tl.constexpr):
    """Store a per-token gradient; ACCUMULATE adds what the directions before this one left there."""
    if ACCUMULATE:
        value = value + load_vector(final_at, only(mask, k64 > 0))
    tl.store(final_at, value.to(final_at.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def scan_adjoint_kernel(
    grad,
    delta,
    a,
    c,
    z,
    bias,
    orders,
    lengths,
    carry,
    decay,
    g_b,
    g_k,
    g_l,
    g_e,
    d_b,
    d_k,
    d_l,
    d_e,
    z_b,
    z_k,
    z_l,
    z_e,
    c_b,
    c_k,
    c_l,
    c_g,
    c_n,
    a_k,
    bias_k,
    length,
    directions,
    segments,
    segment_chunks,
    zero,
    SOFTPLUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    EC: tl.constexpr,
    NI: tl.constexpr,
    NL: tl.constexpr,
    EL: tl.constexpr,
):
    """What one segment adds to a zero adjoint state on the way back (``carry``), and its sum of delta (``decay``)."""
    BLOCK: tl.constexpr = EC * EL
    GROUP_BLOCKS: tl.constexpr = (GROUP_CHANNELS + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = GROUP_BLOCKS * (CHANNELS // GROUP_CHANNELS)
    block = tl.program_id(0) % BLOCKS
    work = tl.program_id(0) // BLOCKS
    segment = work % segments
    sk = (work // segments).to(tl.int64)
    s = sk // directions
    k64 = sk % directions
    group = block // GROUP_BLOCKS
    inside = (block % GROUP_BLOCKS) * BLOCK
    origin = (inside + group * GROUP_CHANNELS).to(tl.int64)

    ev = vector_channels(EC, EL)
    ev_mask = below(ev + inside, GROUP_CHANNELS, GROUP_CHANNELS % BLOCK == 0)
    nv = vector_states(NI, NL)
    nv_mask = below(nv, STATES, STATES == NI * NL)
    own = tile_offsets(CHANNELS, EC, NI, NL, EL)
    own_mask = tile_mask(inside, GROUP_CHANNELS, STATES, EC, NI, NL, EL)
    if WIDE:
        ev = ev.to(tl.int64)

    limit = length
    if lengths is not None:
        limit = tl.load(lengths + s)
    order = orders
    if orders is not None:
        order = orders + k64 * length
    a2 = load_tile(a + k64 * a_k + (origin + zero) + own, own_mask, EC, NI, NL, EL) * LOG2E
    bias_e = 0.0
    if bias is not None:
        bias_e = load_vector(bias + k64 * bias_k + origin + ev, ev_mask)
    g_at = grad + s * g_b + k64 * g_k + (origin * g_e + zero) + ev * g_e
    d_at = delta + s * d_b + k64 * d_k + (origin * d_e + zero) + ev * d_e
    if z is not None:
        z_at = z + s * z_b + k64 * z_k + (origin * z_e + zero) + ev * z_e
    c_shift = s * c_b + k64 * c_k + group * c_g
    if ALIGNED:
        c_shift = tl.multiple_of(c_shift, 8)
    c_at = c + c_shift + nv * c_n

    adjoint = tl.zeros([EC, NI, NL, EL], tl.float32)
    total = tl.zeros([EC, EL], tl.float32)
    low = segment * segment_chunks * CHUNK
    high = tl.minimum(low + segment_chunks * CHUNK, length)
    for back in range(tl.cdiv(high - low, UNROLL)):
        top = high - 1 - back * UNROLL
        seen = ()
        gs = ()
        ds = ()
        zs = ()
        cs = ()
        for i in tl.static_range(UNROLL):
            live = top - i >= low
            row = row_at(order, tl.maximum(top - i, low), WIDE)
            e_mask = ev_mask
            n_mask = nv_mask
            if lengths is not None:
                live = live & (row < limit)
                e_mask = only(ev_mask, live)
                n_mask = only(nv_mask, live)
            seen = seen + (live,)
            gs = gs + (tl.where(live, load_vector(g_at + row * g_l, e_mask), 0.0),)
            ds = ds + (load_vector(d_at + row * d_l, e_mask),)
            cs = cs + (load_vector(c_at + row * c_l, n_mask),)
            if z is not None:
                zs = zs + (load_vector(z_at + row * z_l, e_mask),)
        for i in tl.static_range(UNROLL):
            _raw, step = _activated(ds[i], bias_e, seen[i], bias is not None, SOFTPLUS)
            g = gs[i]
            if z is not None:
                g = g * zs[i] * sigmoid(zs[i])
            total = total + step
            adjoint = tl.exp2(over_states(step) * a2) * (adjoint + over_states(g) * over_channels(cs[i]))
    place = (s * segments + segment) * directions + k64
    store_tile(carry + place * (STATES * CHANNELS) + (origin + zero) + own, adjoint, own_mask, EC, NI, NL, EL)
    tl.store(decay + place * CHANNELS + origin + ev, total, mask=ev_mask)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def scan_backward_kernel(
    grad,
    grad_last,
    saved,
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
    carry,
    scratch,
    du,
    ddelta,
    dz,
    da,
    dbc,
    dskip,
    dbias,
    dinitial,
    g_b,
    g_k,
    g_l,
    g_e,
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
    gl_s,
    gl_k,
    gl_e,
    gl_n,
    du_b,
    du_k,
    dd_b,
    dd_k,
    dz_b,
    dz_k,
    length,
    sequences,
    directions,
    first_direction,
    direction_programs,
    batch,
    block_programs,
    works,
    work_programs,
    segments,
    segment_chunks,
    kept_b,
    kept_k,
    kept_c,
    zero,
    SOFTPLUS: tl.constexpr,
    SEGMENTED: tl.constexpr,
    ADD_U: tl.constexpr,
    ADD_DELTA: tl.constexpr,
    ADD_Z: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    PREFETCH: tl.constexpr,
    AGAIN: tl.constexpr,
    UNROLL: tl.constexpr,
    EC: tl.constexpr,
    NI: tl.constexpr,
    NL: tl.constexpr,
    EL: tl.constexpr,
):
    """Gradients of some blocks of channels of one group, for some sequences (or segments) and one direction.

    A launch takes ``direction_programs`` directions from ``first_direction`` on. A program takes every
    ``block_programs``-th block of its group and every ``work_programs``-th of the ``works`` = sequences x segments, one
    after the other, so that no two programs ever add to the same place: what several of them contribute to goes to a
    slot for each, summed afterwards.
    """
    BLOCK: tl.constexpr = EC * EL
    GROUPS: tl.constexpr = CHANNELS // GROUP_CHANNELS
    GROUP_BLOCKS: tl.constexpr = (GROUP_CHANNELS + BLOCK - 1) // BLOCK
    SLOTS: tl.constexpr = CHUNK // UNROLL
    TILE: tl.constexpr = BLOCK * NI * NL
    NV: tl.constexpr = min(NI, 4)  # states of an access to the scratch tiles
    block_program = tl.program_id(0) % block_programs
    pid = tl.program_id(0) // block_programs
    group = pid % GROUPS
    pid = pid // GROUPS
    direction = pid % direction_programs  # of this launch
    k64 = tl.full([], 0, tl.int64) + first_direction + direction
    work_program = pid // direction_programs
    ev = vector_channels(EC, EL)
    nv = vector_states(NI, NL)
    nv_mask = below(nv, STATES, STATES == NI * NL)
    et = tile_channels(EC, NL, EL)
    nt = tile_states(NI, NL, EL)
    if WIDE:
        ev = ev.to(tl.int64)
        et = et.to(tl.int64)
    own = tile_offsets(CHANNELS, EC, NI, NL, EL)
    pair = nv[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]  # dB and dC side by side
    pair_mask = nv_mask[:, :, None] & tl.full([1, 1, 2], 1, tl.int1)
    nothing = zero.to(tl.float32)
    scratch_near = scratch + tl.program_id(0).to(tl.int64) * (SLOTS * TILE)
    scratch_at = scratch_near + private_offsets(zero, EC, NI, NL, EL)
    all_lanes = tl.full(scratch_at.shape, 1, tl.int1)

    for block in range(block_program, GROUP_BLOCKS, block_programs):
        inside = block * BLOCK
        origin = tl.full([], 0, tl.int64) + inside + group * GROUP_CHANNELS
        ev_mask = below(ev + inside, GROUP_CHANNELS, GROUP_CHANNELS % BLOCK == 0)
        own_mask = tile_mask(inside, GROUP_CHANNELS, STATES, EC, NI, NL, EL)
        order = orders
        if orders is not None:
            order = orders + k64 * length
        a2 = load_tile(a + k64 * a_k + (origin + zero) + own, own_mask, EC, NI, NL, EL) * LOG2E
        # through memory into the layout of the scratch tiles, which all of the loop then takes
        store_tile(scratch_at, a2, all_lanes, EC * NI // NV, NV, NL, EL)
        tl.debug_barrier()
        a2 = load_tile(scratch_at, all_lanes, EC, NI, NL, EL)
        tl.debug_barrier()
        bias_e = 0.0
        if bias is not None:
            bias_e = load_vector(bias + k64 * bias_k + origin + ev, ev_mask)
        if skip is not None:
            skip_e = load_vector(skip + k64 * skip_k + origin + ev, ev_mask)
        a_sum = tl.zeros([EC, NI, NL, EL], tl.float32)
        bias_sum = tl.zeros([EC, EL], tl.float32)
        skip_sum = tl.zeros([EC, EL], tl.float32)
        for work in range(work_program, works, work_programs):
            s = tl.full([], 0, tl.int64) + work // segments
            segment = work % segments
            sk = s * directions + k64
            row_batch = s
            if borders is None:
                first = tl.full([], 0, tl.int32)
                end = length
            else:
                row_batch = s * 0
                first = tl.load(first_steps + k64 * sequences + s)
                end = first + tl.load(borders + s + 1) - tl.load(borders + s)
            limit = length
            if lengths is not None:
                limit = tl.load(lengths + s)
            if SEGMENTED:
                adjoint_at = carry + (work * directions + k64) * (STATES * CHANNELS) + (origin + zero)
                adjoint = load_tile(adjoint_at + own, own_mask, EC, NI, NL, EL)
            elif grad_last is not None:
                adjoint_at = grad_last + s * gl_s + k64 * gl_k + origin * gl_e
                adjoint = load_tile(adjoint_at + (et * gl_e + nt * gl_n), own_mask, EC, NI, NL, EL)
            else:
                adjoint = tl.zeros([EC, NI, NL, EL], tl.float32)

            g_near = grad + row_batch * g_b + k64 * g_k + (origin * g_e + zero)
            g_at = g_near + ev * g_e
            u_near = u + row_batch * u_b + k64 * u_k + (origin * u_e + zero)
            u_at = u_near + ev * u_e
            d_near = delta + row_batch * d_b + k64 * d_k + (origin * d_e + zero)
            d_at = d_near + ev * d_e
            b_shift = row_batch * b_b + k64 * b_k + group * b_g
            c_shift = row_batch * c_b + k64 * c_k + group * c_g
            if ALIGNED:
                b_shift = tl.multiple_of(b_shift, 8)
                c_shift = tl.multiple_of(c_shift, 8)
            b_at = b + b_shift + nv * b_n
            c_at = c + c_shift + nv * c_n
            du_near = du + row_batch * du_b + k64 * du_k + (origin + zero)
            du_at = du_near + ev
            dd_near = ddelta + row_batch * dd_b + k64 * dd_k + (origin + zero)
            dd_at = dd_near + ev
            if z is not None:
                z_near = z + row_batch * z_b + k64 * z_k + (origin * z_e + zero)
                z_at = z_near + ev * z_e
                dz_near = dz + row_batch * dz_b + k64 * dz_k + (origin + zero)
                dz_at = dz_near + ev
            slot = ((block_program * batch + row_batch) * direction_programs + direction) * length
            dbc_near = dbc + (slot * GROUPS + group) * (2 * STATES)
            dbc_at = dbc_near + pair

            kept = saved + row_batch * kept_b + k64 * kept_k + (origin + zero)
            kept_step = tl.full([], 0, tl.int64) + kept_c
            low = first // CHUNK + segment * segment_chunks
            high = tl.minimum(low + segment_chunks, tl.cdiv(end, CHUNK))
            bottom = tl.maximum(low * CHUNK, first)
            top = tl.maximum(tl.minimum(high * CHUNK, end), bottom + 1)
            columns = tl.minimum(GROUP_CHANNELS - inside, BLOCK)
            if PREFETCH:
                rows_near = steps_rows(order, (high - 1) * CHUNK + tl.arange(0, CHUNK), bottom, top, WIDE)
            for back in range(high - low):
                chunk = high - 1 - back
                if PREFETCH:  # what the second walk reads, while the first one runs
                    prefetch(g_near, rows_near, g_l, g_e, columns, BLOCK)
                    prefetch(c + c_shift, rows_near, c_l, c_n, STATES, NI * NL)
                    if z is not None:
                        prefetch(z_near, rows_near, z_l, z_e, columns, BLOCK)
                    if ADD_U:
                        prefetch(du_near, rows_near, CHANNELS, 1, columns, BLOCK)
                    if ADD_DELTA:
                        prefetch(dd_near, rows_near, CHANNELS, 1, columns, BLOCK)
                    if ADD_Z:
                        prefetch(dz_near, rows_near, CHANNELS, 1, columns, BLOCK)
                    if AGAIN:
                        prefetch(dbc_near, rows_near, 2 * GROUPS * STATES, 1, 2 * STATES, 2 * NI * NL)
                    rows_near = steps_rows(order, (chunk - 1) * CHUNK + tl.arange(0, CHUNK), bottom, top, WIDE)
                start = tl.maximum(chunk * CHUNK, first)
                stop = tl.minimum((chunk + 1) * CHUNK, end)
                trips = tl.cdiv(stop - start, UNROLL)
                inner = chunk * CHUNK > first  # else the sequence starts in this chunk
                at = kept + (chunk - 1) * kept_step
                h = load_tile(at + own, only(own_mask, inner), EC, NI, NL, EL)
                if initial is not None:
                    start_at = initial + s * i_s + k64 * i_k + origin * i_e + (et * i_e + nt * i_n)
                    h = h + load_tile(start_at, only(own_mask, chunk * CHUNK <= first), EC, NI, NL, EL)
                next_rows = trip_rows(order, start, stop, WIDE, UNROLL)
                for trip in range(trips):
                    store_tile(scratch_at + trip * TILE, h, all_lanes, EC * NI // NV, NV, NL, EL)
                    base = start + trip * UNROLL
                    rows = next_rows
                    next_rows = trip_rows(order, base + UNROLL, stop, WIDE, UNROLL)
                    seen = ()
                    us = ()
                    ds = ()
                    bs = ()
                    for i in tl.static_range(UNROLL):
                        row = rows[i]
                        live = base + i < stop
                        e_mask = ev_mask
                        n_mask = nv_mask
                        if lengths is not None:
                            live = live & (row < limit)
                            e_mask = only(ev_mask, live)
                            n_mask = only(nv_mask, live)
                        seen = seen + (live,)
                        us = us + (load_vector(u_at + row * u_l, e_mask),)
                        ds = ds + (load_vector(d_at + row * d_l, e_mask),)
                        bs = bs + (load_vector(b_at + row * b_l, n_mask),)
                    for i in tl.static_range(UNROLL):
                        _raw, step = _activated(ds[i], bias_e, seen[i], bias is not None, SOFTPLUS)
                        added = over_states(step * us[i]) * over_channels(bs[i])
                        h = tl.exp2(over_states(step) * a2) * h + added
                after = h
                tl.debug_barrier()  # another lane may read back what this one wrote
                if PREFETCH:  # what the first walk of the next chunk reads
                    prefetch(u_near, rows_near, u_l, u_e, columns, BLOCK)
                    prefetch(d_near, rows_near, d_l, d_e, columns, BLOCK)
                    prefetch(b + b_shift, rows_near, b_l, b_n, STATES, NI * NL)
                next_rows = trip_rows(order, start + (trips - 1) * UNROLL, stop, WIDE, UNROLL)
                for trip_back in range(trips):
                    trip = trips - 1 - trip_back
                    base = start + trip * UNROLL
                    rows = next_rows
                    next_rows = trip_rows(order, tl.maximum(base - UNROLL, start), stop, WIDE, UNROLL)
                    h = load_tile(scratch_at + trip * TILE, all_lanes, EC, NI, NL, EL)
                    if PREFETCH:  # what the next trip makes its states from
                        prefetch_tile(scratch_near + tl.maximum(trip - 1, 0) * TILE, TILE)
                    seen = ()
                    gs = ()
                    us = ()
                    ds = ()
                    zs = ()
                    bs = ()
                    cs = ()
                    for i in tl.static_range(UNROLL):
                        row = rows[i]
                        live = base + i < stop
                        e_mask = ev_mask
                        n_mask = nv_mask
                        if lengths is not None:
                            live = live & (row < limit)
                            e_mask = only(ev_mask, live)
                            n_mask = only(nv_mask, live)
                        seen = seen + (live,)
                        gs = gs + (tl.where(live, load_vector(g_at + row * g_l, e_mask), 0.0),)
                        us = us + (load_vector(u_at + row * u_l, e_mask),)
                        ds = ds + (load_vector(d_at + row * d_l, e_mask),)
                        bs = bs + (load_vector(b_at + row * b_l, n_mask),)
                        cs = cs + (load_vector(c_at + row * c_l, n_mask),)
                        if z is not None:
                            zs = zs + (load_vector(z_at + row * z_l, e_mask),)
                    raws = ()
                    steps = ()
                    before = ()
                    for i in tl.static_range(UNROLL):
                        raw, step = _activated(ds[i], bias_e, seen[i], bias is not None, SOFTPLUS)
                        raws = raws + (raw,)
                        steps = steps + (step,)
                        before = before + (h,)
                        if i < UNROLL - 1:
                            decayed = tl.exp2(over_states(step) * a2)
                            h = decayed * h + over_states(step * us[i]) * over_channels(bs[i])
                    for i in tl.static_range(UNROLL - 1, -1, -1):
                        live = base + i < stop
                        row = rows[i] * CHANNELS
                        mask = only(ev_mask, live)
                        g = gs[i]
                        if z is not None:
                            gate = sigmoid(zs[i])
                            y = sum_states(after * over_channels(cs[i]))
                            if skip is not None:
                                y = y + skip_e * us[i]
                            dz_t = g * y * gate * (1.0 + zs[i] * (1.0 - gate))
                            _emit(dz_t, dz_at + row, mask, k64, ADD_Z)
                            g = g * zs[i] * gate
                        step = steps[i]
                        adjoint = adjoint + over_states(g) * over_channels(cs[i])
                        db_t = sum_channels(over_states(step * us[i]) * adjoint)
                        dc_t = sum_channels(over_states(g) * after)
                        both = tl.join(db_t, dc_t)
                        both_at = dbc_at + rows[i] * (2 * GROUPS * STATES)
                        if AGAIN:  # add to what this program stored for an earlier block of channels
                            again = live & (block != block_program)
                            both = both + tl.load(both_at, mask=only(pair_mask, again), other=0.0)
                        tl.store(both_at, both, mask=only(pair_mask, live))
                        along_b = sum_states(adjoint * over_channels(bs[i]))
                        # `nothing` is zero, but unknown: a second exponential instead of a register
                        adjoint = adjoint * tl.exp2(over_states(step + nothing) * a2)
                        after = before[i]
                        flow = adjoint * after
                        a_sum = a_sum + over_states(step) * flow
                        du_t = step * along_b
                        if skip is not None:
                            du_t = du_t + skip_e * g
                            skip_sum = skip_sum + g * us[i]
                        dd_t = sum_states(flow * a2) * LN2 + us[i] * along_b
                        if SOFTPLUS:
                            dd_t = dd_t * sigmoid(raws[i])
                        dd_t = tl.where(seen[i], dd_t, 0.0)
                        bias_sum = bias_sum + dd_t
                        _emit(du_t, du_at + row, mask, k64, ADD_U)
                        _emit(dd_t, dd_at + row, mask, k64, ADD_DELTA)
                tl.debug_barrier()  # the next chunk overwrites the scratch tiles
            if dinitial is not None:
                first_at = dinitial + (sk * CHANNELS + origin) * STATES + (et * STATES + nt)
                store_tile(first_at, adjoint, only(own_mask, segment == 0), EC, NI, NL, EL)
        place = (work_program * directions + k64) * CHANNELS + origin
        da_at = da + (work_program * directions + k64) * (STATES * CHANNELS) + (origin + zero)
        store_tile(da_at + own, a_sum, own_mask, EC, NI, NL, EL)
        if bias is not None:
            tl.store(dbias + place + ev, bias_sum, mask=ev_mask)
        if skip is not None:
            tl.store(dskip + place + ev, skip_sum, mask=ev_mask)
