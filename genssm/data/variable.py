"""Images of different sizes: each keeps its shape, its sides become multiples of a number of pixels."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from genssm.data.images import ImageDataset
from genssm.data.sources import READ_ERRORS, Source
from genssm.data.transforms import ImageTransform, to_array, to_colours


@dataclass(frozen=True)
class ShapeKeeping(ImageTransform):
    """Stored image -> uint8 array of about the same shape.

    Attributes:
        resolution: images of a larger area are reduced to that of this square; None reduces none.
        smallest: images of a smaller area are enlarged to that of this square; None enlarges none.
        multiple: sides are multiples of it.
    """

    smallest: int | None = None
    multiple: int = 16

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image gets."""
        side = (width * height) ** 0.5
        scale = 1.0
        if self.resolution is not None and side > self.resolution:
            scale = self.resolution / side
        elif self.smallest is not None and side < self.smallest:
            scale = self.smallest / side
        columns, rows = (max(1, round(scale * x / self.multiple)) for x in (width, height))
        most = None if self.resolution is None else max(1, self.resolution // self.multiple) ** 2
        while most is not None and columns * rows > most:  # rounding must not lead above the area
            columns, rows = (columns - 1, rows) if columns >= rows else (columns, rows - 1)
        return columns * self.multiple, rows * self.multiple

    def pixels(self, image: Image.Image, key: int | None = None) -> np.ndarray:
        """uint8 (C, H, W), not mirrored: the middle of the image at the scale at which it covers its size."""
        image = to_colours(image, self.channels)
        width, height = self.size(*image.size)
        scale = max(width / image.width, height / image.height)
        covering = (max(width, round(scale * image.width)), max(height, round(scale * image.height)))
        if covering != image.size:
            image = image.resize(covering, Image.Resampling.LANCZOS)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return to_array(image.crop((left, top, left + width, top + height)))


class VariableImages(ImageDataset):
    """A source of images of different sizes, to be packed.

    Attributes:
        sizes: (width, height) of each item in pixels.
        tokens: squares of ``multiple`` pixels of each item.
        others: as :class:`genssm.data.images.ImageDataset`; ``item_shape`` is that of the first item.

    Raises:
        ValueError: an image cannot be read; its name is in the message.
    """

    def __init__(self, source: Source, transform: ShapeKeeping) -> None:
        super().__init__(source, transform)
        self.sizes = [transform.size(*self._stored_size(index)) for index in range(source.count)]
        self.tokens = [width * height // transform.multiple**2 for width, height in self.sizes]

    def _stored_size(self, index: int) -> tuple[int, int]:
        try:
            return self.source.read(index).size if self.source.size is None else self.source.size(index)
        except READ_ERRORS as error:
            raise ValueError(f"cannot read image {self.source.names(index)}: {error}") from error

    def check_shape(self, pixels: np.ndarray, name: str) -> None:
        if pixels.shape[0] != self.item_shape[0]:
            raise ValueError(
                f"image {name} has {pixels.shape[0]} channel(s) but the first one {self.item_shape[0]}; "
                "set data.channels"
            )
