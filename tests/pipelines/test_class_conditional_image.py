"""The class-conditional pipeline: same image in any batch, guidance, labels, sizes, outputs, VAE, callbacks, errors."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from PIL import Image

from genssm.models import ZigMa
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.pipelines.denoising import Guidance, draw_noise
from genssm.schedulers import SCHEDULER_NAMES, FlowSDEScheduler, swap_scheduler
from genssm.training.objectives import DiffusionObjective, FlowObjective
from tests.pipelines.conftest import make_denoiser

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
MakePipe = Callable[..., ClassConditionalImagePipeline]
LABELS = [0, 2, 1, 1]
GUIDED = {"guidance_scale": 2.5, "guidance_rescale": 0.5, "guidance_interval": (0.2, 0.9)}


def generators(rows: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in rows]


def check_one_by_one_equals_batch(pipe: ClassConditionalImagePipeline, labels: list | None, **call: object) -> None:
    """Bit for bit."""
    call = {"num_inference_steps": 4, "output_type": "pt", **call}
    count = len(labels) if labels else 4
    batch = pipe(labels, num_images=count, generator=generators(range(count)), **call).images
    assert torch.isfinite(batch).all()
    assert not torch.equal(batch[0], batch[1])
    for i in range(count):
        label = None if labels is None else labels[i]
        single = pipe(label, num_images=1, generator=generators(range(i, i + 1)), **call).images
        assert torch.equal(single[0], batch[i])


DIFFUSION_ONLY = ("ddpm", "euler-ancestral", "dpmsolver++-continuous")


@pytest.mark.parametrize("name", [name for name in SCHEDULER_NAMES if name not in DIFFUSION_ONLY])
def test_flow_images_do_not_depend_on_the_batch(make_pipe: MakePipe, name: str) -> None:
    check_one_by_one_equals_batch(make_pipe(swap_scheduler(FlowObjective().scheduler(), name)), LABELS, **GUIDED)


@pytest.mark.parametrize("name", [name for name in SCHEDULER_NAMES if name != "sde"])
def test_diffusion_images_do_not_depend_on_the_batch(make_pipe: MakePipe, name: str) -> None:
    """The random steps of ddpm and euler-ancestral included."""
    check_one_by_one_equals_batch(make_pipe(swap_scheduler(DDIMScheduler(clip_sample=False), name)), LABELS, **GUIDED)


def test_ode_images_do_not_depend_on_the_batch(make_pipe: MakePipe) -> None:
    check_one_by_one_equals_batch(make_pipe(), LABELS, ode_solver="dopri5", **GUIDED)


@pytest.mark.parametrize(
    "changes",
    [{"scan": "raster_bidirectional"}, {"patch_size": 1, "hidden_size": 48}, {"sample_size": [6, 10]},
     {"hidden_size": 72, "norm": "layer", "pos_embed": "sincos2d_fixed", "in_channels": 3}],
    ids=str,
)  # fmt: skip
def test_other_models_do_not_depend_on_the_batch(make_pipe: MakePipe, changes: dict) -> None:
    check_one_by_one_equals_batch(make_pipe(model=make_denoiser(**changes)), LABELS, **GUIDED)


def test_decoded_images_do_not_depend_on_the_batch(make_pipe: MakePipe, kl: AutoencoderKL) -> None:
    model = make_denoiser(sample_size=4, in_channels=4, num_classes=0)
    check_one_by_one_equals_batch(make_pipe(model=model, vae=kl), None)


def test_one_generator_draws_image_by_image(make_pipe: MakePipe) -> None:
    """The first images of a larger call are those of a smaller one."""
    two, four = (
        make_pipe()(
            1, num_images=n, generator=torch.Generator().manual_seed(5), num_inference_steps=2, output_type="pt"
        )
        for n in (2, 4)
    )
    assert torch.equal(two.images, four.images[:2])


def test_noise_is_that_of_each_generator() -> None:
    noise = draw_noise((2, 1, 4, 4), generators(range(2)), torch.device("cpu"))
    assert torch.equal(noise[1], torch.randn((1, 4, 4), generator=generators(range(1, 2))[0]))


class Recorder:
    """Records what a denoiser is called with and what it answers."""

    def __init__(self, denoiser: ZigMa) -> None:
        self.calls: list[dict] = []
        self.handle = denoiser.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: ZigMa, args: tuple, kwargs: dict, output: tuple) -> None:
        self.calls.append({"x": args[0], "t": args[1], **kwargs, "answer": output[0]})


@pytest.fixture
def recorder(denoiser: ZigMa) -> Iterator[Recorder]:
    found = Recorder(denoiser)
    yield found
    found.handle.remove()


def test_guidance_is_null_plus_scale_times_difference(make_pipe: MakePipe, recorder: Recorder) -> None:
    noise = torch.randn(2, 1, 8, 8)
    call = {"latents": noise, "num_inference_steps": 1, "output_type": "latent"}
    guided = make_pipe()([0, 2], guidance_scale=3.0, **call).images
    (seen,) = recorder.calls
    assert seen["class_labels"].tolist() == [0, 2, 3, 3]  # 3 is the null class
    conditional, null = seen["answer"].chunk(2)
    torch.testing.assert_close(guided, noise - (null + 3.0 * (conditional - null)))
    torch.testing.assert_close(make_pipe()([0, 2], **call).images, noise - conditional)
    assert len(recorder.calls[1]["class_labels"]) == 2  # without guidance there is no null half
    torch.testing.assert_close(make_pipe()(None, num_images=2, **call).images, noise - null)


def test_guidance_interval_saves_evaluations(make_pipe: MakePipe, recorder: Recorder) -> None:
    make_pipe()([0, 2], num_inference_steps=5, guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    assert [(float(call["t"][0]), len(call["t"])) for call in recorder.calls] == [
        (1000.0, 2), (800.0, 2), (600.0, 4), (400.0, 4), (200.0, 2)
    ]  # fmt: skip


def test_ode_guidance_interval_is_by_sample(make_pipe: MakePipe, recorder: Recorder) -> None:
    make_pipe()([0, 2], ode_solver="dopri5", guidance_scale=2.0, guidance_interval=(0.0, 0.5))
    for call in recorder.calls:
        conditional = call["class_labels"] != 3
        inside = int((call["t"][conditional] <= 500).sum())
        assert int((~conditional).sum()) == inside
    assert {len(call["t"]) for call in recorder.calls} >= {2, 4}


def test_rescale_restores_the_spread() -> None:
    """Lin et al., 2024, equations 14 to 16."""
    conditional, null = torch.randn(2, 3, 1, 8, 8).unbind()
    full, half, plain = (Guidance(4.0, rescale=r).combine(conditional, null, [0.5] * 3) for r in (1.0, 0.5, 0.0))
    torch.testing.assert_close(full.flatten(1).std(1), conditional.flatten(1).std(1))
    torch.testing.assert_close(half, (full + plain) / 2)


def test_labels_by_index_name_or_tensor(make_pipe: MakePipe) -> None:
    pipe = make_pipe(class_names=["Sneaker", "7", "Bag"])
    for given in ([0, 1, 2], ["Sneaker", "7", "Bag"], torch.tensor([0, 1, 2]), ("0", 1, "Bag")):
        assert pipe.resolve_labels(given, None) == ([0, 1, 2], 3)
    assert pipe.resolve_labels("7", 4) == ([1] * 4, 4)  # the name, not the index
    assert pipe.resolve_labels(3, None) == ([3], 1)  # the null class
    assert pipe.resolve_labels(None, 2) == (None, 2)


def test_unconditional(make_pipe: MakePipe, unconditional: ZigMa) -> None:
    images = make_pipe(model=unconditional)(num_images=3, num_inference_steps=2).images
    assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))] * 3
    check_one_by_one_equals_batch(make_pipe(FlowSDEScheduler(), model=unconditional), None)


def test_output_types(make_pipe: MakePipe) -> None:
    call = {"class_labels": [0, 1], "num_inference_steps": 2}
    found = {
        kind: make_pipe()(generator=generators(range(2)), output_type=kind, **call).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert found["latent"].shape == found["pt"].shape == (2, 1, 8, 8)
    assert found["np"].shape == (2, 8, 8, 1)
    torch.testing.assert_close(found["pt"], (found["latent"] / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(found["np"][..., 0], found["pt"][:, 0].numpy())
    assert isinstance(found["pil"][0], Image.Image) and found["pil"][0].mode == "L"
    np.testing.assert_array_equal(np.asarray(found["pil"][1]), (found["np"][1, ..., 0] * 255).round())
    assert isinstance(make_pipe()(return_dict=False, **call), tuple)


def test_other_sizes(make_pipe: MakePipe) -> None:
    images = make_pipe()([0, 1], height=12, width=6, num_inference_steps=2).images
    assert images[0].size == (6, 12)


@pytest.mark.parametrize("kind", ["kl", "taesd"])
def test_latents_are_decoded(make_pipe: MakePipe, kind: str, kl: AutoencoderKL, taesd: AutoencoderTiny) -> None:
    vae = {"kl": kl, "taesd": taesd}[kind]
    pipe = make_pipe(model=make_denoiser(sample_size=4, in_channels=4), vae=vae)
    call = {"class_labels": [0, 1], "num_inference_steps": 2, "latents": torch.randn(2, 4, 4, 4)}
    latents, pixels = (pipe(output_type=kind, **call).images for kind in ("latent", "pt"))
    scale, shift = (0.5, 0.1) if kind == "kl" else (1.0, 0.0)
    with torch.no_grad():
        expected = vae.decode(latents / scale + shift).sample
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    side = 8 if kind == "kl" else 16
    assert pixels.shape == (2, 3, side, side)
    assert pipe(0, height=2 * side, num_inference_steps=1).images[0].size == (side, 2 * side)


def test_callback_sees_and_replaces_latents(make_pipe: MakePipe) -> None:
    seen = []

    def callback(pipe: ClassConditionalImagePipeline, step: int, t: torch.Tensor, inputs: dict) -> dict:
        seen.append((step, float(t), pipe.guidance_scale, pipe.num_timesteps))
        return {"latents": torch.zeros_like(inputs["latents"])} if step == 1 else {}

    def from_zero(pipe: ClassConditionalImagePipeline, step: int, t: torch.Tensor, inputs: dict) -> dict:
        pipe._interrupt = step == 1
        return callback(pipe, step, t, inputs)

    pipe = make_pipe()
    pipe(0, num_inference_steps=4, guidance_scale=1.5, callback_on_step_end=callback)
    assert seen == [(i, 1000.0 - 250 * i, 1.5, 4) for i in range(4)]
    stopped = pipe(0, num_inference_steps=4, callback_on_step_end=from_zero, output_type="latent").images
    assert len(seen) == 6 and float(stopped.abs().max()) == 0
    assert len(pipe(0, num_inference_steps=4).images) == 1  # an interruption ends with its call


def test_progress_bar_counts_evaluations(make_pipe: MakePipe, capsys: pytest.CaptureFixture) -> None:
    pipe = make_pipe(swap_scheduler(FlowObjective().scheduler(), "heun"))
    pipe.set_progress_bar_config(disable=False)
    pipe(0, num_inference_steps=3)
    assert "5/5" in capsys.readouterr().err
    assert pipe.num_timesteps == 5


def test_latents_are_the_starting_noise(make_pipe: MakePipe) -> None:
    noise = draw_noise((2, 1, 8, 8), generators(range(2)), torch.device("cpu"))
    for scheduler in (FlowObjective().scheduler(), swap_scheduler(DiffusionObjective().scheduler(), "euler")):
        call = {"class_labels": [0, 1], "num_inference_steps": 3, "output_type": "pt"}
        pipe = make_pipe(scheduler)
        assert torch.equal(pipe(latents=noise, **call).images, pipe(generator=generators(range(2)), **call).images)


def test_ode_solver_comes_near_many_steps(make_pipe: MakePipe) -> None:
    call = {"class_labels": [0, 1], "latents": torch.randn(2, 1, 8, 8), "output_type": "latent", "guidance_scale": 1.5}
    pipe = make_pipe(swap_scheduler(FlowObjective().scheduler(), "heun"))
    many = pipe(num_inference_steps=60, **call).images
    torch.testing.assert_close(pipe(ode_solver="dopri5", **call).images, many, rtol=0, atol=0.01)
    assert pipe.num_timesteps < 119


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("path", ["linear", "vp"])
def test_ode_solver_where_an_end_is_singular(make_pipe: MakePipe, path: str, prediction: str) -> None:
    images = make_pipe(FlowObjective(path, prediction).scheduler())(
        [0, 1], ode_solver="dopri5", output_type="pt", ode_options={"rtol": 1e-2, "atol": 1e-3}
    ).images
    assert torch.isfinite(images).all()


def test_bfloat16(make_pipe: MakePipe, tmp_path: object) -> None:
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    half = ClassConditionalImagePipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    call = {"class_labels": [0, 1], "latents": torch.randn(2, 1, 8, 8), "num_inference_steps": 4, "output_type": "pt"}
    images = half(**call).images
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, pipe(**call).images, rtol=0, atol=0.1)


def test_runs_on_every_device(make_pipe: MakePipe, device: torch.device) -> None:
    pipe = make_pipe(model=make_denoiser()).to(device)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    images = pipe([0, 1], generator=generators(range(2)), **call).images
    assert images.device.type == device.type
    expected = make_pipe()([0, 1], generator=generators(range(2)), **call).images
    torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-3)


def test_offload_order(make_pipe: MakePipe, kl: AutoencoderKL) -> None:
    pipe = make_pipe(model=make_denoiser(sample_size=4, in_channels=4), vae=kl)
    expected = pipe(0, latents=torch.ones(1, 4, 4, 4), num_inference_steps=2, output_type="pt").images
    pipe.enable_model_cpu_offload(device="cpu")
    found = pipe(0, latents=torch.ones(1, 4, 4, 4), num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": 7}, r"class label 7 is not in 0\.\.2"),
        ({"class_labels": -1}, "class label -1"),
        ({"class_labels": "Boot"}, "no class named 'Boot'; the pipeline has no class_names"),
        ({"class_labels": [0, 1], "num_images": 3}, "2 class_labels for num_images=3"),
        ({"class_labels": []}, "0 class_labels"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"generator": generators(range(3)), "num_images": 2}, "3 generators for 2 images"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"height": 7}, "height is 7; this pipeline makes sizes that are multiples of 2"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents have the shape \(1, 3, 8, 8\); expected \(1, 1, 8, 8\)"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is"),
        ({"guidance_rescale": 2.0}, "guidance_rescale is 2.0"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"cannot be given \['noise'\]"),
        ({"ode_solver": "magic"}, "ode_solver is 'magic'"),
        ({"ode_solver": "dopri5", "ode_options": {"tol": 1}}, r"ode_options \['tol'\] are unknown"),
        ({"ode_solver": "dopri5", "ode_options": {"rtol": -1}}, "are tolerances; expected more than 0"),
        ({"ode_options": {"rtol": 1e-2}}, "without an ode_solver"),
        ({"ode_solver": "dopri5", "callback_on_step_end": print}, "no steps to call back at"),
    ],
)
def test_impossible_calls_are_refused_first(make_pipe: MakePipe, recorder: Recorder, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipe()(**call)
    assert not recorder.calls


def test_impossible_combinations_are_refused(make_pipe: MakePipe, unconditional: ZigMa) -> None:
    with pytest.raises(ValueError, match="is unconditional; leave class_labels out"):
        make_pipe(model=unconditional)(0)
    with pytest.raises(ValueError, match="guidance_scale needs classes"):
        make_pipe(model=unconditional)(guidance_scale=2.0)
    no_null = make_denoiser(null_condition=False)
    with pytest.raises(ValueError, match="knows 3 classes and no null class; pass class_labels"):
        make_pipe(model=no_null)()
    with pytest.raises(ValueError, match="guidance_scale needs a null class"):
        make_pipe(model=no_null)(0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="ode_solver needs a flow model; DDIMScheduler"):
        make_pipe(DDIMScheduler())(0, ode_solver="dopri5")
    with pytest.raises(ValueError, match="4 channels and the pipeline has no VAE"):
        make_pipe(model=make_denoiser(in_channels=4))(0)
    with pytest.raises(ValueError, match="2 class_names for a denoiser of 3 classes"):
        make_pipe(class_names=["a", "b"])
    with pytest.raises(ValueError, match="videos of 2 frames"):
        make_pipe(model=make_denoiser(num_frames=2))(0)
