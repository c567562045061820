"""Guidance, temperature and the draw in PyTorch: the definition."""

import torch
from torch import Tensor


def draw_reference(logits: Tensor, uniform: Tensor, scale: Tensor | None, temperature: float) -> Tensor:
    """Arguments and result as of `draw_token`."""
    logits = logits.float()
    if scale is not None:
        conditional, null = logits.chunk(2)
        logits = null + scale * (conditional - null)
    return invert_cdf((logits / temperature).softmax(dim=-1), uniform)


def invert_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw from distributions with given random numbers: the first token whose cumulative probability exceeds them.

    One number per token, so an image's draws depend on its own generator alone, and a captured graph draws anew each
    time it is replayed.

    Args:
        probabilities: (B, V).
        uniform: (B,) in [0, 1).
    Returns:
        (B,), int64; never a token of probability 0.
    """
    # Among thousands of tokens float32 sums would move the borders of unlikely ones.
    exact = torch.float32 if probabilities.device.type == "mps" else torch.float64
    cumulative = probabilities.to(exact).cumsum(dim=-1)
    below = cumulative <= uniform.to(exact)[:, None] * cumulative[:, -1:]
    return below.sum(dim=-1).clamp(max=probabilities.shape[-1] - 1)
