"""Containers of images: each reader returns a :class:`Source`, a numbered list of stored images with their labels.

Files are ordered by their relative path with ``/`` separators, class numbers are the rank of the class name, so the
same folder gives the same data set on every machine. Packages that are not part of a plain install are imported by the
reader that needs them.
"""

import csv
import gzip
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from genssm.data.captions import SIDECAR, Captions, from_rows, from_sidecars, read_json
from genssm.training.seeding import permutation

# What the readers of broken files raise; Pillow's include a SyntaxError.
READ_ERRORS = (
    OSError, ValueError, LookupError, EOFError, SyntaxError, struct.error, zlib.error, zipfile.BadZipFile,
    tarfile.TarError, pickle.UnpicklingError, SafetensorError, Image.DecompressionBombError,
)  # fmt: skip
MOST_CLASSES = 1_000_000
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """Stored images.

    Attributes:
        read: index -> the image as stored.
        count: number of images.
        labels: class of each image, int64 (count,), or None.
        class_names: name of each class, empty without labels.
        names: index -> what to call the image in an error.
        captions: texts of each image, at least one, or None.
        size: index -> (width, height) of the stored image, where that is known without decoding it.
    """

    read: Callable[[int], Image.Image]
    count: int
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    names: Callable[[int], str] = str
    captions: Captions | None = None
    size: Callable[[int], tuple[int, int]] | None = None


def from_arrays(images: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str] = ()) -> Source:
    """A source over arrays in memory.

    Args:
        images: uint8, (N, H, W), (N, H, W, 1), (N, H, W, 3) or (N, 3 or 1, H, W).
        labels: integers (N,), or None.
        class_names: names; numbers are used when empty.

    Raises:
        ValueError: another shape or type, or as many labels as images are not given.
    """
    if images.ndim == 4 and images.shape[-1] not in (1, 3, 4) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[-1] not in (1, 3, 4))
    ):
        raise ValueError(
            f"images are {images.dtype} {images.shape}; expected uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) "
            "with one or three channels"
        )
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if labels is not None:
        labels = np.asarray(labels).reshape(-1).astype(np.int64)
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        class_names = class_names or [str(i) for i in range(count_classes(labels))]
    return Source(lambda i: Image.fromarray(images[i]), len(images), labels, tuple(class_names))


def count_classes(labels: np.ndarray) -> int:
    """One more than the highest label; ValueError for labels that are no class numbers."""
    if len(labels) and (labels.min() < 0 or labels.max() >= MOST_CLASSES):
        raise ValueError(f"labels are {labels.min()}..{labels.max()}; expected class numbers 0..{MOST_CLASSES - 1}")
    return int(labels.max()) + 1 if len(labels) else 0


def digits(path: str | None, split: str, label: str | None, download: bool) -> Source:
    """The 1,797 handwritten digits (8x8, grey) that ship with scikit-learn.

    Split by a fixed rule: of every class the last fifth, in hashed order, is ``test``; the rest is ``train``.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the data set digits comes with scikit-learn; pip install genssm[digits]") from None
    bunch = load_digits()
    order = permutation(len(bunch.target), seed=0)
    rank = np.empty(len(order), np.int64)
    for digit in range(10):
        members = order[bunch.target[order] == digit]
        rank[members] = np.arange(len(members)) * 5 // len(members)
    part = np.flatnonzero(rank < 4 if _train_or_test(split, "digits") == "train" else rank == 4)
    images = np.round(bunch.images[part] * (255 / 16)).astype(np.uint8)
    return _relabel(from_arrays(images, bunch.target[part], [str(i) for i in range(10)]), label)


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_TORCHVISION = {
    "mnist": "MNIST",
    "kmnist": "KMNIST",
    "fashion_mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


def torchvision_set(name: str) -> Callable[..., Source]:
    """Reader of a torchvision data set; those in IDX files are also read without torchvision, packed or not."""

    def read(path: str | None, split: str, label: str | None, download: bool) -> Source:
        root, part = _need_path(path, name), _train_or_test(split, name)
        class_name = _TORCHVISION[name]
        names = _FASHION if name == "fashion_mnist" else tuple("0123456789")
        for folder in (root, root / class_name / "raw"):
            pair = _find_idx(folder, "train" if part == "train" else "t10k")
            if pair is not None:
                return _relabel(from_arrays(read_idx(pair[0]), read_idx(pair[1]), names), label)
        from torchvision import datasets

        try:
            dataset = getattr(datasets, class_name)(root=str(root), train=part == "train", download=download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no {class_name} files in {root} ({error}); put them there, or set data.download=true"
            ) from None
        class_names = names if "mnist" in name else dataset.classes
        return _relabel(from_arrays(np.asarray(dataset.data), np.asarray(dataset.targets), class_names), label)

    return read


def _find_idx(folder: Path, part: str) -> tuple[Path, Path] | None:
    for end in (".gz", ""):
        images, labels = folder / f"{part}-images-idx3-ubyte{end}", folder / f"{part}-labels-idx1-ubyte{end}"
        if images.is_file() and labels.is_file():
            return images, labels
    return None


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file (big-endian header: 0, 0, type, rank, sizes), packed with gzip or not."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut off or damaged: {error}") from error
    if data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is not an IDX file of bytes")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != shape.prod():
        raise ValueError(f"{path} is cut off: {values.size} bytes for an array of {tuple(shape)}")
    return values.reshape(tuple(shape))


def image_folder(path: str | None, split: str, label: str | None, download: bool, caption: str | None = None) -> Source:
    """Images in a folder, with or without class folders, or listed in ``metadata.jsonl`` / ``metadata.csv``.

    Args:
        path: the folder; a sub-folder with the name of the split is used when there is one, else the rows of a
            metadata file that say so in a column ``split``.
        label: ``folder`` (the first folder on the way to the file), ``prefix`` (the file name before its first ``_``),
            ``none``, or a column of the metadata file. None: the column ``label`` of a metadata file, else class
            folders where there are any.
        caption: a column of the metadata file (a text, or a list of texts), or ``sidecar``: the lines of ``a.txt``
            beside ``a.png``; None reads none.
    """
    root, table = open_folder(_need_path(path, "image_folder"), split)
    files = list_images(root) if table is None else [root / row["file_name"] for row in table]
    choice = choose_label(files, root, table, label)
    return from_files(files, root, choice, captions=read_captions(files, root, table, caption))


def open_folder(path: Path, split: str) -> tuple[Path, list[dict] | None]:
    """The folder of a split, and the rows of its metadata file or None.

    Args:
        path: a folder with a sub-folder of the split's name, or with a metadata file whose column ``split`` names it,
            or, for ``train``, any folder.

    Raises:
        FileNotFoundError: there is no such split.
        ValueError: a metadata file is damaged, or its column ``split`` has other values.
    """
    root = path / split if (path / split).is_dir() else path
    table = _read_metadata(root)
    if root == path and table is not None and "split" in table[0]:
        known = ", ".join(sorted({str(row.get("split")) for row in table}))
        table = [row for row in table if row.get("split") == split]
        if not table:
            raise ValueError(f"data.split={split}: the column split of the metadata in {path} has {known}")
    elif root == path and split != "train":
        raise FileNotFoundError(f"{path} has no folder {split!r} for data.split={split}")
    missing = [row["file_name"] for row in table or () if not (root / row["file_name"]).exists()]
    if missing:
        raise FileNotFoundError(
            f"the metadata in {root} list {len(missing)} files that are not there, first {missing[0]}"
        )
    return root, table


def choose_label(files: Sequence[Path], root: Path, table: list[dict] | None, label: str | None) -> str | list:
    """What ``data.label`` means for files, listed in a table or found: ``folder``, ``prefix``, ``none``, or classes."""
    if label in ("folder", "prefix", "none"):
        return label
    if table is None:
        if label is not None:
            raise ValueError(f"data.label={label!r} needs a metadata.jsonl or metadata.csv in {root}")
        return "folder" if all(f.parent != root for f in files) else "none"
    if label is None and "label" not in table[0]:
        return "none"
    column = label or "label"
    if column not in table[0]:
        raise ValueError(f"{root} has no metadata column {column!r}; it has {', '.join(table[0])}")
    lacking = [row["file_name"] for row in table if row.get(column) is None]
    if lacking:
        raise ValueError(
            f"{root}: {len(lacking)} of {len(table)} rows of the metadata have no {column!r}, first {lacking[0]}; give "
            "it, or set data.label=none"
        )
    return [row[column] for row in table]


def read_captions(files: Sequence[Path], root: Path, table: list[dict] | None, caption: str | None) -> Captions | None:
    """The captions that ``data.caption`` means: those of a column, those beside the files, or none."""
    if caption is None:
        return None
    if caption == SIDECAR:
        return from_sidecars(files)
    if table is None:
        raise ValueError(f"data.caption={caption!r} needs a metadata.jsonl or metadata.csv in {root}, or is {SIDECAR}")
    return from_rows(table, caption, root)


def image_list(path: str | None, split: str, label: str | None, download: bool) -> Source:
    """A text file with one image path per line, relative to its folder; a class may follow after a tab or space."""
    file = _need_path(path, "image_list")
    if not file.is_file():
        raise FileNotFoundError(f"image_list reads a text file of paths; {file} is none")
    rows = [
        line.replace("\t", " ").rsplit(" ", 1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    if not rows:
        raise ValueError(f"{file} lists no images")
    pairs = [
        row if len(row) == 2 and Path(row[0]).suffix.lower() in EXTENSIONS else [" ".join(row), None] for row in rows
    ]
    labelled = all(pair[1] is not None for pair in pairs)
    column: str | list = "none"
    if label in ("folder", "prefix"):
        column = label
    elif labelled and label != "none":
        column = [pair[1] for pair in pairs]
    return from_files([file.parent / pair[0] for pair in pairs], file.parent, column)


def npz(path: str | None, split: str, label: str | None, download: bool) -> Source:
    """An ``.npz`` with images under ``images``, ``x`` or ``arr_0``; labels, if any, under ``labels``, ``y``."""
    file = _need_path(path, "npz")
    file = file / f"{split}.npz" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; npz reads one archive, or SPLIT.npz in a folder")
    with np.load(file) as archive:
        images = next((archive[k] for k in ("images", "x", "arr_0") if k in archive), None)
        labels = next((archive[k] for k in ("labels", "label", "y", "arr_1") if k in archive), None)
        if images is None:
            raise ValueError(f"{file} holds {', '.join(archive)}; images are expected under arr_0, images or x")
    return _relabel(from_arrays(images, labels), label)


def huggingface(path: str | None, split: str, label: str | None, download: bool, caption: str | None = None) -> Source:
    """A data set read by the package ``datasets``: an image folder, parquet files, a saved data set, or a Hub name.

    The image column is the first of that type; ``label`` names the class column, None takes the first one of type
    ClassLabel, ``none`` takes no labels. ``caption`` names the column of the captions (a text, or a list of texts).
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(
            "the data set kind huggingface needs the package datasets; pip install genssm[formats]"
        ) from None
    if path is None:
        raise ValueError("the data set kind huggingface needs data.path: a folder or the name of a data set")
    folder = Path(path)
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        table = datasets.load_from_disk(path)
        table = table[split] if isinstance(table, datasets.DatasetDict) else table
    elif folder.is_file() and folder.suffix == ".parquet":
        table = datasets.load_dataset("parquet", data_files={split: path}, split=split)
    elif folder.is_dir() and any(folder.rglob("*.parquet")):
        table = datasets.load_dataset("parquet", data_dir=path, split=split)
    elif folder.is_dir():
        table = datasets.load_dataset("imagefolder", data_dir=path, split=split)
    else:
        table = datasets.load_dataset(path, split=split)
    image = next((n for n, f in table.features.items() if isinstance(f, datasets.Image)), None)
    if image is None:
        raise ValueError(f"{path} has no image column; its columns are {', '.join(table.features)}")
    if label is None:
        label = next((n for n, f in table.features.items() if isinstance(f, datasets.ClassLabel)), "none")
    captions = None
    if caption is not None:
        if caption not in table.features:
            raise ValueError(f"{path} has no column {caption!r}; its columns are {', '.join(table.features)}")
        captions = from_rows([{caption: value} for value in table[caption][:]], caption, path)
    if label == "none":
        return Source(lambda i: table[i][image], len(table), captions=captions)
    if label not in table.features:
        raise ValueError(f"{path} has no column {label!r}; its columns are {', '.join(table.features)}")
    feature = table.features[label]
    if isinstance(feature, datasets.ClassLabel):
        labels, names = np.asarray(table[label][:], np.int64), tuple(feature.names)
    else:
        labels, names = number_classes(table[label][:])
    return Source(lambda i: table[i][image], len(table), labels, names, captions=captions)


def from_files(files: Sequence[Path], root: Path, label: str | Sequence, captions: Captions | None = None) -> Source:
    """A source over image files.

    Args:
        files: the files, in order.
        root: folder that relative names start from.
        label: ``folder``, ``prefix``, ``none``, or the class of every file.
        captions: the captions of every file, or None.
    """
    labels, names = class_labels(files, root, label)

    def read(index: int) -> Image.Image:
        with Image.open(files[index]) as image:
            image.load()
            return image

    def size(index: int) -> tuple[int, int]:
        with Image.open(files[index]) as image:
            return image.size

    return Source(read, len(files), labels, names, names=lambda i: str(files[i]), captions=captions, size=size)


def class_labels(files: Sequence[Path], root: Path, label: str | Sequence) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The class of each file, int64, and the names of the classes; arguments as for :func:`from_files`."""
    if label == "none":
        return None, ()
    if label == "prefix":
        return rank_classes([f.name.partition("_")[0] for f in files])
    if label != "folder":
        return number_classes(label)
    if any(f.parent == root for f in files):
        raise ValueError(f"{root} holds images outside of class folders; move them or set data.label=none")
    return rank_classes([f.relative_to(root).parts[0] for f in files])


def rank_classes(values: Sequence) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class of each value, int64, as its rank among the sorted names, and the names."""
    names = sorted({str(v) for v in values})
    rank = {name: i for i, name in enumerate(names)}
    return np.asarray([rank[str(v)] for v in values], np.int64), tuple(names)


def number_classes(values: Sequence) -> tuple[np.ndarray, tuple[str, ...]]:
    """As :func:`rank_classes`, but whole numbers 0..n-1 keep their value."""
    if all(str(v).isdecimal() for v in values):
        labels = np.asarray([int(v) for v in values], np.int64)
        if len(np.unique(labels)) == labels.max() + 1:
            return labels, tuple(str(i) for i in range(int(labels.max()) + 1))
    return rank_classes(values)


def list_images(root: Path) -> list[Path]:
    """All image files under ``root``, sorted by relative path; FileNotFoundError if there is none."""
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        found += [Path(folder, name) for name in names if Path(name).suffix.lower() in EXTENSIONS]
    if not found:
        raise FileNotFoundError(f"no images in {root}; looked for {', '.join(EXTENSIONS)}")
    return sorted(found, key=lambda f: f.relative_to(root).as_posix())


def _read_metadata(root: Path) -> list[dict] | None:
    for name in ("metadata.jsonl", "metadata.csv"):
        file = root / name
        if not file.is_file():
            continue
        try:
            with file.open(encoding="utf-8-sig", newline="") as stream:  # some programs begin with a byte order mark
                if name.endswith("csv"):
                    rows = list(csv.DictReader(stream))
                else:
                    rows = [read_json(line, f"{file}, line {i}") for i, line in enumerate(stream, 1) if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 text: {error}") from None
        if not rows or any(not isinstance(row, dict) or not isinstance(row.get("file_name"), str) for row in rows):
            raise ValueError(f"{file} must have the column file_name in every row")
        return rows
    return None


def _relabel(source: Source, label: str | None) -> Source:
    """The source without labels if ``label`` is ``none``; other choices do not exist for stored labels."""
    if label is None:
        return source
    if label == "none":
        return Source(source.read, source.count, names=source.names)
    raise ValueError(f"data.label={label!r} is for folders and tables; this data set has its labels, or none")


def _need_path(path: str | None, name: str) -> Path:
    if path is None:
        raise ValueError(f"the data set kind {name} needs data.path, the folder or file to read")
    if not Path(path).exists() and name not in _TORCHVISION:
        raise FileNotFoundError(f"data.path={path} does not exist")
    return Path(path)


def _train_or_test(split: str, name: str) -> str:
    if split not in ("train", "test"):
        raise ValueError(f"data.split={split!r}: {name} has train and test")
    return split


DATASETS: dict[str, Callable[..., Source]] = {
    "digits": digits,
    **{name: torchvision_set(name) for name in _TORCHVISION},
    "image_folder": image_folder,
    "image_list": image_list,
    "npz": npz,
    "huggingface": huggingface,
}
