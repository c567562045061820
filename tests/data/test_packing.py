"""Packed rows: each item once per epoch, no row over its capacity, a stream that begins anywhere; sizes of images."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from genssm.config import DataConfig
from genssm.data import build_dataset, build_variable_images
from genssm.data.loading import RowStream, Shares, training_batches
from genssm.data.packing import OPEN_ROWS, PackedRows, first_fit
from genssm.data.variable import ShapeKeeping


class Numbers:
    """Items that say who they are and with which key they were asked for."""

    def item(self, index: int, key: int) -> dict:
        return {"index": index, "key": key % 2**31}


sizes_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=150), st.just(capacity))
)


@given(sizes_and_capacity, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_first_fit(problem: tuple[list[int], int], random: object) -> None:
    sizes, capacity = problem
    order = list(range(len(sizes)))
    random.shuffle(order)
    rows = first_fit(sizes, order, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    filled = [sum(sizes[item] for item in row) for row in rows]
    assert all(0 < tokens <= capacity for tokens in filled)
    if len(rows) <= OPEN_ROWS:  # no two rows would fit into one: at most one is not more than half full
        assert sum(2 * tokens <= capacity for tokens in filled) <= 1


@given(sizes_and_capacity, st.integers(0, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_stream(problem: tuple[list[int], int], seed: int, world: int, parts: int, start: int) -> None:
    """Epochs follow each other without gaps; processes share a step's rows; a new object goes on anywhere."""
    sizes, capacity = problem
    batch = world * parts * 2
    rows = PackedRows(Numbers(), sizes, capacity, seed, batch)
    length = 2 * len(rows.epoch(0)) + len(rows.epoch(1))
    stream = [rows.row(place) for place in range(length)]
    first = len(PackedRows(Numbers(), sizes, capacity, seed, batch).epoch(0))
    assert Counter(item for row in stream[:first] for item in row) == Counter(range(len(sizes)))
    again = PackedRows(Numbers(), sizes, capacity, seed, batch)
    assert [again.row(place) for place in reversed(range(length))] == stream[::-1]

    seen, images = [], 0.0
    for rank in range(world):
        shares = Shares(batch, parts, world, rank)
        fresh = PackedRows(Numbers(), sizes, capacity, seed, batch)
        for part, got in enumerate(training_batches(fresh, RowStream(seed), shares, first=start, last=start + 1)):
            places = shares.places(start, part)
            expected = [item for place in places for item in rows.row(int(place))]
            assert got["index"].tolist() == expected
            assert got["row"] == [number for number, p in enumerate(places) for _ in rows.row(int(p))]
            seen += places.tolist()
            images += got["scale"] / (parts * world)  # the scale undoes that parts have different numbers of items
    assert sorted(seen) == list(range(start * batch, (start + 1) * batch))
    assert images == pytest.approx(1.0)


def test_epochs_and_seeds_differ() -> None:
    sizes = np.random.default_rng(0).integers(4, 64, 300).tolist()
    rows = PackedRows(Numbers(), sizes, 128, 0, 8)
    assert rows.epoch(0) != rows.epoch(1)
    assert rows.epoch(0) != PackedRows(Numbers(), sizes, 128, 1, 8).epoch(0)
    assert sum(sizes) / (128 * len(rows.epoch(0))) > 0.95
    keys = [item["key"] for place in range(20) for item in rows.item(place, 1000 + place).items]
    assert len(set(keys)) == len(keys)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([4, 16, 32]), st.integers(2, 20), st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_sizes(width: int, height: int, multiple: int, side: int, smallest: int) -> None:
    """Multiples, never above the area asked for, about the shape of the image where that has room."""
    transform = ShapeKeeping(
        side * multiple, smallest=min(smallest, side) * multiple if smallest else None, multiple=multiple
    )
    columns, rows = transform.size(width, height)
    assert columns % multiple == 0 and rows % multiple == 0 and columns > 0 and rows > 0
    assert columns * rows <= (side * multiple) ** 2
    if min(columns, rows) >= 4 * multiple:
        assert 0.7 < (columns / rows) / (width / height) < 1.43
    assert ShapeKeeping(None, multiple=1).size(width, height) == (width, height)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    for name, size in {"a": (33, 16), "b": (8, 24), "c": (100, 60)}.items():
        rows, columns = np.mgrid[: size[1], : size[0]]
        Image.fromarray((rows + columns).astype(np.uint8)).save(path / f"{name}.png")
    return path


def test_images_of_a_folder(folder: Path) -> None:
    data = build_variable_images(
        DataConfig(name="image_folder", path=str(folder), pack_tokens=64, multiple=4, resolution=32, flip=True)
    )
    assert data.sizes == [(32, 16), (8, 24), (40, 24)] and data.tokens == [32, 12, 60]
    for index, (width, height) in enumerate(data.sizes):
        assert data[index]["pixel_values"].shape == (1, height, width)
    stored = np.asarray(Image.open(folder / "b.png"))
    assert np.array_equal(data.pixels(1)[0], stored)  # 8x24 fits: untouched
    assert np.array_equal(data.item(1, 1)["pixel_values"].numpy(), data[1]["pixel_values"].numpy()[..., ::-1])
    grown = build_variable_images(
        DataConfig(name="image_folder", path=str(folder), pack_tokens=64, multiple=4, min_resolution=32)
    )
    assert grown.sizes[1] == (20, 56)  # 18.5 x 55.4


def test_refusals(folder: Path, tmp_path: Path) -> None:
    options = {"name": "image_folder", "path": str(folder), "pack_tokens": 64}
    with pytest.raises(ValueError, match=r"where they have one size, set it to 0"):
        build_dataset(DataConfig(**options))
    with pytest.raises(ValueError, match=r"packs images, not data\.name=latents"):
        build_variable_images(DataConfig(**{**options, "name": "latents"}))
    with pytest.raises(ValueError, match="did you mean image_folder"):
        build_variable_images(DataConfig(**{**options, "name": "image_foldr"}))
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png")
    mixed = build_variable_images(DataConfig(**{**options, "path": str(tmp_path)}))
    with pytest.raises(ValueError, match=r"b\.png has 3 channel\(s\) but the first one 1; set data\.channels"):
        mixed[1]
