"""What every pipeline around a denoiser needs: noise, times, guidance, one evaluation, the loop, decoding.

An image depends on its generator and its conditions only, never on the batch it is made in: noise and random steps are
drawn image by image in float32, the samplers compute in float32, and on the CPU, where matrix products group their sums
by the number of rows, layers that mix rows of the batch are run row by row (:class:`BatchInvariant`), so that the
result is the same to the last bit.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch.overrides import TorchFunctionMode

from genssm import paths
from genssm.data.latents import encode_images
from genssm.graphs import Kept, graphs_for
from genssm.models import MODELS
from genssm.pipelines.inputs import ImageInput, Start, to_mask, to_pixels
from genssm.schedulers import first_time, flow_settings, velocity_at_data
from genssm.solvers import ADAPTIVE_METHODS, FIXED_METHODS, solve_ode

Generators = torch.Generator | Sequence[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def _seamless(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """In float32, as PyTorch computes elementwise functions of half-precision inputs."""

    def call(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return function(x.float() if x.dtype.itemsize < 4 else x, *args, **kwargs).to(x.dtype)

    return call


def _softplus(x: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    return torch.where(beta * x > threshold, x, torch.log1p(torch.exp(beta * x)) / beta)


def _gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


class BatchInvariant(TorchFunctionMode):
    """Makes the bits of a sample's result on a CPU independent of the batch around it.

    Two things depend on it in PyTorch. Matrix products and convolutions may group their sums by the size of the batch:
    here linear layers, convolutions and products with a matrix run separately for each entry of the leading dimension.
    And sigmoid, silu, softplus and gelu use another exponential for the last few elements of each thread's share: here
    they are composed of functions that do not. Everything else in a denoiser works on each sample by itself.
    """

    _layers: ClassVar[dict[Callable, int]] = {
        F.linear: 2, F.conv1d: 3, F.conv2d: 4, F.conv3d: 5, F.conv_transpose2d: 4
    }  # fmt: skip  # least dimensions of an input with a batch
    _products: ClassVar[set[Callable]] = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
    _elementwise: ClassVar[dict[Callable, Callable]] = {
        **dict.fromkeys((torch.sigmoid, torch.Tensor.sigmoid, F.sigmoid), _seamless(lambda x: 1 / (1 + torch.exp(-x)))),
        F.silu: _seamless(lambda x, inplace=False: x / (1 + torch.exp(-x))),
        F.softplus: _seamless(_softplus),
        F.gelu: _seamless(_gelu),
    }

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Split or replace the calls named above; pass everything else on."""
        kwargs = kwargs or {}
        if func in self._elementwise:
            return self._elementwise[func](*args, **kwargs)
        if func is torch.einsum and args[0].startswith("b"):  # an index called b is the batch
            equation, x, *rest = args
            return torch.cat([func(equation, x[i : i + 1], *rest) for i in range(len(x))])
        split = func in self._layers or func in self._products
        if not split or len(args) < 2 or args[0].ndim < self._layers.get(func, 2) or len(args[0]) < 2:
            return func(*args, **kwargs)
        x, *rest = args
        if func in self._products and rest[0].ndim > 2:
            return func(*args, **kwargs)  # a product of two batches is taken matrix by matrix anyway
        return torch.cat([func(x[i : i + 1], *rest, **kwargs) for i in range(len(x))])


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans, 2022): null + scale (conditional - null).

    Args:
        scale: 1 is none.
        interval: (low, high), parts of the range of times, 0 data and 1 noise, in which guidance is used
            (Kynkaanniemi et al., 2024).
        rescale: pulls the standard deviation of the result towards the conditional one, 0 not at all, 1 fully (Lin et
            al., 2024, section 3.4).
        power: lets the scale grow with the time s from 1 at the data to ``scale`` at the noise,
            1 + (scale - 1) (1 - cos(pi s^power)) / 2 (Gao et al., 2023, "MDTv2"; DiMSUM: 4); 0 keeps it constant.
    Raises:
        ValueError: an interval or rescale outside [0, 1], or a negative power.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    power: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or not math.isfinite(self.power):
            raise ValueError(f"guidance_scale is {self.scale}, guidance_power {self.power}; expected finite numbers")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval is {self.interval}; expected 0 <= low <= high <= 1 (1 is pure noise)")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.rescale}; expected 0 to 1")
        if self.power < 0:
            raise ValueError(f"guidance_power is {self.power}; expected 0 (a constant scale) or a positive number")

    def at(self, part: float) -> bool:
        """Whether guidance is used at this part of the range of times."""
        return self.scale != 1 and self.interval[0] <= part <= self.interval[1]

    def scale_at(self, part: float) -> float:
        """The scale at this part of the range of times."""
        if self.power == 0:
            return self.scale
        return 1 + (self.scale - 1) * 0.5 * (1 - math.cos(math.pi * part**self.power))

    def combine(
        self, conditional: torch.Tensor, null: torch.Tensor, parts: Sequence[float] | None = None
    ) -> torch.Tensor:
        """The guided prediction from the two, (B, ...); a scale that grows needs each sample's part of the times."""
        scale: float | torch.Tensor = self.scale
        if self.power:
            if parts is None or len(parts) != len(null):
                raise ValueError("a guidance scale that grows with the time needs the time of each sample")
            scales = [self.scale_at(part) for part in parts]
            scale = scales[0]
            if len(set(scales)) > 1:  # else a number will do, which the GPU need not be sent
                scale = paths.per_sample(torch.tensor(scales, dtype=null.dtype, device=null.device), null)
        guided = null + scale * (conditional - null)
        if self.rescale == 0:
            return guided
        # Image by image: a batched reduction may group its sums by the size of the batch.
        factors = torch.stack([c.std() / g.std().clamp(min=1e-12) for c, g in zip(conditional, guided)])
        return guided * (1 + self.rescale * (paths.per_sample(factors, guided) - 1))


def draw_noise(shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor:
    """Standard normal numbers, float32, drawn image by image on the generator's device and moved to ``device``."""
    many = isinstance(generator, Sequence)
    rows = []
    for i in range(shape[0]):
        source = generator[i] if many else generator
        place = device if source is None else source.device
        rows.append(torch.randn((1, *shape[1:]), generator=source, device=place, dtype=torch.float32).to(device))
    return torch.cat(rows)


def evaluate(
    model: torch.nn.Module,
    dtype: torch.dtype,
    x: torch.Tensor,
    times: torch.Tensor,
    condition: Mapping[str, torch.Tensor],
    null: Mapping[str, torch.Tensor],
    guidance: Guidance | None,
) -> torch.Tensor:
    """What one step asks of a denoiser, in one piece, so that one graph repeats all of it.

    Args:
        model: the denoiser.
        dtype: of its input.
        x: scaled noisy samples, (B, ...), float32.
        times: (B,), on the device of ``x``.
        condition: further arguments of the denoiser, (B, ...) each.
        null: the same without the condition, evaluated in the same batch; empty for no second half.
        guidance: joins the two halves; None leaves them.
    Returns:
        (B, ...), or (2 B, ...) with a second half that nothing joins, float32.
    """
    if null:
        condition = {key: torch.cat([value, null[key]]) for key, value in condition.items()}
        x, times = torch.cat([x, x]), torch.cat([times, times])
    with BatchInvariant() if x.device.type == "cpu" else contextlib.nullcontext():
        prediction = model(x.to(dtype), times, **condition, return_dict=False)[0].float()
    return prediction if guidance is None else guidance.combine(*prediction.chunk(2))


def set_times(scheduler: SchedulerMixin, num_inference_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a scheduler at the start of its grid.

    The grid stays on the CPU, where schedulers look their numbers up: on a GPU each step would wait for the one before.

    Returns:
        ``timesteps`` to hand to ``scheduler.step`` and, of the same length, the times to call the denoiser with, which
        differ where diffusers' multistep solvers round the times of a flow down to integers. Both on the CPU.
    """
    plain = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not any(
        scheduler.config[key] for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    )
    if plain:
        # Its own grid spends the last of n steps between 0.001 and 0; an even grid of n steps ends at 1 / n.
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist())
    else:
        scheduler.set_timesteps(num_inference_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    times = scheduler.timesteps
    if scheduler.config.get("use_flow_sigmas"):
        times = scheduler.sigmas[: len(times)] * scheduler.config.num_train_timesteps
    return scheduler.timesteps, times


def add_noise(
    scheduler: SchedulerMixin, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Clean samples (B, ...) at an entry of ``scheduler.timesteps``; a scheduler that has begun is at its next one."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, timestep[None], noise)
    return scheduler.add_noise(clean, noise, timestep[None])


class DenoisingPipeline(DiffusionPipeline):
    """Shared parts of the pipelines; a subclass turns its conditions into denoiser arguments."""

    model_cpu_offload_seq = "denoiser->vae"
    _makes_video: ClassVar[bool] = False
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _records: ClassVar[bool] = True  # whether evaluations may run as graphs
    _cuda_graph = True  # as the call in progress says
    _graphs: Kept = None

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        # from_pipe compares exact types: name the models for which ModelMixin stands in the signature.
        return {**super()._get_signature_types(), "denoiser": tuple(MODELS.values())}

    @property
    def _execution_device(self) -> torch.device:
        # diffusers walks through all modules of all parts; a denoiser whose weights are on an accelerator says it.
        device = next(self.denoiser.parameters()).device
        return super()._execution_device if device.type in ("cpu", "meta") else device

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along each side; 1 without a VAE."""
        if self.vae is None:
            return 1
        config = self.vae.config
        blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
        return 2 ** (len(blocks) - 1)

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the denoiser was made for."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the call in progress; a callback may read it."""
        return self._guidance.scale

    @property
    def num_timesteps(self) -> int:
        """Number of evaluations of the call in progress."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after that step."""
        return self._interrupt

    def _latent_shape(self, num_images: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        sizes = []
        unit = self.vae_scale_factor * self.denoiser.config.get("patch_size", 1)
        for name, given, native in zip(("height", "width"), (height, width), self.native_size):
            size = native if given is None else given
            if size < unit or size % unit:
                raise ValueError(f"{name} is {size}; this pipeline makes sizes that are multiples of {unit}")
            sizes.append(size // self.vae_scale_factor)
        return num_images, self.denoiser.config.in_channels, *sizes

    def _check_call(
        self,
        num_images: int,
        num_inference_steps: int,
        generator: Generators,
        output_type: str,
        callback_inputs: Sequence[str],
        ode_solver: str | None,
        ode_options: Mapping[str, object] | None,
        callback: Callable | None,
    ) -> None:
        """Refuse, before anything is computed, what cannot work."""
        if self.denoiser.config.get("num_frames") and not self._makes_video:
            raise ValueError(f"this denoiser makes videos of {self.denoiser.config.num_frames} frames, not images")
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; expected at least 1")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; expected at least 1")
        paths.check_choice("output_type", output_type, OUTPUT_TYPES)
        if isinstance(generator, Sequence) and len(generator) != num_images:
            raise ValueError(f"{len(generator)} generators for {num_images} images; pass one, or one per image")
        unknown = sorted(set(callback_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(f"a callback cannot be given {unknown}; it can be given {self._callback_tensor_inputs}")
        channels = self.denoiser.config.in_channels
        if output_type == "pil" and self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"the denoiser makes {channels} channels and the pipeline has no VAE to decode them; "
                "give it one (vae=) or ask for output_type='latent'"
            )
        if ode_solver is None:
            if ode_options:
                raise ValueError("ode_options are given without an ode_solver; name one, such as 'dopri5'")
            return
        paths.check_choice("ode_solver", ode_solver, ADAPTIVE_METHODS + FIXED_METHODS)
        unknown = sorted(set(ode_options or ()) - {"rtol", "atol", "error_norm", "max_evaluations"})
        if unknown:
            raise ValueError(f"ode_options {unknown} are unknown; there are rtol, atol, error_norm, max_evaluations")
        tolerances = {key: ode_options[key] for key in ("rtol", "atol") if key in (ode_options or {})}
        if any(value <= 0 for value in tolerances.values()):
            raise ValueError(f"ode_options {tolerances} are tolerances; expected more than 0")
        if flow_settings(self.scheduler) is None:
            raise ValueError(f"ode_solver needs a flow model; {type(self.scheduler).__name__} samples a diffusion")
        if callback is not None:
            raise ValueError("an ODE solver has no steps to call back at; leave out callback_on_step_end")

    def _start(
        self,
        image: ImageInput | None,
        mask_image: ImageInput | None,
        strength: float | None,
        ode_solver: str | None,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> Start | None:
        """The images that a call starts from, as the denoiser sees them; None to start from noise."""
        if image is None:
            if mask_image is not None or strength is not None:
                raise ValueError("mask_image and strength change an image; pass image")
            return None
        if mask_image is not None and ode_solver is not None:
            raise ValueError("a mask is applied after each step of a scheduler; leave out ode_solver")
        strength = (0.8 if mask_image is None else 1.0) if strength is None else strength
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}; expected above 0, up to 1 (from pure noise)")
        height, width = (side * self.vae_scale_factor for side in shape[-2:])
        channels = 3 if self.vae is not None else shape[1]
        if channels not in (1, 3):
            raise ValueError(f"the denoiser takes {channels} channels and the pipeline has no VAE to encode an image")
        pixels = to_pixels(image, channels, height, width).to(device)
        clean = pixels
        if self.vae is not None:
            at_once = 1 if device.type == "cpu" else len(pixels)
            parts = pixels.to(self.vae.dtype).split(at_once)
            clean = torch.cat([encode_images(self.vae, part) for part in parts])
        mask = None if mask_image is None else to_mask(mask_image, height, width, shape[-2:]).to(device)
        mask = None if mask is None else _one_each("mask_image", mask, shape[0])
        return Start(_one_each("image", clean, shape[0]), strength, mask)

    def _prepare_latents(
        self, shape: tuple[int, ...], generator: Generators, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """The noise, standard normal, float32."""
        if latents is None:
            latents = draw_noise(shape, generator, device)
        elif latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; expected {shape}")
        return latents.to(device, torch.float32)

    def _denoise(
        self,
        shape: tuple[int, ...],
        condition: Mapping[str, torch.Tensor],
        null: Mapping[str, torch.Tensor],
        start: Start | None = None,
        *,
        num_inference_steps: int,
        generator: Generators,
        latents: torch.Tensor | None,
        ode_solver: str | None,
        ode_options: Mapping[str, object],
        callback: Callable[..., Mapping[str, torch.Tensor]] | None,
        callback_inputs: Sequence[str],
    ) -> torch.Tensor:
        """From noise, or a noised image, to a sample: the loop over the scheduler's steps.

        Args:
            shape: of the samples, (B, C, h, w) or (B, F, C, h, w).
            condition, null: see :meth:`_predict`.
            start: the images to start from.
            num_inference_steps, generator, latents, ode_solver, ode_options: as given to the call.
            callback, callback_inputs: ``callback_on_step_end`` and its ``tensor_inputs``.
        Returns:
            ``shape``, float32.
        """
        device = self._execution_device
        noise = self._prepare_latents(shape, generator, latents, device)
        self._begin_evaluations(shape, condition, one_size=ode_solver not in ADAPTIVE_METHODS)
        if ode_solver is not None:
            return self._solve_ode(noise, start, ode_solver, num_inference_steps, ode_options, condition, null)
        timesteps, times = set_times(self.scheduler, num_inference_steps)
        if start is None:
            latents = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        else:
            timesteps, times = self._skip_steps(start.strength, num_inference_steps, timesteps, times)
            latents = add_noise(self.scheduler, start.clean, noise, timesteps[0])
        self._num_timesteps = len(timesteps)
        arguments = self._step_arguments(generator)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, (t, time) in enumerate(zip(timesteps, times)):
                x = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    x = self.scheduler.scale_model_input(latents, t)
                prediction = self._predict(x, time, condition, null)
                latents = self.scheduler.step(prediction, t, latents, **arguments).prev_sample
                if start is not None and start.mask is not None:
                    ended = i + 1 == len(timesteps)
                    known = start.clean if ended else add_noise(self.scheduler, start.clean, noise, timesteps[i + 1])
                    latents = torch.where(start.mask.bool(), latents, known.to(latents.dtype))
                if callback is not None:
                    given = dict.fromkeys(callback_inputs, latents)
                    latents = (callback(self, i, t, given) or {}).get("latents", latents)
                bar.update()
                if self._interrupt:
                    break
        return latents

    def _begin_evaluations(
        self, shape: Sequence[int], condition: Mapping[str, torch.Tensor], *, one_size: bool = True
    ) -> None:
        """Find out what holds for all evaluations of a call.

        The graphs of earlier calls are kept for this one if it is of their kind, else freed.

        Args:
            shape: of the samples.
            condition: see :meth:`_predict`.
            one_size: whether every evaluation has all samples.
        """
        model, kept = self.denoiser, self._graphs
        # Its type once a call: diffusers walks through all modules to find it. The pipeline is no part of what is kept.
        self._graphs, self._evaluate = None, functools.partial(evaluate, model, model.dtype)
        if self._cuda_graph and self._records and one_size and getattr(model, "skip_tuning", None) is None:
            self._graphs = graphs_for(model, self._evaluate, shape, condition, kept)

    def _skip_steps(
        self, strength: float, num_inference_steps: int, timesteps: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last part of the grid, with the scheduler at its beginning."""
        kept = min(int(num_inference_steps * strength), num_inference_steps)
        if not kept:
            raise ValueError(
                f"strength {strength} leaves none of {num_inference_steps} steps; raise it or num_inference_steps"
            )
        first = (num_inference_steps - kept) * getattr(self.scheduler, "order", 1)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return timesteps[first:], times[first:]

    def _step_arguments(self, generator: Generators) -> dict[str, object]:
        if "generator" not in inspect.signature(self.scheduler.step).parameters:
            return {}
        return {"generator": list(generator) if isinstance(generator, Sequence) else generator}

    def _predict(
        self,
        x: torch.Tensor,
        times: torch.Tensor,
        condition: Mapping[str, torch.Tensor],
        null: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The guided prediction.

        Args:
            x: scaled noisy samples, (B, C, H, W), float32.
            times: a scalar on the CPU, or (B,) from an ODE solver.
            condition, null: further arguments of the denoiser, (B, ...) each; ``null`` without the condition.
        Returns:
            (B, C, H, W), float32.
        """
        parts = (times / self.scheduler.config.num_train_timesteps).expand(len(x)).tolist()
        guided = [bool(null) and self._guidance.at(part) for part in parts]
        if times.ndim == 0:  # as a number: a copy to a GPU would wait for it
            times = torch.full((len(x),), times.item(), dtype=times.dtype, device=x.device)
        evaluate = self._evaluate if self._graphs is None else self._graphs[1]
        if not any(guided):
            return evaluate(x, times, condition, {}, None)
        if all(guided):
            constant = None if self._guidance.power else self._guidance
            prediction = evaluate(x, times, condition, null, constant)
            return prediction if constant else self._guidance.combine(*prediction.chunk(2), parts)
        rows = torch.tensor(guided).nonzero().flatten().to(x.device)
        condition = {key: torch.cat([value, null[key][rows]]) for key, value in condition.items()}
        prediction = evaluate(torch.cat([x, x[rows]]), torch.cat([times, times[rows]]), condition, {}, None)
        result, unconditional = prediction[: len(guided)].clone(), prediction[len(guided) :]
        parts = [part for part, chosen in zip(parts, guided) if chosen]
        result[rows] = self._guidance.combine(result[rows], unconditional, parts)
        return result

    def _solve_ode(
        self,
        noise: torch.Tensor,
        begin: Start | None,
        method: str,
        steps: int,
        options: Mapping[str, object],
        condition: Mapping[str, torch.Tensor],
        null: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Integrate the probability-flow ODE from noise to data with :func:`genssm.solvers.solve_ode`."""
        path, source = flow_settings(self.scheduler)
        latents, first = noise, first_time(path, source)
        if begin is not None:
            first = min(begin.strength, first)
            s = torch.full((len(noise),), first, device=noise.device)
            latents = paths.interpolate(path, begin.clean, noise, s)
        end = 0.0 if velocity_at_data(path, source) else 1e-3
        convert = {"path": path, "source": source}

        def predict(x: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            chosen = [{key: value[rows] for key, value in part.items()} for part in (condition, null)]
            prediction = self._predict(x, s * self.scheduler.config.num_train_timesteps, *chosen)
            bar.update()
            return prediction

        def velocity(x: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return paths.convert(prediction=predict(x, s, rows), x=x, s=s, target="flow_prediction", **convert)

        arguments = {"start": first, "end": end, **options}
        if method in FIXED_METHODS:
            arguments["steps"] = steps
        with self.progress_bar(total=float("inf")) as bar:
            solution = solve_ode(velocity, latents, method=method, **arguments)
            self._num_timesteps = int(solution.evaluations.max())
            if end == 0.0:
                return solution.sample
            rows = torch.arange(len(latents), device=latents.device)
            s = torch.full((len(latents),), end, device=latents.device)
            return paths.convert(
                prediction=predict(solution.sample, s, rows), x=solution.sample, s=s, target="sample", **convert
            )

    def _decode(self, latents: torch.Tensor, output_type: str) -> object:
        """Latents (B, C, h, w) to images: a list of PIL images, (B, H, W, C) or (B, C, H, W) in [0, 1], or latents."""
        if output_type == "latent":
            return latents
        if self.vae is not None:
            config = self.vae.config
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
            # Convolutions on the CPU round by batch size, too; one image at a time also bounds the memory.
            at_once = 1 if latents.device.type == "cpu" else len(latents)
            parts = latents.to(self.vae.dtype).split(at_once)
            latents = torch.cat([self.vae.decode(part, return_dict=False)[0].float() for part in parts])
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor).postprocess(latents, output_type)


def _one_each(name: str, values: torch.Tensor, count: int) -> torch.Tensor:
    """``values`` (N, ...), one for all or one for each of ``count`` images, or for each of equal runs of them."""
    if not len(values) or count % len(values):
        raise ValueError(f"{len(values)} entries of {name} for {count} images; pass one, or one per image")
    return values.repeat_interleave(count // len(values), dim=0)
