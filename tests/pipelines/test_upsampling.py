import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from genssm.models import DiM, ZigMa
from genssm.pipelines import ClassConditionalImagePipeline, DiMUpsamplingPipeline
from genssm.pipelines.upsampling import matched_time
from genssm.single_step_solver import ContinuousDPMSolverScheduler
from tests.models.common import randomise

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CALL = {"num_inference_steps": 4, "output_type": "latent"}


def build(scheduler: object = None, **changes: object) -> DiMUpsamplingPipeline:
    torch.manual_seed(0)
    arguments = {
        "sample_size": 4, "in_channels": 1, "patch_size": 1, "hidden_size": 16, "num_layers": 5, "num_classes": 3,
        "d_state": 2, "time_convention": "one_based",
    }  # fmt: skip
    denoiser = randomise(DiM(**{**arguments, **changes})).eval()
    pipe = DiMUpsamplingPipeline(
        denoiser, scheduler or ContinuousDPMSolverScheduler(algorithm_type="dpmsolver", **SCHEDULE)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.mark.parametrize("factor", [2, 3])
def test_images_have_the_large_size_and_do_not_depend_on_the_batch(factor: int) -> None:
    pipe = build()
    together = pipe([0, 1], factor=factor, generator=seeds(0, 1), **CALL).images
    assert together.shape == (2, 1, 4 * factor, 4 * factor)
    assert together.isfinite().all()
    alone = pipe([1], factor=factor, generator=seeds(1), **CALL).images
    assert torch.equal(alone[0], together[1])


def test_without_correction_it_is_the_plain_pipeline() -> None:
    pipe = build()
    plain = ClassConditionalImagePipeline(pipe.denoiser, pipe.scheduler)
    plain.set_progress_bar_config(disable=True)
    size = {"height": 8, "width": 12}
    expected = plain([2], guidance_scale=4.0, generator=seeds(0), **size, **CALL).images
    without = pipe([2], upsample_scale=0.0, generator=seeds(0), **size, **CALL).images
    assert torch.equal(without, expected)
    assert not torch.allclose(pipe([2], generator=seeds(0), **size, **CALL).images, expected, atol=1e-3)


def test_correction_replaces_the_coarse_part_of_the_prediction() -> None:
    """At full strength the averaged prediction is the one at the small size, over m; below the threshold, its own."""
    pipe = build(num_classes=0)
    x, shapes, taken = torch.randn(1, 1, 8, 8), [], []
    pipe.denoiser.register_forward_pre_hook(lambda module, args: shapes.append((args[0].shape[-1], float(args[1]))))
    pipe.scheduler.step = lambda prediction, t, latents: taken.append(prediction) or type("", (), {"prev_sample": x})
    pipe(num_images=1, guidance_scale=1.0, latents=x, upsample_from=0.5, **CALL)
    assert [side for side, _ in shapes] == [8, 4, 8, 4, 8, 4, 8]  # times 1, 0.75, 0.5 and 0.25 of the grid
    abar = pipe.scheduler.alphas_cumprod[-1]
    small = torch.nn.functional.avg_pool2d(x, 2) / (abar + (1 - abar) / 4) ** 0.5
    with torch.no_grad():
        expected = pipe.denoiser(small, shapes[1][1]).sample / 2
        last = pipe.denoiser(x, shapes[6][1]).sample
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(taken[0], 2), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(taken[-1], last, rtol=1e-5, atol=1e-5)
    assert shapes[1][1] < shapes[0][1]


@pytest.mark.parametrize("factor", [2, 3])
def test_matched_time_has_the_ratio_of_the_averaged_image(factor: int) -> None:
    abar = ContinuousDPMSolverScheduler(**SCHEDULE).alphas_cumprod
    for level in (999, 800, 500):
        tau = matched_time(abar, level, factor)
        ratio = [float(abar[n - 1] / (1 - abar[n - 1])) for n in (level, round(float(tau) * 999))]
        assert ratio[1] == pytest.approx(factor**2 * ratio[0], rel=0.02)
    assert 0 <= matched_time(abar, 1, factor) <= 2e-3


def test_skip_tuning() -> None:
    """Three different images; the denoiser is left as it was, even after an error."""
    pipe = build()
    images = [
        pipe([1], skip_tuning=mode, generator=seeds(0), **CALL).images for mode in ("none", "time", "as_released")
    ]
    assert pipe.denoiser.skip_tuning is None
    strong, slight = ((image - images[0]).abs().max() for image in images[1:])
    assert 0 < slight < 0.05 * strong
    pipe.denoiser.enable_skip_tuning(0.5)
    with pytest.raises(ValueError, match="class label"):
        pipe([7], skip_tuning="time", **CALL)
    assert pipe.denoiser.skip_tuning == (0.5, "time")


def test_published_position_table_is_resized_twice() -> None:
    """A denoiser resized for the large size gives the same there, and a blurred table at the small size."""
    pipe = build()
    resized = DiMUpsamplingPipeline(pipe.denoiser.resized(8), pipe.scheduler)
    assert resized.native_size == (8, 8)
    resized.set_progress_bar_config(disable=True)
    size = {"height": 8, "width": 8}
    plain, twice = (p([1], generator=seeds(0), upsample_from=1.0, **size, **CALL).images for p in (pipe, resized))
    assert not torch.allclose(plain, twice, atol=1e-5)
    plain, twice = (p([1], generator=seeds(0), upsample_scale=0.0, **size, **CALL).images for p in (pipe, resized))
    assert torch.equal(plain, twice)


def test_save_load(tmp_path) -> None:
    """Its own folder, and that of a plain pipeline, whose scheduler it takes over."""
    pipe = build()
    pipe.save_pretrained(tmp_path / "own")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "own")
    assert type(loaded) is DiMUpsamplingPipeline and type(loaded.scheduler) is ContinuousDPMSolverScheduler
    loaded.set_progress_bar_config(disable=True)
    images = [p([1], generator=seeds(0), **CALL).images for p in (pipe, loaded)]
    assert torch.equal(*images)
    plain = ClassConditionalImagePipeline(pipe.denoiser, DDIMScheduler(clip_sample=False, **SCHEDULE))
    plain.save_pretrained(tmp_path / "plain")
    loaded = DiMUpsamplingPipeline.from_pretrained(tmp_path / "plain")
    loaded.set_progress_bar_config(disable=True)
    assert loaded([1], generator=seeds(0), **CALL).images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1}, "at least 2"),
        ({"factor": 2.0}, "whole number"),
        ({"height": 9}, "multiples of 2"),
        ({"upsample_from": 2.0}, "upsample_from"),
        ({"skip_tuning": "always"}, "as_released"),
        ({"ode_solver": "dopri5"}, "flow model"),
    ],
)
def test_bad_calls(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()([0], **{**CALL, **arguments})


def test_denoisers_that_do_not_fit() -> None:
    for scheduler in (FlowMatchEulerDiscreteScheduler(), DDIMScheduler(prediction_type="v_prediction")):
        with pytest.raises(ValueError, match="epsilon"):
            build(scheduler)([0], **CALL)
    other = ZigMa(sample_size=4, in_channels=1, hidden_size=16, num_layers=1, d_state=2)
    pipe = DiMUpsamplingPipeline(other, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_images=1, guidance_scale=1.0, **CALL).images.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="long skips of a DiM"):
        pipe(num_images=1, guidance_scale=1.0, skip_tuning="time", **CALL)
