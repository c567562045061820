"""ZigMa, DiM and DiMSUM with the Mamba-2 mixer: what every denoiser must do, along one order and in two directions."""

from pathlib import Path

import pytest
import torch
from torch import nn

from genssm.layers import Mamba, Mamba2
from genssm.models import MODELS
from tests.models import common

MAMBA2 = {"mixer": "mamba2", "headdim": 8, "d_state": 4, "num_classes": 3}
ZIGMA = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "num_layers": 3, **MAMBA2}
DIM = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 16, "num_layers": 5, **MAMBA2}
DIMSUM = {
    "sample_size": 8, "in_channels": 3, "patch_size": 1, "hidden_size": 32, "num_layers": 4, "attention_every": 2,
    **MAMBA2,
}  # fmt: skip
VARIANTS = {
    "zigma": ("zigma", {**ZIGMA, "ngroups": 2}),
    "zigma, two directions": ("zigma", {**ZIGMA, "scan": "raster_bidirectional"}),
    "dim": ("dim", DIM),
    "dimsum": ("dimsum", DIMSUM),
    "dimsum, two directions": ("dimsum", {**DIMSUM, "scan": "bidirectional"}),
    "dimsum, one branch": ("dimsum", {**DIMSUM, "block_type": "wave"}),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    name, arguments = VARIANTS[variant]
    return MODELS[name](**{**arguments, **changes})


def make_inputs(batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 8, 8, generator=generator)
    return {"hidden_states": images, "timestep": torch.tensor([10.0, 700.0]), "class_labels": torch.tensor([0, 2])}


@each_variant
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    model = build(variant).eval()
    assert any(isinstance(module, Mamba2) for module in model.modules())
    assert not any(isinstance(module, Mamba) for module in model.modules())
    common.check_gradients_reach_everything(model, make_inputs())


@each_variant
def test_save_load(variant: str, tmp_path: Path) -> None:
    common.check_save_load(build(variant), make_inputs(), tmp_path)


@each_variant
def test_batch_of_two_is_two_batches_of_one(variant: str) -> None:
    common.check_batch_independent(build(variant), make_inputs())


@pytest.mark.parametrize("variant", ["zigma, two directions", "dim", "dimsum"])
def test_bf16(variant: str, tmp_path: Path) -> None:
    common.check_bf16(build(variant), make_inputs(), tmp_path)


@pytest.mark.parametrize("variant", ["zigma", "dim", "dimsum"])
def test_gradient_checkpointing(variant: str) -> None:
    common.check_gradient_checkpointing(build(variant), make_inputs())


def test_compile() -> None:
    common.check_compile(build("zigma, two directions", num_layers=2), make_inputs())


def test_untrained_blocks_start_where_the_other_mixer_starts() -> None:
    """Closed gates of ZigMa, zero output of DiMSUM."""
    inputs = make_inputs()
    model = build("zigma").eval()
    plain = build("zigma", mixer="mamba", headdim=None, ngroups=None).eval()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if ".mixer." not in n}, strict=False)
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, plain(**inputs).sample)
        assert not build("dimsum")(**inputs).sample.any()


@pytest.mark.parametrize("variant", ["zigma", "zigma, two directions", "dim", "dimsum", "dimsum, two directions"])
def test_mixers_walk_along_the_orders_of_their_blocks(variant: str) -> None:
    seen = {}
    model = build(variant).eval()
    twin = build(
        variant, mixer="mamba", headdim=None, ngroups=None
    ).eval()  # the same orders reach the mixers of both kinds
    for key, network in (("mamba2", model), ("mamba", twin)):
        seen[key] = []
        for module in network.modules():
            if isinstance(module, Mamba | Mamba2):
                module.register_forward_pre_hook(lambda _, args, to=seen[key]: to.append(args[1].clone()))
        with torch.no_grad():
            network(**make_inputs())
    assert len(seen["mamba"]) == len(seen["mamba2"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(seen["mamba"], seen["mamba2"]))
    for order in seen["mamba2"]:
        assert torch.equal(order.sort().values, torch.arange(order.shape[-1]).expand(order.shape).to(order))


def test_the_default_is_unchanged() -> None:
    for name in ("zigma", "dim", "dimsum"):
        arguments = {k: v for k, v in VARIANTS[name][1].items() if k not in ("mixer", "headdim", "ngroups")}
        model = MODELS[name](**arguments)
        assert model.config.mixer == "mamba"
        assert not any(isinstance(module, Mamba2) for module in model.modules())


@pytest.mark.parametrize("name", ["zigma", "dim", "dimsum"])
def test_options_of_the_other_mixer_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="mixer is 'mamba3'; expected one of mamba, mamba2"):
        build(name, mixer="mamba3")
    with pytest.raises(ValueError, match="headdim and ngroups are options of mixer 'mamba2'"):
        build(name, mixer="mamba")
    with pytest.raises(ValueError, match="dt_rank is 4, an option of mixer 'mamba'"):
        build(name, dt_rank=4)
    with pytest.raises(ValueError, match="headdim is 7; expected"):
        build(name, headdim=7)
