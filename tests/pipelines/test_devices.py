"""Every sampler around a denoiser on an accelerator that is not there; see :mod:`tests.fake_device`."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from genssm.pipelines import ClassConditionalImagePipeline, TextToImagePipeline, VideoPipeline
from genssm.schedulers import SCHEDULER_NAMES, FlowODEScheduler, swap_scheduler
from tests.fake_device import CUDA, fake_device
from tests.models import test_dim, test_dimsum, test_zigma

MODELS = {
    "flow": FlowMatchEulerDiscreteScheduler(),
    "diffusion": DDIMScheduler(clip_sample=False),
    "gvp": FlowODEScheduler(path="gvp"),
    "vp": FlowODEScheduler(path="vp", prediction_type="epsilon"),
}


def samplers() -> list[tuple[str, str]]:
    """Kinds of models and the names of the samplers that they have."""
    found = []
    for kind, current in MODELS.items():
        for name in SCHEDULER_NAMES:
            try:
                swap_scheduler(current, name)
            except ValueError:
                continue
            found.append((kind, name))
    return found


def on_device(pipeline: Any, monkeypatch: pytest.MonkeyPatch, **call: Any) -> torch.device:
    """Where the result of three steps lies. Only the scheduler's times stay on the host, which must read them."""
    cls = type(pipeline.scheduler)

    def set_timesteps(self: SchedulerMixin, *args: Any, device: Any = None, **options: Any) -> None:
        original(self, *args, **options)

    original = cls.set_timesteps
    monkeypatch.setattr(cls, "set_timesteps", set_timesteps)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    with fake_device(monkeypatch):
        pipeline.to(CUDA)
        call = {name: value() if callable(value) else value for name, value in call.items()}
        output = pipeline(**call, guidance_scale=2.0, num_inference_steps=3, generator=generators, output_type="latent")
    return next(iter(output.values())).device


@pytest.mark.parametrize(("kind", "name"), samplers())
def test_every_sampler(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = test_zigma.build("classes", num_layers=1).eval()
    pipeline = ClassConditionalImagePipeline(model, swap_scheduler(MODELS[kind], name))
    assert on_device(pipeline, monkeypatch, class_labels=[0, 1]) == CUDA


@pytest.mark.parametrize("tests", [test_zigma, test_dim, test_dimsum])
def test_texts(tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = TextToImagePipeline(tests.build("text").eval(), FlowMatchEulerDiscreteScheduler())
    given = {
        "prompt_embeds": lambda: torch.randn(2, 4, 12, device=CUDA),
        "prompt_attention_mask": lambda: torch.ones(2, 4, device=CUDA),
    }
    assert on_device(pipeline, monkeypatch, **given) == CUDA


def test_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = VideoPipeline(test_zigma.build("video_factorised").eval(), FlowMatchEulerDiscreteScheduler())
    assert on_device(pipeline, monkeypatch, class_labels=[0, 1]) == CUDA
