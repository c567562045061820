"""DPM-Solver in its single-step form on the continuous time of a discrete schedule: the sampler of DiM's numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput

from genssm.paths import check_choice, per_sample

PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass
class SingleStepSolverOutput(BaseOutput):
    """``prev_sample``: the sample at the next time of the grid, (B, ...), float32."""

    prev_sample: torch.Tensor


class ContinuousSchedule:
    """The variance-preserving schedule of N discrete noise levels at any time t in (0, 1].

        x_t = alpha(t) x_0 + sigma(t) noise,      log alpha(k / N) = 1/2 log abar_k

    with log alpha linear between and beyond the levels (Lu et al. 2022, arXiv:2206.00927). Everything in
    float64.

    Args:
        betas: of the levels 1..N, (N,). abar is kept above 2^-24, as in diffusers' solvers, where a schedule ends
            without signal.
    """

    def __init__(self, betas: Sequence[float] | np.ndarray) -> None:
        with np.errstate(divide="ignore"):
            log_abar = np.cumsum(np.log1p(-np.asarray(betas, dtype=np.float64)))
        self._log_alphas = 0.5 * np.maximum(log_abar, -24 * np.log(2))
        self._times = np.arange(1, len(self._log_alphas) + 1) / len(self._log_alphas)

    def log_alpha(self, t: np.ndarray) -> np.ndarray:
        """log alpha at times t, any shape."""
        return _interpolate(np.asarray(t, dtype=np.float64), self._times, self._log_alphas)

    def half_log_snr(self, t: np.ndarray) -> np.ndarray:
        """lambda = log(alpha / sigma) at times t, any shape."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))

    def time_at(self, half_log_snr: np.ndarray) -> np.ndarray:
        """The time at which lambda has this value, any shape: inverse of :meth:`half_log_snr`."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2 * np.asarray(half_log_snr, dtype=np.float64))
        return _interpolate(log_alpha, self._log_alphas[::-1], self._times[::-1])


def _interpolate(x: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Piecewise linear through (xs, ys), xs rising, continued in a straight line at both ends."""
    i = np.clip(np.searchsorted(xs, x) - 1, 0, len(xs) - 2)
    return ys[i] + (x - xs[i]) * (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])


def step_orders(evaluations: int, order: int = 3) -> list[int]:
    """Orders of the solver's steps: as many of the highest as fit, then lower ones; they add up to ``evaluations``.

    A step of order o takes o evaluations. With order 3 and a multiple of 3 the end is 2, 1 (Lu et al. 2022).
    """
    steps, rest = divmod(evaluations, order)
    if order == 3 and rest == 0 and steps:
        return [3] * (steps - 1) + [2, 1]
    return [order] * steps + [rest] * (rest > 0)


class ContinuousDPMSolverScheduler(SchedulerMixin, ConfigMixin):
    """Single-step DPM-Solver and DPM-Solver++ of order up to 3 (Lu et al. 2022, arXiv:2206.00927, 2211.01095).

    n evaluations stand on a grid of continuous times from t = 1 to the first noise level, even in time or in log-SNR.
    A step of order o leads from one point of the grid to the o-th next and evaluates at the points between. What
    differs from diffusers' DPMSolverSinglestepScheduler: times are not rounded to integers, and the inner points of a
    third-order step are reached by the formula of the paper.

    ``timesteps`` are diffusers' (level k of 1..N is k - 1), with fractions.

    Args:
        num_train_timesteps: number N of noise levels.
        beta_start, beta_end, beta_schedule, trained_betas: the levels, as in diffusers' DDPMScheduler, whose defaults
            these are. DiM has 0.00085, 0.012 and "scaled_linear".
        rescale_betas_zero_snr: let the levels end without signal, as there.
        prediction_type: "epsilon", "sample" or "v_prediction".
        algorithm_type: "dpmsolver++": the solver extrapolates the data prediction; "dpmsolver": the noise prediction.
        solver_order: 1, 2 or 3.
        spacing: "time" or "log_snr".

    Raises:
        ValueError: an unknown choice.
    """

    _compatibles: ClassVar[list[str]] = [kind.name for kind in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        algorithm_type: str = "dpmsolver++",
        solver_order: int = 3,
        spacing: str = "time",
    ) -> None:
        check_choice("prediction_type", prediction_type, PREDICTIONS)
        check_choice("algorithm_type", algorithm_type, ("dpmsolver++", "dpmsolver"))
        check_choice("spacing", spacing, ("time", "log_snr"))
        if solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order is {solver_order}; expected 1, 2 or 3")
        levels = DDPMScheduler(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self.betas, self.alphas_cumprod = levels.betas, levels.alphas_cumprod
        self.schedule = ContinuousSchedule(self.betas.double().numpy())
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._step_index = self._begin_index = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the grid.

        Args:
            num_inference_steps: evaluations of the denoiser.
            device: of ``timesteps``.
        Raises:
            ValueError: less than one evaluation.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; expected a positive number")
        levels = self.config.num_train_timesteps
        # float32 as in the released sampler, whose upsampling looks up tables by the truncated time
        times = torch.linspace(1.0, 1 / levels, num_inference_steps + 1, dtype=torch.float32)
        if self.config.spacing == "log_snr":
            ends = self.schedule.half_log_snr(times[[0, -1]].double().numpy())
            times = torch.from_numpy(self.schedule.time_at(np.linspace(*ends, num_inference_steps + 1))).float()
        self.num_inference_steps = num_inference_steps
        self.timesteps = (levels * times - 1)[:-1].to(device)
        grid = times.double().numpy()
        self._lambdas = self.schedule.half_log_snr(grid)
        self._alphas = np.exp(self.schedule.log_alpha(grid))
        self._sigmas = np.sqrt(-np.expm1(2 * self.schedule.log_alpha(grid)))
        self._step_index = None
        self.set_begin_index(0)
        self._begin_index = None

    @property
    def step_index(self) -> int | None:
        """Position on the grid of evaluations; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position of the first step, for sampling that starts in the middle."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this position of ``timesteps``: the steps are divided anew from there."""
        self._begin_index = begin_index
        self._plan, position = {}, begin_index
        for order in step_orders(self.num_inference_steps - begin_index, self.config.solver_order):
            self._plan |= {position + j: (position, order) for j in range(order)}
            position += order

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noise clean samples (B, ...) to ``timesteps`` (B,), fractions allowed: alpha sample + sigma noise."""
        times = (torch.as_tensor(timesteps).double().cpu().numpy() + 1) / self.config.num_train_timesteps
        log_alpha = torch.from_numpy(np.atleast_1d(self.schedule.log_alpha(times))).to(original_samples.device)
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        alpha, sigma = (per_sample(c.to(original_samples.dtype), original_samples) for c in (alpha, sigma))
        return alpha * original_samples + sigma * noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SingleStepSolverOutput | tuple[torch.Tensor]:
        """One evaluation's worth of progress.

        Args:
            model_output: prediction at (sample, timestep), (B, ...).
            timestep: the current entry of ``timesteps``.
            sample: (B, ...).
            return_dict: False returns a tuple.
        Returns:
            ``prev_sample``, (B, ...), float32: at an inner point of a step, or at its end.
        Raises:
            ValueError: no grid was set, or the sampling does not start at ``timestep``.
        """
        index = self._position(timestep)
        start, order = self._plan[index]
        sample = sample.float()
        prediction = self._convert(model_output.float(), sample, index)
        if index == start:
            self._start_sample, self._predictions = sample, []
        self._predictions.append(prediction)
        result = self._update(start, index + 1, order)
        self._step_index = index + 1
        return SingleStepSolverOutput(result) if return_dict else (result,)

    def _position(self, timestep: float | torch.Tensor) -> int:
        if self._step_index is None:
            if self.num_inference_steps is None:
                raise ValueError("call set_timesteps before step")
            if self._begin_index is None:
                nearest = int((self.timesteps.cpu() - float(timestep)).abs().argmin())
                self.set_begin_index(nearest)
            self._step_index = self._begin_index
            expected = float(self.timesteps[self._step_index])
            if abs(expected - float(timestep)) > 1e-3:
                raise ValueError(
                    f"timestep is {float(timestep)} but the grid is at {expected}; pass scheduler.timesteps"
                )
        return self._step_index

    def _convert(self, output: torch.Tensor, x: torch.Tensor, index: int) -> torch.Tensor:
        """The data prediction (dpmsolver++) or the noise prediction (dpmsolver)."""
        alpha, sigma, kind = float(self._alphas[index]), float(self._sigmas[index]), self.config.prediction_type
        if self.config.algorithm_type == "dpmsolver++":
            if kind == "epsilon":
                return (x - sigma * output) / alpha
            return output if kind == "sample" else alpha * x - sigma * output
        if kind == "epsilon":
            return output
        return (x - alpha * output) / sigma if kind == "sample" else alpha * output + sigma * x

    def _update(self, start: int, target: int, order: int) -> torch.Tensor:
        """The sample at the grid point ``target`` within a step from ``start``, from the predictions made so far.

        With s the start, h the step in lambda, r_j h the way to its j-th inner point, r the share to ``target``,
        E(r) = expm1(q r h) and q = -1 (data) or 1 (noise); arXiv:2206.00927 algorithms 1 and 2, 2211.01095 appendix:

            x_1 = a x - b E(r_1) G_0
            x_2 = a x - b E(r_2) G_0 - q (r_2 / r_1) b (E(r_2) / (r_2 h) - q) (G_1 - G_0)
            x_t = a x - b E(1) (G_0 + (G_1 - G_0) / (2 r_1))                     order 2
            x_t = a x - b E(1) G_0 - (q / r_2) b (E(1) / h - q) (G_2 - G_0)      order 3
        """
        data = self.config.algorithm_type == "dpmsolver++"
        numerator, b = (self._sigmas, self._alphas[target]) if data else (self._alphas, self._sigmas[target])
        q = -1 if data else 1
        h = self._lambdas[start + order] - self._lambdas[start]
        shares = (self._lambdas[start : start + order + 1] - self._lambdas[start]) / h
        r, first, made = shares[target - start], self._predictions[0], target - start
        growth = np.expm1(q * r * h)
        result = float(numerator[target] / numerator[start]) * self._start_sample - float(b * growth) * first
        if made == 1:
            return result
        slope = self._predictions[-1] - first
        if made == 2 and order == 2:
            return result - float(b * growth / (2 * shares[1])) * slope
        inner = shares[made - 1]
        return result - float(q * (r / inner) * b * (growth / (r * h) - q)) * slope

    def __len__(self) -> int:
        return self.config.num_train_timesteps
