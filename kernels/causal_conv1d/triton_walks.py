"""The Triton kernels of the causal depthwise convolution along orders.

A program is one warp. It walks along a stretch of an order with BLOCK_E channels, keeping the last W - 1 tokens (in the
backward also the unfinished gradients of their inputs), so that a row is read once and written once. What a trip of
UNROLL steps reads is loaded a trip before, the rows that an order visits two. The last programs of the grid each take
the states of one sequence.
"""

# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

import triton
import triton.language as tl

from genssm.kernels.triton_launch import TABLES

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
    "o_b",
    "o_k",
    "dx_b",
    "dx_k",
    "gl_s",
    "gl_k",
    "length",
    "sequences",
    "directions",
    "first_direction",
    "direction_programs",
    "stretch",
    "time_programs",
    "step_programs",
]


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)). A root of the square costs two instructions, a division five: it looks at the range."""
    y = 1.0 + tl.exp2(x * -1.4426950408889634)
    return tl.rsqrt(y * y)


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
def _rows(order, step, length, COUNT: tl.constexpr):
    """Rows visited at COUNT steps from ``step`` on; outside of the order those of its ends."""
    rows = ()
    for i in tl.static_range(COUNT):
        row = tl.minimum(tl.maximum(step + i, 0), length - 1)
        if order is not None:
            row = tl.load(order + row)
        rows = rows + (row,)
    return rows


@triton.jit
def _tokens(base, rows, steps_left, limit, e_mask, stride, COUNT: tl.constexpr):
    """Vectors (E,) of COUNT rows as they lie in memory; zero behind ``steps_left`` steps and from row ``limit`` on."""
    values = ()
    for i in tl.static_range(COUNT):
        mask = e_mask
        if steps_left is not None:
            mask = mask & (i < steps_left)
        if limit is not None:  # padding may hold anything
            mask = mask & (rows[i] < limit)
        values = values + (tl.load(base + rows[i].to(tl.int64) * stride, mask=mask, other=0.0),)
    return values


@triton.jit
def _window(x, initial, order, step, length, limit, borders, b, e, e_mask, x_l, i_s, i_e, i_w, W: tl.constexpr):
    """The W - 1 inputs before ``step``: rows of x, and columns of the initial state before step 0."""
    rows = _rows(order, step - (W - 1), length, W - 1)
    values = _tokens(x, rows, None, limit, e_mask & (step > 0), x_l, W - 1)
    window = ()
    for j in tl.static_range(W - 1):
        before = step - (W - 1) + j
        value = tl.where(before >= 0, values[j].to(tl.float32), 0.0)
        if (initial is not None) & (borders is None):
            column = before + (W - 1)
            at = initial + b.to(tl.int64) * i_s + column * i_w + e.to(tl.int64) * i_e
            value += tl.load(at, mask=e_mask & (before < 0), other=0.0).to(tl.float32)
        window = window + (value,)
    return window


@triton.jit
def _taps(
    window, value, row, step, initial, first_steps, borders, sequence_of_row, e, e_mask, i_s, i_e, i_w, W: tl.constexpr
):
    """The W inputs that a step takes, oldest first, and the first step of its sequence."""
    taps = ()
    first = step
    if borders is not None:
        seq = tl.load(sequence_of_row + row)
        first = tl.load(first_steps + seq)
    for j in tl.static_range(W - 1):
        tap = window[j]
        if borders is not None:  # what lies before the border belongs to another sequence
            before = step - (W - 1) + j
            tap = tl.where(before >= first, tap, 0.0)
            if initial is not None:
                column = before - first + (W - 1)
                at = initial + seq.to(tl.int64) * i_s + column * i_w + e.to(tl.int64) * i_e
                tap += tl.load(at, mask=e_mask & (before < first), other=0.0).to(tl.float32)
        taps = taps + (tap,)
    return taps + (value,), first


@triton.jit
def _parameters(weight, bias, bias_at, e, e_mask, W: tl.constexpr):
    """The W vectors (E,) of weights, oldest tap first, and the bias or zeros."""
    weights = ()
    for j in tl.static_range(W):
        weights = weights + (tl.load(weight + e * W + j, mask=e_mask, other=0.0).to(tl.float32),)
    if bias is None:
        shift = tl.zeros(e.shape, tl.float32)
    else:
        shift = tl.load(bias + bias_at + e, mask=e_mask, other=0.0).to(tl.float32)
    return weights, shift


@triton.jit
def _last(values, COUNT: tl.constexpr):
    """The last COUNT of a tuple that has one more."""
    rest = ()
    for i in tl.static_range(COUNT):
        rest = rest + (values[i + 1],)
    return rest


@triton.jit
def _activation_gradient(g, taps, weights, shift, W: tl.constexpr):
    """Gradient before the activation, silu, of a step with these W inputs."""
    y = shift
    for j in tl.static_range(W):
        y = y + weights[j] * taps[j]
    s = _sigmoid(y)
    return g * s * (1.0 + y * (1.0 - s))


@triton.jit
def _adjoint_step(g, taps, pending, weights, step, first, borders, W: tl.constexpr):
    """Gradients of the W inputs that a step takes, with what later steps have added to ``pending``, oldest first."""
    grads = ()
    for j in tl.static_range(W):
        grad = weights[j] * g
        if (borders is not None) & (j < W - 1):
            grad = tl.where(step - (W - 1) + j >= first, grad, 0.0)
        if j < W - 1:
            grad = grad + pending[j]
        grads = grads + (grad,)
    return grads


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
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
    o_b,
    o_k,
    length,
    sequences,
    directions,
    stretch,
    time_programs,
    step_programs,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    ALIGNED: tl.constexpr,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
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
    if pid < step_programs:
        row_batch = pid // time_programs
        low = (pid % time_programs) * stretch
        high = tl.minimum(low + stretch, length)
        x_at = x + _shift(row_batch, x_b, k64, x_k, ALIGNED) + e.to(tl.int64) * x_e
        out_at = out + _shift(row_batch, o_b, k64, o_k, CHANNELS % 8 == 0) + e
        valid = lengths
        if lengths is not None:
            valid = tl.load(lengths + row_batch)
        firsts = first_steps
        if borders is not None:
            firsts = first_steps + k64 * sequences
        weights, shift = _parameters(weight + k64 * w_k, bias, k64 * bias_k, e, e_mask, W)
        recent = _window(x_at, initial, order, low, length, valid, borders, row_batch, e, e_mask, x_l, i_s, i_e, i_w, W)
        rows = _rows(order, low, length, UNROLL)
        values = _tokens(x_at, rows, None, valid, e_mask, x_l, UNROLL)
        next_rows = _rows(order, low + UNROLL, length, UNROLL)
        for base in range(low, high, UNROLL):
            next_values = _tokens(x_at, next_rows, None, valid, e_mask, x_l, UNROLL)
            rows_ahead = _rows(order, base + 2 * UNROLL, length, UNROLL)
            for i in tl.static_range(UNROLL):
                taps, _ = _taps(
                    recent, values[i].to(tl.float32), rows[i], base + i, initial, firsts, borders, sequence_of_row,
                    e, e_mask, i_s, i_e, i_w, W,
                )  # fmt: skip
                y = shift
                for j in tl.static_range(W):
                    y = y + weights[j] * taps[j]
                if SILU:
                    y = y * _sigmoid(y)
                if valid is not None:
                    y = tl.where(rows[i] < valid, y, 0.0)
                at = out_at + rows[i].to(tl.int64) * CHANNELS
                tl.store(at, y.to(out.dtype.element_ty), mask=e_mask & (base + i < high))
                recent = _last(recent + (values[i].to(tl.float32),), W - 1)
            rows = next_rows
            values = next_values
            next_rows = rows_ahead
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
def _last_gradient(
    grad_last, step, inside, row, length, first_steps, borders, sequence_of_row, b, e, e_mask, gl_s, gl_e, gl_w,
    W: tl.constexpr,
):  # fmt: skip
    """What the gradient of the last state adds to the input of a step: the last W - 1 of each sequence."""
    seq = b
    end = length
    if borders is not None:
        seq = tl.load(sequence_of_row + row)
        end = tl.load(first_steps + seq) + tl.load(borders + seq + 1) - tl.load(borders + seq)
    column = step - end + (W - 1)
    at = grad_last + seq.to(tl.int64) * gl_s + column * gl_w + e.to(tl.int64) * gl_e
    return tl.load(at, mask=e_mask & inside & (column >= 0), other=0.0).to(tl.float32)


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


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=TABLES)
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
    parts,
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
    dx_b,
    dx_k,
    length,
    sequences,
    directions,
    first_direction,
    direction_programs,
    stretch,
    time_programs,
    step_programs,
    CHANNELS: tl.constexpr,
    SILU: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    W: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradients of some directions from ``first_direction`` on.

    ACCUMULATE: of one; the launches before have left the sum of theirs in ``dx``.
    """
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_E - 1) // BLOCK_E
    pid = tl.program_id(0)
    e = (pid % BLOCKS) * BLOCK_E + tl.arange(0, BLOCK_E)
    if CHANNELS % BLOCK_E == 0:
        e_mask = tl.full([BLOCK_E], 1, tl.int1)
    else:
        e_mask = e < CHANNELS
    pid = pid // BLOCKS
    k = first_direction + pid % direction_programs
    pid = pid // direction_programs
    k64 = k.to(tl.int64)
    order = orders
    if orders is not None:
        order = orders + k64 * length
    if initial is not None:
        initial = initial + k64 * i_k
    if grad_last is not None:
        grad_last = grad_last + k64 * gl_k
    weight += k64 * w_k
    weights, shift = _parameters(weight, bias, k64 * bias_k, e, e_mask, W)
    if pid < step_programs:
        row_batch = pid // time_programs
        low = (pid % time_programs) * stretch
        high = tl.minimum(low + stretch, length)
        x_at = x + _shift(row_batch, x_b, k64, x_k, ALIGNED) + e.to(tl.int64) * x_e
        grad_at = grad + _shift(row_batch, g_b, k64, g_k, ALIGNED) + e.to(tl.int64) * g_e
        dx_at = dx + _shift(row_batch, dx_b, k64, dx_k, CHANNELS % 8 == 0) + e
        valid = lengths
        if lengths is not None:
            valid = tl.load(lengths + row_batch)
        firsts = first_steps
        if borders is not None:
            firsts = first_steps + k64 * sequences
        pending = ()
        sums = ()
        for _ in tl.static_range(W - 1):
            pending = pending + (tl.zeros([BLOCK_E], tl.float32),)
        for _ in tl.static_range(W + 1):
            sums = sums + (tl.zeros([BLOCK_E], tl.float32),)
        recent = _window(x_at, initial, order, low, length, valid, borders, row_batch, e, e_mask, x_l, i_s, i_e, i_w, W)
        past = _rows(order, low - (W - 1), length, W - 1)
        rows = _rows(order, low, length, UNROLL)
        values = _tokens(x_at, rows, None, valid, e_mask, x_l, UNROLL)
        grads = _tokens(grad_at, rows, length - low, valid, e_mask, g_l, UNROLL)
        next_rows = _rows(order, low + UNROLL, length, UNROLL)
        # Another trip finishes the inputs of the last W - 1 steps; it adds to no sum, and its own belong to others.
        for base in range(low, high + (W - 1), UNROLL):
            next_values = _tokens(x_at, next_rows, None, valid, e_mask, x_l, UNROLL)
            left = length - base - UNROLL
            next_grads = _tokens(grad_at, next_rows, left, valid, e_mask, g_l, UNROLL)
            rows_ahead = _rows(order, base + 2 * UNROLL, length, UNROLL)
            if ACCUMULATE:
                before = _tokens(dx_at, past + rows, None, None, e_mask & (k > 0), CHANNELS, UNROLL)
            for i in tl.static_range(UNROLL):
                taps, first = _taps(
                    recent, values[i].to(tl.float32), rows[i], base + i, initial, firsts, borders, sequence_of_row,
                    e, e_mask, i_s, i_e, i_w, W,
                )  # fmt: skip
                g = grads[i].to(tl.float32)
                if SILU:
                    g = _activation_gradient(g, taps, weights, shift, W)
                added = _adjoint_step(g, taps, pending, weights, base + i, first, borders, W)
                g = tl.where(base + i < high, g, 0.0)
                next_sums = ()
                for j in tl.static_range(W):
                    next_sums = next_sums + (sums[j] + g * taps[j],)
                sums = next_sums + (sums[W] + g,)
                visited = past + (rows[i],)
                step = base + i - (W - 1)
                d = added[0]
                inside = (step >= low) & (step < high)
                if grad_last is not None:
                    d += _last_gradient(
                        grad_last, step, inside, visited[0], length, firsts, borders, sequence_of_row, row_batch,
                        e, e_mask, gl_s, gl_e, gl_w, W,
                    )  # fmt: skip
                if valid is not None:
                    d = tl.where(visited[0] < valid, d, 0.0)
                if ACCUMULATE:
                    d += before[i].to(tl.float32)
                at = dx_at + visited[0].to(tl.int64) * CHANNELS
                tl.store(at, d.to(dx.dtype.element_ty), mask=e_mask & inside)
                pending = _last(added, W - 1)
                past = _last(visited, W - 1)
                recent = _last(recent + (values[i].to(tl.float32),), W - 1)
            rows = next_rows
            values = next_values
            grads = next_grads
            next_rows = rows_ahead
        slot = parts + (pid.to(tl.int64) * directions + k64) * ((W + 1) * CHANNELS) + e
        for j in tl.static_range(W + 1):
            tl.store(slot + j * CHANNELS, sums[j], mask=e_mask)
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
