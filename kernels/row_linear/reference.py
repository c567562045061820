"""A linear map in PyTorch: the definition, and the path of every device and size that Triton is not for."""

import torch.nn.functional as F
from torch import Tensor


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments and result as of `row_linear`."""
    return F.linear(x, weight, bias)
