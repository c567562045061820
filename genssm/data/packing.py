"""Items of different sizes, packed whole into rows of at most so many tokens, anew in every epoch.

The rows of an epoch are a function of (seed, epoch): the items in the epoch's order, each put into the first open row
with room for it, the rows then put into an order of their own. Rows of all epochs make one endless stream. To resume at
a step is to start there, as with single items (:mod:`genssm.data.loading`): no loader has a state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genssm.training.seeding import derive, hash_integers, permutation

OPEN_ROWS = 64  # that an item may still go into: the work per item stays bounded
KEPT_EPOCHS = 2  # a batch may hold the last rows of one and the first of the next


def first_fit(sizes: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Put every item into the first open row that has room for it.

    Args:
        sizes: of each item, 1..capacity.
        order: in which the items come.
        capacity: of a row.

    Returns:
        Item numbers of each row, rows in the order in which they were begun.
    """
    least = min((sizes[item] for item in order), default=1)
    rows: list[list[int]] = []
    rooms: list[list[int]] = []  # [room, row] of those that are open
    for item in order:
        size = sizes[item]
        for place, (room, row) in enumerate(rooms):
            if room >= size:
                rows[row].append(item)
                rooms[place][0] = room - size
                if room - size < least:
                    del rooms[place]
                break
        else:
            rows.append([item])
            if capacity - size >= least:
                rooms.append([capacity - size, len(rows) - 1])
            if len(rooms) > OPEN_ROWS:
                del rooms[0]
    return rows


@dataclass(frozen=True)
class Row:
    """Items that share a row.

    Attributes:
        items: as the data set gives them.
        share: rows of the step / items of the step: a mean over rows of (share * the sum over a row's items) is the
            mean over the step's items, however its rows are divided.
    """

    items: list[dict[str, Any]]
    share: float


class PackedRows(torch.utils.data.Dataset):
    """The endless stream of rows of a data set, addressed by the place in it.

    Args:
        dataset: ``item(index, key)``.
        sizes: tokens of each item at most, 1..capacity.
        capacity: tokens of a row.
        seed: of the run.
        batch_size: rows of a step.
    """

    def __init__(self, dataset: Any, sizes: Sequence[int], capacity: int, seed: int, batch_size: int) -> None:
        self.dataset, self.sizes, self.capacity = dataset, list(sizes), capacity
        self.seed, self.batch_size = seed, batch_size
        self._begins = [0]  # place of each epoch's first row, as far as known
        self._epochs: dict[int, list[list[int]]] = {}

    def epoch(self, number: int) -> list[list[int]]:
        """Item numbers of each row of an epoch."""
        if number not in self._epochs:
            order = permutation(len(self.sizes), derive(self.seed, "data", number)).tolist()
            rows = first_fit(self.sizes, order, self.capacity)
            shuffled = permutation(len(rows), derive(self.seed, "rows", number)).tolist()
            if len(self._epochs) == KEPT_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[number] = [rows[i] for i in shuffled]
        return self._epochs[number]

    def row(self, place: int) -> list[int]:
        """Item numbers of the row at a place of the stream."""
        while self._begins[-1] <= place:  # how many rows an epoch has is only known once they are packed
            self._begins.append(self._begins[-1] + len(self.epoch(len(self._begins) - 1)))
        number = int(np.searchsorted(self._begins, place, side="right")) - 1
        return self.epoch(number)[place - self._begins[number]]

    def item(self, place: int, key: int) -> Row:
        """The row at a place; ``key`` decides what is random in its items."""
        keys = hash_integers(np.arange(len(self.row(place))), key).tolist()
        items = [self.dataset.item(index, own) for index, own in zip(self.row(place), keys)]
        first = place - place % self.batch_size
        in_step = sum(len(self.row(other)) for other in range(first, first + self.batch_size))
        return Row(items, self.batch_size / in_step)


def join_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows as one batch of S items.

    Returns:
        Every key of the items: numbers as a tensor (S,), tensors and texts as lists; ``row``, in which row each item
        lies, and ``scale``, by which the loss of each item is multiplied so that their mean counts every item of the
        step alike.
    """
    items: list[Mapping[str, Any]] = [item for row in rows for item in row.items]
    batch: dict[str, Any] = {}
    for name, first in items[0].items():
        values = [item[name] for item in items]
        batch[name] = values if isinstance(first, torch.Tensor | str) else torch.tensor(values)
    batch["row"] = [number for number, row in enumerate(rows) for _ in row.items]
    batch["scale"] = rows[0].share * len(items) / len(rows)
    return batch
