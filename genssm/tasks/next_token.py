"""Autoregressive models of codes: each code from those before it."""

from typing import Any

import torch
from PIL import Image
from torch import nn

from genssm.config import RunConfig
from genssm.pipelines import AutoregressiveImagePipeline
from genssm.tasks.base import Card, Tensors
from genssm.tasks.codes import CaptionedCodes, CodeModelling
from genssm.training.objectives import build_objective


class NextToken(CodeModelling):
    """Cross-entropy of the next code, on :class:`genssm.training.token_objectives.NextTokenObjective`."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.objective = build_objective(config.objective, ("next_token",))
        super().__init__(config, device)

    def loss(self, model: nn.Module, batch: dict[str, Any], numbers: Tensors) -> torch.Tensor:
        return self.objective.loss(model, self.codes(batch), **self.conditions(batch, numbers))  # (B,)

    def sketch(self, count: int) -> torch.Tensor:
        codes = torch.zeros(count, self.denoiser.num_tokens, dtype=torch.long)
        return self.objective.loss(self.model, codes, **self.empty_conditions(count))

    def build_pipeline(self) -> AutoregressiveImagePipeline:
        return AutoregressiveImagePipeline(self.denoiser, **self.pipeline_parts())

    def card(self) -> Card:
        return self.code_card("model of codes", "")

    def draw(self, pipeline: AutoregressiveImagePipeline, first: int, stride: int) -> dict[int, Image.Image]:
        return self.draw_codes(pipeline, first, stride)


class TextNextToken(CaptionedCodes, NextToken):
    """Cross-entropy of the next code under captions, which are read before the codes."""
