"""The definition of the causal depthwise convolution along an order: one plain loop over time.

No speed tricks. Differentiable by autograd to any order; sums are float32, or float64 for float64 inputs.
Arguments are the canonical ones of the op (see `genssm.kernels.causal_conv1d`).

    Bt batch, K directions, L tokens, E channels, W taps, S sequences (Bt, or the packed ones)
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_reference(
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
    """Convolve along every direction.

    Args:
        x: inputs, (Bt, 1 or K, L, E).
        weight: taps, (1 or K, E, W); the last one multiplies the current token.
        bias: (1 or K, E), or None.
        silu: apply x * sigmoid(x) to the result.
        orders: (K, L) integer permutations, or None for first to last in every direction.
        initial_state: the W - 1 tokens before the first, oldest first, (S, K, E, W - 1), or None for zeros.
        lengths: (Bt,) number of valid rows of each batch row, or None; the other rows count as zeros.
        cu_seqlens: (S + 1,) borders of the sequences packed into a batch of 1, or None.
        K: number of directions.
    Returns:
        The result in the dtype of ``x``, (Bt, K, L, E), and the last W - 1 tokens visited, (S, K, E, W - 1), float32
        (float64 for float64 inputs).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, length, channels = x.shape
    taps = weight.shape[-1]
    results, states = [], []
    for k in range(K):
        order = torch.arange(length, device=x.device) if orders is None else orders[k].long()
        x_k = x[:, min(k, x.shape[1] - 1)].to(dtype)
        w_k = weight[min(k, weight.shape[0] - 1)].to(dtype)
        if lengths is not None:
            valid = (torch.arange(length, device=x.device) < lengths[:, None])[..., None]  # (Bt, L, 1)
            x_k = x_k.masked_fill(~valid, 0.0)
        rows, outputs, last = [], [], []
        for s, segment in enumerate(_segments(order, cu_seqlens)):
            window = [x_k.new_zeros(batch, channels)] * (taps - 1)
            if initial_state is not None:
                start = initial_state[:, k].to(dtype)  # (S, E, W - 1)
                window = list((start if cu_seqlens is None else start[s : s + 1]).unbind(-1))
            y = []
            for x_t in x_k[:, segment].unbind(1):
                window = [*window, x_t]
                y.append(sum(w * value for w, value in zip(w_k.unbind(-1), window)))
                window = window[1:]
            rows.append(segment)
            outputs.append(torch.stack(y, dim=1) if y else x_k[:, :0])
            last.append(torch.stack(window, dim=-1) if window else x_k[:, :0].transpose(1, 2))
        y = torch.cat(outputs, dim=1)[:, torch.argsort(torch.cat(rows))]  # (Bt, L, E), in the rows of the tokens
        if bias is not None:
            y = y + bias[min(k, bias.shape[0] - 1)].to(dtype)
        if silu:
            y = F.silu(y)
        if lengths is not None:
            y = y.masked_fill(~valid, 0.0)
        results.append(y)
        states.append(torch.cat(last))  # (S, E, W - 1)
    return torch.stack(results, dim=1).to(x.dtype), torch.stack(states, dim=1)


def _segments(order: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The rows visited in each sequence, in the order of the visits."""
    if cu_seqlens is None:
        return [order]
    borders = cu_seqlens.tolist()
    return [order[(order >= low) & (order < high)] for low, high in itertools.pairwise(borders)]
