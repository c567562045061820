"""Samplers of flow models in diffusers' form, where diffusers has none, and the swap of one sampler for another.

Time and sign are those of :mod:`genssm.paths`: ``sigmas`` holds the times s of the grid, from 1 (noise) down to 0
(data), ``timesteps = num_train_timesteps * s``, and the velocity points from data to noise.

The random numbers of a step are drawn in float32, one tensor per image when ``generator`` is a list with one generator
per image, so that an image does not depend on the batch it was made in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from genssm import paths
from genssm.paths import check_choice
from genssm.single_step_solver import ContinuousDPMSolverScheduler

Generators = torch.Generator | list[torch.Generator] | None
# From the noise alone nothing follows about the data at s = 1, where alpha = 0: such samplers start just below.
START_EPSILON = 1e-3


@dataclass
class FlowSchedulerOutput(BaseOutput):
    """``prev_sample``: the sample at the next time of the grid, (B, ...), float32."""

    prev_sample: torch.Tensor


def first_time(path: str, prediction_type: str) -> float:
    """Where sampling starts: 1, or just below where the prediction says nothing about the data at s = 1."""
    singular = path != "vp" and prediction_type in ("epsilon", "score")
    return 1.0 - START_EPSILON if singular else 1.0


def velocity_at_data(path: str, prediction_type: str) -> bool:
    """Whether the velocity can be computed from the prediction at s = 0."""
    return path != "vp" and prediction_type in ("flow_prediction", "epsilon")


class _FlowScheduler(SchedulerMixin, ConfigMixin):
    """What both samplers share: the grid of times, the position on it, the noising of data."""

    _compatibles: ClassVar[list[str]] = []
    order = 1
    init_noise_sigma = 1.0

    def _check(self, path: str, prediction_type: str, shift: float) -> None:
        check_choice("path", path, paths.PATHS)
        check_choice("prediction_type", prediction_type, paths.PREDICTIONS)
        if shift <= 0:
            raise ValueError(f"shift is {shift}; expected a positive number, 1 for none")
        self._step_index = self._begin_index = None
        self.num_inference_steps = None
        self._set_grid(np.linspace(first_time(path, prediction_type), 0.0, self.config.num_train_timesteps + 1), None)

    def _set_grid(self, s: np.ndarray, device: object) -> None:
        self.sigmas = torch.from_numpy(s.astype(np.float32))
        self.timesteps = torch.from_numpy((s[:-1] * self.config.num_train_timesteps).astype(np.float32)).to(device)
        self._step_index = self._begin_index = None

    def _grid(self, num_inference_steps: int | None, sigmas: Sequence[float] | None, last: float) -> np.ndarray:
        """Times of the evaluations, float64, shifted; ``last`` is the smallest of an even grid."""
        if sigmas is not None:
            s = np.asarray(sigmas, dtype=np.float64)
            if len(s) == 0 or s.max() > 1 or s.min() <= 0 or (np.diff(s) >= 0).any():
                raise ValueError(f"sigmas must fall from at most 1 to above 0, got {list(map(float, s))}")
            if num_inference_steps is not None and num_inference_steps != len(s):
                raise ValueError(f"{len(s)} sigmas but num_inference_steps is {num_inference_steps}; pass one of them")
        else:
            if num_inference_steps is None or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps is {num_inference_steps}; expected a positive number")
            s = np.linspace(first_time(self.config.path, self.config.prediction_type), last, num_inference_steps)
            s = self.config.shift * s / (1 + (self.config.shift - 1) * s)
        self.num_inference_steps = len(s)
        return s

    @property
    def step_index(self) -> int | None:
        """Position on the grid of evaluations; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Position of the first step, for sampling that starts in the middle."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this position of ``timesteps``."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample itself: flow models take it as it is."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noise clean samples (B, ...) to ``timestep``, a number or (B,): alpha(s) sample + sigma(s) noise."""
        s = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device) / self.config.num_train_timesteps
        return paths.interpolate(self.config.path, sample, noise, s.expand(len(sample)))

    def _position(self, timestep: float | torch.Tensor) -> int:
        if self._step_index is None:
            if self.num_inference_steps is None:
                raise ValueError("call set_timesteps before step")
            if self._begin_index is not None:
                self._step_index = self._begin_index
            else:
                distance = (self.timesteps.cpu().double() - float(timestep)).abs()
                self._step_index = int(distance.argmin())
                if float(distance[self._step_index]) > 1e-3:
                    raise ValueError(f"timestep {float(timestep)} is not on the grid; pass one of scheduler.timesteps")
        return self._step_index

    def _velocity(self, model_output: torch.Tensor, sample: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        source = self.config.prediction_type
        return paths.convert(self.config.path, model_output, sample, s, source=source, target="flow_prediction")

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class FlowODEScheduler(_FlowScheduler):
    """The probability-flow ODE dx = v ds on a fixed grid from s = 1 to 0, for any path and prediction.

    Solvers, from s to r < s:

        euler   x_r = x + (r - s) v(x, s)
        heun    x_r = x + (r - s) (v(x, s) + v(x', r)) / 2,  x' the Euler step;  two evaluations per step
        ddim    x_r = alpha(r) x_0 + sigma(r) noise,  with x_0 and noise as predicted at (x, s)

    ddim equals euler on the linear path. heun ends with an Euler step where the velocity does not exist at s = 0.

    Args:
        num_train_timesteps: value of ``timestep`` at pure noise.
        path: "linear", "gvp" or "vp".
        prediction_type: "flow_prediction", "epsilon", "sample" or "score".
        solver: "euler", "heun" or "ddim".
        shift: times become shift s / (1 + (shift - 1) s); above 1 spends more steps near the noise.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path: str = "linear",
        prediction_type: str = "flow_prediction",
        solver: str = "euler",
        shift: float = 1.0,
    ) -> None:
        check_choice("solver", solver, ("euler", "heun", "ddim"))
        self._check(path, prediction_type, shift)
        self.order = 2 if solver == "heun" else 1
        self._started: tuple[torch.Tensor, torch.Tensor] | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid.

        Args:
            num_inference_steps: steps; evenly spaced times (before the shift) from 1 to 0.
            device: of ``timesteps``.
            sigmas: the starting time of every step instead, falling from at most 1 to above 0; used as they are.
        Raises:
            ValueError: neither or contradictory arguments, or a grid that does not fall.
        """
        if sigmas is None and num_inference_steps is not None and num_inference_steps >= 1:
            s = self._grid(num_inference_steps + 1, None, 0.0)[:-1]
        else:
            s = self._grid(num_inference_steps, sigmas, 0.0)
        self.num_inference_steps = len(s)
        grid = np.append(s, 0.0)
        if self.config.solver == "heun":
            # s0 s1 s1 s2 s2 ... 0: each time is the end of one step and the start of the next.
            evaluate_at_data = velocity_at_data(self.config.path, self.config.prediction_type)
            grid = np.repeat(grid, 2)[1:] if evaluate_at_data else np.append(np.repeat(grid[:-1], 2)[1:], 0.0)
        self._set_grid(grid, device)
        self._started = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> FlowSchedulerOutput | tuple[torch.Tensor]:
        """One evaluation's worth of progress.

        Args:
            model_output: prediction at (sample, timestep), (B, ...).
            timestep: the current entry of ``timesteps``.
            sample: (B, ...).
            generator: not needed by an ODE; taken so that every scheduler is called alike.
            return_dict: False returns a tuple.
        Returns:
            ``prev_sample``, (B, ...), float32.
        Raises:
            ValueError: ``timestep`` is not on the grid.
        """
        index = self._position(timestep)
        sample, model_output = sample.float(), model_output.float()
        s, r = self.sigmas[index], self.sigmas[index + 1]
        if self.config.solver == "ddim":
            convert = {"path": self.config.path, "source": self.config.prediction_type}
            clean = paths.convert(prediction=model_output, x=sample, s=s, target="sample", **convert)
            noise = paths.convert(prediction=model_output, x=sample, s=s, target="epsilon", **convert)
            end = paths.coefficients(self.config.path, r)
            result = end.alpha * clean + end.sigma * noise
        elif self._started is not None:
            start, slope = self._started
            self._started = None
            width = s - self.sigmas[index - 1]
            result = start + 0.5 * width * (slope + self._velocity(model_output, sample, s))
        else:
            slope = self._velocity(model_output, sample, s)
            result = sample + (r - s) * slope
            if self.config.solver == "heun" and index + 1 < len(self.timesteps):
                self._started = (sample, slope)
        self._step_index = index + 1
        return FlowSchedulerOutput(result) if return_dict else (result,)


class FlowSDEScheduler(_FlowScheduler):
    """The reverse-time SDE of a flow model by Euler and Maruyama (Ma et al., 2024), with one last noise-free step.

        dx = (-v + w score) dt + sqrt(2 w) dW,      t = 1 - s,      w(s) = ``diffusion``

    n evaluations: n - 1 stochastic steps on an even grid from s = 1 to ``last_step_size``, then the last step to 0:

        mean      x + (-v + w score) last_step_size
        euler     x - v last_step_size
        tweedie   the predicted x_0

    A step is stable while w dt is small against sigma(s)^2: "sigma" and "linear" are so to the end, "constant" needs
    many steps.

    Args:
        num_train_timesteps: value of ``timestep`` at pure noise.
        path: "linear", "gvp" or "vp".
        prediction_type: "flow_prediction", "epsilon", "sample" or "score".
        diffusion: form of w, see :func:`genssm.paths.diffusion`; "sbdm" is unbounded at s = 1 except on "vp".
        diffusion_norm: its overall strength.
        last_step: "mean", "euler" or "tweedie".
        last_step_size: in s, between 0 and 1; None takes 1 / n.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path: str = "linear",
        prediction_type: str = "flow_prediction",
        diffusion: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str = "mean",
        last_step_size: float | None = 0.04,
        shift: float = 1.0,
    ) -> None:
        check_choice("diffusion", diffusion, paths.DIFFUSIONS)
        check_choice("last_step", last_step, ("mean", "euler", "tweedie"))
        if diffusion == "sbdm" and path != "vp":
            raise ValueError(f"diffusion 'sbdm' grows without bound at pure noise on path {path!r}; use 'sigma'")
        if last_step_size is not None and not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size is {last_step_size}; expected between 0 and 1, or None for 1 / steps")
        self._check(path, prediction_type, shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid.

        Args:
            num_inference_steps: evaluations, the last noise-free step included.
            device: of ``timesteps``.
            sigmas: the starting time of every step instead, falling from at most 1 to above 0; used as they are.
        Raises:
            ValueError: neither or contradictory arguments, or a grid that does not fall.
        """
        last = self.config.last_step_size
        if last is None and num_inference_steps:
            last = 1 / num_inference_steps
        self._set_grid(np.append(self._grid(num_inference_steps, sigmas, last), 0.0), device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowSchedulerOutput | tuple[torch.Tensor]:
        """One step.

        Args:
            model_output: prediction at (sample, timestep), (B, ...).
            timestep: the current entry of ``timesteps``.
            sample: (B, ...).
            generator: one, or a list with one per image.
            variance_noise: standard normal numbers (B, ...) to use instead of drawing them.
            return_dict: False returns a tuple.
        Returns:
            ``prev_sample``, (B, ...), float32.
        Raises:
            ValueError: ``timestep`` is not on the grid.
        """
        index = self._position(timestep)
        sample, model_output = sample.float(), model_output.float()
        s, r = self.sigmas[index], self.sigmas[index + 1]
        path, source = self.config.path, self.config.prediction_type
        if index + 1 == len(self.timesteps):
            result = self._last(model_output, sample, s)
        else:
            w = paths.diffusion(path, self.config.diffusion, s, self.config.diffusion_norm)
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
            drift = reverse_drift(path, model_output, sample, s, w, source=source)
            result = sample + (s - r) * drift + (2 * w * (s - r)).sqrt() * variance_noise
        self._step_index = index + 1
        return FlowSchedulerOutput(result) if return_dict else (result,)

    def _last(self, model_output: torch.Tensor, sample: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        path, source = self.config.path, self.config.prediction_type
        if self.config.last_step == "tweedie":
            return paths.convert(path, model_output, sample, s, source=source, target="sample")
        w = torch.zeros_like(s)
        if self.config.last_step == "mean":
            w = paths.diffusion(path, self.config.diffusion, s, self.config.diffusion_norm)
        return sample + s * reverse_drift(path, model_output, sample, s, w, source=source)


def reverse_drift(
    path: str, prediction: torch.Tensor, x: torch.Tensor, s: torch.Tensor, w: torch.Tensor, *, source: str
) -> torch.Tensor:
    """-v + w score, the drift of the reverse process along t = 1 - s; x (B, ...), s and w (B,) or scalars."""
    v = paths.convert(path, prediction, x, s, source=source, target="flow_prediction")
    score = paths.convert(path, prediction, x, s, source=source, target="score")
    return paths.per_sample(w, x) * score - v


def flow_settings(scheduler: SchedulerMixin) -> tuple[str, str] | None:
    """(path, prediction_type) of a scheduler that samples flow models; None for one of a discrete diffusion."""
    if isinstance(scheduler, _FlowScheduler):
        return scheduler.config.path, scheduler.config.prediction_type
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "linear", "flow_prediction"
    if scheduler.config.get("use_flow_sigmas"):
        return "linear", scheduler.config.prediction_type
    return None


_MULTISTEP = {"dpmsolver++": "DPMSolverMultistepScheduler", "dpmsolver++-singlestep": "DPMSolverSinglestepScheduler",
              "unipc": "UniPCMultistepScheduler"}  # fmt: skip
_DIFFUSION = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler",
              "euler-ancestral": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler",
              **_MULTISTEP, "dpmsolver++-continuous": "ContinuousDPMSolverScheduler"}  # fmt: skip
SCHEDULER_NAMES = (*_DIFFUSION, "sde")


def swap_scheduler(current: SchedulerMixin, name: str) -> SchedulerMixin:
    """Another sampler for the same model.

    Args:
        current: the model's scheduler; its configuration says what the model predicts and on which schedule or path.
        name: "ddpm", "ddim", "euler", "euler-ancestral", "heun", "dpmsolver++", "dpmsolver++-singlestep", "unipc",
            "dpmsolver++-continuous" or "sde". For a flow model euler, heun, ddim and sde follow its path, and
            "dpmsolver++", "dpmsolver++-singlestep" and "unipc" run on the linear path; the others are of discrete
            diffusions only.
    Returns:
        A new scheduler.
    Raises:
        ValueError: unknown name, one that cannot sample this kind of model (the message lists those that can), or a
            model of masked codes.
    """
    check_choice("scheduler", name, SCHEDULER_NAMES)
    flow = flow_settings(current)
    if flow is None:
        if "prediction_type" not in current.config:
            raise ValueError(f"a {type(current).__name__} samples no denoiser; no other scheduler can take its place")
        allowed = {key: key in _DIFFUSION for key in SCHEDULER_NAMES}
        allowed["euler-ancestral"] = current.config.prediction_type != "sample"
        _refuse(name, allowed, f"a diffusion model that predicts {current.config.prediction_type!r}")
        # from_config would replace values that `current` took by default by the defaults of the other class, which
        # has another noise schedule (HeunDiscreteScheduler) or grid.
        config = {key: value for key, value in current.config.items() if key != "_use_default_values"}
        if name == "dpmsolver++-continuous":
            return ContinuousDPMSolverScheduler.from_config(config, algorithm_type="dpmsolver++")
        return getattr(diffusers, _DIFFUSION[name]).from_config(config)
    path, prediction = flow
    allowed = dict.fromkeys(("euler", "heun", "ddim", "sde"), True)
    allowed |= dict.fromkeys(_MULTISTEP, path == "linear" and prediction != "score")
    _refuse(name, allowed, f"a flow model that predicts {prediction!r} on path {path!r}")
    shared = {"num_train_timesteps": current.config.num_train_timesteps}
    shift = current.config.get("shift", current.config.get("flow_shift", 1.0))
    if name in _MULTISTEP:
        kind = getattr(diffusers, _MULTISTEP[name])
        return kind(**shared, prediction_type=prediction, use_flow_sigmas=True, flow_shift=shift)
    shared |= {"shift": shift}
    if flow == ("linear", "flow_prediction") and name in ("euler", "heun"):
        kind = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}[name]
        return getattr(diffusers, kind)(**shared)
    shared |= {"path": path, "prediction_type": prediction}
    return FlowSDEScheduler(**shared) if name == "sde" else FlowODEScheduler(**shared, solver=name)


def _refuse(name: str, allowed: dict[str, bool], model: str) -> None:
    if not allowed.get(name):
        good = ", ".join(key for key, works in allowed.items() if works)
        raise ValueError(f"scheduler {name!r} cannot sample {model}; use one of {good}")
