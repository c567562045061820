"""Scan orders: in which order a state-space layer visits the tokens of a grid.

An order is an int32 CPU tensor; ``order[t]`` is the raster index (row * w + column) of the token visited at step t, so
``x[:, order]`` lays tokens out along it and ``y[:, inverse(order)]`` puts them back; `genssm.kernels` takes orders as
they are. All functions are pure and take any grid, square or not, even or odd. Layer l of a model commonly takes path
l mod NUM_PATHS[name].

Images, ``name(h, w, path=0) -> (h * w,)``; all of them in :data:`ORDERS`, the number of paths in :data:`NUM_PATHS`:

    raster, column          lines; forward, backwards
    sweep                   lines from the 4 corners, rows and columns
    zigzag (= serpentine)   the same to and fro (ZigMa's 8)
    jpeg                    anti-diagonals from the 4 corners
    hilbert                 continuous on every grid, 8 symmetries; hilbert_released: ZigMa's released inverse of it
    local                   windows (keyword ``window``), row-first and column-first, each also backwards
    crisscross              Mamba-ND in 2-D and DiG; cross_scan: VMamba; lamamba: LaMamba-Diff; local_mamba: LocalMamba
    dimsum_spatial, dimsum_frequency    DiMSUM's chains by block (keyword ``serpentine``)

    local_window(h, w, window=4, column_first=False)            one order of windows; windows may be cut off or oblong
    local_window_padded(h, w, window=4, column_first=False)     the same with -1 where the grid is padded
    dim_pattern(h, w, pattern_id)                               DiM, on its padded grid (:data:`DIM_PATTERNS`)
    dim_pattern_chain(depth, num_patterns=4) -> list[int]       pattern id per block
    dim_image_cells(h, w, pad=3)                                image cells on the padded grid
    dim_pad_tokens(h, w, pad=3, layout="per_side")              pad token per cell; or layout="row_major_cycle"
    vfimamba_column_write(h, w)                                 the released index error of VFIMamba

Video, tokens flattened frame by frame, ``name(frames, h, w, path=0) -> (frames * h * w,)``; in :data:`VIDEO_ORDERS`:

    spatial (keyword ``order``), temporal       the two layers of a factorised model
    raster_3d, zigzag_3d, mamba_nd_3d, rotary_major, interleaved

    video_kinds(pattern, depth, num_paths=8) -> list[VideoLayer(kind, path)]        such as pattern "sst"
    factorised(layer, frames, h, w, order=zigzag) -> Factorised(order, cu_seqlens)  a layer as one packed scan
    time_mirror(frames, h, w)                   what ZigMa's released temporal layers do to their output

Any order, (L,) or (..., L): ``inverse``, ``reverse``, ``compose(first, second)``, ``with_prefix(order, count)``,
``step_distances(order, *sides)``; ``stack(name, *sides, paths=None)`` gives (K, L), ``get_order(name)`` the function.

``python -m genssm.scan_orders --order zigzag --grid 16x24 --out zigzag.png`` draws one.
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial

import torch

from genssm.scan_orders.grid import (
    column,
    compose,
    inverse,
    jpeg,
    local,
    local_window,
    local_window_padded,
    raster,
    reverse,
    step_distances,
    sweep,
    with_prefix,
    zigzag,
)
from genssm.scan_orders.hilbert import hilbert, hilbert_released
from genssm.scan_orders.published import (
    DIM_PATTERNS,
    crisscross,
    cross_scan,
    dim_image_cells,
    dim_pad_tokens,
    dim_pattern,
    dim_pattern_chain,
    dimsum_frequency,
    dimsum_spatial,
    lamamba,
    local_mamba,
    vfimamba_column_write,
)
from genssm.scan_orders.video import (
    Factorised,
    VideoLayer,
    factorised,
    interleaved,
    mamba_nd_3d,
    raster_3d,
    rotary_major,
    spatial,
    temporal,
    time_mirror,
    video_kinds,
    zigzag_3d,
)

__all__ = [
    "DIM_PATTERNS",
    "NUM_PATHS",
    "ORDERS",
    "VIDEO_ORDERS",
    "Factorised",
    "VideoLayer",
    "column",
    "compose",
    "crisscross",
    "cross_scan",
    "dim_image_cells",
    "dim_pad_tokens",
    "dim_pattern",
    "dim_pattern_chain",
    "dimsum_frequency",
    "dimsum_spatial",
    "factorised",
    "get_order",
    "hilbert",
    "hilbert_released",
    "interleaved",
    "inverse",
    "jpeg",
    "lamamba",
    "local",
    "local_mamba",
    "local_window",
    "local_window_padded",
    "mamba_nd_3d",
    "raster",
    "raster_3d",
    "reverse",
    "rotary_major",
    "serpentine",
    "spatial",
    "stack",
    "step_distances",
    "sweep",
    "temporal",
    "time_mirror",
    "vfimamba_column_write",
    "video_kinds",
    "with_prefix",
    "zigzag",
    "zigzag_3d",
]

serpentine = zigzag

ORDERS: dict[str, Callable[..., torch.Tensor]] = {
    "raster": raster,
    "column": column,
    "sweep": sweep,
    "zigzag": zigzag,
    "serpentine": serpentine,
    "jpeg": jpeg,
    "hilbert": hilbert,
    "hilbert_released": hilbert_released,
    "local": local,
    "crisscross": crisscross,
    "cross_scan": cross_scan,
    "lamamba": lamamba,
    "local_mamba": local_mamba,
    "dimsum_spatial": dimsum_spatial,
    "dimsum_spatial_serpentine": partial(dimsum_spatial, serpentine=True),
    "dimsum_frequency": dimsum_frequency,
    "dimsum_frequency_serpentine": partial(dimsum_frequency, serpentine=True),
}

VIDEO_ORDERS: dict[str, Callable[..., torch.Tensor]] = {
    "spatial": spatial,
    "temporal": temporal,
    "raster_3d": raster_3d,
    "zigzag_3d": zigzag_3d,
    "mamba_nd_3d": mamba_nd_3d,
    "rotary_major": rotary_major,
    "interleaved": interleaved,
}

NUM_PATHS: dict[str, int] = {
    "raster": 2,
    "column": 2,
    "sweep": 8,
    "zigzag": 8,
    "serpentine": 8,
    "jpeg": 8,
    "hilbert": 8,
    "hilbert_released": 8,
    "local": 4,
    "crisscross": 4,
    "cross_scan": 4,
    "lamamba": 4,
    "local_mamba": 8,
    "dimsum_spatial": 4,
    "dimsum_spatial_serpentine": 4,
    "dimsum_frequency": 2,
    "dimsum_frequency_serpentine": 2,
    "spatial": 8,
    "temporal": 2,
    "raster_3d": 2,
    "zigzag_3d": 16,
    "mamba_nd_3d": 6,
    "rotary_major": 4,
    "interleaved": 4,
}


def get_order(name: str, video: bool = False) -> Callable[..., torch.Tensor]:
    """The function of an image order, or of a ``video`` order, by name.

    Raises:
        ValueError: the name is unknown; the message holds the nearest known one.
    """
    known, other = (VIDEO_ORDERS, ORDERS) if video else (ORDERS, VIDEO_ORDERS)
    if name in known:
        return known[name]
    if name in other:
        kinds = ("images (h x w)", "videos (frames x h x w)")
        raise ValueError(f"{name!r} orders {kinds[not video]}, not {kinds[video]}; those: {', '.join(known)}")
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown scan order {name!r}; did you mean {nearest!r}? Known: {', '.join(known)}")


def stack(name: str, *sides: int, paths: int | Sequence[int] | None = None, **options: object) -> torch.Tensor:
    """Several paths of an order as rows, (K, L) int32, as `genssm.kernels` takes them.

    Args:
        name: key of :data:`ORDERS` with the sides h, w, or of :data:`VIDEO_ORDERS` with frames, h, w.
        paths: the first so many, or these ones; None means all.
        options: keywords of that order, such as ``window`` of "local".
    """
    if len(sides) not in (2, 3):
        raise ValueError(f"an order needs h, w or frames, h, w; got {len(sides)} sides: {sides}")
    function = get_order(name, video=len(sides) == 3)
    if paths is None or isinstance(paths, int):
        count = NUM_PATHS[name] if paths is None else paths
        if not 1 <= count <= NUM_PATHS[name]:
            raise ValueError(f"order {name!r} has {NUM_PATHS[name]} paths, {count} were asked for")
        paths = range(count)
    return torch.stack([function(*sides, path, **options) for path in paths])
