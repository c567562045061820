"""Adaptive ODE solvers and a second-order SDE solver for flow models; grids of fixed steps are schedulers' business.

Times are those of :mod:`genssm.paths`: integration runs from s = 1 (noise) to s = 0 (data).

An adaptive solver chooses its steps from an error estimate. With one norm over the whole batch (the released samplers
of SiT, ZigMa and DiMSUM) the steps, and so the images, depend on what else is in the batch. Here the norm is taken
``"sample"`` by sample unless ``"batch"`` is asked for: every image has its own steps and is what it would be alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from genssm import paths
from genssm.paths import check_choice
from genssm.schedulers import reverse_drift

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FIXED_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")

# Dormand & Prince (1980), order 5(4): stage times, stage weights, and result minus the embedded order-4 result.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class ODESolution(NamedTuple):
    """``sample`` at the end, (B, ...), and ``evaluations`` of the velocity spent on each sample, (B,), int64."""

    sample: torch.Tensor
    evaluations: torch.Tensor


def solve_ode(
    velocity: Velocity,
    x: torch.Tensor,
    *,
    method: str = "dopri5",
    steps: int | None = None,
    start: float = 1.0,
    end: float = 0.0,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    error_norm: str = "sample",
    max_evaluations: int = 10_000,
) -> ODESolution:
    """Integrate dx/ds = velocity(x, s) from ``start`` to ``end``.

    The error of a step counts as its root mean square relative to atol + rtol max(|x|, |x_new|); a step is taken when
    that is at most 1 (Hairer, Norsett & Wanner, 1993, II.4).

    Args:
        velocity: called as ``velocity(x, s, rows)`` with x (n, ...), s (n,) float32 and rows (n,) int64, the places of
            these samples in the batch; returns (n, ...).
        x: initial samples, (B, ...), floating point; the result has its dtype.
        method: "dopri5" needs no further package; "dopri8", "bosh3", "adaptive_heun" and the fixed steps
            "euler", "midpoint", "heun2", "heun3", "rk4" are torchdiffeq's.
        steps: number of even steps, for the fixed ones.
        start, end: times.
        rtol, atol: tolerances of the adaptive ones.
        error_norm: "sample", or "batch" for one norm and one sequence of steps for all, by torchdiffeq: the sampler of
            the released codes, which steps beyond an ``end`` of 0 and interpolates back.
        max_evaluations: bound for each sample.
    Returns:
        the samples at ``end`` and the number of evaluations.
    Raises:
        ValueError: unknown method or norm, steps missing or not used.
        ImportError: torchdiffeq is needed and not installed.
        RuntimeError: the bound was reached or the velocity is not finite.
    """
    check_choice("ODE solver", method, ADAPTIVE_METHODS + FIXED_METHODS)
    check_choice("error_norm", error_norm, ("sample", "batch"))
    fixed = method in FIXED_METHODS
    if fixed != (steps is not None) or (fixed and steps < 1):
        need = "needs steps=, a positive number" if fixed else "chooses its own steps; leave steps out"
        raise ValueError(f"ODE solver {method!r} {need} (got steps={steps})")
    rows = torch.arange(len(x), device=x.device)
    if method == "dopri5" and error_norm == "sample":
        return _dopri5(velocity, x, start, end, rtol, atol, max_evaluations)
    grid = torch.linspace(start, end, (steps or 1) + 1, dtype=torch.float64)
    options = {"method": method, "rtol": rtol, "atol": atol, "bound": max_evaluations}
    if not fixed and (error_norm == "sample" or end != 0):
        options["options"] = {"step_t": grid[-1:].to(x.device)}
    if fixed or error_norm == "batch":
        return _torchdiffeq(velocity, x, grid, rows, **options)
    parts = [_torchdiffeq(velocity, x[i : i + 1], grid, rows[i : i + 1], **options) for i in range(len(x))]
    return ODESolution(*(torch.cat(values) for values in zip(*parts)))


def _torchdiffeq(
    velocity: Velocity, x: torch.Tensor, grid: torch.Tensor, rows: torch.Tensor, bound: int, **options: object
) -> ODESolution:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            f"ODE solver {options['method']!r} with this error norm is torchdiffeq's: pip install 'genssm[ode]' "
            "(dopri5 with error_norm='sample' needs nothing)"
        ) from error
    count = 0

    def function(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > bound:
            raise RuntimeError(f"the ODE solver used {bound} evaluations; loosen rtol and atol")
        return velocity(x, s.to(x.device, torch.float32).expand(len(x)), rows)

    try:
        sample = odeint(function, x, grid.to(x.device), **options)[-1]
    except AssertionError as error:
        raise RuntimeError(f"the ODE solver could not go on: {error}") from error
    return ODESolution(sample, torch.full((len(x),), count))


def _dopri5(
    velocity: Velocity, x: torch.Tensor, start: float, end: float, rtol: float, atol: float, bound: int
) -> ODESolution:
    """Dormand-Prince with a step size for each sample; only unfinished samples are evaluated."""
    sign = math.copysign(1.0, end - start)
    x = x.clone()
    counts = torch.full((len(x),), 2)
    s = torch.full((len(x),), start, dtype=torch.float64)
    rows = torch.arange(len(x))

    def evaluate(x: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return velocity(x, s.to(x.device, torch.float32), rows.to(x.device)).to(x.dtype)

    slope = evaluate(x, s, rows)
    width = _first_width(evaluate, x, s, slope, rows, sign, rtol, atol).clamp(max=abs(end - start))
    while len(rows):
        here, y, h = s[rows], x[rows.to(x.device)], width[rows]
        h = torch.minimum(h, (end - here).abs())
        last = h >= (end - here).abs()
        stages = [slope[rows.to(x.device)]]
        for c, weights in zip(_C[1:], _A[1:]):
            stage = _combine(y, stages, weights, sign * h)
            at = torch.where(last, end, here + sign * h) if c == 1.0 else here + c * sign * h
            stages.append(evaluate(stage, at, rows))
        error = _combine(torch.zeros_like(y), stages, _ERROR, sign * h)
        ratio = _norms(error / (atol + rtol * torch.maximum(y.abs(), stage.abs())))
        counts[rows] += len(_C) - 1
        if not torch.isfinite(ratio).all():
            raise RuntimeError(f"the velocity is not finite near s = {here[~torch.isfinite(ratio)][0]:.4f}")
        taken = ratio <= 1
        keep = rows[taken]
        s[keep] = torch.where(last, end, here + sign * h)[taken]
        chosen = taken.to(x.device)
        x[keep.to(x.device)] = stage[chosen]
        slope[keep.to(x.device)] = stages[-1][chosen]
        # Grow or shrink towards the tolerance: at most tenfold, at least to a fifth, never shrink after success.
        lower = torch.where(taken, 1.0, 0.2)
        width[rows] = h * (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(max=10.0).maximum(lower.double())
        if int(counts.max()) > bound:
            raise RuntimeError(f"the ODE solver used {bound} evaluations; loosen rtol and atol")
        rows = rows[s[rows] != end]
    return ODESolution(x, counts)


def _first_width(
    evaluate: Velocity,
    x: torch.Tensor,
    s: torch.Tensor,
    slope: torch.Tensor,
    rows: torch.Tensor,
    sign: float,
    rtol: float,
    atol: float,
) -> torch.Tensor:
    """A first step size for each sample from the sizes of x, x' and x'' (Hairer et al., 1993, II.4), (B,), float64."""
    scale = atol + rtol * x.abs()
    size, speed = _norms(x / scale), _norms(slope / scale)
    tiny = (size < 1e-5) | (speed < 1e-5)
    trial = torch.where(tiny, 1e-6, 0.01 * size / speed.clamp(min=1e-300))
    ahead = evaluate(_combine(x, [slope], (1.0,), sign * trial), s + sign * trial, rows)
    bend = _norms((ahead - slope) / scale) / trial
    steepest = torch.maximum(speed, bend)
    refined = torch.where(steepest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-300)) ** 0.2)
    return torch.minimum(100 * trial, refined)


def _combine(
    x: torch.Tensor, stages: Sequence[torch.Tensor], weights: Sequence[float], width: torch.Tensor
) -> torch.Tensor:
    """x + width sum(weights stages), width (B,)."""
    total = sum(weight * stage for weight, stage in zip(weights, stages) if weight)
    return x + paths.per_sample(width.to(x.device, x.dtype), x) * total


def _norms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of each sample, (B,), float64 on the CPU; row by row, as a batched sum may group otherwise."""
    return torch.stack([row.float().square().mean().sqrt() for row in x]).cpu().double()


def solve_sde(
    predict: Velocity,
    x: torch.Tensor,
    *,
    points: int,
    noise: Sequence[torch.Tensor],
    path: str = "linear",
    prediction_type: str = "flow_prediction",
    diffusion: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float | None = None,
) -> torch.Tensor:
    """The reverse SDE of :class:`genssm.schedulers.FlowSDEScheduler` by Heun's two-stage rule.

        y = x + sqrt(2 w(s) h) noise,   x_next = y + h (d(y, s) + d(y + h d(y, s), s - h)) / 2,   d = -v + w score

    The noise of a step comes before its first evaluation, which diffusers' ``step`` cannot express: hence a loop here.

    Args:
        predict: called as ``predict(x, s, rows)``, see :func:`solve_ode`; answers a ``prediction_type``.
        x: pure noise, (B, ...).
        points: grid points from s = 1 to ``last_step_size``; points - 1 stochastic steps.
        noise: standard normal draws, one (B, ...) for each stochastic step.
        path, prediction_type, diffusion, diffusion_norm, last_step, last_step_size: as in FlowSDEScheduler;
            last_step_size None takes 1 / points.
    Returns:
        (B, ...), the samples at s = 0.
    Raises:
        ValueError: unknown choices or the wrong number of draws.
    """
    check_choice("last_step", last_step, ("mean", "euler", "tweedie"))
    if len(noise) != points - 1:
        raise ValueError(f"{len(noise)} noise tensors for {points} points; expected {points - 1}, one for each step")
    rows = torch.arange(len(x), device=x.device)
    grid = torch.linspace(1.0, last_step_size or 1 / points, points, dtype=torch.float64)

    def drift(x: torch.Tensor, s: torch.Tensor, stochastic: bool = True) -> torch.Tensor:
        times = s.to(x.device, torch.float32).expand(len(x))
        w = paths.diffusion(path, diffusion if stochastic else "none", times, diffusion_norm)
        return reverse_drift(path, predict(x, times, rows), x, times, w, source=prediction_type)

    for s, r, draw in zip(grid[:-1], grid[1:], noise):
        width = float(s - r)
        w = paths.diffusion(path, diffusion, s, diffusion_norm)
        y = x + float((2 * w * width).sqrt()) * draw
        slope = drift(y, s)
        x = y + 0.5 * width * (slope + drift(y + width * slope, r))
    if last_step == "tweedie":
        times = grid[-1].to(x.device, torch.float32).expand(len(x))
        prediction = predict(x, times, rows)
        return paths.convert(path, prediction, x, times, source=prediction_type, target="sample")
    return x + float(grid[-1]) * drift(x, grid[-1], stochastic=last_step == "mean")
