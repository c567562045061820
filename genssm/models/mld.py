"""MLD's denoiser (Chen et al. 2023, arXiv:2212.04048), the attention baseline for human motion."""

# B batch, L latent tokens or frames, F channels of a token, S condition tokens, D hidden_size

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn

from genssm.layers import DenoiserOutput
from genssm.layers.condition_tokens import ConditionTokens
from genssm.layers.sequences import as_lengths, valid_frames
from genssm.layers.skip_transformer import (
    SequencePositions,
    SkipTransformer,
    TransformerStack,
    from_torch_layers,
    interleaved_sinusoids,
)
from genssm.paths import check_choice

ARCHITECTURES = ("skip_encoder", "encoder", "decoder")


class MLD(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Transformer denoiser over the latent tokens of a motion VAE, or over frames (``in_channels`` given).

    Encoder forms: [latents, time, text] or [time, text, frames] in one sequence; decoder form: latents or frames read
    the memory [time, text]. Latents leave the final norm as they are, frames are embedded and projected back. Text of
    another width than D passes a ReLU and a linear layer. What differs from the released code: class labels may take
    the place of text, and the position table of a memory that is never read does not exist.

    Args:
        latent_tokens: latent tokens n of a clip; the number of frames is free.
        in_channels: features F of a frame, for the form without VAE; None for latents of width D.
        hidden_size: width D.
        num_layers: layers, an odd number of them for a U.
        num_heads: heads of every attention.
        ff_size: inner width of the feed-forwards.
        context_dim: width of the text tokens; 0 for a model without text.
        num_classes: classes, one more is the null class; 0 for a model without.
        arch: "skip_encoder" (a U with skips), "encoder" or "decoder".
        final_norm: a norm after the layers.
        pos_embed: "learned" or "sinusoidal" (with dropout).
        num_positions: longest sequence.
        sine_first, time_shift: convention of the time's sinusoids, see :func:`genssm.layers.sinusoidal_features`.
        activation: "gelu" or "relu".
        pre_norm: norms before the branches instead of after.
        dropout: in every layer, in training.
        mask_padding: frames after a clip's length are not read, without VAE. The released code lets them be read, so
            that a clip depends on the batch around it; False does the same for weights trained that way.
    Raises:
        ValueError: an unknown choice, sizes that do not fit, or both text and classes.
    """

    _repeated_blocks: ClassVar[list[str]] = ["TransformerLayer"]
    _no_split_modules: ClassVar[list[str]] = ["TransformerLayer"]

    @register_to_config
    def __init__(
        self,
        latent_tokens: int = 1,
        in_channels: int | None = None,
        hidden_size: int = 256,
        num_layers: int = 9,
        num_heads: int = 4,
        ff_size: int = 1024,
        context_dim: int = 768,
        num_classes: int = 0,
        arch: str = "skip_encoder",
        final_norm: bool = True,
        pos_embed: str = "learned",
        num_positions: int = 500,
        sine_first: bool = False,
        time_shift: float = 0.0,
        activation: str = "gelu",
        pre_norm: bool = False,
        dropout: float = 0.1,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        check_choice("arch", arch, ARCHITECTURES)
        layer = {
            "num_heads": num_heads, "ff_size": ff_size, "dropout": dropout,
            "activation": activation, "pre_norm": pre_norm,
        }  # fmt: skip
        self.frame_embed = nn.Linear(in_channels, hidden_size) if in_channels else None
        self.condition = ConditionTokens(hidden_size, context_dim, num_classes, sine_first, time_shift)
        self.positions = SequencePositions(hidden_size, pos_embed, num_positions, dropout)
        self.memory_positions = None
        if arch == "decoder":
            self.memory_positions = SequencePositions(hidden_size, pos_embed, num_positions, dropout)
        stack = SkipTransformer if arch == "skip_encoder" else TransformerStack
        self.layers = stack(num_layers, hidden_size, final_norm, memory=arch == "decoder", **layer)
        self.proj_out = nn.Linear(hidden_size, in_channels) if in_channels else None

    @property
    def null_class_label(self) -> int | None:
        """Label of the null class; None for a model without classes."""
        return self.condition.null_label

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        lengths: torch.Tensor | Sequence[int] | None = None,
        return_dict: bool = True,
    ) -> DenoiserOutput | tuple[torch.Tensor]:
        """Predict.

        Args:
            hidden_states: noisy latents (B, n, D), or noisy frames (B, L, F).
            timestep: (B,) or one number, 0..1000, fractions allowed.
            encoder_hidden_states: text tokens, (B, S, context_dim).
            class_labels: (B,) int64; None means the null class.
            encoder_attention_mask: (B, S), True (or 1) where a text token counts; None means everywhere.
            lengths: valid frames of each clip, (B,), for the form without VAE.
            return_dict: return an output object rather than a tuple.
        Returns:
            :class:`genssm.layers.DenoiserOutput` whose ``sample`` has the shape and dtype of ``hidden_states``; zeros
            after a clip's length.
        Raises:
            ValueError: shapes do not fit the model, or text is missing.
        """
        self._check(hidden_states, lengths)
        c = self.condition(timestep, encoder_hidden_states, class_labels, hidden_states)  # (B, 1 + S, D)
        c_mask = None if encoder_attention_mask is None else F.pad(encoder_attention_mask.bool(), (1, 0), value=True)
        x, valid = hidden_states.to(c.dtype), None
        if self.frame_embed is not None:
            x = self.frame_embed(x)  # (B, L, D)
            valid = valid_frames(as_lengths(lengths, x), x.shape[1])  # (B, L)
        mask = valid if self.config.mask_padding else None
        if self.memory_positions is not None:
            x = self.layers(self.positions(x), mask, self.memory_positions(c), c_mask)
        else:
            length, start = x.shape[1], 0 if self.frame_embed is None else c.shape[1]
            parts = [(x, mask), (c, c_mask)] if start == 0 else [(c, c_mask), (x, mask)]
            x = self.positions(torch.cat([part for part, _ in parts], dim=1))
            x = self.layers(x, _join_masks(parts)).narrow(1, start, length)
        if self.proj_out is not None:
            x = self.proj_out(x) * valid[..., None]
        x = x.to(hidden_states.dtype)
        return DenoiserOutput(sample=x) if return_dict else (x,)

    def _check(self, hidden_states: torch.Tensor, lengths: torch.Tensor | Sequence[int] | None) -> None:
        frames = self.config.in_channels
        width = frames or self.config.hidden_size
        fits = hidden_states.dim() == 3 and hidden_states.shape[2] == width
        if not fits or not (frames or hidden_states.shape[1] == self.config.latent_tokens):
            expected = f"(B, {'L' if frames else self.config.latent_tokens}, {width})"
            raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}; this model takes {expected}")
        if lengths is not None and not frames:
            raise ValueError("lengths are given but this model denoises latents of whole clips; give them to the VAE")


def _join_masks(parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor | None:
    """One mask (B, L) for tokens (B, L_i, D) with their masks put behind each other; None where all are None."""
    if all(mask is None for _, mask in parts):
        return None
    return torch.cat([x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for x, m in parts], dim=1)


MLD_PRESETS: dict[str, dict[str, Any]] = {
    "mld_1": {"latent_tokens": 1},
    "mld_2": {"latent_tokens": 2},
    "mld_7": {"latent_tokens": 7},
    "no_vae": {"in_channels": 263, "hidden_size": 512, "arch": "decoder"},
}

# Published key -> ours.
_PUBLISHED_KEYS = {
    r"^pose_embd\.": "frame_embed.",
    r"^pose_proj\.": "proj_out.",
    r"^time_embedding\.linear_1\.": "condition.time_embed.linear_in.",
    r"^time_embedding\.linear_2\.": "condition.time_embed.linear_out.",
    r"^emb_proj\.1\.": "condition.context_embed.",
    r"^query_pos\.": "positions.",
    r"^mem_pos\.": "memory_positions.",
    r"^(encoder|decoder)\.": "layers.",
}


def denoiser_part(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The denoiser of a whole MLD checkpoint (keys under ``denoiser.``), without that prefix; or all of the tensors."""
    if not any(key.startswith("denoiser.") for key in state_dict):
        return dict(state_dict)
    return {key[9:]: value for key, value in state_dict.items() if key.startswith("denoiser.")}


def convert_mld_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the denoiser of an MLD checkpoint to the keys of :class:`MLD`.

    Args:
        state_dict: tensors under their published names, with or without ``denoiser.``.
    Returns:
        The same tensors under our names; stored tables of fixed sinusoids are left out (they are computed).
    """
    converted = {}
    for key, value in from_torch_layers(denoiser_part(state_dict)).items():
        for pattern, name in _PUBLISHED_KEYS.items():
            key = re.sub(pattern, name, key)
        if key.endswith("positions.pe"):
            value = value.squeeze(1)
            if _is_sinusoidal(value):
                continue
        converted[key] = value
    return converted


# Stored by the released code, read by its decoder form only.
MLD_DEAD_KEYS = r"^memory_positions\.pe$"


def mld_config_from_published(state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of :class:`MLD` off a published checkpoint.

    Args:
        state_dict: as for :func:`convert_mld_state_dict`.
        given: arguments known from elsewhere; the tensors do not show ``latent_tokens`` (of a denoiser alone),
            ``num_heads``, ``activation``, ``pre_norm``, ``dropout``, the convention of the times and the number of
            fixed positions. ``mask_padding`` is False, as in the released code, unless given.
    Raises:
        ValueError: this is not such a checkpoint.
    """
    weights = denoiser_part(state_dict)
    if "time_embedding.linear_1.weight" not in weights:
        raise ValueError("no time_embedding.linear_1.weight in the checkpoint; it is not MLD's denoiser")
    width, context = weights["time_embedding.linear_1.weight"].shape
    layers = "decoder" if any(key.startswith("decoder.") for key in weights) else "encoder"
    skip = f"{layers}.middle_block.linear1.weight" in weights
    block, blocks = ("middle_block", "input_blocks") if skip else ("layers.0", "layers")
    count = len({key.split(".")[2] for key in weights if key.startswith(f"{layers}.{blocks}.")})
    table = weights.get("query_pos.pe")
    fixed = table is None or _is_sinusoidal(table.squeeze(1))
    frames = weights.get("pose_embd.weight")
    tokens = state_dict.get("vae.global_motion_token")  # of a whole checkpoint
    shown = {}
    if tokens is not None and frames is None:
        shown["latent_tokens"] = len(tokens) // (1 if "vae.dist_layer.weight" in state_dict else 2)
    return {
        **shown,
        "in_channels": None if frames is None else frames.shape[1],
        "hidden_size": width,
        "num_layers": 2 * count + 1 if skip else count,
        "ff_size": weights[f"{layers}.{block}.linear1.weight"].shape[0],
        "context_dim": context,
        "arch": "skip_encoder" if skip else layers,
        "mask_padding": given.get("mask_padding", False),
        "final_norm": f"{layers}.norm.weight" in weights,
        "pos_embed": "sinusoidal" if fixed else "learned",
        "num_positions": given.get("num_positions", 5000) if table is None else len(table),
    }


def _is_sinusoidal(table: torch.Tensor) -> bool:
    """Whether a position table (P, D) holds the fixed sinusoids."""
    return torch.allclose(table.detach().float().cpu(), interleaved_sinusoids(*table.shape), atol=1e-3)
