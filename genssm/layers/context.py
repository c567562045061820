"""Text tokens as a part of a model's own sequence."""

import torch
import torch.nn.functional as F
from torch import nn


class ContextEmbedding(nn.Module):
    """Text tokens projected to the model's width and filled up to a fixed length with a learned null token.

    A recurrent model reads every token it is given, so padding is not masked but replaced: a text gives the same
    sequence however its caller has padded it, and the null text of classifier-free guidance has the same length.

    Args:
        context_dim: width of the text tokens.
        context_length: tokens S of the sequence.
        hidden_size: width D of the model.
    """

    def __init__(self, context_dim: int, context_length: int, hidden_size: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.proj = nn.Linear(context_dim, hidden_size)
        self.null = nn.Parameter(0.02 * torch.randn(context_dim))
        nn.init.zeros_(self.proj.bias)

    def forward(
        self, text: torch.Tensor | None, mask: torch.Tensor | None, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed a text.

        Args:
            text: (B, S', context_dim), S' <= S; None means the null text.
            mask: (B, S'), True (or 1) where a token counts; None means everywhere.
            batch_size: B.

        Returns:
            Tokens (B, S, D) and their mean (B, D) over those that count; over the null tokens where none does.

        Raises:
            ValueError: shapes do not fit.
        """
        length, width = self.context_length, len(self.null)
        if text is None:
            text = self.null.new_zeros(batch_size, 0, width)
            mask = None
        if text.dim() != 3 or text.shape[0] != batch_size or text.shape[1] > length or text.shape[2] != width:
            expected = f"({batch_size}, up to {length}, {width})"
            raise ValueError(f"encoder_hidden_states has shape {tuple(text.shape)}; expected {expected}")
        if mask is not None and mask.shape != text.shape[:2]:
            expected = tuple(text.shape[:2])
            raise ValueError(f"encoder_attention_mask has shape {tuple(mask.shape)}; expected {expected}")
        present = torch.ones(text.shape[:2], device=text.device) if mask is None else mask
        fill = length - text.shape[1]
        present = F.pad(present.bool(), (0, fill))  # (B, S)
        text = torch.where(present[..., None], F.pad(text.to(self.null.dtype), (0, 0, 0, fill)), self.null)
        tokens = self.proj(text)  # (B, S, D)
        counted = torch.where(present.any(dim=1, keepdim=True), present, True)[..., None].to(tokens.dtype)
        return tokens, (tokens * counted).sum(dim=1) / counted.sum(dim=1)
