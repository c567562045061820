"""Parts of transformer blocks: feed-forward, self-attention with adaptive norms, fusion of two token streams."""

import torch
import torch.nn.functional as F
from torch import nn

from genssm.kernels.gated_residual import gated_residual
from genssm.layers.attention import CrossAttention
from genssm.layers.modulation import LayerNorm, Modulation


def zero_bias_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer whose bias starts at zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.bias)
    return linear


def split_heads(qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split (B, L, 3 D) into queries, keys and values, (B, heads, L, D / heads) each."""
    # By chunks, not along a new dimension: their gradients are then joined in one pass, in the layout of ``qkv``.
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    return q, k, v


class MLP(nn.Module):
    """D -> 4 D -> D. Gated: gelu(a) b with [a, b] = W_in x (GEGLU, Shazeer 2020); plain: gelu(W_in x). tanh GELU.

    Args:
        hidden_size: width D.
        gated: gated or plain.
        out_scale: factor on the initial output weight of the plain form.
    """

    def __init__(self, hidden_size: int, gated: bool, out_scale: float = 1.0) -> None:
        super().__init__()
        self.gated = gated
        self.proj_in = zero_bias_linear(hidden_size, 4 * hidden_size * (2 if gated else 1))
        self.proj_out = zero_bias_linear(4 * hidden_size, hidden_size)
        if not gated:
            with torch.no_grad():
                self.proj_out.weight.mul_(out_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L, D) to (B, L, D)."""
        if not self.gated:
            return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))
        a, b = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(F.gelu(a, approximate="tanh") * b)


class AttentionBlock(nn.Module):
    """A transformer block with adaptive norms (Peebles and Xie 2022, "DiT"), whose gates start open.

    Args:
        hidden_size: width D.
        num_heads: heads.
        gated_mlp: gated or plain MLP.
        out_scale: see :class:`MLP`.
        cross_attention: read a text context between the two.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 16,
        gated_mlp: bool = True,
        out_scale: float = 1.0,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = Modulation(hidden_size, 9 if cross_attention else 6, zero=False)
        self.norm_1 = LayerNorm(hidden_size, affine=False)
        self.qkv = zero_bias_linear(hidden_size, 3 * hidden_size)
        self.proj = zero_bias_linear(hidden_size, hidden_size)
        self.norm_2 = LayerNorm(hidden_size, affine=False)
        self.mlp = MLP(hidden_size, gated_mlp, out_scale)
        self.norm_cross = LayerNorm(hidden_size, affine=False) if cross_attention else None
        self.cross_attn = CrossAttention(hidden_size) if cross_attention else None

    def forward(
        self,
        x: torch.Tensor,
        conditioning: torch.Tensor,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map (B, L, D), conditioned on (B, D) and the text ``context`` (B, S, D) where its mask is True."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2, *cross = self.modulation(conditioning)  # (B, 1, D) each
        q, k, v = split_heads(self.qkv(self.norm_1(x, shift_1, scale_1)), self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y, gate = self.proj(y), gate_1
        if self.cross_attn is not None:
            shift, scale, cross_gate = cross
            x, y = self.norm_cross(x, shift, scale, add=y, gate=gate)
            y, gate = self.cross_attn(y, context, context_mask), cross_gate
        x, y = self.norm_2(x, shift_2, scale_2, add=y, gate=gate)
        return gated_residual(x, self.mlp(y), gate_2)


class CrossFusion(nn.Module):
    """Join two token streams by attending from each to the other (DiMSUM, arXiv:2411.04168).

        W [A(q_s, k_f, v_f), A(q_f, k_s, v_s)],  A(q, k, v) = softmax(q k^T / sqrt(d_head)) v

    With ``swap_keys`` each query meets the keys of the other stream and the values of its own:
    W [A(q_f, k_s, v_f), A(q_s, k_f, v_s)].

    Args:
        hidden_size: width D of the result; each stream has D / 2.
        num_heads: heads of each attention.
        swap_keys: the variant above.
    """

    def __init__(self, hidden_size: int, num_heads: int = 8, swap_keys: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.swap_keys = swap_keys
        self.qkv_spatial = zero_bias_linear(hidden_size // 2, 3 * (hidden_size // 2))
        self.qkv_frequency = zero_bias_linear(hidden_size // 2, 3 * (hidden_size // 2))
        self.proj = zero_bias_linear(hidden_size, hidden_size)

    def forward(self, spatial: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
        """Map ``spatial`` and ``frequency``, both (B, L, D/2), to (B, L, D)."""
        q_s, k_s, v_s = split_heads(self.qkv_spatial(spatial), self.num_heads)
        q_f, k_f, v_f = split_heads(self.qkv_frequency(frequency), self.num_heads)
        from_spatial = F.scaled_dot_product_attention(q_s, k_f, v_s if self.swap_keys else v_f)
        from_frequency = F.scaled_dot_product_attention(q_f, k_s, v_f if self.swap_keys else v_s)
        pair = [from_frequency, from_spatial] if self.swap_keys else [from_spatial, from_frequency]
        pair = [y.transpose(1, 2).flatten(2) for y in pair]  # (B, L, D/2) each, as they lie in memory
        return self.proj(torch.cat(pair, dim=-1))  # (B, L, D)
