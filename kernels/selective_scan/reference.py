"""The definition of the selective scan: one plain loop over time that every faster path must equal.

No speed tricks. Differentiable by autograd to any order; the state is float32, or float64 for float64 inputs.
Arguments are the canonical ones of the op (see `genssm.kernels.selective_scan`): every tensor carries its direction
dimension, of size 1 where all directions share it.

    Bt batch, K directions, L tokens, E channels, N state, G channel groups, S sequences (Bt, or the packed ones)
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), and x itself above 20, where both are the same number in float32."""
    return F.softplus(x, beta=1.0, threshold=20.0)


def scan_reference(
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
) -> tuple[Tensor, Tensor]:
    """Scan along every direction.

    Args:
        u: inputs, (Bt, 1 or K, L, E).
        delta: step sizes before bias and softplus, (Bt, 1 or K, L, E).
        A: state matrix, (1 or K, E, N).
        B, C: input and output maps, (Bt, 1 or K, L, G, N).
        D: skip, (1 or K, E), or None.
        z: gate, (Bt, 1 or K, L, E), or None.
        delta_bias: (1 or K, E), or None.
        delta_softplus: apply softplus to ``delta + delta_bias``.
        orders: (K, L) integer permutations, or None for first to last in every direction.
        initial_state: (S, K, E, N), or None for zeros.
        lengths: (Bt,) number of valid rows of each batch row, or None.
        cu_seqlens: (S + 1,) borders of the sequences packed into a batch of 1, or None.
        reduce_sum: sum the directions.
    Returns:
        The result in the dtype of ``u``, (Bt, L, E) or (Bt, K, L, E), and the last state (S, K, E, N).
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, _, length, _ = u.shape
    directions = directions_of(orders, u, delta, A, B, C, D, z, delta_bias)
    valid = None
    if lengths is not None:
        valid = torch.arange(length, device=u.device) < lengths[:, None]  # (Bt, L)
    results, states = [], []
    for k in range(directions):
        order = torch.arange(length, device=u.device) if orders is None else orders[k].long()
        u_k, delta_k, B_k, C_k = (_pick(x, k, dtype) for x in (u, delta, B, C))
        A_k, D_k, z_k, bias_k = (_pick(x, k, dtype, dim=d) for x, d in ((A, 0), (D, 0), (z, 1), (delta_bias, 0)))
        if valid is not None:  # before anything else, so that whatever the padding holds never meets a gradient
            u_k, delta_k, B_k, C_k, z_k = (_clear(x, valid) for x in (u_k, delta_k, B_k, C_k, z_k))
        if bias_k is not None:
            delta_k = delta_k + bias_k
        if delta_softplus:
            delta_k = softplus(delta_k)
        if valid is not None:  # a zero step leaves the state as it is
            delta_k = _clear(delta_k, valid)
        start = None if initial_state is None else initial_state[:, k].to(dtype)
        rows, outputs, last = [], [], []
        for s, segment in enumerate(_segments(order, cu_seqlens)):
            h = u_k.new_zeros(batch, u.shape[-1], A.shape[-1])
            if start is not None:
                h = start if cu_seqlens is None else start[s : s + 1]
            y, h = _loop(h, *(x[:, segment] for x in (u_k, delta_k, B_k, C_k)), A_k)
            rows.append(segment)
            outputs.append(y)
            last.append(h)
        y = torch.cat(outputs, dim=1)[:, torch.argsort(torch.cat(rows))]  # (Bt, L, E), in the rows of the tokens
        if D_k is not None:
            y = y + D_k * u_k
        if z_k is not None:
            y = y * F.silu(z_k)
        results.append(y)
        states.append(torch.cat(last))  # (S, E, N)
    out = torch.stack(results, dim=1)  # (Bt, K, L, E)
    if reduce_sum:
        out = out.sum(dim=1)
    return out.to(u.dtype), torch.stack(states, dim=1)


def _loop(h: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = C_t h_t over all rows of (Bt, T, E)."""
    y = []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * _per_channel(B_t, u)
        y.append((h * _per_channel(C_t, u)).sum(dim=-1))
    return (torch.stack(y, dim=1) if y else u), h


def _per_channel(x: Tensor, u: Tensor) -> Tensor:
    """(Bt, G, N) -> (Bt, E, N): channel e belongs to group e // (E / G)."""
    return x.repeat_interleave(u.shape[-1] // x.shape[1], dim=1)


def _segments(order: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The rows visited in each sequence, in the order of the visits."""
    if cu_seqlens is None:
        return [order]
    borders = cu_seqlens.tolist()
    return [order[(order >= low) & (order < high)] for low, high in itertools.pairwise(borders)]


def _pick(x: Tensor | None, k: int, dtype: torch.dtype, dim: int = 1) -> Tensor | None:
    """Direction k of a tensor whose direction dimension may be shared."""
    return None if x is None else x.select(dim, min(k, x.shape[dim] - 1)).to(dtype)


def _clear(x: Tensor | None, valid: Tensor) -> Tensor | None:
    """Zero in the rows (Bt, L) that are not valid."""
    return None if x is None else x.masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 2)), 0.0)


def directions_of(orders, u, delta, A, B, C, D, z, delta_bias) -> int:
    """Number of directions of canonical arguments."""
    if orders is not None:
        return orders.shape[0]
    with_batch = (x.shape[1] for x in (u, delta, B, C, z) if x is not None)
    return max(*with_batch, *(x.shape[0] for x in (A, D, delta_bias) if x is not None))
