"""From logits to tokens: temperature, top-k, nucleus, and a draw that a captured graph can repeat."""

from dataclasses import dataclass

import torch

from genssm.kernels.draw_token import draw_token

# B images, V vocabulary, T tokens of an image


@dataclass(frozen=True)
class TokenSampling:
    """How a token is drawn from its logits.

    Args:
        temperature: divides the logits before the filters; 0 takes the best token.
        top_k: keep the k best tokens (and those that tie with the last of them); 0 keeps all.
        top_p: then keep the best tokens that together have at least this probability (the nucleus, Holtzman et al.
            2019); 1 keeps all.
    Raises:
        ValueError: a negative temperature or top_k, or top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; expected 0 (the best token) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (keep all) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected 0 < top_p <= 1 (1 keeps all)")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that a token is drawn from, for ``logits`` (..., V) float32; temperature above 0."""
        return filter_logits(logits / self.temperature, self.top_k, self.top_p).softmax(dim=-1)

    def choose(self, logits: torch.Tensor, uniform: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Draw with given random numbers, so that an image's draws depend on its own generator alone.

        Args:
            logits: (B, V); with ``scale`` (2 B, V), those with the condition first.
            uniform: random numbers in [0, 1), (B,), float32.
            scale: of the guidance, (1,), float32; None for logits that need none.
        Returns:
            Tokens (B,), int64.
        """
        if self.temperature and not self.top_k and self.top_p == 1:
            return draw_token(logits, uniform, scale, temperature=self.temperature)
        logits = logits.float() if scale is None else guide(logits.float(), scale)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return draw_token(filter_logits(logits / self.temperature, self.top_k, self.top_p), uniform)


def guide(logits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """null + scale (condition - null) of logits (2 B, V), those with the condition first; returns (B, V)."""
    conditional, null = logits.chunk(2)
    return null + scale * (conditional - null)


def filter_logits(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Put -inf in place of the tokens that are not to be drawn.

    Args:
        logits: (..., V).
        top_k: 0 keeps all; more than V keeps all; ties with the k-th best are kept.
        top_p: of what is left, the worst tokens are removed while their probabilities add up to at most 1 - top_p; the
            best one always stays.
    Returns:
        (..., V).
    """
    nothing = float("-inf")
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, nothing)
    if top_p < 1:
        ascending, index = logits.sort(dim=-1)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        removed[..., -1] = False
        logits = logits.masked_fill(removed.scatter(-1, index, removed), nothing)
    return logits
