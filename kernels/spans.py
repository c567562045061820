"""Chunks of the scans' CPU paths: which steps advance together, also in packed batches."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Steps low..high - 1, a chunk of one sequence."""

    low: int
    high: int
    slot: int  # where the state before it is kept
    sequence: int | None  # of a packed batch
    first: bool
    last: bool


def spans(length: int, steps: int) -> list[Span]:
    """Chunks of at most ``steps`` steps of a padded batch, the same in every direction."""
    return [
        Span(low, min(length, low + steps), slot, None, low == 0, low + steps >= length)
        for slot, low in enumerate(range(0, length, steps))
    ]


def packed_spans(length: int, steps: int, cu_seqlens: Tensor, order: Tensor | None) -> list[Span]:
    """Chunks of every sequence of a packed batch, in the order in which a direction visits the sequences."""
    borders = cu_seqlens.tolist()
    visits = torch.arange(length) if order is None else torch.argsort(order).cpu()
    begins = {s: int(visits[a:b].min()) for s, (a, b) in enumerate(itertools.pairwise(borders)) if b > a}
    plan: list[Span] = []
    for s, begin in sorted(begins.items(), key=lambda item: item[1]):
        end = begin + borders[s + 1] - borders[s]
        for low in range(begin, end, steps):
            plan.append(Span(low, min(end, low + steps), len(plan), s, low == begin, low + steps >= end))
    return plan
