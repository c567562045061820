"""What the Gluon kernels share: where the elements of a tile live, exchanges between lanes, addresses, loads.

Every lane of a warp has a channel of its own for whatever is computed per channel. A lane is (s, l), s = lane / 8 and
l = lane % 8. Of the tile of 32 channels x 16 states of its warp it holds four tensors of four:

    tile[j][i] of lane (s, l):   channel lane ^ 8 j,   state 4 s + (i ^ (l & 3))

so the own channel of a lane is in tile[0], and its own state (of vectors of states) is 4 s + (l & 3). With that twist
every exchange is between lane and lane ^ constant, and no lane needs to choose what to keep: a vector of channels
reaches a tile by 3 shuffles, a sum over states leaves each lane its own channel by 3, and a sum over channels each
lane its own state.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def swapped(x, BY: gl.constexpr):
    """What lane ^ BY has."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, BY], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def swapped_inside(x):
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
def of_step(rows, step):
    """The row of a step, of the lane that has it: the one with the step's last five bits."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [rows, step], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def moved(address, row, row_bytes):
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
def prefetch(address, row, row_bytes):
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [moved(address, row, row_bytes)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def prefetch_row(near, row, row_bytes, stride, last, COUNT: gl.constexpr):
    """The sectors of COUNT elements of a row of each lane, to the second level; none behind the ``last`` element."""
    SECTOR: gl.constexpr = 256 // near.dtype.element_ty.primitive_bitwidth
    for i in gl.static_range((COUNT + SECTOR - 1) // SECTOR):
        prefetch(address(near + gl.minimum(SECTOR * i, last) * stride), row, row_bytes)


@gluon.jit
def address(pointers):
    return pointers.to(gl.int64, bitcast=True)


@gluon.jit
def byte_count(pointer, elements):
    """Bytes of a number of elements, int32."""
    return elements * (pointer.dtype.element_ty.primitive_bitwidth // 8)


@gluon.jit
def in_row(like, address, row, row_bytes):
    """Pointers of the type of ``like`` into the rows behind ``address``."""
    return moved(address, row, row_bytes).to(gl.pointer_type(like.dtype.element_ty), bitcast=True)


@gluon.jit
def load_seen(like, address, row, row_bytes, mask, limit, LIMITED: gl.constexpr):
    """From a row, zero where it is padding: that may hold anything."""
    if LIMITED:
        mask = mask & (row < limit)
    return gl.load(in_row(like, address, row, row_bytes), mask=mask, other=0.0)


@gluon.jit
def of_steps(rows, base, last, COUNT: gl.constexpr):
    """The rows of COUNT steps; behind the ``last`` step its own."""
    found = ()
    for i in gl.static_range(COUNT):
        found = found + (of_step(rows, gl.minimum(base + i, last)),)
    return found


@gluon.jit
def in_flight(x, like):
    """An element of ``like`` in a register of its own: two in one would have to be there before the next trip."""
    if like.dtype.element_ty.primitive_bitwidth == 16:
        x = gl.inline_asm_elementwise(
            "cvt.u32.u16 $0, $1;", "=r,h", [x.to(gl.int16, bitcast=True)], dtype=gl.int32, is_pure=True, pack=1
        )
    return x


@gluon.jit
def landed(x, like):
    """The float32 that `in_flight` kept of an element of ``like``."""
    if like.dtype.element_ty.primitive_bitwidth == 16:
        x = x.to(gl.int16).to(like.dtype.element_ty, bitcast=True)
    return x.to(gl.float32)


@gluon.jit
def load_steps(like, address, rows, row_bytes, mask, limit, LIMITED: gl.constexpr):
    """From each of some rows, as `load_seen`, kept as `in_flight`."""
    found = ()
    for i in gl.static_range(len(rows)):
        x = load_seen(like, address, rows[i], row_bytes, mask, limit, LIMITED)
        found = found + (in_flight(x, like),)
    return found


@gluon.jit
def opaque(x):
    """``x``, of which the compiler knows nothing and keeps nothing that it computes from it."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def behind(x, y, zero):
    """``x``, computed after ``y``."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; and.b32 t, $2, $3; add.s32 $0, $1, t; }",
        "=r,r,f,r",
        [x, y, zero],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_float(pointers, mask):
    return gl.load(pointers, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def sigmoid(x):
    """By an approximate reciprocal, to one unit in the last place."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp2(x * -LOG2E)], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def softplus(x):
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
def biased(raw, bias_e, HAS_BIAS: gl.constexpr):
    raw = raw.to(gl.float32)
    if HAS_BIAS:
        raw = raw + bias_e
    return raw


@gluon.jit
def activated(raw, seen, SOFTPLUS: gl.constexpr):
    """delta, zero where the step is not seen."""
    if SOFTPLUS:
        raw = softplus(raw)
    return gl.where(seen, raw, 0.0)


@gluon.jit
def earlier(final, final_at, row, CHANNELS, mask, ACCUMULATE: gl.constexpr):
    """What the directions before this one left in a row."""
    found = 0.0
    if ACCUMULATE:
        found = load_float(in_row(final, final_at, row, byte_count(final, CHANNELS)), mask)
    return found


@gluon.jit
def emit(value, earlier, final, final_at, row, CHANNELS, mask):
    """Store a value per token and channel, with what ``earlier`` directions left."""
    value = (value + earlier).to(final.dtype.element_ty)
    gl.store(in_row(final, final_at, row, byte_count(final, CHANNELS)), value, mask=mask)


@gluon.jit
def to_tile(x):
    """A vector of channels for the four parts of a tile."""
    return (x[:, None], swapped(x, 8)[:, None], swapped(x, 16)[:, None], swapped(x, 24)[:, None])


@gluon.jit
def state_row(x, like):
    """A vector of states for any part of a tile."""
    wide, _ = gl.broadcast(x[:, None], like)
    return swapped_inside(wide)


@gluon.jit
def sum_states(a, b):
    """The sum of a b over states, for the own channel of each lane; both in four parts."""
    x0 = gl.sum(a[0] * b[0], 1)
    x1 = gl.sum(a[1] * b[1], 1)
    x2 = gl.sum(a[2] * b[2], 1)
    x3 = gl.sum(a[3] * b[3], 1)
    return (x0 + swapped(x1, 8)) + (swapped(x2, 16) + swapped(x3, 24))


@gluon.jit
def sum_channels(a, b):
    """The sum of a b over the channels of four lanes, lane ^ (0 to 3), for the own state of each lane."""
    return gl.sum(swapped_inside(a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]), 1)


@gluon.jit
def times_tile(x, y):
    return (x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3])


@gluon.jit
def times_plus_tile(x, y, z):
    return (x[0] * y[0] + z[0], x[1] * y[1] + z[1], x[2] * y[2] + z[2], x[3] * y[3] + z[3])


@gluon.jit
def exp2_tile(x):
    return (gl.exp2(x[0]), gl.exp2(x[1]), gl.exp2(x[2]), gl.exp2(x[3]))


@gluon.jit
def tile_index(channel, inside, J: gl.constexpr, GROUP_CHANNELS, STATES):
    """Channels (lanes, 1), states (lanes, 4) and mask of a part of a tile."""
    e = (channel ^ (8 * J))[:, None]
    i = gl.arange(0, 4, gl.SliceLayout(0, e.type.layout))
    n = ((channel >> 3) % 4 * 4)[:, None] + ((channel & 3)[:, None] ^ i[None, :])
    return e.to(gl.int64), n.to(gl.int64), (e + inside < GROUP_CHANNELS) & (n < STATES)


@gluon.jit
def load_tile(base, channel, e_stride, n_stride, inside, allowed, GROUP_CHANNELS: gl.constexpr, STATES: gl.constexpr):
    tile = ()
    for j in gl.static_range(4):
        e, n, mask = tile_index(channel, inside, j, GROUP_CHANNELS, STATES)
        tile = tile + (load_float(base + (e * e_stride + n * n_stride), mask & allowed),)
    return tile


@gluon.jit
def store_tile(
    tile, base, channel, e_stride, n_stride, inside, allowed, GROUP_CHANNELS: gl.constexpr, STATES: gl.constexpr
):
    for j in gl.static_range(4):
        e, n, mask = tile_index(channel, inside, j, GROUP_CHANNELS, STATES)
        gl.store(base + (e * e_stride + n * n_stride), tile[j], mask=mask & allowed)


@gluon.jit
def joined(x):
    """Four vectors side by side."""
    return gl.reshape(gl.join(gl.join(x[0], x[2]), gl.join(x[1], x[3])), [x[0].shape[0], 4])


@gluon.jit
def store_kept(scratch, tile, WHOLE: gl.constexpr):
    """Store a tile: four parts (4, lanes, 4), so that one address and no two lanes in a bank do for all accesses."""
    whole = gl.join(gl.join(tile[0], tile[1]), gl.join(tile[2], tile[3]))  # (lanes, 4, 2, 2)
    scratch.store(gl.convert_layout(gl.reshape(gl.permute(whole, [3, 2, 0, 1]), scratch.shape), WHOLE))


@gluon.jit
def load_kept(scratch, TILE: gl.constexpr, WHOLE: gl.constexpr):
    whole = gl.reshape(scratch.load(WHOLE), [2, 2, scratch.shape[1], 4])
    even, odd = gl.split(gl.permute(whole, [2, 3, 1, 0]))
    x0, x1 = gl.split(even)
    x2, x3 = gl.split(odd)
    x0 = gl.convert_layout(x0, TILE)
    x1 = gl.convert_layout(x1, TILE)
    return (x0, x1, gl.convert_layout(x2, TILE), gl.convert_layout(x3, TILE))


@gluon.jit
def chunk_rows(order, steps, bottom, top):
    """Rows of steps, a lane for each; those outside of [bottom, top) taken as the nearest inside."""
    steps = gl.maximum(gl.minimum(steps, top - 1), bottom)
    if order is not None:
        steps = gl.load(order + steps)
    return steps


@gluon.jit
def step_inputs(step, stop, rows, limit, masks, tensors, places, LIMITED: gl.constexpr, ADDS: gl.constexpr):
    """What only the way back needs of a step: its row, gradient, C and z, and what earlier directions left there."""
    grad, c, z, du, ddelta, dz = tensors
    g_at, g_step, c_at, c_step, z_at, z_step, du_at, dd_at, dz_at, channels = places
    ev_mask, state_mask, later_direction = masks
    row = of_step(rows, gl.minimum(step, stop - 1))
    live = step < stop
    e_mask = ev_mask
    n_mask = state_mask
    if LIMITED:
        live = live & (row < limit)
        e_mask = ev_mask & live
        n_mask = state_mask & live
    g = gl.load(in_row(grad, g_at, row, g_step), mask=ev_mask & live, other=0.0)
    ct = gl.load(in_row(c, c_at, row, c_step), mask=n_mask, other=0.0)
    z_t = 0.0
    added = ev_mask & live & later_direction
    dz_left = 0.0
    if z is not None:
        z_t = gl.load(in_row(z, z_at, row, z_step), mask=e_mask, other=0.0)
        dz_left = earlier(dz, dz_at, row, channels, added, ADDS[2])
    du_left = earlier(du, du_at, row, channels, added, ADDS[0])
    dd_left = earlier(ddelta, dd_at, row, channels, added, ADDS[1])
    return row, g, ct, z_t, du_left, dd_left, dz_left


@gluon.jit
def load_early(at_rows, masks, early_from, early_at, limit, LIMITED: gl.constexpr):
    """u, delta and B of the steps of a trip, which both walks read."""
    u, delta, b = early_from
    u_at, u_step, d_at, d_step, b_at, b_step = early_at
    ev_mask, state_mask, _later_direction = masks
    us = load_steps(u, u_at, at_rows, u_step, ev_mask, limit, LIMITED)
    ds = load_steps(delta, d_at, at_rows, d_step, ev_mask, limit, LIMITED)
    bs = load_steps(b, b_at, at_rows, b_step, state_mask, limit, LIMITED)
    return us, ds, bs
