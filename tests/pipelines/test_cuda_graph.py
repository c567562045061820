"""Sampling with recorded evaluations: the same numbers from every pipeline; what ends or forbids a recording."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from genssm.models import DiM, DiMSUM
from genssm.pipelines import ClassConditionalImagePipeline, TextToMotionPipeline
from genssm.pipelines.denoising import DenoisingPipeline
from genssm.schedulers import swap_scheduler
from genssm.training.objectives import DiffusionObjective, FlowObjective
from tests.models import test_dim, test_dimsum
from tests.pipelines import test_masked_image, test_text_to_image, test_text_to_motion, test_upsampling, test_video
from tests.pipelines.conftest import make_denoiser
from tests.pretend_graphs import PretendGraph

STEPS = 9
Call = Callable[[Any, bool], Any]


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def classes(model: Any = make_denoiser, scheduler: str = "euler", objective: Any = FlowObjective) -> DenoisingPipeline:
    pipe = ClassConditionalImagePipeline(model().eval(), objective().scheduler())
    pipe.scheduler = swap_scheduler(pipe.scheduler, scheduler)
    return pipe


def sized(cls: type, small: dict[str, Any]) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        model = cls(**{**small, "num_classes": 3})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        return model

    return make


def images(labels: tuple[int, ...] = (0, 1), **options: Any) -> Call:
    given = {"num_inference_steps": STEPS, "output_type": "latent", **options}
    return lambda pipe, graph: pipe(list(labels), generator=seeds(len(labels)), cuda_graph=graph, **given).images


def motions(pipe: TextToMotionPipeline, graph: bool, frames: tuple[int, int] = (12, 7)) -> torch.Tensor:
    given = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "num_frames": list(frames), "output_type": "latent"}
    found = pipe(test_text_to_motion.CAPTIONS[:2], generator=seeds(2), cuda_graph=graph, **given).motions
    return torch.cat(found)


def long_motion(pipe: TextToMotionPipeline, graph: bool) -> torch.Tensor:
    return pipe.long(test_text_to_motion.CAPTIONS[:2], seconds=1.0, transition_seconds=0.4, generator=seeds(1)[0],
                     num_inference_steps=STEPS, output_type="features", cuda_graph=graph).motions[0]  # fmt: skip


def texts(pipe: DenoisingPipeline, graph: bool) -> torch.Tensor:
    return pipe(["a circle", "a red circle"], negative_prompt="a blue square", guidance_scale=2.0, generator=seeds(2),
                num_inference_steps=STEPS, output_type="latent", cuda_graph=graph).images  # fmt: skip


CASES: dict[str, tuple[Callable[[], DiffusionPipeline], Call]] = {
    "ZigMa": (classes, images()),
    "guidance": (classes, images(guidance_scale=2.0)),
    # with guidance in the middle alone: two kinds of evaluations
    "interval": (classes, images(guidance_scale=2.0, guidance_interval=(0.2, 0.8), num_inference_steps=20)),
    "DiM": (lambda: classes(sized(DiM, test_dim.SMALL)), images(guidance_scale=2.0)),
    "DiMSUM": (lambda: classes(sized(DiMSUM, test_dimsum.SMALL)), images(guidance_scale=2.0)),
    "multistep": (lambda: classes(scheduler="unipc"), images()),
    "diffusion": (lambda: classes(objective=DiffusionObjective), images()),
    "fixed steps of an ODE": (classes, images(ode_solver="heun2")),
    "another size": (classes, images(height=16, width=8)),
    "text": (test_text_to_image.make_pipe, texts),
    "video": (
        test_video.make_pipe,
        lambda pipe, graph: pipe([0, 1], num_inference_steps=STEPS, output_type="latent", generator=seeds(2),
                                 cuda_graph=graph).frames,
    ),
    "masked codes": (test_masked_image.make_pipe, images(guidance_scale=2.0)),
    "motion": (test_text_to_motion.latent_pipeline, motions),
    "frames of motion": (test_text_to_motion.frame_pipeline, motions),
    "long motion": (test_text_to_motion.frame_pipeline, long_motion),
}  # fmt: skip


@pytest.fixture
def anywhere(device: torch.device, request: pytest.FixtureRequest) -> torch.device:
    """Every device; graphs on the CPU pretend."""
    if device.type == "cpu":
        request.getfixturevalue("pretend_graphs")
    return device


def prepared(make: Callable[[], DiffusionPipeline], device: torch.device) -> DiffusionPipeline:
    pipe = make().to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(case: str, anywhere: torch.device) -> None:
    """In the first call, in the next, with other weights in the same places, and with weights that were replaced."""
    make, call = CASES[case]
    pipe = prepared(make, anywhere)
    model = pipe.model if "model" in pipe.components else pipe.denoiser
    expected = call(pipe, False)
    assert pipe._graphs is None
    for _ in range(2):
        assert torch.equal(call(pipe, True), expected)
    kept = pipe._graphs[1]
    assert kept.graphs and None not in kept.graphs.values()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    found, weights = call(pipe, True), {name: x.clone() for name, x in model.state_dict().items()}
    assert pipe._graphs[1] is kept
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data
    replaced = call(pipe, True)
    assert pipe._graphs[1] is not kept
    assert torch.equal(replaced, call(pipe, False)) and pipe._graphs is None
    model.load_state_dict(weights)
    assert torch.equal(found, call(pipe, False))
    assert not torch.equal(found, expected) and not torch.equal(found, replaced)


def test_another_shape_frees_what_was_kept(anywhere: torch.device) -> None:
    pipe = prepared(classes, anywhere)
    call, more = images(), images((0, 1, 2))
    call(pipe, True)
    kept = pipe._graphs[1]
    found = more(pipe, True)
    assert pipe._graphs[1] is not kept and len(pipe._graphs[1].graphs) == 1
    assert torch.equal(found, more(pipe, False))


def test_short_loops_record_nothing(pretend_graphs: type[PretendGraph]) -> None:
    """Until they have come often enough."""
    pipe, call = prepared(classes, torch.device("cpu")), images(num_inference_steps=3)
    expected = call(pipe, False)
    assert torch.equal(call(pipe, True), expected) and not pretend_graphs.replays
    assert torch.equal(call(pipe, True), expected) and pretend_graphs.replays == 2


def test_what_forbids_a_recording(pretend_graphs: type[PretendGraph]) -> None:
    """Hooks, compiled blocks, skip tuning, batches that shrink, and upsampling, whose evaluations change."""
    cpu, call = torch.device("cpu"), images()
    pipe = prepared(classes, cpu)
    images(ode_solver="dopri5", num_inference_steps=1)(pipe, True)
    handle = pipe.denoiser.register_forward_hook(lambda *arguments: None)
    call(pipe, True)
    handle.remove()
    pipe = prepared(lambda: classes(sized(DiM, test_dim.SMALL)), cpu)
    pipe.denoiser.enable_skip_tuning()
    call(pipe, True)
    pipe = prepared(lambda: test_upsampling.build(DDIMScheduler(**test_upsampling.SCHEDULE)), cpu)
    pipe([0, 1], generator=seeds(2), num_inference_steps=6, output_type="latent")
    assert pretend_graphs.replays == 0 and pipe._graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_offloading(dtype: torch.dtype) -> None:
    """Offloaded networks are evaluated as they are."""
    pipe = classes().to("cuda", dtype)
    pipe.set_progress_bar_config(disable=True)
    call = images(guidance_scale=2.0)
    expected = call(pipe, False)
    assert all(torch.equal(call(pipe, True), expected) for _ in range(2)) and pipe._graphs[1].graphs
    with torch.inference_mode():
        assert torch.equal(call(pipe, True), expected)
    assert torch.equal(call(pipe, True), expected)
    pipe.enable_model_cpu_offload()
    assert torch.equal(call(pipe, True), expected) and pipe._graphs is None
