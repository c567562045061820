"""Residual update, norm and modulation composed in PyTorch: the definition, and the path of the CPU and of float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from genssm.kernels import arguments


def add_norm_reference(
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    add_normed: bool,
    layer: bool,
    eps: float,
    dtype: torch.dtype | None,
    normed: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """h, y and n; arguments as of `add_norm`. n costs nothing here, whether it is asked for or not."""
    if x is not None:
        h = h + (x if gate is None else gate * x)
    wide = arguments.compute_dtype(h)
    w, b = (None if p is None else p.to(arguments.compute_dtype(p)) for p in (weight, bias))
    size = h.shape[-1:]
    n = F.layer_norm(h.to(wide), size, w, b, eps) if layer else F.rms_norm(h.to(wide), size, w, eps)
    n = n.to(h.dtype if weight is None else weight.dtype)
    y = n if scale is None else n * (1 + scale) + shift
    if add_normed:
        h = h + (n if factor is None else factor * n)
    return h, y if dtype is None else y.to(dtype), n
