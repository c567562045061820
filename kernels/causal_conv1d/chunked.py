"""Causal convolution along orders in pure PyTorch with a hand-written backward: the default on the CPU.

The tokens of a batch row are copied once into a *line*: in the order of the visits, behind the W - 1 tokens of the
state (packed sequences one after the other, each behind its own state). There the convolution is W shifted
multiply-adds; the results go back to the tokens' own rows. Blocks of batch rows keep the work near the caches.

    b batch rows of a block, K directions, L tokens, M = line length - (W - 1) results in a line, E channels, W taps
"""

import torch
from torch import Tensor

from genssm.kernels.arguments import compute_dtype, empty_directions, empty_gradient
from genssm.kernels.elementwise import sigmoid

_BLOCK_VALUES = 1 << 18


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
    """Result (Bt, K, L, E) and last state (S, K, E, W - 1); canonical arguments as in `reference.conv_reference`."""
    lines = _Lines(x, weight, bias, orders, initial_state, lengths, cu_seqlens, K)
    channels = x.shape[3]
    out = empty_directions(x, K)
    last_state = torch.empty(lines.sequences, K, channels, lines.pad, dtype=lines.dtype, device=x.device)
    for rows in lines.blocks():
        line = lines.fill(rows)
        y = lines.convolve(line)
        if silu:
            y.mul_(sigmoid(y))
        lines.put(out[rows], y, rows)
        last_state[lines.states(rows)] = lines.last(line)
    return out, last_state


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
    """Gradients of x, weight, bias and initial_state, each in the shape and dtype of its input."""
    lines = _Lines(x, weight, bias, orders, initial_state, lengths, cu_seqlens, K)
    shared = x.shape[1] < K
    dx = torch.zeros(x.shape, dtype=lines.dtype, device=x.device) if shared else empty_gradient(x)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    dweight = torch.zeros(K, *weight.shape[1:], dtype=lines.dtype, device=x.device)
    dbias = torch.zeros(K, weight.shape[1], dtype=lines.dtype, device=x.device)
    for rows in lines.blocks():
        line = lines.fill(rows)
        grad_y = lines.take(grad_out[rows], rows)  # (b, K, M, E)
        if silu:
            grad_y = torch.ops.aten.silu_backward(grad_y, lines.convolve(line))
        dbias += grad_y.sum((0, 2))
        product = torch.empty_like(grad_y)  # one for all taps: fresh memory would cost more than the arithmetic
        for tap in range(lines.pad + 1):
            dweight[..., tap] += torch.mul(grad_y, lines.shifted(line, tap), out=product).sum((0, 2))
        grad_line = lines.spread(grad_y)
        if grad_last_state is not None:
            lines.add_last(grad_line, grad_last_state[lines.states(rows)])
        if dinitial is not None:
            dinitial[lines.states(rows)] = lines.first(grad_line)
        lines.put_gradient(dx[rows], grad_line, rows)
    dweight = dweight.sum(0, keepdim=True) if weight.shape[0] < K else dweight
    if bias is not None:
        dbias = (dbias.sum(0, keepdim=True) if bias.shape[0] < K else dbias).to(bias.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), None if bias is None else dbias, dinitial


class _Lines:
    """How tokens and states lie in the lines of a problem, and the passes over a line."""

    def __init__(self, x, weight, bias, orders, initial_state, lengths, cu_seqlens, K) -> None:
        self.x, self.K, self.initial_state, self.lengths = x, K, initial_state, lengths
        self.dtype = compute_dtype(x)
        self.pad = weight.shape[-1] - 1
        self.taps = [tap[:, None] for tap in weight.to(self.dtype).unbind(-1)]  # W x (1 or K, 1, E)
        self.bias = None if bias is None else bias.to(self.dtype)[:, None]  # (1 or K, 1, E)
        self.packed = cu_seqlens is not None
        self.sequences = cu_seqlens.shape[0] - 1 if self.packed else x.shape[0]
        self.results = x.shape[2] + (self.sequences - 1) * self.pad if self.packed else x.shape[2]
        self.orders = None if orders is None else orders.long()
        # One line serves all directions while nothing makes them differ.
        self.width = x.shape[1] if orders is None and initial_state is None and not self.packed else K
        if self.packed:
            self._lay_out(cu_seqlens.long())

    def _lay_out(self, borders: Tensor) -> None:
        """Places in the line of a packed batch: of the token visited at each step, of first and last states."""
        device, length = self.x.device, self.x.shape[2]
        if self.orders is None:
            self.orders = torch.arange(length, device=device).expand(self.K, length)
        sequence = torch.bucketize(self.orders, borders[1:], right=True)  # (K, L), whose turn it is at each step
        steps = torch.arange(length, device=device).expand_as(sequence)
        start = torch.full((self.K, self.sequences), length, device=device).scatter_reduce(1, sequence, steps, "amin")
        turn = torch.argsort(torch.argsort(start, dim=1, stable=True), dim=1)  # empty sequences come last
        begin = start + turn * self.pad  # (K, S)
        state = torch.arange(self.pad, device=device)
        self.tokens = steps + (turn.gather(1, sequence) + 1) * self.pad  # (K, L)
        self.firsts = (begin[..., None] + state).flatten(1)  # (K, S (W - 1))
        self.lasts = ((begin + borders.diff())[..., None] + state).flatten(1)

    def blocks(self) -> list[slice]:
        """Batch rows that are worked on together."""
        rows = max(1, _BLOCK_VALUES // (self.K * self.x.shape[2] * self.x.shape[3]))
        return [slice(b, b + rows) for b in range(0, self.x.shape[0], rows)]

    def states(self, rows: slice) -> slice:
        """Which states belong to a block: a packed batch is one block with all of them."""
        return slice(None) if self.packed else rows

    def invalid(self, rows: slice) -> Tensor | None:
        """Rows behind the lengths, (b, 1, L, 1)."""
        if self.lengths is None:
            return None
        index = torch.arange(self.x.shape[2], device=self.x.device)
        return (index >= self.lengths[rows, None])[:, None, :, None]

    def fill(self, rows: slice) -> Tensor:
        """The line of a block: states and tokens, (b, 1 or K, M + W - 1, E)."""
        x, invalid = self.x[rows], self.invalid(rows)
        if invalid is not None:
            x = x.masked_fill(invalid, 0.0)
        sizes = (x.shape[0], self.width, self.results + self.pad, x.shape[3])
        if not self.packed:
            line = torch.empty(sizes, dtype=self.dtype, device=x.device)
            line[:, :, : self.pad] = 0.0 if self.initial_state is None else self.initial_state[rows].transpose(2, 3)
            self._visit(x, line[:, :, self.pad :])
            return line
        line = torch.zeros(sizes, dtype=self.dtype, device=x.device)
        for k in range(self.K):
            tokens = x[0, min(k, x.shape[1] - 1)].index_select(0, self.orders[k])
            line[0, k].index_copy_(0, self.tokens[k], tokens.to(self.dtype))
            if self.initial_state is not None:
                line[0, k].index_copy_(0, self.firsts[k], self.initial_state[:, k].transpose(1, 2).flatten(0, 1))
        return line

    def _visit(self, x: Tensor, line: Tensor) -> None:
        """Copy (b, 1 or K, L, E) into a line in the order of the visits."""
        if self.orders is None:
            line.copy_(x)
            return
        for k, order in enumerate(self.orders):
            line[:, k] = x[:, min(k, x.shape[1] - 1)].index_select(1, order)

    def take(self, grad: Tensor, rows: slice) -> Tensor:
        """Gradients of the tokens' results (b, K, L, E) as gradients of the line's results, (b, K, M, E)."""
        invalid = self.invalid(rows)
        if invalid is not None:
            grad = grad.masked_fill(invalid, 0.0)
        if not self.packed and self.orders is None:
            return grad.to(self.dtype)
        make = torch.zeros if self.packed else torch.empty
        line = make(grad.shape[0], self.K, self.results, grad.shape[3], dtype=self.dtype, device=grad.device)
        if not self.packed:
            self._visit(grad, line)
            return line
        for k, order in enumerate(self.orders):
            line[0, k].index_copy_(0, self.tokens[k] - self.pad, grad[0, k].index_select(0, order).to(self.dtype))
        return line

    def shifted(self, line: Tensor, tap: int) -> Tensor:
        """The tokens that ``weight[..., tap]`` multiplies, (b, 1 or K, M, E)."""
        return line[:, :, tap : tap + self.results]

    def convolve(self, line: Tensor) -> Tensor:
        """Results before the activation, (b, K, M, E)."""
        line = line.expand(-1, self.K, -1, -1)
        y = self.shifted(line, self.pad) * self.taps[-1]
        for tap in range(self.pad):
            y.addcmul_(self.shifted(line, tap), self.taps[tap])
        return y if self.bias is None else y.add_(self.bias)

    def spread(self, grad: Tensor) -> Tensor:
        """Gradient of the line, (b, K, M + W - 1, E), from that of its results."""
        line = grad.new_empty(grad.shape[0], self.K, self.results + self.pad, grad.shape[3])
        torch.mul(grad, self.taps[-1], out=self.shifted(line, self.pad))
        line[:, :, : self.pad] = 0.0
        for tap, weight in enumerate(self.taps[:-1]):
            self.shifted(line, tap).addcmul_(grad, weight)
        return line

    def put(self, out: Tensor, y: Tensor, rows: slice) -> None:
        """Write results of the line into the tokens' rows of ``out`` (b, K, L, E)."""
        if self.orders is None:
            out.copy_(y)
        else:
            for k, order in enumerate(self.orders):
                results = y[:, k].index_select(1, self.tokens[k] - self.pad) if self.packed else y[:, k]
                out[:, k].index_copy_(1, order, results.to(out.dtype))
        invalid = self.invalid(rows)
        if invalid is not None:
            out.masked_fill_(invalid, 0.0)

    def put_gradient(self, dx: Tensor, line: Tensor, rows: slice) -> None:
        """Write the gradient of a line into the rows of ``dx`` (b, 1 or K, L, E), summed where directions share."""
        shared = dx.shape[1] < self.K
        if self.orders is None:
            tokens = line[:, :, self.pad :]
            dx.copy_(tokens.sum(1, keepdim=True) if shared else tokens)
        else:
            for k, order in enumerate(self.orders):
                tokens = line[:, k].index_select(1, self.tokens[k]) if self.packed else line[:, k, self.pad :]
                if shared:
                    dx[:, 0].index_add_(1, order, tokens)
                else:
                    dx[:, k].index_copy_(1, order, tokens.to(dx.dtype))
        invalid = self.invalid(rows)
        if invalid is not None:
            dx.masked_fill_(invalid, 0.0)

    def first(self, line: Tensor) -> Tensor:
        """The states before the first tokens, (b, K, E, W - 1)."""
        if not self.packed:
            return line[:, :, : self.pad].expand(-1, self.K, -1, -1).transpose(2, 3)
        return self._packed_states(line, self.firsts)

    def last(self, line: Tensor) -> Tensor:
        """The states after the last tokens, (b, K, E, W - 1)."""
        if not self.packed:
            return line[:, :, self.results :].expand(-1, self.K, -1, -1).transpose(2, 3)
        return self._packed_states(line, self.lasts)

    def _packed_states(self, line: Tensor, places: Tensor) -> Tensor:
        states = [
            row.index_select(0, index).view(self.sequences, self.pad, line.shape[3])
            for row, index in zip(line[0], places)
        ]
        return torch.stack(states, dim=1).transpose(2, 3)  # (S, K, E, W - 1)

    def add_last(self, line: Tensor, grad: Tensor) -> None:
        """Add gradients of the last states, (b, K, E, W - 1), to the gradient of a line."""
        if not self.packed:
            line[:, :, self.results :] += grad.transpose(2, 3)
            return
        for k, index in enumerate(self.lasts):
            line[0, k].index_add_(0, index, grad[:, k].transpose(1, 2).flatten(0, 1))
