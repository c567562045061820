"""Clips of classes or texts, from a denoiser of video (ZigMa with ``num_frames``)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image

from genssm.pipelines.conditions import Label, LabelConditions, TextConditions
from genssm.pipelines.denoising import DenoisingPipeline, Generators, Guidance


@dataclass
class VideoPipelineOutput(BaseOutput):
    """Generated clips.

    Args:
        frames: a list of clips, each a list of Pillow images; or (B, F, H, W, C) or (B, F, C, H, W) in [0, 1], or
            latents (B, F, C, h, w).
    """

    frames: list[list[Image.Image]] | np.ndarray | torch.Tensor


class VideoPipeline(LabelConditions, TextConditions, DenoisingPipeline):
    """Unconditional, class- or text-conditional clips, in pixels or in the latents of a VAE, frame by frame.

    Args:
        denoiser: predicts clips (B, F, C, h, w); reads class labels or text, as its configuration says.
        scheduler: sampler.
        text_encoder, tokenizer, read_padding: as for :class:`TextToImagePipeline`.
        vae: decodes the denoiser's latents, each frame by itself; None for a denoiser of pixels in [-1, 1].
        class_names: name of each class, so that labels can be given by name.
    """

    _makes_video = True

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        text_encoder: torch.nn.Module | None = None,
        tokenizer: object | None = None,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        class_names: list[str] | None = None,
        read_padding: bool = False,
    ) -> None:
        super().__init__()
        classes = denoiser.config.get("num_classes", 0)
        if not denoiser.config.get("num_frames"):
            raise ValueError("this denoiser makes images, not videos (num_frames is 0)")
        if class_names is not None and len(class_names) != classes:
            raise ValueError(f"{len(class_names)} class_names for a denoiser of {classes} classes")
        self.register_modules(
            denoiser=denoiser, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae
        )
        self.register_to_config(class_names=class_names, read_padding=read_padding)
        self._guidance, self._num_timesteps, self._interrupt = Guidance(), 0, False

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | torch.Tensor | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        num_videos: int | None = None,
        num_frames: int | None = None,
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
    ) -> VideoPipelineOutput | tuple:
        """Generate clips.

        Args:
            class_labels: for a denoiser of classes, as in :class:`ClassConditionalImagePipeline`.
            prompt, negative_prompt, and their embeddings and masks: for a denoiser that reads text, as in
                :class:`TextToImagePipeline`.
            num_videos: clips; of each prompt for a denoiser that reads text. By default as many as labels, or 1.
            num_frames: frames of a clip; the denoiser's own number by default, others where its scan allows them.
            num_inference_steps, guidance_scale, guidance_interval, guidance_rescale, guidance_power, height, width,
            generator, ode_solver, ode_options, cuda_graph, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs: as in :class:`ClassConditionalImagePipeline`; one generator draws a
                whole clip.
            latents: initial noise (B, F, C, h, w), standard normal, instead of drawing it.
            output_type: "pil", "np" (B, F, H, W, C) in [0, 1], "pt" (B, F, C, H, W) in [0, 1], or "latent".
        Returns:
            An output with ``frames``.
        Raises:
            ValueError: contradictory or impossible arguments; raised before anything is computed.

        Example:
            >>> from genssm import VideoPipeline
            >>> from genssm.data.video import write_clip
            >>> pipe = VideoPipeline.from_pretrained("runs/debug_video/checkpoints/step_0000060/pipeline")
            >>> write_clip(pipe("right").frames[0], "right.gif")
        """
        self._guidance = Guidance(guidance_scale, tuple(guidance_interval), guidance_rescale, guidance_power)
        self._interrupt, self._cuda_graph = False, cuda_graph
        texts = (prompt, negative_prompt, prompt_embeds, prompt_attention_mask, negative_prompt_embeds,
                 negative_prompt_attention_mask)  # fmt: skip
        embeds, negative_embeds = texts[2:4], texts[4:6]
        reads = bool(self.denoiser.config.get("context_dim"))
        labels = None
        if reads:
            if class_labels is not None:
                raise ValueError("this denoiser reads text; give prompt, not class_labels")
            per_prompt = 1 if num_videos is None else num_videos
            count = self._count_prompts(prompt, negative_prompt, embeds, negative_embeds, per_prompt)
        else:
            if any(text is not None for text in texts):
                raise ValueError("this denoiser reads no text (context_dim is 0); leave the prompt out")
            labels, count = self.resolve_labels(class_labels, num_videos)
        self._check_call(
            count, num_inference_steps, generator, output_type,
            callback_on_step_end_tensor_inputs, ode_solver, ode_options, callback_on_step_end,
        )  # fmt: skip
        device = self._execution_device
        frames = self.denoiser.config.num_frames if num_frames is None else num_frames
        if frames < 1:
            raise ValueError(f"num_frames is {num_frames}; expected at least 1")
        _, *shape = self._latent_shape(count, height, width)
        if reads:
            condition, null = self._text_conditions(
                prompt, negative_prompt, embeds, negative_embeds, per_prompt, device
            )
        else:
            condition, null = self._label_conditions(labels, count, device)
        latents = self._denoise(
            (count, frames, *shape), condition, null,
            num_inference_steps=num_inference_steps, generator=generator, latents=latents, ode_solver=ode_solver,
            ode_options=ode_options or {}, callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )  # (B, F, C, h, w), float32  # fmt: skip
        clips = self._decode_clips(latents, output_type)
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(frames=clips) if return_dict else (clips,)

    def _decode_clips(self, latents: torch.Tensor, output_type: str) -> object:
        """Latents (B, F, C, h, w) to clips, each frame as an image."""
        if output_type == "latent":
            return latents
        count, frames = latents.shape[:2]
        images = self._decode(latents.flatten(0, 1), output_type)
        if output_type == "pil":
            return [images[i * frames : (i + 1) * frames] for i in range(count)]
        return images.reshape(count, frames, *images.shape[1:])
