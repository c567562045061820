"""From logits to tokens: temperature, top-k, nucleus, and a draw that a captured graph can repeat."""

from dataclasses import dataclass

import torch

from genssm.kernels.draw_token import draw_token, put_token

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

    def draw(
        self,
        logits: torch.Tensor,
        uniform: torch.Tensor,
        scales: torch.Tensor | None,
        position: torch.Tensor,
        codes: torch.Tensor,
        previous: torch.Tensor,
    ) -> None:
        """Draw the next token of each image with given random numbers, so that it depends on its own generator alone.

        Args:
            logits: (B, V); with ``scales`` (2 B, V), those with the condition first.
            uniform: random numbers in [0, 1), (B, T), float32.
            scales: of the guidance, (T,), float32; None for logits that need none.
            position: which token is drawn, (1,), int64.
            codes: receives it, (B, T), int64, in column ``position``.
            previous: receives it too, (R, 1), int64, R a multiple of B.
        """
        if self.temperature and not self.top_k and self.top_p == 1:
            draw_token(logits, uniform, scales, position, codes, previous, temperature=self.temperature)
            return
        logits = logits.float() if scales is None else guide(logits.float(), scales.index_select(0, position))
        if self.temperature == 0:
            put_token(logits.argmax(dim=-1), position, codes, previous)
        else:
            kept = filter_logits(logits / self.temperature, self.top_k, self.top_p)
            draw_token(kept, uniform, None, position, codes, previous)


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
