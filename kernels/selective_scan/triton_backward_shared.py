"""The scan's backward pass for 9 to 16 states on NVIDIA devices, in Gluon: words and equations as in `triton_backward`.

What plain Triton cannot express: the scratch tiles of a chunk lie in shared memory, and every lane of the warp has a
channel of its own for whatever is computed per channel. A lane is (s, l), s = lane / 8 and l = lane % 8. Of the tile
of 32 channels x 16 states it holds four tensors of four:

    tile[j][i] of lane (s, l):   channel lane ^ 8 j,   state 4 s + (i ^ (l & 3))

so the own channel of a lane is tile[0], and its own state (of vectors of states) 4 s + (l & 3). With that twist every
exchange is between lane and lane ^ constant, and none needs to choose what to keep: a vector of channels reaches a
tile by 3 shuffles, a sum over states leaves each lane its own channel by 3, and so does a sum over channels for states.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from genssm.kernels.selective_scan.triton_backward import _RUNTIME

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LANES = gl.constexpr(32)
STATES_HELD = gl.constexpr(16)
TILE = gl.constexpr(gl.BlockedLayout([1, 4], [32, 1], [1, 1], [1, 0]))  # (32, 4): four states of a lane
VECTOR = gl.constexpr(gl.SliceLayout(1, gl.BlockedLayout([1, 4], [32, 1], [1, 1], [1, 0])))  # (32,): one per lane
WHOLE = gl.constexpr(gl.BlockedLayout([1, 16], [32, 1], [1, 1], [1, 0]))  # (32, 16): all of a lane
INSIDE = gl.constexpr(gl.SliceLayout(0, gl.BlockedLayout([1, 4], [32, 1], [1, 1], [1, 0])))  # (4,): of every lane


@gluon.jit
def _swapped(x, BY: gl.constexpr):
    """What lane ^ BY has."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, BY], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _of_lane(x, lane):
    """The int32 that a lane has."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [x, lane], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _swapped_inside(x):
    """(32, 4): column i from lane ^ i."""
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
def _reciprocal(x):
    """1 / x for x >= 1, to one unit in the last place."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _sigmoid(x):
    return _reciprocal(1.0 + gl.exp2(x * -LOG2E))


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
def _activated(raw, seen, SOFTPLUS: gl.constexpr):
    """delta, zero where the step is not seen."""
    if SOFTPLUS:
        raw = _softplus(raw)
    return gl.where(seen, raw, 0.0)


@gluon.jit
def _biased(raw, bias_e, HAS_BIAS: gl.constexpr):
    raw = raw.to(gl.float32)
    if HAS_BIAS:
        raw = raw + bias_e
    return raw


@gluon.jit
def _sector(pointer):
    """Elements that a cache loads at a time."""
    size: gl.constexpr = 256 // pointer.dtype.element_ty.primitive_bitwidth
    return size


@gluon.jit
def _load(pointers, mask):
    return gl.load(pointers, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _address(pointers):
    """Addresses in bytes: 64 bits, so that one instruction adds the product of a row and its bytes."""
    return pointers.to(gl.int64, bitcast=True)


@gluon.jit
def _bytes(pointer, elements):
    """Bytes of a number of elements, int32."""
    return elements * (pointer.dtype.element_ty.primitive_bitwidth // 8)


@gluon.jit
def _moved(address, row, row_bytes):
    """``address`` some rows on, by one instruction (which the compiler does not find across a loop)."""
    return gl.inline_asm_elementwise(
        "{ .reg .b64 t; mul.wide.u32 t, $1, $2; add.s64 $0, $3, t; }", "=l,r,r,l", [row, row_bytes, address], dtype=gl.int64, is_pure=True, pack=1
    )


@gluon.jit
def _at(like, address, row, row_bytes):
    """Pointers into the rows behind ``address``, of the type of ``like``."""
    return _moved(address, row, row_bytes).to(gl.pointer_type(like.dtype.element_ty), bitcast=True)


@gluon.jit
def _emit(value, final, final_at, partial, partial_at, row, CHANNELS, mask, k64, directions, ACCUMULATE: gl.constexpr):
    """As `triton_backward._emit`."""
    final_at = _at(final, final_at, row, _bytes(final, CHANNELS))
    if ACCUMULATE:
        partial_at = _at(partial, partial_at, row, _bytes(partial, CHANNELS))
        value = value + _load(partial_at, mask & (k64 > 0))
        gl.store(partial_at, value, mask=mask & (k64 < directions - 1))
        mask = mask & (k64 == directions - 1)
    gl.store(final_at, value.to(final_at.dtype.element_ty), mask=mask)


@gluon.jit
def _to_tile(x):
    """A vector of channels for the four parts of a tile."""
    return (x[:, None], _swapped(x, 8)[:, None], _swapped(x, 16)[:, None], _swapped(x, 24)[:, None])


@gluon.jit
def _states_to_tile(x):
    """A vector of states for the columns of a tile, (32, 4)."""
    wide, _ = gl.broadcast(x[:, None], gl.full([LANES, 4], 0.0, gl.float32, TILE))
    return _swapped_inside(wide)


@gluon.jit
def _sum_states(a, b):
    """Sum of tile a times tile or vector b over states, for the own channel of each lane. b has four parts."""
    x0 = gl.sum(a[0] * b[0], 1)
    x1 = gl.sum(a[1] * b[1], 1)
    x2 = gl.sum(a[2] * b[2], 1)
    x3 = gl.sum(a[3] * b[3], 1)
    return (x0 + _swapped(x1, 8)) + (_swapped(x2, 16) + _swapped(x3, 24))


@gluon.jit
def _sum_channels(scale, tile):
    """Sum of the tile times a vector of channels over the channels of four lanes, for the own state of each lane."""
    products = scale[0] * tile[0]
    for j in gl.static_range(1, 4):
        products = products + scale[j] * tile[j]
    return gl.sum(_swapped_inside(products), 1)


@gluon.jit
def _add(x, y):
    return (x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3])


@gluon.jit
def _times(x, y):
    return (x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3])


@gluon.jit
def _decay(step, a2):
    return (
        gl.exp2(step[0] * a2[0]),
        gl.exp2(step[1] * a2[1]),
        gl.exp2(step[2] * a2[2]),
        gl.exp2(step[3] * a2[3]),
    )


@gluon.jit
def _advanced_by(h, decay, fed, b):
    """The state after a step: ``decay`` h + ``fed`` b, the latter vectors of channels and of states."""
    return (
        decay[0] * h[0] + fed[0] * b,
        decay[1] * h[1] + fed[1] * b,
        decay[2] * h[2] + fed[2] * b,
        decay[3] * h[3] + fed[3] * b,
    )


@gluon.jit
def _advanced(h, step, a2, fed, b):
    return _advanced_by(h, _decay(step, a2), fed, b)


@gluon.jit
def _tile_pointers(base, J: gl.constexpr, e_stride, n_stride):
    lane = gl.arange(0, LANES, VECTOR)
    own = (lane ^ (8 * J)).to(gl.int64) * e_stride
    state = ((lane >> 3) * 4)[:, None] + (gl.arange(0, 4, INSIDE)[None, :] ^ (lane & 3)[:, None])
    return base + (own[:, None] + state.to(gl.int64) * n_stride)


@gluon.jit
def _tile_mask(J: gl.constexpr, inside, CHANNELS: gl.constexpr, STATES: gl.constexpr):
    lane = gl.arange(0, LANES, VECTOR)
    if CHANNELS % LANES == 0 and STATES == STATES_HELD:
        mask = gl.full([LANES, 4], 1, gl.int1, TILE)
    else:
        state = ((lane >> 3) * 4)[:, None] + (gl.arange(0, 4, INSIDE)[None, :] ^ (lane & 3)[:, None])
        mask = ((lane ^ (8 * J)) + inside < CHANNELS)[:, None] & (state < STATES)
    return mask


@gluon.jit
def _load_tile(base, e_stride, n_stride, inside, allowed, CHANNELS: gl.constexpr, STATES: gl.constexpr):
    tile = ()
    for j in gl.static_range(4):
        mask = _tile_mask(j, inside, CHANNELS, STATES) & allowed
        tile = tile + (_load(_tile_pointers(base, j, e_stride, n_stride), mask),)
    return tile


@gluon.jit
def _store_tile(tile, base, e_stride, n_stride, inside, allowed, CHANNELS: gl.constexpr, STATES: gl.constexpr):
    for j in gl.static_range(4):
        mask = _tile_mask(j, inside, CHANNELS, STATES) & allowed
        gl.store(_tile_pointers(base, j, e_stride, n_stride), tile[j], mask=mask)


@gluon.jit
def _zero_tile():
    x = gl.full([LANES, 4], 0.0, gl.float32, TILE)
    return (x, x, x, x)


@gluon.jit
def _keep(scratch, trip, tile):
    """Store a tile: sixteen neighbours of a lane, which the layout of ``scratch`` spreads over the banks."""
    joined = gl.join(gl.join(tile[0], tile[1]), gl.join(tile[2], tile[3]))  # (32, 4, 2, 2)
    scratch.index(trip).store(gl.convert_layout(gl.reshape(joined, [LANES, STATES_HELD]), WHOLE))


@gluon.jit
def _kept(scratch, trip):
    joined = gl.reshape(scratch.index(trip).load(WHOLE), [LANES, 4, 2, 2])
    even, odd = gl.split(joined)
    x0, x1 = gl.split(even)
    x2, x3 = gl.split(odd)
    return (
        gl.convert_layout(x0, TILE),
        gl.convert_layout(x1, TILE),
        gl.convert_layout(x2, TILE),
        gl.convert_layout(x3, TILE),
    )


@gluon.jit
def _chunk_rows(order, chunk, bottom, top, CHUNK: gl.constexpr):
    """Rows of the steps of a chunk, a lane for each; those outside of [bottom, top) taken as the nearest inside."""
    steps = chunk * CHUNK + gl.arange(0, CHUNK, VECTOR)
    steps = gl.maximum(gl.minimum(steps, top - 1), bottom)
    if order is not None:
        steps = gl.load(order + steps)
    return steps


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
    SPAN: gl.constexpr,
    UNROLL: gl.constexpr,
    KEEP: gl.constexpr,
    AHEAD: gl.constexpr,
    LATE: gl.constexpr,
    REREAD: gl.constexpr,
):
    """Gradients of some blocks of channels of one group, for some sequences (or segments) and some directions.

    What a program takes is what one of `triton_backward.scan_backward_kernel` takes.
    """
    GROUPS: gl.constexpr = CHANNELS // GROUP_CHANNELS
    GROUP_BLOCKS: gl.constexpr = (GROUP_CHANNELS + LANES - 1) // LANES
    TRIPS: gl.constexpr = SPAN // UNROLL  # of a part
    PARTS: gl.constexpr = CHUNK // SPAN
    gl.static_assert(CHUNK == LANES)
    block_program = gl.program_id(0) % block_programs
    pid = gl.program_id(0) // block_programs
    group = pid % GROUPS
    pid = pid // GROUPS
    first_direction = pid % direction_programs
    work_program = pid // direction_programs
    lane = gl.arange(0, LANES, VECTOR)
    state = (lane >> 3) * 4 + (lane & 3)
    of_c = (lane & 4) != 0  # what is one value for B and one for C is B's in the lower four lanes of each eight
    state_mask = state < STATES
    pair = state * 2 + ((lane >> 2) & 1)  # dB and dC side by side
    ev = lane.to(gl.int64)
    nothing = zero.to(gl.float32)
    scratch = gl.allocate_shared_memory(
        gl.float32, [TRIPS, LANES, STATES_HELD], gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
    )
    piece = (lane >> 1) & 3  # of what a lane prefetches
    sector = lane & 1
    trip_lane = lane >> 3

    for block in range(block_program, GROUP_BLOCKS, block_programs):
        inside = block * LANES
        origin = inside.to(gl.int64) + group * GROUP_CHANNELS
        if GROUP_CHANNELS % LANES == 0:
            ev_mask = gl.full([LANES], 1, gl.int1, VECTOR)
        else:
            ev_mask = lane + inside < GROUP_CHANNELS
        columns = gl.minimum(GROUP_CHANNELS - inside, LANES)
        for k in range(first_direction, directions, direction_programs):
            k64 = k.to(gl.int64)
            order = orders
            if orders is not None:
                order = orders + k64 * length
            a_tile = _load_tile(a + k64 * a_k + origin, 1, CHANNELS, inside, True, GROUP_CHANNELS, STATES)
            a2 = (a_tile[0] * LOG2E, a_tile[1] * LOG2E, a_tile[2] * LOG2E, a_tile[3] * LOG2E)
            bias_e = 0.0
            if bias is not None:
                bias_e = _load(bias + k64 * bias_k + origin + ev, ev_mask)
            if skip is not None:
                skip_e = _load(skip + k64 * skip_k + origin + ev, ev_mask)
            a_sum = _zero_tile()
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
                limit = length
                if lengths is not None:
                    limit = gl.load(lengths + s)
                if SEGMENTED:
                    adjoint_at = carry + (sk * segments + segment) * (STATES * CHANNELS) + origin
                    adjoint = _load_tile(adjoint_at, 1, CHANNELS, inside, True, GROUP_CHANNELS, STATES)
                elif grad_last is not None:
                    adjoint_at = grad_last + s * gl_s + k64 * gl_k + origin * gl_e
                    adjoint = _load_tile(adjoint_at, gl_e, gl_n, inside, True, GROUP_CHANNELS, STATES)
                else:
                    adjoint = _zero_tile()

                g_near = grad + row_batch * g_b + k64 * g_k + origin * g_e
                u_near = u + row_batch * u_b + k64 * u_k + origin * u_e
                d_near = delta + row_batch * d_b + k64 * d_k + origin * d_e
                b_near = b + row_batch * b_b + k64 * b_k + group * b_g
                c_near = c + row_batch * c_b + k64 * c_k + group * c_g
                g_at = _address(g_near + ev * g_e)
                u_at = _address(u_near + ev * u_e)
                d_at = _address(d_near + ev * d_e)
                b_at = _address(b_near + state.to(gl.int64) * b_n)
                c_at = _address(c_near + state.to(gl.int64) * c_n)
                du_at = _address(du + row_batch * du_b + k64 * du_k + origin + ev)
                dd_at = _address(ddelta + row_batch * dd_b + k64 * dd_k + origin + ev)
                du_sum_at = _address(du_sum + row_batch * du_b + origin + ev)
                dd_sum_at = _address(ddelta_sum + row_batch * dd_b + origin + ev)
                z_near = g_near
                z_row = g_l
                if z is not None:
                    z_near = z + row_batch * z_b + k64 * z_k + origin * z_e
                    z_row = z_l
                    z_at = _address(z_near + ev * z_e)
                    dz_at = _address(dz + row_batch * dz_b + k64 * dz_k + origin + ev)
                    dz_sum_at = _address(dz_sum + row_batch * dz_b + origin + ev)
                slot = ((block_program * batch + row_batch) * directions + k64) * length
                dbc_at = _address(dbc + (slot * GROUPS + group) * (2 * STATES) + pair)
                u_step, d_step, b_step = _bytes(u, u_l), _bytes(delta, d_l), _bytes(b, b_l)
                g_step, c_step, z_step = _bytes(grad, g_l), _bytes(c, c_l), _bytes(z_near, z_row)
                if AHEAD:
                    u_line = _address(u_near + gl.minimum(sector * _sector(u), columns - 1) * u_e)
                    d_line = _address(d_near + gl.minimum(sector * _sector(delta), columns - 1) * d_e)
                    g_line = _address(g_near + gl.minimum(sector * _sector(grad), columns - 1) * g_e)
                    b_line = _address(b_near + gl.minimum(sector * _sector(b), STATES - 1) * b_n)
                    c_line = _address(c_near + gl.minimum(sector * _sector(c), STATES - 1) * c_n)
                    z_line = g_line
                    if z is not None:
                        z_line = _address(z_near + gl.minimum(sector * _sector(z), columns - 1) * z_e)
                    u_line, ud_step = gl.where(piece < 1, u_line, d_line), gl.where(piece < 1, u_step, d_step)
                    z_line, zg_step = gl.where(piece < 3, z_line, g_line), gl.where(piece < 3, z_step, g_step)
                    first_line, first_step = gl.where(piece < 2, u_line, b_line), gl.where(piece < 2, ud_step, b_step)
                    second_line = gl.where(piece < 2, u_line, z_line)
                    second_step = gl.where(piece < 2, ud_step, zg_step)
                    bc_line, bc_step = gl.where(piece < 2, b_line, c_line), gl.where(piece < 2, b_step, c_step)
                    column = gl.minimum((lane & 3) * 8, columns - 1)
                    if ADD_U:
                        du_line = _address(du_sum + row_batch * du_b + origin + column)
                    if ADD_DELTA:
                        dd_line = _address(ddelta_sum + row_batch * dd_b + origin + column)
                    if ADD_Z:
                        dz_line = _address(dz_sum + row_batch * dz_b + origin + column)

                kept = saved + (row_batch * directions + k64) * chunks * (STATES * CHANNELS) + origin
                low = first // CHUNK + segment * segment_chunks
                high = gl.minimum(low + segment_chunks, gl.cdiv(end, CHUNK))
                bottom = gl.maximum(low * CHUNK, first)
                top = gl.maximum(gl.minimum(high * CHUNK, end), bottom + 1)
                next_rows = _chunk_rows(order, high - 1, bottom, top, CHUNK)
                for back in range((high - low) * PARTS):
                    chunk = high - 1 - back // PARTS
                    rows = next_rows
                    next_rows = _chunk_rows(order, high - 1 - (back + 1) // PARTS, bottom, top, CHUNK)
                    start = gl.maximum(chunk * CHUNK, first)
                    stop = gl.minimum((chunk + 1) * CHUNK, end)
                    first_trip = zero * 0
                    if PARTS > 1:  # the walks of a part begin at the checkpoint, too, but keep nothing before its steps
                        first_trip = (PARTS - 1 - back % PARTS) * TRIPS
                        stop = gl.minimum(start + first_trip * UNROLL + SPAN, stop)
                    trips = gl.cdiv(stop - start, UNROLL)
                    if PARTS > 1:
                        trips = gl.where(trips > first_trip, trips, 0)
                    if AHEAD == 1:  # what the second walk begins with
                        last_rows = _of_lane(rows, gl.minimum(start + (trips - 1) * UNROLL + trip_lane, stop - 1))
                        _prefetch(second_line, last_rows, second_step)
                        _prefetch(bc_line, last_rows, bc_step)
                    whole = chunk * CHUNK >= first  # else a packed sequence starts inside this chunk
                    kept_at = kept + chunk * (STATES * CHANNELS)
                    h = _load_tile(kept_at, 1, CHANNELS, inside, whole, GROUP_CHANNELS, STATES)
                    if (borders is not None) & (initial is not None):
                        start_at = initial + s * i_s + k64 * i_k + origin * i_e
                        h = _add(h, _load_tile(start_at, i_e, i_n, inside, whole == 0, GROUP_CHANNELS, STATES))
                    for trip in range(trips):
                        base = start + trip * UNROLL
                        _keep(scratch, gl.maximum(trip - first_trip, 0), h)
                        seen = ()
                        us = ()
                        ds = ()
                        bs = ()
                        for i in gl.static_range(UNROLL):
                            row = _of_lane(rows, gl.minimum(base + i, stop - 1))
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
                            ahead = _of_lane(rows, gl.minimum(base + UNROLL + trip_lane, stop - 1))
                            _prefetch(first_line, ahead, first_step)
                        for i in gl.static_range(UNROLL):
                            step = _activated(_biased(ds[i], bias_e, bias is not None), seen[i], SOFTPLUS)
                            fed = _to_tile(step * us[i].to(gl.float32))
                            step = _to_tile(step)
                            bt = _states_to_tile(bs[i].to(gl.float32))
                            h = _advanced(h, step, a2, fed, bt)
                    after = h
                    for trip_back in range(trips - gl.minimum(first_trip, trips)):
                        trip = trips - 1 - trip_back
                        base = start + trip * UNROLL
                        h = _kept(scratch, trip - first_trip)
                        us = ()
                        ds = ()
                        bs = ()
                        for i in gl.static_range(UNROLL):
                            row = _of_lane(rows, gl.minimum(base + i, stop - 1))
                            e_mask = ev_mask
                            n_mask = state_mask
                            if lengths is not None:
                                e_mask = ev_mask & (row < limit) & (base + i < stop)
                                n_mask = state_mask & (row < limit) & (base + i < stop)
                            us = us + (gl.load(_at(u, u_at, row, u_step), mask=e_mask, other=0.0),)
                            ds = ds + (gl.load(_at(delta, d_at, row, d_step), mask=e_mask, other=0.0),)
                            bs = bs + (gl.load(_at(b, b_at, row, b_step), mask=n_mask, other=0.0),)
                        if AHEAD:
                            ahead = _of_lane(rows, gl.maximum(base - UNROLL + trip_lane, start))
                            if AHEAD == 1:
                                _prefetch(second_line, ahead, second_step)
                                _prefetch(bc_line, ahead, bc_step)
                            else:
                                _prefetch(first_line, ahead, first_step)
                            if ADD_U:
                                _prefetch(du_line, ahead, _bytes(du_sum, CHANNELS))
                            if ADD_DELTA:
                                _prefetch(dd_line, ahead, _bytes(ddelta_sum, CHANNELS))
                            if ADD_Z:
                                _prefetch(dz_line, ahead, _bytes(dz_sum, CHANNELS))
                        steps = ()
                        before = ()
                        decays = ()
                        for i in gl.static_range(UNROLL):
                            live = base + i < stop
                            if lengths is not None:
                                live = live & (_of_lane(rows, gl.minimum(base + i, stop - 1)) < limit)
                            step = _activated(_biased(ds[i], bias_e, bias is not None), live, SOFTPLUS)
                            steps = steps + (step,)
                            before = before + (h,)
                            if i < UNROLL - 1:
                                fed = _to_tile(step * us[i].to(gl.float32))
                                bt = _states_to_tile(bs[i].to(gl.float32))
                                decay = _decay(_to_tile(step), a2)
                                h = _advanced_by(h, decay, fed, bt)
                                decays = decays + (decay,)
                        for i in gl.static_range(UNROLL - 1, -1, -1):
                            if LATE:
                                if i == UNROLL - 1:
                                    next_row = _of_lane(rows, gl.minimum(base + i, stop - 1))
                                    next_g = gl.load(_at(grad, g_at, next_row, g_step), mask=ev_mask, other=0.0)
                                    next_c = gl.load(_at(c, c_at, next_row, c_step), mask=state_mask, other=0.0)
                                    if z is not None:
                                        next_z = gl.load(_at(z, z_at, next_row, z_step), mask=ev_mask, other=0.0)
                                row = next_row
                                g_t = next_g
                                c_t = next_c
                                if z is not None:
                                    z_t = next_z
                                if i > 0:
                                    next_row = _of_lane(rows, gl.minimum(base + i - 1, stop - 1))
                                    next_g = gl.load(_at(grad, g_at, next_row, g_step), mask=ev_mask, other=0.0)
                                    next_c = gl.load(_at(c, c_at, next_row, c_step), mask=state_mask, other=0.0)
                                    if z is not None:
                                        next_z = gl.load(_at(z, z_at, next_row, z_step), mask=ev_mask, other=0.0)
                            live = base + i < stop
                            mask = ev_mask & live
                            seen = live
                            if lengths is not None:
                                seen = live & (row < limit)
                                g_t = gl.where(seen, g_t, 0.0)
                                c_t = gl.where(seen, c_t, 0.0)
                                if z is not None:
                                    z_t = gl.where(seen, z_t, 0.0)
                            u_t = us[i].to(gl.float32)
                            g = gl.where(seen, g_t.to(gl.float32), 0.0)
                            ct = _states_to_tile(c_t.to(gl.float32))
                            if z is not None:
                                z_t = z_t.to(gl.float32)
                                gate = _sigmoid(z_t)
                                y = _sum_states(after, (ct, ct, ct, ct))
                                if skip is not None:
                                    y = y + skip_e * u_t
                                dz_t = g * y * gate * (1.0 + z_t * (1.0 - gate))
                                _emit(dz_t, dz, dz_at, dz_sum, dz_sum_at, row, CHANNELS, mask, k64, directions, ADD_Z)
                                g = g * z_t * gate
                            step = steps[i]
                            g_tile = _to_tile(g)
                            fed = _to_tile(step * u_t)
                            adjoint = (
                                adjoint[0] + g_tile[0] * ct,
                                adjoint[1] + g_tile[1] * ct,
                                adjoint[2] + g_tile[2] * ct,
                                adjoint[3] + g_tile[3] * ct,
                            )
                            db_t = _sum_channels(fed, adjoint)
                            dc_t = _sum_channels(g_tile, after)
                            both = gl.where(of_c, dc_t, db_t) + _swapped(gl.where(of_c, db_t, dc_t), 4)
                            both_at = _at(dbc, dbc_at, row, _bytes(dbc, 2 * GROUPS * STATES))
                            if AGAIN:  # add to what this program stored for an earlier block of channels
                                both = both + _load(both_at, state_mask & live & (block != block_program))
                            gl.store(both_at, both, mask=state_mask & live)
                            bt = _states_to_tile(bs[i].to(gl.float32))
                            along_b = _sum_states(adjoint, (bt, bt, bt, bt))
                            if (i < UNROLL - 1) & (i >= UNROLL - 1 - KEEP):
                                decay = decays[i]
                                step_tile = _to_tile(step)
                            else:
                                # `nothing` is zero, but unknown: a second exponential instead of a register
                                step_tile = _to_tile(step + nothing)
                                decay = _decay(step_tile, a2)
                            after = before[i]
                            if REREAD & (i == 0):
                                after = _kept(scratch, trip - first_trip)
                            adjoint = _times(adjoint, decay)
                            flow = _times(adjoint, after)
                            a_sum = (
                                a_sum[0] + step_tile[0] * flow[0],
                                a_sum[1] + step_tile[1] * flow[1],
                                a_sum[2] + step_tile[2] * flow[2],
                                a_sum[3] + step_tile[3] * flow[3],
                            )
                            du_t = step * along_b
                            if skip is not None:
                                du_t = du_t + skip_e * g
                                skip_sum = skip_sum + g * u_t
                            dd_t = _sum_states(flow, a2) * LN2 + u_t * along_b
                            if SOFTPLUS:
                                dd_t = dd_t * _sigmoid(_biased(ds[i], bias_e, bias is not None))
                            dd_t = gl.where(seen, dd_t, 0.0)
                            bias_sum = bias_sum + dd_t
                            _emit(du_t, du, du_at, du_sum, du_sum_at, row, CHANNELS, mask, k64, directions, ADD_U)
                            _emit(dd_t, ddelta, dd_at, ddelta_sum, dd_sum_at, row, CHANNELS, mask, k64, directions, ADD_DELTA)
                if dinitial is not None:
                    first_at = dinitial + (sk * CHANNELS + origin) * STATES
                    _store_tile(adjoint, first_at, STATES, 1, inside, segment == 0, GROUP_CHANNELS, STATES)
            place = (work_program * directions + k64) * CHANNELS + origin
            da_at = da + (work_program * directions + k64) * (STATES * CHANNELS) + origin
            _store_tile(a_sum, da_at, 1, CHANNELS, inside, True, GROUP_CHANNELS, STATES)
            if bias is not None:
                gl.store(dbias + place + ev, bias_sum, mask=ev_mask)
            if skip is not None:
                gl.store(dskip + place + ev, skip_sum, mask=ev_mask)
