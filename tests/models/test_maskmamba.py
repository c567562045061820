"""MaskMamba: every token sees every other, conditions in the middle, layouts, gradients, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch

from genssm.models import MaskMamba
from tests.models.common import randomise

SMALL = {
    "sample_size": [3, 4], "vocab_size": 20, "num_classes": 5, "hidden_size": 32, "num_layers": 4, "d_state": 4,
    "num_heads": 4,
}  # fmt: skip
LAYOUTS = ["mamba", "alternate", "second_half"]


def make_model(**changes: Any) -> MaskMamba:
    torch.manual_seed(0)
    return randomise(MaskMamba(**{**SMALL, **changes})).eval()


def codes_of(batch: int = 2) -> torch.Tensor:
    return torch.randint(21, (batch, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_sees_every_other(layout: str) -> None:
    model, codes = make_model(layout=layout), codes_of(1)
    with torch.no_grad():
        before = model(codes, torch.tensor([2])).logits
        assert before.shape == (1, 12, 20)
        for place in (0, 7, 11):
            changed = codes.clone()
            changed[0, place] = (changed[0, place] + 1) % 20
            after = model(changed, torch.tensor([2])).logits
            assert (after - before).abs().amax(dim=2).min() > 1e-6


def test_layouts() -> None:
    kinds = {
        layout: "".join(type(block.mixer).__name__[0] for block in make_model(layout=layout).blocks)
        for layout in LAYOUTS
    }
    assert kinds == {"mamba": "TTTT", "alternate": "TSTS", "second_half": "TTSS"}


def test_conditions(device: torch.device) -> None:
    model, codes = make_model(context_dim=6, context_length=3).to(device), codes_of().to(device)
    labels, text = torch.tensor([1, 4], device=device), torch.randn(2, 2, 6).to(device)
    with torch.no_grad():
        real = model(codes, labels, text).logits
        null = torch.full_like(labels, model.null_class_label)
        assert torch.equal(model(codes, None, text).logits, model(codes, null, text).logits)
        assert not torch.allclose(model(codes, None, text).logits, real, atol=1e-4)
        assert not torch.allclose(model(codes, labels).logits, real, atol=1e-4)
        alone = torch.cat([model(codes[i : i + 1], labels[i : i + 1], text[i : i + 1]).logits for i in range(2)])
    torch.testing.assert_close(alone, real, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"layout": "mamba"}, {"context_dim": 6, "context_length": 3}], ids=str)
def test_gradients_reach_everything(changes: dict) -> None:
    model = make_model(**changes).train()
    text = torch.randn(2, 2, 6) if changes.get("context_dim") else None
    model(codes_of(), torch.tensor([1, 4]), text).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    results = []
    for recompute in (False, True):
        model = make_model().train()
        if recompute:
            model.enable_gradient_checkpointing()
        model(codes_of(), torch.tensor([1, 4])).logits.square().mean().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_save_and_load(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(MaskMamba.from_pretrained(tmp_path)(codes_of()).logits, model(codes_of()).logits)
    low = MaskMamba.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert low.blocks[0].mixer.A_log_b.dtype == torch.float32
    with torch.no_grad():
        exact, out = model(codes_of()).logits, low(codes_of()).logits
    assert (out.float() - exact).norm() < 0.1 * exact.norm()


def test_errors() -> None:
    with pytest.raises(ValueError, match="layout is 'odd'"):
        make_model(layout="odd")
    with pytest.raises(ValueError, match="needs an odd width"):
        make_model(d_conv=4)
    with pytest.raises(ValueError, match="num_heads=5 does not divide"):
        make_model(num_heads=5)
    with pytest.raises(ValueError, match=r"expected \(B, 12\)"):
        make_model()(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="reads no text"):
        make_model()(codes_of(), encoder_hidden_states=torch.zeros(2, 1, 6))
    with pytest.raises(ValueError, match="no classes"):
        make_model(num_classes=0)(codes_of(), torch.tensor([0, 1]))
