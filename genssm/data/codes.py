"""Data sets of codes of a VQ tokenizer, and the tokenizer.

An item is ``{"codes": int64 (T,), "class_labels": int, "text": str}``, labels and text where there are some.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genssm.data.blocks import open_folder
from genssm.data.captions import Captions, draw_caption, from_folder, mirrors
from genssm.devices import send
from genssm.models import VQTokenizer
from genssm.training.checkpoint import latest_checkpoint


@dataclass(frozen=True)
class CodeStore:
    """Stored codes.

    Attributes:
        read: row -> the views of an item, (A, T), integers; the second half of several views is mirrored.
        rows: number of items.
        labels: class of each item, int64, or None.
        class_names: names of the classes.
        grid: rows and columns of codes.
        num_codes: size of the vocabulary, None where nothing says it.
        captions: texts of each item, or None.
    """

    read: Callable[[int], np.ndarray]
    rows: int
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    grid: tuple[int, int]
    num_codes: int | None
    captions: Captions | None = None


def open_codes(path: str | None, split: str, *, flip: bool = False) -> "CodeDataset":
    """The codes at ``path``; a sub-folder with the name of the split is used when there is one.

    Raises:
        FileNotFoundError: nothing there, or no codes in it.
        ValueError: mirrored views are asked for and there are none.
    """
    if path is None or not Path(path).exists():
        raise FileNotFoundError(f"data.path={path}: no codes there; python -m genssm.data.encode_codes makes them")
    root = Path(path) / split if (Path(path) / split).is_dir() else Path(path)
    for layout in (_own, _pairs):
        store = layout(root)
        if store is not None:
            return CodeDataset(store, flip=flip)
    raise FileNotFoundError(f"{root} holds no codes: neither codes.npy with meta.json nor *_codes/<i>.npy")


def _own(root: Path) -> CodeStore | None:
    """``codes.npy`` (N, A, T), ``meta.json``, perhaps ``labels.npy``, ``captions.json``, of ``data.encode_codes``."""
    if not (root / "meta.json").is_file() or not (root / "codes.npy").is_file():
        return None
    meta, codes = open_folder(root, "codes.npy", ("class_names", "grid", "num_codes"))
    labels = np.load(root / "labels.npy") if (root / "labels.npy").is_file() else None
    names, grid, captions = tuple(meta["class_names"]), tuple(meta["grid"]), from_folder(root)
    return CodeStore(lambda i: codes[i], len(codes), labels, names, grid, meta["num_codes"], captions)


def _pairs(root: Path) -> CodeStore | None:
    """``*_codes/<i>.npy`` (1, A, T) beside ``*_labels/<i>.npy``, square grids (LlamaGen)."""
    folder = next((f for f in sorted(root.glob("*_codes")) if f.is_dir()), None) if root.is_dir() else None
    if folder is None:
        return None
    files = sorted(folder.glob("*.npy"), key=lambda f: (int((re.match(r"\d+", f.name) or ["-1"])[0]), f.name))
    if not files:
        return None
    beside = root / folder.name.replace("_codes", "_labels")
    labels = None
    if beside.is_dir():
        labels = np.asarray([int(np.load(beside / f.name).reshape(())) for f in files], np.int64)

    def read(row: int) -> np.ndarray:
        return np.load(files[row]).reshape(-1, tokens)

    tokens = np.load(files[0]).shape[-1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{files[0]} holds {tokens} codes, which make no square grid")
    return CodeStore(read, len(files), labels, (), (side, side), None)


class CodeDataset(torch.utils.data.Dataset):
    """Stored codes.

    ``dataset[i]`` is the first view; ``dataset.item(i, key)`` draws a view (a crop, a mirrored copy) by the key. Under
    a caption that names left or right the view is not mirrored.

    Args:
        store: the arrays.
        flip: draw from the mirrored views, too.

    Attributes:
        num_classes, class_names, labels, captions, item_shape: as :class:`genssm.data.images.ImageDataset`.
        grid: rows and columns of codes.
        num_codes: size of the vocabulary, or None.
    """

    tensor_name = "codes"

    def __init__(self, store: CodeStore, *, flip: bool = False) -> None:
        views = len(store.read(0))
        if flip and views < 2:
            raise ValueError("data.flip=true needs mirrored views among the codes; encode with --flip")
        self.store, self.flip = store, flip
        self.views = views if flip else max(views // 2, 1)
        self.labels, self.grid, self.num_codes = store.labels, store.grid, store.num_codes
        if self.labels is not None and len(self.labels) != store.rows:
            raise ValueError(f"{store.rows} rows of codes but {len(self.labels)} labels")
        self.captions = store.captions
        if self.captions is not None and len(self.captions) != store.rows:
            raise ValueError(f"{store.rows} rows of codes but captions of {len(self.captions)}; encode them again")
        count = 0 if self.labels is None else int(self.labels.max()) + 1
        self.class_names = store.class_names or tuple(str(i) for i in range(count))
        self.num_classes = len(self.class_names)
        self.item_shape = (math.prod(self.grid),)

    def __len__(self) -> int:
        return self.store.rows

    def item(self, index: int, key: int | None) -> dict[str, Any]:
        """One training item; ``key`` decides which view, None takes the first."""
        text = None if self.captions is None else draw_caption(self.captions[index], key)
        view = 0 if key is None else int(key) % self.views
        if self.flip and text is not None and not mirrors(text):
            view %= self.views // 2
        item: dict[str, Any] = {"codes": torch.from_numpy(self.store.read(index)[view].astype(np.int64))}
        if text is not None:
            item["text"] = text
        if self.labels is not None:
            item["class_labels"] = int(self.labels[index])
        return item

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(int(index), None)


class CachedCodes:
    """All codes of a data set read once, on the CPU or the accelerator; batches are made there.

    Args:
        dataset: what to read.
        device: where to keep the codes.
    """

    def __init__(self, dataset: CodeDataset, device: torch.device | str = "cpu") -> None:
        self.views, self.flip, self.captions = dataset.views, dataset.flip, dataset.captions
        arrays = np.stack([dataset.store.read(row)[: self.views] for row in range(len(dataset))])
        self.codes = torch.from_numpy(arrays.astype(np.int32)).to(device)  # (N, A, T)
        self.labels = None if dataset.labels is None else torch.from_numpy(dataset.labels).to(device)

    def batch(self, indices: np.ndarray, keys: np.ndarray) -> Mapping[str, torch.Tensor | list[str]]:
        """The items ``indices`` with their keys (uint64), equal to those of the data set, stacked."""
        rows = send(torch.from_numpy(indices), self.codes.device)
        views, texts = (keys % np.uint64(self.views)).astype(np.int64), None
        if self.captions is not None:
            texts = [draw_caption(self.captions[i], int(key)) for i, key in zip(indices, keys)]
            if self.flip:
                views = np.where([mirrors(text) for text in texts], views, views % (self.views // 2))
        views = send(torch.from_numpy(views), self.codes.device)
        batch: dict[str, torch.Tensor | list[str]] = {"codes": self.codes[rows, views].long()}
        if texts is not None:
            batch["text"] = texts
        if self.labels is not None:
            batch["class_labels"] = self.labels[rows]
        return batch


def load_tokenizer(path: str | Path) -> VQTokenizer:
    """The tokenizer in a folder, frozen; of a pipeline or a run that holds one, its ``vqvae``.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: the folder holds another kind of model.
    """
    folder = next((f for f in _places(Path(path)) if (f / "config.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no tokenizer in {path}: the folder of a VQTokenizer, of a pipeline with one (vqvae/) or of a run that "
            "trained one is expected"
        )
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("_class_name") != "VQTokenizer":
        raise ValueError(f"{folder} holds a {config.get('_class_name')}; expected a VQTokenizer")
    return VQTokenizer.from_pretrained(folder).requires_grad_(False).eval()


def _places(path: Path) -> list[Path]:
    newest = latest_checkpoint(path)
    runs = [] if newest is None else [newest / "pipeline" / "vqvae"]
    return [path, path / "vqvae", path / "pipeline" / "vqvae", *runs]
