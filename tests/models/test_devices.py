"""Every model on an accelerator that is not there: forward and backward touch one device, and the host waits for none.

See :mod:`tests.fake_device`. A tensor that stays on the CPU, or a number that the host asks for, fails here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from genssm.models import (
    MLD,
    AiM,
    DiM,
    DiMSUM,
    MaskMamba,
    MotionAlignment,
    MotionMamba,
    MotionMambaFrames,
    MotionVAE,
    TextEncoder,
    VQTokenizer,
    ZigMa,
)
from genssm.pipelines.token_decoding import TokenDecoder
from genssm.pipelines.token_sampling import TokenSampling
from tests.fake_device import CUDA, DIFFERENTIABLE, Copies, fake_device, place
from tests.models import (
    test_aim,
    test_dim,
    test_dimsum,
    test_maskmamba,
    test_mld,
    test_motion_mamba,
    test_packing,
    test_vq,
    test_zigma,
)

MAMBA2 = {"mixer": "mamba2", "headdim": 16}
Inputs = Callable[[nn.Module], dict[str, Any]]


def of(tensors: dict[str, Any]) -> Inputs:
    return lambda model: tensors


def frames_with_classes(model: nn.Module) -> dict[str, Any]:
    given = test_motion_mamba.frame_inputs()
    del given["encoder_hidden_states"]
    return {**given, "class_labels": torch.tensor([0, 1])}


# Name -> constructor, its arguments, inputs for it.
CASES: dict[str, tuple[type[nn.Module], dict[str, Any], Inputs]] = {
    f"{tests.__name__.split('_')[-1]}-{name}": (cls, {**tests.SMALL, **variant, **more}, tests.make_inputs)
    for cls, tests in ((ZigMa, test_zigma), (DiM, test_dim), (DiMSUM, test_dimsum))
    for name, variant, more in [
        *((name, variant, {}) for name, variant in tests.VARIANTS.items()),
        ("mamba2", next(iter(tests.VARIANTS.values())), MAMBA2),
    ]
}
CASES |= {
    f"aim-{number}": (AiM, {**test_aim.SMALL, **variant}, test_aim.inputs_of)
    for number, variant in enumerate(test_aim.VARIANTS)
}
CASES |= {
    f"maskmamba-{layout}": (
        MaskMamba, {**test_maskmamba.SMALL, "layout": layout, "context_dim": 6},
        of({"codes": test_maskmamba.codes_of()}),
    )
    for layout in test_maskmamba.LAYOUTS
}  # fmt: skip
CASES |= {
    "mld": (MLD, {**test_mld.SMALL, "context_dim": 12}, of(test_mld.latents())),
    "mld-frames": (
        MLD, {**test_mld.SMALL, "context_dim": 12, "in_channels": 7, "arch": "decoder", "pos_embed": "sinusoidal"},
        of(test_mld.frames()),
    ),
    "motion_vae": (
        MotionVAE, {**test_mld.SMALL, "in_channels": 7, "mlp_dist": True},
        of({"features": torch.randn(2, 9, 7), "lengths": torch.tensor([9, 5]), "noise": torch.randn(2, 2, 16)}),
    ),
    "motion_mamba": (MotionMamba, test_motion_mamba.SMALL, of(test_motion_mamba.inputs())),
    "motion_mamba_frames": (MotionMambaFrames, test_motion_mamba.FRAMES, of(test_motion_mamba.frame_inputs())),
    "motion_mamba_frames-classes": (
        MotionMambaFrames, {**test_motion_mamba.FRAMES, "context_dim": 0, "num_classes": 3, "patch_size": 2},
        frames_with_classes,
    ),
    "vq": (VQTokenizer, {**test_vq.SMALL, "entropy_weight": 0.1}, of({"images": torch.rand(2, 1, 8, 12)})),
    "text_encoder": (
        TextEncoder, {"vocab_size": 9, "hidden_size": 8, "num_layers": 1},
        of({"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 5)}),
    ),
    "alignment": (
        MotionAlignment, {"in_channels": 7, "context_dim": 12, "embed_dim": 8},
        of({"text": torch.randn(2, 12), "motion": torch.randn(2, 16, 7), "lengths": torch.tensor([16, 9])}),
    ),
}  # fmt: skip
each_model = pytest.mark.parametrize("name", CASES)


def result_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The tensor that a loss would start from."""
    output = model(**inputs)
    names = ("sample", "logits", "last_hidden_state")
    return next((output[name] for name in names if name in output), None) if isinstance(output, dict) else output[1]


@each_model
def test_one_device_throughout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved to a device, or made on it, a model leaves nothing on the CPU; it computes without it, backwards too."""
    cls, arguments, inputs = CASES[name]
    # The device that can be differentiated on knows neither the backward of a group norm nor an FFT.
    device = CUDA if name in ("vq", "dimsum-einfft") else DIFFERENTIABLE
    model = cls(**arguments).train()
    given = inputs(model)
    with fake_device(monkeypatch, device):
        model.to(device)
        with device:
            made = cls(**arguments)
        for each in (model, made):
            assert {x.device for x in (*each.parameters(), *each.buffers())} == {device}
        given = place(given, device)
        with Copies() as copies:
            result = result_of(model, given)
        assert result.device == device
        assert copies.seen == []
        if device == DIFFERENTIABLE:
            result.float().square().mean().backward()
            assert {p.grad.device for p in model.parameters() if p.grad is not None} == {device}


@pytest.mark.parametrize("of_clips", [False, True])
def test_packed_samples(of_clips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of many sizes in one row: where each lies is told to the device, and no sample comes back to the host."""
    model = test_packing.make_motion_model("text") if of_clips else test_packing.make_model("text")
    shapes = [(length, 5) for length in test_packing.CLIP_LENGTHS] if of_clips else [(3, 8, 8), (3, 4, 12), (3, 2, 2)]
    given = test_packing.make_inputs(model, shapes)
    with fake_device(monkeypatch, DIFFERENTIABLE):
        model.to(DIFFERENTIABLE)
        results = model(**place(given, DIFFERENTIABLE)).sample
        assert [(tuple(x.shape), x.device) for x in results] == [(shape, DIFFERENTIABLE) for shape in shapes]
        sum(x.square().mean() for x in results).backward()


@pytest.mark.parametrize("cls", [ZigMa, DiM, DiMSUM])
def test_other_sizes_and_null_conditions(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of another input size are made once, on the device, and labels that are not given too."""
    tests = {ZigMa: test_zigma, DiM: test_dim, DiMSUM: test_dimsum}[cls]
    model = cls(**{**tests.SMALL, "num_classes": 5, "context_dim": 12}).eval()
    given = {"hidden_states": torch.randn(2, 3, 8, 16), "timestep": 1.0}
    with fake_device(monkeypatch):
        model.to(CUDA)
        given = place(given, CUDA)
        model(**given)
        with Copies() as copies:
            assert model(**given).sample.device == CUDA
    # the time alone comes from the host
    assert len(copies.seen) <= 1


@pytest.mark.parametrize(
    ("variant", "sampling"),
    [(variant, TokenSampling(0.7, top_k=5, top_p=0.9)) for variant in test_aim.VARIANTS]
    + [(test_aim.VARIANTS[0], TokenSampling()), (test_aim.VARIANTS[0], TokenSampling(0.0))],
    ids=str,
)
def test_a_captured_step_asks_the_host_nothing(
    variant: dict[str, Any], sampling: TokenSampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the CUDA graph of :class:`TokenDecoder` records: no copy from or to the host, no value that it must know."""
    model = AiM(**{**test_aim.SMALL, **variant}).eval()
    given = {key: torch.cat([x, x]) for key, x in test_aim.inputs_of(model, length=3).items()}
    with fake_device(monkeypatch), torch.no_grad():
        model.to(CUDA)
        given = place(given, CUDA)
        codes = given.pop("codes")[:2]
        decoder = TokenDecoder(model, 2, True, sampling, CUDA)
        uniform, scales = torch.zeros(2, 12, device=CUDA), torch.ones(12, device=CUDA)
        assert decoder.begin(given, codes, uniform, scales) == 4
        with Copies() as copies:
            decoder.step()
            decoder._start(codes[:, :0], given)
        assert copies.seen == []
        assert decoder.codes.device == CUDA
