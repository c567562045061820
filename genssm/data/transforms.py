"""From a stored image to the tensor a model sees: colours, size, mirror. One function per crop, no state.

Randomness comes from a 64-bit ``key`` that belongs to the place of the item in the training stream; without a key
nothing is random (random crops take the centre, nothing is mirrored).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

_GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L")


def to_colours(image: Image.Image, channels: int | None) -> Image.Image:
    """An 8-bit grey (``channels`` 1) or RGB (3) image; None keeps grey grey and makes everything else RGB.

    Transparent parts show white. 16-bit images are scaled, not clipped. EXIF orientation is left alone, as in the
    reference preprocessing of the field.
    """
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        grey = image.mode in _GREY_MODES
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        image = image.convert("L" if grey else "RGB")
    elif image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.float64) / 257.0).round().clip(0, 255).astype(np.uint8))
    if channels is None:
        channels = 1 if image.mode in _GREY_MODES else 3
    return image.convert("L" if channels == 1 else "RGB")


def adm(image: Image.Image, size: int, key: int | None) -> Image.Image:
    """The reference crop of ADM, DiT and their successors: halve with a box filter, bicubic, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return _cut(_short_side(image, size, Image.Resampling.BICUBIC), size, None)


def resize_center(image: Image.Image, size: int, key: int | None) -> Image.Image:
    """Short side to ``size`` (Lanczos), then the centre."""
    return _cut(_short_side(image, size, Image.Resampling.LANCZOS), size, None)


def resize_random(image: Image.Image, size: int, key: int | None) -> Image.Image:
    """Short side to 1.125 ``size`` (Lanczos), then a random square (the preprocessing of AiM)."""
    return _cut(_short_side(image, round(1.125 * size), Image.Resampling.LANCZOS), size, key)


def pad(image: Image.Image, size: int, key: int | None) -> Image.Image:
    """The image in the middle of a black square of side ``size``: 28 pixels become 32 without resizing."""
    if max(image.size) > size:
        raise ValueError(f"image of {image.width}x{image.height} does not fit into {size}x{size}; use another crop")
    square = Image.new(image.mode, (size, size))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def none(image: Image.Image, size: int, key: int | None) -> Image.Image:
    """The image as it is; it must already have the size."""
    if image.size != (size, size):
        raise ValueError(f"image is {image.width}x{image.height} but resolution is {size}; choose a crop")
    return image


CROPS: dict[str, Callable[[Image.Image, int, int | None], Image.Image]] = {
    "adm": adm,
    "resize_center": resize_center,
    "resize_random": resize_random,
    "pad": pad,
    "none": none,
}


def _short_side(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    scale = size / min(image.size)
    wanted = (round(image.width * scale), round(image.height * scale))
    return image if wanted == image.size else image.resize(wanted, resample)


def _cut(image: Image.Image, size: int, key: int | None) -> Image.Image:
    """A square of side ``size``: where bits 1 to 62 of the key say, or the centre without a key."""
    spare_x, spare_y = image.width - size, image.height - size
    left, top = spare_x // 2, spare_y // 2
    if key is not None:
        left, top = (key >> 1 & 0x7FFFFFFF) % (spare_x + 1), (key >> 32 & 0x7FFFFFFF) % (spare_y + 1)
    return image.crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class ImageTransform:
    """Stored image -> uint8 array.

    Attributes:
        resolution: side of the square in pixels; None keeps the stored size.
        channels: 1, 3, or None for what is stored.
        crop: a key of :data:`CROPS`.
        flip: mirror left to right when the lowest bit of the key is set.
    """

    resolution: int | None = None
    channels: int | None = None
    crop: str = "adm"
    flip: bool = False

    @property
    def is_random_crop(self) -> bool:
        """Whether the pixels themselves depend on the key (a mirror can be applied to stored pixels, a crop not)."""
        return self.crop == "resize_random"

    def pixels(self, image: Image.Image, key: int | None = None) -> np.ndarray:
        """uint8 (C, H, W), not mirrored."""
        image = to_colours(image, self.channels)
        if self.resolution is not None:
            image = CROPS[self.crop](image, self.resolution, key)
        return to_array(image)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 (C, H, W) of a grey or RGB image."""
    array = np.array(image)  # a copy: Pillow's buffer is read-only
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return pixels.float() / 127.5 - 1.0
