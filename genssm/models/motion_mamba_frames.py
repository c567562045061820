"""Motion Mamba on frames: the same hierarchical scans without a VAE, for motions of thousands of frames.

An extension of Motion Mamba (Zhang et al. 2024, arXiv:2403.07487), whose own scans walk over a handful of latent
tokens: here the temporal scans walk along the frames, both ways, and cost grows linearly with their number.
"""

# B batch, T frames, F features of a frame, p patch_size, L = ceil(T / p) tokens, C hidden_size, S text tokens

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from genssm.kernels.gated_residual import gated_residual
from genssm.layers import CrossAttention, DenoiserOutput, LayerNorm, Modulation, Packing, masked_mean
from genssm.layers.buffers import table_device
from genssm.layers.condition_tokens import ConditionTokens
from genssm.layers.isolated_scans import IsolatedScans, scan_counts, two_ways
from genssm.layers.sequences import as_lengths, valid_frames


class FrameTemporalMamba(nn.Module):
    """K isolated scans forwards and K backwards along the tokens; the backward ones start at the last valid token.

        [a, z] = W_in x;   out = W_out((sum_i scan_i(a)) * silu(z))

    Args:
        hidden_size: width C.
        scans: K.
        inner_size: E.
        scan: further arguments of :class:`genssm.layers.isolated_scans.IsolatedScans`.
    """

    def __init__(self, hidden_size: int, scans: int, inner_size: int, **scan: Any) -> None:
        super().__init__()
        self.scans_each_way = scans
        self.in_proj = nn.Linear(hidden_size, 2 * inner_size, bias=False)
        self.scans = IsolatedScans(inner_size, 2 * scans, dt_rank=math.ceil(hidden_size / 16), **scan)
        self.out_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        orders: torch.Tensor,
        lengths: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map (B, L, C) to (B, L, C).

        Args:
            x: (B, L, C).
            orders: (2, L), there and back.
            lengths: (B,) valid tokens.
            cu_seqlens: borders of clips that share one row, in place of ``lengths``.
        """
        a, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        orders = orders.repeat_interleave(self.scans_each_way, dim=0)
        return self.out_proj(self.scans(a, z, orders, lengths, cu_seqlens=cu_seqlens))


class FrameSpatialMamba(nn.Module):
    """Scans along the channels of each token by itself, both ways: C channels are C / g steps of g features.

    On latents this scan's features are the tokens; frames are as many as they like, so each has its own sequence.

    Args:
        hidden_size: width C.
        group_size: channels g of a step.
        scan: further arguments of :class:`genssm.layers.isolated_scans.IsolatedScans`.
    Raises:
        ValueError: g does not divide C.
    """

    def __init__(self, hidden_size: int, group_size: int, **scan: Any) -> None:
        super().__init__()
        if hidden_size % group_size:
            raise ValueError(f"channel_group is {group_size}; it must divide hidden_size={hidden_size}")
        self.group_size = group_size
        orders = two_ways(hidden_size // group_size, table_device())
        self.register_buffer("orders", orders, persistent=False)  # (2, C / g)
        self.in_proj = nn.Linear(group_size, 4 * group_size, bias=False)
        self.scans = IsolatedScans(2 * group_size, 2, dt_rank=math.ceil(group_size / 16), **scan)
        self.out_proj = nn.Linear(2 * group_size, group_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, L, C) to (B, L, C), token by token."""
        v = x.reshape(-1, x.shape[2] // self.group_size, self.group_size)  # (B L, C / g, g)
        a, z = self.in_proj(v).chunk(2, dim=-1)
        return self.out_proj(self.scans(a, z, self.orders)).reshape(x.shape)


class MotionMambaFrameBlock(nn.Module):
    """x + gate temporal(modulate(norm(x))), then x + gate spatial(modulate(norm(x))); gates start closed.

    Args:
        hidden_size: width C.
        scans: temporal scans in each direction.
        inner_size: inner width of the temporal scans.
        channel_group: channels of a step of the spatial scan; 0 leaves it out.
        scan: d_state and d_conv.
    """

    def __init__(self, hidden_size: int, scans: int, inner_size: int, channel_group: int, **scan: Any) -> None:
        super().__init__()
        self.norm_temporal = LayerNorm(hidden_size, affine=False)
        self.temporal = FrameTemporalMamba(hidden_size, scans, inner_size, **scan)
        self.norm_spatial = LayerNorm(hidden_size, affine=False) if channel_group else None
        self.spatial = FrameSpatialMamba(hidden_size, channel_group, **scan) if channel_group else None
        self.modulation = Modulation(hidden_size, 6 if channel_group else 3)

    def forward(
        self,
        x: torch.Tensor,
        conditioning: torch.Tensor,
        orders: torch.Tensor,
        lengths: torch.Tensor | None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Map (B, L, C), conditioned on (B, C), to (B, L, C); ``orders`` (2, L) and ``lengths`` (B,) of the tokens.

        With ``packing`` the row (1, L, C) holds B clips and there are no ``lengths``.
        """
        shift, scale, gate, *spatial = self.modulation(conditioning, packing)  # (B, 1, C) or (1, L, C) each
        over = (orders, lengths, None if packing is None else packing.cu_seqlens)
        y = self.temporal(self.norm_temporal(x, shift, scale), *over)
        if self.spatial is not None:
            shift, scale, spatial_gate = spatial
            x, y = self.norm_spatial(x, shift, scale, add=y, gate=gate)
            y, gate = self.spatial(y), spatial_gate
        return gated_residual(x, y, gate)


class MotionMambaFrames(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Denoiser of normalised motion features, a token for each frame or patch of frames.

    N blocks down, one in the middle behind a cross attention to the text, N up with concatenated skips. The time and
    the mean of the text modulate every block. A clip's result does not depend on what follows its length. There are no
    positions: the scans know the order, so that a model runs on longer motions than it was trained on.

    Args:
        in_channels: features F of a frame.
        patch_size: frames p of a token.
        hidden_size: width C.
        num_layers: 2 N + 1, odd.
        scan_plan: temporal scans each way of the blocks down ("2N-1..1", "1..2N-1", "N..1", "1..N"; those up mirror
            them, the middle has one), or a list.
        expand: inner width of the temporal scans = expand C.
        channel_group: channels that make a step of the spatial scan; 0 leaves it out.
        d_state, d_conv: of all scans.
        context_dim: width of the text tokens; 0 for a model without text.
        num_classes: action classes in place of text, one more is the null class; 0 for none.
    Raises:
        ValueError: an argument is unknown, or sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["MotionMambaFrameBlock"]
    _no_split_modules: ClassVar[list[str]] = ["MotionMambaFrameBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_log", "D", "dt_bias"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["condition", "frame_embed", "norm", "scans"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 263,
        patch_size: int = 1,
        hidden_size: int = 256,
        num_layers: int = 9,
        scan_plan: str | Sequence[int] = "2N-1..1",
        expand: float = 1,
        channel_group: int = 16,
        d_state: int = 16,
        d_conv: int = 4,
        context_dim: int = 768,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if num_layers % 2 == 0 or num_layers < 3:
            raise ValueError(
                f"num_layers is {num_layers}; expected an odd number from 3: blocks down, middle, blocks up"
            )
        half = num_layers // 2
        down = scan_counts(scan_plan, half)
        inner = round(expand * hidden_size)

        def block(scans: int) -> MotionMambaFrameBlock:
            return MotionMambaFrameBlock(hidden_size, scans, inner, channel_group, d_state=d_state, d_conv=d_conv)

        self.gradient_checkpointing = False
        self.frame_embed = nn.Linear(patch_size * in_channels, hidden_size)
        self.condition = ConditionTokens(hidden_size, context_dim, num_classes)
        self.input_blocks = nn.ModuleList(block(scans) for scans in down)
        self.norm_fusion = LayerNorm(hidden_size) if context_dim else None
        self.fusion = CrossAttention(hidden_size, num_heads=4, head_dim=hidden_size // 4) if context_dim else None
        self.middle_block = block(1)
        self.linear_blocks = nn.ModuleList(nn.Linear(2 * hidden_size, hidden_size) for _ in range(half))
        self.output_blocks = nn.ModuleList(block(scans) for scans in reversed(down))
        self.norm_out = LayerNorm(hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size * in_channels)
        nn.init.zeros_(self.proj_out.bias)

    @property
    def null_class_label(self) -> int | None:
        """Label of the null class; None for a model without classes."""
        return self.condition.null_label

    def forward(
        self,
        hidden_states: torch.Tensor | Sequence[torch.Tensor],
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        lengths: torch.Tensor | Sequence[int] | None = None,
        return_dict: bool = True,
    ) -> DenoiserOutput | tuple[torch.Tensor]:
        """Predict.

        Args:
            hidden_states: noisy features, (B, T, F), any T. A list of B clips (T, F), each of a length of its own, is
                packed into one row of tokens; each then has the result it has alone.
            timestep: (B,) or one number, 0..1000, fractions allowed.
            encoder_hidden_states: text tokens, (B, S, context_dim).
            class_labels: (B,) int64; None means the null class.
            encoder_attention_mask: (B, S), True (or 1) where a text token counts; None means everywhere.
            lengths: valid frames of each clip, (B,); None means all T.
            return_dict: return an output object rather than a tuple.
        Returns:
            :class:`genssm.layers.DenoiserOutput` whose ``sample`` has the shape and dtype of ``hidden_states``; zeros
            after a clip's length; a list for a list.
        Raises:
            ValueError: shapes do not fit the model, or text is missing.
        """
        packed = not isinstance(hidden_states, torch.Tensor)
        if packed:
            self._check_clips(hidden_states, lengths)
        elif hidden_states.dim() != 3 or hidden_states.shape[2] != self.config.in_channels:
            expected = f"(B, T, {self.config.in_channels})"
            raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}; this model takes {expected}")
        like = hidden_states[0].new_empty(len(hidden_states)) if packed else hidden_states
        c = self.condition(timestep, encoder_hidden_states, class_labels, like)  # (B, 1 + S, C)
        context, mask = c[:, 1:], encoder_attention_mask
        mask = mask.bool() if mask is not None else context.new_ones(context.shape[:2], dtype=torch.bool)
        # The text that is told apart by its tokens is added as their mean, a class as itself.
        conditioning = c[:, 0] + masked_mean(context, mask) if context.shape[1] else c[:, 0]  # (B, C)

        if packed:
            parts = [self._embed(clip[None].to(c.dtype)) for clip in hidden_states]
            x = torch.cat(parts, dim=1)  # (1, L, C)
            packing, tokens = Packing.of([part.shape[1] for part in parts], x.device), None
            orders = packing.join_orders([two_ways(length, x.device) for length in packing.lengths])  # (2, L)
            context, mask = packing.join_context(context, mask)
        else:
            packing, frames, patch = None, hidden_states.shape[1], self.config.patch_size
            lengths = as_lengths(lengths, hidden_states)
            valid = valid_frames(lengths, frames)  # (B, T)
            tokens = (lengths + patch - 1) // patch  # (B,)
            x = self._embed(hidden_states.masked_fill(~valid[..., None], 0.0).to(c.dtype))  # (B, L, C)
            orders = two_ways(x.shape[1], x.device)  # (2, L)
        over = (conditioning, orders, tokens, packing)
        skips = []
        for block in self.input_blocks:
            x = self._run(block, x, *over)
            skips.append(x)
        if self.fusion is not None:
            x = x + self.fusion(self.norm_fusion(x), context, mask)
        x = self._run(self.middle_block, x, *over)
        for merge, block in zip(self.linear_blocks, self.output_blocks):
            x = self._run(block, merge(torch.cat([x, skips.pop()], dim=-1)), *over)
        x = self.proj_out(self.norm_out(x))  # (B, L, p F)
        if packed:
            parts = [part.unflatten(2, (self.config.patch_size, -1))[0].flatten(0, 1) for part in packing.split(x)]
            sample = [part[: len(clip)].to(clip.dtype) for part, clip in zip(parts, hidden_states)]
        else:
            x = x.unflatten(2, (patch, -1)).flatten(1, 2)[:, :frames]  # (B, T, F)
            sample = (x * valid[..., None]).to(hidden_states.dtype)
        return DenoiserOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, C) of frames (B, T, F), filled up to whole patches with zeros."""
        patch = self.config.patch_size
        x = F.pad(x, (0, 0, 0, -x.shape[1] % patch)).unflatten(1, (-1, patch)).flatten(2)  # (B, L, p F)
        return self.frame_embed(x)

    def _check_clips(self, clips: Sequence[torch.Tensor], lengths: torch.Tensor | Sequence[int] | None) -> None:
        """Refuse clips that cannot be packed."""
        if lengths is not None:
            raise ValueError("lengths are for padded clips; in a list every clip has its own length, leave them out")
        if not len(clips):
            raise ValueError("hidden_states is an empty list; pass at least one clip (T, F)")
        for place, clip in enumerate(clips):
            if clip.dim() != 2 or clip.shape[1] != self.config.in_channels or not len(clip):
                expected = f"(T, {self.config.in_channels})"
                raise ValueError(f"clip {place} of the list has shape {tuple(clip.shape)}; expected {expected}")

    def _run(self, block: MotionMambaFrameBlock, *arguments: torch.Tensor | Packing | None) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)


MOTION_MAMBA_FRAMES_PRESETS: dict[str, dict[str, Any]] = {
    "frame": {},
    "patch4": {"patch_size": 4},
    "frame_kit": {"in_channels": 251},
    "tiny": {"hidden_size": 32, "num_layers": 3, "d_state": 4, "channel_group": 8},
}
