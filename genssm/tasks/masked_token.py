"""Models that guess masked codes from the others."""

import torch
from diffusers import AmusedScheduler
from PIL import Image
from torch import nn

from genssm.config import RunConfig
from genssm.pipelines import MaskedImagePipeline
from genssm.tasks.base import Card, Tensors
from genssm.tasks.codes import CodeModelling
from genssm.training.objectives import build_objective


class MaskedToken(CodeModelling):
    """Cross-entropy of masked codes, on :class:`genssm.training.token_objectives.MaskedTokenObjective`."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.objective = build_objective(config.objective, ("masked_token",))
        super().__init__(config, device)

    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        shape = (count, self.model.num_tokens)
        return super().random_numbers(count, generator) | {
            "times": torch.rand(count, generator=generator, device=self.device),
            "order": torch.rand(shape, generator=generator, device=self.device),
        }

    def loss(self, model: nn.Module, batch: Tensors, numbers: Tensors) -> torch.Tensor:
        mask = self.objective.mask(numbers["times"], numbers["order"])
        condition = self.condition(batch, numbers)
        return self.objective.loss(model, self.codes(batch), mask, self.model.mask_code, **condition)  # (B,)

    def sketch(self, count: int) -> torch.Tensor:
        codes = torch.zeros(count, self.model.num_tokens, dtype=torch.long)
        labels = {"class_labels": torch.zeros(count, dtype=torch.long)} if self.num_classes else {}
        return self.objective.loss(self.model, codes, codes == 0, self.model.mask_code, **labels)

    def build_pipeline(self) -> MaskedImagePipeline:
        scheduler = AmusedScheduler(self.model.mask_code, self.objective.mask_schedule)
        return MaskedImagePipeline(self.model, self.tokenizer, scheduler, self.class_names())

    def card(self) -> Card:
        steps = self.config.log.num_inference_steps
        return self.code_card("model of masked codes", f", num_inference_steps={steps}")

    def draw(self, pipeline: MaskedImagePipeline, first: int, stride: int) -> dict[int, Image.Image]:
        return self.draw_codes(pipeline, first, stride, num_inference_steps=self.config.log.num_inference_steps)
