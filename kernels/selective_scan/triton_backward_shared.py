"""The scan's backward pass for 9 to 16 states on NVIDIA devices, in Gluon: words and equations as in `triton_backward`.

What plain Triton cannot express: the scratch tiles of a chunk lie in shared memory, and lanes hold channels and states
as `triton_shared_tiles` says. A program has WARPS warps of 32 channels each, which join dB and dC.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from genssm.kernels.selective_scan.triton_backward import _RUNTIME
from genssm.kernels.selective_scan.triton_shared_tiles import (
    LN2,
    LOG2E,
    activated,
    address,
    behind,
    biased,
    byte_count,
    chunk_rows,
    emit,
    exp2_tile,
    in_row,
    joined,
    landed,
    load_early,
    load_float,
    load_kept,
    load_tile,
    of_step,
    of_steps,
    opaque,
    prefetch_row,
    sigmoid,
    state_row,
    step_inputs,
    store_kept,
    store_tile,
    sum_channels,
    sum_states,
    swapped,
    times_plus_tile,
    times_tile,
    to_tile,
)
from genssm.kernels.triton_launch import TABLES


@gluon.jit
def walk_forth(
    trip,
    trips,
    start,
    stop,
    limit,
    zero,
    rows,
    h,
    early,
    scratch,
    of_channels,
    masks,
    early_from,
    early_at,
    HAS_BIAS: gl.constexpr,
    SOFTPLUS: gl.constexpr,
    LIMITED: gl.constexpr,
    UNROLL: gl.constexpr,
    WARPS: gl.constexpr,
):
    """A trip of the first walk: keep the state before it; the state behind it, and the inputs of the next trip."""
    WHOLE: gl.constexpr = gl.BlockedLayout([4, 1, 4], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    u, delta, b = early_from
    us, ds, bs = early
    a2, bias_e, _skip_e = of_channels
    zeros = gl.full([32 * WARPS, 4], 0.0, gl.float32, gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0]))
    base = start + trip * UNROLL
    store_kept(scratch.index(trip), h, WHOLE)
    for i in gl.static_range(UNROLL):
        live = base + i < stop
        if LIMITED:
            live = live & (of_step(rows, gl.minimum(base + i, stop - 1)) < limit)
        step = activated(biased(landed(ds[i], delta), bias_e, HAS_BIAS), live, SOFTPLUS)
        fed = to_tile(step * landed(us[i], u))
        bt = state_row(landed(bs[i], b), zeros)
        decayed = times_tile(exp2_tile(times_tile(to_tile(step), a2)), h)
        h = times_plus_tile(fed, (bt, bt, bt, bt), decayed)
        if i == 2:
            # Behind arithmetic, else what that waits for would wait for these loads as well.
            next_base = start + gl.minimum(trip + 1, trips - 1) * UNROLL
            at_rows = of_steps(behind(rows, gl.sum(h[3], 1), zero), next_base, stop - 1, UNROLL)
            following = load_early(at_rows, masks, early_from, early_at, limit, LIMITED)
    return h, following


@gluon.jit
def walk_back(
    trip,
    base,
    chunk,
    bottom,
    stop,
    limit,
    zero,
    order,
    rows,
    next_rows,
    adjoint,
    after,
    early,
    sums,
    tiles,
    of_channels,
    masks,
    early_from,
    early_at,
    late_from,
    late_at,
    of_joined,
    HAS_BIAS: gl.constexpr,
    HAS_SKIP: gl.constexpr,
    SOFTPLUS: gl.constexpr,
    LIMITED: gl.constexpr,
    ADDS: gl.constexpr,
    CHUNK: gl.constexpr,
    UNROLL: gl.constexpr,
    WARPS: gl.constexpr,
):
    """A trip on the way back, from the state behind it.

    Returns the adjoint state, the state before the trip, the inputs of the trip before it, ahead of the first one those
    of the next chunk's, and the sums of dA, dbias and dD.
    """
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    WHOLE: gl.constexpr = gl.BlockedLayout([4, 1, 4], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    # dB and dC of a trip, of every warp; then each warp joins those of some of its tokens
    TRIP: gl.constexpr = gl.BlockedLayout([1, UNROLL], [32, 1], [WARPS, 1], [1, 0])
    JOINED: gl.constexpr = gl.BlockedLayout([1, UNROLL // WARPS], [32, 1], [1, WARPS], [1, 0])
    scratch, shares = tiles
    u, delta, b = early_from
    us, ds, bs = early
    a2, bias_e, skip_e = of_channels
    a_sum, bias_sum, skip_sum = sums
    ev_mask, _state_mask, _later_direction = masks
    _grad, _c, z, du, ddelta, dz = late_from
    _g_at, _g_step, _c_at, _c_step, _z_at, _z_step, du_at, dd_at, dz_at, channels = late_at
    of_c, own_token, pair_mask, dbc_at, dbc_step = of_joined
    nothing = zero.to(gl.float32)
    zeros = gl.full([32 * WARPS, 4], 0.0, gl.float32, TILE)
    h = load_kept(scratch.index(trip), TILE, WHOLE)
    # rows of the steps whose dB and dC this warp joins, long before it needs them
    token_row = gl.minimum(base + own_token, stop - 1)
    if order is not None:
        token_row = gl.load(order + token_row)
    steps = ()
    before = ()
    for i in gl.static_range(UNROLL):
        live = base + i < stop
        if LIMITED:
            live = live & (of_step(rows, gl.minimum(base + i, stop - 1)) < limit)
        step = activated(biased(landed(ds[i], delta), bias_e, HAS_BIAS), live, SOFTPLUS)
        steps = steps + (step,)
        if i == 0:
            lates = (step_inputs(base + UNROLL - 1, stop, rows, limit, masks, late_from, late_at, LIMITED, ADDS),)
        before = before + (h,)
        if i < UNROLL - 1:
            fed = to_tile(step * landed(us[i], u))
            bt = state_row(landed(bs[i], b), zeros)
            decayed = times_tile(exp2_tile(times_tile(to_tile(step), a2)), h)
            h = times_plus_tile(fed, (bt, bt, bt, bt), decayed)
    # What only the way back needs is loaded while the step behind it is computed.
    late_rows = rows
    boths = ()
    for i in gl.static_range(UNROLL - 1, -1, -1):
        if i > 0:
            late = step_inputs(base + i - 1, stop, late_rows, limit, masks, late_from, late_at, LIMITED, ADDS)
            lates = lates + (late,)
        row, g, ct, z_t, du_left, dd_left, dz_left = lates[UNROLL - 1 - i]  # the last step's came first
        g = g.to(gl.float32)
        ct = state_row(ct.to(gl.float32), zeros)
        live = base + i < stop
        mask = ev_mask & live
        seen = live
        if LIMITED:
            seen = live & (row < limit)
        u_t = landed(us[i], u)
        step = steps[i]
        if z is not None:
            z_t = z_t.to(gl.float32)
            gate = sigmoid(z_t)
            y = sum_states(after, (ct, ct, ct, ct))
            if HAS_SKIP:
                y = y + skip_e * u_t
            dz_t = g * y * gate * (1.0 + z_t * (1.0 - gate))
            emit(dz_t, dz_left, dz, dz_at, row, channels, mask)
            g = g * z_t * gate
        g_tile = to_tile(g)
        adjoint = times_plus_tile(g_tile, (ct, ct, ct, ct), adjoint)
        db_t = sum_channels(to_tile(step * u_t), adjoint)
        dc_t = sum_channels(g_tile, after)
        both = gl.where(of_c, dc_t, db_t) + swapped(gl.where(of_c, db_t, dc_t), 4)
        boths = (both,) + boths
        if i == 2:
            # Here, because registers are free again, and behind arithmetic, as in the first walk.
            ahead_rows = behind(gl.where(trip > 0, rows, next_rows), both, zero)
            ahead = gl.where(trip > 0, base - UNROLL, gl.maximum((chunk - 1) * CHUNK, bottom))
            at_rows = of_steps(ahead_rows, ahead, stop - 1, UNROLL)
            following = load_early(at_rows, masks, early_from, early_at, limit, LIMITED)
        bt = state_row(landed(bs[i], b), zeros)
        along_b = sum_states(adjoint, (bt, bt, bt, bt))
        # `nothing` is zero, but unknown: a second exponential instead of a register
        step_tile = to_tile(step + nothing)
        decay = exp2_tile(times_tile(step_tile, a2))
        after = before[i]
        if i == 0:
            after = load_kept(scratch.index(trip + zero), TILE, WHOLE)
        adjoint = times_tile(adjoint, decay)
        flow = times_tile(adjoint, after)
        a_sum = times_plus_tile(step_tile, flow, a_sum)
        du_t = step * along_b
        if HAS_SKIP:
            du_t = du_t + skip_e * g
            skip_sum = skip_sum + g * u_t
        dd_t = sum_states(flow, a2) * LN2 + u_t * along_b
        if SOFTPLUS:
            dd_t = dd_t * sigmoid(biased(landed(ds[i], delta), bias_e, HAS_BIAS))
        dd_t = gl.where(seen, dd_t, 0.0)
        bias_sum = bias_sum + dd_t
        emit(du_t, du_left, du, du_at, row, channels, mask)
        emit(dd_t, dd_left, ddelta, dd_at, row, channels, mask)
        if i > 0:
            late_rows = behind(rows, dd_t, zero)
    shares.store(gl.convert_layout(joined(boths), TRIP))
    both = gl.sum(gl.reshape(shares.load(JOINED), [WARPS, 32, UNROLL]), 0)
    both = gl.convert_layout(both, JOINED)
    place = dbc_at + token_row.to(gl.int64) * dbc_step
    place = place.to(gl.pointer_type(gl.float32), bitcast=True)
    kept_token = base + own_token < stop
    gl.store(place, both, mask=pair_mask & kept_token)
    return adjoint, after, following, (a_sum, bias_sum, skip_sum)


@gluon.jit
def scan_work(
    work,
    block_place,
    lanes,
    tiles,
    of_channels,
    sums,
    inputs,
    tables,
    results,
    strides,
    sizes,
    SOFTPLUS: gl.constexpr,
    SEGMENTED: gl.constexpr,
    ADD_U: gl.constexpr,
    ADD_DELTA: gl.constexpr,
    ADD_Z: gl.constexpr,
    CHANNELS: gl.constexpr,
    GROUP_CHANNELS: gl.constexpr,
    STATES: gl.constexpr,
    CHUNK: gl.constexpr,
    WARPS: gl.constexpr,
    UNROLL: gl.constexpr,
):
    """One sequence or segment of one direction; its share of dA, dbias and dD is added to ``sums``.

    A function, like the trips in it, because the compiler goes through a loop twice, to find out what changes, and
    through the innermost of three eight times; through a function once.
    """
    k64, direction, block, group, inside, origin = block_place
    channel, lane, ev, ev_mask, state, state_mask, of_c, own_token, pair, pair_mask, last_column = lanes
    scratch, _ = tiles
    grad, grad_last, saved, carry, u, delta, b, c, skip, z, bias = inputs
    orders, initial, lengths, first_steps, borders = tables
    du, ddelta, dz, dbc, dinitial = results
    gs_, us_, ds_, zs_, bs_, cs_, is_, gls_, outs_, kepts_ = strides
    g_b, g_k, g_l, g_e = gs_
    u_b, u_k, u_l, u_e = us_
    d_b, d_k, d_l, d_e = ds_
    z_b, z_k, z_l, z_e = zs_
    b_b, b_k, b_l, b_g, b_n = bs_
    c_b, c_k, c_l, c_g, c_n = cs_
    i_s, i_k, i_e, i_n = is_
    gl_s, gl_k, gl_e, gl_n = gls_
    du_b, du_k, dd_b, dd_k, dz_b, dz_k = outs_
    kept_b, kept_k, kept_c = kepts_
    length, sequences, directions, direction_programs, batch, segments, segment_chunks, zero = sizes
    ADDS: gl.constexpr = (ADD_U, ADD_DELTA, ADD_Z)
    LANES: gl.constexpr = 32 * WARPS
    GROUPS: gl.constexpr = CHANNELS // GROUP_CHANNELS
    LIMITED: gl.constexpr = lengths is not None
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    zeros = gl.full([LANES, 4], 0.0, gl.float32, TILE)
    order = orders
    if orders is not None:
        order = orders + k64 * length
    s = (work // segments).to(gl.int64)
    segment = work % segments
    sk = s * directions + k64
    row_batch = s
    if borders is None:
        first = zero * 0
        end = length
    else:
        row_batch = s * 0
        first = gl.load(first_steps + k64 * sequences + s)
        end = first + gl.load(borders + s + 1) - gl.load(borders + s)
    limit = length
    if lengths is not None:
        limit = gl.load(lengths + s)
    if SEGMENTED:
        at = carry + (work * directions + k64) * (STATES * CHANNELS) + origin
        adjoint = load_tile(at, channel, 1, CHANNELS, inside, True, GROUP_CHANNELS, STATES)
    elif grad_last is not None:
        at = grad_last + s * gl_s + k64 * gl_k + origin * gl_e
        adjoint = load_tile(at, channel, gl_e, gl_n, inside, True, GROUP_CHANNELS, STATES)
    else:
        adjoint = (zeros, zeros, zeros, zeros)

    g_near = grad + row_batch * g_b + k64 * g_k + origin * g_e
    u_near = u + row_batch * u_b + k64 * u_k + origin * u_e
    d_near = delta + row_batch * d_b + k64 * d_k + origin * d_e
    b_near = b + row_batch * b_b + k64 * b_k + group * b_g
    c_near = c + row_batch * c_b + k64 * c_k + group * c_g
    g_at, g_step = address(g_near + ev * g_e), byte_count(grad, g_l)
    u_at, u_step = address(u_near + ev * u_e), byte_count(u, u_l)
    d_at, d_step = address(d_near + ev * d_e), byte_count(delta, d_l)
    b_at, b_step = address(b_near + state.to(gl.int64) * b_n), byte_count(b, b_l)
    c_at, c_step = address(c_near + state.to(gl.int64) * c_n), byte_count(c, c_l)
    du_at = address(du + row_batch * du_b + k64 * du_k + origin + ev)
    dd_at = address(ddelta + row_batch * dd_b + k64 * dd_k + origin + ev)
    z_at, z_step, dz_at = 0, 0, 0
    if z is not None:
        z_near = z + row_batch * z_b + k64 * z_k + origin * z_e
        z_at, z_step = address(z_near + ev * z_e), byte_count(z, z_l)
        dz_at = address(dz + row_batch * dz_b + k64 * dz_k + origin + ev)
    early_from = (u, delta, b)
    early_at = (u_at, u_step, d_at, d_step, b_at, b_step)
    late_from = (grad, c, z, du, ddelta, dz)
    late_at = (g_at, g_step, c_at, c_step, z_at, z_step, du_at, dd_at, dz_at, CHANNELS)
    masks = (ev_mask, state_mask, k64 > 0)
    slot = ((block * batch + row_batch) * direction_programs + direction) * length
    dbc_at = address(dbc + (slot * GROUPS + group) * (2 * STATES) + pair)
    of_joined = (of_c, own_token, pair_mask, dbc_at, byte_count(dbc, 2 * GROUPS * STATES))
    kept_at = address(saved + (row_batch * kept_b + k64 * kept_k - kept_c + origin))
    low = first // CHUNK + segment * segment_chunks
    high = gl.where(end > first, gl.minimum(low + segment_chunks, gl.cdiv(end, CHUNK)), low)
    bottom = gl.maximum(low * CHUNK, first)
    top = gl.maximum(gl.minimum(high * CHUNK, end), bottom + 1)
    next_rows = chunk_rows(order, (high - 1) * CHUNK + lane, bottom, top)
    base = gl.maximum((high - 1) * CHUNK, bottom)
    at_rows = of_steps(next_rows, base, top - 1, UNROLL)
    early = load_early(at_rows, masks, early_from, early_at, limit, LIMITED)
    for back in range(high - low):
        chunk = high - 1 - back
        rows = next_rows
        next_rows = chunk_rows(order, (chunk - 1) * CHUNK + lane, bottom, top)
        start = gl.maximum(chunk * CHUNK, first)
        stop = gl.minimum((chunk + 1) * CHUNK, end)
        trips = gl.cdiv(stop - start, UNROLL)
        prefetch_row(g_near, rows, g_step, g_e, last_column, 32)  # what only the way back reads
        prefetch_row(c_near, rows, c_step, c_n, STATES - 1, 16)
        if z is not None:
            prefetch_row(z_near, rows, z_step, z_e, last_column, 32)
        inner = chunk * CHUNK > first  # else the sequence starts in this chunk
        at = in_row(saved, kept_at, chunk, byte_count(saved, kept_c))
        own_channel = opaque(channel)  # addresses made anew for each chunk, else 32 that are spilled
        h = load_tile(at, own_channel, 1, CHANNELS, inside, inner, GROUP_CHANNELS, STATES)
        if initial is not None:
            at = initial + s * i_s + k64 * i_k + origin * i_e
            more = load_tile(at, own_channel, i_e, i_n, inside, inner == 0, GROUP_CHANNELS, STATES)
            h = (h[0] + more[0], h[1] + more[1], h[2] + more[2], h[3] + more[3])
        for trip in range(trips):
            h, early = walk_forth(
                trip, trips, start, stop, limit, zero, rows, h, early, scratch, of_channels, masks, early_from,
                early_at, bias is not None, SOFTPLUS, LIMITED, UNROLL, WARPS,
            )  # fmt: skip
        after = h
        for trip_back in range(trips):
            trip = trips - 1 - trip_back
            base = start + trip * UNROLL
            adjoint, after, early, sums = walk_back(
                trip, base, chunk, bottom, stop, limit, zero, order, rows, next_rows, adjoint, after, early, sums,
                tiles, of_channels, masks, early_from, early_at, late_from, late_at, of_joined, bias is not None,
                skip is not None, SOFTPLUS, LIMITED, ADDS, CHUNK, UNROLL, WARPS,
            )  # fmt: skip
    if dinitial is not None:
        at = dinitial + (sk * CHANNELS + origin) * STATES
        store_tile(adjoint, at, channel, STATES, 1, inside, segment == 0, GROUP_CHANNELS, STATES)
    return sums


@gluon.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def scan_backward_shared_kernel(
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
    works,
    work_programs,
    segments,
    segment_chunks,
    kept_b,
    kept_k,
    kept_c,
    zero,
    SOFTPLUS: gl.constexpr,
    SEGMENTED: gl.constexpr,
    ADD_U: gl.constexpr,
    ADD_DELTA: gl.constexpr,
    ADD_Z: gl.constexpr,
    CHANNELS: gl.constexpr,
    GROUP_CHANNELS: gl.constexpr,
    STATES: gl.constexpr,
    CHUNK: gl.constexpr,
    WARPS: gl.constexpr,
    UNROLL: gl.constexpr,
):
    """Gradients of a block of channels of one group, for some sequences (or segments) and one direction.

    As `triton_backward.scan_backward_kernel`, with a program and slots of dB and dC for every block of channels.
    """
    LANES: gl.constexpr = 32 * WARPS
    GROUPS: gl.constexpr = CHANNELS // GROUP_CHANNELS
    GROUP_BLOCKS: gl.constexpr = (GROUP_CHANNELS + LANES - 1) // LANES
    TRIPS: gl.constexpr = CHUNK // UNROLL
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    VECTOR: gl.constexpr = gl.SliceLayout(1, TILE)
    gl.static_assert(CHUNK == 32)
    block = gl.program_id(0) % GROUP_BLOCKS
    pid = gl.program_id(0) // GROUP_BLOCKS
    group = pid % GROUPS
    pid = pid // GROUPS
    direction = pid % direction_programs  # of this launch
    k64 = (first_direction + direction).to(gl.int64)
    work_program = pid // direction_programs
    channel = gl.arange(0, LANES, VECTOR)  # inside the block
    lane = channel % 32
    ev = channel.to(gl.int64)
    state = (lane >> 3) * 4 + (lane & 3)
    state_mask = state < STATES
    of_c = (lane & 4) != 0  # where dB and dC are one value for a lane, dC belongs to the upper four of each eight
    zeros = gl.full([LANES, 4], 0.0, gl.float32, TILE)
    scratch = gl.allocate_shared_memory(gl.float32, [TRIPS, 4, LANES, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    JOINED: gl.constexpr = gl.BlockedLayout([1, UNROLL // WARPS], [32, 1], [1, WARPS], [1, 0])
    shares = gl.allocate_shared_memory(gl.float32, [LANES, UNROLL], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    own_lane = gl.arange(0, 32, gl.SliceLayout(1, JOINED))[:, None]
    own_token = gl.arange(0, UNROLL, gl.SliceLayout(0, JOINED))[None, :]
    own_state = (own_lane >> 3) * 4 + (own_lane & 3)
    pair = own_state * 2 + ((own_lane >> 2) & 1)  # dB and dC side by side
    pair_mask = own_state < STATES
    inside = block * LANES
    origin = inside.to(gl.int64) + group * GROUP_CHANNELS
    if GROUP_CHANNELS % LANES == 0:
        ev_mask = gl.full([LANES], 1, gl.int1, VECTOR)
    else:
        ev_mask = channel + inside < GROUP_CHANNELS
    last_column = gl.minimum(GROUP_CHANNELS - inside, LANES) - 1
    lanes = (channel, lane, ev, ev_mask, state, state_mask, of_c, own_token, pair, pair_mask, last_column)
    inputs = (grad, grad_last, saved, carry, u, delta, b, c, skip, z, bias)
    tables = (orders, initial, lengths, first_steps, borders)
    results = (du, ddelta, dz, dbc, dinitial)
    strides = (
        (g_b, g_k, g_l, g_e),
        (u_b, u_k, u_l, u_e),
        (d_b, d_k, d_l, d_e),
        (z_b, z_k, z_l, z_e),
        (b_b, b_k, b_l, b_g, b_n),
        (c_b, c_k, c_l, c_g, c_n),
        (i_s, i_k, i_e, i_n),
        (gl_s, gl_k, gl_e, gl_n),
        (du_b, du_k, dd_b, dd_k, dz_b, dz_k),
        (kept_b, kept_k, kept_c),
    )
    sizes = (length, sequences, directions, direction_programs, batch, segments, segment_chunks, zero)
    a2 = load_tile(a + k64 * a_k + origin, channel, 1, CHANNELS, inside, True, GROUP_CHANNELS, STATES)
    a2 = (a2[0] * LOG2E, a2[1] * LOG2E, a2[2] * LOG2E, a2[3] * LOG2E)
    bias_e = 0.0
    if bias is not None:
        bias_e = load_float(bias + k64 * bias_k + origin + ev, ev_mask)
    skip_e = 0.0
    if skip is not None:
        skip_e = load_float(skip + k64 * skip_k + origin + ev, ev_mask)
    a_sum = (zeros, zeros, zeros, zeros)
    bias_sum = gl.full([LANES], 0.0, gl.float32, VECTOR)
    skip_sum = gl.full([LANES], 0.0, gl.float32, VECTOR)
    for work in range(work_program, works, work_programs):
        a_sum, bias_sum, skip_sum = scan_work(
            work,
            (k64, direction, block, group, inside, origin),
            lanes,
            (scratch, shares),
            (a2, bias_e, skip_e),
            (a_sum, bias_sum, skip_sum),
            inputs,
            tables,
            results,
            strides,
            sizes,
            SOFTPLUS,
            SEGMENTED,
            ADD_U,
            ADD_DELTA,
            ADD_Z,
            CHANNELS,
            GROUP_CHANNELS,
            STATES,
            CHUNK,
            WARPS,
            UNROLL,
        )
    place = (work_program * directions + k64) * CHANNELS + origin
    at = da + (work_program * directions + k64) * (STATES * CHANNELS) + origin
    store_tile(a_sum, at, channel, 1, CHANNELS, inside, True, GROUP_CHANNELS, STATES)
    if bias is not None:
        gl.store(dbias + place + ev, bias_sum, mask=ev_mask)
    if skip is not None:
        gl.store(dskip + place + ev, skip_sum, mask=ev_mask)
