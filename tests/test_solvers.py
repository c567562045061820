"""ODE and SDE solvers: known solutions, steps of their own for each sample, agreement with torchdiffeq."""

import math
import sys

import pytest
import torch

from genssm.solvers import ADAPTIVE_METHODS, FIXED_METHODS, solve_ode, solve_sde
from tests.mixture import MixtureDenoiser, even_noise, moment_error

RATES = torch.tensor([0.1, 1.0, 4.0, 9.0])


def decay(x: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """dx/ds = rate x (1 + s), different for each sample, backwards in time."""
    return RATES[rows][:, None] * x * (1 + s)[:, None]


def exact(x: torch.Tensor) -> torch.Tensor:
    return x * torch.exp(-1.5 * RATES)[:, None]


@pytest.fixture
def x() -> torch.Tensor:
    return 1 + torch.rand(4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_adaptive_methods_keep_the_tolerance(method: str, x: torch.Tensor) -> None:
    pytest.importorskip("torchdiffeq")
    solution = solve_ode(decay, x, method=method, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(solution.sample, exact(x), rtol=5e-3, atol=1e-5)
    assert (solution.evaluations[1:] >= solution.evaluations[:-1]).all()  # a stiffer sample takes more steps


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_methods_converge_with_their_order(method: str, x: torch.Tensor) -> None:
    pytest.importorskip("torchdiffeq")
    order = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}[method]
    x = x.double()
    errors = [
        float((solve_ode(decay, x, method=method, steps=steps).sample - exact(x))[:3].abs().max()) for steps in (20, 40)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.6)


def test_tighter_tolerances_come_nearer(x: torch.Tensor) -> None:
    errors = []
    for rtol in (1e-2, 1e-4, 1e-6):
        solution = solve_ode(decay, x.double(), rtol=rtol, atol=rtol / 100)
        errors.append(float((solution.sample - exact(x.double())).abs().max()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_sample_does_not_depend_on_its_batch(method: str, x: torch.Tensor) -> None:
    pytest.importorskip("torchdiffeq")
    together = solve_ode(decay, x, method=method)
    for i in range(len(x)):
        alone = solve_ode(lambda x, s, rows, i=i: decay(x, s, torch.tensor([i])), x[i : i + 1], method=method)
        assert torch.equal(alone.sample[0], together.sample[i])
        assert int(alone.evaluations) == int(together.evaluations[i])


def test_dopri5_takes_the_steps_of_torchdiffeq(x: torch.Tensor) -> None:
    """For one sample the error norms agree, and so do the steps, up to the last one."""
    pytest.importorskip("torchdiffeq")
    for i in range(len(x)):

        def velocity(x: torch.Tensor, s: torch.Tensor, rows: torch.Tensor, i: int = i) -> torch.Tensor:
            return decay(x, s, torch.tensor([i]))

        ours, theirs = (solve_ode(velocity, x[i : i + 1].double(), error_norm=norm) for norm in ("sample", "batch"))
        assert abs(int(ours.evaluations) - int(theirs.evaluations)) <= 6
        torch.testing.assert_close(ours.sample, theirs.sample, rtol=5e-3, atol=1e-5)


def test_the_batch_norm_couples_samples(x: torch.Tensor) -> None:
    """Why it is not the default."""
    pytest.importorskip("torchdiffeq")
    together = solve_ode(decay, x, error_norm="batch").sample[:2]
    alone = solve_ode(decay, x[:2], error_norm="batch").sample
    assert not torch.equal(alone, together)


def test_only_unfinished_samples_are_evaluated(x: torch.Tensor) -> None:
    sizes = []

    def velocity(x: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        assert float(s.min()) >= 0 and float(s.max()) <= 1
        return decay(x, s, rows)

    solution = solve_ode(velocity, x)
    assert sizes[0] == 4 and sizes[-1] < 4
    assert sum(sizes) == int(solution.evaluations.sum())


def test_dopri5_needs_no_package_and_others_name_it(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    solve_ode(decay, x)
    with pytest.raises(ImportError, match=r"genssm\[ode\]"):
        solve_ode(decay, x, method="bosh3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "ODE solver is 'magic'; expected one of dopri5"),
        ({"method": "euler"}, "'euler' needs steps="),
        ({"method": "dopri5", "steps": 5}, "chooses its own steps"),
        ({"error_norm": "image"}, "error_norm is 'image'"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        solve_ode(decay, x, **options)


def test_runaway_and_infinite_velocities_end(x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="used 20 evaluations"):
        solve_ode(decay, x, rtol=1e-9, atol=1e-9, max_evaluations=20)
    with pytest.raises(RuntimeError, match="not finite near s"):
        solve_ode(lambda x, s, rows: x / (s - 0.5).clamp(min=0)[:, None], x)


@pytest.mark.parametrize("error_norm", ["sample", "batch"])
@pytest.mark.parametrize("family", ["linear", "gvp"])
def test_the_flow_of_a_mixture(family: str, error_norm: str) -> None:
    pytest.importorskip("torchdiffeq")
    denoiser = MixtureDenoiser(family)
    solution = solve_ode(lambda x, s, rows: denoiser(x, 1000 * s).sample, even_noise(512), error_norm=error_norm)
    assert moment_error(solution.sample) < 0.02


@pytest.mark.parametrize(
    ("path", "prediction", "diffusion", "last_step"),
    [("linear", "flow_prediction", "sigma", "mean"), ("gvp", "sample", "linear", "tweedie"),
     ("linear", "sample", "decreasing", "euler")],
)  # fmt: skip
def test_heun_sde_recovers_the_mixture(path: str, prediction: str, diffusion: str, last_step: str) -> None:
    denoiser, generator = MixtureDenoiser(path, prediction), torch.Generator().manual_seed(0)
    x = even_noise(8192)
    options = {"path": path, "prediction_type": prediction, "diffusion": diffusion, "last_step": last_step}
    noise = [torch.randn(x.shape, generator=generator) for _ in range(39)]
    sample = solve_sde(lambda x, s, rows: denoiser(x, 1000 * s).sample, x, points=40, noise=noise, **options)
    assert moment_error(sample) < 0.05
    with pytest.raises(ValueError, match="39 noise tensors for 20 points; expected 19"):
        solve_sde(lambda x, s, rows: x, x, points=20, noise=noise)
