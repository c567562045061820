"""Elementwise functions for the pure PyTorch paths, whose result at an element does not depend on where it lies.

PyTorch's own sigmoid, silu and softplus use another exponential for the last few elements of each thread's share on
the CPU. A token's value would then depend, in its last bit, on the batch it came in and on the number of threads.
``exp`` and ``log1p`` do not have that seam.
"""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return torch.neg(x).exp_().add_(1.0).reciprocal_()


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), and x itself above 20."""
    return torch.where(x > 20.0, x, torch.exp(x).log1p_())
