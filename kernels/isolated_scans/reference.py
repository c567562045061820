"""Isolated scans composed of the operators they consist of: the definition, differentiable."""

import torch
from torch import Tensor

from genssm.kernels import arguments
from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.selective_scan import selective_scan


def scans_reference(
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
    reduce: str = "sum",
    backend: str = "reference",
    **over: Tensor | None,
) -> Tensor:
    """Arguments and result as of `isolated_scans`; ``over`` are its orders, lengths and cu_seqlens."""
    dtype, states = arguments.compute_dtype(A_log), A_log.shape[-1]
    c = causal_conv1d(x, conv_weight, conv_bias, activation="silu", backend=backend, **over)  # (Bt, K, L, E)
    projected = _grouped_linear(c, x_proj)
    dt, B, C = projected.split([dt_proj.shape[-1], states, states], dim=-1)  # (Bt, K, L, R), (Bt, K, L, N) twice
    return selective_scan(
        c, _grouped_linear(dt, dt_proj), -A_log.to(dtype).exp(), B, C, D.to(dtype), z,
        delta_bias=dt_bias.to(dtype), delta_softplus=True, reduce=reduce, backend=backend, **over,
    )  # fmt: skip


def _grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """K linear maps side by side, (Bt, K, L, in) with weights (K, out, in), in the dtype of the weights."""
    return torch.einsum("bkli,koi->bklo", x.to(weight.dtype), weight)
