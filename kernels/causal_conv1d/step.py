"""One token of the causal convolution, for decoding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from genssm.kernels import arguments

_NAME = "causal_conv1d_step"


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Advance the causal convolution by one token; equal to `causal_conv1d` token by token.

    Args:
        state: the W - 1 previous tokens, oldest first, (Bt, K, E, W - 1), as `causal_conv1d` returns it; updated in
            place.
        x: input, (Bt, E) or (Bt, K, E).
        weight: taps, (E, W) or (K, E, W); the last one multiplies ``x``.
        bias: (E,) or (K, E).
        activation: None or "silu".
    Returns:
        (Bt, E) where neither ``x`` nor ``weight`` nor ``bias`` has a K dimension and the state has one direction,
        (Bt, K, E) otherwise; dtype of ``x``.
    Raises:
        ValueError: shapes disagree; the message names both.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"{_NAME}: activation is {activation!r}, expected None or 'silu'")
    if state.ndim != 4 or state.shape[-1] != weight.shape[-1] - 1:
        expected = f"(Bt, K, E, {weight.shape[-1] - 1})"
        raise ValueError(f"{_NAME}: state is {arguments.shape(state)}, expected {expected} for {weight.shape[-1]} taps")
    batch, directions, channels, _ = state.shape
    plain = directions == 1 and x.ndim == 2 and weight.ndim == 2 and (bias is None or bias.ndim == 1)
    dtype = arguments.compute_dtype(x)
    x_ = arguments.with_directions(_NAME, "x", x, 1, (batch, channels)).to(dtype)
    weight = arguments.with_directions(_NAME, "weight", weight, 0, (channels, weight.shape[-1])).to(dtype)
    sizes = {"x": x_.shape[1], "weight": weight.shape[0]}
    if bias is not None:
        bias = arguments.with_directions(_NAME, "bias", bias, 0, (channels,)).to(dtype)
        sizes["bias"] = bias.shape[0]
    arguments.state_directions(_NAME, sizes, directions)
    current = x_.expand(batch, directions, channels)[..., None]
    window = torch.cat([state.to(dtype), current], dim=-1)  # (Bt, K, E, W)
    state.copy_(window[..., 1:])
    y = (window * weight).sum(dim=-1)
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = F.silu(y)
    return (y.squeeze(1) if plain else y).to(x.dtype)
