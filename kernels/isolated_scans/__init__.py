"""K isolated Mamba-1 scans of one input, from their convolutions to the sum of their results. See README.md here."""

from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.isolated_scans import op as _op
from genssm.kernels.isolated_scans.reference import scans_reference

__all__ = ["isolated_scans"]

_NAME = "isolated_scans"


def isolated_scans(
    x: Tensor,
    z: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    orders: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduce: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """Several Mamba-1 scans of the same tokens, each with parameters of its own.

        c_i = silu(conv_i(x)),   [r, B, C]_i = W^x_i c_i,   delta_i = softplus(W^dt_i r_i + bias_i)
        y = sum_i scan(c_i, delta_i, -exp(A_log_i), B_i, C_i, D_i) * silu(z)

    Differentiable. Letters: Bt batch, L tokens, K scans, E channels, W taps, R rank of the step, N state. On a device
    of Triton's, without gradients and with few tokens, all of it is two launches; else it is composed of
    `causal_conv1d`, matrix products and `selective_scan`.

    Args:
        x: inputs, (Bt, L, E).
        z: gate, (Bt, L, E); None leaves it out.
        conv_weight: taps, (K, E, W); the last one multiplies the current token.
        conv_bias: (K, E) or None.
        x_proj: W^x, (K, R + 2 N, E).
        dt_proj: W^dt, (K, E, R).
        dt_bias: (K, E).
        A_log: (K, E, N).
        D: skip, (K, E).
        orders, lengths, cu_seqlens, reduce: as of `genssm.kernels.selective_scan.selective_scan`.
        backend: "auto" or one of `genssm.kernels.dispatch`, for all parts.
    Returns:
        (Bt, L, E), or (Bt, K, L, E) with ``reduce="none"``; dtype of ``x``.
    Raises:
        ValueError: shapes or devices disagree, or the backend cannot run here; the message names both sides.

    Example:
        >>> x, taps, x_proj, dt_proj = (torch.randn(s) for s in ((2, 8, 4), (3, 4, 4), (3, 5, 4), (3, 4, 1)))
        >>> dt_bias, A_log, D = torch.zeros(3, 4), torch.zeros(3, 4, 2), torch.ones(3, 4)
        >>> isolated_scans(x, None, taps, None, x_proj, dt_proj, dt_bias, A_log, D).shape
        torch.Size([2, 8, 4])
    """
    tensors = (x, z, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D)
    _check(*tensors)
    plain = lengths is None and cu_seqlens is None and reduce == "sum" and _one_type(*tensors[:6])
    directions, _, states = A_log.shape
    sizes = directions, states, dt_proj.shape[-1]
    if plain and dispatch.resolve(_NAME, backend, x) == "triton" and _op.fits(x, tensors[1:], *sizes):
        orders = arguments.canonical_orders(_NAME, orders, x.shape[1], x.device)
        if orders is not None:
            orders = orders.expand(directions, -1).contiguous()
        return _op.fused(*tensors, orders)
    over = {"orders": orders, "lengths": lengths, "cu_seqlens": cu_seqlens}
    return scans_reference(*tensors, reduce=reduce, backend=backend, **over)


def _check(x, z, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D) -> None:
    if x.ndim != 3 or A_log.ndim != 3 or dt_proj.ndim != 3:
        raise ValueError(
            f"{_NAME}: x is {arguments.shape(x)}, dt_proj {arguments.shape(dt_proj)}, A_log {arguments.shape(A_log)}; "
            "expected (Bt, L, E), (K, E, R) and (K, E, N)"
        )
    (directions, channels, states), rank = A_log.shape, dt_proj.shape[-1]
    expected = {
        "x": (x, (*x.shape[:2], channels)),
        "z": (z, x.shape),
        "conv_weight": (conv_weight, (directions, channels, conv_weight.shape[-1])),
        "conv_bias": (conv_bias, (directions, channels)),
        "x_proj": (x_proj, (directions, rank + 2 * states, channels)),
        "dt_proj": (dt_proj, (directions, channels, rank)),
        "dt_bias": (dt_bias, (directions, channels)),
        "D": (D, (directions, channels)),
    }
    arguments.check_devices(_NAME, x.device, {"A_log": A_log} | {name: given for name, (given, _) in expected.items()})
    for name, (given, shape) in expected.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{_NAME}: {name} is {arguments.shape(given)}, expected {tuple(shape)}")


def _one_type(x: Tensor, *others: Tensor | None) -> bool:
    return all(t is None or t.dtype == x.dtype for t in others)
