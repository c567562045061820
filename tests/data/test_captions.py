"""Captions: every container gives the same ones, an access draws one, the mirror respects the words."""

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.data import CachedImages, ImageDataset, build_dataset
from genssm.data.captions import draw_caption, mirrors
from genssm.data.loading import Shares, Stream, training_batches
from genssm.data.sources import from_arrays
from genssm.data.transforms import ImageTransform

TEXTS = [("a red ant", "an ant"), ("the bee",), ("ein Käfer — groß",), ("cat, facing left", "a cat")]
needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="package datasets is absent")


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def files(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(pictures()):
        (root / f"{i}.png").write_bytes(png(array))


def metadata(root: Path) -> dict:
    files(root)
    rows = [{"file_name": f"{i}.png", "text": list(texts)} for i, texts in enumerate(TEXTS)]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return {"name": "image_folder", "path": str(root), "caption": "text"}


def metadata_split(root: Path) -> dict:
    """Rows of one split of a table, as in the emoji."""
    metadata(root)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text("utf-8").splitlines()]
    rows = [{**row, "split": "val"} for row in rows] + [{"file_name": "gone.png", "text": "", "split": "train"}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"name": "image_folder", "path": str(root), "caption": "text", "split": "val"}


def sidecars(root: Path) -> dict:
    files(root)
    for i, texts in enumerate(TEXTS):
        (root / f"{i}.txt").write_text("\n".join(texts) + "\n", "utf-8")
    return {"name": "image_folder", "path": str(root), "caption": "sidecar"}


def shard(path: Path, numbers: range, fields: Callable[[int], dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for i in numbers:
            for field, data in fields(i).items():
                member = tarfile.TarInfo(f"part/{i:04d}.{field}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def shards_text(root: Path) -> dict:
    def fields(i: int) -> dict[str, bytes]:
        return {"png": png(pictures()[i]), "txt": "\n".join(TEXTS[i]).encode(), "cls": b"1"}

    for part in (0, 1):
        shard(root / f"train-{part:03d}.tar", range(2 * part, 2 * part + 2), fields)
    return {"name": "webdataset", "path": str(root / "train-{000..001}.tar"), "caption": "txt"}


def shards_json(root: Path) -> dict:
    def fields(i: int) -> dict[str, bytes]:
        return {"image.png": png(pictures()[i]), "caption.json": json.dumps(list(TEXTS[i])).encode()}

    shard(root / "a.tar", range(4), fields)
    return {"name": "webdataset", "path": str(root), "caption": "caption.json"}


def shards_json_key(root: Path) -> dict:
    def fields(i: int) -> dict[str, bytes]:
        return {"PNG": png(pictures()[i]), "json": json.dumps({"prompt": list(TEXTS[i]), "n": 1}).encode()}

    shard(root / "a.tar", range(4), fields)
    return {"name": "webdataset", "path": str(root / "a.tar"), "caption": "json:prompt"}


def coco(root: Path) -> dict:
    files(root / "train2014")
    images = [{"id": 10 - i, "file_name": f"{i}.png"} for i in range(4)] + [{"id": 99, "file_name": "none.png"}]
    captions = [{"image_id": 10 - i, "caption": f" {text}\n"} for i, texts in enumerate(TEXTS) for text in texts]
    (root / "annotations").mkdir()
    table = {"images": images, "annotations": captions}
    (root / "annotations" / "captions_train2014.json").write_text(json.dumps(table))
    return {"name": "coco", "path": str(root)}


def parquet(root: Path) -> dict:
    import pyarrow
    from datasets import Features, Image, List, Value
    from pyarrow import parquet

    features = Features({"image": Image(), "text": List(Value("string"))})
    images = [{"bytes": png(array), "path": None} for array in pictures()]
    table = pyarrow.table({"image": images, "text": [list(t) for t in TEXTS]}, schema=features.arrow_schema)
    parquet.write_table(table, root / "train.parquet")
    return {"name": "huggingface", "path": str(root), "caption": "text"}


CONTAINERS = [metadata, metadata_split, sidecars, shards_text, shards_json, shards_json_key, coco,
              pytest.param(parquet, marks=needs_datasets)]  # fmt: skip


@pytest.mark.parametrize("make", CONTAINERS)
def test_containers_agree(make: Callable[[Path], dict], tmp_path: Path) -> None:
    dataset = build_dataset(**make(tmp_path))
    assert len(dataset) == 4 and dataset.captions == tuple(TEXTS)
    for i in range(4):
        assert np.array_equal(dataset.pixels(i), pictures()[i].transpose(2, 0, 1))
        assert dataset[i]["text"] == TEXTS[i][0]
    assert dataset.num_classes == (2 if make is shards_text else 0)


@needs_datasets
def test_the_package_datasets_reads_the_same_folder(tmp_path: Path) -> None:
    metadata(tmp_path)
    import datasets

    table = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "c"))
    assert [tuple(text) for text in table["text"][:]] == list(TEXTS)


def test_an_access_draws_one_caption_by_its_key(tmp_path: Path) -> None:
    dataset = build_dataset(**metadata(tmp_path))
    drawn = [dataset.item(0, key)["text"] for key in range(200)]
    assert drawn == [dataset.item(0, key)["text"] for key in range(200)]
    assert 70 < drawn.count(TEXTS[0][0]) < 130 and set(drawn) == set(TEXTS[0])
    halves = [drawn[key] for key in range(200) if key & 1]  # not the bit of the mirror
    assert 30 < halves.count(TEXTS[0][0]) < 70
    assert draw_caption(TEXTS[0], None) == TEXTS[0][0] and draw_caption(TEXTS[1], 7) == TEXTS[1][0]


def test_batches_are_those_of_the_cache_and_of_several_processes(tmp_path: Path) -> None:
    dataset = build_dataset(**metadata(tmp_path), flip=True)

    def read(feed: object, shares: Shares, **options: int) -> list[dict]:
        return list(training_batches(feed, Stream(4, seed=3), shares, first=0, last=6, **options))

    whole = read(dataset, Shares(4))
    for feed, options in ((CachedImages(dataset), {}), (dataset, {"num_workers": 2})):
        for a, b in zip(whole, read(feed, Shares(4), **options), strict=True):
            assert a["text"] == b["text"] and torch.equal(a["pixel_values"], b["pixel_values"])
    halves = [read(dataset, Shares(4, 1, 2, rank)) for rank in (0, 1)]
    assert [a["text"] + b["text"] for a, b in zip(*halves)] == [batch["text"] for batch in whole]
    assert len({text for batch in whole for text in batch["text"]}) == 6  # in six epochs every caption came up


@pytest.mark.parametrize(
    ("caption", "free"),
    [("a cat", True), ("facing LEFT", False), ("left-handed", False), ("leftover soup, bright light", True),
     ("arrow to the right", False), ("leftwards", False), ("upright", True), ("clockwise vertical arrows", False),
     ("twelve o'clock", True)],
)  # fmt: skip
def test_words_that_forbid_the_mirror(caption: str, free: bool) -> None:
    assert mirrors(caption) is free


def test_mirror_depends_on_the_caption_drawn() -> None:
    source = from_arrays(pictures(), None)
    dataset = ImageDataset(type(source)(source.read, 4, captions=tuple(TEXTS)), ImageTransform(flip=True))
    plain = dataset[3]["pixel_values"]
    seen = set()
    for key in range(64):
        item = dataset.item(3, key)
        mirrored = key % 2 == 1 and item["text"] == "a cat"
        assert torch.equal(item["pixel_values"], plain.flip(-1) if mirrored else plain)
        seen.add((mirrored, item["text"]))
    assert len(seen) == 3


def test_emoji(data_dir: Path, tmp_path: Path) -> None:
    with tarfile.open(data_dir / "emoji" / "emoji-64.tar.xz", "r:xz") as archive:
        archive.extractall(tmp_path, filter="data")
    sizes = {split: build_dataset(name="image_folder", path=str(tmp_path), split=split, caption="text")
             for split in ("train", "test_tone", "test_gender")}  # fmt: skip
    assert [len(d) for d in sizes.values()] == [3350, 152, 72]
    assert sizes["test_tone"].item_shape == (3, 64, 64)
    words = {word for texts in sizes["train"].captions for word in texts[0].split()}
    assert all(set(texts[0].split()) <= words for texts in sizes["test_gender"].captions)


BROKEN = {
    "no column": (lambda r: metadata(r) | {"caption": "txet"}, ValueError, "has no column 'txet' for data.caption"),
    "no table": (lambda r: files(r) or {"name": "image_folder", "path": str(r), "caption": "text"}, ValueError,
                 "needs a metadata.jsonl or metadata.csv"),
    "no sidecar": (lambda r: files(r) or {"name": "image_folder", "path": str(r), "caption": "sidecar"},
                   FileNotFoundError, "4 of 4 images have no caption file"),
    "wrong split": (lambda r: metadata_split(r) | {"split": "test"}, ValueError, "has train, val"),
    "idle option": (lambda r: coco(r) | {"caption": "text"}, ValueError, "data.caption means nothing to"),
    "no class": (lambda r: _half_labelled(r), ValueError, "1 of 2 rows of the metadata have no 'label', first 1.png"),
    "no UTF-8": (lambda r: metadata(r) | {"path": str(_write(r / "metadata.jsonl", b"\xff\xfe").parent)}, ValueError,
                 "metadata.jsonl is no UTF-8 text"),
    "other shards": (lambda r: shards_text(r) | {"path": str(r), "split": "test"}, FileNotFoundError,
                     "neither a folder 'test' nor shards whose names begin with it"),
    "packed shards": (lambda r: {"name": "webdataset", "path": str(_write(r / "a.tar.gz", b"x"))}, ValueError,
                      "a.tar.gz is compressed; items of shards are read by their position"),
    "no shards": (lambda r: {"name": "webdataset", "path": str(r)}, FileNotFoundError, "no tar file"),
    "no field": (lambda r: shards_text(r) | {"caption": "json"}, ValueError, "'json' for data.caption; it has png"),
    "no key": (lambda r: shards_json_key(r) | {"caption": "json:text"}, ValueError, "has no key 'text'"),
    "no json": (lambda r: coco(r / "x") | {"path": str(_write(r / "captions_train.json", b"{"))}, ValueError,
                "is no JSON"),
    "no lists": (lambda r: {"name": "coco", "path": str(_write(r / "captions_train.json", b"[]"))}, ValueError,
                 "must hold the lists images and annotations"),
    "no annotation file": (lambda r: {"name": "coco", "path": str(r)}, FileNotFoundError, "captions_train"),
}  # fmt: skip


def _half_labelled(root: Path) -> dict:
    files(root)
    rows = '{"file_name": "0.png", "text": "a", "label": 1}\n{"file_name": "1.png", "text": "b"}\n'
    _write(root / "metadata.jsonl", rows.encode())
    return {"name": "image_folder", "path": str(root), "caption": "text"}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said(case: str, tmp_path: Path) -> None:
    make, error, message = BROKEN[case]
    (tmp_path / "x").mkdir()
    with pytest.raises(error, match=message.replace("(", r"\(")):
        build_dataset(**make(tmp_path))


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    arguments = metadata(tmp_path)
    file = tmp_path / "metadata.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert build_dataset(**arguments)[0]["text"] == TEXTS[0][0]


@needs_datasets
def test_one_parquet_file(tmp_path: Path) -> None:
    arguments = parquet(tmp_path)
    for split in ("train", "test"):  # the file is what was asked for
        one = build_dataset(**arguments | {"path": str(tmp_path / "train.parquet")}, split=split)
        assert one.captions == build_dataset(**arguments).captions
        assert np.array_equal(one.pixels(1), build_dataset(**arguments).pixels(1))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    arguments = shards_json(tmp_path)
    tar = tmp_path / "a.tar"
    whole = tar.read_bytes()
    for size in (900, 3000):
        tar.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cannot read shard .*a\.tar"):
            build_dataset(**arguments)
    tar.write_bytes(b"no tar file at all" * 100)
    with pytest.raises(ValueError, match=r"cannot read shard .*a\.tar"):
        build_dataset(**arguments)
    third = png(pictures()[2])
    tar.write_bytes(whole.replace(third, b"x" * len(third)))
    dataset = build_dataset(**arguments)
    with pytest.raises(ValueError, match=r"cannot read image .*a\.tar: part/0002"):
        dataset[2]
    table = metadata(tmp_path / "m")
    (tmp_path / "m" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": \n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2 is no JSON"):
        build_dataset(**table)
    (tmp_path / "m" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": 3}\n')
    with pytest.raises(ValueError, match="row 1, text: expected a caption or a list of captions, got 3"):
        build_dataset(**table)
    beside = sidecars(tmp_path / "s")
    (tmp_path / "s" / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"1\.txt is no UTF-8 text"):
        build_dataset(**beside)
