"""Published DiM checkpoints: names of their weights, and what the weights show about the model."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

# Published key -> ours, every pattern that is found, in this order; what none names keeps its name.
_PUBLISHED_KEYS = {
    r"^additional_embed$": "positions",
    r"^pos_embed\.": "patch_embed.",
    r"^adaln_single\.emb\.timestep_embedder\.linear_1\.": "time_embed.linear_in.",
    r"^adaln_single\.emb\.timestep_embedder\.linear_2\.": "time_embed.linear_out.",
    r"^adaln_single\.emb\.class_embedder\.embedding_table\.": "label_embed.table.",
    r"^adaln_single\.linear\.": "modulation.linear.",
    r"^label_emb\.": "token_label_embed.table.",
    r"^time_embed\.(\d)\.": r"token_time_mlp.\1.",
    r"^a4m_adapter\.pad_token$": "pad_tokens",
    r"^a4m_adapter\.pad_token_dec_split$": "prefix_tokens",
    r"^a4m_adapter\.first_smoother\.": "conv_in.",
    r"^a4m_adapter\.last_smoother\.": "conv_out.",
    r"^transformer_blocks\.": "blocks.",
    r"\.scale_shift_table$": ".table",
    r"\.norm1\.norm\.": ".norm.",
    r"\.attn1\.dt_proj\.bias$": ".mixer.dt_bias",
    r"\.attn1\.": ".mixer.",
    r"\.skip_linear\.0\.": ".long_skip.from_stream.",
    r"\.skip_linear\.1\.": ".long_skip.from_skip.",
    r"\.skip_linear\.": ".long_skip.linear.",
    r"^norm_out\.norm\.": "norm_out.",
    r"^proj_out_1\.": "modulation_out.linear.",
    r"^proj_out_2\.": "proj_out.",
    r"^final_layer\.": "conv_final.",
}


def convert_dim_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the weights of a DiM checkpoint of the released code to keys and shapes of :class:`genssm.models.DiM`.

    Args:
        state_dict: tensors under their published names (the released ``nnet_ema.pth``).

    Returns:
        The same tensors under our names.
    """
    converted = {}
    for key, value in state_dict.items():
        for pattern, ours in _PUBLISHED_KEYS.items():
            key = re.sub(pattern, ours, key)
        if key in ("pad_tokens", "prefix_tokens"):
            value = value[0].transpose(0, 1) if key == "pad_tokens" else value[0]  # pads are stored (1, D, P)
        converted[key] = value
    return converted


def dim_config_from_published(state_dict: Mapping[str, torch.Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments of :class:`genssm.models.DiM` off a published checkpoint.

    Args:
        state_dict: as for :func:`convert_dim_state_dict`.
        given: arguments known from elsewhere (a preset, the user). The tensors do not show: ``sample_size`` of a grid
            that is not square, ``pad_layout`` (taken to be "per_side" up to 16x16 patches and "row_major_cycle" above,
            as released), ``num_scan_patterns`` (4), ``edge_dilation`` (1).

    Returns:
        All arguments that the tensors show, and ``sample_size`` and ``pad_layout``.

    Raises:
        ValueError: this is not a DiM checkpoint, or an argument that the tensors do not show is missing.
    """
    if "additional_embed" not in state_dict or "transformer_blocks.0.attn1.A_log" not in state_dict:
        raise ValueError("no additional_embed or transformer_blocks.0.attn1.A_log in the checkpoint; it is not DiM's")
    width, channels, patch, _ = state_dict["pos_embed.proj.weight"].shape
    mixer = {key.rpartition("blocks.0.attn1.")[2]: value.shape for key, value in state_dict.items()}
    rank = mixer["dt_proj.weight"][1]
    table = state_dict.get("label_emb.weight")
    fusions = {"skip_linear.weight": "concat_linear", "skip_linear.0.weight": "two_linears"}
    found = {fusions[key.split(".", 2)[-1]] for key in state_dict if key.split(".", 2)[-1] in fusions}
    config: dict[str, Any] = {
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("transformer_blocks.")),
        "num_classes": 0 if table is None else len(table) - 1,
        "null_condition": table is not None,
        "num_pad_tokens": _tokens(state_dict, "a4m_adapter.pad_token", 2),
        "num_prefix_tokens": _tokens(state_dict, "a4m_adapter.pad_token_dec_split", 1),
        "edge_convs": "a4m_adapter.first_smoother.weight" in state_dict,
        "skip_fusion": found.pop() if found else "none",
        "time_token_mlp": "time_embed.0.weight" in state_dict,
        "final_conv": "final_layer.weight" in state_dict,
        "learn_sigma": len(state_dict["proj_out_2.bias"]) == 2 * channels * patch * patch,
        "d_state": mixer["A_log"][1],
        "d_conv": mixer["conv1d.weight"][2],
        "expand": mixer["A_log"][0] // width,
        "dt_rank": "auto" if rank == math.ceil(width / 16) else rank,
        "time_convention": "one_based",
    }
    config |= _published_grid(state_dict["additional_embed"].shape[1], 1 + (table is not None), patch, given)
    return config


def _tokens(state_dict: Mapping[str, torch.Tensor], key: str, dim: int) -> int:
    return state_dict[key].shape[dim] if key in state_dict else 0


def _published_grid(rows: int, condition_tokens: int, patch: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """``sample_size``, ``pad_layout`` and whether the condition tokens are doubled, from the rows of the positions."""
    if "sample_size" in given:
        size = given["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        front = rows - (height // patch) * (width // patch)
        if front not in (condition_tokens, 2 * condition_tokens):
            raise ValueError(
                f"the checkpoint has {rows} positions, {condition_tokens} or twice that of condition tokens; that "
                f"does not fit sample_size {size}"
            )
    else:
        sides = {front: math.isqrt(rows - front) for front in (condition_tokens, 2 * condition_tokens)}
        fitting = [(front, side) for front, side in sides.items() if front + side * side == rows]
        if not fitting:
            raise ValueError("the positions of the checkpoint are no square; give sample_size as [height, width]")
        front, side = fitting[0]
        size = patch * side
    layout = given.get("pad_layout", "row_major_cycle" if rows - front > 256 else "per_side")
    return {"sample_size": size, "pad_layout": layout, "duplicate_condition_tokens": front != condition_tokens}
