"""The scan's backward pass for 9 to 16 states on NVIDIA devices, in Gluon: words and equations as in `triton_backward`.

What plain Triton cannot express: the scratch tiles of a chunk lie in shared memory, and every lane of a warp has a
channel of its own for whatever is computed per channel. A lane is (s, l), s = lane / 8 and l = lane % 8. Of the tile
of 32 channels x 16 states of its warp it holds four tensors of four:

    tile[j][i] of lane (s, l):   channel lane ^ 8 j,   state 4 s + (i ^ (l & 3))

so the own channel of a lane is in tile[0], and its own state (of vectors of states) is 4 s + (l & 3). With that twist
every exchange is between lane and lane ^ constant, and no lane needs to choose what to keep: a vector of channels
reaches a tile by 3 shuffles, a sum over states leaves each lane its own channel by 3, and a sum over channels each
lane its own state. WARPS warps, 32 channels each, are a program; they join dB and dC.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from genssm.kernels.selective_scan.triton_backward import _RUNTIME

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _swapped(x, BY: gl.constexpr):
    """What lane ^ BY has."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, BY], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _swapped_inside(x):
    """(lanes, 4): column i from lane ^ i."""
    return gl.inline_asm_elementwise(
        """
        mov.b32 $0, $4;
        shfl.sync.bfly.b32 $1, $5, 1, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 $2, $6, 2, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 $3, $7, 3, 0x1f, 0xffffffff;
        """,
        "=f,=f,=f,=f,f,f,f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _of_step(rows, step):
    """The row of a step, of the lane that has it: the one with the step's last five bits."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [rows, step], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _moved(address, row, row_bytes):
    """``address`` some rows on: one instruction, which the compiler does not find across a loop."""
    return gl.inline_asm_elementwise(
        "{ .reg .b64 t; mul.wide.u32 t, $1, $2; add.s64 $0, $3, t; }",
        "=l,r,r,l",
        [row, row_bytes, address],
        dtype=gl.int64,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _prefetch(address, row, row_bytes):
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [_moved(address, row, row_bytes)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _address(pointers):
    return pointers.to(gl.int64, bitcast=True)


@gluon.jit
def _bytes(pointer, elements):
    """Bytes of a number of elements, int32."""
    return elements * (pointer.dtype.element_ty.primitive_bitwidth // 8)


@gluon.jit
def _at(like, address, row, row_bytes):
    """Pointers of the type of ``like`` into the rows behind ``address``."""
    return _moved(address, row, row_bytes).to(gl.pointer_type(like.dtype.element_ty), bitcast=True)


@gluon.jit
def _load(pointers, mask):
    return gl.load(pointers, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _sigmoid(x):
    """By an approximate reciprocal, to one unit in the last place."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp2(x * -LOG2E)], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _softplus(x):
    """As `triton_tiles.softplus`."""
    w = gl.exp2(gl.abs(x) * -LOG2E)
    p = -0.0295051597 + w * 0.00523267314
    p = 0.0782258362 + w * p
    p = -0.136632368 + w * p
    p = 0.191060036 + w * p
    p = -0.24842982 + w * p
    p = 0.333190978 + w * p
    p = -0.499994934 + w * p
    p = 0.99999994 + w * p
    return gl.maximum(x, 0.0) + w * p


@gluon.jit
def _biased(raw, bias_e, HAS_BIAS: gl.constexpr):
    raw = raw.to(gl.float32)
    if HAS_BIAS:
        raw = raw + bias_e
    return raw


@gluon.jit
def _activated(raw, seen, SOFTPLUS: gl.constexpr):
    """delta, zero where the step is not seen."""
    if SOFTPLUS:
        raw = _softplus(raw)
    return gl.where(seen, raw, 0.0)


@gluon.jit
def _emit(value, earlier, final, final_at, partial, partial_at, row, CHANNELS, mask, on, ACCUMULATE: gl.constexpr):
    """Store a per-token gradient; ACCUMULATE adds what ``earlier`` directions left, and leaves it where ``on``."""
    final_at = _at(final, final_at, row, _bytes(final, CHANNELS))
    if ACCUMULATE:
        value = value + earlier
        gl.store(_at(partial, partial_at, row, _bytes(partial, CHANNELS)), value, mask=mask & on)
        mask = mask & (on == 0)
    gl.store(final_at, value.to(final.dtype.element_ty), mask=mask)


@gluon.jit
def _tile(x):
    """A vector of channels for the four parts of a tile."""
    return (x[:, None], _swapped(x, 8)[:, None], _swapped(x, 16)[:, None], _swapped(x, 24)[:, None])


@gluon.jit
def _row(x, like):
    """A vector of states for any part of a tile."""
    wide, _ = gl.broadcast(x[:, None], like)
    return _swapped_inside(wide)


@gluon.jit
def _sum_states(a, b):
    """The sum of a b over states, for the own channel of each lane; both in four parts."""
    x0 = gl.sum(a[0] * b[0], 1)
    x1 = gl.sum(a[1] * b[1], 1)
    x2 = gl.sum(a[2] * b[2], 1)
    x3 = gl.sum(a[3] * b[3], 1)
    return (x0 + _swapped(x1, 8)) + (_swapped(x2, 16) + _swapped(x3, 24))


@gluon.jit
def _sum_channels(a, b):
    """The sum of a b over the channels of four lanes, lane ^ (0 to 3), for the own state of each lane."""
    return gl.sum(_swapped_inside(a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]), 1)


@gluon.jit
def _times(x, y):
    return (x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3])


@gluon.jit
def _times_plus(x, y, z):
    return (x[0] * y[0] + z[0], x[1] * y[1] + z[1], x[2] * y[2] + z[2], x[3] * y[3] + z[3])


@gluon.jit
def _exp2(x):
    return (gl.exp2(x[0]), gl.exp2(x[1]), gl.exp2(x[2]), gl.exp2(x[3]))


@gluon.jit
def _tile_index(channel, inside, J: gl.constexpr, GROUP_CHANNELS, STATES):
    """Channels (lanes, 1), states (lanes, 4) and mask of a part of a tile."""
    e = (channel ^ (8 * J))[:, None]
    i = gl.arange(0, 4, gl.SliceLayout(0, e.type.layout))
    n = ((channel >> 3) % 4 * 4)[:, None] + ((channel & 3)[:, None] ^ i[None, :])
    return e.to(gl.int64), n.to(gl.int64), (e + inside < GROUP_CHANNELS) & (n < STATES)


@gluon.jit
def _load_tile(base, channel, e_stride, n_stride, inside, allowed, GROUP_CHANNELS: gl.constexpr, STATES: gl.constexpr):
    tile = ()
    for j in gl.static_range(4):
        e, n, mask = _tile_index(channel, inside, j, GROUP_CHANNELS, STATES)
        tile = tile + (_load(base + (e * e_stride + n * n_stride), mask & allowed),)
    return tile


@gluon.jit
def _store_tile(
    tile, base, channel, e_stride, n_stride, inside, allowed, GROUP_CHANNELS: gl.constexpr, STATES: gl.constexpr
):
    for j in gl.static_range(4):
        e, n, mask = _tile_index(channel, inside, j, GROUP_CHANNELS, STATES)
        gl.store(base + (e * e_stride + n * n_stride), tile[j], mask=mask & allowed)


@gluon.jit
def _joined(x, COUNT: gl.constexpr):
    """COUNT vectors side by side."""
    if COUNT == 2:
        joined = gl.join(x[0], x[1])
    else:
        joined = gl.reshape(gl.join(gl.join(x[0], x[2]), gl.join(x[1], x[3])), [x[0].shape[0], 4])
    return joined


@gluon.jit
def _keep(scratch, tile, WHOLE: gl.constexpr):
    """Store a tile: four parts (4, lanes, 4), so that one address and no two lanes in a bank do for all accesses."""
    whole = gl.join(gl.join(tile[0], tile[1]), gl.join(tile[2], tile[3]))  # (lanes, 4, 2, 2)
    scratch.store(gl.convert_layout(gl.reshape(gl.permute(whole, [3, 2, 0, 1]), scratch.shape), WHOLE))


@gluon.jit
def _kept(scratch, TILE: gl.constexpr, WHOLE: gl.constexpr):
    whole = gl.reshape(scratch.load(WHOLE), [2, 2, scratch.shape[1], 4])
    even, odd = gl.split(gl.permute(whole, [2, 3, 1, 0]))
    x0, x1 = gl.split(even)
    x2, x3 = gl.split(odd)
    x0 = gl.convert_layout(x0, TILE)
    x1 = gl.convert_layout(x1, TILE)
    return (x0, x1, gl.convert_layout(x2, TILE), gl.convert_layout(x3, TILE))


@gluon.jit
def _chunk_rows(order, steps, bottom, top):
    """Rows of steps, a lane for each; those outside of [bottom, top) taken as the nearest inside."""
    steps = gl.maximum(gl.minimum(steps, top - 1), bottom)
    if order is not None:
        steps = gl.load(order + steps)
    return steps


@gluon.jit(do_not_specialize=_RUNTIME)
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
    du_sum,
    ddelta_sum,
    dz_sum,
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
    direction_programs,
    batch,
    block_programs,
    works,
    work_programs,
    segments,
    segment_chunks,
    chunks,
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
    AGAIN: gl.constexpr,
    WARPS: gl.constexpr,
    SPAN: gl.constexpr,
    UNROLL: gl.constexpr,
    KEEP: gl.constexpr,
    AHEAD: gl.constexpr,
    REREAD: gl.constexpr,
):
    """Gradients of some blocks of channels of one group, for some sequences (or segments) and some directions.

    A program takes what one of `triton_backward.scan_backward_kernel` takes.
    """
    LANES: gl.constexpr = 32 * WARPS
    GROUPS: gl.constexpr = CHANNELS // GROUP_CHANNELS
    GROUP_BLOCKS: gl.constexpr = (GROUP_CHANNELS + LANES - 1) // LANES
    PARTS: gl.constexpr = CHUNK // SPAN
    TRIPS: gl.constexpr = SPAN // UNROLL  # of a part
    TILE: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    WHOLE: gl.constexpr = gl.BlockedLayout([4, 1, 4], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    VECTOR: gl.constexpr = gl.SliceLayout(1, TILE)
    gl.static_assert(CHUNK == 32)
    block_program = gl.program_id(0) % block_programs
    pid = gl.program_id(0) // block_programs
    group = pid % GROUPS
    pid = pid // GROUPS
    first_direction = pid % direction_programs
    work_program = pid // direction_programs
    channel = gl.arange(0, LANES, VECTOR)  # inside the block
    lane = channel % 32
    ev = channel.to(gl.int64)
    state = (lane >> 3) * 4 + (lane & 3)
    state_mask = state < STATES
    of_c = (lane & 4) != 0  # where dB and dC are one value for a lane, dC belongs to the upper four of each eight
    nothing = zero.to(gl.float32)
    zeros = gl.full([LANES, 4], 0.0, gl.float32, TILE)
    scratch = gl.allocate_shared_memory(gl.float32, [TRIPS, 4, LANES, 4], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    if WARPS > 1:  # dB and dC of a trip, of every warp
        TRIP: gl.constexpr = gl.BlockedLayout([1, UNROLL], [32, 1], [WARPS, 1], [1, 0])
        JOINED: gl.constexpr = gl.BlockedLayout([1, UNROLL // WARPS], [32, 1], [1, WARPS], [1, 0])
        shares = gl.allocate_shared_memory(gl.float32, [LANES, UNROLL], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
        own_lane = gl.arange(0, 32, gl.SliceLayout(1, JOINED))[:, None]
        own_token = gl.arange(0, UNROLL, gl.SliceLayout(0, JOINED))[None, :]
    else:
        own_lane = lane
    own_state = (own_lane >> 3) * 4 + (own_lane & 3)
    pair = own_state * 2 + ((own_lane >> 2) & 1)  # dB and dC side by side
    pair_mask = own_state < STATES
    piece = (lane >> 1) & 3  # of what a lane prefetches, and of which token of a trip
    token = lane >> 3
    sector = lane & 1

    for block in range(block_program, GROUP_BLOCKS, block_programs):
        inside = block * LANES
        origin = inside.to(gl.int64) + group * GROUP_CHANNELS
        if GROUP_CHANNELS % LANES == 0:
            ev_mask = gl.full([LANES], 1, gl.int1, VECTOR)
        else:
            ev_mask = channel + inside < GROUP_CHANNELS
        last_column = gl.minimum(GROUP_CHANNELS - inside, LANES) - 1
        for k in range(first_direction, directions, direction_programs):
            k64 = k.to(gl.int64)
            on = k < directions - 1  # another direction adds to what directions share
            order = orders
            if orders is not None:
                order = orders + k64 * length
            a2 = _load_tile(a + k64 * a_k + origin, channel, 1, CHANNELS, inside, True, GROUP_CHANNELS, STATES)
            a2 = (a2[0] * LOG2E, a2[1] * LOG2E, a2[2] * LOG2E, a2[3] * LOG2E)
            bias_e = 0.0
            if bias is not None:
                bias_e = _load(bias + k64 * bias_k + origin + ev, ev_mask)
            if skip is not None:
                skip_e = _load(skip + k64 * skip_k + origin + ev, ev_mask)
            a_sum = (zeros, zeros, zeros, zeros)
            bias_sum = gl.full([LANES], 0.0, gl.float32, VECTOR)
            skip_sum = gl.full([LANES], 0.0, gl.float32, VECTOR)
            for work in range(work_program, works, work_programs):
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
                if lengths is not None:
                    limit = gl.load(lengths + s)
                if SEGMENTED:
                    at = carry + (sk * segments + segment) * (STATES * CHANNELS) + origin
                    adjoint = _load_tile(at, channel, 1, CHANNELS, inside, True, GROUP_CHANNELS, STATES)
                elif grad_last is not None:
                    at = grad_last + s * gl_s + k64 * gl_k + origin * gl_e
                    adjoint = _load_tile(at, channel, gl_e, gl_n, inside, True, GROUP_CHANNELS, STATES)
                else:
                    adjoint = (zeros, zeros, zeros, zeros)

                g_near = grad + row_batch * g_b + k64 * g_k + origin * g_e
                u_near = u + row_batch * u_b + k64 * u_k + origin * u_e
                d_near = delta + row_batch * d_b + k64 * d_k + origin * d_e
                b_near = b + row_batch * b_b + k64 * b_k + group * b_g
                c_near = c + row_batch * c_b + k64 * c_k + group * c_g
                g_at, g_step = _address(g_near + ev * g_e), _bytes(grad, g_l)
                u_at, u_step = _address(u_near + ev * u_e), _bytes(u, u_l)
                d_at, d_step = _address(d_near + ev * d_e), _bytes(delta, d_l)
                b_at, b_step = _address(b_near + state.to(gl.int64) * b_n), _bytes(b, b_l)
                c_at, c_step = _address(c_near + state.to(gl.int64) * c_n), _bytes(c, c_l)
                du_at = _address(du + row_batch * du_b + k64 * du_k + origin + ev)
                dd_at = _address(ddelta + row_batch * dd_b + k64 * dd_k + origin + ev)
                du_sum_at = _address(du_sum + row_batch * du_b + origin + ev)
                dd_sum_at = _address(ddelta_sum + row_batch * dd_b + origin + ev)
                if z is not None:
                    z_near = z + row_batch * z_b + k64 * z_k + origin * z_e
                    z_at, z_step = _address(z_near + ev * z_e), _bytes(z, z_l)
                    dz_at = _address(dz + row_batch * dz_b + k64 * dz_k + origin + ev)
                    dz_sum_at = _address(dz_sum + row_batch * dz_b + origin + ev)
                slot = ((block_program * batch + row_batch) * directions + k64) * length
                dbc_at = _address(dbc + (slot * GROUPS + group) * (2 * STATES) + pair)
                if AHEAD:  # a lane's sector of a line of u, delta or B
                    column = (channel - lane) + sector * (256 // u.dtype.element_ty.primitive_bitwidth)
                    u_line = _address(u_near + gl.minimum(column, last_column) * u_e)
                    column = (channel - lane) + sector * (256 // delta.dtype.element_ty.primitive_bitwidth)
                    d_line = _address(d_near + gl.minimum(column, last_column) * d_e)
                    column = sector * (256 // b.dtype.element_ty.primitive_bitwidth)
                    b_line = _address(b_near + gl.minimum(column, STATES - 1) * b_n)
                    line = gl.where(piece == 0, u_line, gl.where(piece == 1, d_line, b_line))
                    line_step = gl.where(piece == 0, u_step, gl.where(piece == 1, d_step, b_step))

                kept = saved + (row_batch * directions + k64) * chunks * (STATES * CHANNELS) + origin
                low = first // CHUNK + segment * segment_chunks
                high = gl.minimum(low + segment_chunks, gl.cdiv(end, CHUNK))
                bottom = gl.maximum(low * CHUNK, first)
                top = gl.maximum(gl.minimum(high * CHUNK, end), bottom + 1)
                next_rows = _chunk_rows(order, (high - 1) * CHUNK + lane, bottom, top)
                for back in range((high - low) * PARTS):
                    chunk = high - 1 - back // PARTS
                    rows = next_rows
                    next_rows = _chunk_rows(order, (high - 1 - (back + 1) // PARTS) * CHUNK + lane, bottom, top)
                    start = gl.maximum(chunk * CHUNK, first)
                    stop = gl.minimum((chunk + 1) * CHUNK, end)
                    first_trip = zero * 0
                    if PARTS > 1:  # the walks of a part begin at the checkpoint, too, but keep nothing before its steps
                        first_trip = (PARTS - 1 - back % PARTS) * TRIPS
                        stop = gl.minimum(start + first_trip * UNROLL + SPAN, stop)
                    trips = gl.cdiv(stop - start, UNROLL)
                    if PARTS > 1:
                        trips = gl.where(trips > first_trip, trips, 0)
                    whole = chunk * CHUNK >= first  # else a packed sequence starts inside this chunk
                    at = kept + chunk * (STATES * CHANNELS)
                    h = _load_tile(at, channel, 1, CHANNELS, inside, whole, GROUP_CHANNELS, STATES)
                    if (borders is not None) & (initial is not None):
                        at = initial + s * i_s + k64 * i_k + origin * i_e
                        more = _load_tile(at, channel, i_e, i_n, inside, whole == 0, GROUP_CHANNELS, STATES)
                        h = (h[0] + more[0], h[1] + more[1], h[2] + more[2], h[3] + more[3])
                    for trip in range(trips):
                        base = start + trip * UNROLL
                        _keep(scratch.index(gl.maximum(trip - first_trip, 0)), h, WHOLE)
                        seen = ()
                        us = ()
                        ds = ()
                        bs = ()
                        for i in gl.static_range(UNROLL):
                            row = _of_step(rows, gl.minimum(base + i, stop - 1))
                            live = base + i < stop
                            e_mask = ev_mask
                            n_mask = state_mask
                            if lengths is not None:
                                live = live & (row < limit)
                                e_mask = ev_mask & live
                                n_mask = state_mask & live
                            seen = seen + (live,)
                            us = us + (gl.load(_at(u, u_at, row, u_step), mask=e_mask, other=0.0),)
                            ds = ds + (gl.load(_at(delta, d_at, row, d_step), mask=e_mask, other=0.0),)
                            bs = bs + (gl.load(_at(b, b_at, row, b_step), mask=n_mask, other=0.0),)
                        if AHEAD:
                            _prefetch(line, _of_step(rows, gl.minimum(base + UNROLL + token, stop - 1)), line_step)
                        for i in gl.static_range(UNROLL):
                            step = _activated(_biased(ds[i], bias_e, bias is not None), seen[i], SOFTPLUS)
                            fed = _tile(step * us[i].to(gl.float32))
                            bt = _row(bs[i].to(gl.float32), zeros)
                            decayed = _times(_exp2(_times(_tile(step), a2)), h)
                            h = _times_plus(fed, (bt, bt, bt, bt), decayed)
                    after = h
                    for trip_back in range(trips - gl.minimum(first_trip, trips)):
                        trip = trips - 1 - trip_back
                        base = start + trip * UNROLL
                        h = _kept(scratch.index(trip - first_trip), TILE, WHOLE)
                        us = ()
                        ds = ()
                        bs = ()
                        for i in gl.static_range(UNROLL):
                            row = _of_step(rows, gl.minimum(base + i, stop - 1))
                            e_mask = ev_mask
                            n_mask = state_mask
                            if lengths is not None:
                                e_mask = ev_mask & (row < limit)
                                n_mask = state_mask & (row < limit)
                            us = us + (gl.load(_at(u, u_at, row, u_step), mask=e_mask, other=0.0),)
                            ds = ds + (gl.load(_at(delta, d_at, row, d_step), mask=e_mask, other=0.0),)
                            bs = bs + (gl.load(_at(b, b_at, row, b_step), mask=n_mask, other=0.0),)
                        if AHEAD:
                            _prefetch(line, _of_step(rows, gl.maximum(base - UNROLL + token, start)), line_step)
                        steps = ()
                        before = ()
                        decays = ()
                        for i in gl.static_range(UNROLL):
                            live = base + i < stop
                            if lengths is not None:
                                live = live & (_of_step(rows, gl.minimum(base + i, stop - 1)) < limit)
                            step = _activated(_biased(ds[i], bias_e, bias is not None), live, SOFTPLUS)
                            steps = steps + (step,)
                            before = before + (h,)
                            if i < UNROLL - 1:
                                fed = _tile(step * us[i].to(gl.float32))
                                bt = _row(bs[i].to(gl.float32), zeros)
                                decays = decays + (_exp2(_times(_tile(step), a2)),)
                                h = _times_plus(fed, (bt, bt, bt, bt), _times(decays[i], h))
                        boths = ()
                        for i in gl.static_range(UNROLL, -1, -1):
                            if i < UNROLL:  # what was loaded while the step behind it was computed
                                row = next_row
                                g = next_g.to(gl.float32)
                                ct = next_c
                                if z is not None:
                                    z_t = next_z.to(gl.float32)
                                du_before = next_du
                                dd_before = next_dd
                                dz_before = next_dz
                            if i > 0:
                                next_row = _of_step(rows, gl.minimum(base + i - 1, stop - 1))
                                live = base + i - 1 < stop
                                e_mask = ev_mask
                                n_mask = state_mask
                                if lengths is not None:
                                    live = live & (next_row < limit)
                                    e_mask = ev_mask & live
                                    n_mask = state_mask & live
                                next_g = gl.load(_at(grad, g_at, next_row, g_step), mask=ev_mask & live, other=0.0)
                                next_c = gl.load(_at(c, c_at, next_row, c_step), mask=n_mask, other=0.0)
                                next_du = 0.0
                                next_dd = 0.0
                                next_dz = 0.0
                                if ADD_U:
                                    earlier = _at(du_sum, du_sum_at, next_row, _bytes(du_sum, CHANNELS))
                                    next_du = _load(earlier, ev_mask & live & (k64 > 0))
                                if ADD_DELTA:
                                    earlier = _at(ddelta_sum, dd_sum_at, next_row, _bytes(ddelta_sum, CHANNELS))
                                    next_dd = _load(earlier, ev_mask & live & (k64 > 0))
                                if ADD_Z:
                                    earlier = _at(dz_sum, dz_sum_at, next_row, _bytes(dz_sum, CHANNELS))
                                    next_dz = _load(earlier, ev_mask & live & (k64 > 0))
                                if z is not None:
                                    next_z = gl.load(_at(z, z_at, next_row, z_step), mask=e_mask, other=0.0)
                            if i < UNROLL:
                                live = base + i < stop
                                mask = ev_mask & live
                                seen = live
                                if lengths is not None:
                                    seen = live & (row < limit)
                                u_t = us[i].to(gl.float32)
                                step = steps[i]
                                ct = _row(ct.to(gl.float32), zeros)
                                if z is not None:
                                    gate = _sigmoid(z_t)
                                    y = _sum_states(after, (ct, ct, ct, ct))
                                    if skip is not None:
                                        y = y + skip_e * u_t
                                    dz_t = g * y * gate * (1.0 + z_t * (1.0 - gate))
                                    _emit(dz_t, dz_before, dz, dz_at, dz_sum, dz_sum_at, row, CHANNELS, mask, on, ADD_Z)
                                    g = g * z_t * gate
                                g_tile = _tile(g)
                                adjoint = _times_plus(g_tile, (ct, ct, ct, ct), adjoint)
                                db_t = _sum_channels(_tile(step * u_t), adjoint)
                                dc_t = _sum_channels(g_tile, after)
                                both = gl.where(of_c, dc_t, db_t) + _swapped(gl.where(of_c, db_t, dc_t), 4)
                                if WARPS == 1:
                                    both_at = _at(dbc, dbc_at, row, _bytes(dbc, 2 * GROUPS * STATES))
                                    if AGAIN:  # add to what this program stored for an earlier block of channels
                                        both = both + _load(both_at, pair_mask & live & (block != block_program))
                                    gl.store(both_at, both, mask=pair_mask & live)
                                else:
                                    boths = (both,) + boths
                                bt = _row(bs[i].to(gl.float32), zeros)
                                along_b = _sum_states(adjoint, (bt, bt, bt, bt))
                                if (i < UNROLL - 1) & (i >= UNROLL - 1 - KEEP):
                                    decay = decays[i]
                                    step_tile = _tile(step)
                                else:
                                    # `nothing` is zero, but unknown: a second exponential instead of a register
                                    step_tile = _tile(step + nothing)
                                    decay = _exp2(_times(step_tile, a2))
                                after = before[i]
                                if REREAD & (i == 0):
                                    after = _kept(scratch.index(trip - first_trip + zero), TILE, WHOLE)
                                adjoint = _times(adjoint, decay)
                                flow = _times(adjoint, after)
                                a_sum = _times_plus(step_tile, flow, a_sum)
                                du_t = step * along_b
                                if skip is not None:
                                    du_t = du_t + skip_e * g
                                    skip_sum = skip_sum + g * u_t
                                dd_t = _sum_states(flow, a2) * LN2 + u_t * along_b
                                if SOFTPLUS:
                                    dd_t = dd_t * _sigmoid(_biased(ds[i], bias_e, bias is not None))
                                dd_t = gl.where(seen, dd_t, 0.0)
                                bias_sum = bias_sum + dd_t
                                _emit(du_t, du_before, du, du_at, du_sum, du_sum_at, row, CHANNELS, mask, on, ADD_U)
                                dd_sum = ddelta_sum
                                _emit(
                                    dd_t,
                                    dd_before,
                                    ddelta,
                                    dd_at,
                                    dd_sum,
                                    dd_sum_at,
                                    row,
                                    CHANNELS,
                                    mask,
                                    on,
                                    ADD_DELTA,
                                )
                        if WARPS > 1:
                            row = gl.minimum(base + own_token, stop - 1)
                            if orders is not None:
                                row = gl.load(order + row)
                            shares.store(gl.convert_layout(_joined(boths, UNROLL), TRIP))
                            both = gl.sum(gl.reshape(shares.load(JOINED), [WARPS, 32, UNROLL]), 0)
                            both = gl.convert_layout(both, JOINED)
                            both_at = dbc_at + row.to(gl.int64) * _bytes(dbc, 2 * GROUPS * STATES)
                            both_at = both_at.to(gl.pointer_type(gl.float32), bitcast=True)
                            live = base + own_token < stop
                            if AGAIN:
                                both = both + _load(both_at, pair_mask & live & (block != block_program))
                            gl.store(both_at, both, mask=pair_mask & live)
                if dinitial is not None:
                    at = dinitial + (sk * CHANNELS + origin) * STATES
                    _store_tile(adjoint, at, channel, STATES, 1, inside, segment == 0, GROUP_CHANNELS, STATES)
            place = (work_program * directions + k64) * CHANNELS + origin
            at = da + (work_program * directions + k64) * (STATES * CHANNELS) + origin
            _store_tile(a_sum, at, channel, 1, CHANNELS, inside, True, GROUP_CHANNELS, STATES)
            if bias is not None:
                gl.store(dbias + place + ev, bias_sum, mask=ev_mask)
            if skip is not None:
                gl.store(dskip + place + ev, skip_sum, mask=ev_mask)
