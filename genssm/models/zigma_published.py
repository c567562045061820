"""Published ZigMa checkpoints: names of their weights, and what the weights show about the model."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from genssm.layers import sincos_2d

# Published key -> ours, by the first pattern that is found; what no pattern names keeps its name.
_PUBLISHED_KEYS = {
    r"^x_embedder\.": "patch_embed.",
    r"^t_embedder\.mlp\.0\.": "time_embed.linear_in.",
    r"^t_embedder\.mlp\.2\.": "time_embed.linear_out.",
    r"^y_embedder\.embedding_table\.": "label_embed.table.",
    r"^y_embedder\.": "context_embed.",
    r"^pos_embed$": "positions",
    r"^temporal_pos_embedding$": "frame_positions",
    r"\.adaLN_modulation\.1\.": ".modulation.linear.",
    r"\.mixer\.A_b_log$": ".mixer.A_log_b",
    r"\.mixer\.dt_proj\.bias$": ".mixer.dt_bias",
    r"\.mixer\.dt_proj_b\.bias$": ".mixer.dt_bias_b",
    r"\.msa\.to_out\.0\.": ".cross_attn.to_out.",
    r"\.msa\.": ".cross_attn.",
    r"^norm_f\.": "norm_out.",
    r"^final_layer\.linear\.": "proj_out.",
}


def convert_zigma_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the weights of a ZigMa checkpoint of the released code to the keys of :class:`genssm.ZigMa`.

    Args:
        state_dict: tensors under their published names (the ``ema`` or ``model`` part, without ``module.``).

    Returns:
        The same tensors under our names; a stored table of fixed sine-cosine positions is left out (it is computed).
    """
    converted = {}
    for key, value in state_dict.items():
        if key == "pos_embed" and _is_sincos(value):
            continue
        pattern = next((pattern for pattern in _PUBLISHED_KEYS if re.search(pattern, key)), None)
        converted[re.sub(pattern, _PUBLISHED_KEYS[pattern], key) if pattern else key] = value
    return converted


def zigma_config_from_published(state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of :class:`genssm.ZigMa` off a published checkpoint.

    Args:
        state_dict: as for :func:`convert_zigma_state_dict`.
        given: arguments known from elsewhere (a preset, the user). Needed are those that the tensors do not show: the
            scan family, ``num_frames`` of a video model without frame positions, ``sample_size`` of a model without
            positions or with a grid that is not square.

    Returns:
        All arguments that the tensors show, and ``scan`` and ``sample_size``.

    Raises:
        ValueError: this is not a ZigMa checkpoint, or an argument that the tensors do not show is missing.
    """
    if "x_embedder.proj.weight" not in state_dict or "blocks.0.mixer.A_log" not in state_dict:
        raise ValueError("no x_embedder.proj.weight or blocks.0.mixer.A_log in the checkpoint; it is not ZigMa's")
    width, channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
    inner, d_state = state_dict["blocks.0.mixer.A_log"].shape
    rank = state_dict["blocks.0.mixer.dt_proj.weight"].shape[1]
    config: dict[str, Any] = {
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
        "d_state": d_state,
        "d_conv": state_dict["blocks.0.mixer.conv1d.weight"].shape[-1],
        "expand": inner // width,
        "dt_rank": "auto" if rank == math.ceil(width / 16) else rank,
        "norm": "layer" if "norm_f.bias" in state_dict else "rms",
        "num_classes": len(state_dict.get("y_embedder.embedding_table.weight", ())),
        "context_dim": state_dict["y_embedder.weight"].shape[1] if "y_embedder.weight" in state_dict else 0,
        "null_condition": False,
        "temporal_pos_embed": "temporal_pos_embedding" in state_dict,
        "pos_embed": "none",
        "time_convention": "data_at_one",
    }
    if config["temporal_pos_embed"]:
        config["num_frames"] = state_dict["temporal_pos_embedding"].shape[1]
    if "blocks.0.mixer.A_b_log" in state_dict:
        config["scan"] = "raster_bidirectional"
    table = state_dict.get("pos_embed")
    if table is not None:
        config["pos_embed"] = "sincos2d_fixed" if _is_sincos(table) else "learned"
        frames = max(config.get("num_frames", given.get("num_frames", 0)), 1) if config["pos_embed"] == "learned" else 1
        side = math.isqrt(table.shape[1] // frames)
        if frames * side * side == table.shape[1]:
            config["sample_size"] = patch * side
    for name in ("scan", "sample_size"):
        if name not in config and name not in given:
            raise ValueError(f"the checkpoint does not show {name}; name a preset or give it in the configuration")
    return {**{name: given[name] for name in ("scan", "sample_size") if name in given}, **config}


def _is_sincos(table: torch.Tensor) -> bool:
    """Whether a position table (1, N, D) is the fixed sine-cosine one of a square grid."""
    side, width = math.isqrt(table.shape[1]), table.shape[2]
    if side * side != table.shape[1] or width % 4:
        return False
    return torch.allclose(table[0].detach().float().cpu(), sincos_2d(width, side, side), atol=1e-5)
