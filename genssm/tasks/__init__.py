"""Kinds of training, one file each: data, loss, pipeline and pictures; ``train.py`` runs all through its one loop."""

import torch

from genssm.config import RunConfig, TextConfig
from genssm.tasks.base import Card, Task
from genssm.tasks.images import ImageDenoising
from genssm.tasks.masked_token import MaskedToken, TextMaskedToken
from genssm.tasks.motion import MotionDenoising
from genssm.tasks.motion_vae import MotionReconstruction
from genssm.tasks.next_token import NextToken, TextNextToken
from genssm.tasks.packed import PackedImageDenoising, PackedMotionDenoising, PackedTextDenoising
from genssm.tasks.text import TextDenoising
from genssm.tasks.tokenizer import TokenizerTraining
from genssm.tasks.video import TextVideoDenoising, VideoDenoising
from genssm.training.checks import check_packing

# key of genssm.models.MODELS -> what its training is
TASKS: dict[str, type[Task]] = {
    "aim": NextToken,
    "dim": ImageDenoising,
    "dimsum": ImageDenoising,
    "maskmamba": MaskedToken,
    "mld": MotionDenoising,
    "motion_mamba": MotionDenoising,
    "motion_mamba_frames": MotionDenoising,
    "motion_vae": MotionReconstruction,
    "vq": TokenizerTraining,
    "zigma": ImageDenoising,
}
# what a task becomes when the model reads text
UNDER_CAPTIONS: dict[type[Task], type[Task]] = {
    ImageDenoising: TextDenoising,
    MaskedToken: TextMaskedToken,
    NextToken: TextNextToken,
    PackedImageDenoising: PackedTextDenoising,
    VideoDenoising: TextVideoDenoising,
}

__all__ = [
    "TASKS",
    "Card",
    "ImageDenoising",
    "MaskedToken",
    "MotionDenoising",
    "MotionReconstruction",
    "NextToken",
    "PackedImageDenoising",
    "PackedMotionDenoising",
    "PackedTextDenoising",
    "Task",
    "TextDenoising",
    "TextMaskedToken",
    "TextNextToken",
    "TextVideoDenoising",
    "TokenizerTraining",
    "VideoDenoising",
    "build_task",
]


def build_task(config: RunConfig, device: torch.device) -> Task:
    """The task of a run, its parts checked against each other, its model on the CPU.

    Raises:
        ValueError: an unknown model, or parts that do not go together.
        FileNotFoundError: data or weights are not where the configuration says.
    """
    if config.model.name not in TASKS:
        raise ValueError(f"model.name={config.model.name!r}: expected one of {', '.join(TASKS)}")
    task = _variant(TASKS[config.model.name], config)
    if config.align.encoder is not None and not issubclass(task, ImageDenoising):
        raise ValueError(f"align.encoder is for denoisers of images, not for model.name={config.model.name}")
    return task(config, device)


def _variant(task: type[Task], config: RunConfig) -> type[Task]:
    """What a model's arguments and the data make of its training."""
    if config.data.pack_tokens or config.motion.pack_frames:
        check_packing(config)
        task = PackedMotionDenoising if config.motion.pack_frames else PackedImageDenoising
    if task is ImageDenoising and config.model.args.get("num_frames"):
        task = VideoDenoising
    if task not in UNDER_CAPTIONS:
        return task
    if config.model.args.get("context_dim"):
        return UNDER_CAPTIONS[task]
    if config.text != TextConfig():
        raise ValueError("the section text is for models that read text; set model.args.context_dim or leave it out")
    return task
