"""Models that guess masked codes from the others."""

from typing import Any

import torch
from diffusers import AmusedScheduler
from PIL import Image
from torch import nn

from genssm.config import RunConfig
from genssm.pipelines import MaskedImagePipeline
from genssm.tasks.base import Card, Tensors
from genssm.tasks.codes import CaptionedCodes, CodeModelling
from genssm.training.objectives import build_objective


class MaskedToken(CodeModelling):
    """Cross-entropy of masked codes, on :class:`genssm.training.token_objectives.MaskedTokenObjective`."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.objective = build_objective(config.objective, ("masked_token",))
        super().__init__(config, device)

    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        shape = (count, self.denoiser.num_tokens)
        return super().random_numbers(count, generator) | {
            "times": torch.rand(count, generator=generator, device=self.device),
            "order": torch.rand(shape, generator=generator, device=self.device),
        }

    def loss(self, model: nn.Module, batch: dict[str, Any], numbers: Tensors) -> torch.Tensor:
        mask = self.objective.mask(numbers["times"], numbers["order"])
        condition = self.conditions(batch, numbers)
        return self.objective.loss(model, self.codes(batch), mask, self.denoiser.mask_code, **condition)  # (B,)

    def sketch(self, count: int) -> torch.Tensor:
        codes, mask_code = torch.zeros(count, self.denoiser.num_tokens, dtype=torch.long), self.denoiser.mask_code
        return self.objective.loss(self.model, codes, codes == 0, mask_code, **self.empty_conditions(count))

    def build_pipeline(self) -> MaskedImagePipeline:
        scheduler = AmusedScheduler(self.denoiser.mask_code, self.objective.mask_schedule)
        return MaskedImagePipeline(self.denoiser, scheduler=scheduler, **self.pipeline_parts())

    def card(self) -> Card:
        steps = self.config.log.num_inference_steps
        return self.code_card("model of masked codes", f", num_inference_steps={steps}")

    def draw(self, pipeline: MaskedImagePipeline, first: int, stride: int) -> dict[int, Image.Image]:
        return self.draw_codes(pipeline, first, stride, num_inference_steps=self.config.log.num_inference_steps)


class TextMaskedToken(CaptionedCodes, MaskedToken):
    """Cross-entropy of masked codes under captions."""
