"""Samples packed into one row: outputs and gradients are those of each sample alone."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from genssm.models import MotionMambaFrames, ZigMa
from tests.models import common

SMALL = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "d_state": 4}
SIZES = ((8, 8), (4, 12), (2, 2), (10, 6), (8, 8))  # the third is a single token
IMAGES = {
    "zigzag": {"num_layers": 9},
    "classes": {"scan": "hilbert", "num_classes": 3},
    "text": {"scan": "sweep", "context_dim": 6, "pos_embed": "sincos2d_fixed"},
    "two_directions": {"scan": "raster_bidirectional", "num_classes": 3, "pos_embed": "none"},
    "data_at_one": {"scan": "random", "norm": "layer", "time_convention": "data_at_one"},
    "mamba2": {"mixer": "mamba2", "headdim": 16, "scan": "local", "num_classes": 3},
    "mamba2_text": {"mixer": "mamba2", "headdim": 16, "scan": "raster_bidirectional", "context_dim": 6},
}
CLIP_LENGTHS = (9, 1, 16, 30)
CLIPS = {
    "frames": {"patch_size": 1, "num_classes": 3, "context_dim": 0},
    "patches": {"patch_size": 4, "context_dim": 0},
    "text": {"patch_size": 4, "context_dim": 6},
}


def make_model(variant: str, **changes: object) -> ZigMa:
    torch.manual_seed(0)
    return common.randomise(ZigMa(**{**SMALL, **IMAGES[variant], **changes})).eval()


def make_motion_model(variant: str) -> MotionMambaFrames:
    torch.manual_seed(0)
    sizes = {"in_channels": 5, "hidden_size": 32, "num_layers": 3, "scan_plan": [2], "d_state": 4, "channel_group": 8}
    return common.randomise(MotionMambaFrames(**sizes, **CLIPS[variant])).eval()


def make_inputs(model: nn.Module, shapes: Sequence[tuple[int, ...]]) -> dict:
    """A list of samples, with a condition for each."""
    generator = torch.Generator().manual_seed(1)
    count = len(shapes)
    inputs = {
        "hidden_states": [torch.randn(shape, generator=generator) for shape in shapes],
        "timestep": 1000 * torch.rand(count, generator=generator),
    }
    if model.config.num_classes:
        inputs["class_labels"] = torch.arange(count) % (model.config.num_classes + 1)  # the null class, too
    return common.with_text(inputs, model)


def alone(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    """What the model says of each sample by itself."""
    samples, conditions = inputs["hidden_states"], {k: v for k, v in inputs.items() if k != "hidden_states"}
    return [
        model(sample[None], **common.rows(conditions, slice(i, i + 1))).sample[0] for i, sample in enumerate(samples)
    ]


def check_packed(model: nn.Module, inputs: dict) -> None:
    """Outputs, gradients of the parameters and gradients of the samples."""
    results = []
    for answer in (alone, lambda model, inputs: model(**inputs).sample):
        model.zero_grad(set_to_none=True)
        samples = [sample.clone().requires_grad_() for sample in inputs["hidden_states"]]
        outputs = answer(model, {**inputs, "hidden_states": samples})
        sum(output.square().mean() for output in outputs).backward()
        named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        named |= {f"gradient of sample {i}": sample.grad for i, sample in enumerate(samples)}
        named |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append(named)
    expected, got = results
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            got[name] / scale, value / scale, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("variant", IMAGES)
def test_images_as_alone(variant: str, device: torch.device) -> None:
    model = make_model(variant)
    inputs = make_inputs(model, [(3, *size) for size in SIZES])
    inputs = {k: [x.to(device) for x in v] if isinstance(v, list) else v.to(device) for k, v in inputs.items()}
    check_packed(model.to(device), inputs)


@pytest.mark.parametrize("variant", CLIPS)
def test_clips_as_alone(variant: str, device: torch.device) -> None:
    model = make_motion_model(variant)
    inputs = make_inputs(model, [(length, 5) for length in CLIP_LENGTHS])
    inputs = {k: [x.to(device) for x in v] if isinstance(v, list) else v.to(device) for k, v in inputs.items()}
    check_packed(model.to(device), inputs)


def test_without_conditions() -> None:
    """None means the null class or text of every image, one number the time of all."""
    for variant in ("classes", "text"):
        model = make_model(variant)
        images = make_inputs(model, [(3, *size) for size in SIZES])["hidden_states"]
        with torch.no_grad():
            packed = model(images, 300.0, return_dict=False)[0]
            for image, got in zip(images, packed):
                torch.testing.assert_close(got, model(image[None], 300.0).sample[0], rtol=1e-5, atol=1e-5)


def test_stochastic_depth_drops_images_not_rows() -> None:
    """Images of one size: the draws of a batch and of a pack are the same."""
    model = make_model("classes", drop_path=0.5).train()
    inputs = make_inputs(model, [(3, 8, 8)] * 6)
    torch.manual_seed(3)
    packed = torch.stack(model(**inputs).sample)
    torch.manual_seed(3)
    batch = model(**{**inputs, "hidden_states": torch.stack(inputs["hidden_states"])}).sample
    torch.testing.assert_close(packed, batch, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(batch, model.eval()(**inputs).sample[0], atol=1e-3)


def test_gradient_checkpointing() -> None:
    model = make_model("text")
    inputs = make_inputs(model, [(3, *size) for size in SIZES])
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        sum(output.square().mean() for output in model(**inputs).sample).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.enable_gradient_checkpointing()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_compiled_blocks_serve_other_packs() -> None:
    """A few graphs of the block, whatever images a row holds, also in training."""
    model = make_model("text", num_layers=1, drop_path=0.5).train()
    packs = [make_inputs(model, [(3, *size) for size in SIZES[:n] * 2]) for n in range(1, 6)]

    def losses() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [sum(output.square().mean() for output in model(**inputs).sample) for inputs in packs]

    expected = losses()
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    got = losses()
    sum(got).backward()
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_refusals() -> None:
    model = make_model("classes")
    image = torch.zeros(3, 4, 4)
    with pytest.raises(ValueError, match="empty list"):
        model([], 1.0)
    with pytest.raises(ValueError, match=r"image 1 of the list has shape \(1, 4, 4\); expected \(3, H, W\)"):
        model([image, image[:1]], 1.0)
    with pytest.raises(ValueError, match="5x4 but patch_size is 2"):
        model([image, torch.zeros(3, 5, 4)], 1.0)
    with pytest.raises(ValueError, match="expected one number or"):
        model([image, image], torch.zeros(3))
    with pytest.raises(ValueError, match="one per sample"):
        model([image, image], 1.0, torch.tensor([1]))
    video = ZigMa(**SMALL, num_frames=2)
    with pytest.raises(ValueError, match="clips are not packed"):
        video([torch.zeros(2, 3, 8, 8)], 1.0)
    fixed = ZigMa(**SMALL, scan=[list(range(16))])
    with pytest.raises(ValueError, match="explicit paths fix the input size"):
        fixed([image], 1.0)
    motion = make_motion_model("patches")
    with pytest.raises(ValueError, match="lengths are for padded clips"):
        motion([torch.zeros(4, 5)], 1.0, lengths=[4])
    with pytest.raises(ValueError, match="empty list"):
        motion([], 1.0)
    with pytest.raises(ValueError, match=r"clip 0 of the list has shape \(4, 6\)"):
        motion([torch.zeros(4, 6)], 1.0)
