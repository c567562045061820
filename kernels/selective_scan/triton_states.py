"""More states than the kernels in shared memory hold: the backward pass with the states in parts.

A result is the sum of what its states give. So a direction of N states is P directions along one order, of N / P states
each, which share everything but A, B, C, their states and checkpoints, and add up. All of these are views of what there
is. D belongs to the first part alone. Where P does not divide N, zeros fill the last part.

A direction is a call of its own: its parts may then share its inputs, whether directions share them or not.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

_MOST = 16  # states of a part


def part_states(states: int) -> int:
    """States of each of the fewest equal parts, 9 to 16 of more than 16."""
    return -(-states // -(-states // _MOST))


def backward_in_parts(
    backward: Callable[..., tuple[Tensor | None, ...]],
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
    """Gradients as of ``backward``, which is `triton_scan.scan_backward`, from calls of it with at most 16 states."""
    directions, states = saved.shape[1], A.shape[-1]
    size = part_states(states)
    parts = -(-states // size)

    def of_parts(x: Tensor, dim: int) -> Tensor:
        """States along ``dim`` as (parts, states)."""
        missing = parts * size - states
        if missing:
            x = pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
        return x.unflatten(dim, (parts, size))

    per_direction = []
    for k in range(directions):
        one = [None if x is None else _of(x, k, 1) for x in (u, delta, z)]
        a, d, bias = (None if x is None else _of(x, k, 0) for x in (A, D, delta_bias))
        b, c = (of_parts(_of(x, k, 1)[:, 0], 3).permute(0, 3, 1, 2, 4) for x in (B, C))  # (Bt, P, L, G, N / P)
        last, initial = (
            None if x is None else of_parts(x[:, k], 2).transpose(1, 2) for x in (grad_last_state, initial_state)
        )
        found = backward(
            grad_out if reduce_sum else grad_out[:, k],
            last,
            of_parts(saved[:, k], 2).transpose(1, 2),
            one[0],
            one[1],
            of_parts(a[0], 1).transpose(0, 1),
            b,
            c,
            None if d is None else pad(d, (0, 0, 0, parts - 1)),
            one[2],
            bias,
            delta_softplus,
            None if orders is None else orders[k].expand(parts, -1).contiguous(),
            initial,
            lengths,
            cu_seqlens,
            True,
        )
        du, ddelta, da, db, dc, dd, dz, dbias, dinitial = found
        da = da.transpose(0, 1).flatten(1)[None, :, :states]
        db, dc = (x.permute(0, 2, 3, 1, 4).flatten(3)[:, None, ..., :states] for x in (db, dc))
        dd = None if dd is None else dd[:1]
        if dinitial is not None:
            dinitial = dinitial.transpose(1, 2).flatten(2)[:, None, :, :states]
        per_direction.append((du, ddelta, da, db, dc, dd, dz, dbias, dinitial))
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    along = (1, 1, 0, 1, 1, 0, 1, 0, 1)  # where directions are
    return tuple(_together(found, x, dim) for *found, x, dim in zip(*per_direction, inputs, along))


def _of(x: Tensor, k: int, dim: int) -> Tensor:
    """Direction k alone."""
    return x if x.shape[dim] == 1 else x.narrow(dim, k, 1)


def _together(found: list[Tensor | None], x: Tensor | None, dim: int) -> Tensor | None:
    """The gradient of ``x`` from those of all directions: side by side, or added up where they share it."""
    if x is None:
        return None
    gradient = found[0] if len(found) == 1 else torch.cat(found, dim)
    return gradient if gradient.shape == x.shape else gradient.sum(dim, keepdim=True, dtype=torch.float32).to(x.dtype)
