"""The data of a step depend on the seed and the step alone."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from genssm.data import CachedImages, ImageDataset
from genssm.data.loading import Shares, Stream, training_batches
from genssm.data.sources import from_arrays
from genssm.data.transforms import ImageTransform


@pytest.fixture
def dataset() -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 256, (10, 6, 6, 3), np.uint8)
    return ImageDataset(from_arrays(images, np.arange(10)), ImageTransform(flip=True))


def read(dataset: object, shares: Shares, first: int, last: int, **options: int) -> list[dict[str, torch.Tensor]]:
    return list(training_batches(dataset, Stream(10, seed=1), shares, first=first, last=last, **options))


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)


def test_each_epoch_is_a_permutation_and_they_differ() -> None:
    items, keys = Stream(10, seed=1).at(np.arange(40))
    epochs = items.reshape(4, 10)
    assert all(sorted(e) == list(range(10)) for e in epochs.tolist())
    assert len({tuple(e) for e in epochs.tolist()}) == 4
    assert len(set(keys.tolist())) == 40
    assert not np.array_equal(items, Stream(10, seed=2).at(np.arange(40))[0])
    assert epochs[0].tolist() == [8, 6, 9, 4, 7, 5, 2, 1, 3, 0]  # the order is part of what a seed means


def test_resuming_is_starting_there(dataset: ImageDataset) -> None:
    shares = Shares(4)
    assert same(read(dataset, shares, 0, 9)[5:], read(dataset, shares, 5, 9))


def test_loaders_outlive_the_signal_that_ends_a_run(dataset: ImageDataset) -> None:
    """A scheduler's SIGTERM reaches the loaders, too; the run still gets the batches of the step that it is in."""
    expected = read(dataset, Shares(8), 0, 12, num_workers=2)
    seen = []
    for batch in training_batches(dataset, Stream(10, seed=1), Shares(8), first=0, last=12, num_workers=2):
        if len(seen) == 2:  # one of each loader: both have begun
            loaders = multiprocessing.active_children()
            assert len(loaders) == 2
            for loader in loaders:
                os.kill(loader.pid, signal.SIGTERM)
        seen.append(batch)
    assert same(seen, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_parts_cut_the_same_batch(dataset: ImageDataset, workers: int) -> None:
    whole = read(dataset, Shares(8), 2, 5)
    pieces = [read(dataset, Shares(8, parts=2, world=2, rank=r), 2, 5, num_workers=workers) for r in (0, 1)]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            cut = [pieces[r][2 * step + part][name] for part in (0, 1) for r in (0, 1)]
            assert torch.equal(torch.cat(cut), value)


def test_cache_gives_the_same_batches(dataset: ImageDataset) -> None:
    assert same(read(dataset, Shares(4), 0, 6), read(CachedImages(dataset), Shares(4), 0, 6))


def test_mirrors_vary_over_the_stream(dataset: ImageDataset) -> None:
    batches = read(dataset, Shares(10), 0, 8)
    seen = {b["pixel_values"][b["class_labels"] == 3].numpy().tobytes() for b in batches}
    assert len(seen) == 2


def test_indivisible_batch() -> None:
    with pytest.raises(ValueError, match="multiple of 6"):
        Shares(8, parts=2, world=3)
