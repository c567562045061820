"""Captions of images and clips: where they are read from, which one an access draws, which ones forbid a mirror."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genssm.training.seeding import derive, hash_integers

Captions = tuple[tuple[str, ...], ...]  # of each item, at least one
SIDECAR, CLASS = "sidecar", "class"  # values of data.caption that are no column or field
_SIDES = re.compile(r"\b(left|right|clockwise|counterclockwise|anticlockwise)(ward|wards)?\b", re.IGNORECASE)
_DRAW = derive(0, "caption")


def mirrors(caption: str) -> bool:
    """Whether the caption of an image also fits its mirror image: it names no left, right or sense of rotation."""
    return _SIDES.search(caption) is None


def draw_caption(captions: Sequence[str], key: int | None) -> str:
    """One of an item's captions: by the key of its place in the training stream, the first without a key."""
    if key is None or len(captions) == 1:
        return captions[0]
    return captions[int(hash_integers(np.asarray([key], np.uint64), _DRAW)[0] % np.uint64(len(captions)))]


def checked(values: Any, where: str) -> tuple[str, ...]:
    """One or several captions as a table or a file gives them.

    Raises:
        ValueError: neither a text nor a list of texts, or none at all.
    """
    texts = [values] if isinstance(values, str) else values
    if not isinstance(texts, (list, tuple, np.ndarray)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: expected a caption or a list of captions, got {values!r}")
    if not len(texts):
        raise ValueError(f"{where}: no caption; give the empty text for an image without one")
    return tuple(str(text) for text in texts)


def from_rows(rows: Sequence[Mapping[str, Any]], column: str, where: Path | str) -> Captions:
    """The captions in a column of a table.

    Raises:
        ValueError: no such column, or a row without a caption.
    """
    if column not in rows[0]:
        raise ValueError(f"{where} has no column {column!r} for data.caption; it has {', '.join(rows[0])}")
    return tuple(checked(row.get(column), f"{where}, row {i + 1}, {column}") for i, row in enumerate(rows))


def from_sidecars(files: Sequence[Path]) -> Captions:
    """The lines of the text file beside each image: ``a.png`` has its captions in ``a.txt``.

    Raises:
        FileNotFoundError: an image without such a file.
        ValueError: a file without a line.
    """
    beside = [file.with_suffix(".txt") for file in files]
    missing = [str(text) for text in beside if not text.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(files)} images have no caption file, first {missing[0]}")
    captions = []
    for text in beside:
        lines = [line.strip() for line in read_text(text).splitlines() if line.strip()]
        captions.append(checked(lines, str(text)))
    return tuple(captions)


def from_folder(folder: Path) -> Captions | None:
    """The captions in the folder of an encoded data set, ``captions.json``; None where there are none."""
    file = folder / "captions.json"
    if not file.is_file():
        return None
    table = read_json(read_text(file), file)
    if not isinstance(table, list):
        raise ValueError(f"{file}: expected the captions of each item in a list, got a {type(table).__name__}")
    return tuple(checked(texts, f"{file}, item {i}") for i, texts in enumerate(table))


def read_text(file: Path) -> str:
    """A UTF-8 text file.

    Raises:
        ValueError: it is no text; the message names the file.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from None


def read_json(text: str | bytes, where: Path | str) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is none; the message says where it stands.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
