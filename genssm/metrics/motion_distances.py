"""Metrics of generated motion, on plain arrays: no data set, no network, no hidden random state.

n clips, d features of the evaluator, T frames, J joints. Sources: Guo et al. 2022 (R-precision, MM-Dist, Diversity,
MultiModality), Heusel et al. 2017 (FID, in :mod:`genssm.metrics.frechet`), Barquero et al. 2024 (jerk), Petrovich et
al. 2022 (APE, AVE).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = torch.Tensor
Integers = NDArray[np.int64]
GROUP_SIZE = 32
DIVERSITY_PAIRS = 300
MULTIMODALITY_PAIRS = 10
# Mean jerk of the test clips, in the unit and frame rate of their joints: what AUJ is measured against.
REAL_JERK = {"humanml3d": 0.033031363, "babel": 0.016383045}


class Retrieval(NamedTuple):
    """What the distances between texts and motions of one group say.

    Attributes:
        r_precision: share of texts whose own motion is among the k nearest, k = 1 ... top_k.
        mm_dist: mean distance of a text to its own motion.
        count: clips that were used.
    """

    r_precision: tuple[float, ...]
    mm_dist: float
    count: int


def pair_distances(texts: Tensor, motions: Tensor) -> Tensor:
    """Euclidean distance of text i to motion j, (n, n) float64, from (n, d) each."""
    return torch.cdist(texts.double(), motions.double(), compute_mode="donot_use_mm_for_euclid_dist")


def retrieval(texts: Tensor, motions: Tensor, *, top_k: int = 3, group_size: int = GROUP_SIZE) -> Retrieval:
    """R-precision and MM-Dist: text i looks for motion i among the motions of its own group.

    Consecutive rows form a group; a last, smaller one is left out. Published numbers are of groups of 32: another size
    changes them.

    Args:
        texts: embeddings, (n, d); row i belongs to row i of ``motions``.
        motions: embeddings, (n, d).
        top_k: largest k.
        group_size: rows of a group.
    Raises:
        ValueError: shapes disagree, fewer rows than a group, or values that are not finite.
    """
    if texts.shape != motions.shape or texts.ndim != 2:
        raise ValueError(f"texts are {tuple(texts.shape)}, motions {tuple(motions.shape)}; expected (n, d) twice")
    _check_finite(texts, "text")
    _check_finite(motions, "motion")
    groups = len(texts) // group_size
    if not groups:
        raise ValueError(f"R-precision needs groups of {group_size} clips, got {len(texts)} clips in all")
    hits, matched = torch.zeros(top_k, dtype=torch.float64), 0.0
    for start in range(0, groups * group_size, group_size):
        rows = slice(start, start + group_size)
        distances = pair_distances(texts[rows], motions[rows])
        own = distances.diagonal()
        # Rank of the text's own motion; equal distances count in the order of rows, so that equal motions score chance.
        earlier = torch.ones_like(distances, dtype=torch.bool).tril(-1)
        nearer = ((distances < own[:, None]) | (distances == own[:, None]) & earlier).sum(1)
        hits += torch.stack([(nearer < k).sum() for k in range(1, top_k + 1)]).cpu()
        matched += float(own.sum())
    count = groups * group_size
    return Retrieval(tuple((hits / count).tolist()), matched / count, count)


def diversity_indices(count: int, seed: int, pairs: int = DIVERSITY_PAIRS) -> tuple[Integers, Integers]:
    """Two sets of rows, each without a repetition, for :func:`diversity`.

    Raises:
        ValueError: fewer rows than pairs.
    """
    if count < pairs:
        raise ValueError(f"diversity of {pairs} pairs needs as many clips, got {count}; give fewer pairs and say so")
    generator = np.random.default_rng(seed)
    return generator.choice(count, pairs, replace=False), generator.choice(count, pairs, replace=False)


def diversity(motions: Tensor, first: Integers, second: Integers) -> float:
    """Mean distance of the rows ``first`` to the rows ``second`` of embeddings (n, d)."""
    _check_finite(motions, "motion")
    rows = motions.double()
    return float((rows[torch.as_tensor(first)] - rows[torch.as_tensor(second)]).norm(dim=-1).mean())


def multimodality(motions: Tensor, first: Integers, second: Integers) -> float:
    """Mean distance between samples of one caption.

    Args:
        motions: embeddings, (captions, samples, d).
        first, second: sample numbers of the pairs, the same for all captions; see :func:`diversity_indices`.
    Raises:
        ValueError: no three dimensions, or values that are not finite.
    """
    if motions.ndim != 3:
        raise ValueError(f"embeddings are {tuple(motions.shape)}; expected (captions, samples, d)")
    _check_finite(motions.flatten(0, 1), "motion")
    rows = motions.double()
    return float((rows[:, torch.as_tensor(first)] - rows[:, torch.as_tensor(second)]).norm(dim=-1).mean())


@dataclass(frozen=True)
class Interval:
    """Mean of repetitions and half the width of its 95 % interval."""

    mean: float
    half_width: float
    repetitions: int

    @classmethod
    def of(cls, values: "list[float] | NDArray[np.float64]") -> "Interval":
        """mean ± 1.96 s / sqrt(n) with the population's deviation s, as published tables have it."""
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 1 or not len(array):
            raise ValueError(f"repetitions have shape {array.shape}; expected (n,), n at least 1")
        return cls(float(array.mean()), float(1.96 * array.std() / np.sqrt(len(array))), len(array))

    def __str__(self) -> str:
        return f"{self.mean:.3f}±{self.half_width:.3f}"


def jerk(joints: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Jerk of the most restless joint per frame: max over joints of |third difference| summed over x, y, z.

    Args:
        joints: (B, T, J, 3).
        lengths: valid frames, (B,); the differences that reach past them are 0.
    Returns:
        (B, T - 3), per frame, without any factor of the frame rate.
    Raises:
        ValueError: fewer than four frames.
    """
    if joints.shape[1] < 4:
        raise ValueError(f"jerk is a third difference and needs 4 frames, got {joints.shape[1]}")
    third = joints.diff(n=3, dim=1).abs().sum(-1).amax(-1)
    if lengths is None:
        return third
    inside = torch.arange(third.shape[1], device=joints.device) < (lengths.to(joints.device) - 3)[:, None]
    return torch.where(inside, third, 0.0)


def peak_jerk(curves: Tensor) -> float:
    """PJ: largest value of the clips' mean curve, from :func:`jerk` (B, T - 3)."""
    return float(curves.double().mean(0).max())


def area_under_jerk(curves: Tensor, real: float = REAL_JERK["humanml3d"]) -> float:
    """AUJ: sum over frames of |mean curve - the jerk of real motion|, from :func:`jerk` (B, T - 3)."""
    return float((curves.double().mean(0) - real).abs().sum())


def transitions(joints: Tensor, borders: Sequence[int], frames: int) -> Tensor:
    """Windows around the borders between segments of a long motion, for :func:`jerk`.

    Args:
        joints: (T, J, 3).
        borders: frames at which a segment begins.
        frames: length of a window; published: 60 at 20 fps, 30 at 30 fps.
    Returns:
        (borders, frames, J, 3).
    Raises:
        ValueError: a window reaches beyond the motion.
    """
    starts = [border - frames // 2 for border in borders]
    if not starts or min(starts) < 0 or max(starts) + frames > len(joints):
        raise ValueError(
            f"windows of {frames} frames around {list(borders)} do not fit into a motion of {len(joints)} frames"
        )
    return torch.stack([joints[start : start + frames] for start in starts])


def foot_skating(
    joints: Tensor, feet: tuple[int, ...], lengths: Tensor | None = None, *, height: float = 0.05, slide: float = 0.025
) -> float:
    """Share of frames in which a joint near the ground slides over it.

    Args:
        joints: (B, T, J, 3), +Y up, floor at y = 0.
        feet: joints to watch, usually the toes.
        lengths: valid frames, (B,).
        height: below which a joint counts as touching in both frames, in units of the joints (metres).
        slide: horizontal way per frame above which it slides.
    Returns:
        Between 0 and 1, over all valid pairs of frames.
    """
    watched = joints[:, :, list(feet)].cpu()
    low = watched[..., 1] < height  # (B, T, feet)
    way = watched[..., [0, 2]].diff(dim=1).norm(dim=-1)
    sliding = (low[:, 1:] & low[:, :-1] & (way > slide)).any(-1)  # (B, T - 1)
    frames = torch.full((len(joints),), joints.shape[1]) if lengths is None else lengths.cpu()
    inside = torch.arange(sliding.shape[1]) < (frames - 1)[:, None]
    return float((sliding & inside).sum() / inside.sum().clamp(min=1))


class PairedErrors(NamedTuple):
    """Mean distances between paired clips: of the root, its path on the ground, joints relative to the root, joints."""

    root: float
    trajectory: float
    local: float
    joints: float


def average_position_error(made: Tensor, real: Tensor) -> PairedErrors:
    """APE: mean distance of positions over frames and joints of clips (T, J, 3) of equal length."""
    return PairedErrors(*(float((a - b).norm(dim=-1).mean()) for a, b in zip(_aspects(made), _aspects(real))))


def average_variance_error(made: Tensor, real: Tensor) -> PairedErrors:
    """AVE: mean distance of the variances over time (divisor T - 1) of clips (T, J, 3) of equal length."""
    pairs = zip(_aspects(made), _aspects(real))
    return PairedErrors(*(float((a.var(0) - b.var(0)).norm(dim=-1).mean()) for a, b in pairs))


def _aspects(joints: Tensor) -> tuple[Tensor, ...]:
    rows = joints.double()
    root = rows[:, 0]
    return root, root[:, [0, 2]], rows[:, 1:] - root[:, None], rows


def _check_finite(rows: Tensor, what: str) -> None:
    bad = ~rows.isfinite().all(-1)
    if bool(bad.any()):
        raise ValueError(f"the embedding of {what} {int(bad.nonzero()[0])} is not finite")
