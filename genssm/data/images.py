"""Data sets of images: ``{"pixel_values": float32 (C, H, W) in -1..1, "class_labels": int}``."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from genssm.data.sources import Source
from genssm.data.transforms import ImageTransform, to_model_range

logger = logging.getLogger("genssm")


class ImageDataset(torch.utils.data.Dataset):
    """A source of images seen through a transform.

    ``dataset[i]`` has nothing random in it. ``dataset.item(i, key)`` draws its crop and mirror from the key, which
    belongs to a place in the training stream (:mod:`genssm.data.loading`).

    Attributes:
        num_classes: number of classes, 0 without labels.
        class_names: their names.
        labels: int64 (N,), or None.
        item_shape: (C, H, W) of an item.
    """

    tensor_name = "pixel_values"

    def __init__(self, source: Source, transform: ImageTransform) -> None:
        self.source, self.transform = source, transform
        self.labels, self.class_names, self.num_classes = source.labels, source.class_names, len(source.class_names)
        self.item_shape: tuple[int, int, int] = tuple(self.pixels(0).shape)

    def __len__(self) -> int:
        return self.source.count

    def pixels(self, index: int, key: int | None = None) -> np.ndarray:
        """The image before mirroring, uint8 (C, H, W)."""
        name = self.source.names(index)
        try:
            image = self.source.read(index)
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read image {name}: {error}") from error
        try:
            pixels = self.transform.pixels(image, key)
        except ValueError as error:
            raise ValueError(f"image {name}: {error}") from None
        if pixels.shape != getattr(self, "item_shape", pixels.shape):
            raise ValueError(f"image {name} is {pixels.shape} but the first one {self.item_shape}; set data.resolution")
        return pixels

    def item(self, index: int, key: int | None) -> dict[str, Any]:
        """One training item; ``key`` decides what is random in it, None leaves nothing random."""
        pixels = torch.from_numpy(self.pixels(index, key))
        if self.transform.flip and key is not None and key & 1:
            pixels = pixels.flip(-1)
        item: dict[str, Any] = {"pixel_values": to_model_range(pixels)}
        if self.labels is not None:
            item["class_labels"] = int(self.labels[index])
        return item

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(int(index), None)


class CachedImages:
    """All images of a data set decoded once, uint8, on the CPU or the accelerator; batches are made there.

    Args:
        dataset: what to decode.
        device: where to keep the pixels.

    Raises:
        ValueError: the data set crops at random, so there are no fixed pixels to keep.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device | str = "cpu") -> None:
        if dataset.transform.is_random_crop:
            raise ValueError(f"data.crop={dataset.transform.crop} is random; use data.cache=none with it")
        self.flip = dataset.transform.flip
        pixels = np.stack([dataset.pixels(i) for i in range(len(dataset))])
        self.pixels = torch.from_numpy(pixels).to(device)
        self.labels = None if dataset.labels is None else torch.from_numpy(dataset.labels).to(device)

    def batch(self, indices: np.ndarray, keys: np.ndarray) -> Mapping[str, torch.Tensor]:
        """The items ``indices`` with their keys (uint64), equal to those of the data set, stacked."""
        rows = torch.from_numpy(indices).to(self.pixels.device)
        pixels = self.pixels[rows]
        if self.flip:
            mirrored = torch.from_numpy((keys & np.uint64(1)).astype(bool)).to(self.pixels.device)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        batch = {"pixel_values": to_model_range(pixels)}
        if self.labels is not None:
            batch["class_labels"] = self.labels[rows]
        return batch
