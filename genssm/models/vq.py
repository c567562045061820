"""VQ tokenizer (VQGAN, arXiv:2012.09841, as in LlamaGen, arXiv:2406.06525): images to a grid of codes and back."""

# B batch, C image channels, H W image size, h w code grid, L = h w codes, Z latent_channels, V num_vq_embeddings codes,
# E vq_embed_dim

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from genssm.layers import upcast


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """The norm used throughout; ValueError if ``groups`` does not divide ``channels``."""
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be divided into norm_num_groups={groups} groups; change either")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the shortcut where the width changes.

    Args:
        in_channels, out_channels: widths.
        groups: of the norms.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm_1 = group_norm(in_channels, groups)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = group_norm(out_channels, groups)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h, w)."""
        y = self.conv_1(F.silu(self.norm_1(x)))
        return self.shortcut(x) + self.conv_2(F.silu(self.norm_2(y)))


class AttentionBlock(nn.Module):
    """x + proj(softmax(q k^T / sqrt(channels)) v): one head over all positions.

    Args:
        channels: width.
        groups: of the norm.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, channels, h, w) to the same shape."""
        y = self.norm(x)
        q, k, v = (to(y).flatten(2).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))  # (B, h w, channels)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the size by a 3x3 convolution; zeros are added at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, channels, h, w) to (B, channels, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by repeating pixels, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, channels, h, w) to (B, channels, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(channels: int, groups: int) -> nn.Sequential:
    """The blocks at the coarsest size."""
    return nn.Sequential(
        ResidualBlock(channels, channels, groups),
        AttentionBlock(channels, groups),
        ResidualBlock(channels, channels, groups),
    )


class Level(nn.Module):
    """The blocks of one size: residual blocks, each followed by attention where asked for, and a change of size.

    Args:
        in_channels, out_channels: widths.
        depth: number of residual blocks.
        groups: of the norms.
        attention: attend after each residual block.
        resize: :class:`Downsample`, :class:`Upsample` or None.
    """

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, groups: int, attention: bool, resize: type | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * depth
        self.out_channels = widths[-1]
        self.residual = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in itertools.pairwise(widths))
        self.attention = nn.ModuleList(AttentionBlock(out_channels, groups) for _ in range(depth if attention else 0))
        self.resize = resize(self.out_channels) if resize else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h', w')."""
        for index, block in enumerate(self.residual):
            x = block(x)
            if self.attention:
                x = self.attention[index](x)
        return self.resize(x)


class Encoder(nn.Module):
    """Image to latents: levels from fine to coarse, each but the last halving the size; attention in the last."""

    def __init__(
        self, in_channels: int, base: int, widths: Sequence[int], depth: int, latent_channels: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, base, 3, padding=1)
        self.levels, channels = nn.ModuleList(), base
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            self.levels.append(Level(channels, width, depth, groups, last, None if last else Downsample))
            channels = self.levels[-1].out_channels
        self.middle = middle(channels, groups)
        self.norm_out = group_norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, Z, h, w)."""
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Latents to image: levels from coarse to fine with one residual block more; attention in the first."""

    def __init__(self, out_channels: int, widths: Sequence[int], depth: int, latent_channels: int, groups: int) -> None:
        super().__init__()
        channels = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.middle = middle(channels, groups)
        self.levels = nn.ModuleList()
        for i, width in enumerate(reversed(widths)):
            last = i == len(widths) - 1
            self.levels.append(Level(channels, width, depth + 1, groups, i == 0, None if last else Upsample))
            channels = width
        self.norm_out = group_norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map (B, Z, h, w) to (B, C, H, W)."""
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@dataclass
class Quantized(BaseOutput):
    """What the quantiser makes of latents.

    Args:
        latents: the nearest code vectors, (B, E, h, w), float32; their gradient goes to the encoder unchanged.
        codes: their indices in raster order, (B, L), int64.
        codebook_loss, commitment_loss, entropy_loss: scalars, weighted; None outside training.
    """

    latents: torch.Tensor
    codes: torch.Tensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None


class CodeVectors(nn.Embedding):
    """The vectors of the codes, (V, E)."""

    def forward(self) -> torch.Tensor:
        """Hand the weight out; by a call, so that offloading hooks notice."""
        return self.weight


class VectorQuantizer(nn.Module):
    """Nearest code vector (van den Oord et al. 2017, arXiv:1711.00937), on the unit sphere (Yu et al. 2021).

        code = argmin_v |z - e_v|^2,      output z + sg(e_code - z),      z and e_v divided by their length first
        codebook loss |e_code - sg z|^2,      commitment loss w |z - sg e_code|^2
        entropy loss w' (mean_z H(p(. | z)) - H(mean_z p(. | z))),      p(. | z) = softmax(-|z - e|^2 / temperature)

    sg stops the gradient; squares are means over all numbers. ``usage`` follows the share of the latents that each code
    gets in training (a running average).

    Args:
        num_codes: V.
        dim: E.
        normalize: divide by the length; False quantises in the plain space.
        commitment_weight: w.
        entropy_weight: w'.
        entropy_temperature: temperature.
        usage_decay: of the running average.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        normalize: bool = True,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        usage_decay: float = 0.95,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.commitment_weight = commitment_weight
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.usage_decay = usage_decay
        self.embedding = CodeVectors(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        if normalize:
            with torch.no_grad():
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        self.register_buffer("usage", torch.full((num_codes,), 1 / num_codes))

    def codebook(self) -> torch.Tensor:
        """The code vectors as they are compared and looked up, (V, E), float32."""
        weight = upcast(self.embedding())
        return F.normalize(weight, dim=-1) if self.normalize else weight

    def lookup(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The vectors of ``codes`` (B, L) on a grid (h, w), (B, E, h, w), float32."""
        return F.embedding(codes, self.codebook()).unflatten(1, grid).permute(0, 3, 1, 2)

    def forward(self, z: torch.Tensor) -> Quantized:
        """Quantise ``z`` (B, E, h, w)."""
        with torch.autocast(z.device.type, enabled=False):
            z = upcast(z).permute(0, 2, 3, 1)  # (B, h, w, E)
            z = F.normalize(z, dim=-1) if self.normalize else z
            codebook = self.codebook()
            rows = z.flatten(0, 2)
            distance = rows.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * rows @ codebook.T
            codes = distance.argmin(dim=1)  # (B L,)
            nearest = F.embedding(codes, codebook).view_as(z)
            losses = {}
            if self.training:
                self._count(codes)
                losses = {
                    "codebook_loss": F.mse_loss(nearest, z.detach()),
                    "commitment_loss": self.commitment_weight * F.mse_loss(z, nearest.detach()),
                    "entropy_loss": self.entropy_weight * self._entropy_loss(distance),
                }
            latents = (z + (nearest - z).detach()).permute(0, 3, 1, 2)
        return Quantized(latents=latents, codes=codes.view(len(z), -1), **losses)

    def _entropy_loss(self, distance: torch.Tensor) -> torch.Tensor:
        if self.entropy_weight == 0:
            return distance.new_zeros(())
        logits = -distance / self.entropy_temperature
        share = logits.softmax(dim=-1)
        mean = share.mean(dim=0)
        each = -(share * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        return each + (mean * (mean + 1e-5).log()).sum()

    @torch.no_grad()
    def _count(self, codes: torch.Tensor) -> None:
        ones = torch.ones(len(codes), dtype=self.usage.dtype, device=codes.device)
        share = torch.zeros_like(self.usage).index_add_(0, codes, ones) / len(codes)
        self.usage.lerp_(share, 1 - self.usage_decay)

    def usage_statistics(self) -> dict[str, float]:
        """``perplexity`` of the running shares, at most V, and ``used``: how many codes get more than V^-1 / 100."""
        share = self.usage / self.usage.sum()
        entropy = -(share * share.clamp(min=1e-30).log()).sum()
        return {"perplexity": float(entropy.exp()), "used": int((share > self._threshold(0.01)).sum())}

    def _threshold(self, fraction: float) -> float:
        return fraction / len(self.usage)

    @torch.no_grad()
    def restart_dead_codes(
        self, latents: torch.Tensor, generator: torch.Generator | None = None, fraction: float = 0.01
    ) -> int:
        """Move codes that are hardly used to latents of the data, drawn with replacement.

        Args:
            latents: what the encoder makes of a batch, (B, E, h, w); on several processes the same on each.
            generator: draws the latents, on the device of ``latents``.
            fraction: a code is dead when its share is below this part of the mean share 1 / V.

        Returns:
            How many codes were moved. Their share restarts at the mean.
        """
        dead = (self.usage < self._threshold(fraction)).nonzero().flatten()
        rows = upcast(latents).movedim(1, -1).flatten(0, -2)
        rows = F.normalize(rows, dim=-1) if self.normalize else rows
        chosen = torch.randint(len(rows), dead.shape, generator=generator, device=rows.device)
        self.embedding.weight[dead] = rows[chosen].to(self.embedding.weight.dtype)
        self.usage[dead] = 1 / len(self.usage)
        return len(dead)


@dataclass
class TokenizerOutput(BaseOutput):
    """A reconstruction and how it came about.

    Args:
        sample: reconstructed images, (B, C, H, W), about -1..1.
        quantized: codes and losses.
        latents: before the quantiser, (B, E, h, w).
    """

    sample: torch.Tensor
    quantized: Quantized | None = None
    latents: torch.Tensor | None = None


class VQTokenizer(ModelMixin, ConfigMixin):
    """Convolutional encoder, vector quantiser and decoder; the defaults are VQ-f16 (LlamaGen, AiM).

    The quantiser computes in float32 whatever the weights. What differs from the released code: usage is a running
    share that training can act upon, and losses are computed in training only.

    Args:
        in_channels: image channels C.
        base_channels: width that the multipliers multiply.
        channel_multipliers: width of each level, fine to coarse; images shrink by 2 ** (levels - 1).
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        latent_channels: width Z between the convolutions of encoder and decoder.
        num_vq_embeddings: codes V.
        vq_embed_dim: length E of a code vector.
        norm_num_groups: of the norms.
        normalize_codes, commitment_weight, entropy_weight, entropy_temperature: see :class:`VectorQuantizer`.
        has_encoder: False makes a decoder only.

    Raises:
        ValueError: widths and norm groups do not fit each other.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        layers_per_block: int = 2,
        latent_channels: int = 256,
        num_vq_embeddings: int = 16384,
        vq_embed_dim: int = 8,
        norm_num_groups: int = 32,
        normalize_codes: bool = True,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        has_encoder: bool = True,
    ) -> None:
        super().__init__()
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.encoder = None
        if has_encoder:
            self.encoder = Encoder(
                in_channels, base_channels, widths, layers_per_block, latent_channels, norm_num_groups
            )
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, 1)
        self.quantize = VectorQuantizer(
            num_vq_embeddings,
            vq_embed_dim,
            normalize=normalize_codes,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
        )
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, 1)
        self.decoder = Decoder(in_channels, widths, layers_per_block, latent_channels, norm_num_groups)

    @property
    def scale_factor(self) -> int:
        """Pixels per code, along each side."""
        return 2 ** (len(self.config.channel_multipliers) - 1)

    @apply_forward_hook
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents before the quantiser.

        Args:
            images: (B, C, H, W) in -1..1, sizes multiples of ``scale_factor``.

        Returns:
            (B, E, h, w).

        Raises:
            ValueError: the model has no encoder, or the images do not fit it.
        """
        if self.encoder is None:
            raise ValueError("this tokenizer is a decoder only (has_encoder is False); it cannot encode images")
        channels, factor = self.config.in_channels, self.scale_factor
        if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (B, {channels}, H, W) with H and W multiples of "
                f"{factor}"
            )
        return self.quant_conv(self.encoder(images.to(self.dtype)))

    def tokenize(self, images: torch.Tensor) -> torch.Tensor:
        """Codes (B, L), int64, of ``images`` (B, C, H, W) in -1..1, in raster order."""
        return self.quantize(self.encode(images)).codes

    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W), about -1..1, of code vectors ``latents`` (B, E, h, w)."""
        return self.decoder(self.post_quant_conv(latents.to(self.dtype)))

    @apply_forward_hook
    def decode_codes(
        self, codes: torch.Tensor, grid: tuple[int, int] | None = None, present: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Images of codes.

        Args:
            codes: (B, L), int64, in raster order.
            grid: (h, w) with h w = L; None means a square.
            present: (h, w) or (B, 1, h, w), True where a code counts, zeros stand for the vectors of the others, whose
                codes may be out of range; None means everywhere.

        Returns:
            (B, C, H, W), about -1..1.

        Raises:
            ValueError: the codes do not fill the grid.
        """
        side = math.isqrt(codes.shape[-1])
        grid = (side, side) if grid is None else grid
        if codes.dim() != 2 or math.prod(grid) != codes.shape[1]:
            raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (B, {grid[0]} x {grid[1]})")
        if present is None:
            return self.decode(self.quantize.lookup(codes, grid))
        codes = codes.clamp(max=self.config.num_vq_embeddings - 1)
        return self.decode(self.quantize.lookup(codes, grid) * present)

    def forward(self, images: torch.Tensor, return_dict: bool = True) -> TokenizerOutput | tuple:
        """Encode, quantise and decode.

        Args:
            images: (B, C, H, W) in -1..1.
            return_dict: return an output object rather than a tuple.

        Returns:
            :class:`TokenizerOutput`.

        Raises:
            ValueError: see :meth:`encode`.
        """
        latents = self.encode(images)
        quantized = self.quantize(latents)
        sample = self.decode(quantized.latents)
        if not return_dict:
            return sample, quantized, latents
        return TokenizerOutput(sample=sample, quantized=quantized, latents=latents)


VQ_PRESETS: dict[str, dict[str, Any]] = {"f16": {}}

# Published key -> ours, in this order.
_PUBLISHED_KEYS = {
    r"\.conv_blocks\.": ".levels.",
    r"\.res\.": ".residual.",
    r"\.attn\.": ".attention.",
    r"\.mid\.": ".middle.",
    r"\.norm(\d)\.": r".norm_\1.",
    r"\.conv(\d)\.": r".conv_\1.",
    r"\.nin_shortcut\.": ".shortcut.",
    r"\.(down|up)sample\.": ".resize.",
    r"\.(q|k|v)\.(weight|bias)$": r".to_\1.\2",
    r"\.proj_out\.": ".to_out.",
}


def convert_vq_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the weights of a LlamaGen tokenizer, or of the tokenizer in AiM's files, to :class:`VQTokenizer`.

    Args:
        state_dict: tensors under their published names (with or without ``vqvae.`` in front; other models' weights
            beside them are passed over then).

    Returns:
        The same tensors under our names; the released code's list of recently used codes is left out.
    """
    converted = {}
    for key, value in _tokenizer_part(state_dict).items():
        if key == "quantize.codebook_used":
            continue
        for pattern, ours in _PUBLISHED_KEYS.items():
            key = re.sub(pattern, ours, key)
        converted[key] = value
    codes = len(converted["quantize.embedding.weight"])
    converted["quantize.usage"] = torch.full((codes,), 1 / codes)
    return converted


def _tokenizer_part(state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    inside = {k.removeprefix("vqvae."): v for k, v in state_dict.items() if k.startswith("vqvae.")}
    return inside or state_dict


def vq_config_from_published(state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of :class:`VQTokenizer` off a published checkpoint.

    Args:
        state_dict: as for :func:`convert_vq_state_dict`.
        given: arguments known from elsewhere: ``norm_num_groups`` and ``normalize_codes``, where they differ from the
            defaults, leave no trace in the tensors, nor does ``base_channels`` in a decoder whose finest level is
            wider.

    Returns:
        All arguments that the tensors show.

    Raises:
        ValueError: this is not such a tokenizer.
    """
    part = _tokenizer_part(state_dict)
    if "quantize.embedding.weight" not in part or "decoder.conv_out.weight" not in part:
        raise ValueError("no quantize.embedding.weight or decoder.conv_out.weight; not a VQ tokenizer of LlamaGen")
    levels = 1 + max(int(key.split(".")[2]) for key in part if key.startswith("decoder.conv_blocks."))
    widths = [len(part[f"decoder.conv_blocks.{levels - 1 - i}.res.0.conv1.bias"]) for i in range(levels)]
    base = widths[0]
    if "encoder.conv_in.bias" in part:
        base = len(part["encoder.conv_in.bias"])
    elif "base_channels" in given:
        base = given["base_channels"]
    depth = sum(bool(re.match(r"decoder\.conv_blocks\.0\.res\.\d+\.conv1\.bias", key)) for key in part)
    codes, dim = part["quantize.embedding.weight"].shape
    return {
        "in_channels": len(part["decoder.conv_out.bias"]),
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "layers_per_block": depth - 1,
        "latent_channels": part["decoder.conv_in.weight"].shape[1],
        "num_vq_embeddings": codes,
        "vq_embed_dim": dim,
        "has_encoder": "encoder.conv_in.bias" in part,
    }
