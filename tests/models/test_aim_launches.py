"""How many kernels a decoding step of AiM launches on a GPU, counted on tensors without numbers."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from genssm.kernels import dispatch
from genssm.models import AiM

FREE = ("prim.device", "aten.empty", "aten._unsafe_view", "aten.detach")


class Launches(TorchDispatchMode):
    """Counts the kernels of every op that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func)
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and not name.startswith(FREE):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def step(num_layers: int, **changes: Any) -> Counter[str]:
    """Kernels of one step with bfloat16 weights."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model = AiM(
            sample_size=4, vocab_size=20, num_classes=5, hidden_size=64, num_layers=num_layers, d_state=16, headdim=16,
            **changes,
        )  # fmt: skip
        cache = model.new_cache(2)
        cache.begun = True
        codes = torch.zeros(2, 1, dtype=torch.int64)
        with Launches() as launches:
            model(codes, cache=cache)
    return launches.found


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that Triton would run on, and weights that are born in bfloat16: fake ones cannot be cast later."""
    pytest.importorskip("triton")
    monkeypatch.delenv("GENSSM_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_capability", lambda index: (9, 0))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("fake_gpu")
def test_launches_of_a_layer() -> None:
    """Norm and modulation with the update before them, two projections, the step, norm behind the gate.

    The MLP adds norm, two projections, and its activation and product.
    """
    for changes in ({}, {"num_groups": 2}):
        layer = step(3, **changes) - step(2, **changes)
        assert layer == {"genssm.add_norm_fwd.default": 2, "aten.mm.default": 2, "genssm.mamba2_step.default": 1}
    with_mlp = step(3, mlp_hidden=128) - step(2, mlp_hidden=128)
    assert with_mlp - layer == {
        "genssm.add_norm_fwd.default": 1, "aten.mm.default": 2, "aten.silu.default": 1, "aten.mul.Tensor": 1
    }  # fmt: skip


@pytest.mark.usefixtures("fake_gpu")
def test_launches_around_the_layers() -> None:
    """Rows of two tables, one widened; the last two norms, logits, and the position that moves on."""
    assert (step(1) - (step(2) - step(1))).total() <= 7
