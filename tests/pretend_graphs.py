"""Graphs that pretend: recorded on a CPU, they compute anew what a real one would repeat."""

from collections.abc import Callable

import pytest
import torch

from genssm import graphs


class PretendGraph:
    """Computes again what was recorded."""

    replays = 0

    def __init__(self, call: Callable[[], None]) -> None:
        self.call, self.with_gradients = call, torch.is_grad_enabled()

    def replay(self) -> None:
        """Run it, with gradients if it was recorded with them."""
        PretendGraph.replays += 1
        with torch.set_grad_enabled(self.with_gradients):
            self.call()


@pytest.fixture
def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> type[PretendGraph]:
    """Graphs on the CPU."""

    def record(device: torch.device, warm_up: Callable[[], None], *calls: Callable[[], None]) -> list[PretendGraph]:
        with torch.random.fork_rng():
            for call in (warm_up, *calls):
                call()
        return [PretendGraph(call) for call in calls]

    monkeypatch.setattr(graphs, "KIND", "cpu")
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(PretendGraph, "replays", 0)
    return PretendGraph
