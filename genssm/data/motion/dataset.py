"""Motion as a data set: items of one padded length, and what is random about them.

T frames of an item (``max_frames``), dim features.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from genssm.data.motion.clips import (
    Caption,
    Clip,
    cut_clips,
    finite_clips,
    joints_to_clip_features,
    mirror_joints,
    mirrored_clip,
)
from genssm.data.motion.folders import (
    Described,
    MotionFolder,
    class_names,
    describe_recordings,
    find_published,
    open_published,
)
from genssm.data.motion.recording import JointMap
from genssm.motion import T2M, FeatureStatistics, Skeleton, feature_statistics

logger = logging.getLogger("genssm")


@dataclass(frozen=True)
class Lengths:
    """Which clips are used and how long items are.

    Attributes:
        min_frames: shorter clips are left out.
        max_frames: frames of an item.
        unit_length: lengths are multiples of it.
        longer: what becomes of clips of more than ``max_frames`` frames and a unit: "leave_out", as the published data
            sets are read, or "window", a random part of each.
    """

    min_frames: int = 40
    max_frames: int = 196
    unit_length: int = 4
    longer: Literal["leave_out", "window"] = "leave_out"

    def __post_init__(self) -> None:
        if not self.unit_length <= self.min_frames <= self.max_frames or self.max_frames % self.unit_length:
            raise ValueError(
                f"min_frames={self.min_frames}, max_frames={self.max_frames}, unit_length={self.unit_length}: expected "
                "unit_length <= min_frames <= max_frames, and max_frames a multiple of unit_length"
            )
        if self.longer not in ("leave_out", "window"):
            raise ValueError(f"longer is {self.longer!r}; expected leave_out or window")

    def keeps(self, frames: int) -> bool:
        """Whether a clip of so many frames is used."""
        return frames >= self.min_frames and (self.longer == "window" or frames < self.max_frames + self.unit_length)


class Drawn(NamedTuple):
    """A part of a clip, not normalised: features (length, dim), and one of its captions."""

    features: torch.Tensor
    caption: Caption


class MotionDataset(torch.utils.data.Dataset):
    """Clips as normalised items of one padded length.

    ``dataset[i]`` has nothing random in it: the clip from its start, its first caption. ``dataset.item(i, key)`` draws
    from the key, which belongs to a place in the training stream: whole units of the clip, once in three times a unit
    less; where they start; and which of the captions.

    Args:
        clips: what to serve; those of unfit length are left out.
        skeleton: of the features.
        statistics: for normalising.
        lengths: which clips are used and how long items are.
        class_names: names that the clips' labels are among; empty without classes.

    Attributes:
        num_classes, class_names, labels: classes and the class of each clip; 0, () and None without.
        item_shape: (T, dim).
    """

    tensor_name = "motion"

    def __init__(
        self,
        clips: Iterable[Clip],
        skeleton: Skeleton,
        statistics: FeatureStatistics,
        lengths: Lengths | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        self.skeleton, self.statistics, self.lengths = skeleton, statistics, lengths or Lengths()
        given = list(clips)
        self.clips = [clip for clip in given if self.lengths.keeps(len(clip.features))]
        if not self.clips:
            raise ValueError(
                f"none of {len(given)} clips has {self.lengths.min_frames} to {self.lengths.max_frames} frames; change "
                "min_frames or max_frames, or set longer=window"
            )
        if len(self.clips) < len(given):
            logger.info("%d of %d clips are left out for their length", len(given) - len(self.clips), len(given))
        self.class_names, self.num_classes = tuple(class_names), len(class_names)
        places = {name: number for number, name in enumerate(self.class_names)}
        self.labels = np.array([places[clip.label] for clip in self.clips], np.int64) if places else None
        self.item_shape = (self.lengths.max_frames, skeleton.feature_dim)

    def __len__(self) -> int:
        return len(self.clips)

    def draw(self, index: int, key: int | None) -> Drawn:
        """A part of clip ``index`` and a caption; see the class for what ``key`` decides."""
        clip, lengths = self.clips[index], self.lengths
        frames, unit = len(clip.features), lengths.unit_length
        length = min(frames // unit * unit, lengths.max_frames)
        if key is None:
            return Drawn(clip.features[:length], clip.captions[0])
        draw = np.random.Generator(np.random.Philox(key))
        if draw.integers(3) == 0 and length - unit >= max(unit, lengths.min_frames - unit):
            length -= unit
        start = int(draw.integers(frames - length + 1))
        caption = clip.captions[int(draw.integers(len(clip.captions)))]
        return Drawn(clip.features[start : start + length], caption)

    def item(self, index: int, key: int | None) -> dict[str, Any]:
        """``{"motion": (T, dim), "length": int, "text": str, "class_labels": int}``, drawn from ``key``.

        The motion is normalised, float32, and 0 past its length; ``class_labels`` only where there are classes.
        """
        drawn = self.draw(index, key)
        motion = torch.zeros(self.item_shape)
        motion[: len(drawn.features)] = self.statistics.normalise(drawn.features)
        item: dict[str, Any] = {"motion": motion, "length": len(drawn.features), "text": drawn.caption.text}
        if self.labels is not None:
            item["class_labels"] = int(self.labels[index])
        return item

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(int(index), None)


def build_motion_dataset(
    path: str | Path,
    split: str = "train",
    *,
    lengths: Lengths | None = None,
    mirror: bool = False,
    statistics: FeatureStatistics | None = None,
    joint_map: JointMap | str | None = None,
    up: str = "y",
) -> MotionDataset:
    """A data set of motion from a folder.

    Args:
        path: a folder with HumanML3D or KIT-ML as published, or one that ``python -m genssm.data.motion.prepare`` made;
            else a folder of recordings, see :func:`genssm.data.motion.folders.describe_recordings`.
        split: "train", "val", "test", "train_val" or "all"; recordings without a ``split`` column are divided 8:1:1 by
            a hash of their names.
        lengths: None takes the published limits, and for recordings windows of at most 196 frames.
        mirror: of recordings: add the mirror image of every clip. The published data sets hold theirs.
        statistics: None takes the folder's own, or those of the training part of the recordings.
        joint_map, up: of recordings, see :meth:`genssm.data.motion.recording.Recording.to_joints`.
    Raises:
        FileNotFoundError: the folder or a file that it needs is missing.
        ValueError: a file cannot be read, or an option does not fit the folder.

    Example:
        >>> item = build_motion_dataset("HumanML3D", "test")[0]
        >>> item["motion"].shape, item["text"]
        (torch.Size([196, 263]), 'a person walks forward')
    """
    if find_published(path) is not None:
        if mirror or joint_map is not None or up != "y":
            raise ValueError(f"{path} holds features; mirror, joint_map and up are for recordings")
        folder = open_published(path, split)
        if lengths is None and folder.skeleton.name == "kit":
            lengths = Lengths(min_frames=24)
    else:
        folder = open_recordings(path, split, mirror=mirror, joint_map=joint_map, up=up, with_statistics=not statistics)
        lengths = lengths or Lengths(longer="window")
    return MotionDataset(folder.clips, folder.skeleton, statistics or folder.statistics, lengths, folder.class_names)


def open_recordings(
    path: str | Path,
    split: str,
    *,
    skeleton: Skeleton = T2M,
    mirror: bool = False,
    joint_map: JointMap | str | None = None,
    up: str = "y",
    with_statistics: bool = True,
) -> MotionFolder:
    """Recordings converted to features; the statistics are those of the training part."""
    described = describe_recordings(path)
    options = {"joint_map": joint_map, "up": up}
    own = [recording for recording in described if recording.in_split(split)]
    if not own:
        raise ValueError(f"none of the {len(described)} recordings of {path} belongs to split {split!r}")
    clips = finite_clips(recorded_clips(own, skeleton, mirror=mirror, **options))
    statistics = None
    if with_statistics:
        training = clips
        if split != "train":
            recordings = [recording for recording in described if recording.in_split("train")]
            training = finite_clips(recorded_clips(recordings, skeleton, mirror=mirror, **options))
        statistics = feature_statistics((clip.features for clip in training), skeleton)
    return MotionFolder(clips, skeleton, statistics, class_names(recording.label for recording in described))


def recorded_clips(
    recordings: Sequence[Described], skeleton: Skeleton, *, mirror: bool, joint_map: JointMap | str | None, up: str
) -> Iterator[Clip]:
    """Clips of recordings, each followed by its mirror image with ``mirror``."""
    for recording in recordings:
        joints = recording.joints(skeleton, joint_map=joint_map, up=up)
        try:
            own = cut_clips(
                recording.name, joints_to_clip_features(joints, skeleton), recording.captions, recording.label
            )
            yield from own
            if mirror:
                features = joints_to_clip_features(mirror_joints(joints, skeleton), skeleton)
                for clip, other in zip(own, cut_clips(recording.name, features, recording.captions, recording.label)):
                    yield mirrored_clip(clip, other.features)
        except ValueError as error:
            raise ValueError(f"{recording.name}: {error}") from None
