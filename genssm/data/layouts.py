"""How others have stored latents: each layout finds its files and states what is in them.

Conventions differ silently (moments or samples, scaled or not, mirrored copies or not), so a layout carries its usual
declaration and a configuration can override every part of it.
"""

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genssm.data.blocks import open_folder
from genssm.data.captions import Captions, from_folder
from genssm.data.sources import rank_classes

SD_SCALE = 0.18215  # latents of the first Stable Diffusion VAEs times this have about unit deviation


@dataclass(frozen=True)
class Store:
    """Stored arrays.

    Attributes:
        read: row -> the array as stored.
        rows: number of rows, mirrored copies included.
        labels: class of each item, int64, or None.
        class_names: names of the classes.
        captions: texts of each item, or None.
        declared: usual values of ``form``, ``scaled``, ``scale``, ``shift``, ``flip_rows``.
    """

    read: Callable[[int], np.ndarray]
    rows: int
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    declared: dict[str, Any] = field(default_factory=dict)
    captions: Captions | None = None


def _own(root: Path) -> Store | None:
    """``latents.npy``, ``meta.json``, perhaps ``labels.npy``, ``captions.json``: written by ``genssm.data.encode``."""
    if not (root / "meta.json").is_file() or not (root / "latents.npy").is_file():
        return None
    names = ("form", "scaled", "scale", "shift", "flip_rows")
    meta, latents = open_folder(root, "latents.npy", names)
    labels = np.load(root / "labels.npy") if (root / "labels.npy").is_file() else None
    declared = {name: meta[name] for name in names}
    captions = from_folder(root)
    return Store(lambda i: latents[i], len(latents), labels, tuple(meta.get("class_names", ())), declared, captions)


def _moments(root: Path) -> Store | None:
    """``<i>.npy.npz`` with ``z`` (mean and log-variance) and ``label``: the features of U-ViT and DiM."""
    files = sorted(root.glob("*.npy.npz"), key=_numeric) if root.is_dir() else []
    if not files:
        return None

    def read(row: int) -> np.ndarray:
        with np.load(files[row]) as archive:
            return archive["z"]

    def label(file: Path) -> int | None:
        with np.load(file) as archive:
            return int(archive["label"]) if "label" in archive else None

    labels = [label(f) for f in files]
    found = None if labels[0] is None else np.asarray(labels, np.int64)
    return Store(read, len(files), found, (), {"form": "mean_logvar", "scaled": False, "scale": SD_SCALE})


def _pairs(root: Path) -> Store | None:
    """``*_features/<i>.npy`` beside ``*_labels/<i>.npy``: scaled samples (fast-DiT, DiMSUM)."""
    folders = sorted(root.glob("*_features")) if root.is_dir() else []
    if not folders:
        return None
    files = sorted(folders[0].glob("*.npy"), key=_numeric)
    beside = root / folders[0].name.replace("_features", "_labels")
    labels = (
        np.asarray([int(np.load(beside / f.name).reshape(())) for f in files], np.int64) if beside.is_dir() else None
    )

    def read(row: int) -> np.ndarray:
        array = np.load(files[row])
        return array[0] if array.ndim == 4 and len(array) == 1 else array

    return Store(read, len(files), labels, (), {"form": "sample", "scaled": True, "scale": SD_SCALE})


def _memmap(root: Path) -> Store | None:
    """``*_feature*.dat`` (float32, no header) and ``*_label*.dat`` (int64): scaled samples, mirrored copies last."""
    files = sorted(root.glob("*_feature*.dat")) if root.is_dir() else []
    if not files:
        return None
    labels = np.fromfile(files[0].with_name(files[0].name.replace("_feature", "_label")), np.int64)
    values = np.memmap(files[0], np.float32, mode="r")
    side = round((values.size / len(labels) / 4) ** 0.5)
    if side * side * 4 * len(labels) != values.size:
        raise ValueError(f"{files[0]} holds {values.size} numbers, not 4-channel squares for {len(labels)} labels")
    latents = values.reshape(len(labels), 4, side, side)
    flipped = "flip" in files[0].name
    declared = {"form": "sample", "scaled": True, "scale": SD_SCALE, "flip_rows": flipped}
    return Store(lambda i: latents[i], len(latents), labels[: len(labels) // 2] if flipped else labels, (), declared)


def _shards(root: Path) -> Store | None:
    """WebDataset tars with a latent per sample (``*.npy``) and, if any, its class (``*.cls``): the shards of ZigMa."""
    tars = [root] if root.suffix == ".tar" else sorted(root.glob("*.tar")) if root.is_dir() else []
    if not tars:
        return None
    rows, classes = [], []
    for tar in tars:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        with tarfile.open(tar) as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                name, _, extension = base.partition(".")
                samples.setdefault(f"{folder}/{name}", {})[extension] = member
            for fields in samples.values():
                array = next(
                    (m for e, m in fields.items() if re.search(r"(latent|img_feature|frame_feature)", e)), None
                )
                if array is None:
                    continue
                rows.append((tar, array.offset_data, array.size))
                label = next((m for e, m in fields.items() if e.endswith("cls")), None)
                classes.append(None if label is None else int(archive.extractfile(label).read()))
    labels = None if not classes or None in classes else np.asarray(classes, np.int64)

    def read(row: int) -> np.ndarray:
        file, offset, size = rows[row]
        with open(file, "rb") as stream:
            stream.seek(offset)
            return np.load(io.BytesIO(stream.read(size)))

    return Store(read, len(rows), labels, (), {"form": "sample", "scaled": False, "scale": SD_SCALE})


def _edm_zip(root: Path) -> Store | None:
    """A zip of ``img-mean-std-*.npy`` with ``dataset.json``: the latents of EDM2, brought to its deviation of 0.5."""
    if root.suffix != ".zip" or not root.is_file():
        return None
    with zipfile.ZipFile(root) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".npy"))
        table = json.loads(archive.read("dataset.json")).get("labels") if "dataset.json" in archive.namelist() else None
    labels = None if table is None else np.asarray([dict(table)[n] for n in names], np.int64)

    def read(row: int) -> np.ndarray:
        with zipfile.ZipFile(root) as archive:  # opened anew: a handle must not be shared by loader processes
            return np.load(io.BytesIO(archive.read(names[row])))

    deviations = (4.17, 4.62, 3.71, 3.28)
    declared = {"form": "mean_std", "scaled": False, "shift": [5.81, 3.25, 0.12, -2.15]}
    return Store(read, len(names), labels, (), declared | {"scale": [0.5 / d for d in deviations]})


def _archive(root: Path) -> Store | None:
    """One ``.npz`` or ``.safetensors``: ``latents`` (``z``, ``arr_0``) and, if any, ``labels`` (``label``, ``y``)."""
    if root.suffix == ".npz":
        with np.load(root) as archive:
            arrays = dict(archive)
    elif root.suffix == ".safetensors":
        from safetensors.numpy import load_file

        arrays = load_file(root)
    else:
        return None
    latents = next((arrays[k] for k in ("latents", "z", "arr_0") if k in arrays), None)
    if latents is None:
        raise ValueError(f"{root} holds {', '.join(arrays)}; latents are expected under latents, z or arr_0")
    labels = next((arrays[k].astype(np.int64) for k in ("labels", "label", "y", "arr_1") if k in arrays), None)
    return Store(lambda i: latents[i], len(latents), labels)


def _nested(root: Path) -> Store | None:
    """``**/*.npy``, one latent each; the class is the file name before its first ``_``."""
    files = sorted(root.rglob("*.npy"), key=lambda f: f.relative_to(root).as_posix()) if root.is_dir() else []
    if not files:
        return None
    labels, names = rank_classes([f.stem.partition("_")[0] for f in files]) if "_" in files[0].stem else (None, ())
    return Store(lambda i: np.load(files[i]), len(files), labels, names)


def _numeric(file: Path) -> tuple[int, str]:
    digits = re.match(r"\d+", file.name)
    return (int(digits[0]) if digits else -1, file.name)


LAYOUTS: dict[str, Callable[[Path], Store | None]] = {
    "own": _own,
    "moments": _moments,
    "pairs": _pairs,
    "memmap": _memmap,
    "shards": _shards,
    "edm_zip": _edm_zip,
    "archive": _archive,
    "nested": _nested,
}
