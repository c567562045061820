"""The causal depthwise convolution along orders in Triton. Arguments are the canonical ones of the op.

A program takes tiles of BLOCK_T steps by BLOCK_E channels, one after the other along an order; the W rows of a step
come from the cache after the first touch. The last programs of the grid each take the states of one sequence.
Sums of dweight and dbias go to a slot per program and are added afterwards, so two runs give the same bits.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.triton_launch import (
    device_of,
    first_steps,
    launch,
    named,
    processors,
    refuse_double,
    sequence_of,
    strides,
)

_NAME = "causal_conv1d"
_BLOCK_E = 128
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_WANTED = 32  # programs per multiprocessor, beyond which a program takes more tiles

# Lengths and batch sizes never enter a compiled kernel: not as a constant, not through their divisibility.
_RUNTIME = [
    "x_b",
    "x_k",
    "g_b",
    "g_k",
    "w_k",
    "bias_k",
    "i_s",
    "i_k",
    "gl_s",
    "gl_k",
    "length",
    "sequences",
    "directions",
    "tiles",
    "time_programs",
    "step_programs",
]


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _shift(b, stride_b, k64, stride_k, ALIGNED: tl.constexpr):
    """Offset of a batch row and direction; ALIGNED says that wide loads may start there."""
    shift = b.to(tl.int64) * stride_b + k64 * stride_k
    if ALIGNED:
        shift = tl.multiple_of(shift, 8)
    return shift


@triton.jit
def _inputs_at(x, initial, order, step, first, end, limit, seq, e, e_mask, x_l, x_e, i_s, i_e, i_w, W: tl.constexpr):
    """(T, E) inputs at the steps (T,): a row of x, a column of the initial state before ``first``, or zero."""
    inside = (step >= first) & (step < end)
    row = step
    if order is not None:
        row = tl.load(order + step, mask=inside, other=0)
    inside = inside & (row < limit)
    at = x + row.to(tl.int64)[:, None] * x_l + e[None, :].to(tl.int64) * x_e
    value = tl.load(at, mask=inside[:, None] & e_mask[None, :], other=0.0).to(tl.float32)
    if initial is not None:
        column = step - first + (W - 1)
        before = (step < first) & (column >= 0)
        at = initial + (seq.to(tl.int64) * i_s + column * i_w)[:, None] + e[None, :].to(tl.int64) * i_e
        value += tl.load(at, mask=before[:, None] & e_mask[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def _sequence(order, first_steps, borders, sequence_of_row, step, length, b, k, sequences):
    """(first step, end, sequence) that the steps (T,) belong to."""
    if borders is None:
        first = step * 0
        end = first + length
        seq = first + b
    else:
        inside = step < length
        row = step
        if order is not None:
            row = tl.load(order + step, mask=inside, other=0)
        seq = tl.load(sequence_of_row + row, mask=inside, other=0)
        first = tl.load(first_steps + k * sequences + seq)
        end = first + tl.load(borders + seq + 1) - tl.load(borders + seq)
    return first, end, seq


@triton.jit(do_not_specialize=_RUNTIME)
def conv_forward_kernel(
    x,
    weight,
    bias,
    orders,
    initial,
    lengths,
    first_steps,
    borders,
    sequence_of_row,
    out,
    last,
    x_b,
    x_k,
    x_l,
    x_e,
    w_k,
    bias_k,
    i_s,
    i_k,
    i_e,
    i_w,
    length,
    sequences,
    directions,
    tiles,
    time_programs,
    step_programs,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    ALIGNED: tl.constexpr,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0)
    e = (pid % BLOCKS) * BLOCK_E + tl.arange(0, BLOCK_E)
    if CHANNELS % BLOCK_E == 0:
        e_mask = tl.full([BLOCK_E], 1, tl.int1)
    else:
        e_mask = e < CHANNELS
    pid = pid // BLOCKS
    k = pid % directions
    pid = pid // directions
    k64 = k.to(tl.int64)
    order = orders
    if orders is not None:
        order = orders + k64 * length
    if initial is not None:
        initial = initial + k64 * i_k
    t = tl.arange(0, BLOCK_T)
    if pid < step_programs:
        b = pid // time_programs
        x += _shift(b, x_b, k64, x_k, ALIGNED)
        limit = length
        if lengths is not None:
            limit = tl.load(lengths + b)
        out += (b.to(tl.int64) * directions + k64) * length * CHANNELS
        shift = tl.zeros([BLOCK_E], tl.float32)
        if bias is not None:
            shift = tl.load(bias + k64 * bias_k + e, mask=e_mask, other=0.0).to(tl.float32)
        for tile in range(pid % time_programs, tiles, time_programs):
            step = tile * BLOCK_T + t
            first, end, seq = _sequence(order, first_steps, borders, sequence_of_row, step, length, b, k64, sequences)
            y = tl.zeros([BLOCK_T, BLOCK_E], tl.float32) + shift[None, :]
            for j in tl.static_range(W):
                w = tl.load(weight + k64 * w_k + e * W + (W - 1 - j), mask=e_mask, other=0.0).to(tl.float32)
                y += w[None, :] * _inputs_at(
                    x, initial, order, step - j, first, end, limit, seq, e, e_mask, x_l, x_e, i_s, i_e, i_w, W
                )
            if SILU:
                y = y * _sigmoid(y)
            inside = step < length
            row = step
            if orders is not None:
                row = tl.load(order + step, mask=inside, other=0)
            y = tl.where((row < limit)[:, None], y, 0.0)
            at = out + row.to(tl.int64)[:, None] * CHANNELS + e[None, :]
            tl.store(at, y.to(out.dtype.element_ty), mask=inside[:, None] & e_mask[None, :])
    else:
        s = pid - step_programs
        c = tl.arange(0, COLUMNS)
        b = s
        first = 0
        end = length
        if borders is not None:
            b = s * 0
            first = tl.load(first_steps + k64 * sequences + s)
            end = first + tl.load(borders + s + 1) - tl.load(borders + s)
        limit = length
        if lengths is not None:
            limit = tl.load(lengths + s)
        x += _shift(b, x_b, k64, x_k, ALIGNED)
        step = end - (W - 1) + c  # only the first W - 1 are used
        seq = c * 0 + s
        value = _inputs_at(x, initial, order, step, first, end, limit, seq, e, e_mask, x_l, x_e, i_s, i_e, i_w, W)
        at = last + (s.to(tl.int64) * directions + k64) * CHANNELS * (W - 1) + (e[None, :] * (W - 1) + c[:, None])
        tl.store(at, value, mask=(c < W - 1)[:, None] & e_mask[None, :])


@triton.jit
def _gradient_at(
    grad, inputs, weight, shift, order, step, end, limit, e, e_mask, g_l, g_e, SILU: tl.constexpr, W: tl.constexpr
):
    """(T, E) gradient before the activation at the steps (T,); ``inputs`` are the W inputs from step - W + 1 on."""
    inside = step < end
    row = step
    if order is not None:
        row = tl.load(order + step, mask=inside, other=0)
    inside = inside & (row < limit)
    at = grad + row.to(tl.int64)[:, None] * g_l + e[None, :].to(tl.int64) * g_e
    g = tl.load(at, mask=inside[:, None] & e_mask[None, :], other=0.0).to(tl.float32)
    if SILU:
        y = inputs[0] * 0.0 + shift[None, :]
        for i in tl.static_range(W):
            w = tl.load(weight + e * W + i, mask=e_mask, other=0.0).to(tl.float32)
            y += w[None, :] * inputs[i]
        s = _sigmoid(y)
        g = g * s * (1.0 + y * (1.0 - s))
    return g


@triton.jit(do_not_specialize=_RUNTIME)
def conv_backward_kernel(
    grad,
    grad_last,
    x,
    weight,
    bias,
    orders,
    initial,
    lengths,
    first_steps,
    borders,
    sequence_of_row,
    dx,
    dweight,
    dbias,
    dinitial,
    g_b,
    g_k,
    g_l,
    g_e,
    gl_s,
    gl_k,
    gl_e,
    gl_w,
    x_b,
    x_k,
    x_l,
    x_e,
    w_k,
    bias_k,
    i_s,
    i_k,
    i_e,
    i_w,
    length,
    sequences,
    directions,
    tiles,
    time_programs,
    step_programs,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    ALIGNED: tl.constexpr,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0)
    e = (pid % BLOCKS) * BLOCK_E + tl.arange(0, BLOCK_E)
    if CHANNELS % BLOCK_E == 0:
        e_mask = tl.full([BLOCK_E], 1, tl.int1)
    else:
        e_mask = e < CHANNELS
    pid = pid // BLOCKS
    k = pid % directions
    pid = pid // directions
    k64 = k.to(tl.int64)
    order = orders
    if orders is not None:
        order = orders + k64 * length
    if initial is not None:
        initial = initial + k64 * i_k
    if grad_last is not None:
        grad_last = grad_last + k64 * gl_k
    weight += k64 * w_k
    shift = tl.zeros([BLOCK_E], tl.float32)
    if bias is not None:
        shift = tl.load(bias + k64 * bias_k + e, mask=e_mask, other=0.0).to(tl.float32)
    t = tl.arange(0, BLOCK_T)
    if pid < step_programs:
        b = pid // time_programs
        x += _shift(b, x_b, k64, x_k, ALIGNED)
        grad += _shift(b, g_b, k64, g_k, ALIGNED)
        dx += (b.to(tl.int64) * directions + k64) * length * CHANNELS
        limit = length
        if lengths is not None:
            limit = tl.load(lengths + b)
        weight_sums = ()
        for _ in tl.static_range(W):
            weight_sums = weight_sums + (tl.zeros([BLOCK_T, BLOCK_E], tl.float32),)
        bias_sum = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for tile in range(pid % time_programs, tiles, time_programs):
            step = tile * BLOCK_T + t
            first, end, seq = _sequence(order, first_steps, borders, sequence_of_row, step, length, b, k64, sequences)
            inputs = ()  # of the steps from W - 1 before to W - 1 after
            for i in tl.static_range(2 * W - 1):
                value = _inputs_at(
                    x, initial, order, step + (i - W + 1), first, end, limit, seq, e, e_mask, x_l, x_e, i_s, i_e, i_w, W
                )
                inputs = inputs + (value,)
            d = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
            for j in tl.static_range(W):
                window = ()
                for i in tl.static_range(W):
                    window = window + (inputs[i + j],)
                g = _gradient_at(grad, window, weight, shift, order, step + j, end, limit, e, e_mask, g_l, g_e, SILU, W)
                w = tl.load(weight + e * W + (W - 1 - j), mask=e_mask, other=0.0).to(tl.float32)
                d += w[None, :] * g
                if j == 0:
                    g = tl.where((step < end)[:, None], g, 0.0)
                    bias_sum += g
                    sums = ()
                    for i in tl.static_range(W):
                        sums = sums + (weight_sums[i] + g * inputs[i],)
                    weight_sums = sums
            if grad_last is not None:
                column = step - end + (W - 1)
                at = grad_last + (seq.to(tl.int64) * gl_s + column * gl_w)[:, None] + e[None, :].to(tl.int64) * gl_e
                reached = (column >= 0) & (step < end)
                d += tl.load(at, mask=reached[:, None] & e_mask[None, :], other=0.0).to(tl.float32)
            inside = step < length
            row = step
            if orders is not None:
                row = tl.load(order + step, mask=inside, other=0)
            d = tl.where((row < limit)[:, None], d, 0.0)
            at = dx + row.to(tl.int64)[:, None] * CHANNELS + e[None, :]
            tl.store(at, d.to(dx.dtype.element_ty), mask=inside[:, None] & e_mask[None, :])
        slot = (pid.to(tl.int64) * directions + k64) * CHANNELS
        for i in tl.static_range(W):
            tl.store(dweight + (slot + e) * W + i, tl.sum(weight_sums[i], 0), mask=e_mask)
        if bias is not None:
            tl.store(dbias + slot + e, tl.sum(bias_sum, 0), mask=e_mask)
    elif dinitial is not None:
        s = pid - step_programs
        c = tl.arange(0, COLUMNS)
        b = s
        first = 0
        end = length
        if borders is not None:
            b = s * 0
            first = tl.load(first_steps + k64 * sequences + s)
            end = first + tl.load(borders + s + 1) - tl.load(borders + s)
        limit = length
        if lengths is not None:
            limit = tl.load(lengths + s)
        x += _shift(b, x_b, k64, x_k, ALIGNED)
        grad += _shift(b, g_b, k64, g_k, ALIGNED)
        seq = c * 0 + s
        count = end - first
        # Column c of the state is the input of step first + c - (W - 1), which reaches steps first .. first + c.
        start = first - (W - 1) + c
        inputs = ()  # of the steps from start - W + 2 on
        for i in tl.static_range(2 * W - 2):
            value = _inputs_at(
                x, initial, order, start + (i - W + 2), first, end, limit, seq, e, e_mask, x_l, x_e, i_s, i_e, i_w, W
            )
            inputs = inputs + (value,)
        d = tl.zeros([COLUMNS, BLOCK_E], tl.float32)
        for j in tl.static_range(1, W):
            step = start + j
            window = ()
            for i in tl.static_range(W):
                window = window + (inputs[i + j - 1],)
            within = tl.where(step >= first, end, first)  # steps before the first have no result
            step = tl.maximum(step, first)
            g = _gradient_at(grad, window, weight, shift, order, step, within, limit, e, e_mask, g_l, g_e, SILU, W)
            w = tl.load(weight + e * W + (W - 1 - j), mask=e_mask, other=0.0).to(tl.float32)
            d += w[None, :] * g
        if grad_last is not None:
            column = c - count
            at = grad_last + (seq.to(tl.int64) * gl_s + column * gl_w)[:, None] + e[None, :].to(tl.int64) * gl_e
            reached = (column >= 0) & (c < W - 1)
            d += tl.load(at, mask=reached[:, None] & e_mask[None, :], other=0.0).to(tl.float32)
        at = dinitial + (s.to(tl.int64) * directions + k64) * CHANNELS * (W - 1) + (e[None, :] * (W - 1) + c[:, None])
        tl.store(at, d, mask=(c < W - 1)[:, None] & e_mask[None, :])


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    K: int,
) -> tuple[Tensor, Tensor]:
    """Convolve along K orders.

    Returns:
        The result (Bt, K, L, E) in the dtype of ``x`` and the last W - 1 inputs of every sequence (S, K, E, W - 1).
    Raises:
        ValueError: float64 inputs.
    """
    refuse_double(_NAME, x, weight, bias)
    batch, _, length, channels = x.shape
    taps = weight.shape[-1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = x.new_empty(batch, K, length, channels)
    last = x.new_empty(sequences, K, channels, taps - 1, dtype=torch.float32)
    with device_of(x):
        given = (weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K)
        common, grid, _ = _arguments((x,), *given, block_t=16 if taps <= 4 else 8, states=taps > 1)
        if grid[0]:
            launch(conv_forward_kernel, grid, **common, out=out, last=last)
    return out, last


def conv_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    K: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `conv_forward`: dx, dweight, dbias or None, dinitial_state or None, like their inputs.

    Raises:
        ValueError: float64 inputs.
    """
    refuse_double(_NAME, x, weight, bias)
    batch, own, length, channels = x.shape
    taps = weight.shape[-1]
    shared = own < K
    dx = x.new_empty((batch, K, length, channels), dtype=torch.float32 if shared else x.dtype)
    dinitial = None
    if initial_state is not None:
        dinitial = x.new_empty(initial_state.shape, dtype=torch.float32)
    states = dinitial is not None and taps > 1
    with device_of(x):
        given = (weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K)
        common, grid, slots = _arguments((x, grad_out), *given, block_t=8 if taps <= 4 else 4, states=states)
        dweight = x.new_empty(slots, K, channels, taps, dtype=torch.float32)
        dbias = None if bias is None else x.new_empty(slots, K, channels, dtype=torch.float32)
        if grid[0]:
            launch(
                conv_backward_kernel,
                grid,
                **common,
                grad=grad_out,
                grad_last=grad_last_state if taps > 1 else None,
                dx=dx,
                dweight=dweight,
                dbias=dbias,
                dinitial=dinitial,
                **named("g", "bkle", strides(grad_out)),
                **named("gl", "skew", strides(grad_last_state, 4)),
            )
        if shared:
            dx = dx.sum(1, keepdim=True).to(x.dtype)
        dweight = _sum(dweight, weight)
        dbias = None if bias is None else _sum(dbias, bias)
    return dx, dweight, dbias, None if dinitial is None else dinitial.to(initial_state.dtype)


def _arguments(
    per_token, weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K, block_t, states
) -> tuple[dict, tuple[int], int]:
    """What both kernels take, the grid, and the number of programs along time (slots of the sums)."""
    x = per_token[0]
    batch, _, length, channels = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    taps = weight.shape[-1]
    block_e = min(_BLOCK_E, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block_e)
    tiles = triton.cdiv(length, block_t)
    wanted = triton.cdiv(_WANTED * processors(x.device), max(1, blocks * K * batch))
    time_programs = triton.cdiv(tiles, triton.cdiv(tiles, min(tiles, wanted)))
    step_programs = batch * time_programs
    sequence_of_row = None
    if cu_seqlens is not None:
        sequence_of_row = sequence_of(torch.arange(length, device=x.device), cu_seqlens)
    arguments = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "orders": orders,
        "initial": initial_state,
        "lengths": lengths,
        "first_steps": first_steps(orders, cu_seqlens, length, K),
        "borders": cu_seqlens,
        "sequence_of_row": sequence_of_row,
        **named("x", "bkle", strides(x)),
        "w_k": strides(weight, directions=0)[0],
        "bias_k": strides(bias, 2, directions=0)[0],
        **named("i", "skew", strides(initial_state, 4)),
        "length": length,
        "sequences": sequences,
        "directions": K,
        "CHANNELS": channels,
        "tiles": tiles,
        "time_programs": time_programs,
        "step_programs": step_programs,
        "SILU": silu,
        "ALIGNED": all(x_.stride(d) % 8 == 0 for x_ in per_token for d in (0, 1)),
        "W": taps,
        "COLUMNS": triton.next_power_of_2(max(taps - 1, 1)),
        "BLOCK_T": block_t,
        "BLOCK_E": block_e,
        **_OPTIONS,
    }
    programs = step_programs + (sequences if states else 0)
    return arguments, (blocks * K * programs,), step_programs


def _sum(parts: Tensor, like: Tensor) -> Tensor:
    """Add the slots (dimension 0), and the directions where they share ``like``."""
    total = parts.sum(0)
    return (total.sum(0, keepdim=True) if like.shape[0] < total.shape[0] else total).to(like.dtype)
