"""Images that a call starts from: to the size and range of the denoiser, and masks of what is to be painted anew."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from genssm.data.transforms import to_colours, to_model_range

ImageInput = Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image | np.ndarray | torch.Tensor]


@dataclass(frozen=True)
class Start:
    """Where a call starts, if not from noise.

    Attributes:
        clean: the given images as the denoiser sees images, (B, C, h, w), float32.
        strength: part of the range of times that is walked, above 0; 1 starts from pure noise.
        mask: (B, 1, h, w), 1 where the image is painted anew; None: everywhere.
    """

    clean: torch.Tensor
    strength: float
    mask: torch.Tensor | None = None


def to_pixels(images: ImageInput, channels: int, height: int, width: int) -> torch.Tensor:
    """Images as the model sees pixels, resized where needed.

    Args:
        images: one or several: Pillow images; arrays (H, W, C) or (N, H, W, C), or tensors (C, H, W) or (N, C, H, W),
            in 0..1. Transparent parts show white.
        channels: 1 or 3.
        height, width: size wanted.

    Returns:
        (N, channels, height, width), float32, -1..1, on the CPU.

    Raises:
        ValueError: another shape or range.
    """
    several = images if isinstance(images, (list, tuple)) else [images]
    return torch.cat([_to_pixels(image, channels, height, width) for image in several])


def _to_pixels(image: Image.Image | np.ndarray | torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    if isinstance(image, Image.Image):
        image = to_colours(image, channels)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        array = np.array(image).reshape(height, width, channels)
        return to_model_range(torch.from_numpy(array).permute(2, 0, 1))[None]
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image).movedim(-1, -3)
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"image is a {type(image).__name__}; expected a Pillow image, an array or a tensor")
    image = image[None] if image.dim() == 3 else image
    if image.dim() != 4 or image.shape[1] != channels:
        raise ValueError(f"image has the shape {tuple(image.shape)}; expected {channels} channel(s)")
    if not image.is_floating_point() or image.min() < 0 or image.max() > 1:
        raise ValueError("the numbers of an image array or tensor are expected between 0 and 1")
    image = image.detach().cpu().float()
    if image.shape[2:] != (height, width):
        image = F.interpolate(image, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return 2 * image - 1


def to_mask(masks: ImageInput, height: int, width: int, grid: tuple[int, int]) -> torch.Tensor:
    """Masks at the resolution of the denoiser.

    Args:
        masks: as for :func:`to_pixels`, white (1) where the image is to be painted anew.
        height, width: size in pixels.
        grid: (h, w) of the denoiser's input; a cell is painted anew if any of its pixels is.

    Returns:
        (N, 1, h, w), float32, 0 or 1.
    """
    pixels = (to_pixels(masks, 1, height, width) >= 0).float()
    return F.adaptive_max_pool2d(pixels, grid)
