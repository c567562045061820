"""A small data set of motion whose captions say what happens, and a small evaluator."""

import pytest
import torch

from genssm.data.motion import Lengths, MotionDataset
from genssm.data.motion.clips import Caption, Clip, joints_to_clip_features
from genssm.metrics.motion_evaluator import EvaluatorSizes
from genssm.motion import T2M, feature_statistics
from tests.motion.conftest import made_clip

SMALL = EvaluatorSizes(
    movement_hidden=16, movement_dim=16, motion_hidden=24, text_hidden=16, word_dim=20, embedding_dim=16
)
WORDS = ("walk", "run", "jump", "dance")


def make_dataset(first: int, count: int) -> MotionDataset:
    """Clips of four kinds, told apart by how much the body moves and by a word."""
    clips = []
    for number in range(first, first + count):
        kind = number % len(WORDS)
        joints = made_clip(48 + 4 * (number % 3), seed=kind, amount=0.1 + 0.15 * kind)
        joints = joints + 0.002 * torch.randn(joints.shape, generator=torch.Generator().manual_seed(number))
        caption = Caption.of(f"a person can {WORDS[kind]}")
        clips.append(Clip(f"clip{number}", joints_to_clip_features(joints, T2M), (caption,), WORDS[kind]))
    statistics = feature_statistics((clip.features for clip in clips), T2M)
    return MotionDataset(clips, T2M, statistics, Lengths(max_frames=60), WORDS)


@pytest.fixture(scope="session")
def clips_of_motion() -> MotionDataset:
    return make_dataset(0, 36)
