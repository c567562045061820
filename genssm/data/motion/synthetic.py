"""Clips of a stick figure that are computed, not recorded: to try training out where there are no motion data.

Legs and arms swing as sines, the root follows a path. What the figure does is told apart by a class and by captions.
"""

import math
from dataclasses import dataclass

import torch

from genssm.data.motion.clips import Caption, Clip, joints_to_clip_features
from genssm.data.motion.dataset import Lengths, MotionDataset
from genssm.motion import T2M, feature_statistics, forward_kinematics

L_KNEE, R_KNEE, L_ANKLE, R_ANKLE = 4, 5, 7, 8
L_ELBOW, R_ELBOW, R_WRIST = 18, 19, 21


@dataclass(frozen=True)
class Action:
    """How a class moves.

    Attributes:
        name: of the class.
        captions: sentences.
        speed: metres per second along the heading, negative backwards.
        turn: radians per second to the left.
        steps: steps of one leg per second.
        swing: radians of the legs.
        jump: metres.
        wave: lift the right arm and wave.
    """

    name: str
    captions: tuple[str, ...]
    speed: float = 0.0
    turn: float = 0.0
    steps: float = 0.0
    swing: float = 0.0
    jump: float = 0.0
    wave: bool = False


ACTIONS = (
    Action("walk", ("a person walks forward", "a man walks straight ahead"), 1.2, 0.0, 0.9, 0.45),
    Action("run", ("a person runs forward", "someone is running"), 2.8, 0.0, 1.4, 0.8),
    Action("back", ("a person walks backward", "a man steps backward"), -0.7, 0.0, 0.7, 0.3),
    Action("left", ("a person walks in a circle to the left", "a man walks counterclockwise"), 1.0, 1.0, 0.9, 0.4),
    Action("right", ("a person walks in a circle to the right", "a man walks clockwise"), 1.0, -1.0, 0.9, 0.4),
    Action("jump", ("a person jumps up and down", "someone is jumping"), steps=0.8, jump=0.35),
    Action("wave", ("a person waves with the right hand", "someone stands and waves"), wave=True),
)


def synthetic_joints(action: Action, frames: int, generator: torch.Generator) -> torch.Tensor:
    """A clip of an action, (T, 22, 3) float32 in metres at 20 frames a second; pace and start are drawn."""
    pace, phase, tremble = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    pace = 0.85 + 0.3 * pace
    t = torch.arange(frames, dtype=torch.float64) / T2M.fps
    cycle = 2 * math.pi * (action.steps * pace * t + phase)
    turns = torch.zeros(frames, T2M.num_joints, 4, dtype=torch.float64)
    turns[..., 0] = 1.0
    swing = action.swing * cycle.sin()
    bend = [0.6 * action.swing * (1 + sign * cycle.cos()) for sign in (1, -1)]
    hop = (0.5 * cycle).sin().square() if action.jump else torch.zeros_like(t)
    crouch = 0.5 * (1 - hop) if action.jump else torch.zeros_like(t)
    for joint, angle in ((L_KNEE, -swing - crouch), (R_KNEE, swing - crouch)):
        turns[:, joint] = _about("x", angle)
    for joint, angle in ((L_ANKLE, bend[0] + 2 * crouch), (R_ANKLE, bend[1] + 2 * crouch)):
        turns[:, joint] = _about("x", angle)
    for joint, angle in ((L_ELBOW, 0.7 * swing), (R_ELBOW, -0.7 * swing)):
        turns[:, joint] = _about("x", angle)
    if action.wave:
        turns[:, R_ELBOW] = _about("z", -2.0 + 0.2 * (6 * t + phase).sin())
        turns[:, R_WRIST] = _about("z", 0.5 * (9 * pace * t + 6 * phase).sin())
    heading = action.turn * pace * t
    turns[:, 0] = _about("y", heading + 0.05 * (2 * t + 6 * tremble).sin())
    step = action.speed * pace / T2M.fps
    root = torch.stack([step * heading.sin(), torch.zeros_like(t), step * heading.cos()], -1).cumsum(0)
    root[:, 1] = 0.95 + action.jump * hop - 0.1 * crouch + 0.02 * (2 * cycle).cos() * (action.swing > 0)
    offsets = T2M.offsets(turns)
    return forward_kinematics(turns, root, offsets, T2M).float()


def synthetic_dataset(split: str = "train", lengths: Lengths | None = None) -> MotionDataset:
    """Eight clips of each of :data:`ACTIONS` for training, two for "val" and for "test"; always the same ones.

    Raises:
        ValueError: an unknown split.
    """
    parts = {"train": range(8), "val": range(8, 10), "test": range(10, 12)}
    if split not in parts:
        raise ValueError(f"split is {split!r}; expected {', '.join(parts)}")
    lengths = lengths or Lengths()
    clips = {part: [_clip(a, i, lengths) for a in ACTIONS for i in parts[part]] for part in {split, "train"}}
    statistics = feature_statistics((clip.features for clip in clips["train"]), T2M)
    return MotionDataset(clips[split], T2M, statistics, lengths, [action.name for action in ACTIONS])


def _clip(action: Action, number: int, lengths: Lengths) -> Clip:
    generator = torch.Generator().manual_seed(1000 * ACTIONS.index(action) + number)
    room = lengths.max_frames - lengths.min_frames
    frames = lengths.min_frames + int(torch.randint(room + 1, (1,), generator=generator))
    joints = synthetic_joints(action, frames + 1, generator)  # one row of features less than frames
    captions = tuple(Caption.of(text) for text in action.captions)
    return Clip(f"{action.name}_{number:02d}", joints_to_clip_features(joints, T2M), captions, action.name)


def _about(axis: str, angle: torch.Tensor) -> torch.Tensor:
    """Quaternions (T, 4) of turns by ``angle`` (T,) about an axis."""
    parts = {"x": torch.zeros_like(angle), "y": torch.zeros_like(angle), "z": torch.zeros_like(angle)}
    parts[axis] = (0.5 * angle).sin()
    return torch.stack([(0.5 * angle).cos(), *parts.values()], -1)
