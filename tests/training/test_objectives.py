"""Objectives: convention of time and sign, the reference's path quantities, minima at the truth, reproducible draws."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from genssm import paths
from genssm.config import ObjectiveConfig
from genssm.schedulers import FlowODEScheduler
from genssm.training.objectives import DiffusionObjective, FlowObjective, build_objective, draw
from tests.mixture import COVARIANCES, MEANS, MixtureDenoiser


class Spy(torch.nn.Module):
    """Answers what ``answer(noisy, timestep)`` says and keeps its last inputs."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **condition: object) -> SimpleNamespace:
        self.seen = (hidden_states, timestep, condition)
        return SimpleNamespace(sample=self.answer(hidden_states, timestep))


def zero(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def mixture_points(count: int) -> torch.Tensor:
    kinds = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])[torch.arange(count) % 10]  # the mixture's weights
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0)).double()
    spread = torch.linalg.cholesky(COVARIANCES[kinds])
    return (MEANS[kinds] + (spread @ noise[..., None])[..., 0]).float().reshape(count, 2, 1, 1)


def test_convention_of_time_and_sign() -> None:
    """timestep 0 is data, 1000 is noise; the velocity points from data to noise."""
    clean, noise = torch.randn(2, 3, 1, 4, 4).unbind()
    spy = Spy(lambda x, t: noise - clean)
    loss = FlowObjective().loss(spy, clean, noise=noise, timesteps=torch.tensor([0.0, 250.0, 1000.0]))
    noisy, timesteps, _ = spy.seen
    torch.testing.assert_close(noisy[0], clean[0])
    torch.testing.assert_close(noisy[1], 0.75 * clean[1] + 0.25 * noise[1])
    torch.testing.assert_close(noisy[2], noise[2])
    assert timesteps.tolist() == [0.0, 250.0, 1000.0]
    torch.testing.assert_close(loss, torch.zeros(3))


@pytest.mark.parametrize("path", paths.PATHS)
def test_velocity_is_the_derivative_of_the_path(path: str) -> None:
    clean, noise = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    s = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)
    step = 1e-6
    ahead, behind = (paths.interpolate(path, clean, noise, s + d) for d in (step, -step))
    torch.testing.assert_close(
        paths.velocity(path, clean, noise, s), (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("source", paths.PREDICTIONS)
@pytest.mark.parametrize("target", paths.PREDICTIONS)
def test_predictions_convert_into_each_other(path: str, source: str, target: str) -> None:
    clean, noise = torch.randn(2, 4, 2, 3, dtype=torch.float64).unbind()
    s = torch.tensor([0.02, 0.4, 0.7, 0.98], dtype=torch.float64)
    x = paths.interpolate(path, clean, noise, s)
    sigma = paths.coefficients(path, s).sigma[:, None, None]
    truth = {
        "flow_prediction": paths.velocity(path, clean, noise, s),
        "epsilon": noise,
        "sample": clean,
        "score": -noise / sigma,
    }
    converted = paths.convert(path, truth[source], x, s, source=source, target=target)
    torch.testing.assert_close(converted, truth[target], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_velocity_is_finite_at_both_ends(path: str) -> None:
    x, v = torch.randn(2, 2, 3).unbind()
    for s in (torch.zeros(2), torch.ones(2)):
        for target in ("sample", "epsilon"):
            assert torch.isfinite(paths.convert(path, v, x, s, source="flow_prediction", target=target)).all()


def _reference(golden_dir: Path, case: str) -> dict[str, torch.Tensor]:
    file = golden_dir / f"{case}.safetensors"
    if not file.is_file():
        pytest.skip(f"no {file}")
    return load_file(file)


@pytest.mark.parametrize("path", paths.PATHS)
def test_path_quantities_equal_the_reference(golden_dir: Path, path: str) -> None:
    """ZigMa's: data at t = 1 and the velocity along t, hence s = 1 - t and the opposite sign."""
    golden = _reference(golden_dir, "zigma/zigma_objective_paths")
    data, noise, output, s = (golden[f"in.{name}"] for name in ("data", "noise", "model_output", "t"))
    s = 1 - s
    c = paths.coefficients(path, s)
    noisy = paths.interpolate(path, data, noise, s)
    found = {
        "alpha": c.alpha, "sigma": c.sigma, "dalpha": -c.d_alpha, "dsigma": -c.d_sigma, "xt": noisy,
        "ut": -paths.velocity(path, data, noise, s),
        "drift_var": paths.drift_variance(path, s),
        "drift": paths.per_sample(paths.drift_coefficient(path, s), noisy) * noisy,
        "score_from_velocity": paths.convert(path, -output, noisy, s, source="flow_prediction", target="score"),
        "loss_velocity": FlowObjective(path).loss_of(-output, data, noise, s),
        "loss_noise": FlowObjective(path, "epsilon").loss_of(output, data, noise, s),
        "loss_score": FlowObjective(path, "score").loss_of(output, data, noise, s),
    }  # fmt: skip
    for name, value in found.items():
        torch.testing.assert_close(value, golden[f"out.{path}.{name}"], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["Linear", "GVP", "VP"])
def test_weights_and_diffusions_equal_the_reference(golden_dir: Path, name: str) -> None:
    golden = _reference(golden_dir, "dimsum/paths")
    data, noise, output, s = (golden[f"in.{key}"] for key in ("data", "noise", "model_output", "t"))
    s, path = 1 - s, name.lower()
    for form in paths.DIFFUSIONS:
        expected = golden[f"out.{name}.diffusion.{'SBDM' if form == 'sbdm' else form}"]
        torch.testing.assert_close(paths.diffusion(path, form, s), expected.expand(4), rtol=2e-5, atol=2e-5, msg=form)
    for kind, prediction in (("noise", "epsilon"), ("score", "score")):
        for weighting in ("none", "velocity", "likelihood"):
            loss = FlowObjective(path, prediction, weighting=weighting).loss_of(output, data, noise, s)
            expected = golden[f"out.{name}.loss.{kind}.{weighting}"]
            torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-5, msg=f"{kind} {weighting}")


@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
def test_velocity_weighting_counts_the_velocity_error(prediction: str) -> None:
    """The same error seen through any prediction has the same weighted loss."""
    clean, noise, error = torch.randn(3, 4, 2, 3, 3).unbind()
    s = torch.tensor([0.1, 0.4, 0.6, 0.9])
    for path in paths.PATHS:
        x = paths.interpolate(path, clean, noise, s)
        wrong = paths.velocity(path, clean, noise, s) + error
        answer = paths.convert(path, wrong, x, s, source="flow_prediction", target=prediction)
        loss = FlowObjective(path, prediction, weighting="velocity").loss_of(answer, clean, noise, s)
        torch.testing.assert_close(loss, error.square().flatten(1).mean(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(prediction: str) -> None:
    """The error of x_0 counts min(SNR, gamma), whatever is predicted (Hang et al., 2023, equation 8)."""
    clean, noise, error = torch.randn(3, 4, 2, 3, 3).unbind()
    n = torch.tensor([5, 200, 500, 990])
    abar = DDIMScheduler().alphas_cumprod[n].reshape(4, 1, 1, 1)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    x = a * clean + s * noise
    wrong = clean + error
    wrong_noise = (x - a * wrong) / s
    answer = {"sample": wrong, "epsilon": wrong_noise, "v_prediction": a * wrong_noise - s * wrong}[prediction]
    loss = DiffusionObjective(prediction, "min_snr").loss_of(answer, clean, noise, n)
    snr = (abar / (1 - abar)).flatten()
    expected = snr.clamp(max=5.0) * error.square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-5)


def test_min_snr_is_finite_without_signal() -> None:
    objective = DiffusionObjective("v_prediction", "min_snr", scheduler={"rescale_betas_zero_snr": True})
    spy = Spy(zero)
    loss = objective.loss(spy, torch.ones(1, 1, 4, 4), noise=torch.ones(1, 1, 4, 4), timesteps=torch.tensor([999]))
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(spy.seen[0], torch.ones(1, 1, 4, 4), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("objective", "family"),
    [(FlowObjective(path, kind), path) for path in paths.PATHS for kind in ("flow_prediction", "epsilon", "sample")]
    + [(DiffusionObjective(kind), "diffusion") for kind in ("epsilon", "v_prediction", "sample")],
    ids=lambda value: value if isinstance(value, str) else value.prediction_type,
)
def test_the_exact_answer_has_the_least_loss(objective: object, family: str) -> None:
    """Training aims at what sampling assumes: the conditional mean beats everything near it."""
    exact = MixtureDenoiser(family, objective.prediction_type)
    clean = mixture_points(40000)

    def loss(factor: float, offset: float) -> float:
        model = Spy(lambda x, t: factor * exact(x, t).sample + offset)
        return float(objective.loss(model, clean, torch.Generator().manual_seed(1)).mean())

    best = loss(1.0, 0.0)
    for factor, offset in ((1.1, 0.0), (0.9, 0.0), (1.0, 0.2), (1.0, -0.2), (-1.0, 0.0)):
        assert best < loss(factor, offset), (factor, offset)


@pytest.mark.parametrize("objective", [FlowObjective(), FlowObjective("gvp", "epsilon"), DiffusionObjective()])
def test_draws_are_reproducible_and_independent_of_the_batch(objective: object) -> None:
    clean = torch.randn(4, 1, 8, 8)
    one = [objective.loss(Spy(zero), clean, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*one)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    together = objective.loss(Spy(zero), clean, generators())
    alone = [objective.loss(Spy(zero), clean[i : i + 1], generators()[i : i + 1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    with pytest.raises(ValueError, match="4 generators for a batch of 3"):
        objective.loss(Spy(zero), clean[:3], generators())


def test_loss_hands_on_conditions_and_types() -> None:
    spy = Spy(lambda x, t: x.bfloat16())
    clean = torch.randn(2, 1, 4, 4, dtype=torch.bfloat16)
    loss = FlowObjective().loss(spy, clean, class_labels=torch.tensor([1, 2]))
    noisy, timesteps, condition = spy.seen
    assert (noisy.dtype, timesteps.dtype, loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert condition["class_labels"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="out_channels = in_channels"):
        FlowObjective().loss(Spy(lambda x, t: torch.cat([x, x], 1)), clean)


def test_times_have_the_distribution_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = FlowObjective().sample_timesteps(20000, generator) / 1000
    assert float(uniform.min()) >= 0 and float(uniform.max()) <= 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.003)
    normal = FlowObjective(time_sampling="logit_normal", logit_mean=0.5, logit_std=0.8).sample_timesteps(
        20000, generator
    )
    logit = torch.logit(normal / 1000)
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(logit.std()) == pytest.approx(0.8, abs=0.03)
    inner = FlowObjective(prediction_type="epsilon").sample_timesteps(20000, generator)
    assert float(inner.min()) >= 1 and float(inner.max()) <= 999
    discrete = DiffusionObjective(scheduler={"num_train_timesteps": 10}).sample_timesteps(20000, generator)
    assert discrete.dtype == torch.int64
    torch.testing.assert_close(discrete.bincount(minlength=10) / 20000, torch.full((10,), 0.1), rtol=0, atol=0.01)


def test_draw_moves_to_the_device_of_the_data(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    assert draw((2, 3), generator, device).device.type == device.type


def test_schedulers_that_are_saved() -> None:
    assert isinstance(FlowObjective(scheduler={"shift": 3.0}).scheduler(), FlowMatchEulerDiscreteScheduler)
    assert FlowObjective(scheduler={"shift": 3.0}).scheduler().config.shift == 3.0
    gvp = FlowObjective("gvp", scheduler={"solver": "heun"}).scheduler()
    assert isinstance(gvp, FlowODEScheduler)
    assert (gvp.config.path, gvp.config.solver) == ("gvp", "heun")
    ddim = DiffusionObjective("v_prediction", scheduler={"beta_schedule": "scaled_linear"}).scheduler()
    assert isinstance(ddim, DDIMScheduler)
    assert ddim.config.prediction_type == "v_prediction"
    assert (ddim.config.beta_schedule, ddim.config.clip_sample) == ("scaled_linear", False)


def test_build_objective_from_the_configuration() -> None:
    flow = build_objective(ObjectiveConfig(path="gvp", time_sampling="logit_normal", logit_mean=0.3))
    assert (flow.path, flow.time_sampling, flow.logit_mean) == ("gvp", "logit_normal", 0.3)
    config = ObjectiveConfig(name="diffusion", prediction_type="sample", weighting="min_snr", min_snr_gamma=2.0)
    diffusion = build_objective(config)
    assert (diffusion.prediction_type, diffusion.weighting, diffusion.min_snr_gamma) == ("sample", "min_snr", 2.0)
    fields = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    assert {"name", "prediction_type", "path", "scheduler"} <= fields


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "diffusion"}, "prediction_type is 'flow_prediction'; expected one of epsilon"),
        ({"name": "diffusion", "prediction_type": "epsilon", "path": "gvp"}, "objective.path is 'gvp', but"),
        ({"weighting": "min_snr"}, "weighting is 'min_snr'; expected one of none, velocity, likelihood"),
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
        ({"scheduler": {"shfit": 3.0}}, "has no argument 'shfit'; it has"),
        ({"time_epsilon": 0.7}, "time_epsilon is 0.7"),
        (
            {"name": "diffusion", "prediction_type": "epsilon", "scheduler": {"rescale_betas_zero_snr": True}},
            "ends without signal",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_objective(ObjectiveConfig(**settings))


def test_short_training_reaches_the_known_velocity() -> None:
    """One Gaussian: the best velocity is linear in x at each time; a linear fit by the objective finds it."""
    objective = FlowObjective()
    s = 0.5
    generator = torch.Generator().manual_seed(0)
    clean = 0.5 + 0.3 * torch.randn(20000, 1, 1, 1, generator=generator)
    slope = torch.zeros(2, requires_grad=True)
    model = Spy(lambda x, t: slope[0] * x + slope[1])
    optimiser = torch.optim.LBFGS([slope], max_iter=30)
    times, noise = torch.full((len(clean),), 1000 * s), torch.randn(clean.shape, generator=generator)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = objective.loss(model, clean, noise=noise, timesteps=times).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    variance = (1 - s) ** 2 * 0.3**2 + s**2
    expected = (s - (1 - s) * 0.3**2) / variance  # cov(noise - clean, x) / var(x)
    torch.testing.assert_close(slope.detach(), torch.tensor([expected, -0.5 - expected * 0.25]), rtol=0, atol=0.03)
