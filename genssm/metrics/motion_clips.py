"""Test clips and motions to compare with them, as an evaluator's embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from genssm.data.motion import MotionDataset
from genssm.data.motion.clips import Caption, joints_to_clip_features
from genssm.data.motion.words import WordVectors
from genssm.metrics.features import exact_convolutions
from genssm.metrics.motion_evaluator import UNIT_LENGTH, MotionEvaluator
from genssm.motion import Skeleton
from genssm.training.seeding import derive, hash_integers, permutation

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Clips:
    """Motions with captions, in the order in which they are compared.

    Attributes:
        names: of the clips of the data set they belong to.
        captions: one each.
        features: (T_i, dim) each, not normalised.
        labels: class of each, None where it has none.
    """

    names: list[str]
    captions: list[Caption]
    features: list[Tensor]
    labels: list[str | None]

    @property
    def lengths(self) -> list[int]:
        return [len(features) for features in self.features]

    def take(self, rows: Sequence[int]) -> "Clips":
        """Some of them, in the order of ``rows``, which may repeat."""
        return Clips(*([column[i] for i in rows] for column in (self.names, self.captions, self.features, self.labels)))


def draw_clips(
    dataset: MotionDataset, seed: int, repetition: int, windows: int = 1, *, limit: int | None = None, take: str = "a"
) -> Clips:
    """Every clip of a data set ``windows`` times, cropped at random and with a random caption, in a random order.

    Args:
        dataset: the test part.
        seed: of the evaluation.
        repetition: number of the repetition; order, crops and captions depend on it.
        windows: how often each clip is drawn.
        limit: keep so many of all that.
        take: another letter gives other crops of the same clips in the same order, with the same captions.
    """
    order = permutation(len(dataset) * windows, derive(seed, "order", repetition))[:limit]
    keys = hash_integers(order, derive(seed, "crops", repetition)).tolist()
    others = hash_integers(order, derive(seed, "crops", repetition, take)).tolist() if take != "a" else keys
    numbers = [int(place) % len(dataset) for place in order]
    captions = [dataset.draw(index, key).caption for index, key in zip(numbers, keys)]
    features = [dataset.draw(index, key).features for index, key in zip(numbers, others)]
    chosen = [dataset.clips[index] for index in numbers]
    return Clips([clip.name for clip in chosen], captions, features, [clip.label for clip in chosen])


class MotionSource(Protocol):
    """Something that makes a motion for each caption."""

    name: str

    def motions(self, clips: Clips, seed: int) -> list[Tensor]:
        """Features (T_i, dim), not normalised, for the captions and lengths of ``clips``."""


class PipelineMotions:
    """Motions of a text-to-motion pipeline, as long as the clips whose captions, or else whose classes, they follow.

    Args:
        pipeline: called as ``pipeline(prompt=[...], num_frames=[...], generator=[...], output_type="features")``; one
            without a text encoder with ``class_labels`` in place of ``prompt``, and one without classes with neither.
        name: what reports call it.
        batch_size: motions per call; they do not depend on it.
        call: further arguments of the pipeline: steps, guidance.
    """

    def __init__(self, pipeline: Any, name: str, batch_size: int = 32, **call: Any) -> None:
        self.pipeline, self.name, self.batch_size, self.call = pipeline, name, batch_size, call
        pipeline.set_progress_bar_config(disable=True)

    def motions(self, clips: Clips, seed: int) -> list[Tensor]:
        made: list[Tensor] = []
        for start in range(0, len(clips.names), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(clips.names)))
            batch = clips.take(rows)
            output = self.pipeline(
                **self.condition(batch),
                num_frames=batch.lengths,
                generator=[torch.Generator().manual_seed(derive(seed, i)) for i in rows],
                output_type="features",
                **self.call,
            )
            made += [motion.float().cpu() for motion in output.motions]
        return made

    def condition(self, clips: Clips, texts: str = "prompt") -> dict[str, Any]:
        """What the pipeline is told of the clips; ``texts`` is its name for them.

        Raises:
            ValueError: the pipeline reads classes and a clip has none.
        """
        if self.pipeline.text_encoder is not None:
            return {texts: [caption.text for caption in clips.captions]}
        if not self.pipeline.config.class_names:
            return {"num_motions": len(clips.names)}
        if None in clips.labels:
            name = clips.names[clips.labels.index(None)]
            raise ValueError(f"{self.name} makes motions of classes, but test clip {name!r} has no class")
        return {"class_labels": clips.labels}


class FileMotions:
    """Motions in a folder: ``<name of the test clip>.npy`` with features (T, dim) or joints (T, J, 3).

    They are the same in every repetition; a longer one is cut to the length of the clip.
    """

    def __init__(self, folder: str | Path, skeleton: Skeleton) -> None:
        self.folder, self.skeleton, self.name = Path(folder), skeleton, str(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder of motions at {folder}")

    def motions(self, clips: Clips, seed: int) -> list[Tensor]:
        return [self._read(name)[:length] for name, length in zip(clips.names, clips.lengths)]

    def _read(self, name: str) -> Tensor:
        path = self.folder / f"{name}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"no motion for test clip {name!r}: {path} is missing")
        array = torch.from_numpy(np.load(path).astype(np.float32))
        features = joints_to_clip_features(array, self.skeleton) if array.ndim == 3 else array
        if features.ndim != 2 or features.shape[1] != self.skeleton.feature_dim or len(features) < UNIT_LENGTH:
            raise ValueError(
                f"{path} has shape {tuple(array.shape)}; expected (T, {self.skeleton.feature_dim}) features or "
                f"(T, {self.skeleton.num_joints}, 3) joints, T at least {UNIT_LENGTH}"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(f"{path} holds values that are not finite")
        return features


@torch.no_grad()
def embed_motions(
    evaluator: MotionEvaluator, features: Sequence[Tensor], max_frames: int, device: torch.device, batch_size: int = 64
) -> Tensor:
    """Embeddings (n, d) on the CPU of motions of any lengths, padded to ``max_frames``."""
    found = []
    for start in range(0, len(features), batch_size):
        rows = features[start : start + batch_size]
        batch = torch.zeros(len(rows), max_frames, evaluator.sizes.feature_dim)
        for i, row in enumerate(rows):
            batch[i, : len(row)] = row
        lengths = torch.tensor([len(row) for row in rows])
        with exact_convolutions():
            found.append(evaluator.embed_motions(batch.to(device), lengths).cpu())
    return torch.cat(found)


@torch.no_grad()
def embed_captions(
    evaluator: MotionEvaluator, captions: Sequence[Caption], vectors: WordVectors, device: torch.device
) -> Tensor:
    """Embeddings (n, d) on the CPU of captions."""
    words, classes, lengths = stack_captions(captions, vectors)
    found = []
    for rows in zip(words.split(64), classes.split(64), lengths.split(64)):
        with exact_convolutions():
            found.append(evaluator.embed_texts(rows[0].to(device), rows[1].to(device), rows[2]).cpu())
    return torch.cat(found)


def stack_captions(captions: Sequence[Caption], vectors: WordVectors) -> tuple[Tensor, Tensor, Tensor]:
    """Word vectors (n, W, dim), classes (n, W, 15) and lengths (n,) of captions."""
    rows = [vectors(caption.tokens) for caption in captions]
    words, classes = (torch.from_numpy(np.stack([row[i] for row in rows])) for i in range(2))
    return words, classes, torch.tensor([row.length for row in rows])
