"""A guidance scale that grows with the noise."""

import math

import pytest
import torch

from genssm.models import ZigMa
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.pipelines.denoising import Guidance
from genssm.schedulers import FlowODEScheduler


def test_scale_grows_from_one_to_the_full_scale() -> None:
    guidance = Guidance(3.0, power=4.0)
    assert guidance.scale_at(0.0) == 1.0 and guidance.scale_at(1.0) == 3.0
    assert guidance.scale_at(0.5) == pytest.approx(1 + 1 - math.cos(math.pi / 16))
    assert Guidance(3.0).scale_at(0.2) == 3.0
    scales = [guidance.scale_at(part / 10) for part in range(11)]
    assert scales == sorted(scales)


def test_each_sample_has_the_scale_of_its_time() -> None:
    conditional, null = torch.randn(2, 3, 1, 4, 4).unbind(0)
    guided = Guidance(3.0, power=2.0).combine(conditional, null, [0.0, 0.5, 1.0])
    scales = torch.tensor([1.0, 1 + 1 - math.cos(math.pi / 4), 3.0])[:, None, None, None]
    torch.testing.assert_close(guided, null + scales * (conditional - null))
    with pytest.raises(ValueError, match="the time of each sample"):
        Guidance(3.0, power=2.0).combine(conditional, null)


def test_pipeline_option() -> None:
    torch.manual_seed(0)
    model = ZigMa(sample_size=4, in_channels=1, hidden_size=16, num_layers=1, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    pipeline = ClassConditionalImagePipeline(model.eval(), FlowODEScheduler())
    pipeline.set_progress_bar_config(disable=True)
    call = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "latents": torch.randn(1, 1, 4, 4),
    }
    constant, growing, unguided = (
        pipeline(1, **{**call, **change}).images for change in ({}, {"guidance_power": 2.0}, {"guidance_scale": 1.0})
    )
    assert not torch.equal(growing, constant)
    assert (growing - unguided).norm() < (constant - unguided).norm()
    with pytest.raises(ValueError, match="guidance_power is -1"):
        pipeline(1, **call, guidance_power=-1.0)
