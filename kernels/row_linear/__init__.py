"""A linear map of few rows: decoding, where reading the weights is all the work. See README.md here."""

import torch
from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.row_linear import op as _op
from genssm.kernels.row_linear.reference import linear_reference
from genssm.kernels.triton_launch import overlaps

__all__ = ["row_linear"]

_NAME = "row_linear"
MOST = 32  # rows that are few


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Return x W' + b.

    Not differentiable by Triton. The launch right before this one must not write the weights: they may be read while
    it still runs. Letters: R rows, K channels in, N channels out.

    Args:
        x: (R, K), any float type.
        weight: W, (N, K), dtype of ``x``.
        bias: b, (N,), or None.
        backend: "auto", "triton", or any other of `genssm.kernels.dispatch`, which all mean PyTorch here. "auto" takes
            Triton for up to 32 rows in half precision on devices where it can read the weights ahead of the rows.
    Returns:
        (R, N), dtype of ``x``.
    Raises:
        ValueError: shapes disagree; the message names both.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{_NAME}: x is {arguments.shape(x)} and weight {arguments.shape(weight)}, expected (R, K)"
                         " and (N, K)")  # fmt: skip
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{_NAME}: bias is {arguments.shape(bias)}, expected ({weight.shape[0]},)")
    if backend == "auto" and not _suits(x, weight):
        return linear_reference(x, weight, bias)
    if dispatch.resolve(_NAME, backend, x) == "triton":
        return _op.linear(x, weight, bias)
    return linear_reference(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return half and x.shape[0] <= MOST and overlaps(x.device)
