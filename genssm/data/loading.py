"""Which items a training step sees: a pure function of (seed, step), whatever the number of processes or workers.

The data set is read as one endless stream, one permutation after the other. Step s takes the places
``s * batch .. (s + 1) * batch - 1`` of the stream; every place has its item and a random key for its augmentation. The
batch is cut into ``parts * world`` equal pieces, piece ``part * world + rank`` goes to a process. To resume at a step
is to start there: no loader has a state.
"""

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from genssm.data.codes import CachedCodes
from genssm.data.images import CachedImages
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
        own = shares.slice(part)
        return self.at(step * shares.batch_size + np.arange(own.start, own.stop, dtype=np.int64))


class _Keyed(torch.utils.data.Dataset):
    """The data set addressed by (item, key), as a loader process needs it."""

    def __init__(self, dataset: torch.utils.data.Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, address: tuple[int, int]) -> Mapping[str, object]:
        return self.dataset.item(*address)


class _Pieces(torch.utils.data.Sampler):
    """The pieces of steps ``first .. last - 1``, in order, as lists of (item, key)."""

    def __init__(self, stream: Stream, shares: Shares, first: int, last: int) -> None:
        self.stream, self.shares, self.first, self.last = stream, shares, first, last

    def __iter__(self) -> Iterator[Sequence[tuple[int, int]]]:
        for step in range(self.first, self.last):
            for part in range(self.shares.parts):
                items, keys = self.stream.piece(self.shares, step, part)
                yield list(zip(items.tolist(), keys.tolist()))


def _leave_interrupts_alone(worker: int) -> None:
    """Ctrl-C reaches every process of the group; the training process decides when its loaders end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_batches(
    dataset: torch.utils.data.Dataset | CachedImages | CachedCodes,
    stream: Stream,
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
        stream: order of the items.
        shares: division of the batch.
        first: first step.
        last: step to stop before.
        device: where the tensors go.
        num_workers: loader processes; the data do not depend on it.
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
        worker_init_fn=_leave_interrupts_alone,
    )
    for batch in loader:
        yield _moved(batch, device)


def _moved(batch: Mapping[str, torch.Tensor | list[str]], device: torch.device) -> dict[str, torch.Tensor | list[str]]:
    """The batch with its tensors on the device; texts have none."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
