"""Grids of samples: the same seeds and classes all through a run, so that grids can be compared."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


def grid_labels(count: int, num_classes: int) -> list[int] | None:
    """Classes of a grid of ``count`` images: 0, 1, 2, ... over and over; None for an unconditional model."""
    return [i % num_classes for i in range(count)] if num_classes else None


def grid_columns(count: int, num_classes: int) -> int:
    """One column per class where whole rows come out, else about a square."""
    if 1 < num_classes <= 20 and count % num_classes == 0:
        return num_classes
    return math.ceil(math.sqrt(count))


def draw_images(
    pipeline: Any,
    count: int,
    num_classes: int,
    *,
    first: int = 0,
    stride: int = 1,
    seed: int = 0,
    at_once: int = 64,
    **call: Any,
) -> dict[int, Image.Image]:
    """Images ``first, first + stride, ...`` of a grid.

    Image i starts from the noise of a generator seeded ``seed + i``, whoever draws it.

    Args:
        pipeline: a class-conditional or unconditional image pipeline.
        count: images in the whole grid.
        num_classes: classes of the model, 0 for none.
        first, stride: the share of this process.
        seed: seed of image 0.
        at_once: batch size.
        call: further arguments of the pipeline.

    Returns:
        Image by its place in the grid.
    """
    labels = grid_labels(count, num_classes)
    images = {}
    mine = list(range(first, count, stride))
    for start in range(0, len(mine), at_once):
        places = mine[start : start + at_once]
        generators = [torch.Generator().manual_seed(seed + i) for i in places]
        classes = None if labels is None else [labels[i] for i in places]
        output = pipeline(classes, num_images=len(places), generator=generators, output_type="pil", **call)
        images |= dict(zip(places, output.images))
    return images


def make_grid(images: Sequence[Image.Image], columns: int, upscale: int | None = None) -> Image.Image:
    """Images side by side, row after row, two pixels apart, enlarged without smoothing.

    Args:
        images: all of one size and mode.
        columns: images in a row.
        upscale: factor of the enlargement; None enlarges small ones to about 64 pixels.
    """
    width, height = images[0].size
    factor = upscale or max(1, 64 // max(width, height))
    rows = math.ceil(len(images) / columns)
    gap = 2
    size = (columns * (width * factor + gap) + gap, rows * (height * factor + gap) + gap)
    grid = Image.new(images[0].mode, size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        place = (gap + column * (width * factor + gap), gap + row * (height * factor + gap))
        grid.paste(image.resize((width * factor, height * factor), Image.Resampling.NEAREST), place)
    return grid
