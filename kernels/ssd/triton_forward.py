"""Triton kernels of the Mamba-2 scan's forward pass; words and tiles as in ``triton_chunks``.

A program walks through the chunks of one head (a block of its channels), one direction and one sequence, or a segment
of it, with the state (NB, PB) in registers:

    y = from_start (C h) + M (dt x),   h = through h + B' (to_end dt x)

with M the triangle of C_t B_s times the decay between the steps. The state before every chunk is kept for the backward.
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
    "o_b",
    "o_k",
    "length",
    "sequences",
    "directions",
    "segments",
    "segment_chunks",
    "chunks",
]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def ssd_forward_kernel(
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
    carry,
    out,
    last,
    saved,
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
    o_b,
    o_k,
    length,
    sequences,
    directions,
    segments,
    segment_chunks,
    chunks,
    SOFTPLUS: tl.constexpr,
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
    """Result, last state and the states before the chunks."""
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
    group = head // GROUP_HEADS
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

    x_at = x + shifted(row_batch * x_b + k * x_k + head * x_h, ALIGNED)
    d_at = dt + row_batch * d_b + k * d_k + head * d_h
    b_at = b + shifted(row_batch * b_b + k * b_k + group * b_g, ALIGNED)
    c_at = c + shifted(row_batch * c_b + k * c_k + group * c_g, ALIGNED)
    out_at = out + row_batch * o_b + k * o_k + head * WIDTH
    kept_at = saved + (((row_batch * directions + k) * chunks) * HEADS + head) * (STATES * WIDTH) + own
    if SEGMENTED:
        place = (sk * segments + segment) * HEADS + head
        h = tl.load(carry + place * (STATES * WIDTH) + own, mask=state_mask, other=0.0)
    elif initial is not None:
        start_at = initial + (sk * HEADS + head) * (STATES * WIDTH) + state_offsets(n, p, 1, STATES)
        h = tl.load(start_at, mask=state_mask, other=0.0)
    else:
        h = tl.zeros([NB, PB], tl.float32)

    low = first // CHUNK + segment * segment_chunks
    high = tl.minimum(low + segment_chunks, tl.cdiv(end, CHUNK))
    for chunk in range(low, high):
        step = tl.maximum(chunk * CHUNK, first) + i
        inside = step < tl.minimum((chunk + 1) * CHUNK, end)
        whole = chunk * CHUNK >= first  # else a packed sequence starts inside this chunk
        slot = kept_at + (tl.full([], 0, tl.int64) + chunk) * (HEADS * STATES * WIDTH)
        tl.store(slot, h.to(saved.dtype.element_ty), mask=state_mask & whole)
        row, live = visited(order, step, inside, limit, WIDE)
        raw = tl.load(d_at + row * d_l, mask=live, other=0.0).to(tl.float32) + bias_h
        dts = raw
        if SOFTPLUS:
            dts = softplus(raw)
        dts = tl.where(live, dts, 0.0)
        coarse, fine = exponent_sums(dts, a2)
        coarse_end, fine_end = last_of(coarse, CHUNK), last_of(fine, CHUNK)
        bs = load_rows(b_at, row, live, b_l, n, b_n, STATES, EXACT_N)
        cs = load_rows(c_at, row, live, c_l, n, c_n, STATES, EXACT_N)
        xs = load_rows(x_at, row, live, x_l, p, x_p, WIDTH, EXACT_P).to(tl.float32)
        u = xs * dts[:, None]

        scores = product(cs, tl.trans(bs), tl.zeros([CHUNK, CHUNK], tl.float32), HALF, PRECISION)
        scores = scores * decay_between(coarse, fine, CHUNK)
        y = product(cs, h, tl.zeros([CHUNK, PB], tl.float32), HALF, PRECISION)
        y = product(scores, u, y * tl.exp2(coarse + fine)[:, None], HALF, PRECISION)
        to_end = tl.exp2((coarse_end - coarse) + (fine_end - fine))
        h = h * tl.exp2(coarse_end + fine_end)
        h = product(tl.trans(bs), u * to_end[:, None], h, HALF, PRECISION)
        if skip is not None:
            y = y + xs * tl.load(skip + k * skip_k + head)
        if z is not None:
            z_at = z + shifted(row_batch * z_b + k * z_k + head * z_h, ALIGNED)
            gate = load_rows(z_at, row, live, z_l, p, z_p, WIDTH, EXACT_P).to(tl.float32)
            y = y * gate * sigmoid(gate)
        store_rows(out_at, row, inside, HEADS * WIDTH, p, y, WIDTH, EXACT_P)
    if segment == segments - 1:
        last_at = last + (sk * HEADS + head) * (STATES * WIDTH) + state_offsets(n, p, 1, STATES)
        tl.store(last_at, h, mask=state_mask)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
def ssd_local_kernel(
    x,
    dt,
    a,
    b,
    bias,
    orders,
    lengths,
    carry,
    decay,
    x_b,
    x_k,
    x_l,
    x_h,
    x_p,
    d_b,
    d_k,
    d_l,
    d_h,
    b_b,
    b_k,
    b_l,
    b_g,
    b_n,
    a_k,
    bias_k,
    length,
    directions,
    segments,
    segment_chunks,
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
    """The state that a segment makes of zero (``carry``), and the sum of its exponents to base 2 (``decay``)."""
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
    x_at = x + shifted(s * x_b + k * x_k + head * x_h, ALIGNED)
    d_at = dt + s * d_b + k * d_k + head * d_h
    b_at = b + shifted(s * b_b + k * b_k + (head // GROUP_HEADS) * b_g, ALIGNED)
    h = tl.zeros([NB, PB], tl.float32)
    total = tl.full([], 0.0, tl.float32)
    low = segment * segment_chunks
    high = tl.minimum(low + segment_chunks, tl.cdiv(length, CHUNK))
    for chunk in range(low, high):
        step = chunk * CHUNK + i
        row, live = visited(order, step, step < length, limit, WIDE)
        dts = tl.load(d_at + row * d_l, mask=live, other=0.0).to(tl.float32) + bias_h
        if SOFTPLUS:
            dts = softplus(dts)
        dts = tl.where(live, dts, 0.0)
        coarse, fine = exponent_sums(dts, a2)
        coarse_end, fine_end = last_of(coarse, CHUNK), last_of(fine, CHUNK)
        bs = load_rows(b_at, row, live, b_l, n, b_n, STATES, EXACT_N)
        xs = load_rows(x_at, row, live, x_l, p, x_p, WIDTH, EXACT_P).to(tl.float32)
        weight = dts * tl.exp2((coarse_end - coarse) + (fine_end - fine))
        h = h * tl.exp2(coarse_end + fine_end)
        h = product(tl.trans(bs), xs * weight[:, None], h, HALF, PRECISION)
        total = total + coarse_end + fine_end
    place = (sk * segments + segment) * HEADS + head
    state_mask = (n < STATES)[:, None] & (p < WIDTH)[None, :]
    tl.store(carry + place * (STATES * WIDTH) + state_offsets(n, p, WIDTH, 1), h, mask=state_mask)
    tl.store(decay + place, total)


@triton.jit(do_not_specialize=["segments"])
def ssd_chain_kernel(
    carry,
    decay,
    seed,
    segments,
    REVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace what each segment makes of zero by the state before it (behind it, for adjoint states: REVERSE)."""
    head = tl.program_id(1) % HEADS
    sk = (tl.program_id(1) // HEADS).to(tl.int64)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < STATES * WIDTH
    h = tl.zeros([BLOCK], tl.float32)
    if seed is not None:
        start = seed + (sk * HEADS + head) * (STATES * WIDTH)
        h = tl.load(start + (offset // WIDTH) + (offset % WIDTH) * STATES, mask=mask, other=0.0)
    for j in range(segments):
        segment = j
        if REVERSE:
            segment = segments - 1 - j
        place = (sk * segments + segment) * HEADS + head
        at = carry + place * (STATES * WIDTH) + offset
        made = tl.load(at, mask=mask, other=0.0)
        tl.store(at, h, mask=mask)
        h = h * tl.exp2(tl.load(decay + place)) + made
