"""Triton kernels of the Mamba-2 scan's backward pass; words and tiles as in ``triton_chunks``, derivation in README.md.

First a walk from the last chunk to the first keeps the adjoint state after every chunk. Then the chunks do not depend
on each other: one kernel takes a chunk of one head and makes the gradients of x, dt, z and of the parameters; another
takes a chunk of some heads of a group, one after the other, and adds up what they contribute to B and C. What several
programs contribute goes to a slot for each, summed afterwards.
"""

import triton
import triton.language as tl

from genssm.kernels.selective_scan.triton_tiles import LOG2E, sigmoid, softplus
from genssm.kernels.ssd.triton_chunks import (
    decay_between,
    exponent_sums,
    last_of,
    load_rows,
    product,
    shifted,
    state_offsets,
    store_rows,
    visited,
)
from genssm.kernels.triton_launch import TABLES

_RUNTIME = [
    "g_b",
    "g_k",
    "x_b",
    "x_k",
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
    "dx_b",
    "dx_k",
    "dd_b",
    "dd_k",
    "dz_b",
    "dz_k",
    "length",
    "sequences",
    "directions",
    "batch",
    "segments",
    "segment_chunks",
    "chunks",
    "slots",
]


@triton.jit
def state_before(kept, initial, ends, n, p, whole, PACKED: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr):
    """The state before a chunk; that before a packed sequence which starts inside it (not ``whole``)."""
    mask = (n < STATES)[:, None] & (p < WIDTH)[None, :]
    h = tl.load(kept + state_offsets(n, p, WIDTH, 1), mask=mask & whole, other=0.0)
    if PACKED and initial is not None:
        start = tl.load(initial + ends + state_offsets(n, p, 1, STATES), mask=mask & (whole == 0), other=0.0)
        h = (h + start).to(h.dtype)
    return h


@triton.jit
def state_after(kept, grad_last, ends, n, p, full, WIDTH: tl.constexpr, STATES: tl.constexpr):
    """The adjoint state after a chunk; where a sequence ends inside it (not ``full``), the last state's gradient."""
    mask = (n < STATES)[:, None] & (p < WIDTH)[None, :]
    dh = tl.load(kept + state_offsets(n, p, WIDTH, 1), mask=mask & full, other=0.0)
    if grad_last is not None:
        last = tl.load(grad_last + ends + state_offsets(n, p, 1, STATES), mask=mask & (full == 0), other=0.0)
        dh = (dh + last).to(dh.dtype)
    return dh


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def ssd_adjoint_kernel(
    grad,
    grad_last,
    dt,
    a,
    c,
    z,
    bias,
    orders,
    lengths,
    first_steps,
    borders,
    carry,
    decay,
    adjoints,
    dinitial,
    g_b,
    g_k,
    g_l,
    g_h,
    g_p,
    d_b,
    d_k,
    d_l,
    d_h,
    z_b,
    z_k,
    z_l,
    z_h,
    z_p,
    c_b,
    c_k,
    c_l,
    c_g,
    c_n,
    a_k,
    bias_k,
    length,
    sequences,
    directions,
    segments,
    segment_chunks,
    chunks,
    SOFTPLUS: tl.constexpr,
    LOCAL: tl.constexpr,
    SEGMENTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    NB: tl.constexpr,
    PB: tl.constexpr,
):
    """Adjoint states after the chunks, and that before the first; LOCAL: what a segment makes of zero (``carry``)."""
    BLOCKS: tl.constexpr = (WIDTH + PB - 1) // PB
    EXACT_P: tl.constexpr = WIDTH % PB == 0
    EXACT_N: tl.constexpr = STATES == NB
    pid = tl.program_id(0)
    p = (pid % BLOCKS) * PB + tl.arange(0, PB)
    pid = pid // BLOCKS
    head = pid % HEADS
    pid = pid // HEADS
    segment = pid % segments
    sk = (pid // segments).to(tl.int64)
    s = sk // directions
    k = sk % directions
    n = tl.arange(0, NB)
    i = tl.arange(0, CHUNK)
    state_mask = (n < STATES)[:, None] & (p < WIDTH)[None, :]
    own = state_offsets(n, p, WIDTH, 1)
    row_batch = s
    if borders is None:
        first = tl.full([], 0, tl.int32)
        end = length
    else:
        row_batch = s * 0
        first = tl.load(first_steps + k * sequences + s)
        end = first + tl.load(borders + s + 1) - tl.load(borders + s)
    limit = length
    if lengths is not None:
        limit = tl.load(lengths + s)
    order = orders
    if orders is not None:
        order = orders + k * length
    a2 = tl.load(a + k * a_k + head) * LOG2E
    bias_h = 0.0
    if bias is not None:
        bias_h = tl.load(bias + k * bias_k + head)
    g_at = grad + shifted(row_batch * g_b + k * g_k + head * g_h, ALIGNED)
    d_at = dt + row_batch * d_b + k * d_k + head * d_h
    c_at = c + shifted(row_batch * c_b + k * c_k + (head // GROUP_HEADS) * c_g, ALIGNED)
    place = (sk * segments + segment) * HEADS + head
    if LOCAL:
        dh = tl.zeros([NB, PB], tl.float32)
    elif SEGMENTED:
        dh = tl.load(carry + place * (STATES * WIDTH) + own, mask=state_mask, other=0.0)
    elif grad_last is not None:
        last_at = grad_last + (sk * HEADS + head) * (STATES * WIDTH) + state_offsets(n, p, 1, STATES)
        dh = tl.load(last_at, mask=state_mask, other=0.0)
    else:
        dh = tl.zeros([NB, PB], tl.float32)
    if not LOCAL:
        kept_at = adjoints + (((row_batch * directions + k) * chunks) * HEADS + head) * (STATES * WIDTH) + own
    total = tl.full([], 0.0, tl.float32)
    low = first // CHUNK + segment * segment_chunks
    high = tl.minimum(low + segment_chunks, tl.cdiv(end, CHUNK))
    for back in range(high - low):
        chunk = high - 1 - back
        step = tl.maximum(chunk * CHUNK, first) + i
        inside = step < tl.minimum((chunk + 1) * CHUNK, end)
        if not LOCAL:
            full = (chunk + 1) * CHUNK <= end  # else the sequence ends here, where the last state's gradient enters
            tl.store(
                kept_at + (tl.full([], 0, tl.int64) + chunk) * (HEADS * STATES * WIDTH), dh, mask=state_mask & full
            )
        row, live = visited(order, step, inside, limit, WIDE)
        dts = tl.load(d_at + row * d_l, mask=live, other=0.0).to(tl.float32) + bias_h
        if SOFTPLUS:
            dts = softplus(dts)
        dts = tl.where(live, dts, 0.0)
        coarse, fine = exponent_sums(dts, a2)
        through = last_of(coarse, CHUNK) + last_of(fine, CHUNK)
        cs = load_rows(c_at, row, live, c_l, n, c_n, STATES, EXACT_N)
        dy = load_rows(g_at, row, live, g_l, p, g_p, WIDTH, EXACT_P).to(tl.float32)
        if z is not None:
            z_at = z + shifted(row_batch * z_b + k * z_k + head * z_h, ALIGNED)
            gate = load_rows(z_at, row, live, z_l, p, z_p, WIDTH, EXACT_P).to(tl.float32)
            dy = dy * gate * sigmoid(gate)
        dh = dh * tl.exp2(through)
        dh = product(tl.trans(cs), dy * tl.exp2(coarse + fine)[:, None], dh, HALF, PRECISION)
        total = total + through
    if LOCAL:
        tl.store(carry + place * (STATES * WIDTH) + own, dh, mask=state_mask)
        tl.store(decay + place, total)
    elif dinitial is not None:
        initial_at = dinitial + (sk * HEADS + head) * (STATES * WIDTH) + state_offsets(n, p, 1, STATES)
        tl.store(initial_at, dh, mask=state_mask & (segment == 0))


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def ssd_tokens_kernel(
    grad,
    grad_last,
    saved,
    adjoints,
    x,
    dt,
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
    dx,
    ddt,
    dz,
    da,
    dskip,
    dbias,
    g_b,
    g_k,
    g_l,
    g_h,
    g_p,
    x_b,
    x_k,
    x_l,
    x_h,
    x_p,
    d_b,
    d_k,
    d_l,
    d_h,
    z_b,
    z_k,
    z_l,
    z_h,
    z_p,
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
    dx_b,
    dx_k,
    dd_b,
    dd_k,
    dz_b,
    dz_k,
    length,
    sequences,
    directions,
    chunks,
    SOFTPLUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    NB: tl.constexpr,
    PB: tl.constexpr,
):
    """Gradients of x, dt and z in one chunk of one head, and what the chunk contributes to A, D and dt_bias."""
    BLOCKS: tl.constexpr = (WIDTH + PB - 1) // PB
    EXACT_P: tl.constexpr = WIDTH % PB == 0
    EXACT_N: tl.constexpr = STATES == NB
    pid = tl.program_id(0)
    head = pid % HEADS
    pid = pid // HEADS
    k = (pid % directions).to(tl.int64)
    work = pid // directions
    chunk = work % chunks
    s = (work // chunks).to(tl.int64)
    group = head // GROUP_HEADS
    n = tl.arange(0, NB)
    i = tl.arange(0, CHUNK)
    row_batch = s
    if borders is None:
        first = tl.full([], 0, tl.int32)
        end = length
    else:
        row_batch = s * 0
        first = tl.load(first_steps + k * sequences + s)
        end = first + tl.load(borders + s + 1) - tl.load(borders + s)
    limit = length
    if lengths is not None:
        limit = tl.load(lengths + s)
    order = orders
    if orders is not None:
        order = orders + k * length
    step = tl.maximum(chunk * CHUNK, first) + i
    inside = step < tl.minimum((chunk + 1) * CHUNK, end)
    whole = chunk * CHUNK >= first  # else the sequence starts inside this chunk
    full = (chunk + 1) * CHUNK <= end  # else it ends here
    row, live = visited(order, step, inside, limit, WIDE)
    b_at = b + shifted(row_batch * b_b + k * b_k + group * b_g, ALIGNED)
    c_at = c + shifted(row_batch * c_b + k * c_k + group * c_g, ALIGNED)
    bs = load_rows(b_at, row, live, b_l, n, b_n, STATES, EXACT_N)
    cs = load_rows(c_at, row, live, c_l, n, c_n, STATES, EXACT_N)
    a_h = tl.load(a + k * a_k + head)
    raw = tl.load(dt + row_batch * d_b + k * d_k + head * d_h + row * d_l, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        raw = raw + tl.load(bias + k * bias_k + head)
    dts = raw
    if SOFTPLUS:
        dts = softplus(raw)
    dts = tl.where(live, dts, 0.0)
    skip_h = 0.0
    if skip is not None:
        skip_h = tl.load(skip + k * skip_k + head)
    coarse, fine = exponent_sums(dts, a_h * LOG2E)
    coarse_end, fine_end = last_of(coarse, CHUNK), last_of(fine, CHUNK)
    from_start = tl.exp2(coarse + fine)
    to_end = tl.exp2((coarse_end - coarse) + (fine_end - fine))
    m = product(cs, tl.trans(bs), tl.zeros([CHUNK, CHUNK], tl.float32), HALF, PRECISION)
    m = m * decay_between(coarse, fine, CHUNK)
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    dstep = tl.zeros([CHUNK], tl.float32)
    entered = tl.zeros([CHUNK], tl.float32)
    left = tl.zeros([CHUNK], tl.float32)
    passed = tl.full([], 0.0, tl.float32)
    skipped = tl.full([], 0.0, tl.float32)
    kept = (((row_batch * directions + k) * chunks + chunk) * HEADS + head) * (STATES * WIDTH)
    ends = ((s * directions + k) * HEADS + head) * (STATES * WIDTH)
    x_at = x + shifted(row_batch * x_b + k * x_k + head * x_h, ALIGNED)
    g_at = grad + shifted(row_batch * g_b + k * g_k + head * g_h, ALIGNED)
    for block in range(BLOCKS):
        p = block * PB + tl.arange(0, PB)
        h = state_before(saved + kept, initial, ends, n, p, whole, borders is not None, WIDTH, STATES)
        xs = load_rows(x_at, row, live, x_l, p, x_p, WIDTH, EXACT_P).to(tl.float32)
        dy = load_rows(g_at, row, live, g_l, p, g_p, WIDTH, EXACT_P).to(tl.float32)
        u = xs * dts[:, None]
        cs = load_rows(c_at, row, live, c_l, n, c_n, STATES, EXACT_N)  # again: kept, it would crowd others out
        into = product(cs, h, tl.zeros([CHUNK, PB], tl.float32), HALF, PRECISION) * from_start[:, None]
        if z is not None:
            y = product(m, u, into, HALF, PRECISION) + xs * skip_h
            z_at = z + shifted(row_batch * z_b + k * z_k + head * z_h, ALIGNED)
            gate = load_rows(z_at, row, live, z_l, p, z_p, WIDTH, EXACT_P).to(tl.float32)
            opening = sigmoid(gate)
            dz_at = dz + row_batch * dz_b + k * dz_k + head * WIDTH
            y = dy * y * opening * (1.0 + gate * (1.0 - opening))
            store_rows(dz_at, row, inside, HEADS * WIDTH, p, y, WIDTH, EXACT_P)
            dy = dy * gate * opening
        entered += tl.sum(into * dy, 1)
        skipped += tl.sum(tl.sum(xs * dy, 0), 0)
        pairs = product(dy, tl.trans(u), pairs, HALF, PRECISION)
        dh = state_after(adjoints + kept, grad_last, ends, n, p, full, WIDTH, STATES)
        du = product(bs, dh, tl.zeros([CHUNK, PB], tl.float32), HALF, PRECISION) * to_end[:, None]
        left += tl.sum(du * u, 1)
        h = state_before(saved + kept, initial, ends, n, p, whole, borders is not None, WIDTH, STATES)
        passed += tl.sum(tl.sum(h.to(tl.float32) * dh.to(tl.float32), 0), 0)
        du = product(tl.trans(m), dy, du, HALF, PRECISION)
        dstep += tl.sum(xs * du, 1)
        dx_at = dx + row_batch * dx_b + k * dx_k + head * WIDTH
        store_rows(dx_at, row, inside, HEADS * WIDTH, p, du * dts[:, None] + dy * skip_h, WIDTH, EXACT_P)
    # Exponent r takes part in every pair s < r <= t, in what enters at or behind it and in what leaves before it.
    crossing = tl.where(i[:, None] > i[None, :], m * pairs, 0.0)
    crossing = crossing + tl.where(i[:, None] == CHUNK - 1, left[None, :], 0.0)
    earlier = (i[:, None] < i[None, :]).to(tl.float32)
    crossing = product(crossing, earlier, tl.zeros([CHUNK, CHUNK], tl.float32), HALF, PRECISION)
    dexponent = tl.sum(tl.where(i[:, None] >= i[None, :], crossing, 0.0), 0)
    dexponent = dexponent + tl.cumsum(entered, 0, reverse=True) + passed * tl.exp2(coarse_end + fine_end)
    dstep = dstep + a_h * dexponent
    if SOFTPLUS:
        dstep = dstep * sigmoid(raw)
    dstep = tl.where(live, dstep, 0.0)
    ddt_at = ddt + row_batch * dd_b + k * dd_k + head
    tl.store(ddt_at + row * HEADS, dstep.to(ddt.dtype.element_ty), mask=inside)
    place = (work * directions + k) * HEADS + head
    tl.store(da + place, tl.sum(tl.where(live, dexponent, 0.0) * dts, 0))
    if bias is not None:
        tl.store(dbias + place, tl.sum(dstep, 0))
    if skip is not None:
        tl.store(dskip + place, skipped)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def ssd_maps_kernel(
    grad,
    grad_last,
    saved,
    adjoints,
    x,
    dt,
    a,
    b,
    c,
    z,
    bias,
    orders,
    initial,
    lengths,
    first_steps,
    borders,
    db,
    dc,
    g_b,
    g_k,
    g_l,
    g_h,
    g_p,
    x_b,
    x_k,
    x_l,
    x_h,
    x_p,
    d_b,
    d_k,
    d_l,
    d_h,
    z_b,
    z_k,
    z_l,
    z_h,
    z_p,
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
    bias_k,
    length,
    sequences,
    directions,
    batch,
    chunks,
    slots,
    SOFTPLUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    NB: tl.constexpr,
    PB: tl.constexpr,
):
    """Gradients of B and C in one chunk, from every ``slots``-th head of one group."""
    BLOCKS: tl.constexpr = (WIDTH + PB - 1) // PB
    GROUPS: tl.constexpr = HEADS // GROUP_HEADS
    EXACT_P: tl.constexpr = WIDTH % PB == 0
    EXACT_N: tl.constexpr = STATES == NB
    pid = tl.program_id(0)
    slot = pid % slots
    pid = pid // slots
    group = pid % GROUPS
    pid = pid // GROUPS
    k = (pid % directions).to(tl.int64)
    work = pid // directions
    chunk = work % chunks
    s = (work // chunks).to(tl.int64)
    n = tl.arange(0, NB)
    i = tl.arange(0, CHUNK)
    row_batch = s
    heads_here = GROUP_HEADS
    if borders is None:
        first = tl.full([], 0, tl.int32)
        end = length
    else:
        row_batch = s * 0
        first = tl.load(first_steps + k * sequences + s)
        end = first + tl.load(borders + s + 1) - tl.load(borders + s)
        touched = (chunk * CHUNK < end) & ((chunk + 1) * CHUNK > first)
        heads_here = tl.where(touched, GROUP_HEADS, 0)
    limit = length
    if lengths is not None:
        limit = tl.load(lengths + s)
    order = orders
    if orders is not None:
        order = orders + k * length
    step = tl.maximum(chunk * CHUNK, first) + i
    inside = step < tl.minimum((chunk + 1) * CHUNK, end)
    whole = chunk * CHUNK >= first  # else the sequence starts inside this chunk
    full = (chunk + 1) * CHUNK <= end  # else it ends here
    row, live = visited(order, step, inside, limit, WIDE)
    b_at = b + shifted(row_batch * b_b + k * b_k + group * b_g, ALIGNED)
    c_at = c + shifted(row_batch * c_b + k * c_k + group * c_g, ALIGNED)
    bs = load_rows(b_at, row, live, b_l, n, b_n, STATES, EXACT_N)
    cs = load_rows(c_at, row, live, c_l, n, c_n, STATES, EXACT_N)
    dscores = tl.zeros([CHUNK, CHUNK], tl.float32)
    db_sum = tl.zeros([CHUNK, NB], tl.float32)
    dc_sum = tl.zeros([CHUNK, NB], tl.float32)
    for index in range(slot, heads_here, slots):
        head = group * GROUP_HEADS + index
        dts = tl.load(dt + row_batch * d_b + k * d_k + head * d_h + row * d_l, mask=live, other=0.0).to(tl.float32)
        if bias is not None:
            dts = dts + tl.load(bias + k * bias_k + head)
        if SOFTPLUS:
            dts = softplus(dts)
        dts = tl.where(live, dts, 0.0)
        coarse, fine = exponent_sums(dts, tl.load(a + k * a_k + head) * LOG2E)
        coarse_end, fine_end = last_of(coarse, CHUNK), last_of(fine, CHUNK)
        from_start = tl.exp2(coarse + fine)
        to_end = tl.exp2((coarse_end - coarse) + (fine_end - fine))
        pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
        kept = (((row_batch * directions + k) * chunks + chunk) * HEADS + head) * (STATES * WIDTH)
        ends = ((s * directions + k) * HEADS + head) * (STATES * WIDTH)
        x_at = x + shifted(row_batch * x_b + k * x_k + head * x_h, ALIGNED)
        g_at = grad + shifted(row_batch * g_b + k * g_k + head * g_h, ALIGNED)
        for block in range(BLOCKS):
            p = block * PB + tl.arange(0, PB)
            u = load_rows(x_at, row, live, x_l, p, x_p, WIDTH, EXACT_P).to(tl.float32) * dts[:, None]
            dh = state_after(adjoints + kept, grad_last, ends, n, p, full, WIDTH, STATES)
            db_sum = product(u * to_end[:, None], tl.trans(dh), db_sum, HALF, PRECISION)
            dy = load_rows(g_at, row, live, g_l, p, g_p, WIDTH, EXACT_P).to(tl.float32)
            if z is not None:
                z_at = z + shifted(row_batch * z_b + k * z_k + head * z_h, ALIGNED)
                gate = load_rows(z_at, row, live, z_l, p, z_p, WIDTH, EXACT_P).to(tl.float32)
                dy = dy * gate * sigmoid(gate)
            h = state_before(saved + kept, initial, ends, n, p, whole, borders is not None, WIDTH, STATES)
            dc_sum = product(dy * from_start[:, None], tl.trans(h), dc_sum, HALF, PRECISION)
            pairs = product(dy, tl.trans(u), pairs, HALF, PRECISION)
        dscores += decay_between(coarse, fine, CHUNK) * pairs
    db_sum = product(tl.trans(dscores), cs, db_sum, HALF, PRECISION)
    dc_sum = product(dscores, bs, dc_sum, HALF, PRECISION)
    at = (((slot.to(tl.int64) * batch + row_batch) * directions + k) * length * GROUPS + group) * STATES
    store_rows(db + at, row, inside, GROUPS * STATES, n, db_sum, STATES, EXACT_N)
    store_rows(dc + at, row, inside, GROUPS * STATES, n, dc_sum, STATES, EXACT_N)
