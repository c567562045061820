"""Every pipeline with its networks on a GPU and its generators on the CPU, by tensors that pretend (no GPU needed)."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, DDIMScheduler

from genssm.pipelines import ClassConditionalImagePipeline, MotionReconstructionPipeline, ReconstructionPipeline
from genssm.schedulers import swap_scheduler
from genssm.training.objectives import DiffusionObjective, FlowObjective
from tests.models.test_vq import make_tokenizer
from tests.pipelines import (
    test_autoregressive_image,
    test_masked_image,
    test_text_to_image,
    test_text_to_motion,
    test_upsampling,
    test_video,
)
from tests.pipelines.conftest import make_denoiser
from tests.pretend_cuda import CUDA, PASSING, WAITS, PretendCuda, PretendTensor

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
IMAGE = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(64).view(1, 8, 8) < 32).float()
STEPS = {"num_inference_steps": 3}
GUIDED = {**STEPS, "guidance_scale": 2.0}
KNOWN = {"known_features": torch.zeros(12, test_text_to_motion.DIM), "known_frames": torch.arange(12) < 3}


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def classes(scheduler: str = "euler", objective: Any = FlowObjective, **parts: Any) -> ClassConditionalImagePipeline:
    sizes = {"in_channels": 4, "sample_size": 4} if parts else {}
    pipe = ClassConditionalImagePipeline(make_denoiser(**sizes), objective().scheduler(), **parts)
    pipe.scheduler = swap_scheduler(pipe.scheduler, scheduler)
    return pipe


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "classes": (classes, lambda pipe: pipe([0, 1], generator=seeds(2), output_type="np", **GUIDED)),
    "guidance": (
        classes,
        lambda pipe: pipe([0, 1], guidance_rescale=0.5, guidance_interval=(0.2, 0.8), guidance_power=2.0,
                          generator=seeds(1)[0], output_type="pt", **GUIDED),
    ),
    "inpainting": (
        classes,
        lambda pipe: pipe([0, 1], image=IMAGE, mask_image=MASK, generator=seeds(2), output_type="pt", **STEPS),
    ),
    "callback": (
        classes,
        lambda pipe: pipe([0], generator=seeds(1), output_type="pt", **STEPS,
                          callback_on_step_end=lambda pipe, i, t, given: {"latents": 0.9 * given["latents"]}),
    ),
    "ode": (classes, lambda pipe: pipe([0, 1], ode_solver="dopri5", generator=seeds(2), output_type="pt", **GUIDED)),
    "sde": (lambda: classes("sde"), lambda pipe: pipe([0, 1], generator=seeds(2), output_type="pt", **STEPS)),
    "unipc": (lambda: classes("unipc"), lambda pipe: pipe([0, 1], generator=seeds(2), output_type="pt", **STEPS)),
    "ddpm": (
        lambda: classes("ddpm", DiffusionObjective),
        lambda pipe: pipe([0, 1], generator=seeds(2), output_type="pt", **STEPS),
    ),
    "single step": (
        lambda: classes("dpmsolver++-continuous", DiffusionObjective),
        lambda pipe: pipe([0, 1], image=IMAGE, generator=seeds(2), output_type="pt", num_inference_steps=6,
                          cuda_graph=False),
    ),
    "text": (
        test_text_to_image.make_pipe,
        lambda pipe: pipe(["a circle", "a red circle"], negative_prompt="a blue square", num_images_per_prompt=2,
                          generator=seeds(4), output_type="pt", **GUIDED),
    ),
    "text in DiM": (
        lambda: test_text_to_image.make_pipe("dim_prefix"),
        lambda pipe: pipe(["a circle", ""], generator=seeds(2), output_type="pt", **GUIDED),
    ),
    "text in DiMSUM": (
        lambda: test_text_to_image.make_pipe("dimsum"),
        lambda pipe: pipe(prompt_embeds=torch.ones(2, 3, 16), generator=seeds(2), output_type="pt", **GUIDED),
    ),
    "video": (test_video.make_pipe, lambda pipe: pipe([0, 1], generator=seeds(2), output_type="pt", **GUIDED)),
    "upsampling": (
        lambda: test_upsampling.build(DDIMScheduler(**test_upsampling.SCHEDULE)),
        lambda pipe: pipe([0, 1], skip_tuning="time", generator=seeds(2), output_type="pt", **STEPS),
    ),
    "codes": (
        test_autoregressive_image.make_pipe,
        lambda pipe: pipe([0, 1], codes=torch.ones(2, 4, dtype=torch.int64), guidance_scale=2.0, top_k=8, top_p=0.9,
                          guidance_schedule="cosine", cuda_graph=False, generator=seeds(2), output_type="pt",
                          callback_on_step_end=lambda pipe, i, t, given: pipe.preview(given["codes"], i + 1)),
    ),
    "codes of texts": (
        lambda: test_autoregressive_image.make_pipe(context_dim=16, context_length=8),
        lambda pipe: pipe(prompt_embeds=torch.ones(2, 3, 16), guidance_scale=2.0, cuda_graph=False,
                          generator=seeds(2), output_type="latent"),
    ),
    "codes as released": (
        test_autoregressive_image.make_pipe,
        lambda pipe: pipe([0, 1], as_released=True, cuda_graph=False, generator=seeds(1)[0], output_type="latent"),
    ),
    "masked codes": (
        test_masked_image.make_pipe,
        lambda pipe: pipe([0, 1], guidance_scale=2.0, top_k=8, generator=seeds(2), output_type="pt", **STEPS),
    ),
    "motion to latents": (
        lambda: MotionReconstructionPipeline(
            test_text_to_motion.latent_pipeline().vae, **test_text_to_motion.statistics()
        ),
        lambda pipe: pipe([torch.zeros(12, test_text_to_motion.DIM)]).motions,
    ),
    "tokenizer": (
        lambda: ReconstructionPipeline(make_tokenizer().eval()),
        lambda pipe: pipe(IMAGE[None], output_type="pt"),
    ),
    "motion": (
        test_text_to_motion.latent_pipeline,
        lambda pipe: pipe(test_text_to_motion.CAPTIONS[:2], generator=seeds(2), **test_text_to_motion.CALL),
    ),
    "frames of motion": (
        test_text_to_motion.frame_pipeline,
        lambda pipe: pipe(test_text_to_motion.CAPTIONS[:2], generator=seeds(2), **KNOWN, **test_text_to_motion.CALL),
    ),
    "long motion": (
        test_text_to_motion.frame_pipeline,
        lambda pipe: pipe.long(test_text_to_motion.CAPTIONS[:2], seconds=1.0, transition_seconds=0.4,
                               generator=seeds(1)[0], **STEPS),
    ),
}  # fmt: skip


def held(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU."""
    return tensor.held if isinstance(tensor, PretendTensor) else tensor


def numbers(output: Any) -> torch.Tensor:
    """All numbers of a pipeline's first output."""
    first = output[0]
    parts = list(first) if isinstance(first, Sequence) else [first]
    parts = [torch.as_tensor(held(part)) for part in parts]
    return torch.cat([part.flatten().double() for part in parts])


@pytest.mark.parametrize("case", CASES)
def test_nothing_stays_behind_on_the_cpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as on the CPU, and no operation that would mix devices on a GPU."""
    monkeypatch.setenv("GENSSM_BACKEND", "chunked")
    make, call = CASES[case]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    expected = numbers(call(pipe))
    with PretendCuda():
        result = call(pipe.to(CUDA))
    assert torch.allclose(numbers(result), expected, atol=2e-3)


WAITLESS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "flow": (classes, {"class_labels": [0, 1], "guidance_power": 2.0, "guidance_rescale": 0.5}),
    "flow, Heun": (lambda: classes("heun"), {"class_labels": [0, 1]}),
    "flow, own": (lambda: classes("ddim"), {"class_labels": [0, 1]}),
    "DPM-Solver++": (lambda: classes("dpmsolver++", DiffusionObjective), {"class_labels": [0, 1]}),
    "DDIM": (lambda: classes("ddim", DiffusionObjective), {"class_labels": [0, 1]}),
    "Euler": (lambda: classes("euler", DiffusionObjective), {"class_labels": [0, 1]}),
    "text": (test_text_to_image.make_pipe, {"prompt": ["a circle", ""]}),
    "video": (test_video.make_pipe, {"class_labels": [0, 1]}),
    "masked codes": (test_masked_image.make_pipe, {"class_labels": [0, 1], "top_k": 8, "top_p": 0.9}),
    "motion": (test_text_to_motion.latent_pipeline, {"prompt": "walks", "seconds": 1.0}),
    "frames of motion": (test_text_to_motion.frame_pipeline, {"prompt": "walks", "seconds": 1.0}),
}


@pytest.mark.parametrize("case", WAITLESS)
def test_no_step_waits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on the CPU hands over a step while the GPU is at work on the one before."""
    monkeypatch.setenv("GENSSM_BACKEND", "chunked")
    make, call = WAITLESS[case]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    waits: list[int] = []

    def callback(pipe: Any, i: int, t: int, given: dict) -> dict:
        waits.append(sum(wait not in PASSING for wait in WAITS))
        return {}

    with PretendCuda():
        pipe.to(CUDA)(**call, guidance_scale=2.0, num_inference_steps=5, generator=seeds(1)[0],
                      callback_on_step_end=callback)  # fmt: skip
    assert len(waits) >= 5 and len(set(waits)) == 1, [wait for wait in WAITS if wait not in PASSING][waits[0] :]


OFFLOADED = ("classes", "text in DiM", "text in DiMSUM", "codes", "masked codes", "tokenizer", "motion",
             "motion to latents", "frames of motion")  # fmt: skip


@pytest.mark.parametrize("case", OFFLOADED)
def test_model_offload(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network goes to the GPU when its turn comes and back."""
    monkeypatch.setenv("GENSSM_BACKEND", "chunked")
    make, call = CASES[case]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    expected = numbers(call(pipe))
    with PretendCuda():
        pipe.enable_model_cpu_offload(device=CUDA)
        for _ in range(2):
            assert torch.allclose(numbers(call(pipe)), expected, atol=2e-3)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.device.type for network in networks for parameter in network.parameters()} == {"cpu"}


@pytest.mark.parametrize("case", OFFLOADED)
def test_sequential_offload(case: str) -> None:
    """What diffusers' ``enable_sequential_cpu_offload`` does to each network: a layer has its weights when called."""
    make, call = CASES[case]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    expected = numbers(call(pipe))
    for network in pipe.components.values():
        if isinstance(network, torch.nn.Module):
            cpu_offload(network, torch.device("cpu"), offload_buffers=len(network._parameters) > 0)
            assert all(parameter.is_meta for parameter in network.parameters())
    assert torch.equal(numbers(call(pipe)), expected)


def test_float16_and_a_vae(monkeypatch: pytest.MonkeyPatch, kl: AutoencoderKL) -> None:
    """Half precision in all parts, from an image, in latents."""
    monkeypatch.setenv("GENSSM_BACKEND", "chunked")
    vae = AutoencoderKL.from_config(kl.config)
    for dtype in (torch.float16, torch.bfloat16):
        pipe = classes(vae=vae)
        pipe.set_progress_bar_config(disable=True)
        with PretendCuda():
            pipe = pipe.to(CUDA, dtype)
            images = pipe([0, 1], image=IMAGE.expand(3, -1, -1), generator=seeds(2), output_type="np", **GUIDED)[0]
        assert images.shape == (2, 8, 8, 3) and torch.as_tensor(images).isfinite().all()
        vae = AutoencoderKL.from_config(kl.config)


def test_the_pretence() -> None:
    """It refuses what a GPU refuses and computes the rest."""
    with PretendCuda():
        x = torch.ones(3).to(CUDA)
        assert x.device == CUDA and (2 * x + torch.tensor(1.0)).tolist() == [3.0, 3.0, 3.0]
        with pytest.raises(RuntimeError, match="on the CPU meets one on cuda:0"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="a generator on cpu"):
            torch.randn(3, generator=torch.Generator(), device=CUDA)
        with pytest.raises(TypeError, match="copy them to the CPU"):
            x.numpy()
        before = len(WAITS)
        _ = x * 2 + x.sum()
        assert len(WAITS) == before
        for wait in (
            lambda: x.sum().item(),
            lambda: float(x[0]),
            lambda: x.cpu(),
            lambda: x[x > 0],
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: torch.zeros(3).to(CUDA),
            lambda: torch.tensor(1, device=CUDA),
        ):
            before = len(WAITS)
            wait()
            assert len(WAITS) > before


@pytest.mark.parametrize(
    "changes", [{}, {"mixer": "mamba", "headdim": None}, {"context_dim": 16, "mlp_hidden": 32}], ids=str
)
def test_a_step_of_codes_can_be_captured(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step nothing waits for the GPU or goes over to it, and the buffers stay where they are."""
    monkeypatch.setenv("GENSSM_BACKEND", "chunked")
    pipe = test_autoregressive_image.make_pipe(**changes)
    waits, places = [], []

    def callback(pipe: Any, i: int, t: int, given: dict) -> None:
        decoder = pipe.watched
        waits.append(len(WAITS))
        cache, kept = decoder.cache, [decoder.codes, decoder.previous]
        kept += [cache.position, *cache.vectors, *(part for state in cache.states for part in vars(state).values())]
        places.append([held(x).data_ptr() for x in kept])

    class Watched(type(pipe)):
        def _decoder_for(self, *arguments: Any) -> Any:
            self.watched = super()._decoder_for(*arguments)
            return self.watched

    pipe.__class__ = Watched
    with PretendCuda():
        pipe.to(CUDA)
        pipe([0, 1], guidance_scale=2.0, top_k=8, top_p=0.9, cuda_graph=False, output_type="latent",
             callback_on_step_end=callback)  # fmt: skip
    assert len(waits) == 16 and len(set(waits)) == 1, WAITS[waits[0] : waits[-1]]
    assert all(row == places[0] for row in places)
