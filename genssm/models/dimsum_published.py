"""Published DiMSUM checkpoints: names of their weights, and what the weights show about the model."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from genssm.layers import sincos_2d
from genssm.scan_orders import stack

# Published key -> ours, every pattern that is found, in this order; what none names keeps its name.
_PUBLISHED_KEYS = {
    r"^x_embedder\.": "patch_embed.",
    r"^t_embedder\.mlp\.0\.": "time_embed.linear_in.",
    r"^t_embedder\.mlp\.2\.": "time_embed.linear_out.",
    r"^y_embedder\.embedding_table\.": "label_embed.table.",
    r"^pos_embed$": "positions",
    r"^pos_cnn\.proj\.0\.": "conv_positions.conv.",
    r"^pos_cnn\.": "conv_positions.",
    r"^norm_f\.": "norm_out.",
    r"^final_layer\.linear\.": "proj_out.",
    r"^final_layer\.adaLN_modulation\.1\.": "modulation_out.linear.",
    r"^attn_block\.(\d+)\.": r"attention_blocks.\1.",
    r"^attn_block\.": "attention_blocks.0.",
    r"^(attention_blocks\.\d+)\.attn\.": r"\1.",
    r"\.spatial_mamba\.": ".spatial.",
    r"\.freq_mamba\.": ".frequency.",
    r"\.mixer\.cond_proj\.": ".cond_proj.",
    r"(^|\.)adaLN_modulation\.1\.": r"\1modulation.linear.",
    r"\.proj\.qkv1\.": ".fusion.qkv_spatial.",
    r"\.proj\.qkv2\.": ".fusion.qkv_frequency.",
    r"\.proj\.proj\.": ".fusion.proj.",
    r"\.mlp\.(w12|fc1)\.": ".mlp.proj_in.",
    r"\.mlp\.(w3|fc2)\.": ".mlp.proj_out.",
    r"\.complex_(weight|bias)_1$": r".\1_in",
    r"\.complex_(weight|bias)_2$": r".\1_out",
    r"(^|\.)A_b_log$": r"\1A_log_b",
    r"(^|\.)dt_proj(_b)?\.bias$": r"\1dt_bias\2",
}
# Our names of what checkpoints hold without any effect: see Branch.cond_proj; and the positions of a rotary model.
DIMSUM_DEAD_KEYS = r"\.cond_proj\.(weight|bias)$|^positions$"
# Filters and index tables that we compute.
_COMPUTED = r"\.(dwt\.w_(ll|lh|hl|hh)|idwt\.filters|dct_conv\.weight|idct_conv\.0\.weight|zigzag_paths(_reverse)?)$"


def convert_dimsum_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the weights of a DiMSUM checkpoint of the released code to the keys of :class:`genssm.models.DiMSUM`.

    Args:
        state_dict: tensors under their published names (the ``ema`` or ``model`` part, without ``module.``).

    Returns:
        The same tensors under our names. Left out are filters and index tables, which are computed.
    """
    converted = {}
    for key, value in state_dict.items():
        if re.search(_COMPUTED, key):
            continue
        for pattern, ours in _PUBLISHED_KEYS.items():
            key = re.sub(pattern, ours, key)
        converted[key] = value
    return converted


def dimsum_config_from_published(state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of :class:`genssm.models.DiMSUM` off a published checkpoint.

    Args:
        state_dict: as for :func:`convert_dimsum_state_dict`.
        given: arguments known from elsewhere (a preset, the user). The tensors do not show: "linear" or "window"
            blocks (the first is assumed), path scans whose index tables were left out, ``serpentine``,
            ``attention_every`` (4), "rotary" or fixed positions, ``swap_keys``, a class table without a null row
            (``null_condition=False``; one is assumed), a ``sample_size`` that is not square.

    Returns:
        All arguments that the tensors show, and ``sample_size``.

    Raises:
        ValueError: this is not a DiMSUM checkpoint, or an argument that the tensors do not show is missing.
    """
    keys, rows = set(state_dict), state_dict.get("y_embedder.embedding_table.weight")
    mixer = "blocks.0.spatial_mamba.mixer." if "blocks.0.spatial_mamba.mixer.A_log" in keys else "blocks.0.mixer."
    if f"{mixer}A_log" not in keys or "x_embedder.proj.weight" not in keys or rows is None:
        raise ValueError(f"no x_embedder.proj.weight, y_embedder or {mixer}A_log in the checkpoint; it is not DiMSUM's")
    hidden, channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
    inner, d_state = state_dict[f"{mixer}A_log"].shape
    width, rank = state_dict[f"{mixer}in_proj.weight"].shape[1], state_dict[f"{mixer}dt_proj.weight"].shape[1]
    null = given.get("null_condition", True) or len(rows) == 1
    config: dict[str, Any] = {
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": hidden,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in keys if key.startswith("blocks.")),
        "num_classes": len(rows) - null,
        "block_type": _published_block_type(keys, given),
        "d_state": d_state,
        "d_conv": state_dict[f"{mixer}conv1d.weight"].shape[-1],
        "expand": inner // width,
        "dt_rank": "auto" if rank == math.ceil(width / 16) else rank,
        "norm": "layer" if "blocks.0.norm.bias" in keys else "rms",
        "learn_sigma": len(state_dict["final_layer.linear.bias"]) == 2 * channels * patch * patch,
        "final_norm": "norm_f.weight" in keys,
        "time_convention": "data_at_one",
        **_published_scan(state_dict, mixer, given),
    }
    mlps = [key for key in keys if key.endswith((".mlp.w12.weight", ".mlp.fc1.weight"))]
    if mlps:
        config["gated_mlp"] = mlps[0].endswith("w12.weight")
    attention = [key for key in keys if key.startswith("attn_block.")]
    if attention:
        config["shared_attention"] = "attn_block.attn.qkv.weight" in keys
    else:
        config["attention_every"] = 0
    table = state_dict["pos_embed"][0].float().cpu()
    side = math.isqrt(len(table))
    square = side * side == len(table)
    if square:
        config["sample_size"] = patch * side
    elif "sample_size" not in given:
        raise ValueError("the positions of the checkpoint are no square; give sample_size as [height, width]")
    if any(key.startswith("pos_cnn.") for key in keys):
        config["pos_embed"] = "conv"
    elif given.get("pos_embed") == "sincos2d_fixed":
        same = square and torch.allclose(table, sincos_2d(hidden, side, side), atol=1e-5)
        config["pos_embed"] = "sincos2d_fixed" if same else "learned"
    elif given.get("pos_embed") != "rotary":
        config["pos_embed"] = "learned"
    return config


def _published_block_type(keys: set[str], given: Mapping[str, Any]) -> str:
    marks = {
        "blocks.0.freq_mamba.dwt.w_ll": "combined",
        "blocks.0.freq_mamba.dct_conv.weight": "combined_fourier",
        "blocks.0.freq_mamba.complex_weight_1": "combined_einfft",
        "blocks.0.dwt.w_ll": "wave",
    }
    for key, block_type in marks.items():
        if key in keys:
            return block_type
    if "blocks.0.norm_2.weight" not in keys:
        return "raw"
    return "window" if given.get("block_type") == "window" else "linear"


def _published_scan(state_dict: Mapping[str, torch.Tensor], mixer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``scan``, and ``num_paths`` of a path scan, from the mixer's parameters and index tables."""
    if f"{mixer}A_b_log" in state_dict:
        return {"scan": "bidirectional"}
    table = state_dict.get(f"{mixer}zigzag_paths")
    if table is None:
        return {"scan": given.get("scan", "alternating")}
    side = math.isqrt(table.shape[1])
    layers = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks."))
    count = len(table) // layers
    for scan in ("sweep", "zigzag", "jpeg"):
        if torch.equal(table[:count].cpu(), stack(scan, side, side, paths=count).long()):
            return {"scan": scan, "num_paths": count}
    raise ValueError("the checkpoint's zigzag_paths are none of sweep, zigzag and jpeg on this grid")
