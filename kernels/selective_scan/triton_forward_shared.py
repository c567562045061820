"""The scan's forward pass for 9 to 16 states on NVIDIA devices, in Gluon: words as in `triton_forward`.

The warps of a program share the states of its 32 channels, so that no exponential is computed twice. What belongs to a
channel and not to a state (steps from their raw values, the gate, the skip) is computed once, by the warp whose tokens
they are, and goes through shared memory:

    trip     TRIP tokens; warp w prepares and finishes TRIP / WARPS of them, and walks all of them with its own states
    run      RUN tokens of a trip that lie side by side in shared memory, for one access of a lane
    step     delta, and fed, delta u, of a trip: (runs, channels, RUN)
    share    what the states of a warp add to y: (runs, WARPS, channels, RUN)
    visit    the rows of a trip along an order, listed two trips before

Everything is there twice, for even and odd trips. While a trip is walked, the one before is finished and the one behind
prepared, from what was loaded before the walk: one barrier per trip.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from genssm.kernels.selective_scan.triton_forward import _RUNTIME
from genssm.kernels.selective_scan.triton_shared_tiles import (
    LOG2E,
    activated,
    address,
    biased,
    byte_count,
    earlier,
    emit,
    in_row,
    load_float,
    sigmoid,
)
from genssm.kernels.triton_launch import TABLES


@gluon.jit
def shared(SHAPE: gl.constexpr, ORDER: gl.constexpr):
    return gl.allocate_shared_memory(gl.float32, SHAPE, gl.SwizzledSharedLayout(1, 1, 1, ORDER))


@gluon.jit
def visited(order, steps, lowest, highest):
    """Rows of steps; those outside of [lowest, highest] taken as the nearest inside."""
    steps = gl.maximum(gl.minimum(steps, highest), lowest)
    if order is not None:
        steps = gl.load(order + steps)
    return steps


@gluon.jit
def listed_rows(kept, TOKENS: gl.constexpr, ROWS: gl.constexpr, RUN: gl.constexpr, WARPS: gl.constexpr):
    """The rows of a trip, (trip,), for those who prepare and finish tokens and for those who fetch B and C."""
    TRIP: gl.constexpr = kept.shape[0]
    IN_RUNS: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([RUN, 1], [1, 32], [WARPS, 1], [0, 1]))
    rows = gl.reshape(kept.load(IN_RUNS), [TRIP // RUN, RUN])
    rows = gl.convert_layout(rows, gl.SliceLayout(1, TOKENS))[:, None, :]
    return rows, kept.load(gl.SliceLayout(1, ROWS))[:, None]


@gluon.jit
def columns(kept, LANES: gl.constexpr, WARPS: gl.constexpr):
    """A run, (1, channels, RUN), as RUN vectors that every warp has in the layout LANES."""
    RUN: gl.constexpr = kept.shape[2]
    x = kept.load(gl.BlockedLayout([1, 1, RUN], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0]))
    if RUN == 4:
        even, odd = gl.split(gl.reshape(x, [kept.shape[1], 2, 2]))
        x0, x2 = gl.split(even)
        x1, x3 = gl.split(odd)
        x = (x0, x1, x2, x3)
    else:
        x = gl.split(gl.reshape(x, [kept.shape[1], 2]))
    y = ()
    for i in gl.static_range(RUN):
        y = y + (gl.convert_layout(x[i], LANES),)
    return y


@gluon.jit
def state_column(kept, TILE: gl.constexpr, WARPS: gl.constexpr):
    """A row of 16 states as a tile (WARPS, states of a warp, 1)."""
    x = kept.load(gl.BlockedLayout([1, 16 // WARPS], [32, 1], [1, WARPS], [1, 0]))
    return gl.convert_layout(gl.reshape(x, [WARPS, 16 // WARPS, 1]), TILE)


@gluon.jit
def store_shares(kept, ys):
    """Store the vectors (WARPS, channels) of all tokens of a trip at once: one by one, each would wait at a barrier."""
    RUNS: gl.constexpr = kept.shape[0]
    RUN: gl.constexpr = kept.shape[3]
    SHARES: gl.constexpr = gl.BlockedLayout([RUNS, 1, 1, RUN], [1, 1, 32, 1], [1, kept.shape[1], 1, 1], [3, 2, 1, 0])
    count: gl.constexpr = RUNS * RUN
    for level in gl.static_range(4):
        if count >> level > 1:
            pairs = ()
            for i in gl.static_range(count >> (level + 1)):
                pairs = pairs + (gl.join(ys[i], ys[i + (count >> (level + 1))]),)
            ys = pairs
    y = gl.reshape(ys[0], [kept.shape[1], kept.shape[2], RUNS, RUN])
    kept.store(gl.convert_layout(gl.permute(y, [2, 0, 1, 3]), SHARES))


@gluon.jit
def result(shares, u, z, skip_e, HAS_SKIP: gl.constexpr, HAS_GATE: gl.constexpr):
    """y, with skip and gate, from the shares of all warps."""
    RUN: gl.constexpr = shares.shape[3]
    WARPS: gl.constexpr = shares.shape[1]
    SHARES: gl.constexpr = gl.BlockedLayout([1, WARPS, 1, RUN], [1, 1, 32, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    y = gl.convert_layout(gl.sum(shares.load(SHARES), 1), u.type.layout)
    if HAS_SKIP:
        y = y + skip_e * u.to(gl.float32)
    if HAS_GATE:
        z = z.to(gl.float32)
        y = y * z * sigmoid(z)
    return y


@gluon.jit
def gate_rows(z, z_at, z_l, rows, mask, lengths, limit):
    found = 0.0
    if z is not None:
        if lengths is not None:
            mask = mask & (rows < limit)
        found = gl.load(in_row(z, z_at, rows, byte_count(z, z_l)), mask=mask, other=0.0)
    return found


@gluon.jit
def chained(carry, decay, first, segment, origin, own, nt, mask, a2, STATES: gl.constexpr, CHANNELS: gl.constexpr):
    """The state before a segment: that behind the first one, over what those between add and how they decay."""
    h = load_float(carry + first * (STATES * CHANNELS) + origin + own, mask)
    for base in range(1, segment, 4):
        added = ()
        decays = ()
        for i in gl.static_range(4):
            between = mask & (base + i < segment)  # beyond, nothing decays and nothing is added
            slot = first + base + i
            added = added + (load_float(carry + slot * (STATES * CHANNELS) + origin + own, between),)
            decays = decays + (load_float(decay + slot * CHANNELS + origin + (own - nt * CHANNELS), between),)
        for i in gl.static_range(4):
            h = gl.exp2(decays[i] * a2) * h + added[i]
    return h


@gluon.jit
def walk(
    order,
    base,
    token,
    fetched,
    lowest,
    highest,
    steps,
    feds,
    bs,
    cs,
    h,
    a2,
    OUTPUT: gl.constexpr,
    LISTED: gl.constexpr,
    WARPS: gl.constexpr,
    TRIP: gl.constexpr,
):
    """The states over a trip, and unless rows are LISTED those of the trip after the next, loaded in its midst."""
    RUN: gl.constexpr = min(4, TRIP // WARPS)
    RUNS: gl.constexpr = TRIP // RUN
    TILE: gl.constexpr = h.type.layout
    LANES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, TILE))
    ys = ()
    after = 0
    for run in gl.static_range(RUNS):
        step_run = columns(steps.slice(run, 1), LANES, WARPS)
        fed_run = columns(feds.slice(run, 1), LANES, WARPS)
        for j in gl.static_range(RUN):
            bt = state_column(bs.slice(run * RUN + j, 1), TILE, WARPS)
            h = gl.exp2(step_run[j][None, None, :] * a2) * h + fed_run[j][None, None, :] * bt
            if OUTPUT:
                ct = state_column(cs.slice(run * RUN + j, 1), TILE, WARPS)
                ys = ys + (gl.sum(h * ct, 1),)
        if run == 1 and not LISTED:
            token_rows = visited(order, base + 2 * TRIP + token, lowest, highest)
            after = (token_rows, visited(order, base + 2 * TRIP + fetched, lowest, highest))
    return h, ys, after


@gluon.jit
def scan_direction(
    k,
    where,
    lanes,
    masks,
    buffers,
    inputs,
    results,
    u_strides,
    d_strides,
    z_strides,
    b_strides,
    c_strides,
    i_strides,
    k_strides,
    sizes,
    SOFTPLUS: gl.constexpr,
    OUTPUT: gl.constexpr,
    CARRIED: gl.constexpr,
    HANDED_ON: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    CHANNELS: gl.constexpr,
    STATES: gl.constexpr,
    CHUNK: gl.constexpr,
    WARPS: gl.constexpr,
    TRIP: gl.constexpr,
):
    """One direction of `scan_segment`: a function, because the compiler goes through every loop twice."""
    group, segment, s, origin, row_batch, limit = where
    token, fetched, listed, ev, nv, et, nt, own = lanes
    ev_mask, nv_mask, own_mask = masks
    steps, feds, bs, cs, shares, visits = buffers
    u, delta, a, b, c, skip, z, bias, orders, initial, lengths, first_steps, borders = inputs
    out, last, saved, carry, decay, turned = results
    u_b, u_k, u_l, u_e = u_strides
    d_b, d_k, d_l, d_e = d_strides
    z_b, z_k, z_l, z_e = z_strides
    b_b, b_k, b_l, b_g, b_n = b_strides
    c_b, c_k, c_l, c_g, c_n = c_strides
    i_s, i_k, i_e, i_n = i_strides
    a_k, skip_k, bias_k, out_b, out_k = k_strides
    length, sequences, directions, segments, segment_chunks, chunks, zero = sizes
    BLOCK: gl.constexpr = 32
    NI: gl.constexpr = 16 // WARPS
    RUN: gl.constexpr = min(4, TRIP // WARPS)
    RUNS: gl.constexpr = TRIP // RUN
    TRIPS: gl.constexpr = CHUNK // TRIP
    TILE: gl.constexpr = gl.BlockedLayout([1, NI, 1], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    TOKENS: gl.constexpr = gl.BlockedLayout([1, 1, RUN], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    PAIR: gl.constexpr = min(2, TRIP // (2 * WARPS))
    ROWS: gl.constexpr = gl.BlockedLayout([1, PAIR], [2 * PAIR, 16 // PAIR], [WARPS, 1], [1, 0])
    # Not where directions come in turn: that binary would be a fifth slower.
    LISTED: gl.constexpr = orders is not None and not ACCUMULATE
    gl.static_assert(TRIPS % 2 == 0)
    k64 = k.to(gl.int64)
    sk = s * directions + k64
    order = orders
    if orders is not None:
        order = orders + k64 * length
    if borders is None:
        first = zero * 0
        end = length
    else:
        first = gl.load(first_steps + k64 * sequences + s)
        end = first + gl.load(borders + s + 1) - gl.load(borders + s)
    if HANDED_ON:  # A as it lies, (E, N)
        a2 = load_float(a + k64 * a_k + origin * STATES + (et * STATES + nt), own_mask)
        if OUTPUT:  # in the first segment, for the next launch
            gl.store(turned + k64 * a_k + origin + own, a2, mask=own_mask & (s == 0))
    else:
        a2 = load_float(a + k64 * a_k + origin + own, own_mask)
    a2 = a2 * LOG2E
    if CARRIED:
        h = chained(carry, decay, sk * segments, segment, origin, own, nt, own_mask, a2, STATES, CHANNELS)
    elif OUTPUT & (initial is not None):
        h = load_float(initial + s * i_s + k64 * i_k + origin * i_e + (et * i_e + nt * i_n), own_mask)
    else:
        h = gl.full([WARPS, NI, BLOCK], 0.0, gl.float32, TILE)
    bias_e = 0.0
    if bias is not None:
        bias_e = load_float(bias + k64 * bias_k + origin + ev, ev_mask)
    skip_e = 0.0
    if OUTPUT & (skip is not None):
        skip_e = load_float(skip + k64 * skip_k + origin + ev, ev_mask)

    u_at = address(u + row_batch * u_b + k64 * u_k + origin * u_e + ev * u_e)
    d_at = address(delta + row_batch * d_b + k64 * d_k + origin * d_e + ev * d_e)
    b_at = address(b + row_batch * b_b + k64 * b_k + group * b_g + nv.to(gl.int64) * b_n)
    c_at = address(c + row_batch * c_b + k64 * c_k + group * c_g + nv.to(gl.int64) * c_n)
    out_at = address(out + row_batch * out_b + k64 * out_k + origin + ev)
    z_at = 0
    if z is not None:
        z_at = address(z + row_batch * z_b + k64 * z_k + origin * z_e + ev * z_e)
    kept = saved + ((row_batch * directions + k64) * chunks - 1) * (STATES * CHANNELS) + origin
    total = gl.full([RUNS, BLOCK, RUN], 0.0, gl.float32, TOKENS)

    high = gl.cdiv(end, CHUNK) - (segments - segment - 1) * segment_chunks
    low = gl.maximum(high - segment_chunks, first // CHUNK)  # the first segment may be shorter
    bottom = gl.maximum(low * CHUNK, first)
    stop = gl.minimum(high * CHUNK, end)
    lowest = gl.minimum(bottom, length - 1)
    highest = gl.maximum(stop - 1, lowest)

    # The first trip, of whose steps those before ``first`` change nothing.
    base = low * CHUNK
    if not LISTED:
        rows = visited(order, base + token, lowest, highest)
        fetch_rows = visited(order, base + fetched, lowest, highest)
    else:  # read back at once: the barrier that this takes is also the one for the first trip of the loop
        visits[0].store(visited(order, base + TRIP + listed, lowest, highest))
        visits[1].store(visited(order, base + listed, lowest, highest))
        rows, fetch_rows = listed_rows(visits[1], TOKENS, ROWS, RUN, WARPS)
        visits[1].store(visited(order, base + 2 * TRIP + listed, lowest, highest))
    seen = (base + token >= bottom) & (base + token < stop)
    e_mask = ev_mask
    n_mask = nv_mask
    if lengths is not None:  # padding may hold anything
        seen = seen & (rows < limit)
        e_mask = ev_mask & seen
        n_mask = nv_mask & (fetch_rows < limit)
    us = gl.load(in_row(u, u_at, rows, byte_count(u, u_l)), mask=e_mask, other=0.0)
    ds = gl.load(in_row(delta, d_at, rows, byte_count(delta, d_l)), mask=e_mask, other=0.0)
    step = activated(biased(ds, bias_e, bias is not None), seen, SOFTPLUS)
    steps[0].store(step)
    feds[0].store(step * us.to(gl.float32))
    b_rows = gl.load(in_row(b, b_at, fetch_rows, byte_count(b, b_l)), mask=n_mask, other=0.0)
    bs[0].store(b_rows.to(gl.float32))
    if OUTPUT:
        c_rows = gl.load(in_row(c, c_at, fetch_rows, byte_count(c, c_l)), mask=n_mask, other=0.0)
        cs[0].store(c_rows.to(gl.float32))
    else:
        total = total + step
    late_rows = rows
    late_us = us
    if not LISTED:
        next_rows = visited(order, base + TRIP + token, lowest, highest)
        next_fetch_rows = visited(order, base + TRIP + fetched, lowest, highest)
    for chunk in range(low, high):
        if OUTPUT:
            gl.store(kept + chunk * (STATES * CHANNELS) + own, h, mask=own_mask & (chunk * CHUNK > first))
        for i in gl.static_range(TRIPS):
            base = chunk * CHUNK + i * TRIP
            if LISTED:
                if CARRIED or HANDED_ON:  # else behind the walk: fewer cycles on paper
                    later = visited(order, base + 3 * TRIP + listed, lowest, highest)
                next_rows, next_fetch_rows = listed_rows(visits[i % 2], TOKENS, ROWS, RUN, WARPS)
            # Loads: for the trip behind, and what only the end of the trip before needs.
            seen = base + TRIP + token < stop
            e_mask = ev_mask
            n_mask = nv_mask
            if lengths is not None:
                seen = seen & (next_rows < limit)
                e_mask = ev_mask & seen
                n_mask = nv_mask & (next_fetch_rows < limit)
            next_us = gl.load(in_row(u, u_at, next_rows, byte_count(u, u_l)), mask=e_mask, other=0.0)
            ds = gl.load(in_row(delta, d_at, next_rows, byte_count(delta, d_l)), mask=e_mask, other=0.0)
            b_rows = gl.load(in_row(b, b_at, next_fetch_rows, byte_count(b, b_l)), mask=n_mask, other=0.0)
            if OUTPUT:
                c_rows = gl.load(in_row(c, c_at, next_fetch_rows, byte_count(c, c_l)), mask=n_mask, other=0.0)
                late = (base - TRIP + token >= bottom) & (base - TRIP + token < stop)
                zs = gate_rows(z, z_at, z_l, late_rows, ev_mask, lengths, limit)
                sums = earlier(out, out_at, late_rows, CHANNELS, ev_mask & (k64 > 0), ACCUMULATE)

            h, ys, after = walk(
                order, base, token, fetched, lowest, highest, steps[i % 2], feds[i % 2], bs[i % 2],
                cs[i % 2] if OUTPUT else 0, h, a2, OUTPUT, LISTED, WARPS, TRIP,
            )  # fmt: skip
            if LISTED and not (CARRIED or HANDED_ON):
                later = visited(order, base + 3 * TRIP + listed, lowest, highest)
            if OUTPUT:
                store_shares(shares[i % 2], ys)
            if OUTPUT:
                y = result(shares[(i + 1) % 2], late_us, zs, skip_e, skip is not None, z is not None)
                mask = ev_mask & late
                emit(y, sums, out, out_at, late_rows, CHANNELS, mask)
            step = activated(biased(ds, bias_e, bias is not None), seen, SOFTPLUS)
            steps[(i + 1) % 2].store(step)
            feds[(i + 1) % 2].store(step * next_us.to(gl.float32))
            bs[(i + 1) % 2].store(b_rows.to(gl.float32))
            if OUTPUT:
                cs[(i + 1) % 2].store(c_rows.to(gl.float32))
            else:
                total = total + step
            late_rows = rows
            late_us = us
            rows = next_rows
            us = next_us
            if not LISTED:
                next_rows, next_fetch_rows = after
            else:
                visits[i % 2].store(later)

    if OUTPUT:
        late = (high * CHUNK - TRIP + token >= bottom) & (high * CHUNK - TRIP + token < stop)
        zs = gate_rows(z, z_at, z_l, late_rows, ev_mask, lengths, limit)
        sums = earlier(out, out_at, late_rows, CHANNELS, ev_mask & (k64 > 0), ACCUMULATE)
        y = result(shares[1], late_us, zs, skip_e, skip is not None, z is not None)
        emit(y, sums, out, out_at, late_rows, CHANNELS, ev_mask & late)
        if last is not None:
            at = last + (sk * CHANNELS + origin) * STATES + (et * STATES + nt)
            gl.store(at, h, mask=own_mask & (segment == segments - 1))
    if HANDED_ON:  # behind the first segment, whose state is the right one, ``decay`` is zero
        slot = sk * segments + segment
        gl.store(carry + slot * (STATES * CHANNELS) + origin + own, h, mask=own_mask)
        total = gl.sum(gl.sum(total, 2), 0)[None, :, None]
        gl.store(decay + slot * CHANNELS + origin + ev, total, mask=ev_mask)


@gluon.jit
def scan_segment(
    place,
    inputs,
    results,
    u_strides,
    d_strides,
    z_strides,
    b_strides,
    c_strides,
    i_strides,
    k_strides,
    sizes,
    SOFTPLUS: gl.constexpr,
    OUTPUT: gl.constexpr,
    CARRIED: gl.constexpr,
    HANDED_ON: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    CHANNELS: gl.constexpr,
    GROUP_CHANNELS: gl.constexpr,
    STATES: gl.constexpr,
    CHUNK: gl.constexpr,
    WARPS: gl.constexpr,
    TRIP: gl.constexpr,
):
    """Scan one segment of one sequence for one block of channels; CARRIED: from the states of those before it."""
    block, k, segment, s = place
    lengths, borders = inputs[10], inputs[12]
    length, zero = sizes[0], sizes[6]
    BLOCK: gl.constexpr = 32  # channels, one to a lane
    NI: gl.constexpr = 16 // WARPS  # states of a lane
    RUN: gl.constexpr = min(4, TRIP // WARPS)
    RUNS: gl.constexpr = TRIP // RUN
    PAIR: gl.constexpr = min(2, TRIP // (2 * WARPS))
    TILE: gl.constexpr = gl.BlockedLayout([1, NI, 1], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    TOKENS: gl.constexpr = gl.BlockedLayout([1, 1, RUN], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, PAIR], [2 * PAIR, 16 // PAIR], [WARPS, 1], [1, 0])
    GROUP_BLOCKS: gl.constexpr = (GROUP_CHANNELS + BLOCK - 1) // BLOCK
    group = block // GROUP_BLOCKS
    inside = (block % GROUP_BLOCKS) * BLOCK  # first channel of the block, inside its group
    origin = inside.to(gl.int64) + group * GROUP_CHANNELS

    # Channels, tokens of a trip and states, as a lane has them when it prepares and finishes tokens ...
    channel = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(2, TOKENS)))[None, :, None]
    token = gl.arange(0, RUNS, gl.SliceLayout(1, gl.SliceLayout(2, TOKENS)))[:, None, None] * RUN
    token = token + gl.arange(0, RUN, gl.SliceLayout(0, gl.SliceLayout(1, TOKENS)))[None, None, :]
    ev = channel.to(gl.int64)
    # ... when it fetches B and C ...
    fetched = gl.arange(0, TRIP, gl.SliceLayout(1, ROWS))[:, None]
    nv = gl.arange(0, 16, gl.SliceLayout(0, ROWS))[None, :]
    # ... when it looks up the rows of a trip ...
    listed = gl.arange(0, TRIP, gl.BlockedLayout([1], [32], [WARPS], [0]))
    # ... and when it walks.
    et = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, TILE)))[None, None, :]
    nt = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, TILE)))[:, None, None] * NI
    nt = nt + gl.arange(0, NI, gl.SliceLayout(0, gl.SliceLayout(2, TILE)))[None, :, None]
    if GROUP_CHANNELS % BLOCK == 0:
        ev_mask = gl.full([1, BLOCK, 1], 1, gl.int1, TOKENS)
    else:
        ev_mask = channel + inside < GROUP_CHANNELS
    nv_mask = nv < STATES
    own_mask = (et + inside < GROUP_CHANNELS) & (nt < STATES)
    et = et.to(gl.int64)
    nt = nt.to(gl.int64)
    own = nt * CHANNELS + et

    steps = (shared([RUNS, BLOCK, RUN], [2, 1, 0]), shared([RUNS, BLOCK, RUN], [2, 1, 0]))
    feds = (shared([RUNS, BLOCK, RUN], [2, 1, 0]), shared([RUNS, BLOCK, RUN], [2, 1, 0]))
    bs = (shared([TRIP, 16], [1, 0]), shared([TRIP, 16], [1, 0]))
    cs = ()
    shares = ()
    if OUTPUT:
        cs = (shared([TRIP, 16], [1, 0]), shared([TRIP, 16], [1, 0]))
        shares = (shared([RUNS, WARPS, BLOCK, RUN], [3, 2, 1, 0]), shared([RUNS, WARPS, BLOCK, RUN], [3, 2, 1, 0]))
    visits = ()
    if inputs[8] is not None and not ACCUMULATE:
        LIST: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        visits = (
            gl.allocate_shared_memory(gl.int32, [TRIP], LIST),
            gl.allocate_shared_memory(gl.int32, [TRIP], LIST),
        )

    row_batch = s
    if borders is not None:
        row_batch = s * 0
    limit = length
    if lengths is not None:
        limit = gl.load(lengths + s)

    where = (group, segment, s, origin, row_batch, limit)
    lanes = (token, fetched, listed, ev, nv, et, nt, own)
    # A loop of one pass: without it the compiler keeps more in registers than there are, along orders 4 % slower.
    for one in range(k, k + 1 + zero):
        scan_direction(
            one, where, lanes, (ev_mask, nv_mask, own_mask), (steps, feds, bs, cs, shares, visits), inputs, results,
            u_strides, d_strides, z_strides, b_strides, c_strides, i_strides, k_strides, sizes, SOFTPLUS, OUTPUT,
            CARRIED, HANDED_ON, ACCUMULATE, CHANNELS, STATES, CHUNK, WARPS, TRIP,
        )  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def scan_forward_shared_kernel(
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
    turned,
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
    first_direction,
    direction_programs,
    segments,
    segment_programs,
    segment_chunks,
    chunks,
    zero,
    SOFTPLUS: gl.constexpr,
    OUTPUT: gl.constexpr,
    SEGMENTED: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    CHANNELS: gl.constexpr,
    GROUP_CHANNELS: gl.constexpr,
    STATES: gl.constexpr,
    CHUNK: gl.constexpr,
    WARPS: gl.constexpr,
    TRIP: gl.constexpr,
):
    """Scan one segment of one sequence for one block of channels, as `triton_forward.scan_forward_kernel` does.

    But where time is split: without OUTPUT the first segment is scanned for good, from the right initial state, and
    with OUTPUT all but the first; each finds its state from what the segments before it left, without a launch between.
    """
    BLOCKS: gl.constexpr = (GROUP_CHANNELS + 31) // 32 * (CHANNELS // GROUP_CHANNELS)
    block = gl.program_id(0) % BLOCKS
    work = gl.program_id(0) // BLOCKS
    k = first_direction + work % direction_programs
    work = work // direction_programs
    segment = work % segment_programs
    if OUTPUT & SEGMENTED:
        segment = segment + 1
    place = (block, k, segment, (work // segment_programs).to(gl.int64))
    inputs = (u, delta, a, b, c, skip, z, bias, orders, initial, lengths, first_steps, borders)
    results = (out, last, saved, carry, decay, turned)
    us = (u_b, u_k, u_l, u_e)
    ds = (d_b, d_k, d_l, d_e)
    zs = (z_b, z_k, z_l, z_e)
    bs = (b_b, b_k, b_l, b_g, b_n)
    cs = (c_b, c_k, c_l, c_g, c_n)
    hs = (i_s, i_k, i_e, i_n)
    ks = (a_k, skip_k, bias_k, out_b, out_k)
    sizes = (length, sequences, directions, segments, segment_chunks, chunks, zero)
    # fmt: off
    if OUTPUT:
        scan_segment(
            place, inputs, results, us, ds, zs, bs, cs, hs, ks, sizes, SOFTPLUS, True, SEGMENTED, False, ACCUMULATE,
            CHANNELS, GROUP_CHANNELS, STATES, CHUNK, WARPS, TRIP,
        )
    elif segment == 0:
        scan_segment(
            place, inputs, results, us, ds, zs, bs, cs, hs, ks, sizes, SOFTPLUS, True, False, True, ACCUMULATE,
            CHANNELS, GROUP_CHANNELS, STATES, CHUNK, WARPS, TRIP,
        )
    else:
        scan_segment(
            place, inputs, results, us, ds, zs, bs, cs, hs, ks, sizes, SOFTPLUS, False, False, True, ACCUMULATE,
            CHANNELS, GROUP_CHANNELS, STATES, CHUNK, WARPS, TRIP,
        )
    # fmt: on
