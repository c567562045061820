"""Autoregressive models of codes: each code from those before it."""

import torch
from PIL import Image
from torch import nn

from genssm.config import RunConfig
from genssm.pipelines import AutoregressiveImagePipeline
from genssm.tasks.base import Card, Tensors
from genssm.tasks.codes import CodeModelling
from genssm.training.objectives import build_objective


class NextToken(CodeModelling):
    """Cross-entropy of the next code, on :class:`genssm.training.token_objectives.NextTokenObjective`."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.objective = build_objective(config.objective, ("next_token",))
        super().__init__(config, device)

    def loss(self, model: nn.Module, batch: Tensors, numbers: Tensors) -> torch.Tensor:
        return self.objective.loss(model, self.codes(batch), **self.condition(batch, numbers))  # (B,)

    def sketch(self, count: int) -> torch.Tensor:
        codes = torch.zeros(count, self.model.num_tokens, dtype=torch.long)
        labels = {"class_labels": torch.zeros(count, dtype=torch.long)} if self.num_classes else {}
        return self.objective.loss(self.model, codes, **labels)

    def build_pipeline(self) -> AutoregressiveImagePipeline:
        return AutoregressiveImagePipeline(self.model, self.tokenizer, self.class_names())

    def card(self) -> Card:
        return self.code_card("model of codes", "")

    def draw(self, pipeline: AutoregressiveImagePipeline, first: int, stride: int) -> dict[int, Image.Image]:
        return self.draw_codes(pipeline, first, stride)
