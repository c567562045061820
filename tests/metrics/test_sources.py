"""Images from folders, files, data sets and noise: the same pixels from every container."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.metrics.sources import (
    ImageSource,
    NoiseSource,
    SubsetSource,
    content_hash,
    dataset_source,
    file_source,
    image_digest,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
OPTIONS = argparse.Namespace(path=None, resolution=None, crop=None, channels=None)


def write_folder(folder: Path, pixels: np.ndarray, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:04d}.{suffix}")
    return folder


def all_images(source: ImageSource) -> list[torch.Tensor]:
    return [source.read(i)[0] for i in range(len(source))]


def fingerprint(source: ImageSource) -> str:
    return content_hash([image_digest(image) for image in all_images(source)])


def test_every_container_gives_the_same_images(tmp_path: Path) -> None:
    folder = file_source(write_folder(tmp_path / "png", PIXELS))
    np.savez(tmp_path / "adm.npz", arr_0=PIXELS, arr_1=np.arange(6))
    np.savez(tmp_path / "first.npz", images=PIXELS.transpose(0, 3, 1, 2))
    adm, first = file_source(tmp_path / "adm.npz"), file_source(tmp_path / "first.npz")
    assert [image.shape for image in all_images(folder)] == [(3, 5, 7)] * 6
    for i, image in enumerate(all_images(folder)):
        assert (image.permute(1, 2, 0).numpy() == PIXELS[i]).all()
    assert fingerprint(folder) == fingerprint(adm) == fingerprint(first)
    assert [adm.read(i)[1] for i in range(6)] == list(range(6))
    assert folder.read(0)[1] is None
    assert (folder.file_format, adm.file_format) == ("png", "npz")


def test_hash_sees_one_pixel_the_order_and_the_size() -> None:
    images = [torch.from_numpy(image).permute(2, 0, 1) for image in PIXELS]
    other = images[0].clone()
    other[2, 4, 6] += 1
    digests = [image_digest(image) for image in images]
    assert image_digest(other) != digests[0]
    assert image_digest(images[0].reshape(3, 7, 5)) != digests[0]
    assert content_hash(digests) != content_hash(digests[::-1])


def test_folder_is_sorted_and_recursive(tmp_path: Path) -> None:
    write_folder(tmp_path / "b", PIXELS[:1])
    write_folder(tmp_path / "a", PIXELS[1:3], "bmp")
    (tmp_path / "notes.txt").write_text("no image")
    source = file_source(tmp_path)
    assert [Path(source.listed.names(i)).relative_to(tmp_path).as_posix() for i in range(3)] == [
        "a/0000.bmp",
        "a/0001.bmp",
        "b/0000.png",
    ]
    assert source.file_format == "bmp+png"


def test_grey_and_transparent_images(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0, :, :, 0]).save(tmp_path / "0.png")
    Image.new("RGBA", (7, 5), (255, 0, 0, 0)).save(tmp_path / "1.png")
    grey, clear = all_images(file_source(tmp_path))
    assert (grey.numpy() == PIXELS[0, :, :, 0]).all()
    assert (clear == 255).all()
    assert file_source(tmp_path).channels == 1


def test_batches_keep_order_and_split_where_the_size_changes(tmp_path: Path) -> None:
    write_folder(tmp_path, PIXELS)
    for i, image in enumerate(PIXELS[:2, :4]):
        Image.fromarray(image).save(tmp_path / f"{i + 6:04d}.png")
    source = file_source(tmp_path)
    batches = list(source.batches(range(1, 8), 4))
    assert [batch.indices for batch in batches] == [[1, 2, 3, 4], [5], [6, 7]]
    assert [tuple(batch.images.shape) for batch in batches] == [(4, 3, 5, 7), (1, 3, 5, 7), (2, 3, 4, 7)]
    assert all(batch.labels is None for batch in batches)
    assert (batches[0].images[2] == source.read(3)[0]).all()


def test_digits() -> None:
    source = dataset_source("digits", "test", OPTIONS)
    (batch,) = source.batches(range(20), 20)
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (20, 3, 8, 8)
    assert (batch.images[:, 0] == batch.images[:, 2]).all()
    assert batch.images.max() == 255
    assert set(batch.labels.tolist()) <= set(range(10))
    assert (source.channels, source.num_classes, source.name) == (1, 10, "digits test")


def test_data_set_of_a_run(tmp_path: Path) -> None:
    """A run folder or configuration names its data, here padded; mirroring is never applied."""
    (tmp_path / "config.yaml").write_text(
        "model: {name: zigma, args: {}}\ndata: {name: digits, resolution: 10, crop: pad, flip: true}\n"
    )
    for name in (tmp_path, tmp_path / "config.yaml"):
        source = dataset_source(str(name), "test", OPTIONS)
        assert source.name == "digits test 10px pad"
        image, plain = source.read(3)[0], dataset_source("digits", "test", OPTIONS).read(3)[0]
        assert (image[:, 1:9, 1:9] == plain).all()
    larger = argparse.Namespace(**{**vars(OPTIONS), "resolution": 12})
    assert dataset_source(str(tmp_path), "test", larger).read(3)[0].shape == (3, 12, 12)
    packed = "data: {name: digits, resolution: 12, pack_tokens: 64, min_resolution: 8, multiple: 4}\n"
    (tmp_path / "config.yaml").write_text("model: {name: zigma, args: {}}\n" + packed)
    assert dataset_source(str(tmp_path), "test", OPTIONS).read(3)[0].shape == (3, 12, 12)
    with pytest.raises(ValueError, match="not a data set"):
        dataset_source("digit", "test", OPTIONS)


def test_noise_depends_on_seed_and_place_alone() -> None:
    few, many = NoiseSource(3, (4, 5), grey=False), NoiseSource(9, (4, 5), grey=False)
    assert all((few.read(i)[0] == many.read(i)[0]).all() for i in range(3))
    assert (few.read(0)[0] != few.read(1)[0]).any()
    assert (few.read(0)[0] != NoiseSource(3, (4, 5), grey=False, seed=1).read(0)[0]).any()
    colour, grey = few.read(0)[0], NoiseSource(3, (4, 5), grey=True).read(0)[0]
    assert (colour[0] != colour[1]).any()
    assert (grey[0] == grey[1]).all()
    assert grey.shape == (3, 4, 5)
    pixels = torch.stack(all_images(NoiseSource(200, (8, 8), grey=True)))[:, 0].float()
    assert abs(pixels.mean() - 127.5) < 3
    assert abs(pixels.std() - 255 / 12**0.5) < 2


def test_subset(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=PIXELS, arr_1=np.arange(6))
    source = file_source(tmp_path / "a.npz")
    labels = [SubsetSource(source, 4).read(i)[1] for i in range(4)]
    assert len(set(labels)) == 4
    assert labels == sorted(labels)
    assert labels != [SubsetSource(source, 4, seed=1).read(i)[1] for i in range(4)]
    with pytest.raises(ValueError, match="holds 6 images, 7 were asked for"):
        SubsetSource(source, 7)


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        file_source(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"neither a folder of images nor an \.npz file"):
        file_source(tmp_path / "nothing")
    np.savez(tmp_path / "float.npz", arr_0=PIXELS / 255)
    with pytest.raises(ValueError, match="expected uint8"):
        file_source(tmp_path / "float.npz")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="images are expected under arr_0"):
        file_source(tmp_path / "stats.npz")
    (tmp_path / "broken").mkdir()
    write_folder(tmp_path / "broken", PIXELS[:2])
    (tmp_path / "broken" / "0001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read image .*0001\.png"):
        all_images(file_source(tmp_path / "broken"))
