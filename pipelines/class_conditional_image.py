"""Images of given classes, or of no class, from any denoiser of :data:`genssm.models.MODELS`."""

from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ImagePipelineOutput, ModelMixin, SchedulerMixin

from genssm.pipelines.conditions import Label, LabelConditions
from genssm.pipelines.denoising import DenoisingPipeline, Generators, Guidance
from genssm.pipelines.inputs import ImageInput


class ClassConditionalImagePipeline(LabelConditions, DenoisingPipeline):
    """Class-conditional and unconditional generation of images, in pixels or in the latents of a VAE.

    Any scheduler of diffusers or of :mod:`genssm.schedulers` that fits what the denoiser predicts can be put in
    ``pipe.scheduler`` (:func:`genssm.schedulers.swap_scheduler` builds fitting ones by name).

    Args:
        denoiser: predicts from (hidden_states, timestep, class_labels).
        scheduler: sampler.
        vae: decodes the denoiser's latents; None for a denoiser of pixels in [-1, 1].
        class_names: name of each class, so that labels can be given by name.
    """

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        classes = denoiser.config.get("num_classes", 0)
        if class_names is not None and len(class_names) != classes:
            raise ValueError(f"{len(class_names)} class_names for a denoiser of {classes} classes")
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        self.register_to_config(class_names=class_names)
        self._guidance, self._num_timesteps, self._interrupt = Guidance(), 0, False

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | torch.Tensor | None = None,
        *,
        num_images: int | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        guidance_power: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        ode_solver: str | None = None,
        ode_options: Mapping[str, object] | None = None,
        cuda_graph: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Mapping[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: one label for all images or one for each, as index or name; None for an unconditional
                denoiser, or for the null class of one with classes.
            num_images: how many; by default as many as labels, or 1.
            image: start from this image, or one for each, instead of from noise: Pillow images, arrays (H, W, C) or
                tensors (C, H, W) in 0..1.
            mask_image: paint anew only where this is white.
            strength: part of the way from noise that is walked, up to 1 (from pure noise); by default 0.8, or 1 with a
                mask.
            num_inference_steps: steps of the scheduler, or of a fixed-step ``ode_solver``.
            guidance_scale: weight of classifier-free guidance, null + scale (class - null); 1 is none.
            guidance_interval: times, 0 data to 1 noise, between which guidance is used.
            guidance_rescale: 0 to 1, see :class:`genssm.pipelines.denoising.Guidance`.
            guidance_power: lets the scale grow from 1 at the data to ``guidance_scale`` at the noise, see there.
            height, width: size of the images in pixels; the denoiser's own by default.
            generator: one for all images, or a list with one for each; with a list an image does not depend on the
                batch it is made in.
            latents: initial noise (B, C, h, w), standard normal, instead of drawing it.
            ode_solver: a method of :func:`genssm.solvers.solve_ode` ("dopri5", ...) instead of the scheduler's steps,
                for flow models.
            ode_options: further arguments of it: rtol, atol, error_norm, max_evaluations.
            cuda_graph: on CUDA, replay evaluations that come again and again as a recorded graph, kept for the next
                call of the same sizes; False evaluates operation by operation, and frees it. The numbers are the same.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": ...})`` after each step; what
                it returns under "latents" takes their place.
            callback_on_step_end_tensor_inputs: names handed to it.
        Returns:
            An output with ``images``.
        Raises:
            ValueError: contradictory or impossible arguments; raised before anything is computed.

        Example:
            >>> from genssm import ClassConditionalImagePipeline
            >>> pipe = ClassConditionalImagePipeline.from_pretrained("runs/digits/checkpoints/step_0002000/pipeline")
            >>> pipe(["3", "7"], generator=[torch.Generator().manual_seed(i) for i in (0, 1)]).images[0].save("3.png")
        """
        self._guidance = Guidance(guidance_scale, tuple(guidance_interval), guidance_rescale, guidance_power)
        self._interrupt, self._cuda_graph = False, cuda_graph
        labels, num_images = self.resolve_labels(class_labels, num_images)
        self._check_call(
            num_images, num_inference_steps, generator, output_type,
            callback_on_step_end_tensor_inputs, ode_solver, ode_options, callback_on_step_end,
        )  # fmt: skip
        device = self._execution_device
        condition, null = self._label_conditions(labels, num_images, device)
        shape = self._latent_shape(num_images, height, width)
        start = self._start(image, mask_image, strength, ode_solver, shape, device)
        latents = self._denoise(
            shape, condition, null, start,
            num_inference_steps=num_inference_steps, generator=generator, latents=latents, ode_solver=ode_solver,
            ode_options=ode_options or {}, callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )  # (B, C, h, w), float32  # fmt: skip
        images = self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
