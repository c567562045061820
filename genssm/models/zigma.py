"""ZigMa (Hu et al. 2024, arXiv:2403.13802): a diffusion denoiser whose Mamba layers walk the image along zigzags."""

# B batch, F frames, C channels, H W input size, gh gw token grid, N = gh gw, L = F N tokens, D hidden_size,
# S context tokens, P paths

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import CacheMixin, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from genssm.kernels.gated_residual import gated_residual
from genssm.layers import (
    CrossAttention,
    DenoiserOutput,
    DropPath,
    LabelEmbedding,
    LayerNorm,
    Modulation,
    Packing,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedding,
    make_mixer,
    masked_mean,
    mixer_options,
    read_text,
    resize_positions,
    sincos_2d,
    unpatchify,
    upcast,
)
from genssm.layers.buffers import table_device
from genssm.scan_orders import ORDERS, VIDEO_ORDERS, stack, video_kinds

NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class ZigMaBlock(nn.Module):
    """One layer of the residual stream: s + DropPath(n + gate * Mamba(modulate(n)) + cross attention), n = norm(s).

    The inner skip starts from the normalised tensor, not from the stream.

    Args:
        hidden_size: width D.
        axis: what the mixer walks along: "all" tokens in one sequence, "space" within each frame, or "time" through
            the frames at each position.
        cross_attention: read a text context after the mixer.
        mirror_time: return the result of a "time" layer mirrored in time, as ZigMa's released code does.
        drop_path: probability of dropping the block for a sample in training.
        norm: "rms" or "layer".
        norm_eps: eps of that norm.
        mixer: what :func:`genssm.layers.make_mixer` takes.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        axis: str = "all",
        cross_attention: bool = False,
        mirror_time: bool = False,
        drop_path: float = 0.0,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        mixer: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.axis = axis
        self.mirror_time = mirror_time
        self.norm = NORMS[norm](hidden_size, norm_eps)
        self.modulation = Modulation(hidden_size, 6 if cross_attention else 3)
        self.mixer = make_mixer(hidden_size, **mixer)
        self.cross_norm = LayerNorm(hidden_size, affine=False) if cross_attention else None
        self.cross_attn = CrossAttention(hidden_size) if cross_attention else None
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        order: torch.Tensor,
        frames: int = 1,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Add one layer to the stream.

        Args:
            hidden_states: residual stream (B, L, D), float32.
            conditioning: SiLU of the conditioning vector, (B, D).
            order: permutation of what the mixer walks along: (L,), (N,) or (F,); (2, L) with two directions.
            frames: F.
            context: text tokens (B, S, D).
            context_mask: (B, S) bool, True where a token may be read.
            packing: samples that share one row, B = 1: ``conditioning`` then has a row for each, ``context`` (1, S, D)
                the texts of all and ``context_mask`` is (1, L, S).

        Returns:
            (B, L, D), float32.
        """
        batch, length, width = hidden_states.shape
        # (B, 1, D) or (1, L, D) each
        shift, scale, gate, *cross = self.modulation(conditioning, packing, activated=True)
        factor = self.drop_path.factor(hidden_states, packing)  # (B, 1, 1) or (1, L, 1); None where nothing is dropped
        if self.cross_attn is None:  # the norm adds the inner skip to the stream, since it has both at hand
            x, y = self.norm(hidden_states, shift, scale, add_normed=True, factor=factor)  # (B, L, D) each
        else:
            y, x = self.norm(hidden_states, shift, scale, return_normed=True)  # (B, L, D) each
        if self.axis == "space":
            y = self.mixer(y.reshape(batch * frames, -1, width), order).reshape(batch, length, width)
        elif self.axis == "time":
            y = y.unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)  # (B N, F, D)
            y = self.mixer(y, order)
            y = y.flip(1) if self.mirror_time else y
            y = y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)  # (B, L, D)
        else:
            y = self.mixer(y, order, cu_seqlens=None if packing is None else packing.cu_seqlens)
        if self.cross_attn is not None:
            shift, scale, cross_gate = cross
            x, y = self.cross_norm(x, shift, scale, add=y, gate=gate)
            y = self.cross_attn(y, context, context_mask)
            return gated_residual(hidden_states, y, cross_gate, skip=x, factor=factor)  # (B, L, D)
        return gated_residual(x, y, gate, factor=factor)  # (B, L, D)


class ZigMa(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """ZigMa denoiser for images and video: unconditional, class- or text-conditional.

    Layer l walks the tokens along path l mod num_paths of a scan family. What differs from the released code: null
    class and null text for classifier-free guidance, inputs of any size, factorised video that runs, a true Hilbert
    curve beside the released one, the same step-size initialisation in both directions.

    Args:
        sample_size: height and width of the input, in latent or pixel units; one number for a square. Other sizes run
            too: scan orders are made for them and learned positions are resized.
        in_channels: channels C of input and output.
        patch_size: side of a patch.
        hidden_size: width D.
        num_layers: number of blocks.
        num_classes: classes; 0 for a model without class labels.
        context_dim: width of the text tokens; 0 for a model without text.
        null_condition: own a null class (label ``num_classes``) and a null text. Published weights have neither.
        scan: scan family: a key of ``genssm.scan_orders.ORDERS`` ("zigzag", "hilbert", "hilbert_released", "sweep",
            ...), "raster_bidirectional" (two directions with own parameters in every block), "random", or a list of
            permutations of the tokens of one frame (which fixes the input size).
        num_paths: how many paths of the family the layers cycle through; None means all of them.
        scan_seed: seed of the "random" family's permutations.
        num_frames: frames F of a video; 0 for images.
        video_pattern: kinds of layers, repeated over the depth: "s" walks within frames, "t" through time, e.g. "sst";
            None walks frame after frame in one sequence.
        temporal_restore: "inverse" puts the results of "t" layers back in place; "as_released" mirrors them in time,
            for weights trained with the released code.
        temporal_pos_embed: learn one position per frame beside ``pos_embed``.
        pos_embed: "learned", "sincos2d_fixed" or "none".
        mixer: "mamba" (:class:`genssm.layers.Mamba`) or "mamba2" (:class:`genssm.layers.Mamba2`).
        d_state, d_conv, expand: sizes of the mixers, see these classes.
        dt_rank: of "mamba".
        headdim, ngroups: of "mamba2"; None for its own defaults.
        norm: "rms" or "layer".
        norm_eps: eps of that norm.
        drop_path: stochastic depth of the last block, rising linearly from 0.
        time_convention: "diffusers": the network sees the timestep and its output is the prediction. "data_at_one": it
            sees 1000 - timestep and its output is negated, for weights trained with data at t = 1 (ZigMa's own).

    Raises:
        ValueError: an argument is unknown, or sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["ZigMaBlock"]
    _no_split_modules: ClassVar[list[str]] = ["ZigMaBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["A_log", "A_log_b", "D", "D_b", "dt_bias", "dt_bias_b"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        "patch_embed",
        "time_embed",
        "label_embed",
        "context_embed",
        "norm",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 4,
        patch_size: int = 1,
        hidden_size: int = 768,
        num_layers: int = 24,
        num_classes: int = 0,
        context_dim: int = 0,
        null_condition: bool = True,
        scan: str | Sequence[Sequence[int]] = "zigzag",
        num_paths: int | None = None,
        scan_seed: int = 0,
        num_frames: int = 0,
        video_pattern: str | None = None,
        temporal_restore: str = "inverse",
        temporal_pos_embed: bool = False,
        pos_embed: str = "learned",
        mixer: str = "mamba",
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        headdim: int | None = None,
        ngroups: int | None = None,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        drop_path: float = 0.1,
        time_convention: str = "diffusers",
    ) -> None:
        super().__init__()
        _one_of("pos_embed", pos_embed, ("learned", "sincos2d_fixed", "none"))
        _one_of("norm", norm, NORMS)
        _one_of("temporal_restore", temporal_restore, ("inverse", "as_released"))
        _one_of("time_convention", time_convention, ("diffusers", "data_at_one"))
        if (video_pattern or temporal_pos_embed) and not num_frames:
            raise ValueError("video_pattern and temporal_pos_embed need a video; set num_frames")
        bidirectional = scan == "raster_bidirectional"
        if bidirectional and video_pattern:
            raise ValueError(
                "raster_bidirectional walks all frames in one sequence; use another scan or no video_pattern"
            )
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.gradient_checkpointing = False
        self.native_grid = self._token_grid(height, width)

        self.patch_embed = PatchEmbed(in_channels, hidden_size, patch_size)
        self.time_embed = TimestepEmbedding(hidden_size)
        self.label_embed = LabelEmbedding(num_classes, hidden_size, null_condition) if num_classes else None
        self.context_embed = nn.Linear(context_dim, hidden_size) if context_dim else None
        self.null_context = None
        if context_dim:
            nn.init.zeros_(self.context_embed.bias)
            self.null_context = nn.Parameter(0.02 * torch.randn(context_dim)) if null_condition else None
        tokens = max(num_frames, 1) * math.prod(self.native_grid)
        self.positions = nn.Parameter(torch.zeros(1, tokens, hidden_size)) if pos_embed == "learned" else None
        self.frame_positions = nn.Parameter(torch.zeros(1, num_frames, hidden_size)) if temporal_pos_embed else None

        mixer_of_blocks = mixer_options(
            mixer, dt_rank=dt_rank, headdim=headdim, ngroups=ngroups, d_state=d_state, d_conv=d_conv, expand=expand,
            bidirectional=bidirectional, out_scale=num_layers**-0.5,
        )  # fmt: skip
        kinds = _layer_kinds(video_pattern, num_layers)
        self.layer_orders = [row for _, row in kinds]
        self.blocks = nn.ModuleList(
            ZigMaBlock(
                hidden_size,
                axis=axis,
                cross_attention=bool(context_dim),
                mirror_time=temporal_restore == "as_released",
                drop_path=drop_path * layer / (num_layers - 1) if num_layers > 1 else drop_path,
                norm=norm,
                norm_eps=norm_eps,
                mixer=mixer_of_blocks,
            )
            for layer, (axis, _) in enumerate(kinds)
        )
        self.norm_out = NORMS[norm](hidden_size, norm_eps)
        self.norm_final = LayerNorm(hidden_size, affine=False)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * in_channels)
        nn.init.zeros_(self.proj_out.bias)

        self._other_layouts: dict[tuple, tuple[torch.Tensor, ...]] = {}
        names = ("token_orders", "frame_orders", "fixed_positions")
        for name, buffer in zip(names, self._layout(max(num_frames, 1), self.native_grid)):
            # A None among the buffers is more than sequential offloading can bear.
            table = None if buffer is None else nn.Buffer(buffer.to(table_device()), persistent=False)
            setattr(self, name, table)

    @property
    def null_class_label(self) -> int | None:
        """Label of the null class; None when the model has no classes or no null class."""
        return None if self.label_embed is None else self.label_embed.null_label

    @property
    def has_null_text(self) -> bool:
        """Whether the model knows "no text": ``encoder_hidden_states`` None, or a row masked everywhere."""
        return self.null_context is not None

    @property
    def null_encoder_hidden_states(self) -> torch.Tensor | None:
        """The learned null text token, (context_dim,); None without text or without a null condition.

        Repeating the token changes nothing, so it may fill a context of any length.
        """
        return self.null_context

    def forward(
        self,
        hidden_states: torch.Tensor | Sequence[torch.Tensor],
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoiserOutput | tuple[torch.Tensor]:
        """Predict.

        Args:
            hidden_states: noisy input, (B, C, H, W), or (B, F, C, H, W) for video. A list of B images (C, H, W), each
                of a size of its own, is packed into one row of tokens; each then has the result it has alone.
            timestep: (B,) or one number, 0..1000, fractions allowed.
            class_labels: (B,) int64; None means the null class.
            encoder_hidden_states: text tokens, (B, S, context_dim); None means the null text.
            encoder_attention_mask: (B, S), True (or 1) where a text token counts; None means everywhere. A row that is
                False everywhere means the null text, in a model that has one.
            return_dict: return an output object rather than a tuple.

        Returns:
            :class:`genssm.layers.DenoiserOutput` whose ``sample`` has the shape and dtype of ``hidden_states``; a list
            for a list.

        Raises:
            ValueError: shapes do not fit the model, or a condition is missing that the model has no null for.
        """
        batch, frames = self._check_input(hidden_states, class_labels)
        packing = None
        if isinstance(hidden_states, torch.Tensor):
            x, token_orders, frame_orders = self._embed(hidden_states, frames)  # (B, L, D)
        else:
            tokens, orders, _ = zip(*(self._embed(image[None], frames) for image in hidden_states))
            x = torch.cat(tokens, dim=1)  # (1, L, D)
            packing = Packing.of([part.shape[1] for part in tokens], x.device)
            token_orders, frame_orders = packing.join_orders(orders), None

        c = self.time_embed(self._network_time(timestep, batch, x.device))  # (B, D)
        if self.label_embed is not None:
            c = c + self.label_embed(class_labels, batch)
        text = (encoder_hidden_states, encoder_attention_mask)
        context, mask = read_text(*text, batch, self.context_embed, self.null_context)  # (B, S, D), (B, S)
        if context is not None:
            c = c + masked_mean(context, mask)
            if packing is not None:
                context, mask = packing.join_context(context, mask)
        c = F.silu(c)  # once for the modulation of all blocks

        for block, row in zip(self.blocks, self.layer_orders):
            order = frame_orders if block.axis == "time" else token_orders
            order = order[row % order.shape[0]]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c, order, frames, context, mask, packing)
            else:
                x = block(x, c, order, frames, context, mask, packing)  # (B, L, D)

        x = self.proj_out(self.norm_final(self.norm_out(x)))  # (B, L, p p C)
        if packing is None:
            sample = self._unembed(x, hidden_states)
        else:
            parts = zip(packing.split(x), hidden_states)
            sample = [self._unembed(part, image[None]).squeeze(0) for part, image in parts]
        return DenoiserOutput(sample=sample) if return_dict else (sample,)

    def _embed(
        self, hidden_states: torch.Tensor, frames: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens (B, L, D) of inputs of one size, with their positions, and the orders of tokens and of frames."""
        grid = self._token_grid(*hidden_states.shape[-2:])
        token_orders, frame_orders, fixed_positions = self._layout_for(frames, grid, hidden_states.device)
        images = hidden_states.flatten(0, 1) if hidden_states.dim() == 5 else hidden_states  # (B F, C, H, W)
        # Token by token in memory: the stream keeps the layout it begins with, and the convolution's is by channels.
        x = upcast(self.patch_embed(images).contiguous()).reshape(len(hidden_states), frames * math.prod(grid), -1)
        if self.positions is not None:
            x = x + resize_positions(self.positions, *self._position_grids(frames, grid))
        if fixed_positions is not None:
            x = x + fixed_positions.repeat(frames, 1)
        if self.frame_positions is not None:
            per_frame = resize_positions(self.frame_positions, (self.config.num_frames,), (frames,))  # (1, F, D)
            x = x + per_frame.repeat_interleave(math.prod(grid), dim=1)
        return x, token_orders, frame_orders

    def _unembed(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The prediction, of the shape and dtype of ``like``, from the last tokens (B, L, p p C)."""
        grid = self._token_grid(*like.shape[-2:])
        x = unpatchify(x.reshape(-1, math.prod(grid), x.shape[-1]), grid, self.config.patch_size)  # (B F, C, H, W)
        sample = x.reshape(like.shape).to(like.dtype)
        return -sample if self.config.time_convention == "data_at_one" else sample

    def enable_cache(self, config: Any) -> None:
        """Reuse block results between similar denoising steps; see diffusers' ``CacheMixin`` and its cache configs.

        Calls must then run inside ``with model.cache_context(name)``, one name per guidance branch.
        """
        # diffusers skips only blocks it knows. Not at import time: its registry imports every model of diffusers.
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        TransformerBlockRegistry.register(ZigMaBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    def _check_input(
        self, hidden_states: torch.Tensor | Sequence[torch.Tensor], labels: torch.Tensor | None
    ) -> tuple[int, int]:
        """Batch size and number of frames of an input that fits the model."""
        if labels is not None and self.label_embed is None:
            raise ValueError("class_labels are given but this model has no classes (num_classes is 0); leave them out")
        channels = self.config.in_channels
        if not isinstance(hidden_states, torch.Tensor):
            self._check_images(hidden_states)
            return len(hidden_states), 1
        shape = f"(B, F, {channels}, H, W)" if self.config.num_frames else f"(B, {channels}, H, W)"
        if hidden_states.dim() != (5 if self.config.num_frames else 4) or hidden_states.shape[-3] != channels:
            raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}; this model takes {shape}")
        return hidden_states.shape[0], hidden_states.shape[1] if self.config.num_frames else 1

    def _check_images(self, images: Sequence[torch.Tensor]) -> None:
        """Refuse images that cannot be packed."""
        if self.config.num_frames:
            raise ValueError("hidden_states is a list; clips are not packed, pass video as (B, F, C, H, W)")
        if not len(images):
            raise ValueError("hidden_states is an empty list; pass at least one image (C, H, W)")
        for place, image in enumerate(images):
            if image.dim() != 3 or image.shape[0] != self.config.in_channels:
                expected = f"({self.config.in_channels}, H, W)"
                raise ValueError(f"image {place} of the list has shape {tuple(image.shape)}; expected {expected}")
            self._token_grid(*image.shape[1:])

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an input size."""
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"the input is {height}x{width} but patch_size is {patch}; use a multiple of it")
        return height // patch, width // patch

    def _position_grids(self, frames: int, grid: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token grid of the position table and of the input, of the same rank."""
        if self.config.num_frames:
            return (self.config.num_frames, *self.native_grid), (frames, *grid)
        return self.native_grid, grid

    def _layout(self, frames: int, grid: tuple[int, int]) -> tuple[torch.Tensor | None, ...]:
        """Token orders (P, L or N) or (1, 2, L), frame orders (2, F) and fixed positions (N, D), on the CPU."""
        config = self.config
        factorised = bool(config.video_pattern)
        with torch.device("cpu"):  # also where a model is built on the meta device: no checkpoint holds these
            orders = _token_orders(config.scan, config.num_paths, config.scan_seed, 1 if factorised else frames, grid)
            frame_orders = stack("raster", 1, frames) if factorised else None
            fixed = sincos_2d(config.hidden_size, *grid) if config.pos_embed == "sincos2d_fixed" else None
        return orders, frame_orders, fixed

    def _layout_for(self, frames: int, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """The layout of an input: the buffers at the native size, else made once per size and kept."""
        if (frames, grid) == (max(self.config.num_frames, 1), self.native_grid):
            return self.token_orders, self.frame_orders, self.fixed_positions
        key = (frames, grid, device)
        if key not in self._other_layouts:
            layout = self._layout(frames, grid)
            self._other_layouts[key] = tuple(None if x is None else x.to(device) for x in layout)
        return self._other_layouts[key]

    def _network_time(self, timestep: torch.Tensor | float, batch: int, device: torch.device) -> torch.Tensor:
        """The time that the network was trained with, (B,), float32 (float64 if given so)."""
        t = torch.as_tensor(timestep, device=device)
        t = t if t.dtype == torch.float64 else t.float()
        if t.numel() not in (1, batch):
            raise ValueError(f"timestep has shape {tuple(t.shape)}; expected one number or ({batch},), one per sample")
        t = t.reshape(-1).expand(batch)
        return 1000 - t if self.config.time_convention == "data_at_one" else t


def _one_of(name: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")


def _layer_kinds(pattern: str | None, num_layers: int) -> list[tuple[str, int]]:
    """Axis of each layer and its running number among the layers of that axis (which picks its path)."""
    if not pattern:
        return [("all", layer) for layer in range(num_layers)]
    axes = {"spatial": "space", "temporal": "time"}
    return [(axes[layer.kind], layer.path) for layer in video_kinds(pattern, num_layers, num_paths=num_layers)]


def _token_orders(
    scan: str | Sequence[Sequence[int]], num_paths: int | None, seed: int, frames: int, grid: tuple[int, int]
) -> torch.Tensor:
    """The paths of a scan family, (P, L); or (1, 2, L) for two directions. Image orders walk frame after frame."""
    tokens = math.prod(grid)
    if scan == "raster_bidirectional":
        forward = torch.arange(frames * tokens, dtype=torch.int32)
        return torch.stack([forward, forward.flip(0)])[None]
    if not isinstance(scan, str):
        paths = _explicit_paths(scan, grid)
    elif scan == "random":
        generator = torch.Generator().manual_seed(seed)
        count = 8 if num_paths is None else num_paths
        paths = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(count)]).int()
    elif scan in ORDERS:
        paths = stack(scan, *grid)
    elif scan in VIDEO_ORDERS:
        return _first_paths(stack(scan, frames, *grid), num_paths, scan)
    else:
        known = ", ".join([*ORDERS, *VIDEO_ORDERS, "random", "raster_bidirectional"])
        raise ValueError(f"scan is {scan!r}; expected one of {known}, or a list of permutations")
    offsets = tokens * torch.arange(frames, dtype=torch.int32)
    return (offsets[:, None] + _first_paths(paths, num_paths, scan)[:, None]).flatten(1)


def _explicit_paths(scan: Sequence[Sequence[int]], grid: tuple[int, int]) -> torch.Tensor:
    paths, tokens = torch.tensor(scan, dtype=torch.int32), math.prod(grid)
    if paths.dim() != 2 or not torch.equal(paths.sort(dim=1).values, torch.arange(tokens).expand(len(paths), -1)):
        raise ValueError(
            f"scan is a list of shape {tuple(paths.shape)}; on a {grid[0]}x{grid[1]} token grid each path must be a "
            f"permutation of 0..{tokens - 1} (explicit paths fix the input size)"
        )
    return paths


def _first_paths(paths: torch.Tensor, num_paths: int | None, scan: str | Sequence[Sequence[int]]) -> torch.Tensor:
    if num_paths is not None and not 1 <= num_paths <= len(paths):
        name = repr(scan) if isinstance(scan, str) else "given"
        raise ValueError(f"num_paths is {num_paths} but the scan {name} has {len(paths)} paths")
    return paths[:num_paths]


_SIZES = {"S": (368, 24), "B": (768, 24), "M": (768, 48), "L": (1024, 48), "H": (1536, 48)}  # hidden_size, num_layers
_LATENTS = {"sample_size": 32, "in_channels": 4, "scan": "zigzag"}
_LARGE = {**_LATENTS, "hidden_size": 768, "num_layers": 24, "null_condition": False}
_UCF101 = {**_LARGE, "patch_size": 2, "num_frames": 16, "num_classes": 101}

# Constructor arguments by name: the paper's sizes ("B/2": size B, patch 2; 4x32x32 latents, unconditional) and the
# configurations of the released code under their own names.
ZIGMA_PRESETS: dict[str, dict[str, Any]] = {
    f"{size}/{patch}": {**_LATENTS, "hidden_size": width, "num_layers": depth, "patch_size": patch}
    for size, (width, depth) in _SIZES.items()
    for patch in (1, 2, 4)
} | {
    "zigzag8_b1_pe2": _LARGE,
    "sweep2_b1_pe2": {**_LARGE, "scan": "raster_bidirectional"},
    "s1024_zigzag8_b2_old": {**_LARGE, "sample_size": 128, "patch_size": 2, "pos_embed": "none"},
    "3d_sweep2_b2": {**_UCF101, "scan": "raster_bidirectional"},
    "3d_zigzag8sst_b2": {**_UCF101, "video_pattern": "sst"},
    "zigzag8_b1_pe2_coco14": {**_LARGE, "context_dim": 768},
    "demo": {**_LARGE, "hidden_size": 640, "num_layers": 18, "in_channels": 3, "context_dim": 768},
}
