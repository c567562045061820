"""Samples of different lengths one after the other in one row of tokens, without padding.

Scans and convolutions start anew at every border (``cu_seqlens`` of the operators, in every direction); orders stay
inside each sample; what belongs to a sample (modulation, text, stochastic depth) reaches its own tokens alone.
"""

# S samples, L tokens of all of them, K directions, T context tokens, D width

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """Where each sample lies in the row.

    Attributes:
        lengths: tokens of each sample.
        cu_seqlens: borders 0, ..., L, (S + 1,), int32.
        owners: the sample of each token, (L,), int64.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    owners: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> "Packing":
        """A row of samples of these lengths, each at least 1."""
        borders = torch.tensor([0, *lengths]).cumsum(0).int()
        owners = torch.cat([torch.full((length,), sample) for sample, length in enumerate(lengths)])
        return cls(tuple(lengths), borders.to(device), owners.to(device))

    def per_token(self, vectors: torch.Tensor) -> torch.Tensor:
        """Give each token the vector of its sample: (S, 1, D) to (1, L, D)."""
        return vectors[:, 0][self.owners][None]  # by an index: its gradient is summed in a fixed order

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens (1, n, D) of each sample of ``x`` (1, L, D)."""
        return x.split(self.lengths, dim=1)

    def join_orders(self, orders: Sequence[torch.Tensor]) -> torch.Tensor:
        """Orders (..., L) from those of each sample, (..., n), which count from its own first token."""
        begins = torch.tensor([0, *self.lengths[:-1]]).cumsum(0).tolist()
        return torch.cat([order + begin for order, begin in zip(orders, begins)], dim=-1)

    def join_context(self, context: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts in one row, and which of their tokens each token of the samples may read.

        Args:
            context: (S, T, D).
            mask: (S, T) bool, or None: all of them.

        Returns:
            (1, S T, D) and (1, L, S T) bool.
        """
        samples, tokens = context.shape[:2]
        readers = torch.arange(samples, device=context.device).repeat_interleave(tokens)  # (S T,)
        own = self.owners[:, None] == readers  # (L, S T)
        return context.flatten(0, 1)[None], (own if mask is None else own & mask.flatten())[None]
