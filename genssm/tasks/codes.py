"""Models of codes: what learning the next code and learning masked codes have in common."""

import math
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from genssm.config import RunConfig
from genssm.data import CodeDataset, ImageDataset, build_dataset
from genssm.data.codes import load_tokenizer
from genssm.tasks.base import Card, Task, Tensors
from genssm.tasks.captioned import Captioned
from genssm.training.samples import draw_images, grid_columns


class CodeModelling(Task):
    """A model of codes that were stored beforehand, or that a tokenizer makes of images while training.

    A subclass says what is learned and how is drawn.
    """

    component = "model"
    measurable = True
    reads_text = False

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.dataset = build_dataset(config.data)
        if not isinstance(self.dataset, CodeDataset | ImageDataset):
            raise ValueError(f"data.name={config.data.name}: a model of codes learns from codes or from images")
        if config.data.vae is None:
            raise ValueError("a model of codes needs its tokenizer; set data.vae to its folder or run")
        self.vqvae = load_tokenizer(config.data.vae).to(device)
        self.stored = isinstance(self.dataset, CodeDataset)
        self.model = self.build_model()
        self.num_classes = self.denoiser.config.num_classes
        self._check_codes()
        self._check_classes()

    @property
    def denoiser(self) -> nn.Module:
        """The model of codes itself, which may be a part of what is trained."""
        return self.model

    def _check_codes(self) -> None:
        """Refuse a vocabulary or a grid that is not the tokenizer's or the data's."""
        if self.stored:
            grid, known = tuple(self.dataset.grid), self.dataset.num_codes
        else:
            channels, height, width = self.dataset.item_shape
            factor, known = self.vqvae.scale_factor, None
            grid = (height // factor, width // factor)
            if channels != self.vqvae.config.in_channels or height % factor or width % factor:
                raise ValueError(
                    f"images are {tuple(self.dataset.item_shape)} but the tokenizer takes "
                    f"{self.vqvae.config.in_channels} channels and multiples of {factor} pixels; set "
                    "data.channels and data.resolution"
                )
        vocabulary = self.denoiser.config.vocab_size
        for what, count in (("the tokenizer has", self.vqvae.config.num_vq_embeddings), ("the data have", known)):
            if count not in (None, vocabulary):
                raise ValueError(f"model.args.vocab_size is {vocabulary} but {what} {count} codes; set it to {count}")
        if grid != self.denoiser.grid:
            rows, columns = self.denoiser.grid
            raise ValueError(
                f"images have {grid[0]}x{grid[1]} codes but model.args.sample_size is {rows}x{columns}; change it, or "
                "data.resolution"
            )

    def _check_classes(self) -> None:
        classes, labels, train = self.num_classes, self.dataset.num_classes, self.config.train
        if classes and classes != labels:
            raise ValueError(f"model.args.num_classes is {classes} but the data have {labels} classes; set it to that")
        if train.class_dropout_prob and not classes:
            raise ValueError("train.class_dropout_prob drops labels, but the model has no classes; set it to 0")
        what, option, dropped = "null class", "train.class_dropout_prob", train.class_dropout_prob
        if self.reads_text:
            what, option, dropped = "null text", "text.dropout_prob", self.config.text.dropout_prob
        for section in ("log", "evaluate"):
            scale = getattr(self.config, section).guidance_scale
            if scale != 1 and not dropped:
                raise ValueError(
                    f"{section}.guidance_scale={scale} needs a {what} that was trained; set it to 1, or {option} to 0.1"
                )

    def codes(self, batch: dict[str, Any]) -> torch.Tensor:
        """Codes (B, T) of a batch."""
        if self.stored:
            return batch["codes"]
        with torch.no_grad():
            return self.vqvae.tokenize(batch["pixel_values"])

    def conditions(self, batch: dict[str, Any], numbers: Tensors) -> Tensors:
        """Further arguments of the model for a batch: labels, some of them dropped to the null class."""
        if not self.num_classes:
            return {}
        labels = batch["class_labels"]
        if "dropout" in numbers:
            dropped = numbers["dropout"] < self.config.train.class_dropout_prob
            labels = torch.where(dropped, self.denoiser.null_class_label, labels)
        return {"class_labels": labels}

    def empty_conditions(self, count: int) -> Tensors:
        """Arguments as :meth:`conditions` gives them, all zero, on the CPU."""
        return {"class_labels": torch.zeros(count, dtype=torch.long)} if self.num_classes else {}

    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        if not self.config.train.class_dropout_prob:
            return {}
        return {"dropout": torch.rand(count, generator=generator, device=self.device)}

    def describe(self) -> dict[str, str]:
        rows, columns = self.denoiser.grid
        return {
            "input": f"{rows} x {columns} codes of {self.denoiser.config.vocab_size:,}",
            "data": f"{self.config.data.name}, {len(self.dataset):,} items, {self.dataset.num_classes} classes",
        }

    def pipeline_parts(self) -> dict[str, Any]:
        """What the pipeline is given beside the model and the scheduler."""
        return {"vqvae": self.vqvae, "class_names": list(self.dataset.class_names) if self.num_classes else None}

    def code_card(self, subject: str, options: str) -> Card:
        """A card for a pipeline that is called with labels and ``options``."""
        classes = self.num_classes
        labels = "[0, 1, 2, 3], " if classes >= 4 else "[0] * 4, " if classes else "num_images=4, "
        generators = "generator=[torch.Generator().manual_seed(i) for i in range(4)]"
        return Card(
            tag="unconditional-image-generation",
            subject=f"{'A class-conditional' if classes else 'An unconditional'} {self.config.model.name} {subject}",
            example=f"images = pipe({labels}{generators}{options}).images",
            facts={"objective": self.config.objective.name, "codes of an image": str(math.prod(self.denoiser.grid))},
        )

    def draw_codes(
        self, pipeline: DiffusionPipeline, first: int, stride: int, **call: object
    ) -> dict[int, Image.Image]:
        """As :meth:`Task.draw`, with further arguments of the pipeline."""
        log = self.config.log
        return draw_images(
            pipeline,
            log.num_samples,
            self.num_classes,
            first=first,
            stride=stride,
            seed=log.sample_seed,
            guidance_scale=log.guidance_scale,
            **call,
        )

    def columns(self, count: int) -> int:
        return grid_columns(count, self.num_classes)


class CaptionedCodes(Captioned):
    """What captions change in a model of codes, into whose sequence they are read."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        super().__init__(config, device)
        length, room = self.tokenizer.model_max_length, self.denoiser.config.context_length
        if length > room:
            raise ValueError(
                f"a caption has up to {length} tokens but model.args.context_length is {room}; raise it, or lower "
                "text.max_length"
            )

    def pipeline_parts(self) -> dict[str, Any]:
        return {**super().pipeline_parts(), "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}

    def code_card(self, subject: str, options: str) -> Card:
        about, prompt = super().code_card(subject, options), self.prompts()[0]
        return Card(
            tag="text-to-image",
            subject=f"A text-conditional {self.config.model.name} {subject}",
            example=f"images = pipe(prompt={prompt!r}, guidance_scale=2.0{options}).images",
            facts={**about.facts, "text encoder": self.config.text.encoder},
        )

    def draw_codes(
        self, pipeline: DiffusionPipeline, first: int, stride: int, **call: object
    ) -> dict[int, Image.Image]:
        return self.draw_prompts(pipeline, first, stride, **call)
