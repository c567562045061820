"""Cross attention: image tokens read text tokens."""

import torch
import torch.nn.functional as F
from torch import nn


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a context, softmax(q k^T / sqrt(head_dim)) v.

    Projections of queries, keys and values have no bias; the output projection has one, which starts at zero.

    Args:
        hidden_size: width D of the tokens and of the context.
        num_heads: heads.
        head_dim: channels of a head; the inner width is num_heads * head_dim, whatever D is.
    """

    def __init__(self, hidden_size: int, num_heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.to_q = nn.Linear(hidden_size, inner, bias=False)
        self.to_k = nn.Linear(hidden_size, inner, bias=False)
        self.to_v = nn.Linear(hidden_size, inner, bias=False)
        self.to_out = nn.Linear(inner, hidden_size)
        nn.init.zeros_(self.to_out.bias)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden_states: (B, L, D).
            context: (B, S, D).
            mask: (B, S) bool, True where a context token may be read; (B, L, S) for each token of its own; None means
                everywhere.

        Returns:
            (B, L, D).
        """
        q = self.to_q(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, L, head_dim)
        k = self.to_k(context).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, S, head_dim)
        v = self.to_v(context).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, S, head_dim)
        if mask is not None:
            mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, L, D)
