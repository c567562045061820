"""Guidance, temperature and the draw in PyTorch: the definition."""

import torch
from torch import Tensor


def draw_reference(
    logits: Tensor,
    uniform: Tensor,
    scales: Tensor | None,
    position: Tensor,
    codes: Tensor,
    previous: Tensor,
    temperature: float,
) -> None:
    """Arguments as of `draw_token`."""
    logits = logits.float()
    if scales is not None:
        conditional, null = logits.chunk(2)
        logits = null + scales.index_select(0, position) * (conditional - null)
    probabilities = (logits / temperature).softmax(dim=-1)
    drawn = invert_cdf(probabilities, uniform.index_select(1, position)[:, 0])
    put_token(drawn, position, codes, previous)


def put_token(drawn: Tensor, position: Tensor, codes: Tensor, previous: Tensor) -> None:
    """Put tokens (B,) into column ``position`` of ``codes`` and into ``previous``, as `draw_token` does."""
    codes.index_copy_(1, position, drawn[:, None])
    previous.copy_(drawn.repeat(previous.shape[0] // drawn.shape[0])[:, None])


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
