"""Data sets: :func:`build_dataset` makes one from a name; :mod:`genssm.data.loading` says in which order it is seen."""

import dataclasses
import difflib
from typing import Any

import torch

from genssm.config import DataConfig
from genssm.data.images import CachedImages, ImageDataset
from genssm.data.latents import LatentDataset, open_latents
from genssm.data.motion import MotionDataset, open_motion
from genssm.data.sources import DATASETS as IMAGE_DATASETS
from genssm.data.transforms import CROPS, ImageTransform

DATASETS = (*IMAGE_DATASETS, "latents", "motion")

# Keys of the data section that mean something to one kind of data only.
IMAGE_KEYS = ("resolution", "channels", "crop", "label", "download")
IDLE = {"latents": (*IMAGE_KEYS, "motion"), "motion": (*IMAGE_KEYS, "flip", "vae", "latents")}

__all__ = [
    "CROPS",
    "DATASETS",
    "CachedImages",
    "ImageDataset",
    "LatentDataset",
    "MotionDataset",
    "build_dataset",
    "cache_dataset",
]


def build_dataset(config: DataConfig | None = None, **keys: Any) -> ImageDataset | LatentDataset | MotionDataset:
    """A data set from a configuration, from keys, or from a configuration with some keys changed.

    Args:
        config: the ``data`` section of a run.
        keys: fields of :class:`genssm.config.DataConfig`, e.g. ``name="digits", split="test"``.

    Returns:
        A map-style data set with ``num_classes``, ``class_names``, ``labels`` and items
        ``{"pixel_values": float32 (C, H, W) in -1..1, "class_labels": int}``, or ``"latents"`` in place of the pixels;
        of motion :meth:`genssm.data.motion.MotionDataset.item`.
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
    defaults = DataConfig(name=config.name)
    for key in IDLE.get(config.name, ("latents", "motion")):
        if getattr(config, key) != getattr(defaults, key):
            raise ValueError(f"data.{key} means nothing to data.name={config.name}; leave it out")
    if config.name == "latents":
        return open_latents(config.path, config.split, config.latents, flip=config.flip)
    if config.name == "motion":
        return open_motion(config.path, config.split, config.motion)
    source = IMAGE_DATASETS[config.name](config.path, config.split, config.label, config.download)
    return ImageDataset(source, ImageTransform(config.resolution, config.channels, config.crop, config.flip))


def cache_dataset(
    dataset: ImageDataset | LatentDataset | MotionDataset, cache: str, device: torch.device | str
) -> ImageDataset | LatentDataset | MotionDataset | CachedImages:
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
    if isinstance(dataset, MotionDataset):
        raise ValueError("motion is read into memory as it is; use data.cache=none")
    if isinstance(dataset, LatentDataset):
        if cache == "device":
            raise ValueError("data.cache=device keeps images; use data.cache=ram with latents")
        return dataset.in_memory()
    return CachedImages(dataset, device if cache == "device" else "cpu")
