"""Selective scan in pure PyTorch, chunk by chunk, with a hand-written backward: the default on the CPU.

Within a chunk of T steps all decays and inputs are computed at once, then the recurrence costs one in-place operation
per step. Only the state before each chunk is kept for the backward, which recomputes the rest chunk by chunk, last
first. README.md derives the adjoint. Tensors of a chunk put time first and channels last, (T, b, k, G, N, Ec):

    b batch rows and k directions of a block, G channel groups, N state, Ec = E / G channels of a group
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from genssm.kernels.arguments import compute_dtype
from genssm.kernels.elementwise import sigmoid, softplus
from genssm.kernels.selective_scan.reference import directions_of
from genssm.kernels.spans import Span, packed_spans, spans

# States advanced together: enough to hide the cost of a PyTorch call, few enough that a chunk stays near the caches.
_BLOCK_STATES = 65536


def chunk_steps(length: int) -> int:
    """Steps per chunk: 32, doubled while its square is below the length, so that memory grows with sqrt(L) at most."""
    steps = 32
    while steps * steps < length:
        steps *= 2
    return steps


def saved_shape(
    batch: int, directions: int, length: int, channels: int, states: int, sequences: int
) -> tuple[int, int, int, int]:
    """Shape of the states kept for the backward: one before each chunk; a packed sequence starts a chunk of its own."""
    steps = chunk_steps(length)
    return (length + steps - 1) // steps + sequences - batch, batch, directions, channels * states


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    reduce_sum: bool,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, last state (empty where not wanted) and the states before each chunk; canonical arguments as in
    `reference.scan_reference`."""
    problem = _Problem(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, lengths, cu_seqlens)
    batch, _, length, channels = u.shape
    K, N, dtype = problem.directions, A.shape[-1], problem.dtype
    out = _Rows(u, 1 if reduce_sum else K, K, (channels,))
    last_state = torch.empty(problem.sequences, K, channels, N, dtype=dtype, device=u.device)
    saved = torch.empty(saved_shape(batch, K, length, channels, N, problem.sequences), dtype=dtype, device=u.device)
    if cu_seqlens is not None:  # slots that no chunk uses, and sequences without a token
        saved.zero_()
        last_state.copy_(initial_state) if initial_state is not None else last_state.zero_()
    for block in problem.blocks():
        decay, states = problem.buffers(block, 2)
        h = None
        for span in block.spans:
            slot = block.slot(saved, span)
            if span.first:
                slot.copy_(block.state(initial_state, span)) if initial_state is not None else slot.zero_()
            else:
                slot.copy_(h)
            chunk = _Chunk(block, span)
            h = chunk.run(slot, decay, states)
            y = chunk.output(states)
            if z is not None:
                gate = chunk.read(z)
                y = y * (gate * sigmoid(gate))
            out.write(block, span, y.flatten(-2))
            if span.last:
                block.state(last_state, span).copy_(h)
    result = out.result()
    return (
        result.squeeze(1) if reduce_sum else result,
        last_state if return_last_state else last_state.new_empty(0),
        saved,
    )


def scan_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    reduce_sum: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, each in the shape and dtype of its input."""
    problem = _Problem(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, lengths, cu_seqlens)
    K, N, dtype = problem.directions, A.shape[-1], problem.dtype
    grad_out = grad_out.unsqueeze(1) if reduce_sum else grad_out
    du, ddelta, dB, dC = (_Rows(x, x.shape[1], K, x.shape[3:]) for x in (u, delta, B, C))
    dz = None if z is None else _Rows(z, z.shape[1], K, z.shape[3:])
    zeros = {"dtype": dtype, "device": u.device}
    dA = torch.zeros(K, problem.groups, N, u.shape[3] // problem.groups, **zeros)
    dD, dbias = torch.zeros(K, u.shape[3], **zeros), torch.zeros(K, u.shape[3], **zeros)
    dinitial = None
    if initial_state is not None:  # a sequence without a token hands its state through
        dinitial = torch.zeros_like(initial_state) if grad_last_state is None else grad_last_state.clone()

    for block in problem.blocks():
        decay, states, adjoint = problem.buffers(block, 3)
        at = slice(block.directions.start, block.directions.stop)
        carry = None
        for span in reversed(block.spans):
            if span.last:
                carry = None if grad_last_state is None else block.state(grad_last_state, span)
            chunk = _Chunk(block, span)
            before = states.steps[0].copy_(block.slot(saved, span))
            chunk.run(before, decay, states)
            grad_y = chunk.read(grad_out)  # (T, b, k, G, Ec)
            if z is not None:
                gate = chunk.read(z)
                opening = sigmoid(gate)
                slope = opening * (1 + gate * (1 - opening))
                dz.write(block, span, (grad_y * chunk.output(states) * slope).flatten(-2))
                grad_y = grad_y * (gate * opening)
            grad_y = chunk.all_directions(grad_y)
            grads = chunk.adjoint(grad_y, carry, decay, states, adjoint)
            du.write(block, span, grads.u.flatten(-2))
            ddelta.write(block, span, grads.delta.flatten(-2))
            dB.write(block, span, grads.B)
            dC.write(block, span, grads.C)
            dA[at] += grads.A
            dbias[at] += grads.delta.sum((0, 1)).flatten(-2)
            if D is not None:
                dD[at] += (grad_y * chunk.u).sum((0, 1)).flatten(-2)
            carry = grads.state
            if span.first and dinitial is not None:
                block.state(dinitial, span).copy_(carry)
    shared_A, shared_D, shared_bias = (
        None if x is None else (full.sum(0, keepdim=True) if x.shape[0] < K else full)
        for x, full in ((A, dA), (D, dD), (delta_bias, dbias))
    )
    shared_A = shared_A.transpose(-1, -2).reshape(A.shape).to(A.dtype)
    return (
        du.result(),
        ddelta.result(),
        shared_A,
        dB.result(),
        dC.result(),
        None if D is None else shared_D.to(D.dtype),
        None if dz is None else dz.result(),
        None if delta_bias is None else shared_bias.to(delta_bias.dtype),
        dinitial,
    )


@dataclass(frozen=True)
class _Buffer:
    """A quantity of every step and state of a chunk, (T + 1, b, k, G, N, Ec), and the same step by step."""

    all: Tensor
    steps: tuple[Tensor, ...]


class _Problem:
    """The canonical arguments, and how they are cut into blocks."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, lengths, cu_seqlens) -> None:
        self.u, self.delta, self.A, self.B, self.C, self.D, self.delta_bias = u, delta, A, B, C, D, delta_bias
        self.delta_softplus, self.orders, self.lengths, self.cu_seqlens = delta_softplus, orders, lengths, cu_seqlens
        self.directions = directions_of(orders, u, delta, A, B, C, D, z, delta_bias)
        self.groups = B.shape[3]
        self.dtype = compute_dtype(u)
        self.sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self._buffers: dict[tuple[int, ...], list[_Buffer]] = {}

    def blocks(self) -> Iterator["_Block"]:
        """Batch rows x directions that advance in step; packed sequences end at other steps in each direction."""
        batch, _, length, channels = self.u.shape
        states = channels * self.A.shape[-1]
        together = 1 if self.cu_seqlens is not None or self.directions * states > _BLOCK_STATES else self.directions
        rows = max(1, _BLOCK_STATES // (together * states))
        for k in range(0, self.directions, together):
            if self.cu_seqlens is None:
                plan = spans(length, chunk_steps(length))
            else:
                order = None if self.orders is None else self.orders[k]
                plan = packed_spans(length, chunk_steps(length), self.cu_seqlens, order)
            for b in range(0, batch, rows):
                yield _Block(self, slice(b, min(batch, b + rows)), slice(k, k + together), plan)

    def buffers(self, block: "_Block", count: int) -> list["_Buffer"]:
        """Room for ``count`` quantities of a chunk, shared by blocks of the same size."""
        groups, width = block.channels
        steps = max((span.high - span.low for span in block.spans), default=0)
        sizes = (steps + 1, block.batch.stop - block.batch.start, block.k, groups, self.A.shape[-1], width)
        if sizes not in self._buffers:
            make = [torch.empty(sizes, dtype=self.dtype, device=self.u.device) for _ in range(count)]
            self._buffers[sizes] = [_Buffer(x, x.unbind(0)) for x in make]
        return self._buffers[sizes]


class _Block:
    """Some batch rows and directions, with the parameters of those directions."""

    def __init__(self, problem: _Problem, batch: slice, directions: slice, spans: list[Span]) -> None:
        self.problem, self.batch, self.directions, self.spans = problem, batch, directions, spans
        self.k = directions.stop - directions.start
        self.channels = (problem.groups, problem.u.shape[3] // problem.groups)  # (G, Ec)
        self.orders = None if problem.orders is None else problem.orders[directions]
        self.lengths = None if problem.lengths is None else problem.lengths[batch, None]
        A = problem.A if problem.A.shape[0] == 1 else problem.A[directions]
        self.A = A.unflatten(1, self.channels).transpose(-1, -2).contiguous()  # (1 or k, G, N, Ec)
        self.D, self.delta_bias = (self._per_channel(x) for x in (problem.D, problem.delta_bias))

    def _per_channel(self, x: Tensor | None) -> Tensor | None:
        """(1 or K, E) -> (1 or k, G, Ec)."""
        if x is None:
            return None
        return (x if x.shape[0] == 1 else x[self.directions]).unflatten(1, self.channels)

    def state(self, x: Tensor, span: Span) -> Tensor:
        """The part of states (S, K, E, N) that belongs to this block and span, as a view (b, k, G, N, Ec)."""
        rows = self.batch if span.sequence is None else slice(span.sequence, span.sequence + 1)
        return x[rows, self.directions].unflatten(2, self.channels).transpose(-1, -2)

    def slot(self, saved: Tensor, span: Span) -> Tensor:
        """Where the state before a span is kept, as a view (b, k, G, N, Ec)."""
        groups, width = self.channels
        return saved[span.slot, self.batch, self.directions].unflatten(-1, (groups, self.problem.A.shape[-1], width))

    def read(self, x: Tensor, span: Span) -> Tensor:
        """Rows that the steps of a span visit, (Bt, 1 or K, L, ...) -> (T, b, 1 or k, ...), invalid ones as zeros."""
        x = x[self.batch] if x.shape[1] == 1 else x[self.batch, self.directions]
        if self.orders is None:
            rows = x[:, :, span.low : span.high].movedim(2, 0)
        else:
            index = self.orders[:, span.low : span.high]
            if x.shape[1] == 1:
                rows = x[:, 0].index_select(1, index.flatten()).unflatten(1, index.shape).movedim(2, 0)
            else:
                rows = torch.stack([x[:, k].index_select(1, index[k]) for k in range(self.k)], dim=2).transpose(0, 1)
        rows = rows.to(self.problem.dtype)
        invalid = self.invalid(span, rows.ndim)
        return rows if invalid is None else rows.masked_fill(invalid, 0.0)

    def invalid(self, span: Span, ndim: int) -> Tensor | None:
        """Which rows of a span lie behind the lengths, (T, b, 1 or k, 1, ...); None without lengths."""
        if self.lengths is None:
            return None
        if self.orders is None:
            index = torch.arange(span.low, span.high, device=self.lengths.device)[None]
        else:
            index = self.orders[:, span.low : span.high]
        invalid = index.t()[:, None] >= self.lengths
        return invalid.view(*invalid.shape, *[1] * (ndim - 3))


class _Rows:
    """A result (Bt, Kx, L, ...) written chunk by chunk; rows shared by several directions are summed in ``dtype``."""

    def __init__(self, like: Tensor, size: int, directions: int, rest: tuple[int, ...]) -> None:
        self.dtype = like.dtype
        self.summed = size < directions
        shape = (like.shape[0], size, like.shape[2], *rest)
        allocate = torch.zeros if self.summed else torch.empty
        self.rows = allocate(shape, dtype=compute_dtype(like) if self.summed else like.dtype, device=like.device)

    def write(self, block: _Block, span: Span, value: Tensor) -> None:
        """Put (T, b, 1 or k, ...) into the rows that the steps of a span visit."""
        value = value.transpose(0, 1)  # (b, T, k, ...)
        if block.orders is None:
            rows = self.rows[block.batch, :, span.low : span.high]
            if self.summed:
                rows.add_(value.sum(2, keepdim=True).transpose(1, 2))
            else:
                rows[:, block.directions].copy_(value.transpose(1, 2))
            return
        for k, index in enumerate(block.orders[:, span.low : span.high]):
            rows = self.rows[block.batch, 0 if self.summed else block.directions.start + k]
            if self.summed:
                rows.index_add_(1, index, value[:, :, k])
            else:
                rows.index_copy_(1, index.long(), value[:, :, k].to(self.dtype))

    def result(self) -> Tensor:
        return self.rows.to(self.dtype)


@dataclass(frozen=True)
class _Grads:
    u: Tensor  # (T, b, k, G, Ec)
    delta: Tensor  # (T, b, k, G, Ec)
    A: Tensor  # (k, G, N, Ec)
    B: Tensor  # (T, b, k, G, N)
    C: Tensor  # (T, b, k, G, N)
    state: Tensor  # (b, k, G, N, Ec)


class _Chunk:
    """The steps of one span: inputs read, recurrence forward, adjoint backward."""

    def __init__(self, block: _Block, span: Span) -> None:
        problem = block.problem
        self.block, self.span, self.steps = block, span, span.high - span.low
        self.u = self.all_directions(self.read(problem.u))
        delta = self.read(problem.delta)
        self.raw = delta if block.delta_bias is None else delta + block.delta_bias
        delta = softplus(self.raw) if problem.delta_softplus else self.raw
        invalid = block.invalid(span, delta.ndim)
        if invalid is not None:  # a zero step leaves the state as it is
            delta = delta.masked_fill(invalid, 0.0)
        self.delta = self.all_directions(delta)
        self.B, self.C = block.read(problem.B, span), block.read(problem.C, span)  # (T, b, 1 or k, G, N)

    def read(self, x: Tensor) -> Tensor:
        """(Bt, 1 or K, L, E) -> (T, b, 1 or k, G, Ec)."""
        return self.block.read(x, self.span).unflatten(-1, self.block.channels)

    def all_directions(self, x: Tensor) -> Tensor:
        """Expand the direction dimension."""
        return x if x.shape[2] == self.block.k else x.expand(-1, -1, self.block.k, -1, -1)

    def run(self, h: Tensor, decay: _Buffer, states: _Buffer) -> Tensor:
        """Fill ``decay`` with exp(delta A) and ``states``, from its second step on, with the states after each step.

        ``h`` is the state before the chunk; returned is the last one.
        """
        torch.mul(self.delta.unsqueeze(-2), self.block.A, out=decay.all[: self.steps]).exp_()
        torch.mul((self.delta * self.u).unsqueeze(-2), self.B.unsqueeze(-1), out=states.all[1 : self.steps + 1])
        for decay_t, x_t in zip(decay.steps[: self.steps], states.steps[1:]):
            h = x_t.addcmul_(decay_t, h)
        return h

    def output(self, states: _Buffer) -> Tensor:
        """y = C h + D u before the gate, (T, b, k, G, Ec)."""
        y = torch.matmul(self.C.unsqueeze(-2), states.all[1 : self.steps + 1]).squeeze(-2)
        return y if self.block.D is None else y + self.block.D * self.u

    def adjoint(
        self, grad_y: Tensor, carry: Tensor | None, decay: _Buffer, states: _Buffer, adjoint: _Buffer
    ) -> _Grads:
        """Gradients of the chunk's inputs and of the state before it.

        With g_t the gradient of h_t: g_t = C_t grad_y_t + decay_{t+1} g_{t+1}. ``states`` starts with the state before
        the chunk; ``decay`` and ``adjoint`` are overwritten.
        """
        e, g = decay.all[: self.steps], adjoint.all[: self.steps]
        before, after = states.all[: self.steps], states.all[1 : self.steps + 1]
        grad_C = torch.matmul(after, grad_y.unsqueeze(-1)).squeeze(-1)
        torch.mul(self.C.unsqueeze(-1), grad_y.unsqueeze(-2), out=g)
        following = adjoint.steps[self.steps - 1]
        if carry is not None:
            following.add_(carry)
        for t in range(self.steps - 2, -1, -1):
            following = adjoint.steps[t].addcmul_(decay.steps[t + 1], following)
        s = torch.matmul(self.B.unsqueeze(-2), g).squeeze(-2)  # sum over n of g B
        grad_B = torch.matmul(g, (self.delta * self.u).unsqueeze(-1)).squeeze(-1)
        e.mul_(g)
        carry = e[0].clone()
        e.mul_(before)  # gradient of delta A
        grad_A = torch.mul(e, self.delta.unsqueeze(-2), out=g).sum((0, 1))
        grad_delta = e.mul_(self.block.A).sum(-2).add_(s * self.u)
        if self.block.problem.delta_softplus:
            grad_delta = grad_delta * sigmoid(self.raw)
        invalid = self.block.invalid(self.span, grad_delta.ndim)
        if invalid is not None:
            grad_delta = grad_delta.masked_fill(invalid, 0.0)
        grad_u = s.mul_(self.delta)
        if self.block.D is not None:
            grad_u = grad_u + self.block.D * grad_y
        return _Grads(grad_u, grad_delta, grad_A, grad_B, grad_C, carry)
