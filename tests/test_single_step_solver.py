import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from genssm.single_step_solver import ContinuousDPMSolverScheduler, ContinuousSchedule, step_orders

RELEASED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPREAD = 0.6  # standard deviation of the Gaussian data whose exact solutions the solver is tested on


def exact_noise(scheduler: ContinuousDPMSolverScheduler, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The best prediction of the noise in x when the data are N(0, SPREAD^2)."""
    log_alpha = scheduler.schedule.log_alpha((timestep.double().numpy() + 1) / 1000)
    variance = float(-np.expm1(2 * log_alpha))
    return x * variance**0.5 / (float(np.exp(2 * log_alpha)) * SPREAD**2 + variance)


def sample(scheduler: ContinuousDPMSolverScheduler, steps: int, x: torch.Tensor) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        noise, kind = exact_noise(scheduler, x, timestep), scheduler.config.prediction_type
        alpha = float(np.exp(scheduler.schedule.log_alpha((float(timestep) + 1) / 1000)))
        sigma = (1 - alpha**2) ** 0.5
        clean = (x - sigma * noise) / alpha
        output = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[kind]
        x = scheduler.step(output, timestep, x).prev_sample
    return x


def exact_end(scheduler: ContinuousDPMSolverScheduler, x: torch.Tensor) -> torch.Tensor:
    """Where the probability-flow ODE of this data ends: x scales with the standard deviation at each time."""
    deviations = []
    for t in (1.0, 0.001):
        alpha2 = np.exp(2 * scheduler.schedule.log_alpha(t))
        deviations.append(float(np.sqrt(alpha2 * SPREAD**2 + 1 - alpha2)))
    return x * deviations[1] / deviations[0]


@pytest.mark.parametrize(
    ("evaluations", "order", "expected"),
    [
        (1, 3, [1]),
        (2, 3, [2]),
        (3, 3, [2, 1]),
        (6, 3, [3, 2, 1]),
        (7, 3, [3, 3, 1]),
        (8, 3, [3, 3, 2]),
        (50, 3, [3] * 16 + [2]),
        (5, 2, [2, 2, 1]),
        (4, 2, [2, 2]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_step_orders(evaluations: int, order: int, expected: list[int]) -> None:
    assert step_orders(evaluations, order) == expected
    assert sum(expected) == evaluations


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(algorithm: str, order: int) -> None:
    """Three times the steps divide the error on a problem with a known solution by 3^order, or more."""
    scheduler = ContinuousDPMSolverScheduler(
        algorithm_type=algorithm, solver_order=order, spacing="log_snr", **RELEASED
    )
    x = torch.tensor([[1.0], [-2.0]])
    errors = [float((sample(scheduler, n, x) - exact_end(scheduler, x)).abs().max()) for n in (12, 36)]
    assert errors[1] > 1e-5, "too small to measure in float32"
    assert errors[0] / errors[1] > 0.7 * 3**order
    if order < 3:
        assert errors[0] / errors[1] < 1.3 * 3**order


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("steps", [10, 11, 12])
def test_predictions_of_every_kind_lead_to_the_same_sample(algorithm: str, steps: int) -> None:
    x = torch.tensor([[1.0], [-2.0]])
    results = [
        sample(ContinuousDPMSolverScheduler(prediction_type=kind, algorithm_type=algorithm), steps, x)
        for kind in ("epsilon", "sample", "v_prediction")
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_grid_of_times() -> None:
    scheduler = ContinuousDPMSolverScheduler()
    scheduler.set_timesteps(10)
    torch.testing.assert_close(scheduler.timesteps, 999 - 99.9 * torch.arange(10.0))
    scheduler = ContinuousDPMSolverScheduler(spacing="log_snr")
    scheduler.set_timesteps(10)
    ratios = scheduler.schedule.half_log_snr((scheduler.timesteps.double().numpy() + 1) / 1000)
    end = scheduler.schedule.half_log_snr(np.array(0.001))
    np.testing.assert_allclose(np.diff(ratios), (end - ratios[0]) / 10, rtol=1e-3)


def test_continuous_schedule_agrees_with_the_discrete_one() -> None:
    levels = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule = ContinuousSchedule(levels.betas.double().numpy())
    times = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(np.exp(2 * schedule.log_alpha(times)), levels.alphas_cumprod.numpy(), rtol=1e-4)
    between = np.array([0.0105, 0.3333, 0.99999, 0.0004])
    np.testing.assert_allclose(schedule.time_at(schedule.half_log_snr(between)), between, rtol=1e-9)
    middle = schedule.log_alpha(np.array([0.5, 0.5005, 0.501]))
    np.testing.assert_allclose(middle[1], (middle[0] + middle[2]) / 2, rtol=1e-12)


def test_noising_agrees_with_diffusers() -> None:
    scheduler = ContinuousDPMSolverScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    other = DDPMScheduler()
    clean, noise, timesteps = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([0, 500, 999])
    noisy = other.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(scheduler.add_noise(clean, noise, timesteps), noisy, rtol=1e-4, atol=1e-5)
    half = scheduler.add_noise(clean, noise, torch.tensor([0.5, 500.5, 998.5]))
    assert not torch.allclose(half, noisy)


def test_configuration_comes_from_and_goes_to_other_schedulers(tmp_path) -> None:
    trained = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.001, prediction_type="v_prediction")
    scheduler = ContinuousDPMSolverScheduler.from_config(trained.config, algorithm_type="dpmsolver")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.algorithm_type == "dpmsolver"
    assert torch.equal(scheduler.alphas_cumprod, trained.alphas_cumprod)
    scheduler.save_pretrained(tmp_path)
    loaded = ContinuousDPMSolverScheduler.from_pretrained(tmp_path)
    for key in ("beta_schedule", "beta_start", "prediction_type", "algorithm_type"):
        assert loaded.config[key] == scheduler.config[key]
    assert DDIMScheduler.from_config(scheduler.config).config.beta_start == 0.001
    assert DDIMScheduler in scheduler.compatibles


def test_a_schedule_that_ends_without_signal() -> None:
    scheduler = ContinuousDPMSolverScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", **RELEASED)
    assert scheduler.betas[-1] == 1
    x = sample(scheduler, 30, torch.tensor([[1.0], [-2.0]]))
    torch.testing.assert_close(x, exact_end(scheduler, torch.tensor([[1.0], [-2.0]])), rtol=0.05, atol=0)


@pytest.mark.parametrize("explicit", [True, False])
def test_sampling_from_the_middle(explicit: bool) -> None:
    """From begin_index, or from the first timestep handed over, the rest of the grid is divided into steps anew."""

    def go_on(order: int, first: int, x: torch.Tensor) -> torch.Tensor:
        scheduler = ContinuousDPMSolverScheduler(solver_order=order)
        scheduler.set_timesteps(8)
        if explicit:
            scheduler.set_begin_index(first)
            assert scheduler.begin_index == first and scheduler.step_index is None
        for timestep in scheduler.timesteps[first:]:
            x = scheduler.step(exact_noise(scheduler, x, timestep), timestep, x).prev_sample
        assert scheduler.step_index == 8
        return x

    scheduler, x = ContinuousDPMSolverScheduler(solver_order=1), torch.tensor([[1.0]])
    scheduler.set_timesteps(8)
    for timestep in scheduler.timesteps[:5]:
        x = scheduler.step(exact_noise(scheduler, x, timestep), timestep, x).prev_sample
    whole = go_on(1, 0, torch.tensor([[1.0]]))
    torch.testing.assert_close(go_on(1, 5, x), whole, rtol=0, atol=0)
    assert not torch.allclose(go_on(3, 5, x), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "epsilon"),
        ({"algorithm_type": "deis"}, "dpmsolver"),
        ({"spacing": "karras"}, "log_snr"),
        ({"solver_order": 4}, "1, 2 or 3"),
    ],
)
def test_bad_configurations(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuousDPMSolverScheduler(**arguments)


def test_bad_calls() -> None:
    scheduler, x = ContinuousDPMSolverScheduler(), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 999.0, x)
    with pytest.raises(ValueError, match="positive"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"pass scheduler\.timesteps"):
        scheduler.step(x, 950.0, x)
