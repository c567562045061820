"""In the style of MaskMamba (Chen et al. 2024, arXiv:2409.19937): masked codes guessed by bidirectional Mamba layers.

Neither code nor weights of the paper are public. What its abstract and secondary sources tell is followed: centred
convolutions, two branches that are joined side by side and not by a gate, condition tokens in the middle of the
sequence, attention layers in between or in the second half. Widths, depth and the rest are choices of this project.
"""

# B batch, V vocab_size codes, h w grid of codes, T = h w, D hidden_size, E = expand * D, N d_state, R dt_rank,
# S condition tokens, L = T + S

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from genssm.kernels.selective_scan import selective_scan
from genssm.layers import ContextEmbedding, LabelEmbedding, RMSNorm, TokenOutput, upcast
from genssm.layers.directions import DirectedMixer, initial_dt_bias
from genssm.layers.transformer import MLP, split_heads

LAYOUTS = ("mamba", "alternate", "second_half")


class TwoBranchMamba(DirectedMixer):
    """Bidirectional mixer whose two branches are joined side by side (the paper's "Bi-Mamba-v2").

        x, z = W_in h;   x = silu(conv(x)), z = silu(conv'(z)), both centred;
        y = scan forward (x) + scan backward (x), each with its own step, A, B, C and D;   out = W_out [y, z]

    Args:
        hidden_size: width D.
        d_state: state size N.
        d_conv: width of the convolutions, odd.
        expand: the branches have expand * D / 2 channels each.
        out_scale: factor on the initial ``out_proj.weight``.

    Raises:
        ValueError: ``d_conv`` is even.
    """

    def __init__(self, hidden_size: int, *, d_state: int, d_conv: int, expand: int, out_scale: float) -> None:
        super().__init__(bidirectional=True)
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv is {d_conv}; a centred convolution needs an odd width")
        branch = expand * hidden_size // 2
        self.d_state, self.dt_rank = d_state, math.ceil(hidden_size / 16)
        self.in_proj = nn.Linear(hidden_size, 2 * branch, bias=False)
        self.conv1d_x, self.conv1d_z = (
            nn.Conv1d(branch, branch, d_conv, padding=d_conv // 2, groups=branch) for _ in range(2)
        )
        for suffix in self.suffixes:
            self.add_module("x_proj" + suffix, nn.Linear(branch, self.dt_rank + 2 * d_state, bias=False))
            self.add_module("dt_proj" + suffix, nn.Linear(self.dt_rank, branch, bias=False))
            self.register_parameter("dt_bias" + suffix, nn.Parameter(initial_dt_bias(branch, 1e-3, 0.1, 1e-4)))
            A_log = torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(branch, 1)
            self.register_parameter("A_log" + suffix, nn.Parameter(A_log))
            self.register_parameter("D" + suffix, nn.Parameter(torch.ones(branch)))
        self.out_proj = nn.Linear(2 * branch, hidden_size, bias=False)
        with torch.no_grad():
            self.out_proj.weight.mul_(out_scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix tokens (B, L, D)."""
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, E/2) each
        x = F.silu(self.conv1d_x(x.transpose(1, 2))).transpose(1, 2)
        z = F.silu(self.conv1d_z(z.transpose(1, 2))).transpose(1, 2)
        delta, B, C = [], [], []
        for suffix in self.suffixes:
            projected = getattr(self, "x_proj" + suffix)(x)
            dt, b, c = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
            for parts, part in ((delta, getattr(self, "dt_proj" + suffix)(dt)), (B, b), (C, c)):
                parts.append(part)
        # One direction after the other in memory, and so are the gradients: no copies on the way back.
        delta, B, C = (torch.stack(parts).transpose(0, 1) for parts in (delta, B, C))
        A_log, D, dt_bias = (upcast(self.stacked(name)) for name in ("A_log", "D", "dt_bias"))
        y = selective_scan(
            x, delta, -A_log.exp(), B, C, D,
            delta_bias=dt_bias, delta_softplus=True, orders=self.direction_orders(None, x),
        )  # (B, L, E/2), summed over directions  # fmt: skip
        return self.out_proj(torch.cat([y, z], dim=-1))


class SelfAttention(nn.Module):
    """Attention among all tokens.

    Args:
        hidden_size: width D.
        num_heads: heads.
        out_scale: factor on the initial weight of the output projection.
    """

    def __init__(self, hidden_size: int, *, num_heads: int, out_scale: float) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size is {hidden_size}, which num_heads={num_heads} does not divide")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        with torch.no_grad():
            self.out_proj.weight.mul_(out_scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix tokens (B, L, D)."""
        y = F.scaled_dot_product_attention(*split_heads(self.qkv(hidden_states), self.num_heads))
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MaskMambaBlock(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)).

    Args:
        hidden_size: width D.
        mixer: :class:`TwoBranchMamba` or :class:`SelfAttention`.
        out_scale: factor on the initial output weight of the MLP.
    """

    def __init__(self, hidden_size: int, mixer: nn.Module, out_scale: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.mixer = mixer
        self.norm_mlp = RMSNorm(hidden_size)
        self.mlp = MLP(hidden_size, gated=False, out_scale=out_scale)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map the residual stream (B, L, D), float32, to the same."""
        hidden_states, x = self.norm_mlp(hidden_states, add=self.mixer(self.norm(hidden_states)))
        return hidden_states + self.mlp(x)


class MaskMamba(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Guesses masked codes from the others: class-conditional, text-conditional or neither.

    The sequence is [first half of the codes, condition, second half]; the condition is the class vector and the text
    tokens, in context. Masked codes are ``mask_code`` = vocab_size.

    Args:
        sample_size: rows and columns of codes; one number for a square.
        vocab_size: codes V.
        num_classes: classes; 0 for a model without class labels.
        context_dim: width of the text tokens; 0 for a model without text.
        context_length: text tokens of the sequence; shorter texts are filled up with the null token.
        hidden_size: width D.
        num_layers: number of blocks.
        d_state, d_conv, expand: sizes of the mixer, see :class:`TwoBranchMamba`.
        layout: "mamba", or with attention layers: "alternate" (every second one) or "second_half".
        num_heads: of the attention layers.

    Raises:
        ValueError: an argument is unknown, or sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["MaskMambaBlock"]
    _no_split_modules: ClassVar[list[str]] = ["MaskMambaBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_log", "A_log_b", "D", "D_b", "dt_bias", "dt_bias_b"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["code_embed", "label_embed", "context_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 16,
        vocab_size: int = 16384,
        num_classes: int = 1000,
        context_dim: int = 0,
        context_length: int = 77,
        hidden_size: int = 768,
        num_layers: int = 24,
        d_state: int = 16,
        d_conv: int = 3,
        expand: int = 2,
        layout: str = "alternate",
        num_heads: int = 12,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}; expected one of {', '.join(map(repr, LAYOUTS))}")
        self.gradient_checkpointing = False
        self.grid = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        self.code_embed = nn.Embedding(vocab_size + 1, hidden_size)
        nn.init.normal_(self.code_embed.weight, std=0.02)
        self.positions = nn.Parameter(0.02 * torch.randn(self.num_tokens, hidden_size))
        self.label_embed = LabelEmbedding(num_classes, hidden_size) if num_classes else None
        self.context_embed = ContextEmbedding(context_dim, context_length, hidden_size) if context_dim else None
        scale = num_layers**-0.5
        self.blocks = nn.ModuleList()
        for layer in range(num_layers):
            attends = layer % 2 == 1 if layout == "alternate" else layer >= (num_layers + 1) // 2
            if attends and layout != "mamba":
                mixer: nn.Module = SelfAttention(hidden_size, num_heads=num_heads, out_scale=scale)
            else:
                mixer = TwoBranchMamba(hidden_size, d_state=d_state, d_conv=d_conv, expand=expand, out_scale=scale)
            self.blocks.append(MaskMambaBlock(hidden_size, mixer, scale))
        self.norm_out = RMSNorm(hidden_size)
        self.proj_out = nn.Linear(hidden_size, vocab_size)
        nn.init.zeros_(self.proj_out.bias)

    @property
    def num_tokens(self) -> int:
        """Codes T of an image."""
        return math.prod(self.grid)

    @property
    def mask_code(self) -> int:
        """What stands for a masked code."""
        return self.config.vocab_size

    @property
    def null_class_label(self) -> int | None:
        """Label of the null class; None for a model without classes."""
        return None if self.label_embed is None else self.label_embed.null_label

    @property
    def has_null_text(self) -> bool:
        """Whether the model knows what no text is; it does if it reads text."""
        return self.context_embed is not None

    @property
    def null_encoder_hidden_states(self) -> torch.Tensor | None:
        """The learned null text token, (context_dim,); None without text."""
        return None if self.context_embed is None else self.context_embed.null

    def forward(
        self,
        codes: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> TokenOutput | tuple[torch.Tensor]:
        """Logits of every code.

        Args:
            codes: (B, T), int64, in raster order, ``mask_code`` where masked.
            class_labels: (B,), int64; None means the null class.
            encoder_hidden_states: text tokens, (B, S', context_dim) with S' <= context_length; None means null text.
            encoder_attention_mask: (B, S'), True (or 1) where a text token counts; None means everywhere.
            return_dict: return an output object rather than a tuple.

        Returns:
            :class:`genssm.layers.TokenOutput` with ``logits`` (B, T, V).

        Raises:
            ValueError: shapes do not fit the model.
        """
        if codes.dim() != 2 or codes.shape[1] != self.num_tokens:
            raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (B, {self.num_tokens})")
        if class_labels is not None and self.label_embed is None:
            raise ValueError("class_labels are given but this model has no classes (num_classes is 0); leave them out")
        if encoder_hidden_states is not None and self.context_embed is None:
            raise ValueError("encoder_hidden_states are given but this model reads no text (context_dim is 0)")
        batch, half = len(codes), self.num_tokens // 2
        x = self.code_embed(codes) + self.positions  # (B, T, D)
        condition = []
        if self.label_embed is not None:
            condition.append(self.label_embed(class_labels, batch)[:, None])
        if self.context_embed is not None:
            condition.append(self.context_embed(encoder_hidden_states, encoder_attention_mask, batch)[0])
        tokens = sum(part.shape[1] for part in condition)
        x = upcast(torch.cat([x[:, :half], *condition, x[:, half:]], dim=1))  # (B, L, D)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)  # (B, L, D)
        x = torch.cat([x[:, :half], x[:, half + tokens :]], dim=1)  # (B, T, D)
        logits = self.proj_out(self.norm_out(x))
        return TokenOutput(logits=logits) if return_dict else (logits,)
