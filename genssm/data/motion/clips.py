"""Clips of motion with what is said about them, and their mirror images."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from genssm.data.motion.words import tagged_words
from genssm.motion import Skeleton, canonical_joints, joints_to_features, uniform_skeleton
from genssm.motion.kinematics import named_frames

logger = logging.getLogger("genssm")
CAPTION_FPS = 20  # of the times in caption files, for KIT-ML too
_SWAPPED = {
    "left": "right",
    "right": "left",
    "clockwise": "counterclockwise",
    "counterclockwise": "clockwise",
    "anticlockwise": "clockwise",
}


@dataclass(frozen=True)
class Caption:
    """A sentence and its "word/TAG" tokens, which only the evaluator reads."""

    text: str
    tokens: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Caption":
        """A caption whose words are tagged by rules."""
        return cls(text, tuple(tagged_words(text)))

    def mirrored(self) -> "Caption":
        """The caption with left and right, clockwise and counterclockwise exchanged."""
        return Caption(swap_sides(self.text), tuple(swap_sides(token) for token in self.tokens))


@dataclass(frozen=True)
class TimedCaption:
    """A line of a caption file; ``start`` and ``end`` in seconds, both 0 for the whole clip."""

    caption: Caption
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Clip:
    """One movement.

    Attributes:
        name: of the clip.
        features: (T, dim) float32, not normalised.
        captions: at least one, each of the whole clip.
        label: its class, or None.
    """

    name: str
    features: torch.Tensor
    captions: tuple[Caption, ...]
    label: str | None = None


def swap_sides(text: str) -> str:
    """ "turns left, clockwise" -> "turns right, counterclockwise"; an initial capital stays one."""

    def swapped(match: re.Match[str]) -> str:
        other = _SWAPPED[match[0].lower()]
        return other.capitalize() if match[0][0].isupper() else other

    return re.sub(rf"\b({'|'.join(_SWAPPED)})\b", swapped, text, flags=re.IGNORECASE)


def read_captions(text: str, source: str) -> list[TimedCaption]:
    """Lines ``caption#word/TAG word/TAG ...#start#end``; a line without "#" is a caption of the whole clip.

    Raises:
        ValueError: a line has another number of parts, or its times are no numbers; the message names both.
    """
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.strip().split("#")
        if parts == [""]:
            continue
        if len(parts) == 1:
            found.append(TimedCaption(Caption.of(parts[0].strip()), 0.0, 0.0))
            continue
        try:
            sentence, tokens, start, end = parts
            times = [0.0 if value != value else value for value in (float(start), float(end))]  # nan means 0
        except ValueError:
            raise ValueError(
                f"{source}, line {number}: expected caption#words#start#end, got {line.strip()!r}"
            ) from None
        found.append(TimedCaption(Caption(sentence.strip(), tuple(tokens.split())), *times))
    return found


def cut_clips(name: str, features: torch.Tensor, captions: Iterable[TimedCaption], label: str | None) -> list[Clip]:
    """The whole clip with the captions of all of it, and one clip for each caption of a part."""
    whole, parts = [], []
    for timed in captions:
        if timed.start == 0 and timed.end == 0:
            whole.append(timed.caption)
            continue
        first, last = int(timed.start * CAPTION_FPS), int(timed.end * CAPTION_FPS)
        part = f"{name} {timed.start:g}-{timed.end:g} s"
        parts.append(Clip(part, features[first:last], (timed.caption,), label))
    return ([Clip(name, features, tuple(whole), label)] if whole else []) + parts


def joints_to_clip_features(joints: torch.Tensor, skeleton: Skeleton) -> torch.Tensor:
    """Features (T - 1, dim) of a recording's joints (T, J, 3), worked out in float64, turns taken the short way."""
    return joints_to_features(joints.double(), skeleton, shortest_turn=True).float()


def placed_joints(joints: torch.Tensor, skeleton: Skeleton) -> torch.Tensor:
    """The joints that features stand for, (T, J, 3): the target body on the floor, facing +Z from the origin."""
    return canonical_joints(uniform_skeleton(joints.double(), skeleton), skeleton).float()


def mirror_joints(joints: torch.Tensor, skeleton: Skeleton) -> torch.Tensor:
    """The movement in a mirror: x reversed, left and right joints exchanged; (..., J, 3) -> (..., J, 3)."""
    return joints[..., skeleton.mirrored_joints(), :] * joints.new_tensor([-1.0, 1.0, 1.0])


def finite_clips(clips: Iterable[Clip]) -> list[Clip]:
    """The clips without those that hold a value that is not finite; these are named in a warning with their frames."""
    kept = []
    for clip in clips:
        bad = (~clip.features.isfinite()).any(-1).nonzero().flatten().tolist()
        if bad:
            logger.warning("clip %s is left out: its features are not finite in %s", clip.name, named_frames(bad))
        else:
            kept.append(clip)
    return kept


def mirrored_clip(clip: Clip, features: torch.Tensor) -> Clip:
    """The clip's mirror image, given its features."""
    return replace(
        clip, name=f"M{clip.name}", features=features, captions=tuple(caption.mirrored() for caption in clip.captions)
    )
