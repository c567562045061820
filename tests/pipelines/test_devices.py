"""Every sampler around a denoiser on an accelerator that is not there; see :mod:`tests.fake_device`.

What else pipelines do on one is in test_pretend_cuda.py.
"""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from genssm.pipelines import ClassConditionalImagePipeline
from genssm.schedulers import SCHEDULER_NAMES, FlowODEScheduler, swap_scheduler
from tests.fake_device import CUDA, fake_device
from tests.models import test_zigma

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


@pytest.mark.parametrize(("kind", "name"), samplers())
def test_every_sampler(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = test_zigma.build("classes", num_layers=1).eval()
    pipeline = ClassConditionalImagePipeline(model, swap_scheduler(MODELS[kind], name))
    pipeline.set_progress_bar_config(disable=True)
    cls = type(pipeline.scheduler)
    original = cls.set_timesteps
    # The scheduler's times stay on the host, which must read them.
    monkeypatch.setattr(cls, "set_timesteps", lambda self, *args, device=None, **given: original(self, *args, **given))
    with fake_device(monkeypatch):
        pipeline.to(CUDA)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        result = pipeline([0, 1], guidance_scale=2.0, num_inference_steps=3, generator=generators, output_type="latent")
    assert result.images.device == CUDA
