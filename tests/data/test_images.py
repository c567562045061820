"""Every container holds the same eight images; every reader must return the same pixels and labels."""

import csv
import gzip
import importlib.util
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.data import DATASETS, CachedImages, ImageDataset, build_dataset
from genssm.data.sources import from_arrays, read_idx
from genssm.data.transforms import CROPS, ImageTransform, to_colours, to_model_range
from genssm.training.seeding import hash_integers

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1])
CLASSES = ("ant", "bee", "cat")


def pictures(channels: int = 3, size: int = 12) -> np.ndarray:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (8, size, size, channels), np.uint8)
    return images[..., 0] if channels == 1 else images


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def class_folders(root: Path, below: str = "deeper") -> dict:
    for i, (image, label) in enumerate(zip(pictures(), LABELS)):
        save(image, root / CLASSES[label] / below / f"{i}.{'PNG' if i % 2 else 'png'}")
    return {"name": "image_folder", "path": str(root)}


def split_folders(root: Path) -> dict:
    class_folders(root / "train")
    return {"name": "image_folder", "path": str(root)}


def flat_folder(root: Path) -> dict:
    for i, image in enumerate(pictures()):
        save(image, root / f"{i}.png")
    return {"name": "image_folder", "path": str(root)}


def prefixes(root: Path) -> dict:
    for i, (image, label) in enumerate(zip(pictures(), LABELS)):
        save(image, root / f"{CLASSES[label]}_{i}.png")
    return {"name": "image_folder", "path": str(root), "label": "prefix"}


def metadata_jsonl(root: Path) -> dict:
    flat_folder(root)
    rows = [{"file_name": f"{i}.png", "animal": CLASSES[label]} for i, label in enumerate(LABELS)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"name": "image_folder", "path": str(root), "label": "animal"}


def metadata_csv(root: Path) -> dict:
    flat_folder(root)
    with (root / "metadata.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file_name", "label"])
        table.writerows([f"{i}.png", label] for i, label in enumerate(LABELS))
    return {"name": "image_folder", "path": str(root)}


def file_list(root: Path) -> dict:
    flat_folder(root)
    lines = [f"{i}.png {CLASSES[label]}" for i, label in enumerate(LABELS)]
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    return {"name": "image_list", "path": str(root / "list.txt")}


def npz_nhwc(root: Path) -> dict:
    np.savez(root / "a.npz", arr_0=pictures(), arr_1=LABELS)
    return {"name": "npz", "path": str(root / "a.npz")}


def npz_nchw(root: Path) -> dict:
    np.savez(root / "train.npz", images=pictures().transpose(0, 3, 1, 2), labels=LABELS)
    return {"name": "npz", "path": str(root)}


def hub_image_folder(root: Path) -> dict:
    class_folders(root, below="")  # the package takes the innermost folder for the class
    return {"name": "huggingface", "path": str(root)}


def hub_parquet(root: Path) -> dict:
    import datasets
    import pyarrow
    from pyarrow import parquet

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    flat_folder(root / "files")
    images = [{"bytes": (root / "files" / f"{i}.png").read_bytes(), "path": None} for i in range(8)]
    table = pyarrow.table({"image": images, "label": LABELS}, schema=features.arrow_schema)
    parquet.write_table(table, root / "train.parquet")
    return {"name": "huggingface", "path": str(root)}


needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="package datasets is absent")
CONTAINERS = [
    class_folders, split_folders, flat_folder, prefixes, metadata_jsonl, metadata_csv, file_list, npz_nhwc, npz_nchw,
    pytest.param(hub_image_folder, marks=needs_datasets), pytest.param(hub_parquet, marks=needs_datasets),
]  # fmt: skip


@pytest.mark.parametrize("make", CONTAINERS)
def test_containers_agree(make: Callable[[Path], dict], tmp_path: Path) -> None:
    dataset = build_dataset(**make(tmp_path))
    assert len(dataset) == 8 and dataset.item_shape == (3, 12, 12)
    expected = {image.tobytes(): int(label) for image, label in zip(pictures(), LABELS)}
    for i in range(8):
        item = dataset[i]
        pixels = ((item["pixel_values"] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        label = expected.pop(pixels.tobytes())
        if make is flat_folder:
            assert "class_labels" not in item
        else:
            assert item["class_labels"] == label == dataset.labels[i]
    assert not expected
    if make is not flat_folder:
        assert dataset.num_classes == 3
        assert dataset.class_names in (CLASSES, ("0", "1", "2"))


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("where", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path: Path, where: str, packed: bool) -> None:
    folder = tmp_path / where
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", pictures(1)), ("labels-idx1", LABELS)):
        data = idx_bytes(array)
        file = folder / f"train-{name}-ubyte{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(data) if packed else data)
    dataset = build_dataset(name="fashion_mnist", path=str(tmp_path))
    assert np.array_equal(np.stack([dataset.pixels(i)[0] for i in range(8)]), pictures(1))
    assert dataset.class_names[9] == "Ankle boot" and dataset[4]["class_labels"] == 1
    padded = build_dataset(name="fashion_mnist", path=str(tmp_path), resolution=16, crop="pad")
    assert torch.equal(padded[3]["pixel_values"][:, 2:14, 2:14], dataset[3]["pixel_values"])
    assert padded[3]["pixel_values"][:, :2].eq(-1).all()


def test_cut_off_idx(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx_bytes(LABELS)[:-1])
    with pytest.raises(ValueError, match="cut off"):
        read_idx(tmp_path / "a")


def test_cifar10_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = pictures(3, 32)
    batch = {"data": images.transpose(0, 3, 1, 2).reshape(8, -1), "labels": LABELS.tolist()}
    (folder / "b").write_bytes(pickle.dumps(batch))
    (folder / "m").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    monkeypatch.setattr(CIFAR10, "train_list", [["b", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "m", "key": "label_names", "md5": None})
    dataset = build_dataset(name="cifar10", path=str(tmp_path))
    assert dataset.class_names == CLASSES and dataset.item_shape == (3, 32, 32)
    assert np.array_equal(dataset.pixels(5), images[5].transpose(2, 0, 1))


def test_fashion_mnist(data_dir: Path) -> None:
    dataset = build_dataset(name="fashion_mnist", path=str(data_dir / "fashion-mnist"), split="test")
    assert len(dataset) == 10_000 and dataset.item_shape == (1, 28, 28) and dataset.num_classes == 10
    pixels = np.stack([dataset.pixels(i) for i in range(len(dataset))]) / 255
    assert abs(pixels.mean() - 0.2868) < 1e-4 and abs(pixels.std() - 0.3524) < 1e-4
    assert np.array_equal(np.bincount(dataset.labels), np.full(10, 1000))


def test_digits_have_a_fixed_split() -> None:
    train, test = build_dataset(name="digits"), build_dataset(name="digits", split="test")
    assert (len(train), len(test)) == (1442, 355)
    assert np.bincount(test.labels).min() >= 34
    assert int(train.labels[:100].sum()) == 450 and int(test.labels[:100].sum()) == 464
    seen = {train.pixels(i).tobytes() for i in range(len(train))}
    assert sum(test.pixels(i).tobytes() in seen for i in range(len(test))) == 0
    assert train[0]["pixel_values"].shape == (1, 8, 8)
    assert train[0]["pixel_values"].min() == -1 and train[0]["pixel_values"].max() == 1


def test_colours() -> None:
    assert np.asarray(to_colours(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), None)).tolist() == [[[255, 255, 255]]]
    half = np.asarray(to_colours(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), 3))
    assert half.tolist() == [[[127, 127, 127]]]
    assert np.asarray(to_colours(Image.new("LA", (1, 1), (0, 0)), None)).tolist() == [[255]]
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert np.asarray(to_colours(deep, None)).tolist() == [[0, 1, 255]]
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    assert np.asarray(to_colours(palette, None)).tolist() == [[[10, 20, 30]]]
    assert to_colours(Image.new("CMYK", (1, 1)), None).mode == "RGB"
    assert to_colours(Image.new("RGB", (1, 1)), 1).mode == "L"


@pytest.mark.parametrize("crop", [c for c in CROPS if c not in ("pad", "none")])
@pytest.mark.parametrize("size", [(40, 30), (31, 97), (16, 16)])
def test_crops_give_the_size_and_keep_the_centre(crop: str, size: tuple[int, int]) -> None:
    x = np.add.outer(np.arange(size[1]), np.arange(size[0])) * (255 / (sum(size) - 2))
    image = Image.fromarray(x.astype(np.uint8))
    pixels = ImageTransform(16, 1, crop).pixels(image)
    assert pixels.shape == (1, 16, 16)
    assert abs(float(pixels.mean()) - 127) < 4  # a ramp is symmetric around its centre


def test_adm_crop_of_a_large_image_uses_box_halving() -> None:
    draw = np.random.default_rng(1).integers(0, 256, (64, 80), np.uint8)
    halved = draw.reshape(32, 2, 40, 2).astype(float).mean((1, 3))
    halved = halved.reshape(16, 2, 20, 2).mean((1, 3))[:, 2:18]
    pixels = ImageTransform(16, 1, "adm").pixels(Image.fromarray(draw))[0]
    assert np.abs(pixels - halved).max() <= 2.01  # Pillow rounds halves up, four times


def test_random_parts_depend_on_the_key_alone(tmp_path: Path) -> None:
    arguments = flat_folder(tmp_path) | {"resolution": 8, "crop": "resize_random", "flip": True}
    dataset = build_dataset(**arguments)
    keys = [int(k) for k in hash_integers(np.arange(64), seed=0)]
    items = [dataset.item(2, k)["pixel_values"] for k in keys]
    again = [dataset.item(2, k)["pixel_values"] for k in keys]
    assert all(torch.equal(a, b) for a, b in zip(items, again))
    assert len({a.numpy().tobytes() for a in items}) == 8  # two places, two places, mirrored or not
    assert torch.equal(dataset.item(2, 6)["pixel_values"].flip(-1), dataset.item(2, 7)["pixel_values"])
    assert torch.equal(dataset[2]["pixel_values"], dataset[2]["pixel_values"])


def test_cache_equals_the_data_set() -> None:
    dataset = ImageDataset(from_arrays(pictures(), LABELS), ImageTransform(flip=True))
    items, keys = np.array([5, 0, 5, 7]), np.array([1, 2, 4, 2**63 + 1], np.uint64)
    batch = CachedImages(dataset).batch(items, keys)
    expected = [dataset.item(int(i), int(k)) for i, k in zip(items, keys)]
    assert torch.equal(batch["pixel_values"], torch.stack([e["pixel_values"] for e in expected]))
    assert batch["class_labels"].tolist() == [e["class_labels"] for e in expected]
    with pytest.raises(ValueError, match="cache=none"):
        CachedImages(ImageDataset(from_arrays(pictures(), None), ImageTransform(8, crop="resize_random")))


def test_range() -> None:
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"name": "digitz"}, ValueError, "did you mean digits"),
        ({"name": "digits", "split": "validation"}, ValueError, "train and test"),
        ({"name": "digits", "label": "prefix"}, ValueError, "has its labels"),
        ({"name": "digits", "resolution": 4, "crop": "none"}, ValueError, "8x8 but resolution is 4"),
        ({"name": "digits", "resolution": 4, "crop": "pad"}, ValueError, "does not fit"),
        ({"name": "image_folder"}, ValueError, r"needs data\.path"),
        ({"name": "image_folder", "path": "nowhere"}, FileNotFoundError, "nowhere"),
        ({"name": "fashion_mnist", "path": "nowhere"}, FileNotFoundError, r"data\.download=true"),
        ({"name": "npz", "path": "."}, FileNotFoundError, r"train\.npz"),
    ],
)
def test_errors(keys: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_dataset(**keys)


def test_broken_and_uneven_images_are_named(tmp_path: Path) -> None:
    arguments = flat_folder(tmp_path)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"3\.png"):
        build_dataset(**arguments)[3]
    save(pictures()[0, :6], tmp_path / "4.png")
    with pytest.raises(ValueError, match=r"4\.png.*data\.resolution"):
        build_dataset(**arguments)[4]
    (tmp_path / "metadata.csv").write_text("file_name,label\nno.png,1\n")
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        build_dataset(**arguments)
    with pytest.raises(FileNotFoundError, match="no folder 'test'"):
        build_dataset(**arguments, split="test")


def test_every_kind_is_documented() -> None:
    assert {"digits", "fashion_mnist", "cifar10", "image_folder", "npz", "huggingface", "latents"} <= set(DATASETS)
