"""Denoisers of images that read captions."""

from PIL import Image

from genssm.pipelines import TextToImagePipeline
from genssm.tasks.base import Card
from genssm.tasks.captioned import Captioned
from genssm.tasks.images import ImageDenoising


class TextDenoising(Captioned, ImageDenoising):
    """Flow matching or diffusion of images under captions."""

    def build_pipeline(self) -> TextToImagePipeline:
        return TextToImagePipeline(
            self.denoiser, self.objective.scheduler(), self.text_encoder, self.tokenizer, self.vae
        )

    def card(self) -> Card:
        prompt, steps = self.prompts()[0], self.config.log.num_inference_steps
        about = f"A text-conditional {self.config.model.name} denoiser"
        example = f"images = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale=2.0).images"
        facts = {**super().card().facts, "text encoder": self.config.text.encoder}
        return Card(tag="text-to-image", subject=about, example=example, facts=facts)

    def draw(self, pipeline: TextToImagePipeline, first: int, stride: int, **size: int) -> dict[int, Image.Image]:
        steps = self.config.log.num_inference_steps
        return self.draw_prompts(pipeline, first, stride, num_inference_steps=steps, **size)
