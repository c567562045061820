"""Images of texts, from any denoiser of :data:`genssm.models.MODELS` that reads text."""

from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ImagePipelineOutput, ModelMixin, SchedulerMixin

from genssm.pipelines.conditions import TextConditions
from genssm.pipelines.denoising import DenoisingPipeline, Generators, Guidance
from genssm.pipelines.inputs import ImageInput


class TextToImagePipeline(TextConditions, DenoisingPipeline):
    """Text to image, in pixels or in the latents of a VAE; also from an image, or into a part of one.

    Schedulers are swapped as in :class:`ClassConditionalImagePipeline`. The empty text is the null text, which stands
    on the other side of the guidance unless a negative prompt does.

    Args:
        denoiser: predicts from (hidden_states, timestep, encoder_hidden_states, encoder_attention_mask).
        scheduler: sampler.
        text_encoder: a :class:`genssm.models.TextEncoder` or an encoder of transformers (CLIP, T5); None if every call
            gives embeddings.
        tokenizer: the tokenizer that belongs to it.
        vae: decodes the denoiser's latents; None for a denoiser of pixels in [-1, 1].
        read_padding: the denoiser reads padding tokens like words, as the released ZigMa does.
    """

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        text_encoder: torch.nn.Module | None = None,
        tokenizer: object | None = None,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        read_padding: bool = False,
    ) -> None:
        super().__init__()
        if not denoiser.config.get("context_dim"):
            raise ValueError("this denoiser reads no text (context_dim is 0)")
        self.register_modules(
            denoiser=denoiser, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae
        )
        self.register_to_config(read_padding=read_padding)
        self._guidance, self._num_timesteps, self._interrupt = Guidance(), 0, False

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
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
            prompt: one text, or several; "" is the null text.
            negative_prompt: what guidance leads away from, one for all or one for each prompt; the null text by
                default. Without guidance it has no effect and is refused.
            prompt_embeds, negative_prompt_embeds: instead of the texts, what :meth:`encode_prompt` makes of them,
                (B, S, C).
            prompt_attention_mask, negative_prompt_attention_mask: their masks, (B, S); None: every token counts.
            num_images_per_prompt: images of each prompt, one after the other.
            image: start from this image, or one for each prompt, instead of from noise: Pillow images, arrays
                (H, W, C) or tensors (C, H, W) in 0..1.
            mask_image: paint anew only where this is white.
            strength: part of the way from noise that is walked, up to 1 (from pure noise); by default 0.8, or 1 with a
                mask.
            num_inference_steps: steps of the scheduler, or of a fixed-step ``ode_solver``.
            guidance_scale: weight of classifier-free guidance, null + scale (prompt - null); 1 is none.
            guidance_interval, guidance_rescale, guidance_power: see :class:`genssm.pipelines.denoising.Guidance`.
            height, width: size of the images in pixels; the denoiser's own by default.
            generator: one for all images, or a list with one for each; with a list an image does not depend on the
                batch it is made in.
            latents: initial noise (B, C, h, w), standard normal, instead of drawing it.
            ode_solver, ode_options: as in :class:`ClassConditionalImagePipeline`.
            cuda_graph: on CUDA, replay evaluations that come again and again as a recorded graph, kept for the next
                call of the same sizes; False evaluates operation by operation, and frees it. The numbers are the same.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in :class:`ClassConditionalImagePipeline`.
        Returns:
            An output with ``images``.
        Raises:
            ValueError: contradictory or impossible arguments; raised before anything is computed.

        Example:
            >>> from genssm import TextToImagePipeline
            >>> pipe = TextToImagePipeline.from_pretrained("runs/emoji_64/checkpoints/step_0020000/pipeline")
            >>> pipe("woman firefighter: dark skin tone", guidance_scale=2.0).images[0].save("firefighter.png")
        """
        self._guidance = Guidance(guidance_scale, tuple(guidance_interval), guidance_rescale, guidance_power)
        self._interrupt, self._cuda_graph = False, cuda_graph
        embeds = (prompt_embeds, prompt_attention_mask)
        negative_embeds = (negative_prompt_embeds, negative_prompt_attention_mask)
        num_images = self._count_prompts(prompt, negative_prompt, embeds, negative_embeds, num_images_per_prompt)
        self._check_call(
            num_images, num_inference_steps, generator, output_type,
            callback_on_step_end_tensor_inputs, ode_solver, ode_options, callback_on_step_end,
        )  # fmt: skip
        device = self._execution_device
        shape = self._latent_shape(num_images, height, width)
        start = self._start(image, mask_image, strength, ode_solver, shape, device)
        condition, null = self._text_conditions(
            prompt, negative_prompt, embeds, negative_embeds, num_images_per_prompt, device
        )
        latents = self._denoise(
            shape, condition, null, start,
            num_inference_steps=num_inference_steps, generator=generator, latents=latents, ode_solver=ode_solver,
            ode_options=ode_options or {}, callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )  # (B, C, h, w), float32  # fmt: skip
        images = self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
