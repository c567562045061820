"""Shuffled scan orders while training: the function of moved tokens, nothing outside of training."""

from pathlib import Path

import pytest
import torch
from torch import nn

from genssm.models import MODELS
from genssm.training.layer_shuffle import shuffle_layers
from tests.training.conftest import largest_difference, metrics, run_train, weights

SMALL = {"sample_size": 8, "in_channels": 1, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_classes": 3}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name](**SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def answer(model: nn.Module, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(torch.ones(2, 1, 8, 8), torch.full((2,), 300.0), torch.tensor([0, 2])).sample


@pytest.mark.parametrize("name", ["zigma", "dim", "dimsum"])
def test_while_training_and_never_else(name: str) -> None:
    model = make(name)
    model.eval()
    before = answer(model, 1)
    assert shuffle_layers(model, 0.9) == 3
    assert torch.equal(answer(model, 1), before)
    model.train()
    answers = [answer(model, seed) for seed in (1, 1, 2, 3)]
    assert torch.equal(answers[0], answers[1])
    assert any(not torch.equal(answers[0], other) for other in answers[2:])
    answers[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_equals_moved_tokens() -> None:
    """A block with the order shuffled by p, and the block on tokens moved by p with its own order, then moved back."""
    block = make("zigma").blocks[1].eval()
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    order = torch.randperm(16).int()
    moved = torch.randperm(16)
    by_order = block(x, c, moved.int()[order.long()], 1, None, None)
    by_tokens = torch.empty_like(x)
    by_tokens[:, moved] = block(x[:, moved], c, order, 1, None, None)
    torch.testing.assert_close(by_order, by_tokens)


def test_later_blocks_shuffle_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("zigma").train()
    seen: dict[int, int] = dict.fromkeys(range(3), 0)
    plain = make("zigma").train()
    orders = []
    for i, block in enumerate(plain.blocks):
        block.register_forward_pre_hook(lambda _, arguments, i=i: orders.append(arguments[2].clone()))
    answer(plain, 0)
    shuffle_layers(model, 0.9)
    for i, block in enumerate(model.blocks):

        def count(_: nn.Module, arguments: tuple, i: int = i) -> None:
            assert sorted(arguments[2].tolist()) == list(range(16))
            seen[i] += not torch.equal(arguments[2], orders[i])

        block.register_forward_pre_hook(count)
    for seed in range(100):
        answer(model, seed)
    assert 15 < seen[0] < 45 < seen[1] < 75 < seen[2] <= 100


def test_nothing_to_shuffle() -> None:
    with pytest.raises(ValueError, match="no block of a Linear has a scan order"):
        shuffle_layers(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_run_with_it(straight: Path, tmp_path: Path, checkpointing: str) -> None:
    """It learns, repeats bitwise whether blocks are recomputed or not, and differs from a run without."""
    options = ("train.layer_shuffle=0.5", f"train.gradient_checkpointing={checkpointing}", "train.max_train_steps=12")
    run = run_train(tmp_path / "run", *options)
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"]
    other = run_train(tmp_path / "other", "train.layer_shuffle=0.5", "train.max_train_steps=12")
    assert largest_difference(weights(run, 12), weights(other, 12)) < 1e-6
    plain = run_train(tmp_path / "plain", "train.max_train_steps=12")
    assert largest_difference(weights(run, 12), weights(plain, 12)) > 1e-4
    with pytest.raises(ValueError, match=r"train\.compile=false"):
        run_train(tmp_path / "third", "train.layer_shuffle=0.5", "train.compile=true")
