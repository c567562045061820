"""Denoisers of clips: unconditional, class- or text-conditional, in pixels or latents, frame by frame encoded."""

from typing import Any

import torch
from PIL import Image

from genssm.pipelines import VideoPipeline
from genssm.tasks.base import Card
from genssm.tasks.images import ImageDenoising
from genssm.tasks.text import TextDenoising
from genssm.training.samples import grid_labels, make_grid

AT_ONCE = 8  # clips of a grid


class _Clips:
    """What clips (B, F, C, H, W) change in a task of images."""

    measurable = False
    unit = "clips"

    def encode(self, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        noise = None if noise is None else noise.flatten(0, 1)
        return super().encode(pixels.flatten(0, 1), noise).unflatten(0, pixels.shape[:2])

    def build_pipeline(self) -> VideoPipeline:
        names = list(self.dataset.class_names) if self.num_classes else None
        parts = {"text_encoder": self.text_encoder, "tokenizer": self.tokenizer} if self.reads_text else {}
        return VideoPipeline(self.denoiser, self.objective.scheduler(), **parts, vae=self.vae, class_names=names)

    def card(self) -> Card:
        about = super().card()
        call = f"prompt={self.prompts()[0]!r}, " if self.reads_text else "0, " if self.num_classes else ""
        return Card(
            tag="text-to-video" if self.reads_text else "unconditional-image-generation",
            subject=f"{about.subject} of video, {self.denoiser.config.num_frames} frames",
            example=f"frames = pipe({call}num_inference_steps={self.config.log.num_inference_steps}).frames[0]",
            facts=about.facts,
        )

    def draw(self, pipeline: VideoPipeline, first: int, stride: int) -> dict[int, Image.Image]:
        """Each clip as a strip of its frames."""
        log, strips = self.config.log, {}
        mine = list(range(first, log.num_samples, stride))
        for start in range(0, len(mine), AT_ONCE):
            places = mine[start : start + AT_ONCE]
            clips = pipeline(
                **self._grid_conditions(places),
                generator=[torch.Generator().manual_seed(log.sample_seed + i) for i in places],
                num_inference_steps=log.num_inference_steps,
                guidance_scale=log.guidance_scale,
            ).frames
            strips |= {place: make_grid(frames, len(frames)) for place, frames in zip(places, clips)}
        return strips

    def _grid_conditions(self, places: list[int]) -> dict[str, Any]:
        """Arguments of the pipeline for these places of the grid."""
        if self.reads_text:
            prompts = self.prompts()
            return {"prompt": [prompts[i % len(prompts)] for i in places]}
        labels = grid_labels(self.config.log.num_samples, self.num_classes)
        return {"num_videos": len(places)} if labels is None else {"class_labels": [labels[i] for i in places]}

    def arrange(self, pictures: list[Image.Image]) -> Image.Image:
        return make_grid(pictures, self.columns(len(pictures)), upscale=1)

    def columns(self, count: int) -> int:
        return 1


class VideoDenoising(_Clips, ImageDenoising):
    """Flow matching or diffusion of clips."""


class TextVideoDenoising(_Clips, TextDenoising):
    """Flow matching or diffusion of clips under captions."""
