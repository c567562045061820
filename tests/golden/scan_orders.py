"""Golden files of scan orders: each tensor says by its key how it is made, and is made again and compared."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from genssm import scan_orders as so

# Names of the families in the files -> ours.
FAMILIES = {"zigma": "zigzag", "lamamba_serpentine4": "lamamba", "mamba_nd_2d": "crisscross"}


def _family(name: str, inverted: object, h: str, w: str) -> torch.Tensor:
    order = so.stack(FAMILIES.get(name, name), int(h), int(w))
    return so.inverse(order) if inverted else order


def _video(pattern: str, field: str, depth: int) -> torch.Tensor:
    layers = so.video_kinds(pattern, depth)
    values = {
        "kind": [("spatial", "temporal").index(layer.kind) for layer in layers],
        "spatial_path": [layer.path if layer.kind == "spatial" else -1 for layer in layers],
        "time_reversed": [layer.path if layer.kind == "temporal" else -1 for layer in layers],
    }
    return torch.tensor(values[field])


def _dim(h: str, w: str, pad: str) -> torch.Tensor:
    sides = int(h) + int(pad), int(w) + int(pad)
    return torch.stack([so.dim_pattern(*sides, pattern) for pattern in so.DIM_PATTERNS])


def _pad_tokens(layout: str, h: str, w: str, pad: str) -> torch.Tensor:
    return so.dim_pad_tokens(int(h), int(w), int(pad), {"row_major": "row_major_cycle"}.get(layout, layout))


# Key -> how to make the tensor, from the groups of the key and the length of the tensor.
RULES: dict[str, Callable[[re.Match, int], torch.Tensor]] = {
    r"(zigzag|hilbert_released)(_inverse)?\.n(\d+)": lambda m, _: _family(m[1], m[2], m[3], m[3]),
    r"video\.([st]+)\.(kind|spatial_path|time_reversed)": lambda m, length: _video(m[1], m[2], length),
    r"orders\.h(\d+)w(\d+)p(\d+)": lambda m, _: _dim(*m.groups()),
    r"image_cells\.h(\d+)w(\d+)p(\d+)": lambda m, _: so.dim_image_cells(*map(int, m.groups())),
    r"pad_token_(per_side|row_major)\.h(\d+)w(\d+)p(\d+)": lambda m, _: _pad_tokens(*m.groups()),
    r"pattern_chain\.depth(\d+)\.patterns(\d+)": lambda m, _: torch.tensor(so.dim_pattern_chain(int(m[1]), int(m[2]))),
    r"out\.(sweep|zigma|jpeg)\.(\d+)(\.inverse)?": lambda m, _: _family(m[1], m[3], m[2], m[2]),
    r"out\.window\.(\d+)\.(\d+)\.(row|col)": lambda m, _: so.local_window(
        int(m[1]), int(m[1]), int(m[2]), column_first=m[3] == "col"
    ),
    r"out\.layer_direction\.(\d+)\.(plain|serpentine)\.(\d+)": lambda m, _: so.dimsum_spatial(
        int(m[1]), int(m[1]), int(m[3]), serpentine=m[2] == "serpentine"
    ),
    r"(lamamba_serpentine4)\.n(\d+)": lambda m, _: _family(m[1], False, m[2], m[2]),
    r"(mamba_nd_2d)\.h(\d+)w(\d+)": lambda m, _: _family(m[1], False, m[2], m[3]),
    r"local_(row|col)\.h(\d+)w(\d+)k(\d+)": lambda m, _: so.local_window_padded(
        *map(int, m.groups()[1:]), column_first=m[1] == "col"
    ),
    r"(mamba_nd_3d|rotary_major)\.t(\d+)h(\d+)w(\d+)": lambda m, _: so.stack(m[1], *map(int, m.groups()[1:])),
    r"vfimamba_column_write\.h(\d+)w(\d+)": lambda m, _: so.vfimamba_column_write(int(m[1]), int(m[2])),
}


def recognises(keys: Iterable[str]) -> bool:
    """Whether a file with these keys holds scan orders: at least one key follows a rule."""
    return any(re.fullmatch(pattern, key) for key in keys for pattern in RULES)


def check(path: str | Path) -> list[tuple[str, bool, str]]:
    """Recompute every tensor of a golden scan-order file.

    Args:
        path: a safetensors file.
    Returns:
        (key, equal or not, what was compared or what is wrong) per tensor; an unknown key counts as wrong.
    """
    return [(key, *_compare(key, expected)) for key, expected in sorted(load_file(path).items())]


def _compare(key: str, expected: torch.Tensor) -> tuple[bool, str]:
    for pattern, make in RULES.items():
        match = re.fullmatch(pattern, key)
        if match is None:
            continue
        try:
            made = make(match, expected.shape[-1])
        except ValueError as error:
            return False, str(error)
        if made.shape != expected.shape:
            return False, f"shape {tuple(made.shape)}, expected {tuple(expected.shape)}"
        wrong = int((made != expected).sum())
        return wrong == 0, f"{wrong} of {expected.numel()} entries differ"
    return False, "no rule for this key"
