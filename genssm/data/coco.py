"""Captioned images in the layout of MS COCO: one JSON file that lists images and captions."""

from pathlib import Path

from genssm.data.captions import read_json, read_text
from genssm.data.sources import Source, from_files


def coco(path: str | None, split: str, label: str | None, download: bool) -> Source:
    """Images with their captions (about five each); images without a caption are left out.

    Args:
        path: the JSON file, or a folder with ``annotations/captions_<split>*.json``. It holds ``images`` (``id``,
            ``file_name``) and ``annotations`` (``image_id``, ``caption``). The images lie beside it, or in a folder
            that is called as the JSON file is after its ``captions_``, or ``images``, there or one level up.
        split: beginning of what stands after ``captions_``.
        label: only ``none``.

    Raises:
        FileNotFoundError: no such file, or images that are not there.
        ValueError: the file is no JSON, or lacks a list.
    """
    if label not in (None, "none"):
        raise ValueError(f"data.label={label!r}: caption files have no classes")
    if path is None:
        raise ValueError("the data set kind coco needs data.path: the JSON file of captions, or the folder above")
    file = _find(Path(path), split)
    table = read_json(read_text(file), file)
    if not isinstance(table, dict) or not all(isinstance(table.get(k), list) for k in ("images", "annotations")):
        raise ValueError(f"{file} must hold the lists images and annotations")
    captions: dict[object, list[str]] = {}
    names: dict[object, str] = {}
    try:
        for entry in table["annotations"]:
            captions.setdefault(entry["image_id"], []).append(entry["caption"].strip())
        for entry in table["images"]:
            names[entry["id"]] = entry["file_name"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: an entry lacks id, file_name, image_id or caption ({error})") from None
    order = sorted((number for number in names if number in captions), key=lambda number: names[number])
    if not order:
        raise ValueError(f"{file} holds no image with a caption")
    root = _images(file, names[order[0]])
    files = [root / names[number] for number in order]
    missing = [str(f) for f in files if not f.is_file()]
    if missing:
        raise FileNotFoundError(f"{file} lists {len(missing)} images that are not there, first {missing[0]}")
    return from_files(files, root, "none", captions=tuple(tuple(captions[number]) for number in order))


def _find(path: Path, split: str) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob(f"annotations/captions_{split}*.json")) or sorted(path.glob(f"captions_{split}*.json"))
    if not found:
        raise FileNotFoundError(f"no annotations/captions_{split}*.json in {path}, and it is no JSON file itself")
    return found[0]


def _images(file: Path, first: str) -> Path:
    """The folder of the images: the first place where ``first`` is."""
    own = file.stem.removeprefix("captions_")
    places = [base / name for base in (file.parent, file.parent.parent) for name in (own, "images", ".")]
    found = next((place for place in places if (place / first).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{first}, which {file} lists, is in none of {', '.join(map(str, places))}")
    return found
