"""Motion Mamba on latents and on frames: what every denoiser does, ablations, counted sizes, lengths, long input."""

from pathlib import Path

import pytest
import torch

from genssm.convert import load_published
from genssm.layers.isolated_scans import IsolatedScans, scan_counts, two_ways
from genssm.models import MODELS, MOTION_MAMBA_PRESETS, MotionMamba, MotionMambaFrames
from tests.models import common

SMALL = {"hidden_size": 16, "num_layers": 5, "d_state": 4, "num_heads": 2, "ff_size": 24, "context_dim": 12,
         "dropout": 0.0}  # fmt: skip
FRAMES = {"in_channels": 7, "hidden_size": 16, "num_layers": 5, "d_state": 4, "channel_group": 8, "context_dim": 12}


def make(**changes: object) -> MotionMamba:
    torch.manual_seed(0)
    return MotionMamba(**{**SMALL, **changes})


def make_frames(**changes: object) -> MotionMambaFrames:
    torch.manual_seed(0)
    return MotionMambaFrames(**{**FRAMES, **changes})


def inputs(batch: int = 2, tokens: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, tokens, 16, generator=generator),
        "timestep": torch.tensor([10.0, 900.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, 1, 12, generator=generator),
    }


def frame_inputs(frames: int = 20, lengths: tuple[int, int] = (20, 13)) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, frames, 7, generator=generator),
        "timestep": torch.tensor([10.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 3, 12, generator=generator),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "lengths": torch.tensor(lengths),
    }


MAKERS = {"latent": (make, inputs), "frame": (make_frames, frame_inputs)}


@pytest.fixture(params=MAKERS)
def case(request: pytest.FixtureRequest) -> tuple:
    maker, given = MAKERS[request.param]
    return maker(), given()


def test_gradients_reach_everything(case) -> None:
    common.check_gradients_reach_everything(*case)


def test_save_load(case, tmp_path: Path) -> None:
    common.check_save_load(*case, tmp_path)


def test_batch_independent(case) -> None:
    common.check_batch_independent(*case)


def test_bf16(case, tmp_path: Path) -> None:
    common.check_bf16(*case, tmp_path)


def test_gradient_checkpointing(case) -> None:
    common.check_gradient_checkpointing(*case)


def test_lora(case, tmp_path: Path) -> None:
    common.check_lora(*case, tmp_path, ["in_proj", "out_proj"])


def test_compile() -> None:
    common.check_compile(make(num_layers=3), inputs())


def test_devices_agree(case, device: torch.device) -> None:
    """Output and gradients as on the CPU, where the scans run in plain PyTorch."""
    model, given = case
    expected = common.gradients(common.randomise(model).eval(), given)
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    with torch.no_grad():
        sample = model(**given).sample
    found = common.gradients(model.to(device), moved)
    with torch.no_grad():
        torch.testing.assert_close(model(**moved).sample.cpu(), sample, rtol=1e-3, atol=1e-4)
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[name].cpu() / scale, gradient / scale, rtol=1e-3, atol=2e-3)


@pytest.mark.gpu
def test_one_graph_on_a_gpu() -> None:
    """``sample.py --compile``: all kernels of an evaluation in one CUDA graph, with the same result."""
    model = common.randomise(make()).eval().cuda()
    given = {key: value.cuda() for key, value in inputs().items()}
    with torch.no_grad():
        expected = model(**given).sample
        model.compile(mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            sample = model(**given).sample.clone()
    torch.testing.assert_close(sample, expected, rtol=1e-3, atol=1e-4)


# What the design notes count, in millions.
@pytest.mark.parametrize(
    ("preset", "millions"), [("paper", 5.98), ("expand2", 9.38), ("literal11", 14.6), ("literal11_expand2", 25.0)]
)
def test_presets_have_the_counted_sizes(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = MotionMamba(**MOTION_MAMBA_PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.005 if millions < 10 else 0.05
    )


def test_a_layer_has_a_quarter_of_an_encoder_layer() -> None:
    """The paper's claim of 75 percent fewer parameters; 789,760 is MLD's layer."""
    with torch.device("meta"):
        model = MotionMamba()
    layer = model.input_blocks[-1].htm  # one scan
    assert sum(p.numel() for p in model.middle_block.parameters()) == 789_760
    assert sum(p.numel() for p in layer.parameters()) / 789_760 == pytest.approx(0.277, abs=0.002)


def test_scan_plans() -> None:
    assert scan_counts("2N-1..1", 5) == [9, 7, 5, 3, 1]
    assert scan_counts("1..2N-1", 5) == [1, 3, 5, 7, 9]
    assert scan_counts("N..1", 3) == [3, 2, 1] and scan_counts("1..N", 3) == [1, 2, 3]
    model = make(scan_plan=[2, 5])
    assert [block.htm.scans.scans for block in (*model.input_blocks, *model.output_blocks)] == [2, 5, 5, 2]
    with pytest.raises(ValueError, match="2 positive numbers"):
        make(scan_plan=[1, 2, 3])


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_plan": "1..N"},
        {"bi_scan": "layer"},
        {"bi_scan": "single"},
        {"latent_tokens": 5},
        {"num_layers": 3, "expand": 2, "bsm_width": 8},
        {"block_residual": True},
        {"condition_first": False},
        {"aggregate": "concat"},
        {"htm_gate": False},
        {"norm": "rms"},
        {"context_dim": 0, "num_classes": 4},
        {"context_dim": 16},
        {"sine_first": True, "time_shift": 1.0},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_ablations(changes: dict) -> None:
    model = make(**changes)
    given = inputs(tokens=changes.get("latent_tokens", 2))
    if changes.get("context_dim") == 0:
        given["encoder_hidden_states"], given["class_labels"] = None, torch.tensor([1, 3])
    elif "context_dim" in changes:
        given["encoder_hidden_states"] = torch.randn(2, 1, changes["context_dim"])
    common.check_gradients_reach_everything(model, given)
    with torch.no_grad():
        reference = common.randomise(make()).eval()(**inputs()).sample
        sample = model.eval()(**given).sample
    assert sample.shape == given["hidden_states"].shape
    assert sample.shape != reference.shape or not torch.allclose(sample, reference, atol=1e-4), (
        "the option does nothing"
    )


def test_directions_alternate_from_layer_to_layer() -> None:
    model = make(bi_scan="layer")
    assert [b.bsm.directions for b in (*model.input_blocks, *model.output_blocks)] == ["forward", "backward"] * 2
    assert {b.bsm.directions for b in make(bi_scan="single").input_blocks} == {"forward"}


def test_condition_first_lets_the_scans_carry_text() -> None:
    """HTM is causal: only with the condition in front does a change of the text reach the latents through it."""
    x = torch.randn(1, 4, 16)
    htm = common.randomise(make()).input_blocks[0].htm.eval()
    changed = x.clone()
    changed[:, 1] += 1.0
    with torch.no_grad():
        difference = (htm(changed) - htm(x)).abs().amax(dim=(0, 2))
    assert difference[0] == 0 and (difference[1:] > 0).all()


def test_k_scans_are_one_call_of_each_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from genssm.kernels.isolated_scans import reference

    calls = []
    for name in ("causal_conv1d", "selective_scan"):
        function = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, name=name, f=function, **k: calls.append(name) or f(*a, **k))
    make(scan_plan=[9, 1]).input_blocks[0].htm(torch.randn(1, 4, 16))
    assert calls == ["causal_conv1d", "selective_scan"]


def test_isolated_scans_equal_separate_ones() -> None:
    torch.manual_seed(0)
    together = common.randomise(IsolatedScans(6, 3, d_state=4, dt_rank=2))
    x, z = torch.randn(2, 9, 6), torch.randn(2, 9, 6)
    parts = []
    for k in range(3):
        single = IsolatedScans(6, 1, d_state=4, dt_rank=2)
        taps = slice(6 * k, 6 * k + 6)
        state = {
            name: value[taps if "conv1d" in name else slice(k, k + 1)] for name, value in together.state_dict().items()
        }
        single.load_state_dict(state)
        parts.append(single(x, z))
    torch.testing.assert_close(together(x, z), sum(parts), rtol=1e-5, atol=1e-5)


def test_backward_scans_mirror_forward_ones() -> None:
    torch.manual_seed(0)
    scans = IsolatedScans(4, 2, d_state=3, dt_rank=1)
    with torch.no_grad():
        for name, parameter in scans.named_parameters():
            half = 4 if "conv1d" in name else 1
            parameter[half:] = parameter[:half]
    x = torch.randn(1, 7, 4)
    both = scans(x, orders=two_ways(7, x.device), reduce="none")  # (1, 2, 7, 4)
    mirrored = scans(x.flip(1), orders=two_ways(7, x.device), reduce="none").flip(2)
    torch.testing.assert_close(both[:, 0], mirrored[:, 1])


@pytest.mark.parametrize("patch_size", [1, 4])
def test_padding_changes_nothing(patch_size: int) -> None:
    model, given = common.randomise(make_frames(patch_size=patch_size)).eval(), frame_inputs()
    poisoned = given["hidden_states"].clone()
    poisoned[1, 13:] = torch.nan
    with torch.no_grad():
        sample = model(**given).sample
        assert torch.equal(model(**{**given, "hidden_states": poisoned}).sample, sample)
        assert (sample[1, 13:] == 0).all()
        alone = model(
            given["hidden_states"][1:, :13], 900.0, given["encoder_hidden_states"][1:, :2], lengths=[13]
        ).sample
    torch.testing.assert_close(sample[1:, :13], alone, rtol=1e-5, atol=1e-5)


def test_every_frame_reads_every_frame() -> None:
    model, given = common.randomise(make_frames()).eval(), frame_inputs(lengths=(20, 20))
    x = given["hidden_states"].clone().requires_grad_()
    for frame in (0, 19):
        (gradient,) = torch.autograd.grad(model(**{**given, "hidden_states": x}).sample[0, frame].sum(), x)
        assert (gradient[0].abs().amax(dim=1) > 0).all() and (gradient[1] == 0).all()


def test_thousands_of_frames_in_one_call() -> None:
    model = common.randomise(make_frames(patch_size=4, num_layers=3)).eval()
    with torch.no_grad():
        sample = model(torch.randn(1, 6001, 7), 500.0, torch.randn(1, 1, 12)).sample
    assert sample.shape == (1, 6001, 7) and sample.isfinite().all()


def test_class_labels_on_frames() -> None:
    model = make_frames(context_dim=0, num_classes=3)
    given = {
        "hidden_states": torch.randn(2, 6, 7),
        "timestep": torch.tensor([500.0, 20.0]),
        "class_labels": torch.tensor([0, 2]),
    }
    common.check_null_class(model, given)
    assert MODELS["motion_mamba_frames"] is MotionMambaFrames


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_states": torch.zeros(2, 3, 16)}, r"takes \(B, 2, 16\)"),
        ({"encoder_hidden_states": torch.zeros(2, 4, 12)}, "pool the text"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states are missing"),
        ({"class_labels": torch.tensor([0, 1])}, "has no classes"),
        ({"timestep": torch.zeros(3)}, "timestep has shape"),
    ],
)
def test_wrong_inputs(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(**{**inputs(), **given})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, "odd number"),
        ({"scan_plan": "9..1"}, "scan_plan"),
        ({"bi_scan": "both"}, "bi_scan"),
        ({"num_classes": 3}, "give one"),
        ({"dt_rank": "many"}, "dt_rank"),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_wrong_frame_lengths() -> None:
    with pytest.raises(ValueError, match=r"lengths are 13\.\.21"):
        make_frames()(**{**frame_inputs(), "lengths": torch.tensor([21, 13])})


def test_converter_refuses_other_weights() -> None:
    with pytest.raises(ValueError, match="not a Motion Mamba's"):
        load_published("motion_mamba", {"x": torch.zeros(1)})
