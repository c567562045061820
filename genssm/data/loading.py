"""Which items a training step sees: a pure function of (seed, step), whatever the number of processes or workers.

The data set is read as one endless stream, one permutation after the other. Step s takes the places
``s * batch .. (s + 1) * batch - 1`` of the stream; every place has its item and a random key for its augmentation. The
batch is cut into ``parts * world`` equal pieces, piece ``part * world + rank`` goes to a process. To resume at a step
is to start there: no loader has a state.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from genssm.data.codes import CachedCodes
from genssm.data.images import CachedImages
from genssm.data.packing import PackedRows, Row, join_rows
from genssm.devices import send
from genssm.errors import USER_ERRORS
from genssm.training.seeding import derive, hash_integers, permutation


@dataclass(frozen=True)
class Shares:
    """How the batch of a step is divided.

    Attributes:
        batch_size: items of an optimiser step.
        parts: accumulation steps.
        world: processes.
        rank: this process.
    """

    batch_size: int
    parts: int = 1
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % (self.parts * self.world):
            raise ValueError(
                f"train_batch_size={self.batch_size} cannot be divided among {self.world} process(es) with "
                f"gradient_accumulation_steps={self.parts}; make it a multiple of {self.parts * self.world}"
            )

    @property
    def piece(self) -> int:
        """Items that one process works through at once."""
        return self.batch_size // (self.parts * self.world)

    def slice(self, part: int) -> slice:
        """Where in the step's batch this process finds its ``part``."""
        start = (part * self.world + self.rank) * self.piece
        return slice(start, start + self.piece)

    def places(self, step: int, part: int) -> np.ndarray:
        """Places of the stream that this process takes for a ``part`` of a step, int64."""
        own = self.slice(part)
        return step * self.batch_size + np.arange(own.start, own.stop, dtype=np.int64)


@dataclass
class Stream:
    """The endless stream of items.

    Attributes:
        count: items in the data set.
        seed: seed of the run.
    """

    count: int
    seed: int
    _epoch: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("the data set is empty")

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Item numbers (int64) and keys (uint64) at places (int64) of the stream."""
        items = np.empty(len(places), np.int64)
        for epoch in np.unique(places // self.count):
            inside = places // self.count == epoch
            items[inside] = self._permutation(int(epoch))[places[inside] % self.count]
        return items, hash_integers(places, derive(self.seed, "augment"))

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, permutation(self.count, derive(self.seed, "data", epoch)))
        return self._epoch[1]

    def piece(self, shares: Shares, step: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Item numbers and keys of one process's part of a step."""
        return self.at(shares.places(step, part))


@dataclass(frozen=True)
class RowStream:
    """The endless stream of packed rows, which :class:`genssm.data.packing.PackedRows` finds by their places.

    Attributes:
        seed: seed of the run.
    """

    seed: int

    def piece(self, shares: Shares, step: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        """Places and keys of one process's part of a step."""
        places = shares.places(step, part)
        return places, hash_integers(places, derive(self.seed, "augment"))


class _Keyed(torch.utils.data.Dataset):
    """The data set addressed by (item, key), as a loader process needs it."""

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, address: tuple[int, int]) -> Mapping[str, object] | Row | Exception:
        try:
            return self.dataset.item(*address)
        except USER_ERRORS as error:
            return error  # raised by the training process: a loader would wrap it in a traceback


def _collate(items: list[Mapping[str, object] | Row | Exception]) -> Any:
    failed = next((item for item in items if isinstance(item, Exception)), None)
    if failed is not None:
        return failed
    return join_rows(items) if isinstance(items[0], Row) else torch.utils.data.default_collate(items)


class _Pieces(torch.utils.data.Sampler):
    """The pieces of steps ``first .. last - 1``, in order, as lists of (item, key)."""

    def __init__(self, stream: Stream | RowStream, shares: Shares, first: int, last: int) -> None:
        self.stream, self.shares, self.first, self.last = stream, shares, first, last

    def __iter__(self) -> Iterator[Sequence[tuple[int, int]]]:
        for step in range(self.first, self.last):
            for part in range(self.shares.parts):
                items, keys = self.stream.piece(self.shares, step, part)
                yield list(zip(items.tolist(), keys.tolist()))


def _leave_signals_alone(worker: int) -> None:
    """Ctrl-C and SIGTERM of a scheduler reach every process of the group; the training process still wants its batches
    to end the step, and decides when its loaders end: a second SIGTERM is its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def training_batches(
    dataset: torch.utils.data.Dataset | CachedImages | CachedCodes | PackedRows,
    stream: Stream | RowStream,
    shares: Shares,
    *,
    first: int,
    last: int,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor | list[str]]]:
    """Batches of this process for steps ``first .. last - 1``: ``shares.parts`` per step, tensors on ``device``.

    Args:
        dataset: a data set with ``item(index, key)``, or one that is kept in memory.
        stream: order of the items; of the rows, for :class:`genssm.data.packing.PackedRows`.
        shares: division of the batch.
        first: first step.
        last: step to stop before.
        device: where the tensors go.
        num_workers: loader processes; the data do not depend on it.

    Raises:
        ValueError: an item cannot be read; the message names it.
    """
    device = torch.device(device)
    if isinstance(dataset, CachedImages | CachedCodes):
        for step in range(first, last):
            for part in range(shares.parts):
                yield _moved(dataset.batch(*stream.piece(shares, step, part)), device)
        return
    loader = torch.utils.data.DataLoader(
        _Keyed(dataset),
        batch_sampler=_Pieces(stream, shares, first, last),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_alone,
        collate_fn=_collate,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield _moved(batch, device)


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device, also those in lists; texts have none."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(one) for one in value]
        return send(value, device) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in batch.items()}
