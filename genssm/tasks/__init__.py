"""Kinds of training, one file each: data, loss, pipeline and pictures; ``train.py`` runs all through its one loop."""

import torch

from genssm.config import RunConfig
from genssm.tasks.base import Card, Task
from genssm.tasks.images import ImageDenoising

# key of genssm.models.MODELS -> what its training is
TASKS: dict[str, type[Task]] = {"dim": ImageDenoising, "dimsum": ImageDenoising, "zigma": ImageDenoising}

__all__ = ["TASKS", "Card", "ImageDenoising", "Task", "build_task"]


def build_task(config: RunConfig, device: torch.device) -> Task:
    """The task of a run, its parts checked against each other, its model on the CPU.

    Raises:
        ValueError: an unknown model, or parts that do not go together.
        FileNotFoundError: data or weights are not where the configuration says.
    """
    if config.model.name not in TASKS:
        raise ValueError(f"model.name={config.model.name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[config.model.name](config, device)
