"""Data sets: :func:`build_dataset` makes one from a name; :mod:`genssm.data.loading` says in which order it is seen."""

import dataclasses
import difflib
from typing import Any

import torch

from genssm.config import DataConfig
from genssm.data.captions import CLASS
from genssm.data.clips import ClipDataset, clips, moving_digits
from genssm.data.coco import coco
from genssm.data.codes import CachedCodes, CodeDataset, open_codes
from genssm.data.images import CachedImages, ImageDataset
from genssm.data.latents import LatentDataset, open_latents
from genssm.data.shards import webdataset
from genssm.data.sources import DATASETS as FOLDERS_AND_FILES
from genssm.data.sources import READ_ERRORS, Source
from genssm.data.transforms import CROPS, ImageTransform
from genssm.data.variable import ShapeKeeping, VariableImages

IMAGE_DATASETS = {**FOLDERS_AND_FILES, "webdataset": webdataset, "coco": coco}
CLIP_DATASETS = {"clips": clips, "moving_digits": moving_digits}
CAPTION_OPTION = ("image_folder", "huggingface", "webdataset", "clips")  # readers that are told where the captions are
DATASETS = (*IMAGE_DATASETS, *CLIP_DATASETS, "codes", "latents")

__all__ = [
    "CROPS",
    "DATASETS",
    "CachedCodes",
    "CachedImages",
    "ClipDataset",
    "CodeDataset",
    "ImageDataset",
    "LatentDataset",
    "VariableImages",
    "build_dataset",
    "build_variable_images",
    "cache_dataset",
]


def build_dataset(config: DataConfig | None = None, **keys: Any) -> ImageDataset | LatentDataset | CodeDataset:
    """A data set from a configuration, from keys, or from a configuration with some keys changed.

    Args:
        config: the ``data`` section of a run.
        keys: fields of :class:`genssm.config.DataConfig`, e.g. ``name="digits", split="test"``.

    Returns:
        A map-style data set with ``num_classes``, ``class_names``, ``labels`` and items
        ``{"pixel_values": float32 (C, H, W) in -1..1, "class_labels": int, "text": str}``, or ``"latents"`` or
        ``"codes"`` in place of the pixels; labels and text where the data have them. Clips are (F, C, H, W).
        ``dataset[i]`` is never random.

    Raises:
        ValueError: unknown name or a key that does not fit.
        FileNotFoundError: the data are not where ``path`` says.

    Example:
        >>> build_dataset(name="digits", split="test")[0]["pixel_values"].shape
        torch.Size([1, 8, 8])
    """
    config = DataConfig(**keys) if config is None else dataclasses.replace(config, **keys)
    _check_name(config)
    if config.pack_tokens:
        raise ValueError("data.pack_tokens packs images while training; where they have one size, set it to 0")
    _refuse_idle_keys(config)
    if config.name == "latents":
        return open_latents(config.path, config.split, config.latents, flip=config.flip)
    if config.name == "codes":
        return open_codes(config.path, config.split, flip=config.flip)
    source = _open_source(config)
    transform = ImageTransform(config.resolution, config.channels, config.crop, config.flip)
    if config.name in CLIP_DATASETS:
        return ClipDataset(source, transform, config.num_frames, config.frame_stride)
    return ImageDataset(source, transform)


def build_variable_images(config: DataConfig) -> VariableImages:
    """A data set of images of different sizes, to be packed (``data.pack_tokens``).

    Raises:
        ValueError: a kind of data set that is not packed, a key that does not fit, or an image that cannot be read.
        FileNotFoundError: the data are not where ``path`` says.
    """
    _check_name(config)
    if config.name not in IMAGE_DATASETS:
        raise ValueError(f"data.pack_tokens packs images, not data.name={config.name}; set it to 0")
    _refuse_idle_keys(config)
    for name in ("resolution", "min_resolution"):
        side = getattr(config, name)
        if side is not None and side < config.multiple:
            raise ValueError(f"data.{name} is {side}; expected at least data.multiple={config.multiple}")
    if config.resolution is not None and (config.min_resolution or 0) > config.resolution:
        raise ValueError(f"data.min_resolution={config.min_resolution} is above data.resolution={config.resolution}")
    transform = ShapeKeeping(
        config.resolution, config.channels, flip=config.flip, smallest=config.min_resolution, multiple=config.multiple
    )
    return VariableImages(_open_source(config), transform)


def _check_name(config: DataConfig) -> None:
    if config.name not in DATASETS:
        near = difflib.get_close_matches(config.name, DATASETS, n=1)
        raise ValueError(
            f"data.name={config.name!r} is not a data set"
            + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(DATASETS)}")
        )


def _refuse_idle_keys(config: DataConfig) -> None:
    """Refuse keys that the kind of data set would ignore."""
    encoded = config.name in ("codes", "latents")
    idle = ["resolution", "channels", "crop", "label", "download"] if encoded else []
    idle += [] if config.name == "latents" else ["latents"]
    if encoded or (config.name not in CAPTION_OPTION and config.caption != CLASS):
        idle += ["caption"]
    if config.name not in CLIP_DATASETS:
        idle += ["num_frames", "frame_stride"]
    idle += ["crop"] if config.pack_tokens else ["min_resolution", "multiple"]
    defaults = DataConfig(name=config.name)
    for key in idle:
        if getattr(config, key) != getattr(defaults, key):
            packing = " with data.pack_tokens" if config.pack_tokens else ""
            raise ValueError(f"data.{key} means nothing to data.name={config.name}{packing}; leave it out")


def _open_source(config: DataConfig) -> Source:
    """What the reader of the kind finds, with the captions asked for."""
    read = (IMAGE_DATASETS | CLIP_DATASETS)[config.name]
    told = config.name in CAPTION_OPTION and config.caption != CLASS
    options = {"caption": config.caption} if told else {}
    try:
        source = read(config.path, config.split, config.label, config.download, **options)
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        where = "" if config.path is None or str(config.path) in str(error) else f"data.path={config.path}: "
        raise ValueError(f"{where}{error or type(error).__name__}") from error
    if config.caption != CLASS:
        return source
    if source.labels is None:
        raise ValueError(f"data.caption={CLASS} names the classes, but {config.name} has no labels; set data.label")
    captions = tuple((source.class_names[label],) for label in source.labels)
    return dataclasses.replace(source, captions=captions)


def cache_dataset(
    dataset: ImageDataset | LatentDataset | CodeDataset, cache: str, device: torch.device | str
) -> ImageDataset | LatentDataset | CachedImages | CachedCodes:
    """The data set, or its items decoded into memory; training sees the same either way.

    Args:
        dataset: the data set.
        cache: ``none``; ``ram``; or ``device``, for images and codes, on ``device``.
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
    kind = CachedCodes if isinstance(dataset, CodeDataset) else CachedImages
    return kind(dataset, device if cache == "device" else "cpu")
