"""Causal depthwise convolution along K orders in one call. See README.md here for the derivation and measurements."""

from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.causal_conv1d import op as _op
from genssm.kernels.causal_conv1d.reference import conv_reference
from genssm.kernels.causal_conv1d.step import causal_conv1d_step

__all__ = ["causal_conv1d", "causal_conv1d_step"]

_NAME = "causal_conv1d"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    orders: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution along K orders of the tokens.

        y_i = activation(bias + sum_j weight[W - 1 - j] x_{i - j}),   j = 0 .. W - 1,   i counts the steps of the order

    Every y_i stands in the row of its own token, order[i]. Letters: Bt batch, K directions, L >= 1 tokens, E channels,
    1 <= W <= 8 taps, S sequences (Bt, or the packed ones). Any strides are taken without a copy.

    Args:
        x: inputs, (Bt, L, E) or (Bt, K, L, E), float32/bfloat16/float16, or float64 for tests.
        weight: taps, (E, W) or (K, E, W); the last one multiplies the current token.
        bias: (E,) or (K, E).
        activation: None or "silu".
        orders: permutations of 0..L-1, (K, L) or (L,), integers; order[i] is the row visited at step i. None means
            first to last. Keep them as int32 on the device of ``x``. Their values are checked on the CPU only.
        initial_state: the W - 1 tokens before the first visited one, oldest first, (S, K, E, W - 1), float32; None
            means zeros.
        return_last_state: also return the last W - 1 visited tokens.
        lengths: valid rows of each batch row, (Bt,), integers. The rows from there on count as zeros wherever they are
            visited, and their outputs and gradients are zero.
        cu_seqlens: borders 0, ..., L of sequences packed into a batch of 1, (S + 1,), integers. Every order must visit
            each sequence in one go; nothing reaches over a border. Not together with ``lengths``.
        backend: "auto", "reference", "chunked", "compiled" or "triton"; see `genssm.kernels.dispatch`. Only
            "reference" can be differentiated twice.
    Returns:
        y, dtype of ``x``: (Bt, L, E) where no argument has a K dimension, (Bt, K, L, E) otherwise, one direction after
        the other in memory ("reference" aside): ``y.transpose(0, 1)`` is contiguous. With ``return_last_state`` also
        (S, K, E, W - 1), oldest first, float32 (float64 for float64 ``x``).
    Raises:
        ValueError: shapes, devices or values disagree, or the backend cannot run here; the message names both sides.

    Example:
        >>> x, weight = torch.randn(2, 16, 8), torch.randn(8, 4)
        >>> causal_conv1d(x, weight, activation="silu").shape
        torch.Size([2, 16, 8])
    """
    if activation not in (None, "silu"):
        raise ValueError(f"{_NAME}: activation is {activation!r}, expected None or 'silu'")
    given = (x, weight, bias, orders)
    plain = all(a is None or a.ndim == b for a, b in zip(given, (3, 2, 1, 1)))
    x_, weight, bias, *rest, directions = _canonical(*given, initial_state, lengths, cu_seqlens)
    args = (x_, weight, bias, activation == "silu", *rest, directions)
    chosen = dispatch.resolve(_NAME, backend, x)
    y, last_state = conv_reference(*args) if chosen == "reference" else _op.conv(*args, chosen)
    y = y.squeeze(1) if plain and directions == 1 else y
    return (y, last_state) if return_last_state else y


def _canonical(x, weight, bias, orders, initial_state, lengths, cu_seqlens) -> tuple:
    """Check everything and give every tensor its direction dimension, by views only."""
    if x.ndim not in (3, 4) or not x.dtype.is_floating_point or 0 in x.shape[1:]:
        raise ValueError(
            f"{_NAME}: x is {arguments.shape(x)} {x.dtype}, expected floats (Bt, L, E) or (Bt, K, L, E), L >= 1"
        )
    if weight.ndim not in (2, 3) or not 1 <= weight.shape[-1] <= 8:
        raise ValueError(
            f"{_NAME}: weight is {arguments.shape(weight)}, expected (E, W) or (K, E, W) with W from 1 to 8"
        )
    batch, length, channels, taps = x.shape[0], x.shape[-2], x.shape[-1], weight.shape[-1]
    arguments.check_devices(_NAME, x.device, {"weight": weight, "bias": bias, "initial_state": initial_state})
    dtype = arguments.compute_dtype(x)
    x = arguments.with_directions(_NAME, "x", x, 1, (batch, length, channels))
    weight = arguments.with_directions(_NAME, "weight", weight, 0, (channels, taps))
    if bias is not None:
        bias = arguments.with_directions(_NAME, "bias", bias, 0, (channels,))
    orders = arguments.canonical_orders(_NAME, orders, length, x.device)
    lengths, cu_seqlens, sequences = arguments.canonical_lengths(_NAME, lengths, cu_seqlens, batch, x.device)

    sizes = {"x": x.shape[1], "weight": weight.shape[0]}
    sizes.update({name: y.shape[0] for name, y in (("bias", bias), ("orders", orders)) if y is not None})
    if initial_state is not None and initial_state.ndim == 4:
        sizes["initial_state"] = initial_state.shape[1]
    directions = arguments.common_directions(_NAME, sizes)
    if orders is not None and orders.shape[0] != directions:
        orders = orders.expand(directions, length).contiguous()
    if initial_state is not None:
        expected = (sequences, directions, channels, taps - 1)
        if initial_state.shape != expected:
            raise ValueError(f"{_NAME}: initial_state is {arguments.shape(initial_state)}, expected {expected}")
        initial_state = initial_state.to(dtype)
    return x, weight, bias, orders, initial_state, lengths, cu_seqlens, directions
