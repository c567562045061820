"""DiM (Teng et al. 2024, arXiv:2405.14224): a diffusion denoiser whose Mamba blocks take turns in four directions."""

# B batch, C channels, H W input size, gh gw token grid, T = gh gw patches, P pad tokens, D hidden_size,
# S text tokens, M text slots, Q condition, text and prefix tokens, L = Q + (gh + P)(gw + P) tokens of the sequence

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from genssm.kernels.gated_residual import gated_residual
from genssm.layers import (
    DenoiserOutput,
    LabelEmbedding,
    Modulation,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedding,
    check_text,
    make_mixer,
    masked_mean,
    mixer_options,
    resize_positions,
    sinusoidal_features,
    unpatchify,
    upcast,
)
from genssm.layers.buffers import table_device
from genssm.layers.transformer import zero_bias_linear
from genssm.scan_orders import DIM_PATTERNS, dim_pad_tokens, dim_pattern, dim_pattern_chain, with_prefix

PAD_LAYOUTS = ("per_side", "row_major_cycle")
SKIP_FUSIONS = ("none", "concat_linear", "two_linears")
SKIP_TUNINGS = ("time", "as_released")


class LongSkip(nn.Module):
    """Join the residual stream with an earlier state of it: W [s, k], or W_s s + W_k k with a bias each.

    Args:
        hidden_size: width D.
        fusion: "concat_linear" or "two_linears". The two differ in their weights' form and initial scale only.
    """

    def __init__(self, hidden_size: int, fusion: str) -> None:
        super().__init__()
        self.fusion = fusion
        if fusion == "concat_linear":
            self.linear = zero_bias_linear(2 * hidden_size, hidden_size)
        else:
            self.from_stream = zero_bias_linear(hidden_size, hidden_size)
            self.from_skip = zero_bias_linear(hidden_size, hidden_size)

    def forward(self, stream: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Map ``stream`` and ``skip``, both (B, L, D), to (B, L, D)."""
        if self.fusion == "concat_linear":
            return self.linear(torch.cat([stream, skip], dim=-1))
        return self.from_stream(stream) + self.from_skip(skip)


class DiMBlock(nn.Module):
    """One layer of the residual stream: s + (1 + gate) Mamba(modulate(norm(s))), gates open from the start.

    Shift, scale and gate are the sum of a table of the block and of a vector that all blocks share (adaLN-single,
    PixArt-alpha, arXiv:2310.00426).

    Args:
        hidden_size: width D.
        skip_fusion: first join a long skip in this form, see :class:`LongSkip`; "none" for blocks without one.
        mixer: what :func:`genssm.layers.make_mixer` takes.
    """

    def __init__(self, hidden_size: int, *, skip_fusion: str = "none", mixer: Mapping[str, Any]) -> None:
        super().__init__()
        self.long_skip = None if skip_fusion == "none" else LongSkip(hidden_size, skip_fusion)
        self.norm = RMSNorm(hidden_size)
        self.table = nn.Parameter(torch.randn(3, hidden_size) * hidden_size**-0.5)
        self.mixer = make_mixer(hidden_size, **mixer)
        bound = mixer["d_conv"] ** -0.5
        nn.init.uniform_(self.mixer.conv1d.bias, -bound, bound)

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        order: torch.Tensor,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add one layer to the stream.

        Args:
            hidden_states: residual stream (B, L, D), float32.
            modulation: shift, scale and gate shared by all blocks, (B, 3, D).
            order: permutation of the tokens, (L,).
            skip: the long skip, (B, L, D), dtype of the weights; blocks without one ignore it.

        Returns:
            (B, L, D), float32.
        """
        x = hidden_states
        if self.long_skip is not None:
            x = upcast(self.long_skip(x.to(self.norm.weight.dtype), skip))
        shift, scale, gate = (self.table + modulation).chunk(3, dim=1)  # (B, 1, D) each
        return gated_residual(x, self.mixer(self.norm(x, shift, scale), order), 1 + gate)


class DiM(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """DiM denoiser for images: unconditional, class- or text-conditional.

    Patches stand on a grid with learnable pad tokens at its right and lower edge, behind condition, text and prefix
    tokens. The published model has no text; here its mean acts where the class does, and its tokens may stand in front.
    Block by block the grid is scanned in rows, rows backwards, columns, columns backwards; the second half of the
    blocks goes through that cycle backwards and joins long skips from the first. What differs from the released code:
    tokens never move, each scan follows its order from one residual stream (the released skips meet their blocks in
    equal orders, so this is the same function); rectangles; pad layout, skip form and pattern are plain options; skip
    tuning that works.

    Args:
        sample_size: height and width of the input, in latent or pixel units; one number for a square. Other sizes run
            too: scan orders are made for them and the positions are resized.
        in_channels: channels C of the input.
        patch_size: side of a patch.
        hidden_size: width D, even.
        num_layers: number of blocks, odd.
        num_classes: classes; 0 for an unconditional model.
        null_condition: both class tables own a null class (label ``num_classes``). An unconditional model then always
            reads that row, as the released CIFAR-10 model does; without it, it has no class tables and no class token.
        context_dim: width of the text tokens, whose mean joins the conditioning vector and the condition token that
            scales the output; 0 for a model without text.
        num_text_tokens: M, places for text tokens between the condition tokens and the grid, so that every scan reads
            the text first; unused ones hold a learnable token, tokens beyond are cut. 0 leaves the mean alone.
        num_scan_patterns: the first so many of rows, rows backwards, columns, columns backwards; 1 to 4.
        num_pad_tokens: P, learnable tokens at the end of each row and column; 0 for none.
        pad_layout: "per_side": one token per pad column and one per pad row; "row_major_cycle": the tokens in turn.
        num_prefix_tokens: learnable tokens between the condition tokens and the grid; 0 for none.
        edge_convs: a depthwise 3x3 convolution over the patches before and one after the blocks, in place of them.
        edge_dilation: dilation of these convolutions.
        skip_fusion: form of the long skips, "concat_linear", "two_linears" (released: widths above 512) or "none".
        time_token_mlp: Linear, SiLU, Linear on the time token, which is a plain sinusoid otherwise.
        duplicate_condition_tokens: time, class, class, time in place of time, class.
        final_conv: a 3x3 convolution on the output image.
        learn_sigma: predict C more channels.
        mixer: "mamba" (:class:`genssm.layers.Mamba`) or "mamba2" (:class:`genssm.layers.Mamba2`).
        d_state, d_conv, expand: sizes of the mixers, see these classes.
        dt_rank: of "mamba".
        headdim, ngroups: of "mamba2"; None for its own defaults.
        time_convention: "diffusers": the network sees the timestep. "one_based": it sees timestep + 1, for DDPM-type
            schedules with noise levels 1..1000 (the published weights), whose levels diffusers counts from 0.

    Raises:
        ValueError: an argument is unknown, or sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["DiMBlock"]
    _no_split_modules: ClassVar[list[str]] = ["DiMBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_log", "D", "dt_bias"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        "patch_embed",
        "time_embed",
        "label_embed",
        "context_embed",
        "conv",
        "norm",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1024,
        num_layers: int = 49,
        num_classes: int = 0,
        null_condition: bool = True,
        context_dim: int = 0,
        num_text_tokens: int = 0,
        num_scan_patterns: int = 4,
        num_pad_tokens: int = 3,
        pad_layout: str = "per_side",
        num_prefix_tokens: int = 3,
        edge_convs: bool = True,
        edge_dilation: int = 1,
        skip_fusion: str = "two_linears",
        time_token_mlp: bool = False,
        duplicate_condition_tokens: bool = False,
        final_conv: bool = False,
        learn_sigma: bool = False,
        mixer: str = "mamba",
        d_state: int = 16,
        d_conv: int = 3,
        expand: int = 2,
        dt_rank: int | str = "auto",
        headdim: int | None = None,
        ngroups: int | None = None,
        time_convention: str = "diffusers",
    ) -> None:
        super().__init__()
        _one_of("pad_layout", pad_layout, PAD_LAYOUTS)
        _one_of("skip_fusion", skip_fusion, SKIP_FUSIONS)
        _one_of("time_convention", time_convention, ("diffusers", "one_based"))
        _at_least("num_pad_tokens", num_pad_tokens, 0)
        _at_least("num_prefix_tokens", num_prefix_tokens, 0)
        _at_least("num_text_tokens", num_text_tokens, 0)
        _at_least("edge_dilation", edge_dilation, 1)
        if num_text_tokens and not context_dim:
            raise ValueError(f"num_text_tokens is {num_text_tokens} but context_dim is 0; set the width of the text")
        if hidden_size % 2:
            raise ValueError(f"hidden_size is {hidden_size}; the time token is made of pairs, use an even number")
        chain = dim_pattern_chain(num_layers, num_scan_patterns)
        self.block_rows = [DIM_PATTERNS.index(pattern) for pattern in chain]
        self.first_skip = num_layers // 2 + 1
        self.skip_tuning: tuple[float, str] | None = None
        self.gradient_checkpointing = False
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.native_grid = self._token_grid(height, width)

        self.patch_embed = PatchEmbed(in_channels, hidden_size, patch_size)
        self.patch_embed.proj.reset_parameters()  # plain convolution, not Xavier as elsewhere
        self.time_embed = TimestepEmbedding(hidden_size)
        has_table = num_classes > 0 or null_condition
        self.label_embed = LabelEmbedding(num_classes, hidden_size, null_condition) if has_table else None
        self.modulation = Modulation(hidden_size, 3, zero=False)

        self.token_time_mlp = None
        if time_token_mlp:
            inner = 4 * hidden_size
            self.token_time_mlp = nn.Sequential(
                zero_bias_linear(hidden_size, inner), nn.SiLU(), zero_bias_linear(inner, hidden_size)
            )
        self.token_label_embed = LabelEmbedding(num_classes, hidden_size, null_condition) if has_table else None
        self.context_embed = self.token_context_embed = None
        if context_dim:
            self.context_embed = zero_bias_linear(context_dim, hidden_size)
            self.token_context_embed = zero_bias_linear(context_dim, hidden_size)
        self.text_pad = nn.Parameter(0.02 * torch.randn(hidden_size)) if num_text_tokens else None
        self.num_condition_tokens = (1 + has_table) * (1 + duplicate_condition_tokens)
        tokens = self.num_condition_tokens + math.prod(self.native_grid)
        self.positions = nn.Parameter(torch.zeros(1, tokens, hidden_size))
        self.pad_tokens = self._learned_tokens(num_pad_tokens, hidden_size)
        self.prefix_tokens = self._learned_tokens(num_prefix_tokens, hidden_size)
        self.conv_in = self.conv_out = None
        if edge_convs:
            edge = {"kernel_size": 3, "padding": edge_dilation, "dilation": edge_dilation, "groups": hidden_size}
            self.conv_in = nn.Conv2d(hidden_size, hidden_size, **edge)
            self.conv_out = nn.Conv2d(hidden_size, hidden_size, **edge)

        mixer_of_blocks = mixer_options(
            mixer, dt_rank=dt_rank, headdim=headdim, ngroups=ngroups,
            d_state=d_state, d_conv=d_conv, expand=expand, out_scale=num_layers**-0.5,
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            DiMBlock(
                hidden_size, skip_fusion=skip_fusion if layer >= self.first_skip else "none", mixer=mixer_of_blocks
            )
            for layer in range(num_layers)
        )
        self.norm_out = RMSNorm(hidden_size)
        self.modulation_out = Modulation(hidden_size, 2, zero=False)
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.proj_out = zero_bias_linear(hidden_size, patch_size * patch_size * self.out_channels)
        self.conv_final = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1) if final_conv else None

        self._other_layouts: dict[tuple, tuple[torch.Tensor, ...]] = {}
        for name, buffer in zip(("orders", "pad_cells"), self._layout(self.native_grid)):
            # A None among the buffers is more than sequential offloading can bear.
            table = None if buffer is None else nn.Buffer(buffer.to(table_device()), persistent=False)
            setattr(self, name, table)

    @property
    def null_class_label(self) -> int | None:
        """Label of the null class; None when the model has no classes or no null class."""
        return self.label_embed.null_label if self.config.num_classes else None

    @property
    def has_null_text(self) -> bool:
        """Whether the model knows "no text": ``encoder_hidden_states`` None, or a row masked everywhere."""
        return self.context_embed is not None

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoiserOutput | tuple[torch.Tensor]:
        """Predict.

        Args:
            hidden_states: noisy input, (B, C, H, W).
            timestep: (B,) or one number, 0..1000, fractions allowed.
            class_labels: (B,) int64; None means the null class.
            encoder_hidden_states: text tokens, (B, S, context_dim); None means no text.
            encoder_attention_mask: (B, S), True (or 1) where a text token counts; None means everywhere. A row that is
                False everywhere has no text.
            return_dict: return an output object rather than a tuple.

        Returns:
            :class:`genssm.layers.DenoiserOutput` whose ``sample`` has the shape and dtype of ``hidden_states``, and
            twice its channels with ``learn_sigma``.

        Raises:
            ValueError: shapes do not fit the model, a condition it does not know, or a missing label.
        """
        self._check_input(hidden_states, class_labels)
        batch, grid = hidden_states.shape[0], self._token_grid(*hidden_states.shape[-2:])
        orders, pad_cells = self._layout_for(grid, hidden_states.device)
        dtype = self.norm_out.weight.dtype

        time = self._network_time(timestep, batch, hidden_states.device)  # (B,)
        c = self.time_embed(time)  # (B, D)
        token_t = token_sum = self._time_token(time, dtype)  # (B, D)
        condition = [token_t]
        if self.label_embed is not None:
            c = c + self.label_embed(class_labels, batch)
            token_y = self.token_label_embed(class_labels, batch)
            condition, token_sum = [token_t, token_y], token_t + token_y
        text, mask = self._text(encoder_hidden_states, encoder_attention_mask, batch)  # (B, S, context_dim), (B, S)
        if text is not None:
            c = c + masked_mean(self.context_embed(text), mask)
            token_text = self.token_context_embed(text)  # (B, S, D)
            token_sum = token_sum + masked_mean(token_text, mask)
        if self.config.duplicate_condition_tokens:
            condition = condition + condition[::-1]
        # In the type of the tables, so that the gradients of all blocks meet without a cast each.
        modulation = torch.cat(self.modulation(c), dim=1).to(dtype)  # (B, 3, D)

        split = self.num_condition_tokens
        front = upcast(torch.stack(condition, dim=1)) + self.positions[:, :split]
        if self.text_pad is not None:
            front = torch.cat([front, upcast(self._text_slots(token_text, mask))], dim=1)
        if self.prefix_tokens is not None:
            front = torch.cat([front, upcast(self.prefix_tokens).expand(batch, -1, -1)], dim=1)  # (B, Q, D)
        x = upcast(self.patch_embed(hidden_states))  # (B, T, D)
        x = (x + resize_positions(self.positions[:, split:], self.native_grid, grid)).unflatten(1, grid)
        if self.conv_in is not None:
            x = _on_grid(self.conv_in, x.to(dtype))  # (B, gh, gw, D)
        if self.pad_tokens is not None:
            right, bottom = (
                upcast(self.pad_tokens)[cells].expand(batch, -1, -1, -1)
                for cells in (pad_cells[: grid[0], grid[1] :], pad_cells[grid[0] :])
            )
            x = torch.cat([torch.cat([upcast(x), right], dim=2), bottom], dim=1)  # (B, gh + P, gw + P, D)
        x = torch.cat([front, upcast(x).flatten(1, 2)], dim=1)  # (B, L, D)

        skips = []
        for layer, (block, row) in enumerate(zip(self.blocks, self.block_rows)):
            skip = None
            if block.long_skip is not None:
                skip = skips.pop() * self._skip_scale(layer, time).to(dtype) if self.skip_tuning else skips.pop()
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, modulation, orders[row], skip)
            else:
                x = block(x, modulation, orders[row], skip)  # (B, L, D)
            if self.config.skip_fusion != "none" and 1 <= layer < self.first_skip:
                skips.append(x.to(dtype))

        pad = self.config.num_pad_tokens
        x = x[:, front.shape[1] :].unflatten(1, (grid[0] + pad, grid[1] + pad))[:, : grid[0], : grid[1]]
        if self.conv_out is not None:
            x = _on_grid(self.conv_out, x.to(dtype))
        x = self.norm_out(x.flatten(1, 2), *self.modulation_out(token_sum.to(dtype)))  # (B, T, D)
        sample = unpatchify(self.proj_out(x), grid, self.config.patch_size)  # (B, C, H, W)
        if self.conv_final is not None:
            sample = self.conv_final(sample)
        sample = sample.to(hidden_states.dtype)
        return DenoiserOutput(sample=sample) if return_dict else (sample,)

    def enable_skip_tuning(self, top: float = 0.82, mode: str = "time") -> None:
        """Scale the long skips while sampling (Ma et al. 2024, arXiv:2402.15170), as in DiM's upsampling runs.

        The skip of block l of the second half is multiplied by 1 + r (top - 1) w, where r rises from 0 in the first
        of these blocks to 1 in the last.

        Args:
            top: scale of the last skip at w = 1.
            mode: "time": w is the network's time / 1000, 1 at pure noise. "as_released": w = 1 / 1000, a constant
                that stands where the time was meant in the released code, and leaves next to no effect.

        Raises:
            ValueError: an unknown mode, or a model without long skips.
        """
        _one_of("mode", mode, SKIP_TUNINGS)
        if self.config.skip_fusion == "none":
            raise ValueError("skip tuning needs long skips, and this model has none (skip_fusion is 'none')")
        self.skip_tuning = (top, mode)

    def disable_skip_tuning(self) -> None:
        """Leave the long skips as they are."""
        self.skip_tuning = None

    def load_resized(self, source: "DiM") -> None:
        """Take the weights of a model for another input size: DiM's weak-to-strong start of a higher resolution.

        Positions of patches are resized (bilinear, half-pixel centres), those of the condition tokens kept. The pad
        layouts may differ: their weights are the same.

        Raises:
            ValueError: the models differ in more than input size and pad layout.
        """
        free = ("sample_size", "pad_layout")
        differing = [
            f"{key} {source.config[key]!r} -> {value!r}"
            for key, value in self.config.items()
            if not key.startswith("_") and key not in free and source.config[key] != value
        ]
        if differing:
            raise ValueError(
                f"weights can be taken over from another input size or pad layout only; these differ: "
                f"{', '.join(differing)}"
            )
        self.load_state_dict(self._resized_weights(source))

    def resized(self, sample_size: int | Sequence[int], pad_layout: str | None = None) -> "DiM":
        """This model for another input size, its positions resized once and for all; other weights are shared.

        Args:
            sample_size: as for the constructor.
            pad_layout: another pad layout; None keeps it.
        """
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        config |= {"sample_size": sample_size, "pad_layout": pad_layout or self.config.pad_layout}
        with torch.device("meta"):
            model = type(self)(**config)
        model.load_state_dict(model._resized_weights(self), assign=True)
        model.to(self.device)  # the scan orders; the weights are there
        model.skip_tuning = self.skip_tuning
        return model.train(self.training)

    def enable_cache(self, config: Any) -> None:
        """Reuse block results between similar denoising steps; see diffusers' ``CacheMixin`` and its cache configs.

        Calls must then run inside ``with model.cache_context(name)``, one name per guidance branch.
        """
        # diffusers skips only blocks it knows. Not at import time: its registry imports every model of diffusers.
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        TransformerBlockRegistry.register(DiMBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    def _resized_weights(self, source: "DiM") -> dict[str, torch.Tensor]:
        """The weights of ``source`` with the positions of this model's grid."""
        weights, split = source.state_dict(), self.num_condition_tokens
        table = weights["positions"]
        patches = resize_positions(table[:, split:], source.native_grid, self.native_grid)
        return {**weights, "positions": torch.cat([table[:, :split], patches], dim=1)}

    def _learned_tokens(self, count: int, width: int) -> nn.Parameter | None:
        return nn.Parameter(0.02 * torch.randn(count, width)) if count else None

    def _time_token(self, time: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The time as a token, (B, D); float32, so that the plain sinusoid is exact whatever the weights are."""
        features = sinusoidal_features(time, self.config.hidden_size)
        return features if self.token_time_mlp is None else self.token_time_mlp(features.to(dtype))

    def _text(
        self, tokens: torch.Tensor | None, mask: torch.Tensor | None, batch: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Text tokens and their mask; one token that does not count where no text is given."""
        mask = check_text(tokens, mask, batch, self.config.context_dim)
        if self.context_embed is None:
            return None, None
        weight = self.context_embed.weight
        if tokens is None:
            tokens = weight.new_zeros(batch, 1, self.config.context_dim)
            mask = torch.zeros(batch, 1, dtype=torch.bool, device=weight.device)
        elif mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens.to(weight.dtype), mask

    def _text_slots(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The first M text tokens (B, S, D) where ``mask`` is True, the learnable token elsewhere: (B, M, D)."""
        slots = self.config.num_text_tokens
        used = torch.where(mask[:, :slots, None], tokens[:, :slots], self.text_pad.to(tokens.dtype))
        free = self.text_pad.to(tokens.dtype).expand(len(tokens), slots - used.shape[1], -1)
        return torch.cat([used, free], dim=1)

    def _skip_scale(self, layer: int, time: torch.Tensor) -> torch.Tensor:
        """What the long skip of a block is multiplied by, (B, 1, 1), float32."""
        top, mode = self.skip_tuning
        rise = (layer - self.first_skip) / max(len(self.blocks) - 1 - self.first_skip, 1)
        weight = time.float() / 1000 if mode == "time" else torch.full_like(time, 1e-3, dtype=torch.float32)
        return 1 + rise * (top - 1) * weight[:, None, None]

    def _check_input(self, hidden_states: torch.Tensor, labels: torch.Tensor | None) -> None:
        channels = self.config.in_channels
        if hidden_states.dim() != 4 or hidden_states.shape[1] != channels:
            shape = tuple(hidden_states.shape)
            raise ValueError(f"hidden_states has shape {shape}; this model takes (B, {channels}, H, W)")
        if labels is not None and not self.config.num_classes:
            raise ValueError("class_labels are given but this model has no classes; pass None")

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches for an input size."""
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"the input is {height}x{width} but patch_size is {patch}; use a multiple of it")
        return height // patch, width // patch

    def _layout(self, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Orders of the sequence (patterns, L) int32, and the pad token of every cell (gh + P, gw + P), on the CPU."""
        config = self.config
        pad = config.num_pad_tokens
        sides = grid[0] + pad, grid[1] + pad
        with torch.device("cpu"):  # also where a model is built on the meta device: no checkpoint holds these
            front = self.num_condition_tokens + config.num_text_tokens + config.num_prefix_tokens
            patterns = DIM_PATTERNS[: config.num_scan_patterns]
            orders = torch.stack([with_prefix(dim_pattern(*sides, pattern), front) for pattern in patterns])
            pad_cells = dim_pad_tokens(*grid, pad, config.pad_layout).long().clamp(min=0).reshape(sides)
        return orders, pad_cells

    def _layout_for(self, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The layout of an input: the buffers at the native size, else made once per size and kept."""
        if grid == self.native_grid:
            return self.orders, self.pad_cells
        if (grid, device) not in self._other_layouts:
            self._other_layouts[grid, device] = tuple(x.to(device) for x in self._layout(grid))
        return self._other_layouts[grid, device]

    def _network_time(self, timestep: torch.Tensor | float, batch: int, device: torch.device) -> torch.Tensor:
        """The time that the network was trained with, (B,), float32 (float64 if given so)."""
        t = torch.as_tensor(timestep, device=device)
        t = t if t.dtype == torch.float64 else t.float()
        if t.numel() not in (1, batch):
            raise ValueError(f"timestep has shape {tuple(t.shape)}; expected one number or ({batch},), one per sample")
        t = t.reshape(-1).expand(batch)
        return t + 1 if self.config.time_convention == "one_based" else t


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")


def _on_grid(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution to tokens on their grid, (B, gh, gw, D) to the same; no copy, channels stay last."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


_L = {"hidden_size": 1024, "num_classes": 1000}
_H = {"hidden_size": 1536, "num_classes": 1000}
_H_512 = {**_H, "pad_layout": "row_major_cycle"}

# Constructor arguments by the paper's size and the height of the image in pixels; S is the model of CIFAR-10 pixels,
# the others are of 8x smaller latents. H-1024 and H-1536 are H-512 at the sizes of training-free upsampling.
DIM_PRESETS: dict[str, dict[str, Any]] = {
    "S-32": {
        "in_channels": 3, "hidden_size": 512, "num_layers": 25, "num_classes": 10, "skip_fusion": "concat_linear",
    },
    "L-256": _L,
    "H-256": _H,
    "H-512": {**_H_512, "sample_size": 64},
    "H-1024": {**_H_512, "sample_size": 128},
    "H-1536": {**_H_512, "sample_size": 192},
}  # fmt: skip
