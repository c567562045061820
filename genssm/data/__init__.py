"""Data sets: :func:`build_dataset` makes one from a name; :mod:`genssm.data.loading` says in which order it is seen."""

import dataclasses
import difflib
from typing import Any

import torch

from genssm.config import DataConfig
from genssm.data.images import CachedImages, ImageDataset
from genssm.data.latents import LatentDataset, open_latents
from genssm.data.sources import DATASETS as IMAGE_DATASETS
from genssm.data.transforms import CROPS, ImageTransform

DATASETS = (*IMAGE_DATASETS, "latents")

__all__ = ["CROPS", "DATASETS", "CachedImages", "ImageDataset", "LatentDataset", "build_dataset", "cache_dataset"]


def build_dataset(config: DataConfig | None = None, **keys: Any) -> ImageDataset | LatentDataset:
    """A data set from a configuration, from keys, or from a configuration with some keys changed.

    Args:
        config: the ``data`` section of a run.
        keys: fields of :class:`genssm.config.DataConfig`, e.g. ``name="digits", split="test"``.

    Returns:
        A map-style data set with ``num_classes``, ``class_names``, ``labels`` and items
        ``{"pixel_values": float32 (C, H, W) in -1..1, "class_labels": int}``, or ``"latents"`` in place of the pixels.
        ``dataset[i]`` is never random.

    Raises:
        ValueError: unknown name or a key that does not fit.
        FileNotFoundError: the data are not where ``path`` says.

    Example:
        >>> build_dataset(name="digits", split="test")[0]["pixel_values"].shape
        torch.Size([1, 8, 8])
    """
    config = DataConfig(**keys) if config is None else dataclasses.replace(config, **keys)
    if config.name not in DATASETS:
        near = difflib.get_close_matches(config.name, DATASETS, n=1)
        raise ValueError(
            f"data.name={config.name!r} is not a data set"
            + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(DATASETS)}")
        )
    idle = ("resolution", "channels", "crop", "label", "download") if config.name == "latents" else ("latents",)
    defaults = DataConfig(name=config.name)
    for key in idle:
        if getattr(config, key) != getattr(defaults, key):
            raise ValueError(f"data.{key} means nothing to data.name={config.name}; leave it out")
    if config.name == "latents":
        return open_latents(config.path, config.split, config.latents, flip=config.flip)
    source = IMAGE_DATASETS[config.name](config.path, config.split, config.label, config.download)
    return ImageDataset(source, ImageTransform(config.resolution, config.channels, config.crop, config.flip))


def cache_dataset(
    dataset: ImageDataset | LatentDataset, cache: str, device: torch.device | str
) -> ImageDataset | LatentDataset | CachedImages:
    """The data set, or its items decoded into memory; training sees the same either way.

    Args:
        dataset: the data set.
        cache: ``none``; ``ram``; or ``device``, for images, on ``device``.
        device: of the training.

    Raises:
        ValueError: latents on the device, or images that are cropped at random.
    """
    if cache == "none":
        return dataset
    if isinstance(dataset, LatentDataset):
        if cache == "device":
            raise ValueError("data.cache=device keeps images; use data.cache=ram with latents")
        return dataset.in_memory()
    return CachedImages(dataset, device if cache == "device" else "cpu")
