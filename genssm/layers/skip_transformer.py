"""Transformer layers of the usual kind (post- or pre-norm, no modulation) and their U-shaped stack with skips."""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from genssm.layers.buffers import table_device
from genssm.layers.modulation import LayerNorm
from genssm.paths import check_choice

# B batch, L tokens, S memory tokens, D hidden_size, P positions

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


def _xavier(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weights and a bias of zeros."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Multi-head attention of (B, L, D) to (B, S, D); ``mask`` (B, S) is True where a token may be read."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L or S, D / heads)
    mask = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)  # (B, L, D)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, torch's ``nn.MultiheadAttention`` with one matrix for q, k and v.

    Args:
        hidden_size: width D.
        num_heads: heads, which divide D.
        dropout: of the attention weights.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj = _xavier(hidden_size, 3 * hidden_size)
        self.out_proj = _xavier(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, L, D) to (B, L, D); ``mask`` (B, L) bool, True where a token may be read."""
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj(_attend(q, k, v, self.num_heads, mask, self.dropout if self.training else 0.0))


class MemoryAttention(nn.Module):
    """Multi-head attention from tokens to a memory of the same width, with biases.

    Args:
        hidden_size: width D.
        num_heads: heads, which divide D.
        dropout: of the attention weights.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q_proj = _xavier(hidden_size, hidden_size)
        self.kv_proj = _xavier(hidden_size, 2 * hidden_size)
        self.out_proj = _xavier(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, L, D) to (B, L, D), reading ``memory`` (B, S, D) where ``mask`` (B, S) is True."""
        k, v = self.kv_proj(memory).chunk(2, dim=-1)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(_attend(self.q_proj(x), k, v, self.num_heads, mask, dropout))


class TransformerLayer(nn.Module):
    """Self-attention, attention to a memory where there is one, feed-forward; each with a residual and a norm.

    Post-norm (Vaswani et al. 2017): x = norm(x + f(x)); pre-norm: x = x + f(norm(x)).

    Args:
        hidden_size: width D.
        num_heads: heads, which divide D.
        ff_size: inner width of the feed-forward.
        dropout: of attention weights, of the feed-forward's inside and of each branch.
        activation: "gelu" (the exact one) or "relu".
        pre_norm: norm before instead of after.
        memory: attend to a memory.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        ff_size: int = 1024,
        dropout: float = 0.1,
        activation: str = "gelu",
        pre_norm: bool = False,
        memory: bool = False,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, tuple(ACTIVATIONS))
        if hidden_size % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {hidden_size}; choose numbers that do")
        self.activation = ACTIVATIONS[activation]
        self.pre_norm = pre_norm
        self.self_attn = SelfAttention(hidden_size, num_heads, dropout)
        self.memory_attn = MemoryAttention(hidden_size, num_heads, dropout) if memory else None
        self.linear1 = _xavier(hidden_size, ff_size)
        self.linear2 = _xavier(ff_size, hidden_size)
        self.norm_self = LayerNorm(hidden_size, 1e-5)
        self.norm_memory = LayerNorm(hidden_size, 1e-5) if memory else None
        self.norm_ff = LayerNorm(hidden_size, 1e-5)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map (B, L, D) to (B, L, D).

        Args:
            x: tokens, (B, L, D).
            mask: (B, L) bool, True where a token may be read.
            memory: (B, S, D), for a layer with a memory.
            memory_mask: (B, S) bool, True where it may be read.
        """
        if self.pre_norm:
            x = x + self.dropout(self.self_attn(self.norm_self(x), mask))
            if self.memory_attn is not None:
                x = x + self.dropout(self.memory_attn(self.norm_memory(x), memory, memory_mask))
            return x + self.dropout(self._feed_forward(self.norm_ff(x)))
        x = self.norm_self(x + self.dropout(self.self_attn(x, mask)))
        if self.memory_attn is not None:
            x = self.norm_memory(x + self.dropout(self.memory_attn(x, memory, memory_mask)))
        return self.norm_ff(x + self.dropout(self._feed_forward(x)))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class SkipTransformer(nn.Module):
    """A U of transformer layers: n down, one in the middle, n up; each layer up first merges what left its twin.

        x_j = layer(W [x, skip]),   W: 2 D -> D

    Args:
        num_layers: 2 n + 1, odd.
        hidden_size: width D.
        final_norm: a norm at the end.
        layer: further arguments of :class:`TransformerLayer`.
    Raises:
        ValueError: an even number of layers.
    """

    def __init__(self, num_layers: int, hidden_size: int, final_norm: bool = True, **layer: object) -> None:
        super().__init__()
        if num_layers % 2 == 0:
            raise ValueError(f"{num_layers} layers cannot form a U; use an odd number")
        half = num_layers // 2
        self.input_blocks = nn.ModuleList(TransformerLayer(hidden_size, **layer) for _ in range(half))
        self.middle_block = TransformerLayer(hidden_size, **layer)
        self.output_blocks = nn.ModuleList(TransformerLayer(hidden_size, **layer) for _ in range(half))
        self.linear_blocks = nn.ModuleList(_xavier(2 * hidden_size, hidden_size) for _ in range(half))
        self.norm = LayerNorm(hidden_size, 1e-5) if final_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map (B, L, D) to (B, L, D); arguments as of :class:`TransformerLayer`."""
        skips = []
        for block in self.input_blocks:
            x = block(x, mask, memory, memory_mask)
            skips.append(x)
        x = self.middle_block(x, mask, memory, memory_mask)
        for merge, block in zip(self.linear_blocks, self.output_blocks):
            x = block(merge(torch.cat([x, skips.pop()], dim=-1)), mask, memory, memory_mask)
        return self.norm(x)


class TransformerStack(nn.Module):
    """Transformer layers one after the other.

    Args:
        num_layers: how many.
        hidden_size: width D.
        final_norm: a norm at the end.
        layer: further arguments of :class:`TransformerLayer`.
    """

    def __init__(self, num_layers: int, hidden_size: int, final_norm: bool = True, **layer: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(hidden_size, **layer) for _ in range(num_layers))
        self.norm = LayerNorm(hidden_size, 1e-5) if final_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map (B, L, D) to (B, L, D); arguments as of :class:`TransformerLayer`."""
        for layer in self.layers:
            x = layer(x, mask, memory, memory_mask)
        return self.norm(x)


class SequencePositions(nn.Module):
    """Add a position to each token of a sequence: a learned table, or fixed sinusoids with dropout.

    Args:
        hidden_size: width D.
        kind: "learned" (starts uniform in [0, 1)) or "sinusoidal": sin(p w_i), cos(p w_i) in turn,
            w_i = 10000^(-2i/D).
        num_positions: longest sequence P.
        dropout: of the sum, for "sinusoidal".
    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, hidden_size: int, kind: str, num_positions: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_choice("pos_embed", kind, ("learned", "sinusoidal"))
        self.num_positions = num_positions
        if kind == "learned":
            self.pe = nn.Parameter(torch.rand(num_positions, hidden_size))
            self.dropout = nn.Identity()
        else:
            with table_device():
                self.register_buffer("pe", interleaved_sinusoids(num_positions, hidden_size), persistent=False)
            self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L, D) to (B, L, D).

        Raises:
            ValueError: more tokens than positions.
        """
        if x.shape[1] > self.num_positions:
            raise ValueError(f"{x.shape[1]} tokens, but positions for {self.num_positions} only; give a shorter input")
        return self.dropout(x + self.pe[: x.shape[1]].to(x.dtype))


def interleaved_sinusoids(num_positions: int, dim: int) -> torch.Tensor:
    """Positions sin(p w_i), cos(p w_i) in turn, w_i = 10000^(-2i/dim): (num_positions, dim), float32."""
    omega = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * omega
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim].float()


def from_torch_layers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of transformer layers written with ``nn.MultiheadAttention`` to those of this file.

    ``norm2`` belongs to the feed-forward, or to the attention to a memory where a layer has one; the joint projection
    of that attention is cut into queries and keys with values. Differentiable; other keys keep their names.
    """
    renamed = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r"(.*)\.multihead_attn\.in_proj_(weight|bias)", key):
            width = value.shape[0] // 3
            renamed[f"{match[1]}.memory_attn.q_proj.{match[2]}"] = value[:width]
            renamed[f"{match[1]}.memory_attn.kv_proj.{match[2]}"] = value[width:]
            continue
        if match := re.fullmatch(r"(.*)\.norm2\.(weight|bias)", key):
            has_memory = f"{match[1]}.multihead_attn.in_proj_weight" in state_dict
            key = f"{match[1]}.{'norm_memory' if has_memory else 'norm_ff'}.{match[2]}"
        for pattern, name in _TORCH_LAYER_KEYS.items():
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


_TORCH_LAYER_KEYS = {
    r"\.self_attn\.in_proj_(weight|bias)$": r".self_attn.in_proj.\1",
    r"\.multihead_attn\.out_proj\.": ".memory_attn.out_proj.",
    r"\.norm1\.": ".norm_self.",
    r"\.norm3\.": ".norm_ff.",
}
