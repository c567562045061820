"""DiMSUM (Phung et al. 2024, arXiv:2411.04168): a diffusion denoiser that scans the image and its wavelet packets."""

# B batch, C channels, H W input size, gh gw token grid, L = gh gw tokens, D hidden_size, P paths, F = 4 cell side,
# S context tokens

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from genssm.kernels.gated_residual import gated_residual
from genssm.layers import (
    DenoiserOutput,
    DropPath,
    LabelEmbedding,
    LayerNorm,
    Modulation,
    Norm,
    PatchEmbed,
    RMSNorm,
    TimestepEmbedding,
    make_mixer,
    masked_mean,
    mixer_options,
    modulate,
    read_text,
    resize_positions,
    sincos_2d,
    unpatchify,
    upcast,
)
from genssm.layers.buffers import table_device
from genssm.layers.modulation import product_dtype
from genssm.layers.positions import ConvPositions, rotary_table, rotate
from genssm.layers.transformer import MLP, AttentionBlock, CrossFusion, zero_bias_linear
from genssm.layers.wavelets import BlockCosine, FourierMixing, WaveletPacking, cell_major_order
from genssm.scan_orders import compose, dimsum_frequency, dimsum_spatial, local_window, stack

NORMS = {"rms": RMSNorm, "layer": LayerNorm}
COMBINED = ("combined", "combined_fourier", "combined_einfft")
SEQUENTIAL = ("linear", "raw", "wave", "window")
PATH_SCANS = ("sweep", "zigzag", "jpeg")
SCANS = ("alternating", "bidirectional", *PATH_SCANS)
CELL = 4


class Branch(nn.Module):
    """A mixer with adaptive shift, scale and gate, which starts open: x + gate * Mamba(x (1 + scale) + shift).

    Args:
        hidden_size: width d of the tokens.
        conditioning_size: width D of the conditioning.
        cond_proj: own the released mixers' ``cond_proj``. Their code hands its result over as the output buffer of the
            convolution, which overwrites it, so it never had any effect, nor a gradient: kept frozen and unused.
        mixer: what :func:`genssm.layers.make_mixer` takes.
    """

    def __init__(self, hidden_size: int, conditioning_size: int, *, cond_proj: bool, mixer: Mapping[str, Any]) -> None:
        super().__init__()
        self.modulation = Modulation(conditioning_size, 3, hidden_size, zero=False)
        self.mixer = make_mixer(hidden_size, **mixer)
        self.cond_proj = _cond_proj(conditioning_size, mixer["expand"] * hidden_size) if cond_proj else None

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Mix ``x`` (B, L, d), conditioned on SiLU(c) (B, D), along ``order`` (L,) or (2, L); returns (B, L, d)."""
        shift, scale, gate = self.modulation(conditioning, activated=True)  # (B, 1, d) each
        return gated_residual(x, self.mixer(modulate(x, shift, scale), order), gate)


class DiMSUMBlock(nn.Module):
    """A block with two branches: half of the channels mixed in space, half in frequency, fused by cross attention.

        r = r + DropPath(x);  u = norm(r);  v = u + fuse(spatial(u_1), frequency(u_2))
        x = v + gate * MLP(modulate(norm(v)))

    The sum starts from the normalised u, not from the residual stream r, which only feeds the next block's norm.

    Args:
        hidden_size: width D.
        kind: "combined" (wavelet packets), "combined_fourier" (4 x 4 block DCT) or "combined_einfft" (Fourier mixing
            without a mixer).
        norm: "rms" or "layer".
        gated_mlp: gated or plain MLP.
        swap_keys: see :class:`CrossFusion`.
        drop_path: probability of dropping the incoming ``x`` for a sample in training.
        cond_proj: see :class:`Branch`.
        mixer: what :func:`genssm.layers.make_mixer` takes.
    """

    def __init__(
        self,
        hidden_size: int,
        kind: str,
        *,
        norm: str = "rms",
        gated_mlp: bool = True,
        swap_keys: bool = False,
        drop_path: float = 0.0,
        cond_proj: bool = False,
        mixer: Mapping[str, Any],
    ) -> None:
        super().__init__()
        half = hidden_size // 2
        self.drop_path = DropPath(drop_path)
        self.norm = NORMS[norm](hidden_size, 1e-5)
        self.spatial = Branch(half, hidden_size, cond_proj=cond_proj, mixer=mixer)
        self.transform = None
        if kind == "combined_einfft":
            self.frequency = FourierMixing(half)
        else:
            # the DCT branch walks its own two paths, whatever the scan of the spatial branch is
            mixer = {**mixer, "bidirectional": False} if kind == "combined_fourier" else mixer
            self.transform = WaveletPacking(levels=2) if kind == "combined" else BlockCosine(CELL)
            self.frequency = Branch(half, hidden_size, cond_proj=cond_proj, mixer=mixer)
        self.fusion = CrossFusion(hidden_size, swap_keys=swap_keys)
        self.modulation = Modulation(hidden_size, 3)
        self.norm_2 = NORMS[norm](hidden_size, 1e-5)
        self.mlp = MLP(hidden_size, gated_mlp, mixer["out_scale"])

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        conditioning: torch.Tensor,
        grid: tuple[int, int],
        order: torch.Tensor,
        frequency_order: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            hidden_states: output of the block before, (B, L, D).
            residual: residual stream, (B, L, D), float32; None in the first block.
            conditioning: SiLU of the conditioning vector, (B, D).
            grid: (gh, gw).
            order: of the spatial branch, (L,) or (2, L), raster indices.
            frequency_order: of the frequency branch, (L,) or (2, L), rows of the transformed tokens.

        Returns:
            ``hidden_states`` and ``residual`` for the next block.
        """
        conditioning = conditioning.to(product_dtype(conditioning) or conditioning.dtype)  # once for three products
        shift, scale, gate = self.spatial.modulation(conditioning, activated=True)  # (B, 1, D/2) each
        # The spatial branch written out: the norm modulates its half in its own pass, and zeros leave the other half.
        zeros = torch.zeros_like(shift)
        wide = (torch.cat([vector, zeros], dim=-1) for vector in (shift, scale))
        residual, y, u = _accumulate(self.norm, residual, self.drop_path(hidden_states), *wide)  # (B, L, D) each
        (y_1, y_2), (u_1, u_2) = y.chunk(2, dim=-1), u.chunk(2, dim=-1)  # (B, L, D/2) each
        spatial = gated_residual(u_1, self.spatial.mixer(y_1, order), gate)
        if self.transform is None:
            frequency = self.frequency(u_2)
        else:
            packed = self.frequency(self.transform(y_2, grid), conditioning, frequency_order)
            frequency = self.transform(packed, grid, inverse=True)
        shift, scale, gate = self.modulation(conditioning, activated=True)
        v, y = self.norm_2(u, shift, scale, add=self.fusion(spatial, frequency))
        return gated_residual(v, self.mlp(y), gate), residual


class DiMSUMLinearBlock(nn.Module):
    """A block with one mixer over the full width, in space or on wavelet packets (ablations of the paper).

        r = r + DropPath(x);  u = norm(r);  u = u + gate * Mamba(modulate(u))
        x = u + gate * MLP(modulate(norm(u)))

    Args:
        hidden_size: width D.
        kind: "linear", "window" (the same along windows), "wave" (on wavelet packets) or "raw" (no MLP).
        norm: "rms" or "layer".
        gated_mlp: gated or plain MLP.
        drop_path: probability of dropping the incoming ``x`` for a sample in training.
        cond_proj: see :class:`Branch`.
        mixer: what :func:`genssm.layers.make_mixer` takes.
    """

    def __init__(
        self,
        hidden_size: int,
        kind: str,
        *,
        norm: str = "rms",
        gated_mlp: bool = True,
        drop_path: float = 0.0,
        cond_proj: bool = False,
        mixer: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.norm = NORMS[norm](hidden_size, 1e-5)
        self.transform = WaveletPacking(levels=2) if kind == "wave" else None
        self.modulation = Modulation(hidden_size, 3 if kind == "raw" else 6)
        self.mixer = make_mixer(hidden_size, **mixer)
        self.cond_proj = _cond_proj(hidden_size, mixer["expand"] * hidden_size) if cond_proj else None
        self.norm_2 = None if kind == "raw" else NORMS[norm](hidden_size, 1e-5)
        self.mlp = None if kind == "raw" else MLP(hidden_size, gated_mlp, mixer["out_scale"])

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        conditioning: torch.Tensor,
        grid: tuple[int, int],
        order: torch.Tensor,
        frequency_order: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`DiMSUMBlock.forward`; there is no second order."""
        shift, scale, gate, *mlp = self.modulation(conditioning, activated=True)  # (B, 1, D) each
        x = self.drop_path(hidden_states)
        if self.transform is None:
            residual, y, u = _accumulate(self.norm, residual, x, shift, scale)  # (B, L, D) each
        else:
            residual, u = _accumulate(self.norm, residual, x)
            u = self.transform(u, grid)
            y = modulate(u, shift, scale)
        y = self.mixer(y, order)
        if self.mlp is not None:
            shift, scale, mlp_gate = mlp
            u, y = self.norm_2(u, shift, scale, add=y, gate=gate)
            y, gate = self.mlp(y), mlp_gate
        u = gated_residual(u, y, gate)
        if self.transform is not None:
            u = self.transform(u, grid, inverse=True)
        return u, residual


class DiMSUM(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """DiMSUM denoiser for images: unconditional, class- or text-conditional.

    What differs from the released code: path scans, odd grids and convolutional positions run; no path moves tokens
    around in memory (each scan follows one permutation, wavelet cells included); both directions of a bidirectional
    mixer start with the same step sizes; plain MLPs in every kind of block; the mixers' ``cond_proj``, which never had
    an effect, is left out unless asked for.

    Args:
        sample_size: height and width of the input, in latent or pixel units; one number for a square. Other sizes run
            too: scan orders are made for them and learned positions are resized. Blocks with wavelets or DCT need
            sides that are multiples of 4 patches.
        in_channels: channels C of the input.
        patch_size: side of a patch.
        hidden_size: width D, a multiple of 16.
        num_layers: number of Mamba blocks. (The released "raw" type has three times its nominal depth, and with
            independent attention the nominal depth counts those blocks too.)
        num_classes: classes; 0 for a model without class labels, which still learns one row, as released.
        null_condition: own a null class (label ``num_classes``) and, with text, a null text.
        context_dim: width of the text tokens, whose mean joins the conditioning vector; 0 for a model without text.
        text_attention: the attention blocks also read the text tokens by cross attention.
        block_type: "combined", "combined_fourier", "combined_einfft", "linear", "raw", "wave" or "window".
        scan: "alternating": rows, columns and both backwards in turn (released as "none"); "bidirectional": two
            directions with own parameters in every block ("v2"); "sweep", "zigzag" or "jpeg": paths from the corners.
        num_paths: how many of the 8 paths of "sweep", "zigzag" or "jpeg" the blocks cycle through.
        serpentine: turn every odd line of the grid before scanning.
        attention_every: an attention block after every so many blocks; 0 for none.
        shared_attention: one set of weights for all of them, else one each.
        gated_mlp: gated MLPs, else plain ones.
        pos_embed: "learned" (starting as sine-cosine), "sincos2d_fixed", "rotary" or "conv".
        swap_keys: the variant of the fusion in which each query meets the values of its own branch.
        learn_sigma: predict C more channels.
        final_norm: end on the normalised residual stream instead of the last block's output.
        norm: "rms" or "layer".
        mixer: "mamba" (:class:`genssm.layers.Mamba`) or "mamba2" (:class:`genssm.layers.Mamba2`).
        d_state, d_conv, expand: sizes of the mixers, see these classes.
        dt_rank: of "mamba".
        headdim, ngroups: of "mamba2"; None for its own defaults.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the second.
        released_cond_proj: hold the dead ``cond_proj`` weights of released checkpoints, frozen and without effect.
        time_convention: "diffusers": the network sees timestep / 1000 and its output is the prediction.
            "data_at_one": it sees 1 - timestep / 1000 and its output is negated, for weights trained with data at t = 1
            (DiMSUM's own). The additional channels of ``learn_sigma`` are never negated.

    Raises:
        ValueError: an argument is unknown, or sizes do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks: ClassVar[list[str]] = ["DiMSUMBlock", "DiMSUMLinearBlock", "AttentionBlock"]
    _no_split_modules: ClassVar[list[str]] = ["DiMSUMBlock", "DiMSUMLinearBlock", "AttentionBlock"]
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
        patch_size: int = 2,
        hidden_size: int = 1024,
        num_layers: int = 16,
        num_classes: int = 0,
        null_condition: bool = True,
        context_dim: int = 0,
        text_attention: bool = False,
        block_type: str = "combined",
        scan: str = "alternating",
        num_paths: int = 8,
        serpentine: bool = False,
        attention_every: int = 4,
        shared_attention: bool = True,
        gated_mlp: bool = True,
        pos_embed: str = "learned",
        swap_keys: bool = False,
        learn_sigma: bool = False,
        final_norm: bool = False,
        norm: str = "rms",
        mixer: str = "mamba",
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        headdim: int | None = None,
        ngroups: int | None = None,
        drop_path: float = 0.1,
        released_cond_proj: bool = False,
        time_convention: str = "diffusers",
    ) -> None:
        super().__init__()
        _one_of("block_type", block_type, COMBINED + SEQUENTIAL)
        _one_of("scan", scan, SCANS)
        _one_of("pos_embed", pos_embed, ("learned", "sincos2d_fixed", "rotary", "conv"))
        _one_of("norm", norm, tuple(NORMS))
        _one_of("time_convention", time_convention, ("diffusers", "data_at_one"))
        if hidden_size % 16:
            raise ValueError(f"hidden_size is {hidden_size}; its 16 attention heads need a multiple of 16")
        if not 1 <= num_paths <= 8:
            raise ValueError(f"num_paths is {num_paths}; sweep, zigzag and jpeg have 8 paths")
        if attention_every < 0:
            raise ValueError(f"attention_every is {attention_every}; expected a number of blocks, or 0 for none")
        if text_attention and not (context_dim and attention_every):
            raise ValueError("text_attention needs text and attention blocks; set context_dim and attention_every")
        if swap_keys and block_type not in COMBINED:
            raise ValueError(f"swap_keys is a variant of the fusion, and block_type {block_type!r} fuses nothing")
        if serpentine and block_type == "window":
            raise ValueError("serpentine turns the lines of the grid, and block_type 'window' has no lines")
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.gradient_checkpointing = False
        self.native_grid = self._token_grid(height, width)

        self.patch_embed = PatchEmbed(in_channels, hidden_size, patch_size)
        self.time_embed = TimestepEmbedding(hidden_size, scale=1e-3)
        self.label_embed = LabelEmbedding(num_classes, hidden_size, null_condition or num_classes == 0)
        self.context_embed = zero_bias_linear(context_dim, hidden_size) if context_dim else None
        own_null = context_dim and null_condition
        self.null_context = nn.Parameter(0.02 * torch.randn(context_dim)) if own_null else None
        self.positions = self.conv_positions = None
        if pos_embed == "learned":
            with torch.device("cpu"):
                table = sincos_2d(hidden_size, *self.native_grid)
            self.positions = nn.Parameter(table[None].to(self.patch_embed.proj.weight.device))
        elif pos_embed == "conv":
            self.conv_positions = ConvPositions(hidden_size)

        out_scale = num_layers**-0.5
        options: dict[str, Any] = {"norm": norm, "gated_mlp": gated_mlp, "cond_proj": released_cond_proj}
        if block_type in COMBINED:
            options["swap_keys"] = swap_keys
        mixer_of_blocks = mixer_options(
            mixer, dt_rank=dt_rank, headdim=headdim, ngroups=ngroups, d_state=d_state, d_conv=d_conv, expand=expand,
            bidirectional=scan == "bidirectional", out_scale=out_scale,
        )  # fmt: skip
        block_class = DiMSUMBlock if block_type in COMBINED else DiMSUMLinearBlock
        rates = [0.0, *torch.linspace(0, drop_path, num_layers, device="cpu").tolist()]
        self.blocks = nn.ModuleList(
            block_class(hidden_size, block_type, drop_path=rates[i], mixer=mixer_of_blocks, **options)
            for i in range(num_layers)
        )
        uses = num_layers // attention_every if attention_every else 0
        self.attention_blocks = nn.ModuleList(
            AttentionBlock(hidden_size, gated_mlp=gated_mlp, out_scale=out_scale, cross_attention=text_attention)
            for _ in range(min(uses, 1) if shared_attention else uses)
        )
        drop_path_out = DropPath(drop_path)
        self.drop_path_out = drop_path_out if final_norm else None
        self.norm_out = NORMS[norm](hidden_size, 1e-5) if final_norm else None
        self.norm_final = LayerNorm(hidden_size, affine=False)
        self.modulation_out = Modulation(hidden_size, 2)
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.proj_out = zero_bias_linear(hidden_size, patch_size * patch_size * self.out_channels)
        nn.init.zeros_(self.proj_out.weight)

        self._other_layouts: dict[tuple, tuple[torch.Tensor | None, ...]] = {}
        layout = self._layout(self.native_grid, table_device())
        for name, buffer in zip(("orders", "frequency_orders", "fixed_positions"), layout):
            # A None among the buffers is more than sequential offloading can bear.
            setattr(self, name, None if buffer is None else nn.Buffer(buffer, persistent=False))

    @property
    def null_class_label(self) -> int | None:
        """Label of the null class; None when the model has no classes or no null class."""
        return self.label_embed.null_label if self.config.num_classes else None

    @property
    def has_null_text(self) -> bool:
        """Whether the model knows "no text": ``encoder_hidden_states`` None, or a row masked everywhere."""
        return self.null_context is not None

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
            encoder_hidden_states: text tokens, (B, S, context_dim); None means the null text.
            encoder_attention_mask: (B, S), True (or 1) where a text token counts; None means everywhere. A row that is
                False everywhere means the null text, in a model that has one.
            return_dict: return an output object rather than a tuple.

        Returns:
            :class:`genssm.layers.DenoiserOutput` whose ``sample`` has the shape and dtype of ``hidden_states``, and
            twice its channels with ``learn_sigma``.

        Raises:
            ValueError: shapes do not fit the model, a condition it does not know, or a missing label.
        """
        self._check_input(hidden_states, class_labels)
        batch, grid = hidden_states.shape[0], self._token_grid(*hidden_states.shape[-2:])
        orders, frequency_orders, fixed_positions = self._layout_for(grid, hidden_states.device)

        c = self.time_embed(self._network_time(timestep, batch, hidden_states.device))  # (B, D)
        if class_labels is None and self.label_embed.null_label is not None:
            # made here: an offloaded table is on no device that the labels could be put on
            class_labels = torch.full((batch,), self.label_embed.null_label, device=hidden_states.device)
        c = c + self.label_embed(class_labels, batch)
        text = (encoder_hidden_states, encoder_attention_mask)
        context, mask = read_text(*text, batch, self.context_embed, self.null_context)  # (B, S, D), (B, S)
        if context is not None:
            c = c + masked_mean(context, mask)
        # Token by token in memory: the stream keeps the layout it begins with, and the convolution's is by channels.
        x = self.patch_embed(hidden_states).contiguous()  # (B, L, D)
        if self.positions is not None:
            x = x + resize_positions(self.positions, self.native_grid, grid, mode="bicubic")
        elif self.conv_positions is not None:
            x = self.conv_positions(x, c, grid)
        elif self.config.pos_embed == "rotary":
            x = rotate(x, fixed_positions)
        else:
            x = x + fixed_positions.to(x.dtype)

        residual, activated = None, F.silu(c)  # once for the modulation of all blocks
        for i, block in enumerate(self.blocks):
            frequency_order = None if frequency_orders is None else frequency_orders[i % len(frequency_orders)]
            x, residual = self._run(block, x, residual, activated, grid, orders[i % len(orders)], frequency_order)
            every = self.config.attention_every
            if every and (i + 1) % every == 0:
                use = 0 if self.config.shared_attention else (i + 1) // every - 1
                x = self._run(self.attention_blocks[use], x, c, context, mask)  # (B, L, D)
        if self.norm_out is not None:
            _, x = _accumulate(self.norm_out, residual, self.drop_path_out(x))
        x = self.proj_out(self.norm_final(x, *self.modulation_out(c)))  # (B, L, p p C)
        sample = unpatchify(x, grid, self.config.patch_size).to(hidden_states.dtype)  # (B, C, H, W)
        if self.config.time_convention == "data_at_one":
            velocity, more = sample.split([self.config.in_channels, self.out_channels - self.config.in_channels], dim=1)
            sample = torch.cat([-velocity, more], dim=1)
        return DenoiserOutput(sample=sample) if return_dict else (sample,)

    def load_resized(self, source: "DiMSUM") -> None:
        """Take the weights of a model for another input size, or for larger patches, as a start of training.

        Positions are resized (bicubic, half-pixel centres). Of larger patches the kernel and the outputs of the top
        left pixels are kept. (The released helper keeps the first outputs, which belong to other pixels.)

        Raises:
            ValueError: the models differ in more than that, or the patches of ``source`` are smaller.
        """
        free = ("sample_size", "patch_size", "drop_path")
        differing = [
            f"{key} {source.config[key]!r} -> {value!r}"
            for key, value in self.config.items()
            if not key.startswith("_") and key not in free and source.config[key] != value
        ]
        patch, larger = self.config.patch_size, source.config.patch_size
        if differing or larger < patch:
            reason = ", ".join(differing) or f"patch_size {larger} -> {patch} grows"
            raise ValueError(f"weights can be taken over to another input size or smaller patches only; {reason}")
        weights = source.state_dict()
        if self.positions is not None:
            table = resize_positions(weights["positions"], source.native_grid, self.native_grid, mode="bicubic")
            weights["positions"] = table
        weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][..., :patch, :patch]
        for name in ("proj_out.weight", "proj_out.bias"):
            pixels = weights[name].unflatten(0, (larger, larger, self.out_channels))
            weights[name] = pixels[:patch, :patch].flatten(0, 2)
        self.load_state_dict(weights)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        """Call a block, keeping only its input for the backward pass when gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _check_input(self, hidden_states: torch.Tensor, labels: torch.Tensor | None) -> None:
        channels = self.config.in_channels
        if hidden_states.dim() != 4 or hidden_states.shape[1] != channels:
            shape = tuple(hidden_states.shape)
            raise ValueError(f"hidden_states has shape {shape}; this model takes (B, {channels}, H, W)")
        if labels is not None and not self.config.num_classes:
            raise ValueError("class_labels are given but this model has no classes; pass None")

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an input size."""
        patch, cells = self.config.patch_size, self.config.block_type in ("combined", "combined_fourier", "wave")
        unit = patch * (CELL if cells else 1)
        if height % unit or width % unit:
            reason = f", because block_type {self.config.block_type!r} transforms {CELL}x{CELL} cells" if cells else ""
            raise ValueError(
                f"the input is {height}x{width} but patch_size is {patch}; use multiples of {unit}{reason}"
            )
        return height // patch, width // patch

    def _layout(self, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """Orders (P, L) or (P, 2, L), the frequency branch's, and a fixed or rotary position table."""
        config = self.config
        with torch.device("cpu"):
            orders, frequency_orders = _block_orders(
                config.block_type, config.scan, config.num_paths, config.serpentine, grid
            )
            fixed = None
            if config.pos_embed == "rotary":
                fixed = rotary_table(config.hidden_size, *grid)
            elif config.pos_embed == "sincos2d_fixed":
                fixed = sincos_2d(config.hidden_size, *grid)
        return tuple(None if x is None else x.to(device) for x in (orders, frequency_orders, fixed))

    def _layout_for(self, grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """The layout of an input: the buffers at the native size, else made once per size and kept."""
        if grid == self.native_grid:
            return self.orders, self.frequency_orders, self.fixed_positions
        if (grid, device) not in self._other_layouts:
            self._other_layouts[grid, device] = self._layout(grid, device)
        return self._other_layouts[grid, device]

    def _network_time(self, timestep: torch.Tensor | float, batch: int, device: torch.device) -> torch.Tensor:
        """The time that the network was trained with, 0..1000, (B,), float32 (float64 if given so)."""
        t = torch.as_tensor(timestep, device=device)
        t = t if t.dtype == torch.float64 else t.float()
        if t.numel() not in (1, batch):
            raise ValueError(f"timestep has shape {tuple(t.shape)}; expected one number or ({batch},), one per sample")
        t = t.reshape(-1).expand(batch)
        return 1000 - t if self.config.time_convention == "data_at_one" else t


def _cond_proj(in_features: int, out_features: int) -> nn.Linear:
    return zero_bias_linear(in_features, out_features).requires_grad_(False)


def _accumulate(
    norm: Norm,
    residual: torch.Tensor | None,
    x: torch.Tensor,
    shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The residual stream with ``x`` added, float32, and its norm, modulated and before that where it is modulated.

    ``x`` begins a stream that is None.
    """
    both = scale is not None
    if residual is not None:
        return norm(residual, shift, scale, add=x, return_normed=both)
    residual = upcast(x)
    found = norm(residual, shift, scale, return_normed=both)
    return residual, *(found if both else (found,))


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")


def _block_orders(
    block_type: str, scan: str, num_paths: int, serpentine: bool, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The orders that the blocks cycle through, (P, L) or (P, 2, L), and those of the frequency branch or None.

    Orders of transformed tokens are rows of the cell-major layout in which the transforms leave them.
    """
    blocks = range(4 if scan == "alternating" else 1)
    if block_type == "window":
        spatial = [local_window(*grid, CELL, column_first=block % 2 == 1) for block in blocks]
    else:
        spatial = [dimsum_spatial(*grid, block, serpentine) for block in blocks]
    frequency = []
    if block_type == "combined":
        frequency = [dimsum_frequency(*grid, block, serpentine) for block in blocks]
    if scan in PATH_SCANS:
        paths = stack(scan, *grid, paths=num_paths)
        spatial, frequency = ([compose(x, path) for x in base for path in paths] for base in (spatial, frequency))
    if block_type == "combined_fourier":
        frequency = [compose(dimsum_spatial(*grid, 0, serpentine), path) for path in stack("jpeg", *grid, paths=2)]
    if block_type == "wave":
        spatial = [cell_major_order(order, grid, CELL) for order in spatial]
    frequency = [cell_major_order(order, grid, CELL) for order in frequency]

    orders, frequency_orders = torch.stack(spatial), torch.stack(frequency) if frequency else None
    if scan == "bidirectional":
        orders = _both_ways(orders)
        if block_type == "combined":
            frequency_orders = _both_ways(frequency_orders)
    return orders, frequency_orders


def _both_ways(orders: torch.Tensor) -> torch.Tensor:
    """(P, L) to (P, 2, L): each order and the same backwards."""
    return torch.stack([orders, orders.flip(-1)], dim=1)


def _preset(hidden_size: int, num_layers: int, patch_size: int) -> dict[str, Any]:
    return {"hidden_size": hidden_size, "num_layers": num_layers, "patch_size": patch_size}


# Constructor arguments by the released names (4x32x32 latents, unconditional); L/2 is the model of the paper.
DIMSUM_PRESETS: dict[str, dict[str, Any]] = {
    "B/2": _preset(768, 12, 2),
    "L/2": _preset(1024, 16, 2),
    "L/2-v1": _preset(1024, 20, 2),
    "L/4": _preset(1024, 16, 4),
    "L/4-v1": _preset(1024, 20, 4),
    "XL/2": _preset(1152, 24, 2),
}
