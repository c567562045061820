"""How many kernels a denoiser's block launches on a GPU, and how often it passes over its tokens, without numbers.

Counted under bfloat16 autocast in training mode. What autocast asks for is part of the count: one cast of every weight
and bias of a linear layer on the way forward and one of its gradient on the way back.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from genssm.kernels import dispatch
from genssm.models import DiM, DiMSUM, ZigMa
from tests.models.test_aim_launches import Launches

BATCH, WIDTH = 3, 64
OWN = ("genssm.", "aten.mm", "aten.addmm", "aten.bmm", "aten._scaled_dot_product")  # no plain passes over memory
COMMON = {"sample_size": 16, "in_channels": 3, "hidden_size": WIDTH, "d_state": 4}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "zigma": (ZigMa, {}),
    "zigma-text": (ZigMa, {"context_dim": 12}),
    "dimsum": (DiMSUM, {"attention_every": 0}),
    "dim": (DiM, {"num_classes": 5}),
}
# Launches of one block, forward and backward; for DiM of two, with a long skip between them.
LAUNCHES = {"zigma": (20, 28), "zigma-text": (31, 47), "dimsum": (78, 115), "dim": (42, 64)}
# Operations whose result has an element for each token and channel, forward.
PASSES = {
    "zigma": {},
    # heads, projections and cross attention copy nothing
    "zigma-text": {},
    # stochastic depth; modulation in frequency; activation of the MLP and its product; cells gathered and packed, and
    # both undone; the spatial half for its product; halves joined
    "dimsum": {"mul": 3, "add": 1, "gelu": 1, "clone": 4, "_to_copy": 1, "cat": 1},
    # stream and skip for their products, their sum, back in float32
    "dim": {"add": 1, "_to_copy": 3},
}


class Passes(Launches):
    """Counts also what passes over all tokens, and the layouts in which the norms get them."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: Counter[str] = Counter()
        self.layouts: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, before = str(func), self.found.total()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if name == "genssm.add_norm_fwd.default":
            self.layouts += [x is None or x.is_contiguous() for x in args[:2]]
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dim() > 2]
        if self.found.total() > before and max(sizes, default=0) > BATCH * 64 * WIDTH // 4 and not name.startswith(OWN):
            self.passes[name.split(".")[1]] += 1
        return result


def run(name: str, num_layers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Passes, Passes]:
    """What a model does forward and backward."""
    monkeypatch.setattr(dispatch, "_resolve", lambda *_: "triton")
    cls, changes = MODELS[name]
    model = cls(num_layers=num_layers, **{**COMMON, "patch_size": 2, **changes}).train()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({key: None if x is None else fake.from_tensor(x) for key, x in tensors.items()})
    forward, backward = Passes(), Passes()
    with fake:
        given: dict[str, Any] = {"hidden_states": torch.randn(BATCH, 3, 16, 16), "timestep": torch.rand(BATCH)}
        if changes.get("context_dim"):
            given["encoder_hidden_states"] = torch.randn(BATCH, 5, 12)
        if changes.get("num_classes"):
            given["class_labels"] = torch.zeros(BATCH, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16), forward:
            sample = model(**given).sample
        with backward:
            sample.float().square().mean().backward()
    return forward, backward


@pytest.mark.parametrize("name", MODELS)
def test_a_block_launches_no_more(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deeper model less a shallow one; where fewer come out, the numbers here are to be lowered."""
    pytest.importorskip("triton")
    layers = (3, 5) if name == "dim" else (3, 4)
    (before, before_back), (after, after_back) = (run(name, count, monkeypatch) for count in layers)
    forward, backward = after.found - before.found, after_back.found - before_back.found
    assert forward.total() <= LAUNCHES[name][0], forward
    assert backward.total() <= LAUNCHES[name][1], backward
    assert after.passes - before.passes == PASSES[name]
    # The stream keeps the layout that it begins with; another one would be copied by every norm.
    assert all(after.layouts)
