"""What a denoiser is trained to predict, at which times, and how the errors are weighted.

Time and sign are those of :mod:`genssm.paths`: ``timestep`` runs from 0 (data) to ``num_train_timesteps`` (noise), and
``flow_prediction`` is the derivative from data to noise (``noise - clean`` on the linear path). On the discrete
schedules of :class:`DiffusionObjective` ``timestep`` is an index 0 .. num_train_timesteps - 1 and
``x = sqrt(abar) clean + sqrt(1 - abar) noise``, exactly as diffusers' schedulers define it.

An objective draws noise first and times second, in float32, from the given generator: one for the batch, or one per
sample (then a sample's draws do not depend on the batch it is in). Pass ``noise`` and ``timesteps`` to choose them.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import nn

from genssm import paths
from genssm.paths import check_choice, per_sample
from genssm.schedulers import FlowODEScheduler
from genssm.training.reconstruction import ReconstructionObjective
from genssm.training.token_objectives import MaskedTokenObjective, NextTokenObjective

Generators = torch.Generator | Sequence[torch.Generator] | None


class Objective(Protocol):
    """What a denoising task needs of an objective."""

    prediction_type: str

    def sample_timesteps(self, batch_size: int, generator: Generators = None, device: object = "cpu") -> torch.Tensor:
        """Random times on diffusers' scale, (B,)."""

    def loss(
        self,
        model: nn.Module,
        clean: torch.Tensor,
        generator: Generators = None,
        *,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        **condition: object,
    ) -> torch.Tensor:
        """Loss of each sample, (B,), float32."""

    def scheduler(self) -> SchedulerMixin:
        """The scheduler that belongs into the saved pipeline."""


def draw(shape: Sequence[int], generator: Generators, device: object, *, normal: bool = True) -> torch.Tensor:
    """Random float32 numbers, normal or uniform in [0, 1), drawn on the generator's device and moved.

    Args:
        shape: (B, ...).
        generator: one for the whole batch, a sequence of B (one per sample), or None for the global one.
        device: where the result goes.
        normal: standard normal numbers, else uniform ones.
    Returns:
        ``shape``, float32, on ``device``.
    Raises:
        ValueError: the number of generators is not B.
    """
    function = torch.randn if normal else torch.rand
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return function(tuple(shape), generator=generator, device=source).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}; pass one, or one per sample")
    rows = [function(tuple(shape[1:]), generator=g, device=g.device).to(device) for g in generator]
    return torch.stack(rows)


def _model_output(model: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: dict) -> torch.Tensor:
    prediction = model(noisy, timesteps, **condition).sample
    if prediction.shape != noisy.shape:
        raise ValueError(
            f"the model answers {tuple(prediction.shape)} to an input of {tuple(noisy.shape)}; "
            "an objective compares equal shapes (set out_channels = in_channels)"
        )
    return prediction.float()


def _mean_square(error: torch.Tensor) -> torch.Tensor:
    return error.square().flatten(1).mean(1)


class FlowObjective:
    """Flow matching / stochastic interpolants on a continuous path (Lipman et al., 2023; Ma et al., 2024).

        loss = weight(s) mean (prediction - target)^2,      s = timestep / num_train_timesteps

    where the target is v, noise, clean or the score. The score's error is taken in units of the noise,
    ``sigma prediction + noise``, which stays finite at both ends.

    Args:
        path: "linear", "gvp" or "vp".
        prediction_type: "flow_prediction", "epsilon", "sample" or "score".
        time_sampling: "uniform", or "logit_normal": s = sigmoid(logit_mean + logit_std n) (Esser et al., 2024); a
            positive mean favours noise.
        logit_mean, logit_std: of "logit_normal".
        weighting: "none"; "velocity": every error counted as the velocity error it causes; "likelihood": that divided
            by g(s), the maximum-likelihood weighting.
        time_epsilon: times are kept in [epsilon, 1 - epsilon]; None takes 0 for the velocity of the linear and gvp
            paths, 1e-5 for that of vp, and 1e-3 otherwise, where the target or its weight is singular at an end.
        scheduler: arguments of the scheduler saved with the model (``num_train_timesteps``, ``shift``), see
            :meth:`scheduler`.
    Raises:
        ValueError: an unknown choice or argument.
    """

    def __init__(
        self,
        path: str = "linear",
        prediction_type: str = "flow_prediction",
        time_sampling: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        weighting: str = "none",
        time_epsilon: float | None = None,
        scheduler: Mapping[str, object] | None = None,
    ) -> None:
        check_choice("path", path, paths.PATHS)
        check_choice("prediction_type", prediction_type, paths.PREDICTIONS)
        check_choice("time_sampling", time_sampling, ("uniform", "logit_normal"))
        check_choice("weighting", weighting, ("none", "velocity", "likelihood"))
        if time_epsilon is None:
            regular = prediction_type == "flow_prediction" and weighting != "likelihood"
            time_epsilon = 1e-3 if not regular else 1e-5 if path == "vp" else 0.0
        if not 0 <= time_epsilon < 0.5:
            raise ValueError(f"time_epsilon is {time_epsilon}; expected at least 0 and less than 0.5")
        self.path, self.prediction_type, self.weighting = path, prediction_type, weighting
        self.time_sampling, self.logit_mean, self.logit_std = time_sampling, logit_mean, logit_std
        self.time_epsilon = time_epsilon
        given = dict(scheduler or {})
        if path == "linear" and prediction_type == "flow_prediction":
            self._scheduler = _build_scheduler(FlowMatchEulerDiscreteScheduler, given)
        else:
            # sigma'(s) of vp grows without bound towards the data: Euler's last step would leave noise in the image.
            given = {"solver": "ddim" if path == "vp" else "euler"} | given
            given |= {"path": path, "prediction_type": prediction_type}
            self._scheduler = _build_scheduler(FlowODEScheduler, given)
        self.num_train_timesteps = self._scheduler.config.num_train_timesteps

    def sample_timesteps(self, batch_size: int, generator: Generators = None, device: object = "cpu") -> torch.Tensor:
        """Random times, (B,), float32 in [0, num_train_timesteps]."""
        if self.time_sampling == "uniform":
            s = draw((batch_size,), generator, device, normal=False)
        else:
            s = torch.sigmoid(self.logit_mean + self.logit_std * draw((batch_size,), generator, device))
        return self.num_train_timesteps * (self.time_epsilon + (1 - 2 * self.time_epsilon) * s)

    def loss(
        self,
        model: nn.Module,
        clean: torch.Tensor,
        generator: Generators = None,
        *,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        **condition: object,
    ) -> torch.Tensor:
        """Loss of each sample.

        Args:
            model: called as ``model(noisy, timesteps, **condition).sample``.
            clean: data, (B, ...).
            generator: source of noise and times where these are not given.
            noise: (B, ...), standard normal.
            timesteps: (B,), in [0, num_train_timesteps].
            condition: further arguments of the model, such as ``class_labels``.
        Returns:
            (B,), float32.
        Raises:
            ValueError: the model's answer has another shape than ``clean``.
        """
        noise = draw(clean.shape, generator, clean.device) if noise is None else noise
        if timesteps is None:
            timesteps = self.sample_timesteps(len(clean), generator, clean.device)
        s = timesteps.to(clean.device, torch.float32) / self.num_train_timesteps
        noisy = paths.interpolate(self.path, clean.float(), noise.float(), s).to(clean.dtype)
        return self.loss_of(_model_output(model, noisy, timesteps, condition), clean.float(), noise.float(), s)

    def loss_of(
        self, prediction: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, s: torch.Tensor
    ) -> torch.Tensor:
        """Loss (B,) of a prediction (B, ...) made at times s (B,) in [0, 1]."""
        if self.prediction_type == "flow_prediction":
            error = prediction - paths.velocity(self.path, clean, noise, s)
        elif self.prediction_type == "sample":
            error = prediction - clean
        elif self.prediction_type == "epsilon":
            error = prediction - noise
        else:
            error = per_sample(paths.coefficients(self.path, s).sigma, noise) * prediction + noise
        loss = _mean_square(error)
        return loss if self.weighting == "none" else self._weight(s) * loss

    def _weight(self, s: torch.Tensor) -> torch.Tensor:
        c = paths.coefficients(self.path, s)
        # dv / d prediction at fixed x: through the noise |det| / alpha, through the sample |det| / sigma.
        gain = {"flow_prediction": torch.ones_like(s), "sample": c.determinant / c.sigma}.get(
            self.prediction_type, c.determinant / c.alpha
        )
        weight = gain.square()
        return weight if self.weighting == "velocity" else weight / paths.drift_variance(self.path, s)

    def scheduler(self) -> SchedulerMixin:
        """FlowMatchEulerDiscreteScheduler for the velocity of the linear path, FlowODEScheduler for the rest."""
        return type(self._scheduler).from_config(self._scheduler.config)


class DiffusionObjective:
    """Denoising diffusion on a discrete schedule (Ho et al., 2020), noised by diffusers' DDPMScheduler.

        x = sqrt(abar_n) clean + sqrt(1 - abar_n) noise,      n uniform on 0 .. num_train_timesteps - 1
        v = sqrt(abar_n) noise - sqrt(1 - abar_n) clean       (Salimans & Ho, 2022)

    Args:
        prediction_type: "epsilon", "v_prediction" or "sample".
        weighting: "none", or "min_snr" (Hang et al., 2023): the error of ``clean`` counts min(SNR, min_snr_gamma).
        min_snr_gamma: bound of "min_snr".
        scheduler: arguments of diffusers' DDIMScheduler that define the schedule, such as ``beta_schedule``
            ("scaled_linear" for latent diffusion and DiM), ``beta_start``, ``beta_end``, ``num_train_timesteps``,
            ``rescale_betas_zero_snr``; beside its defaults, ``clip_sample`` is False and ``timestep_spacing``
            "trailing".
    Raises:
        ValueError: an unknown choice or argument, or ``epsilon`` on a schedule that ends without signal.
    """

    def __init__(
        self,
        prediction_type: str = "epsilon",
        weighting: str = "none",
        min_snr_gamma: float = 5.0,
        scheduler: Mapping[str, object] | None = None,
    ) -> None:
        check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction", "sample"))
        check_choice("weighting", weighting, ("none", "min_snr"))
        self.prediction_type, self.weighting, self.min_snr_gamma = prediction_type, weighting, min_snr_gamma
        given = {"clip_sample": False, "timestep_spacing": "trailing"} | dict(scheduler or {})
        self._scheduler = _build_scheduler(DDIMScheduler, given | {"prediction_type": prediction_type})
        if self._scheduler.config.rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "prediction_type 'epsilon' says nothing about the data where a schedule ends without signal; "
                "use 'v_prediction' or 'sample' with rescale_betas_zero_snr"
            )
        config = {key: value for key, value in self._scheduler.config.items() if key != "_use_default_values"}
        self._noiser = DDPMScheduler.from_config(config)
        self.num_train_timesteps = self._noiser.config.num_train_timesteps

    def sample_timesteps(self, batch_size: int, generator: Generators = None, device: object = "cpu") -> torch.Tensor:
        """Random times, (B,), int64 in 0 .. num_train_timesteps - 1."""
        uniform = draw((batch_size,), generator, device, normal=False)
        return (uniform * self.num_train_timesteps).long().clamp_(max=self.num_train_timesteps - 1)

    def loss(
        self,
        model: nn.Module,
        clean: torch.Tensor,
        generator: Generators = None,
        *,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        **condition: object,
    ) -> torch.Tensor:
        """Loss of each sample; arguments and result as in :meth:`FlowObjective.loss`, ``timesteps`` int64."""
        noise = draw(clean.shape, generator, clean.device) if noise is None else noise
        if timesteps is None:
            timesteps = self.sample_timesteps(len(clean), generator, clean.device)
        timesteps = timesteps.to(clean.device)
        noisy = self._noiser.add_noise(clean.float(), noise.float(), timesteps).to(clean.dtype)
        return self.loss_of(_model_output(model, noisy, timesteps, condition), clean.float(), noise.float(), timesteps)

    def loss_of(
        self, prediction: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Loss (B,) of a prediction (B, ...) made at timesteps (B,), int64."""
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "sample":
            target = clean
        else:
            target = self._noiser.get_velocity(clean, noise, timesteps)
        loss = _mean_square(prediction - target)
        return loss if self.weighting == "none" else self._weight(timesteps) * loss

    def _weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        abar = self._noiser.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = abar / (1 - abar)
        if self.prediction_type == "epsilon":
            return (self.min_snr_gamma / snr).clamp(max=1.0)
        bounded = snr.clamp(max=self.min_snr_gamma)
        return bounded if self.prediction_type == "sample" else bounded / (snr + 1)

    def scheduler(self) -> SchedulerMixin:
        """DDIMScheduler on this schedule; every other diffusers scheduler can be built from its configuration."""
        return DDIMScheduler.from_config(self._scheduler.config)


def _build_scheduler(cls: type[SchedulerMixin], arguments: Mapping[str, object]) -> SchedulerMixin:
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no argument {', '.join(map(repr, unknown))}; it has {', '.join(sorted(known))}"
        )
    return cls(**arguments)


OBJECTIVES: dict[str, type] = {
    "flow": FlowObjective,
    "diffusion": DiffusionObjective,
    "next_token": NextTokenObjective,
    "masked_token": MaskedTokenObjective,
    "reconstruction": ReconstructionObjective,
}


def build_objective(config: object, kinds: tuple[str, ...] = ("flow", "diffusion")) -> Any:
    """The objective a run asks for.

    Args:
        config: :class:`genssm.config.ObjectiveConfig`, or any dataclass with ``name`` (a key of :data:`OBJECTIVES`) and
            the constructor's arguments as fields. Fields of the other objectives must be left at their defaults.
        kinds: names that the kind of training can use.
    Raises:
        ValueError: unknown name, a setting that the objective does not use, or a bad value.
    """
    check_choice("objective.name", config.name, kinds)
    used = set(inspect.signature(OBJECTIVES[config.name].__init__).parameters) - {"self"}
    settings = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in used:
            settings[field.name] = value
        elif field.name != "name" and value not in (field.default, {}):
            raise ValueError(
                f"objective.{field.name} is {value!r}, but objective {config.name!r} does not use it; leave it out"
            )
    return OBJECTIVES[config.name](**settings)
