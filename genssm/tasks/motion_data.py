"""What the kinds of training on human motion share: the data set of a run, and pictures of clips."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from genssm.config import DataConfig, RunConfig
from genssm.data.motion import Lengths, MotionDataset, build_motion_dataset
from genssm.data.motion.draw import contact_sheet
from genssm.data.motion.folders import find_published
from genssm.data.motion.synthetic import synthetic_dataset
from genssm.motion import SKELETONS, Skeleton

DATASETS = ("motion", "synthetic_motion")
FRAMES_IN_A_ROW = 8


def open_motion(config: RunConfig) -> MotionDataset:
    """The data set of a run.

    Raises:
        ValueError: another kind of data set, or a key that means nothing to motion.
        FileNotFoundError: the folder or a file of it is missing.
    """
    data, motion = config.data, config.motion
    if data.name not in DATASETS:
        raise ValueError(f"data.name={data.name!r} holds no motion; expected {' or '.join(DATASETS)}")
    defaults = DataConfig(name=data.name)
    used = {"name", "path", "split", "num_workers"}
    idle = [name for name in vars(defaults) if name not in used and getattr(data, name) != getattr(defaults, name)]
    if idle:
        raise ValueError(f"data.{idle[0]} means nothing to motion; leave it out")
    if data.name == "synthetic_motion":
        if data.path is not None or motion.mirror or motion.joint_map is not None or motion.up != "y":
            raise ValueError("synthetic_motion is computed; leave out data.path and what concerns recordings")
        return synthetic_dataset(data.split, _lengths(config, motion.longer or "leave_out"))
    if data.path is None:
        raise ValueError("data.name=motion needs data.path, a folder of features or of recordings")
    longer = motion.longer or ("leave_out" if find_published(data.path) else "window")
    return build_motion_dataset(
        data.path, data.split, lengths=_lengths(config, longer), mirror=motion.mirror, joint_map=motion.joint_map,
        up=motion.up,
    )  # fmt: skip


def _lengths(config: RunConfig, longer: str) -> Lengths:
    motion = config.motion
    return Lengths(motion.min_frames, motion.max_frames, motion.unit_length, longer)


def shown_clips(dataset: MotionDataset, count: int) -> list[int]:
    """Numbers of ``count`` clips from all over the data set."""
    return np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()


def row_of_frames(clips: Sequence[torch.Tensor], skeleton: Skeleton, titles: Sequence[str]) -> Image.Image:
    """Clips of joints as a picture, one row of frames for each."""
    return contact_sheet(clips, skeleton, titles, columns=FRAMES_IN_A_ROW)


def skeleton_config(skeleton: Skeleton) -> str | dict[str, Any]:
    """A published skeleton by its name, another in full."""
    return skeleton.name if SKELETONS.get(skeleton.name) == skeleton else skeleton.to_config()
