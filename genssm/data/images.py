"""Data sets of images: ``{"pixel_values": float32 (C, H, W) in -1..1, "class_labels": int}``."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from genssm.data.captions import draw_caption, mirrors
from genssm.data.sources import READ_ERRORS, Source
from genssm.data.transforms import ImageTransform, to_model_range
from genssm.devices import send

logger = logging.getLogger("genssm")


class ImageDataset(torch.utils.data.Dataset):
    """A source of images seen through a transform.

    ``dataset[i]`` has nothing random in it. ``dataset.item(i, key)`` draws its crop and mirror from the key, which
    belongs to a place in the training stream (:mod:`genssm.data.loading`).

    Attributes:
        num_classes: number of classes, 0 without labels.
        class_names: their names.
        labels: int64 (N,), or None.
        captions: texts of each image, or None.
        item_shape: (C, H, W) of an item.
    """

    tensor_name = "pixel_values"

    def __init__(self, source: Source, transform: ImageTransform) -> None:
        self.source, self.transform = source, transform
        self.labels, self.class_names, self.num_classes = source.labels, source.class_names, len(source.class_names)
        self.captions = source.captions
        self.item_shape: tuple[int, int, int] = tuple(self.pixels(0).shape)

    def __len__(self) -> int:
        return self.source.count

    def pixels(self, index: int, key: int | None = None) -> np.ndarray:
        """The image before mirroring, uint8 (C, H, W)."""
        name = self.source.names(index)
        try:
            pixels = self.arrange(self.source.read(index), key)
        except ValueError as error:
            raise ValueError(f"image {name}: {error}") from None
        except READ_ERRORS as error:
            raise ValueError(f"cannot read image {name}: {error}") from error
        if hasattr(self, "item_shape"):
            self.check_shape(pixels, name)
        return pixels

    def check_shape(self, pixels: np.ndarray, name: str) -> None:
        """Refuse an image that does not go with the first one."""
        if pixels.shape != self.item_shape:
            raise ValueError(f"image {name} is {pixels.shape} but the first one {self.item_shape}; set data.resolution")

    @property
    def is_random(self) -> bool:
        """Whether the pixels themselves depend on the key, beside the mirror."""
        return self.transform.is_random_crop

    def arrange(self, stored: Image.Image, key: int | None) -> np.ndarray:
        """uint8 (C, H, W) of a stored image."""
        return self.transform.pixels(stored, key)

    def item(self, index: int, key: int | None) -> dict[str, Any]:
        """One training item; ``key`` decides what is random in it, None leaves nothing random."""
        pixels = torch.from_numpy(self.pixels(index, key))
        text = None if self.captions is None else draw_caption(self.captions[index], key)
        if self.transform.flip and key is not None and key & 1 and (text is None or mirrors(text)):
            pixels = pixels.flip(-1)
        item: dict[str, Any] = {"pixel_values": to_model_range(pixels)}
        if text is not None:
            item["text"] = text
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
        ValueError: the data set crops or cuts at random, so there are no fixed pixels to keep.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device | str = "cpu") -> None:
        if dataset.is_random:
            crop = dataset.transform.crop
            what = f"data.crop={crop} is" if dataset.transform.is_random_crop else "the beginning of longer clips is"
            raise ValueError(f"{what} random; use data.cache=none with it")
        self.flip = dataset.transform.flip
        pixels = np.stack([dataset.pixels(i) for i in range(len(dataset))])
        self.pixels = torch.from_numpy(pixels).to(device)
        self.labels = None if dataset.labels is None else torch.from_numpy(dataset.labels).to(device)
        self.captions = dataset.captions

    def batch(self, indices: np.ndarray, keys: np.ndarray) -> Mapping[str, torch.Tensor | list[str]]:
        """The items ``indices`` with their keys (uint64), equal to those of the data set, stacked."""
        rows = send(torch.from_numpy(indices), self.pixels.device)
        pixels = self.pixels[rows]
        texts = None
        if self.captions is not None:
            texts = [draw_caption(self.captions[i], int(key)) for i, key in zip(indices, keys)]
        if self.flip:
            mirrored = (keys & np.uint64(1)).astype(bool)
            if texts is not None:
                mirrored &= np.asarray([mirrors(text) for text in texts])
            mirrored = send(torch.from_numpy(mirrored), self.pixels.device)
            pixels = torch.where(mirrored.reshape(-1, *[1] * (pixels.dim() - 1)), pixels.flip(-1), pixels)
        batch: dict[str, torch.Tensor | list[str]] = {"pixel_values": to_model_range(pixels)}
        if texts is not None:
            batch["text"] = texts
        if self.labels is not None:
            batch["class_labels"] = self.labels[rows]
        return batch
