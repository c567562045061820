"""Graphs that pretend: recorded on a CPU, they compute anew what a real one would repeat."""

import math
from collections.abc import Callable

import pytest
import torch

from genssm import graphs


class PretendGraph:
    """Computes again what was recorded.

    Args:
        call: what was recorded.
        lost: names of its owner's tensors that a replay writes over, as a real one does.
    """

    replays = 0

    def __init__(self, call: Callable[[], None], lost: tuple[str, ...]) -> None:
        self.call, self.lost, self.with_gradients = call, lost, torch.is_grad_enabled()

    def replay(self) -> None:
        """Run it, with gradients if it was recorded with them."""
        PretendGraph.replays += 1
        owner = getattr(self.call, "__self__", None)
        with torch.inference_mode():
            for left in (x for name in self.lost for x in getattr(owner, name, ())):
                if isinstance(left, torch.Tensor) and left.is_floating_point():
                    left.fill_(math.nan)
        with torch.set_grad_enabled(self.with_gradients):
            self.call()


@pytest.fixture
def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> type[PretendGraph]:
    """Graphs on the CPU."""

    def record(device: torch.device, warm_up: Callable[[], None], *calls: Callable[[], None]) -> list[PretendGraph]:
        with torch.random.fork_rng():
            for call in (warm_up, *calls):
                call()
        # They share their memory: each writes where it and the later ones left results.
        lost = ("outputs", "gradients")
        return [PretendGraph(call, lost[place:]) for place, call in enumerate(calls)]

    monkeypatch.setattr(graphs, "KIND", "cpu")
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(PretendGraph, "replays", 0)
    return PretendGraph
