"""Where images come from: a folder, an ``.npz`` file, a data set, or noise. All give uint8 RGB batches with labels."""

import abc
import argparse
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from genssm.config import DataConfig, load_config
from genssm.data import CROPS, ImageDataset, build_dataset
from genssm.data.sources import READ_ERRORS, Source, from_files, list_images, npz
from genssm.data.transforms import ImageTransform


class ImageBatch(NamedTuple):
    """Images of one size: positions in the source, uint8 (B, 3, H, W), and labels, (B,) int64, or None if unknown."""

    indices: list[int]
    images: Tensor
    labels: NDArray[np.int64] | None


class ImageSource(abc.ABC):
    """A finite, ordered set of images.

    Attributes:
        name: what reports call it.
        file_format: "png", "npz", ...; a lossy format changes every feature distance, so reports carry it.
        clips: None, or how clips were cut: then items are uint8 (F, 3, H, W), batches (B, F, 3, H, W).
    """

    name: str
    file_format: str
    clips: Mapping[str, Any] | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def read(self, index: int) -> tuple[Tensor, int | None]:
        """Image ``index`` as uint8 (3, H, W), and its label or None."""

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[ImageBatch]:
        """The images at ``indices``, in order, at most ``batch_size`` together; a batch ends where the size changes."""
        rows: list[tuple[int, Tensor, int | None]] = []
        for index in indices:
            image, label = self.read(index)
            if rows and (len(rows) == batch_size or rows[0][1].shape != image.shape):
                yield _batch(rows)
                rows = []
            rows.append((index, image, label))
        if rows:
            yield _batch(rows)


class ListedSource(ImageSource):
    """Stored images of :mod:`genssm.data` seen through a transform; sizes may differ from image to image.

    Attributes:
        num_classes: number of classes, 0 without labels.
        channels: 1 if the first image is grey, else 3.
    """

    def __init__(self, listed: Source, transform: ImageTransform, name: str, file_format: str) -> None:
        self.listed, self.transform, self.name, self.file_format = listed, transform, name, file_format
        self.num_classes = len(listed.class_names)
        self.channels = len(self._pixels(0))

    def __len__(self) -> int:
        return self.listed.count

    def read(self, index: int) -> tuple[Tensor, int | None]:
        image = torch.from_numpy(self._pixels(index)).expand(3, -1, -1)
        return image, None if self.listed.labels is None else int(self.listed.labels[index])

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        try:
            return self.transform.pixels(self.listed.read(index))  # (C, H, W)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot read image {self.listed.names(index)}: {error}") from error


class NoiseSource(ImageSource):
    """Uniform noise images: what a distance says about samples that have nothing of the data.

    Image i depends on the seed and i alone. Grey noise has three equal channels.
    """

    def __init__(self, count: int, size: tuple[int, int], *, grey: bool, seed: int = 0) -> None:
        self.count, self.size, self.grey, self.seed = count, size, grey, seed
        self.name, self.file_format = f"uniform noise, seed {seed}", "noise"

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Tensor, int | None]:
        generator = np.random.default_rng([self.seed, index])
        shape = (1 if self.grey else 3, *self.size)
        return torch.from_numpy(generator.integers(0, 256, shape, dtype=np.uint8)).expand(3, -1, -1), None


class SubsetSource(ImageSource):
    """``count`` images of another source, drawn without replacement and without depending on their order."""

    def __init__(self, source: ImageSource, count: int, seed: int = 0) -> None:
        if count > len(source):
            unit = "images" if source.clips is None else "clips"
            raise ValueError(f"{source.name} holds {len(source)} {unit}, {count} were asked for")
        self.source = source
        self.order = np.sort(np.random.default_rng(seed).permutation(len(source))[:count])
        self.name, self.file_format = f"{source.name} ({count} of {len(source)})", source.file_format
        self.clips = source.clips

    def __len__(self) -> int:
        return len(self.order)

    def read(self, index: int) -> tuple[Tensor, int | None]:
        return self.source.read(int(self.order[index]))


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how a named data set is read; the names of ``genssm.config.DataConfig``."""
    group = parser.add_argument_group("data sets")
    group.add_argument("--path", metavar="DIR", help="folder of the data set; digits needs none")
    group.add_argument("--resolution", type=int, metavar="PX", help="side in pixels; default: as stored")
    group.add_argument("--crop", choices=CROPS, help="how images reach the resolution (default: adm)")
    group.add_argument("--channels", type=int, choices=(1, 3), help="1 grey, 3 colour; default: as stored")


def dataset_source(name: str, split: str, options: argparse.Namespace) -> ListedSource:
    """The data set ``name`` under the options of :func:`add_data_options`, never mirrored.

    ``name`` may also be a configuration file or a run folder, whose ``data`` section is taken where no option is given.
    """
    given = {key: getattr(options, key) for key in ("path", "resolution", "crop", "channels")}
    given = {key: value for key, value in given.items() if value is not None}
    file = Path(name) / "config.yaml" if Path(name).is_dir() else Path(name)
    if file.suffix in (".yaml", ".yml"):
        # Packed images are measured at one size, as a pipeline draws them without further words.
        unpacked = {key: getattr(DataConfig, key) for key in ("pack_tokens", "min_resolution", "multiple")}
        config = replace(load_config(file).data, **unpacked, **given)
    else:
        config = DataConfig(name=name, **given)
    dataset = build_dataset(config, split=split, flip=False)
    if not isinstance(dataset, ImageDataset):
        raise ValueError(f"{name} holds no images; distances need them, name the data set that they were made of")
    size = "" if config.resolution is None else f" {config.resolution}px {config.crop}"
    return ListedSource(dataset.source, dataset.transform, f"{config.name} {split}{size}", "dataset")


def file_source(path: str | Path) -> ListedSource:
    """The images of a folder, at any depth and of any size, or of an ``.npz`` file.

    An ``.npz`` holds uint8 images under ``arr_0``, ``images`` or ``x`` (the sample batch of the ADM evaluator), and
    perhaps their labels under ``arr_1``, ``labels`` or ``y``.

    Raises:
        FileNotFoundError: neither a folder with images nor such a file.
        ValueError: the file holds something else.
    """
    path = Path(path)
    if path.is_dir():
        files = list_images(path)
        file_format = "+".join(sorted({file.suffix.lower().lstrip(".") for file in files}))
        return ListedSource(from_files(files, path, "none"), ImageTransform(), str(path), file_format)
    if not path.is_file() or path.suffix != ".npz":
        raise FileNotFoundError(f"{path} is neither a folder of images nor an .npz file")
    try:
        return ListedSource(npz(str(path), "", None, False), ImageTransform(), str(path), "npz")
    except ValueError:
        raise
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {path}: {error or type(error).__name__}") from error


def content_hash(digests: Sequence[bytes]) -> str:
    """One sha256 for a set of images in order, from the :func:`image_digest` of each."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def image_digest(image: Tensor) -> bytes:
    """sha256 of the size and the pixels of one uint8 image (3, H, W) or clip, whatever file they came from."""
    shape = "x".join(map(str, image.shape)).encode()
    return hashlib.sha256(shape + image.contiguous().numpy().tobytes()).digest()


def _batch(rows: list[tuple[int, Tensor, int | None]]) -> ImageBatch:
    indices, images, labels = zip(*rows)
    known = None if None in labels else np.array(labels, dtype=np.int64)
    return ImageBatch(list(indices), torch.stack(images), known)
