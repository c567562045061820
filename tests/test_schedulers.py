"""Every sampler recovers a known distribution from exact predictions; our own schedulers behave like diffusers'."""

import logging

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

from genssm import paths
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.pipelines.denoising import set_times
from genssm.schedulers import FlowODEScheduler, FlowSDEScheduler, flow_settings, swap_scheduler
from genssm.training.objectives import DiffusionObjective, FlowObjective
from tests.mixture import MixtureDenoiser, even_noise, moment_error

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
COUNT = 2048
# name of the sampler: steps, largest error of mean and covariance (variances of the mixture are 1.02 and 0.60)
DIFFUSION = {
    "ddpm": (200, 0.08), "ddim": (60, 0.04), "dpmsolver++": (20, 0.02), "dpmsolver++-singlestep": (20, 0.05),
    "unipc": (20, 0.02), "euler": (60, 0.04), "euler-ancestral": (150, 0.1), "heun": (20, 0.03),
    "dpmsolver++-continuous": (20, 0.05),
}  # fmt: skip
FLOW = {
    "euler": (60, 0.03), "heun": (20, 0.01), "ddim": (60, 0.04), "sde": (100, 0.1),
    "dpmsolver++": (20, 0.02), "dpmsolver++-singlestep": (20, 0.03), "unipc": (20, 0.01),
}  # fmt: skip


def sample(
    denoiser: MixtureDenoiser, scheduler: object, steps: int, count: int = COUNT, **call: object
) -> torch.Tensor:
    pipe = ClassConditionalImagePipeline(denoiser, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        latents=even_noise(count),
        num_images=count,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **call,
    ).images


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_samplers_recover_the_mixture(name: str, prediction: str) -> None:
    scheduler = DiffusionObjective(prediction).scheduler()
    if (name, prediction) == ("euler-ancestral", "sample"):
        with pytest.raises(ValueError, match="cannot sample a diffusion model that predicts 'sample'"):
            swap_scheduler(scheduler, name)
        return
    steps, bound = DIFFUSION[name]
    images = sample(MixtureDenoiser("diffusion", prediction), swap_scheduler(scheduler, name), steps)
    assert moment_error(images) < bound


@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
@pytest.mark.parametrize("name", FLOW)
def test_flow_samplers_recover_the_mixture(name: str, prediction: str) -> None:
    scheduler = FlowObjective("linear", prediction).scheduler()
    if prediction == "score" and name in ("dpmsolver++", "dpmsolver++-singlestep", "unipc"):
        with pytest.raises(ValueError, match="use one of euler, heun, ddim, sde"):
            swap_scheduler(scheduler, name)
        return
    steps, bound = FLOW[name]
    images = sample(MixtureDenoiser("linear", prediction), swap_scheduler(scheduler, name), steps)
    assert moment_error(images) < bound


@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
@pytest.mark.parametrize("path", ["gvp", "vp"])
def test_other_paths_recover_the_mixture(path: str, prediction: str) -> None:
    scheduler = FlowObjective(path, prediction).scheduler()
    for name, steps, bound in (("euler", 40, 0.03), ("heun", 15, 0.03), ("ddim", 80, 0.04), ("sde", 80, 0.1)):
        images = sample(MixtureDenoiser(path, prediction), swap_scheduler(scheduler, name), steps)
        assert moment_error(images) < bound, name
    with pytest.raises(ValueError, match=f"on path '{path}'"):
        swap_scheduler(scheduler, "unipc")


@pytest.mark.parametrize(
    ("form", "last_step"),
    [("sigma", "mean"), ("linear", "euler"), ("decreasing", "tweedie"), ("increasing-decreasing", "mean"),
     ("log", "tweedie")],
)  # fmt: skip
def test_sde_forms_recover_the_mixture(form: str, last_step: str) -> None:
    scheduler = FlowSDEScheduler(diffusion=form, last_step=last_step, last_step_size=0.02)
    assert moment_error(sample(MixtureDenoiser(), scheduler, 100, count=8192)) < 0.05


def test_sde_without_noise_is_euler() -> None:
    noise = sample(MixtureDenoiser("gvp"), FlowSDEScheduler(path="gvp", diffusion="none", last_step_size=None), 10)
    grid = FlowODEScheduler(path="gvp")
    torch.testing.assert_close(noise, sample(MixtureDenoiser("gvp"), grid, 10))


def test_constant_and_sbdm_forms_with_many_steps() -> None:
    constant = FlowSDEScheduler(diffusion="constant", diffusion_norm=0.1, last_step="tweedie", last_step_size=0.02)
    assert moment_error(sample(MixtureDenoiser(), constant, 200)) < 0.1
    sbdm = FlowSDEScheduler(path="vp", diffusion="sbdm", diffusion_norm=0.5)
    assert moment_error(sample(MixtureDenoiser("vp"), sbdm, 200)) < 0.1
    with pytest.raises(ValueError, match="without bound"):
        FlowSDEScheduler(diffusion="sbdm")


def test_a_wrong_sign_or_time_is_noticed() -> None:
    """The bounds above mean something: these errors of convention miss them by far."""
    scheduler = FlowObjective().scheduler()
    assert moment_error(sample(MixtureDenoiser(reverse_sign=True), scheduler, 20)) > 0.3
    assert moment_error(sample(MixtureDenoiser("linear", "epsilon"), scheduler, 20)) > 0.3
    weak = FlowSDEScheduler()
    step = weak.step
    weak.step = lambda *args: step(*args, variance_noise=0.7 * torch.randn(COUNT, 2, 1, 1))
    assert moment_error(sample(MixtureDenoiser(), weak, 60)) > 0.12


def test_shift_keeps_the_distribution_and_moves_the_times() -> None:
    shifted = FlowODEScheduler(shift=3.0, solver="heun")
    assert moment_error(sample(MixtureDenoiser(), shifted, 20)) < 0.02
    shifted.set_timesteps(4)
    torch.testing.assert_close(shifted.timesteps[::2], 1000 * torch.tensor([1.0, 0.9, 0.75, 0.5]))
    assert swap_scheduler(shifted, "unipc").config.flow_shift == 3.0
    assert swap_scheduler(swap_scheduler(shifted, "unipc"), "sde").config.shift == 3.0


def test_swapping_keeps_the_noise_schedule() -> None:
    """diffusers' from_config gives HeunDiscreteScheduler another schedule than the DDIMScheduler it comes from."""
    current = DDIMScheduler()
    assert HeunDiscreteScheduler.from_config(current.config).config.beta_end != current.config.beta_end
    for name in DIFFUSION:
        swapped = swap_scheduler(current, name)
        torch.testing.assert_close(swapped.alphas_cumprod, current.alphas_cumprod, msg=name)


def test_flow_times_are_exact() -> None:
    """diffusers' multistep solvers round the times of a flow down; the denoiser is called with the true ones."""
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    timesteps, times = set_times(scheduler, 7)
    torch.testing.assert_close(times, scheduler.sigmas[:-1] * 1000)
    assert timesteps.dtype == torch.int64
    assert (times - timesteps).max() > 0.1


def test_euler_grid_ends_at_data() -> None:
    scheduler = FlowObjective().scheduler()
    _, times = set_times(scheduler, 4)
    torch.testing.assert_close(times, torch.tensor([1000.0, 750.0, 500.0, 250.0]))
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("cls", [FlowODEScheduler, FlowSDEScheduler])
def test_scheduler_round_trip(cls: type, tmp_path: object) -> None:
    scheduler = cls(path="gvp", prediction_type="epsilon", shift=2.0)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.to_json_string() == scheduler.to_json_string()
    assert len(loaded) == 1000
    assert flow_settings(loaded) == ("gvp", "epsilon")


@pytest.mark.parametrize("path", paths.PATHS)
def test_scale_noise_is_the_path(path: str) -> None:
    scheduler = FlowODEScheduler(path=path)
    clean, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    times = torch.tensor([10.0, 500.0, 990.0])
    expected = paths.interpolate(path, clean, noise, times / 1000)
    torch.testing.assert_close(scheduler.scale_noise(clean, times, noise), expected)
    torch.testing.assert_close(scheduler.scale_noise(clean, 500.0, noise)[1], expected[1])


def test_steps_can_start_in_the_middle() -> None:
    """As image-to-image pipelines do: by begin index, or by the first timestep that is stepped."""
    scheduler = FlowODEScheduler()
    x = torch.randn(2, 1, 4, 4)
    results = []
    for begin in (True, False):
        scheduler.set_timesteps(5)
        if begin:
            scheduler.set_begin_index(2)
            assert scheduler.begin_index == 2
        results.append(scheduler.step(torch.ones_like(x), scheduler.timesteps[2], x).prev_sample)
        assert scheduler.step_index == 3
    torch.testing.assert_close(results[0], x - 0.2)
    torch.testing.assert_close(*results)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="not on the grid"):
        scheduler.step(x, 123.0, x)


def test_steps_of_a_batch_are_those_of_each_image() -> None:
    """Random steps with one generator per image."""
    x = torch.randn(3, 1, 4, 4)
    scheduler = FlowSDEScheduler()

    def step(rows: slice) -> torch.Tensor:
        scheduler.set_timesteps(4)
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)][rows]
        return scheduler.step(0.1 * x[rows], scheduler.timesteps[0], x[rows], generators, return_dict=False)[0]

    together = step(slice(0, 3))
    for i in range(3):
        assert torch.equal(together[i], step(slice(i, i + 1))[0])


def test_bfloat16_models_step_in_float32() -> None:
    scheduler = FlowODEScheduler()
    scheduler.set_timesteps(1000)
    x = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    stepped = scheduler.step(torch.full_like(x, 0.5), scheduler.timesteps[0], x).prev_sample
    assert stepped.dtype == torch.float32
    assert float(stepped[0, 0, 0, 0]) == pytest.approx(0.9995, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowODEScheduler(path="cosine"), "path is 'cosine'; expected one of linear, gvp, vp"),
        (lambda: FlowODEScheduler(solver="rk4"), "solver is 'rk4'"),
        (lambda: FlowODEScheduler(prediction_type="v_prediction"), "prediction_type is 'v_prediction'"),
        (lambda: FlowODEScheduler(shift=0.0), "shift is 0.0"),
        (lambda: FlowSDEScheduler(diffusion="pink"), "diffusion is 'pink'"),
        (lambda: FlowSDEScheduler(last_step_size=1.5), "last_step_size is 1.5"),
        (lambda: FlowODEScheduler().set_timesteps(0), "num_inference_steps is 0"),
        (lambda: FlowODEScheduler().set_timesteps(sigmas=[0.5, 0.7]), "sigmas must fall"),
        (lambda: FlowSDEScheduler().set_timesteps(3, sigmas=[1.0, 0.5]), "2 sigmas but num_inference_steps is 3"),
        (lambda: FlowSDEScheduler().step(torch.zeros(1), 1.0, torch.zeros(1)), "call set_timesteps"),
        (lambda: swap_scheduler(FlowODEScheduler(), "ddpm"), "'ddpm' cannot sample a flow model"),
        (lambda: swap_scheduler(DDIMScheduler(), "sde"), "'sde' cannot sample a diffusion model"),
        (lambda: swap_scheduler(DDIMScheduler(), "magic"), "scheduler is 'magic'"),
    ],
)
def test_errors_say_what_to_do(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_swapping_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for name in DIFFUSION:
            swap_scheduler(DDIMScheduler(), name)
    assert not caplog.records
