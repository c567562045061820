"""Recorded graphs: what is replayed and what is not, with graphs that pretend; on a GPU the same bits as without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from genssm import graphs
from genssm.graphs import EAGER, ForwardGraphs, TrainingGraphs, evaluates_alike, places, weights_move
from genssm.layers import DenoiserOutput
from tests.pipelines.conftest import make_denoiser
from tests.pretend_graphs import PretendGraph


class Net(nn.Module):
    """Two layers whose weight is shared, a parameter that is not used, and an output that is no tensor of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(4, 4), nn.Parameter(torch.zeros(3))
        self.bias, self.second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None) -> DenoiserOutput:
        """(B, 4) to (B, 4)."""
        x = self.dropout(self.linear(torch.tanh(self.linear(x)))) * scale + self.bias + self.second
        return DenoiserOutput(sample=x if mask is None else x * mask)


def gradients(net: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def alike(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> bool:
    return all(a is b if b is None else torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def train_by(call: Callable[..., Any], net: nn.Module, parts: int, device: str = "cpu") -> list[list]:
    """Losses and gradients of four steps."""
    found, generator = [], torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(4):
        for _ in range(parts):
            x = torch.randn(3, 4, generator=generator).to(device)
            loss = call(x, scale=0.5, mask=None).sample.square().mean()
            loss.backward()
        found.append([loss.detach().clone(), *gradients(net)])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("parts", [1, 3])
def test_training_gives_the_gradients_of_autograd(parts: int, device: torch.device, request: Any) -> None:
    """Also over the parts of a step; a parameter that is not used has none."""
    if device.type == "cpu":
        request.getfixturevalue("pretend_graphs")
    found = []
    for replayed in (False, True):
        torch.manual_seed(0)
        net = Net().to(device)
        net.dropout.eval()
        call = TrainingGraphs(net, net.parameters()) if replayed else net
        found.append(train_by(call, net, parts, device.type))
    for eager, recorded in zip(*found):
        assert alike(recorded, eager)
    assert found[0][0][1 + list(dict(net.named_parameters())).index("unused")] is None
    if device.type == "cpu":
        assert PretendGraph.replays == 2 * 4 * parts


def test_gradients_share_no_memory(pretend_graphs: type[PretendGraph]) -> None:
    """Two biases that are added have one gradient; clipping must not shrink it twice."""
    net = Net()
    net.dropout.eval()
    call = TrainingGraphs(net, net.parameters())
    call(torch.ones(3, 4)).sample.sum().backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
    assert all(p.grad.stride() == p.stride() for p in net.parameters() if p.grad is not None)


def test_other_shapes_are_trained_without_a_graph(
    pretend_graphs: type[PretendGraph], caplog: pytest.LogCaptureFixture
) -> None:
    """An odd batch, between the parts of a step, too."""
    net, odd = Net(), torch.ones(2, 4)
    net.dropout.eval()
    call = TrainingGraphs(net, net.parameters())
    for order in ((torch.ones(3, 4), odd), (odd, torch.ones(3, 4))):
        net.zero_grad()
        for x in order:
            net(x).sample.square().sum().backward()
        expected = gradients(net)
        net.zero_grad()
        for x in order:
            call(x).sample.square().sum().backward()
        assert alike(gradients(net), expected) and pretend_graphs.replays
        call.graph = None
    assert caplog.text.count("another shape") == 1
    before = pretend_graphs.replays
    with torch.no_grad():
        call(torch.ones(3, 4))
    call(torch.ones(3, 4, requires_grad=True))
    assert pretend_graphs.replays == before


def test_an_evaluation_is_recorded_when_it_comes_again(pretend_graphs: type[PretendGraph]) -> None:
    """Results are the caller's own; of more than two kinds none is kept that was not asked for lately."""
    net, call = Net().eval(), None
    call = ForwardGraphs(lambda *args, **keys: net(*args, **keys).sample)
    with torch.no_grad():
        results = [call(torch.full((2, 4), float(i)), scale=0.5) for i in range(EAGER + 3)]
        assert pretend_graphs.replays == 3 and len(call.graphs) == 1
        for i, result in enumerate(results):
            assert torch.equal(result, net(torch.full((2, 4), float(i)), scale=0.5).sample)
        with torch.no_grad():
            net.linear.weight.mul_(0.5)
        assert torch.equal(call(torch.ones(2, 4), scale=0.5), net(torch.ones(2, 4), scale=0.5).sample)
        for rows in (4, 6):
            for _ in range(EAGER + 1):
                assert torch.equal(call(torch.ones(rows, 4)), net(torch.ones(rows, 4)).sample)
        assert len(call.graphs) == 1


def test_what_cannot_be_recorded_is_evaluated(
    pretend_graphs: type[PretendGraph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning, once."""

    def fail(*arguments: Any) -> list:
        raise RuntimeError("operation not permitted\nwhen capturing")

    monkeypatch.setattr(graphs, "record", fail)
    call = ForwardGraphs(lambda x: 2 * x)
    assert all(torch.equal(call(torch.ones(3)), torch.full((3,), 2.0)) for _ in range(EAGER + 3))
    assert caplog.text.count("cannot be recorded as a graph (operation not permitted)") == 1


def test_on_a_cpu_nothing_is_recorded() -> None:
    net = Net()
    call = ForwardGraphs(net)
    assert all(call(torch.ones(2, 4)).sample.shape == (2, 4) for _ in range(EAGER + 2)) and not call.graphs
    trained = TrainingGraphs(net, net.parameters())
    trained(torch.ones(2, 4)).sample.sum().backward()
    assert trained.graph is None and net.linear.weight.grad is not None


def test_models_that_do_not_evaluate_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "KIND", "cpu")
    model = make_denoiser()
    assert evaluates_alike(model) and not weights_move(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert weights_move(model)
    model.blocks[0].compile()
    assert not evaluates_alike(model) and not weights_move(model)
    model = make_denoiser()
    handle = model.blocks[0].register_forward_hook(lambda *arguments: None)
    assert not evaluates_alike(model)
    handle.remove()
    assert evaluates_alike(model)
    model._hf_peft_config_loaded = True
    assert not evaluates_alike(model)
    model = make_denoiser()
    model.blocks[0]._hf_hook = None
    assert weights_move(model) and not evaluates_alike(model)
    before = places(model)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert places(model) == before
    next(model.parameters()).data = next(model.parameters()).data.clone()
    assert places(model) != before


@pytest.mark.gpu
def test_each_replay_draws_anew() -> None:
    """Dropout differs from call to call, follows the seed, and is that of the operations one by one."""
    drawn = {}
    for replayed in (False, True):
        torch.manual_seed(0)
        net = Net().cuda()
        call = TrainingGraphs(net, net.parameters()) if replayed else net
        drawn[replayed] = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            for _ in range(2):
                result = call(torch.ones(64, 4, device="cuda")).sample
                result.sum().backward()
                drawn[replayed].append(result.detach().clone())
        first, second, again, *_, other = drawn[replayed]
        assert torch.equal(first, again)
        assert not torch.equal(first, second) and not torch.equal(second, other)
    assert all(torch.equal(a, b) for a, b in zip(*drawn.values()))
