"""Denoisers of images: unconditional and class-conditional, in pixels or latents."""

import math
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch._subclasses import FakeTensorMode

from genssm.config import RunConfig
from genssm.data import LatentDataset, build_dataset
from genssm.data.latents import check_vae, encode_images, load_vae
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.tasks.base import Card, Task, Tensors
from genssm.training.alignment import build_alignment
from genssm.training.checks import check_fit
from genssm.training.memory import count_tokens
from genssm.training.objectives import build_objective
from genssm.training.samples import draw_images, grid_columns


class ImageDenoising(Task):
    """Flow matching or diffusion of images, on the objectives of :mod:`genssm.training.objectives`."""

    measurable = True
    reads_text = False

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.dataset = self.open_dataset()
        self.objective = build_objective(config.objective)
        self.vae = load_vae(config.data.vae).to(device) if config.data.vae else None
        stored = isinstance(self.dataset, LatentDataset)
        if self.vae is not None and stored:
            check_vae(self.dataset, self.vae)
        self.model = self.build_model()
        self.encodes = self.vae is not None and not stored  # images become latents while training
        self.item_shape = self.shape_of_items()
        check_fit(config, self.denoiser, self.dataset, self.item_shape, decodes=self.vae is not None or not stored)
        self.num_classes = self.denoiser.config.num_classes
        self.encoder, self.aligned = None, None
        if config.align.encoder is not None:
            if stored or len(self.item_shape) == 4:
                raise ValueError("align.encoder reads images, and the data are latents or clips; leave it out")
            self.encoder, self.aligned = build_alignment(config.align, self.model, self.denoiser)
            with FakeTensorMode(allow_non_fake_inputs=True):
                self.sketch(1)  # says so if the model's tokens are not those of the patches
            self.encoder.to(device)

    def open_dataset(self) -> Any:
        """The data set of the run."""
        return build_dataset(self.config.data)

    def shape_of_items(self) -> tuple[int, ...]:
        """Shape of an item as the model sees it."""
        shape = tuple(self.dataset.item_shape)
        return tuple(self.encode(torch.zeros(1, *shape, device=self.device)).shape[1:]) if self.encodes else shape

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise of what a batch counts."""
        return self.item_shape

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser itself, which may be a part of what is trained."""
        return self.model

    @property
    def learner(self) -> nn.Module:
        return self.model if self.aligned is None else self.aligned

    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        shape = (count, *self.noise_shape)
        numbers = {
            "timesteps": self.objective.sample_timesteps(count, generator, self.device),
            "noise": torch.randn(shape, generator=generator, device=self.device),
        }
        if self.config.train.class_dropout_prob:
            numbers["dropout"] = torch.rand(count, generator=generator, device=self.device)
        if self.encodes:
            numbers["vae_noise"] = torch.randn(shape, generator=generator, device=self.device)
        return numbers

    def loss(self, model: nn.Module, batch: dict[str, Any], numbers: Tensors) -> torch.Tensor:
        clean = batch[self.dataset.tensor_name]
        condition = {}
        if self.aligned is not None:
            condition["alignment_target"] = self.encoder(clean, self._token_grid())
        if self.encodes:
            clean = self.encode(clean, numbers["vae_noise"])
        condition |= self.conditions(batch, numbers)
        loss = self.objective.loss(model, clean, noise=numbers["noise"], timesteps=numbers["timesteps"], **condition)
        return self._with_alignment(loss)  # (B,)

    def _token_grid(self) -> tuple[int, int]:
        height, width = (side // self.denoiser.config.patch_size for side in self.item_shape[-2:])
        return height, width

    def _with_alignment(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.aligned is None else loss + self.config.align.weight * self.aligned.alignment

    def encode(self, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents of pixels (B, C, H, W); without noise their mean."""
        return encode_images(self.vae, pixels, noise)

    def conditions(self, batch: dict[str, Any], numbers: Tensors) -> Tensors:
        """Further arguments of the model for a batch, (B, ...) each."""
        if not self.num_classes:
            return {}
        labels = batch["class_labels"]
        if "dropout" in numbers:
            dropped = numbers["dropout"] < self.config.train.class_dropout_prob
            labels = torch.where(dropped, self.denoiser.null_class_label, labels)
        return {"class_labels": labels}

    def sketch(self, count: int) -> torch.Tensor:
        clean = torch.zeros(count, *self.item_shape)
        timesteps = torch.zeros(count, dtype=self.objective.sample_timesteps(1).dtype)
        condition = self.empty_conditions(count)
        if self.aligned is not None:
            condition["alignment_target"] = torch.zeros(count, math.prod(self._token_grid()), self.encoder.width)
        loss = self.objective.loss(self.learner, clean, noise=torch.zeros_like(clean), timesteps=timesteps, **condition)
        return self._with_alignment(loss)

    def empty_conditions(self, count: int) -> Tensors:
        """Arguments as :meth:`conditions` gives them, all zero, on the CPU."""
        return {"class_labels": torch.zeros(count, dtype=torch.long)} if self.num_classes else {}

    def describe(self) -> dict[str, str]:
        return {
            "input": f"{self.item_shape}, {count_tokens(self.denoiser, self.item_shape)} tokens",
            "data": f"{self.config.data.name}, {len(self.dataset):,} items, {self.dataset.num_classes} classes",
        }

    def build_pipeline(self) -> ClassConditionalImagePipeline:
        names = list(self.dataset.class_names) if self.num_classes else None
        return ClassConditionalImagePipeline(self.denoiser, self.objective.scheduler(), self.vae, names)

    def card(self) -> Card:
        classes, steps = self.num_classes, self.config.log.num_inference_steps
        labels = "[0, 1, 2, 3], " if classes >= 4 else "[0] * 4, " if classes else "num_images=4, "
        generators = "generator=[torch.Generator().manual_seed(i) for i in range(4)]"
        return Card(
            tag="unconditional-image-generation",
            subject=f"{'A class-conditional' if classes else 'An unconditional'} {self.config.model.name} denoiser",
            example=f"images = pipe({labels}{generators}, num_inference_steps={steps}).images",
            facts={
                "objective": f"{self.config.objective.name}, predicts {self.config.objective.prediction_type}",
                "scheduler saved here": type(self.objective.scheduler()).__name__,
            },
        )

    def draw(
        self, pipeline: ClassConditionalImagePipeline, first: int, stride: int, **size: int
    ) -> dict[int, Image.Image]:
        """As :meth:`Task.draw`; ``size``: height and width, the denoiser's own by default."""
        log = self.config.log
        return draw_images(
            pipeline,
            log.num_samples,
            self.num_classes,
            first=first,
            stride=stride,
            seed=log.sample_seed,
            num_inference_steps=log.num_inference_steps,
            guidance_scale=log.guidance_scale,
            **size,
        )

    def columns(self, count: int) -> int:
        return grid_columns(count, self.num_classes)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.aligned is None else {"projector": self.aligned.projector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.aligned is not None:
            self.aligned.projector.load_state_dict(state.pop("projector"))
        super().load_state_dict(state)
