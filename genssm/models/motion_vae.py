"""The motion VAE of MLD (Chen et al. 2023, arXiv:2212.04048): a clip of any length to a few latent tokens and back."""

# B batch, T frames, F features per frame, D hidden_size, n latent_tokens

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from genssm.layers.modulation import upcast
from genssm.layers.sequences import as_lengths, valid_frames
from genssm.layers.skip_transformer import (
    SequencePositions,
    SkipTransformer,
    from_torch_layers,
    interleaved_sinusoids,
)
from genssm.paths import check_choice

ARCHITECTURES = ("encoder_decoder", "all_encoder")
INITIAL_LOG_VARIANCE = -4.0


@dataclass
class MotionPosterior(BaseOutput):
    """Normal distribution of a clip's latents, independent in every number.

    Args:
        mean: (B, n, D), float32.
        std: (B, n, D), float32.
    """

    mean: torch.Tensor
    std: torch.Tensor | None = None  # optional to accelerate, which rebuilds outputs

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> torch.Tensor:
        """Draw latents (B, n, D): mean + std noise; a list of generators has one for each clip."""
        if isinstance(generator, Sequence):
            noise = [torch.randn(self.mean.shape[1:], generator=g, device=g.device) for g in generator]
            noise = torch.stack([row.to(self.mean) for row in noise])
        else:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean)
        return self.mean + self.std * noise

    def kl(self) -> torch.Tensor:
        """KL divergence from the standard normal distribution of every latent number, (B, n, D)."""
        variance = self.std.square()
        return 0.5 * (variance + self.mean.square() - 1 - variance.log())

    def noise_share(self) -> torch.Tensor:
        """Share of the variance of latents, over two clips or more, that is the posterior's noise, (), 0 to 1.

        No text or class can tell anything about that share: near 1, conditions hardly change a denoiser's loss.
        """
        noise = self.std.square().mean()
        return noise / (noise + self.mean.var(0, correction=0).mean())


@dataclass
class MotionVAEOutput(BaseOutput):
    """What :class:`MotionVAE` makes of a batch of clips.

    Args:
        sample: reconstruction, (B, T, F).
        posterior: distribution of the latents.
        latents: those that were decoded, (B, n, D).
    """

    sample: torch.Tensor
    posterior: MotionPosterior | None = None  # optional, like the next, to accelerate, which rebuilds outputs
    latents: torch.Tensor | None = None


class MotionVAE(ModelMixin, ConfigMixin):
    """MLD's motion VAE over normalised features (HumanML3D: 263 a frame, KIT: 251).

    Encoder: learned tokens in front of the frames through a skip transformer; the tokens come out as mean and log
    variance. Decoder: one query per frame, zeros plus positions, that reads the latents. The length of a clip enters as
    the number of queries. What differs from the released code: latents are (B, n, D), and nothing is scaled.

    Args:
        in_channels: features F of a frame.
        hidden_size: width D of tokens and latents.
        latent_tokens: n; MLD's best for generation is 1, Motion Mamba takes 2, 7 reconstructs best.
        num_layers: layers of the encoder and of the decoder, odd.
        num_heads: heads of every attention.
        ff_size: inner width of the feed-forwards.
        arch: "encoder_decoder" (frames read the latents as a memory) or "all_encoder" (latents stand before the frames
            of one sequence).
        mlp_dist: n tokens and one linear layer for mean and log variance, instead of 2 n tokens. Tokens leave through
            the encoder's last norm, so that their log variances spread around 0: for tens of thousands of steps latents
            are mostly noise, which nothing that a denoiser reads can explain. The linear layer starts at a variance of
            exp(-4); for short training, take it.
        pos_embed: "learned" or "sinusoidal" (with dropout).
        num_positions: longest sequence of latent tokens and frames together.
        activation: "gelu" or "relu".
        pre_norm: norms before the branches instead of after.
        dropout: in every layer, in training.
    Raises:
        ValueError: an unknown choice, an even number of layers, heads that do not divide D.
    """

    _repeated_blocks: ClassVar[list[str]] = ["TransformerLayer"]
    _no_split_modules: ClassVar[list[str]] = ["TransformerLayer"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 263,
        hidden_size: int = 256,
        latent_tokens: int = 2,
        num_layers: int = 9,
        num_heads: int = 4,
        ff_size: int = 1024,
        arch: str = "encoder_decoder",
        mlp_dist: bool = False,
        pos_embed: str = "learned",
        num_positions: int = 500,
        activation: str = "gelu",
        pre_norm: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("arch", arch, ARCHITECTURES)
        layer = {
            "num_heads": num_heads, "ff_size": ff_size, "dropout": dropout,
            "activation": activation, "pre_norm": pre_norm,
        }  # fmt: skip
        self.frame_embed = nn.Linear(in_channels, hidden_size)
        self.dist_tokens = nn.Parameter(torch.randn(latent_tokens * (1 if mlp_dist else 2), hidden_size))
        self.encoder_positions = SequencePositions(hidden_size, pos_embed, num_positions, dropout)
        self.encoder = SkipTransformer(num_layers, hidden_size, **layer)
        self.dist_layer = nn.Linear(hidden_size, 2 * hidden_size) if mlp_dist else None
        if mlp_dist:
            nn.init.constant_(self.dist_layer.bias[hidden_size:], INITIAL_LOG_VARIANCE)
        self.decoder_positions = SequencePositions(hidden_size, pos_embed, num_positions, dropout)
        self.decoder = SkipTransformer(num_layers, hidden_size, memory=arch == "encoder_decoder", **layer)
        self.proj_out = nn.Linear(hidden_size, in_channels)

    @apply_forward_hook
    def encode(self, features: torch.Tensor, lengths: torch.Tensor | Sequence[int] | None = None) -> MotionPosterior:
        """Distribution of the latents of clips.

        Args:
            features: normalised, (B, T, F); what stands after a clip's length is not looked at.
            lengths: valid frames of each clip, (B,); None means all T.
        Returns:
            The posterior of (B, n, D).
        Raises:
            ValueError: another number of features, or lengths outside 1..T.
        """
        if features.dim() != 3 or features.shape[2] != self.config.in_channels:
            raise ValueError(f"features are {tuple(features.shape)}; expected (B, T, {self.config.in_channels})")
        mask = valid_frames(as_lengths(lengths, features), features.shape[1])  # (B, T)
        tokens = self.dist_tokens.expand(len(features), -1, -1)  # (B, 2n or n, D)
        count = tokens.shape[1]
        x = torch.cat([tokens, self.frame_embed(features.to(self.frame_embed.weight.dtype))], dim=1)
        x = self.encoder(self.encoder_positions(x), F.pad(mask, (count, 0), value=True))[:, :count]
        if self.dist_layer is not None:
            mean, log_variance = self.dist_layer(x).chunk(2, dim=-1)
        else:
            mean, log_variance = x.chunk(2, dim=1)  # (B, n, D) each
        return MotionPosterior(mean=upcast(mean), std=(0.5 * upcast(log_variance)).exp())

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, lengths: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Features of clips of the given lengths.

        Args:
            latents: (B, n, D).
            lengths: frames of each clip, (B,); on the CPU, else they are waited for.
        Returns:
            (B, T, F) with T the longest length; zeros after each clip's length.
        Raises:
            ValueError: latents of another shape, or not one length of at least 1 per clip.
        """
        expected = (self.config.latent_tokens, self.config.hidden_size)
        if latents.dim() != 3 or latents.shape[1:] != expected:
            raise ValueError(f"latents are {tuple(latents.shape)}; expected (B, {expected[0]}, {expected[1]})")
        lengths = torch.as_tensor(lengths)  # where it is: a copy to a GPU would wait for it
        lengths = as_lengths(lengths, torch.empty(len(latents), device=lengths.device), longest=None)
        longest = int(lengths.max())
        mask = None if int(lengths.min()) == longest else valid_frames(lengths, longest).to(latents.device)
        return self._decode(latents, longest, mask)

    def _decode(self, latents: torch.Tensor, frames: int, mask: torch.Tensor | None) -> torch.Tensor:
        """Features (B, T, F) of latents (B, n, D), zeros where ``mask`` (B, T) is False; None is True everywhere."""
        latents = latents.to(self.proj_out.weight.dtype)
        queries = latents.new_zeros(len(latents), frames, latents.shape[2])  # (B, T, D)
        if self.config.arch == "encoder_decoder":
            x = self.decoder(self.decoder_positions(queries), mask, latents)
        else:
            count = latents.shape[1]
            x = self.decoder_positions(torch.cat([latents, queries], dim=1))
            padded = None if mask is None else F.pad(mask, (count, 0), value=True)
            x = self.decoder(x, padded)[:, count:]
        x = self.proj_out(x)
        return x if mask is None else x * mask[..., None]

    def forward(
        self,
        features: torch.Tensor,
        lengths: torch.Tensor | Sequence[int] | None = None,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MotionVAEOutput | tuple:
        """Reconstruct clips.

        Args:
            features: normalised, (B, T, F).
            lengths: (B,); None means all T.
            noise: standard normal numbers (B, n, D): decode mean + std noise; None decodes the mean.
            return_dict: return an output object rather than a tuple.
        Returns:
            :class:`MotionVAEOutput`.
        """
        posterior = self.encode(features, lengths)
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        mask = valid_frames(as_lengths(lengths, features), features.shape[1])
        sample = self._decode(latents, features.shape[1], mask).to(features.dtype)  # (B, T, F)
        output = MotionVAEOutput(sample=sample, posterior=posterior, latents=latents)
        return output if return_dict else output.to_tuple()


def motion_vae_losses(
    features: torch.Tensor,
    output: MotionVAEOutput,
    to_joints: Callable[[torch.Tensor], torch.Tensor] | None,
    *,
    kl_weight: float = 1e-4,
    joints_weight: float = 1.0,
    mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Losses of MLD's VAE for each clip: smooth L1 of features and of joints, and the KL divergence.

        total = feature + joints_weight joints + kl_weight kl

    Args:
        features: normalised, (B, T, F), zeros in the padding.
        output: what the VAE made of them.
        to_joints: normalised features (B, T, F) to joint positions (B, T, J, 3), in units of about a metre (KIT's
            millimetres would swamp everything); None leaves the joint loss out.
        kl_weight, joints_weight: weights.
        mask: (B, T), True where a frame counts; None means all of them, padding included, as in the released code.
    Returns:
        "feature", "joints" (zero without ``to_joints``), "kl" and "total", (B,) each, float32.
    """

    def smooth_l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        error = F.smooth_l1_loss(upcast(a), upcast(b), reduction="none").flatten(2).mean(-1)  # (B, T)
        return error.mean(-1) if mask is None else (error * mask).sum(-1) / mask.sum(-1)

    feature = smooth_l1(output.sample, features)
    joints = torch.zeros_like(feature)
    if to_joints is not None:
        joints = smooth_l1(to_joints(upcast(output.sample)), to_joints(upcast(features)))
    kl = output.posterior.kl().flatten(1).mean(-1)
    total = feature + joints_weight * joints + kl_weight * kl
    return {"feature": feature, "joints": joints, "kl": kl, "total": total}


MOTION_VAE_PRESETS: dict[str, dict[str, Any]] = {
    "mld_1": {"latent_tokens": 1},
    "mld_7": {"latent_tokens": 7},
    "motion_mamba": {"latent_tokens": 2},
    "motion_mamba_kit": {"latent_tokens": 2, "in_channels": 251},
}

_MEMORY = "middle_block.multihead_attn.in_proj_weight"

# Published key -> ours.
_PUBLISHED_KEYS = {
    r"^global_motion_token$": "dist_tokens",
    r"^skel_embedding\.": "frame_embed.",
    r"^final_layer\.": "proj_out.",
    r"^query_pos_encoder\.": "encoder_positions.",
    r"^query_pos_decoder\.": "decoder_positions.",
}


def vae_part(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The VAE of a whole MLD checkpoint (keys under ``vae.``), without that prefix; or all, if nothing has it."""
    if not any(key.startswith("vae.") for key in state_dict):
        return dict(state_dict)
    return {key[4:]: value for key, value in state_dict.items() if key.startswith("vae.")}


def convert_motion_vae_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the VAE of an MLD checkpoint to the keys of :class:`MotionVAE`.

    Args:
        state_dict: tensors under their published names, with or without ``vae.``.
    Returns:
        The same tensors under our names; stored tables of fixed sinusoids are left out (they are computed).
    """
    converted = {}
    for key, value in from_torch_layers(vae_part(state_dict)).items():
        for pattern, name in _PUBLISHED_KEYS.items():
            key = re.sub(pattern, name, key)
        if key.endswith("_positions.pe"):
            value = value.squeeze(1)
            if _is_sinusoidal(value):
                continue
        converted[key] = value
    return converted


def motion_vae_config_from_published(
    state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Read the arguments of :class:`MotionVAE` off a published checkpoint.

    Args:
        state_dict: as for :func:`convert_motion_vae_state_dict`.
        given: arguments known from elsewhere; the tensors do not show ``num_heads`` (4 unless given), ``activation``,
            ``pre_norm``, ``dropout`` and the number of fixed positions.
    Raises:
        ValueError: this is not such a checkpoint.
    """
    weights = vae_part(state_dict)
    if "global_motion_token" not in weights or "skel_embedding.weight" not in weights:
        raise ValueError("no global_motion_token or skel_embedding.weight in the checkpoint; it is not MLD's VAE")
    width, features = weights["skel_embedding.weight"].shape
    mlp_dist = "dist_layer.weight" in weights
    table = weights.get("query_pos_encoder.pe")
    fixed = table is None or _is_sinusoidal(table.squeeze(1))
    config: dict[str, Any] = {
        "in_channels": features,
        "hidden_size": width,
        "latent_tokens": len(weights["global_motion_token"]) // (1 if mlp_dist else 2),
        "num_layers": 1 + 2 * len({key.split(".")[2] for key in weights if key.startswith("encoder.input_blocks.")}),
        "ff_size": weights["encoder.middle_block.linear1.weight"].shape[0],
        "arch": "encoder_decoder" if f"decoder.{_MEMORY}" in weights else "all_encoder",
        "mlp_dist": mlp_dist,
        "pos_embed": "sinusoidal" if fixed else "learned",
    }
    if table is not None:
        config["num_positions"] = len(table)
    else:
        config["num_positions"] = given.get("num_positions", 5000)
    return config


def _is_sinusoidal(table: torch.Tensor) -> bool:
    """Whether a position table (P, D) holds the fixed sinusoids."""
    return torch.allclose(table.detach().float().cpu(), interleaved_sinusoids(*table.shape), atol=1e-3)
