"""The Mamba-2 scan in pure PyTorch as matrix products, chunk by chunk, with a hand-written backward: the CPU's path.

Inside a chunk of T steps the recurrence is one lower triangular matrix per head; between chunks only the state is
carried. README.md derives both directions. The state before each chunk is kept for the backward, which makes the rest
again, last chunk first. Tensors of a chunk are (b, k, T, ...) or, per head, (b, k, H, T, ...), and states
(b, k, G, N, Q):

    b batch rows and k directions of a block, H heads, P channels of a head, G groups, N state, Q = H / G * P
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from genssm.kernels.arguments import compute_dtype
from genssm.kernels.elementwise import sigmoid, softplus
from genssm.kernels.spans import Span, packed_spans, spans
from genssm.kernels.ssd.reference import directions_of

STEPS = 64  # of a chunk
# Elements of the triangular matrices that are made at once.
_BLOCK_ELEMENTS = 262144
# Exponents below this are as good as it: exp(-1000) is zero in float32 and in float64.
_LEAST = -1000.0


def new_saved(x: Tensor, B: Tensor, C: Tensor, directions: int, sequences: int) -> Tensor:
    """Room for the states that the backward needs: before each chunk; a packed sequence starts a chunk of its own."""
    batch, _, length, heads, width = x.shape
    sizes = ((length + STEPS - 1) // STEPS + sequences - batch, batch, directions, heads * width * B.shape[-1])
    return x.new_empty(sizes, dtype=compute_dtype(x))


def ssd_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    reduce_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, last state and the states before each chunk; canonical arguments as in `reference.ssd_reference`."""
    problem = _Problem(x, dt, A, B, C, D, z, dt_bias, dt_softplus, orders, lengths, cu_seqlens)
    heads, width = x.shape[3:]
    K, N, options = problem.directions, B.shape[-1], {"dtype": problem.dtype, "device": x.device}
    out = _Rows(x, 1 if reduce_sum else K, K)
    last_state = torch.empty(problem.sequences, K, heads, width, N, **options)
    saved = new_saved(x, B, C, K, problem.sequences)
    if cu_seqlens is not None:  # slots that no chunk uses, and sequences without a token
        saved.zero_()
        last_state.copy_(initial_state) if initial_state is not None else last_state.zero_()
    for block in problem.blocks():
        h = None
        for span in block.spans:
            slot = block.slot(saved, span)
            if span.first:
                block.put_state(slot, initial_state, span)
            else:
                slot.copy_(h)
            chunk = _Chunk(block, span, slot)
            y = chunk.output()
            h = chunk.advance()
            if z is not None:
                gate = chunk.read(z)
                y = y * (gate * sigmoid(gate))
            out.write(block, span, y)
            if span.last:
                block.take_state(last_state, h, span)
    result = out.result()
    return result.squeeze(1) if reduce_sum else result, last_state, saved


def ssd_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    saved: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    reduce_sum: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state, each in the shape and dtype of its input."""
    problem = _Problem(x, dt, A, B, C, D, z, dt_bias, dt_softplus, orders, lengths, cu_seqlens)
    K, heads = problem.directions, x.shape[3]
    grad_out = grad_out.unsqueeze(1) if reduce_sum else grad_out
    dx, ddt, dB, dC = (_Rows(t, t.shape[1], K) for t in (x, dt, B, C))
    dz = None if z is None else _Rows(z, z.shape[1], K)
    dA, dD, dbias = (torch.zeros(K, heads, dtype=problem.dtype, device=x.device) for _ in range(3))
    dinitial = None
    if initial_state is not None:  # a sequence without a token hands its state through
        dinitial = torch.zeros_like(initial_state) if grad_last_state is None else grad_last_state.clone()

    for block in problem.blocks():
        at = slice(block.directions.start, block.directions.stop)
        carry = None
        for span in reversed(block.spans):
            before = block.slot(saved, span)
            if span.last:
                carry = torch.empty_like(before)
                block.put_state(carry, grad_last_state, span)
            chunk = _Chunk(block, span, before)
            grad_y = chunk.read(grad_out)
            if z is not None:
                gate = chunk.read(z)
                opening = sigmoid(gate)
                slope = opening * (1 + gate * (1 - opening))
                dz.write(block, span, grad_y * chunk.output() * slope)
                grad_y = grad_y * (gate * opening)
            grads = chunk.adjoint(chunk.all_directions(grad_y), carry)
            dx.write(block, span, grads.x)
            ddt.write(block, span, grads.dt)
            dB.write(block, span, grads.B)
            dC.write(block, span, grads.C)
            dA[at] += grads.A
            dbias[at] += grads.dt.sum((0, 2))
            if D is not None:
                dD[at] += (grad_y * chunk.x).sum((0, 2, 4))
            carry = grads.state
            if span.first and dinitial is not None:
                block.take_state(dinitial, carry, span)
    shared = (
        None if p is None else (full.sum(0, keepdim=True) if p.shape[0] < K else full).to(p.dtype)
        for p, full in ((A, dA), (D, dD), (dt_bias, dbias))
    )
    of_A, of_D, of_bias = shared
    of_z = None if dz is None else dz.result()
    return dx.result(), ddt.result(), of_A, dB.result(), dC.result(), of_D, of_z, of_bias, dinitial


class _Problem:
    """The canonical arguments, and how they are cut into blocks."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, dt_softplus, orders, lengths, cu_seqlens) -> None:
        self.x, self.dt, self.A, self.B, self.C, self.D, self.dt_bias = x, dt, A, B, C, D, dt_bias
        self.dt_softplus, self.orders, self.lengths, self.cu_seqlens = dt_softplus, orders, lengths, cu_seqlens
        self.directions = directions_of(orders, x, dt, A, B, C, D, z, dt_bias)
        self.dtype = compute_dtype(x)
        self.sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        length, heads, groups = x.shape[2], x.shape[3], B.shape[3]
        self.sizes = (groups, B.shape[4], heads // groups * x.shape[4])  # (G, N, Q)
        steps = min(length, STEPS)
        ones = torch.ones(steps, steps, dtype=torch.bool, device=x.device)
        self.above = ones.triu(1)  # (T, T), the steps of the future

    def blocks(self) -> Iterator["_Block"]:
        """Batch rows x directions that advance in step; packed sequences end at other steps in each direction."""
        batch, _, length, heads, width = self.x.shape
        elements = heads * max(width, min(length, STEPS)) * min(length, STEPS)
        together = 1 if self.cu_seqlens is not None or self.directions * elements > _BLOCK_ELEMENTS else self.directions
        rows = max(1, _BLOCK_ELEMENTS // (together * elements))
        for k in range(0, self.directions, together):
            if self.cu_seqlens is None:
                plan = spans(length, STEPS)
            else:
                order = None if self.orders is None else self.orders[k]
                plan = packed_spans(length, STEPS, self.cu_seqlens, order)
            for b in range(0, batch, rows):
                yield _Block(self, slice(b, min(batch, b + rows)), slice(k, k + together), plan)


class _Block:
    """Some batch rows and directions, with the parameters of those directions."""

    def __init__(self, problem: _Problem, batch: slice, directions: slice, spans: list[Span]) -> None:
        self.problem, self.batch, self.directions, self.spans = problem, batch, directions, spans
        self.k = directions.stop - directions.start
        self.orders = None if problem.orders is None else problem.orders[directions]
        self.lengths = None if problem.lengths is None else problem.lengths[batch, None, None]
        parameters = (problem.A, problem.D, problem.dt_bias)
        self.A, self.D, self.dt_bias = (
            None if p is None else (p if p.shape[0] == 1 else p[directions])[:, None] for p in parameters
        )  # (1 or k, 1, H)

    def slot(self, saved: Tensor, span: Span) -> Tensor:
        """Where the state before a span is kept, as a view (b, k, G, N, Q)."""
        return saved[span.slot, self.batch, self.directions].unflatten(-1, self.problem.sizes)

    def put_state(self, to: Tensor, states: Tensor | None, span: Span) -> None:
        """Fill ``to`` (b, k, G, N, Q) from the part of states (S, K, H, P, N) that belongs to this block and span."""
        if states is None:
            to.zero_()
        else:
            to.unflatten(-1, (-1, states.shape[3])).copy_(self._state(states, span))

    def take_state(self, states: Tensor, h: Tensor, span: Span) -> None:
        """Copy ``h`` (b, k, G, N, Q) to where it belongs in states (S, K, H, P, N)."""
        self._state(states, span).copy_(h.unflatten(-1, (-1, states.shape[3])))

    def _state(self, states: Tensor, span: Span) -> Tensor:
        """(S, K, H, P, N) -> view (b, k, G, N, H / G, P)."""
        rows = self.batch if span.sequence is None else slice(span.sequence, span.sequence + 1)
        return states[rows, self.directions].unflatten(2, (self.problem.sizes[0], -1)).movedim(-1, 3)

    def read(self, x: Tensor, span: Span) -> Tensor:
        """Rows that the steps of a span visit, (Bt, 1 or K, L, ...) -> (b, 1 or k, T, ...), invalid ones as zeros."""
        x = x[self.batch] if x.shape[1] == 1 else x[self.batch, self.directions]
        if self.orders is None:
            rows = x[:, :, span.low : span.high]
        else:
            index = self.orders[:, span.low : span.high]
            if x.shape[1] == 1:
                rows = x[:, 0].index_select(1, index.flatten()).unflatten(1, index.shape)
            else:
                rows = torch.stack([x[:, k].index_select(1, index[k]) for k in range(self.k)], dim=1)
        rows = rows.to(self.problem.dtype)
        invalid = self.invalid(span, rows.ndim)
        return rows if invalid is None else rows.masked_fill(invalid, 0.0)

    def invalid(self, span: Span, ndim: int) -> Tensor | None:
        """Which rows of a span lie behind the lengths, (b, 1 or k, T, 1, ...); None without lengths."""
        if self.lengths is None:
            return None
        if self.orders is None:
            index = torch.arange(span.low, span.high, device=self.lengths.device)[None]
        else:
            index = self.orders[:, span.low : span.high]
        invalid = index >= self.lengths
        return invalid.view(*invalid.shape, *[1] * (ndim - 3))


class _Rows:
    """A result (Bt, Kx, L, ...) written chunk by chunk; rows shared by several directions are summed in ``dtype``."""

    def __init__(self, like: Tensor, size: int, directions: int) -> None:
        self.dtype = like.dtype
        self.summed = size < directions
        shape = (like.shape[0], size, *like.shape[2:])
        allocate = torch.zeros if self.summed else torch.empty
        self.rows = allocate(shape, dtype=compute_dtype(like) if self.summed else like.dtype, device=like.device)

    def write(self, block: _Block, span: Span, value: Tensor) -> None:
        """Put (b, k, T, ...) into the rows that the steps of a span visit."""
        if block.orders is None:
            rows = self.rows[block.batch, :, span.low : span.high]
            if self.summed:
                rows.add_(value.sum(1, keepdim=True))
            else:
                rows[:, block.directions].copy_(value)
            return
        for k, index in enumerate(block.orders[:, span.low : span.high]):
            rows = self.rows[block.batch, 0 if self.summed else block.directions.start + k]
            if self.summed:
                rows.index_add_(1, index, value[:, k])
            else:
                rows.index_copy_(1, index.long(), value[:, k].to(self.dtype))

    def result(self) -> Tensor:
        return self.rows.to(self.dtype)


@dataclass(frozen=True)
class _Grads:
    x: Tensor  # (b, k, T, H, P)
    dt: Tensor  # (b, k, T, H)
    A: Tensor  # (k, H)
    B: Tensor  # (b, k, T, G, N)
    C: Tensor  # (b, k, T, G, N)
    state: Tensor  # (b, k, G, N, Q)


class _Chunk:
    """The steps of one span: inputs read, decays, output and next state forward, adjoint backward.

    ``before`` is the state before the chunk, (b, k, G, N, Q).
    """

    def __init__(self, block: _Block, span: Span, before: Tensor) -> None:
        problem = block.problem
        self.block, self.span, self.before, self.steps = block, span, before, span.high - span.low
        self.x = self.all_directions(self.read(problem.x))  # (b, k, T, H, P)
        raw = self.read(problem.dt)
        self.raw = raw if block.dt_bias is None else raw + block.dt_bias
        dt = softplus(self.raw) if problem.dt_softplus else self.raw
        invalid = block.invalid(span, dt.ndim)
        if invalid is not None:  # a zero step leaves the state as it is
            dt = dt.masked_fill(invalid, 0.0)
        self.dt = self.all_directions(dt)  # (b, k, T, H)
        maps = (self.all_directions(self.read(m)).transpose(2, 3).contiguous() for m in (problem.B, problem.C))
        self.B, self.C = maps  # (b, k, G, T, N)
        self.inputs = self.per_head(self.x * self.dt.unsqueeze(-1))  # (b, k, H, T, P)
        self._decays()

    def _decays(self) -> None:
        """exp of the sums of dt A from the chunk's start to each step, from each step to its end, between any two.

        The exponents are split into multiples of 1/16, whose running sums are exact, and a small rest: the difference
        of two sums is then as good as the sum itself, also behind a step that wiped the state out.
        """
        exponents = (self.dt * self.block.A).clamp(min=_LEAST).transpose(2, 3)  # (b, k, H, T)
        coarse = exponents.mul(16.0).round_().mul_(1 / 16)
        fine = (exponents - coarse).cumsum(-1)
        coarse = coarse.cumsum(-1)
        self.from_start = torch.exp(coarse + fine)
        self.to_end = torch.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
        between = coarse.unsqueeze(-1) - coarse.unsqueeze(-2)
        between.add_(fine.unsqueeze(-1)).sub_(fine.unsqueeze(-2))
        above = self.block.problem.above[: self.steps, : self.steps]
        self.between = between.masked_fill_(above, -torch.inf).exp_()  # (b, k, H, T, T)

    def read(self, x: Tensor) -> Tensor:
        return self.block.read(x, self.span)

    def all_directions(self, x: Tensor) -> Tensor:
        """Expand the direction dimension."""
        return x if x.shape[1] == self.block.k else x.expand(-1, self.block.k, *[-1] * (x.ndim - 2))

    def per_head(self, x: Tensor) -> Tensor:
        """(b, k, T, H, P) -> (b, k, H, T, P) in memory."""
        return x.transpose(2, 3).contiguous()

    def per_group(self, x: Tensor) -> Tensor:
        """(b, k, H, T, P) -> (b, k, G, T, Q) in memory."""
        groups = self.block.problem.sizes[0]
        return x.unflatten(2, (groups, -1)).transpose(3, 4).flatten(-2)

    def of_heads(self, x: Tensor) -> Tensor:
        """(b, k, G, T, Q) -> view (b, k, H, T, P)."""
        return x.unflatten(-1, (-1, self.x.shape[-1])).transpose(3, 4).flatten(2, 3)

    def weighted(self, weight: Tensor, x: Tensor) -> Tensor:
        """Rows of the heads (b, k, H, T, P) times (b, k, H, T), grouped: (b, k, G, T, Q)."""
        return self.per_group(x * weight.unsqueeze(-1))

    @functools.cached_property
    def matrix(self) -> Tensor:
        """M_ts = exp(sum of dt A between s and t) C_t B_s, what step s adds to step t, (b, k, H, T, T)."""
        scores = self.C @ self.B.transpose(-1, -2)  # (b, k, G, T, T)
        groups = self.block.problem.sizes[0]
        return (self.between.unflatten(2, (groups, -1)) * scores.unsqueeze(3)).flatten(2, 3)

    @functools.cached_property
    def into(self) -> Tensor:
        """What the state before the chunk would give at every step without decay, (b, k, H, T, P)."""
        return self.of_heads(self.C @ self.before)

    def output(self) -> Tensor:
        """y = C h + D x before the gate, (b, k, T, H, P)."""
        y = self.matrix @ self.inputs
        y.addcmul_(self.into, self.from_start.unsqueeze(-1))
        y = y.transpose(2, 3)
        return y if self.block.D is None else torch.addcmul(y, self.x, self.block.D.unsqueeze(-1))

    def advance(self) -> Tensor:
        """The state after the chunk, (b, k, G, N, Q)."""
        added = self.B.transpose(-1, -2) @ self.weighted(self.to_end, self.inputs)
        return added.addcmul_(self.before, self._through())

    def _through(self) -> Tensor:
        """Decay over the whole chunk for every column of a state, (b, k, G, 1, Q)."""
        groups = self.block.problem.sizes[0]
        through = self.from_start[..., -1].unflatten(2, (groups, -1))
        return through.repeat_interleave(self.x.shape[-1], dim=-1).unsqueeze(3)

    def adjoint(self, grad_y: Tensor, carry: Tensor) -> _Grads:
        """Gradients of the chunk's inputs and of the state before it, from those of y and of the state after it.

        Overwrites ``matrix``.
        """
        groups, block, before, matrix = self.block.problem.sizes[0], self.block, self.before, self.matrix
        dy, u = self.per_head(grad_y), self.inputs  # (b, k, H, T, P)
        pairs = dy @ u.transpose(-1, -2)  # (b, k, H, T, T)

        # within the chunk
        du = matrix.transpose(-1, -2) @ dy
        scores = (self.between * pairs).unflatten(2, (groups, -1)).sum(3)  # (b, k, G, T, T)
        crossing = matrix.mul_(pairs).cumsum_(-1).tril_(-1).sum(-2)  # pairs with s <= j < t, (b, k, H, T)
        dC, dB = scores @ self.B, scores.transpose(-1, -2) @ self.C  # (b, k, G, T, N)

        # from the state before, to the state after
        faded, kept = self.weighted(self.from_start, dy), self.weighted(self.to_end, u)  # (b, k, G, T, Q)
        out_of = self.of_heads(self.B @ carry)
        dC += faded @ before.transpose(-1, -2)
        dB += kept @ carry.transpose(-1, -2)
        du.addcmul_(out_of, self.to_end.unsqueeze(-1))
        entered = (self.into * dy).sum(-1) * self.from_start  # what the decay up to t carries, (b, k, H, T)
        left = (out_of * u).sum(-1) * self.to_end
        through = self._through()
        whole = (before * carry).mul_(through).sum(3).unflatten(-1, (-1, self.x.shape[-1])).sum(-1).flatten(2)
        state = (self.C.transpose(-1, -2) @ faded).addcmul_(carry, through)

        # exponents: step r takes part in every pair that it lies between
        of_exponent = entered.flip(-1).cumsum(-1).flip(-1) + whole.unsqueeze(-1)
        of_exponent[..., 1:] += (crossing + left.cumsum(-1))[..., :-1]
        of_exponent = of_exponent.transpose(2, 3)  # (b, k, T, H)
        du = du.transpose(2, 3)  # (b, k, T, H, P)
        grad_A = (of_exponent * self.dt).sum((0, 2))
        grad_dt = (self.x * du).sum(-1) + of_exponent * block.A
        if block.problem.dt_softplus:
            grad_dt = grad_dt * sigmoid(self.raw)
        invalid = block.invalid(self.span, grad_dt.ndim)
        if invalid is not None:
            grad_dt = grad_dt.masked_fill(invalid, 0.0)
        grad_x = du * self.dt.unsqueeze(-1)
        if block.D is not None:
            grad_x.addcmul_(grad_y, block.D.unsqueeze(-1))
        return _Grads(grad_x, grad_dt, grad_A, dB.transpose(2, 3), dC.transpose(2, 3), state)
