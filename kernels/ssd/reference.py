"""The definition of the Mamba-2 scan: one plain loop over time that every faster path must equal.

No speed tricks. Differentiable by autograd to any order; the state is float32, or float64 for float64 inputs.
Arguments are the canonical ones of the op (see `genssm.kernels.ssd`): every tensor carries its direction dimension, of
size 1 where all directions share it.

    Bt batch, K directions, L tokens, H heads, P channels of a head, G groups of heads, N state, S sequences (Bt, or the
    packed ones)
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), and x itself above 20, where both are the same number in float32."""
    return F.softplus(x, beta=1.0, threshold=20.0)


def ssd_reference(
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
) -> tuple[Tensor, Tensor]:
    """Scan along every direction.

    Args:
        x: inputs, (Bt, 1 or K, L, H, P).
        dt: step sizes before bias and softplus, (Bt, 1 or K, L, H).
        A: decay rates, (1 or K, H).
        B, C: input and output maps, (Bt, 1 or K, L, G, N).
        D: skip, (1 or K, H), or None.
        z: gate, (Bt, 1 or K, L, H, P), or None.
        dt_bias: (1 or K, H), or None.
        dt_softplus: apply softplus to ``dt + dt_bias``.
        orders: (K, L) integer permutations, or None for first to last in every direction.
        initial_state: (S, K, H, P, N), or None for zeros.
        lengths: (Bt,) number of valid rows of each batch row, or None.
        cu_seqlens: (S + 1,) borders of the sequences packed into a batch of 1, or None.
        reduce_sum: sum the directions.
    Returns:
        The result in the dtype of ``x``, (Bt, L, H, P) or (Bt, K, L, H, P), and the last state (S, K, H, P, N).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, length, heads, width = x.shape
    directions = directions_of(orders, x, dt, A, B, C, D, z, dt_bias)
    valid = None
    if lengths is not None:
        valid = torch.arange(length, device=x.device) < lengths[:, None]  # (Bt, L)
    results, states = [], []
    for k in range(directions):
        order = torch.arange(length, device=x.device) if orders is None else orders[k].long()
        x_k, dt_k, B_k, C_k = (_pick(y, k, dtype) for y in (x, dt, B, C))
        A_k, D_k, z_k, bias_k = (_pick(y, k, dtype, dim=d) for y, d in ((A, 0), (D, 0), (z, 1), (dt_bias, 0)))
        if valid is not None:  # before anything else, so that whatever the padding holds never meets a gradient
            x_k, dt_k, B_k, C_k, z_k = (_clear(y, valid) for y in (x_k, dt_k, B_k, C_k, z_k))
        if bias_k is not None:
            dt_k = dt_k + bias_k
        if dt_softplus:
            dt_k = softplus(dt_k)
        if valid is not None:  # a zero step leaves the state as it is
            dt_k = _clear(dt_k, valid)
        start = None if initial_state is None else initial_state[:, k].to(dtype)
        rows, outputs, last = [], [], []
        for s, segment in enumerate(_segments(order, cu_seqlens)):
            h = x_k.new_zeros(batch, heads, width, B.shape[-1])
            if start is not None:
                h = start if cu_seqlens is None else start[s : s + 1]
            y, h = _loop(h, *(t[:, segment] for t in (x_k, dt_k, B_k, C_k)), A_k)
            rows.append(segment)
            outputs.append(y)
            last.append(h)
        y = torch.cat(outputs, dim=1)[:, torch.argsort(torch.cat(rows))]  # (Bt, L, H, P), in the rows of the tokens
        if D_k is not None:
            y = y + D_k[:, None] * x_k
        if z_k is not None:
            y = y * F.silu(z_k)
        results.append(y)
        states.append(torch.cat(last))  # (S, H, P, N)
    out = torch.stack(results, dim=1)  # (Bt, K, L, H, P)
    if reduce_sum:
        out = out.sum(dim=1)
    return out.to(x.dtype), torch.stack(states, dim=1)


def _loop(h: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t' and y_t = h_t C_t over all rows of (Bt, T, H, P)."""
    y = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(dt_t * A)[..., None, None]
        h = decay * h + (dt_t[..., None] * x_t)[..., None] * _per_head(B_t, x)
        y.append((h * _per_head(C_t, x)).sum(dim=-1))
    return (torch.stack(y, dim=1) if y else x), h


def _per_head(x: Tensor, like: Tensor) -> Tensor:
    """(Bt, G, N) -> (Bt, H, 1, N): head h belongs to group h // (H / G)."""
    return x.repeat_interleave(like.shape[2] // x.shape[1], dim=1).unsqueeze(2)


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


def directions_of(orders, x, dt, A, B, C, D, z, dt_bias) -> int:
    """Number of directions of canonical arguments."""
    if orders is not None:
        return orders.shape[0]
    with_batch = (y.shape[1] for y in (x, dt, B, C, z) if y is not None)
    return max(*with_batch, *(y.shape[0] for y in (A, D, dt_bias) if y is not None))
