"""A small transformer over the tokens of a caption, trained together with the denoiser that reads it."""

# B batch, S tokens, D hidden_size

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from genssm.layers import LayerNorm, masked_mean
from genssm.layers.transformer import MLP, split_heads, zero_bias_linear


@dataclass
class TextEncoderOutput(BaseOutput):
    """What a text becomes.

    Args:
        last_hidden_state: one vector per token, (B, S, D).
        pooler_output: one vector per text, the mean over its tokens, (B, D).
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None = None  # optional to the hooks of accelerate, which rebuild outputs


class TextBlock(nn.Module):
    """A pre-norm transformer block, every token reading every real one: x + attention(norm(x)), x + MLP(norm(x)).

    Args:
        hidden_size: width D.
        num_heads: heads.
        out_scale: factor on the initial output weight of the MLP.
    """

    def __init__(self, hidden_size: int, num_heads: int, out_scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1 = LayerNorm(hidden_size, 1e-5)
        self.qkv = zero_bias_linear(hidden_size, 3 * hidden_size)
        self.proj = zero_bias_linear(hidden_size, hidden_size)
        self.norm_2 = LayerNorm(hidden_size, 1e-5)
        self.mlp = MLP(hidden_size, gated=False, out_scale=out_scale)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map ``x`` (B, S, D) to the same, reading tokens where ``mask`` (B, S) is True."""
        q, k, v = split_heads(self.qkv(self.norm_1(x)), self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class TextEncoder(ModelMixin, ConfigMixin):
    """Transformer encoder of captions (Vaswani et al. 2017): learned positions, both directions, pre-norm, GELU.

    Args:
        vocab_size: tokens of the tokenizer; number 0 is padding.
        hidden_size: width D, the ``context_dim`` of the denoiser.
        num_layers: blocks.
        num_heads: heads; they divide D.
        max_length: most tokens of a text.

    Raises:
        ValueError: the heads do not divide the width.

    Example:
        >>> tokenizer = CaptionTokenizer.learn(["a red circle", "a blue square"])
        >>> encoder = TextEncoder(len(tokenizer), hidden_size=64)
        >>> encoder(*tokenizer(["a red square"])).pooler_output.shape
        torch.Size([1, 64])
    """

    _repeated_blocks: ClassVar[list[str]] = ["TextBlock"]
    _no_split_modules: ClassVar[list[str]] = ["TextBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["embed", "norm"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        max_length: int = 32,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size is {hidden_size}; num_heads={num_heads} must divide it")
        self.token_embed = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(1, max_length, hidden_size))
        out_scale = max(num_layers, 1) ** -0.5
        self.blocks = nn.ModuleList(TextBlock(hidden_size, num_heads, out_scale) for _ in range(num_layers))
        self.norm_out = LayerNorm(hidden_size, 1e-5)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, return_dict: bool = True
    ) -> TextEncoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Encode.

        Args:
            input_ids: token numbers, (B, S) int64, S at most ``max_length``.
            attention_mask: (B, S), True (or 1) where a token counts, at least once in a row; None means everywhere.
            return_dict: return an output object rather than a tuple.

        Returns:
            :class:`TextEncoderOutput`: the tokens' states and their mean. States where the mask is False mean nothing.

        Raises:
            ValueError: too many tokens, or a mask of another shape.
        """
        length = input_ids.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"input_ids has {length} tokens; this encoder reads up to {self.config.max_length}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; expected {tuple(input_ids.shape)}")
        mask = mask.bool()
        x = self.token_embed(input_ids) + self.positions[:, :length]  # (B, S, D)
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm_out(x)
        output = TextEncoderOutput(last_hidden_state=x, pooler_output=masked_mean(x, mask))
        return output if return_dict else output.to_tuple()
