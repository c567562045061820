"""What ``train.py`` needs to know of a kind of training."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from genssm.config import RunConfig
from genssm.data import cache_dataset
from genssm.data.loading import RowStream, Stream
from genssm.models import MODELS
from genssm.training.samples import make_grid
from genssm.training.seeding import seed_globals
from genssm.training.start import saved_component, start_from
from genssm.values import check_arguments

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Card:
    """What the README of a saved pipeline says beside what every run has.

    Attributes:
        tag: task of the Hub, such as "unconditional-image-generation".
        subject: "A class-conditional denoiser of images".
        example: Python that uses ``pipe``.
        facts: rows of the table, title -> text.
    """

    tag: str
    subject: str
    example: str
    facts: dict[str, str]


class Task(ABC):
    """One kind of training: what is learned from which data, and what is saved, drawn and told of it.

    ``train.py`` owns the loop, the optimiser, the average and the checkpoints. A task is built before anything is
    written or moved to a device, so its constructor refuses what does not fit together.

    Attributes:
        config: the run.
        device: where the run will compute; the model is still on the CPU.
        dataset: ``len()``, ``item(index, key)`` -> dict of tensors, ``num_classes``, ``class_names``.
        model: the trained module.
        component: its name in the pipeline folder.
        unit: what a batch counts.
        shardable: whether all that is trained is reached through the module that ``loss`` is given.
        recordable: whether the module that ``loss`` is given does the same for every batch, and its loss needs no more
            of it than what it returns, so that ``train.cuda_graph`` may replay it.
        measurable: whether ``pipeline(class_labels, num_images=...)`` draws images, which ``evaluate`` can measure.
    """

    component = "denoiser"
    unit = "images"
    shardable = True
    recordable = True
    measurable = False
    dataset: Any
    model: nn.Module

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device

    def build_model(self) -> nn.Module:
        """The model that the run describes, with the initial weights of its seed."""
        cls = MODELS[self.config.model.name]
        arguments = check_arguments(cls, self.config.model.args, "model.args")
        seed_globals(self.config.train.seed, "init")
        return cls(**arguments)

    @property
    def learner(self) -> nn.Module:
        """What is optimised: the model, perhaps with parts that are thrown away after the training."""
        return self.model

    def start_from(self, path: str | Path) -> None:
        """Take the weights of another run, checkpoint or pipeline folder (``train.init_from``)."""
        start_from(self.model, path, self.component)

    def saved_average(self, pipeline: Path) -> nn.Module:
        """The averaged weights in a pipeline folder, as a module with the parameters of ``model``."""
        return saved_component(type(self.model), pipeline, self.component)

    def feed(self) -> Any:
        """The data set as training reads it, decoded into memory where ``data.cache`` says so."""
        return cache_dataset(self.dataset, self.config.data.cache, self.device)

    def stream(self) -> Stream | RowStream:
        """In which order training sees what :meth:`feed` has."""
        return Stream(len(self.dataset), self.config.train.seed)

    def items_per_epoch(self) -> int:
        """How many of what a batch counts are an epoch."""
        return len(self.dataset)

    @abstractmethod
    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        """Every random number of a step, for its whole batch.

        Args:
            count: items of the batch.
            generator: of the step, on ``device``.

        Returns:
            Tensors (count, ...) on ``device``: the processes take their rows of the same numbers.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any], numbers: Tensors) -> torch.Tensor:
        """Loss of each item.

        Args:
            model: ``self.model`` as accelerate wraps it.
            batch: items of the data set, (B, ...) each; texts as a list.
            numbers: their rows of :meth:`random_numbers`.

        Returns:
            (B,), float32.
        """

    def after_step(self, step: int) -> None:
        """What else happens once the optimiser has made step number ``step`` (from 1); nothing by default."""
        return

    def numbers_to_log(self) -> dict[str, float]:
        """What is logged beside loss and rates, name -> number; nothing by default."""
        return {}

    @abstractmethod
    def sketch(self, count: int) -> torch.Tensor:
        """Loss (count,) of a batch of zeros on the CPU, through the whole model: memory is measured on it."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Lines on the model's input and the data for the summary of a run, title -> text."""

    @abstractmethod
    def build_pipeline(self) -> DiffusionPipeline:
        """The pipeline that checkpoints hold; it shares ``model``."""

    @abstractmethod
    def card(self) -> Card:
        """For the README of a saved pipeline."""

    @abstractmethod
    def draw(self, pipeline: DiffusionPipeline, first: int, stride: int) -> dict[int, Image.Image]:
        """Samples ``first, first + stride, ...`` of the ``log.num_samples`` of a grid, as pictures by their place.

        Sample i depends on ``log.sample_seed`` + i alone, whoever draws it.
        """

    def arrange(self, pictures: Sequence[Image.Image]) -> Image.Image:
        """One picture of all samples."""
        return make_grid(pictures, self.columns(len(pictures)))

    @abstractmethod
    def columns(self, count: int) -> int:
        """Pictures in a row of the grid."""

    def state_dict(self) -> dict[str, Any]:
        """What a task must remember to go on exactly, beside the model; tensors, numbers, texts and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if state:
            raise ValueError(f"the checkpoint belongs to another kind of training: it also holds {', '.join(state)}")
