"""Images in WebDataset shards: tar files in which ``name.jpg``, ``name.txt``, ``name.cls`` are one item.

The shards are indexed once and then read by position, so that their items have numbers and an order like any other
data set's: the order of training depends on the seed and the step, not on which process reads which shard.
"""

import io
import re
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from genssm.data.captions import checked, read_json
from genssm.data.sources import EXTENSIONS, Source

Member = tuple[Path, int, int]  # shard, offset, size
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def webdataset(path: str | None, split: str, label: str | None, download: bool, caption: str | None = None) -> Source:
    """Images in the tar files of a folder, in one tar file, or in a series ``name-{000..012}.tar``.

    Args:
        path: where they are; a sub-folder with the name of the split is used when there is one.
        split: name of that sub-folder, or the beginning of the shards' names; ``train`` also takes a folder of shards
            of any names.
        label: None takes the ``cls`` files where every item has one; ``none`` takes none.
        caption: field with the captions, such as ``txt`` (a caption per line) or ``caption.json`` (a text, a list of
            texts, or with ``json:key`` the value of that key); None reads none.

    Raises:
        FileNotFoundError: no shards.
        ValueError: a shard is cut off, or items lack a field.
    """
    if label not in (None, "none"):
        raise ValueError(f"data.label={label!r}: the items of shards have their cls files, or none")
    items = [item for tar in find_shards(path, split) for item in index_shard(tar)]
    images = [(name, next((f for f in fields if _is_image(f)), None)) for name, fields in items]
    empty = [name for name, field in images if field is None]
    if empty or not items:
        raise ValueError(f"{path}: {len(empty)} of {len(items)} items have no image, first {(empty or ['none'])[0]}")
    places = [fields[field] for (_, fields), (_, field) in zip(items, images)]
    labels, names = (None, ()) if label == "none" else _labels(items)
    captions = None if caption is None else tuple(_captions(name, fields, caption) for name, fields in items)

    def read(index: int) -> Image.Image:
        image = Image.open(io.BytesIO(read_member(places[index])))
        image.load()
        return image

    return Source(read, len(items), labels, names, names=lambda i: f"{places[i][0]}: {items[i][0]}", captions=captions)


def find_shards(path: str | None, split: str) -> list[Path]:
    """The tar files that ``path`` means, sorted."""
    if path is None:
        raise ValueError(
            "the data set kind webdataset needs data.path: a folder of tar files, one, or name-{00..12}.tar"
        )
    series = _RANGE.search(path)
    if series:
        first, last = series.groups()
        numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        tars = [Path(path[: series.start()] + number + path[series.end() :]) for number in numbers]
    else:
        root = Path(path) / split if (Path(path) / split).is_dir() else Path(path)
        tars = sorted(root.glob("*.tar")) if root.is_dir() else [root]
        if root.is_dir():
            own = [tar for tar in tars if tar.name.startswith(split)]
            if tars and not own and root == Path(path) and split != "train":
                raise FileNotFoundError(
                    f"data.path={path}: neither a folder {split!r} nor shards whose names begin with it, for "
                    f"data.split={split}"
                )
            tars = own or tars
    packed = [tar for tar in tars if tar.suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst")]
    if packed:
        raise ValueError(f"{packed[0]} is compressed; items of shards are read by their position, unpack it to .tar")
    missing = [str(tar) for tar in tars if not tar.is_file()]
    if missing or not tars:
        raise FileNotFoundError(f"data.path={path}: no tar file {missing[0] if missing else 'in this folder'}")
    return tars


def index_shard(tar: Path) -> list[tuple[str, dict[str, Member]]]:
    """Name and fields of the items of a shard: the base name up to its first dot, and what follows it.

    Raises:
        ValueError: the file is no tar file or is cut off.
    """
    items: dict[str, dict[str, Member]] = {}
    size = tar.stat().st_size
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("the last file is cut off")
                folder, _, base = member.name.rpartition("/")
                name, _, field = base.partition(".")
                fields = items.setdefault(f"{folder}/{name}" if folder else name, {})
                fields[field.lower()] = (tar, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"cannot read shard {tar}: {error}; copy it again") from None
    return list(items.items())


def read_member(member: Member) -> bytes:
    """The bytes of a file in a shard."""
    tar, offset, size = member
    with tar.open("rb") as stream:  # opened anew: a handle must not be shared by loader processes
        stream.seek(offset)
        return stream.read(size)


def _is_image(field: str) -> bool:
    return f".{field.rpartition('.')[2]}" in EXTENSIONS


def _labels(items: list[tuple[str, dict[str, Member]]]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels from the ``cls`` files, if every item has one."""
    places = [next((m for f, m in fields.items() if f.rpartition(".")[2] == "cls"), None) for _, fields in items]
    if None in places:
        return None, ()
    texts = [read_member(place).decode("ascii", "replace").strip() for place in places]
    wrong = [f"{name}: {text!r}" for (name, _), text in zip(items, texts) if not text.isdecimal()]
    if wrong:
        raise ValueError(f"a cls file holds the number of a class; {wrong[0]} is none")
    labels = np.asarray([int(text) for text in texts], np.int64)
    return labels, tuple(str(i) for i in range(int(labels.max()) + 1))


def _captions(name: str, fields: dict[str, Member], caption: str) -> tuple[str, ...]:
    """The captions of an item."""
    field, _, key = caption.lower().partition(":")
    if field not in fields:
        raise ValueError(f"item {name} has no field {field!r} for data.caption; it has {', '.join(fields)}")
    where, data = f"item {name}, {field}", read_member(fields[field])
    if field.rpartition(".")[2] != "json":
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is no UTF-8 text: {error}") from None
        return checked([line.strip() for line in text.splitlines() if line.strip()], where)
    value = read_json(data, where)
    if key:
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{where} has no key {key!r}")
        value = value[key]
    return checked(value, where)
