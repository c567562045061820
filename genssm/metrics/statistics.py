"""Feature statistics of a set of images: collected by one process or many, saved and read as ``.npz``."""

import json
import logging
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from genssm.metrics.features import ClassifierFeatures, FeatureExtractor, FeatureProtocol
from genssm.metrics.frechet import Float64, Moments
from genssm.metrics.sources import ImageSource, content_hash, image_digest
from genssm.metrics.weights import file_hash

logger = logging.getLogger("genssm")
NPZ_META = "genssm"


@dataclass(frozen=True)
class Statistics:
    """What distances need to know about a set of images.

    Attributes:
        name: of the set.
        mu, sigma: mean (F,) and covariance (F, F) of the features, divisor n - 1.
        count: images; None when a file does not say.
        sha256: of the images in order (:func:`genssm.metrics.sources.content_hash`), or of the file that came without.
        image_size: ``28x28``, ``mixed``, or None when a file does not say.
        file_format: ``png``, ``npz``, ... or None.
        protocol: the feature network, or None when a file does not say.
        features: (n, F) float32 in the order of the images, or None when not kept.
        class_counts: images per class where every label is known, else None.
        agreement: share of images whose label the feature classifier confirms, where both exist, else None.
        clips: for clips, how they were cut and whether features are of clips or of their frames; None for images.
        flicker: for clips, ``value`` and ``standard_error`` of :func:`mean_differences` over them, else None.
    """

    name: str
    mu: Float64
    sigma: Float64
    count: int | None
    sha256: str
    image_size: str | None = None
    file_format: str | None = None
    protocol: FeatureProtocol | None = None
    features: NDArray[np.float32] | None = None
    class_counts: list[int] | None = None
    agreement: float | None = None
    clips: dict[str, Any] | None = None
    flicker: dict[str, float] | None = None


@dataclass
class _Part:
    """What one process saw: its positions and, in that order, digests, labels, guesses, differences, features."""

    indices: list[int]
    digests: list[bytes]
    sizes: set[tuple[int, int]]
    labels: list[int]
    guesses: list[int]
    differences: list[float]
    features: list[NDArray[np.float32]]
    moments: Moments | None = None


def collect(
    source: ImageSource,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    keep_features: bool = True,
    progress: bool = False,
) -> Statistics:
    """Features of every image, or clip, of a source.

    In an initialised process group each of n processes takes every n-th image, and all return the whole statistics.

    Args:
        source: the images.
        extractor: the feature network.
        batch_size: images per forward pass.
        keep_features: keep (n, F) float32 for the kernel distance; otherwise memory does not grow with n.
        progress: show a bar.
    Raises:
        ValueError: fewer than two images, a batch size below 1, or a feature is not finite.
    """
    unit = "image" if source.clips is None else "clip"
    if batch_size < 1:
        raise ValueError(f"the batch size of features is {batch_size}; expected at least 1")
    if len(source) < 2:
        raise ValueError(f"{source.name} holds {len(source)} {unit}s; a covariance needs at least 2")
    rank, processes = _place()
    mine = range(rank, len(source), processes)
    part = _Part([], [], set(), [], [], [], [])
    bar = tqdm(total=len(mine), desc=source.name, unit=unit, disable=not progress or rank != 0, leave=False)
    with bar:
        for indices, images, labels in source.batches(mine, batch_size):
            features = extractor(images)
            if not torch.isfinite(features).all():
                row = int((~torch.isfinite(features).all(dim=1)).nonzero()[0])
                where = f"{source.name}: the features of {unit} {indices[row // extractor.rows]}"
                raise ValueError(f"{where} are not finite")
            fitted = features[:, extractor.gaussian]
            part.moments = part.moments or Moments(fitted.shape[1])
            part.moments.update(fitted)
            part.indices += indices
            part.digests += [image_digest(image) for image in images]
            part.sizes.add((int(images.shape[-2]), int(images.shape[-1])))
            if images.ndim == 5:
                part.differences += mean_differences(images)
            if labels is not None:
                part.labels += labels.tolist()
                if isinstance(extractor, ClassifierFeatures):
                    part.guesses += extractor.classes(features).tolist()
            if keep_features:
                part.features.append(features.numpy())
            bar.update(len(indices))
    parts = [part] if processes == 1 else _gather(part)
    return _summary(source, extractor, parts)


def save_statistics(path: str | Path, statistics: Statistics, *, with_features: bool = False) -> None:
    """Write ``mu`` and ``sigma`` as pytorch-fid and the ADM evaluator read them, and what they are of.

    Args:
        path: the ``.npz`` file.
        statistics: to write.
        with_features: add ``features``, float32 (n, F), which the kernel distance needs.
    Raises:
        ValueError: features are asked for but were not kept, or the name does not end in .npz.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"statistics file {path} must end in .npz")
    meta = {key: getattr(statistics, key) for key in ("name", "count", "sha256", "image_size", "file_format")}
    meta |= {key: getattr(statistics, key) for key in ("class_counts", "clips", "flicker")}
    meta["protocol"] = None if statistics.protocol is None else asdict(statistics.protocol)
    arrays: dict[str, Any] = {"mu": statistics.mu, "sigma": statistics.sigma, NPZ_META: np.array(json.dumps(meta))}
    if with_features:
        if statistics.features is None:
            raise ValueError(f"the features of {statistics.name} were not kept; collect them with keep_features")
        arrays["features"] = statistics.features
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        np.savez(partial, **arrays)
        os.replace(partial, path)  # a reader beside us sees the whole file or none
    finally:
        partial.unlink(missing_ok=True)


def load_statistics(path: str | Path) -> Statistics:
    """Read ``mu`` and ``sigma`` of any maker: ours, pytorch-fid's, clean-fid's or the ADM evaluator's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no ``mu`` and ``sigma``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no statistics file {path}; make one with --reference SOURCE --save-stats {path}")
    with open_archive(path) as archive:
        if not {"mu", "sigma"} <= set(archive.files):
            raise ValueError(f"{path} holds {', '.join(archive.files)}; reference statistics are mu and sigma")
        mu, sigma = archive["mu"].astype(np.float64), archive["sigma"].astype(np.float64)
        features = next((archive[key] for key in ("features", "feats") if key in archive), None)
        meta = json.loads(str(archive[NPZ_META])) if NPZ_META in archive else None
    if meta is None:
        count = None if features is None else len(features)
        return Statistics(str(path), mu, sigma, count, file_hash(path), features=features)
    if meta["protocol"] is not None:
        meta["protocol"] = FeatureProtocol(**meta["protocol"])
    return Statistics(mu=mu, sigma=sigma, features=features, **meta)


def mean_differences(clips: torch.Tensor) -> list[float]:
    """Mean absolute difference of neighbouring frames of each clip, in 0..255; nothing for clips of one frame.

    Args:
        clips: uint8 (B, F, 3, H, W).
    """
    if clips.shape[1] < 2:
        return []
    change = (clips[:, 1:].short() - clips[:, :-1].short()).abs()
    return change.flatten(1).double().mean(1).tolist()


def is_statistics(path: Path) -> bool:
    """Whether an ``.npz`` file holds ``mu`` and ``sigma``; a ValueError if it is damaged."""
    with open_archive(path) as archive:
        return {"mu", "sigma"} <= set(archive.files)


def open_archive(path: Path) -> Any:
    """An ``.npz`` file as :func:`numpy.load` opens it; a ValueError that names it if it is no such file or damaged."""
    try:
        archive = np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; it is no .npz file, or damaged: make it again") from error
    if isinstance(archive, np.ndarray):
        raise ValueError(f"{path} is a single array (.npy); expected an .npz archive")
    return archive


def _place() -> tuple[int, int]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _gather(part: _Part) -> list[_Part]:
    parts: list[_Part | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, part)
    return parts  # type: ignore[return-value]


def _summary(source: ImageSource, extractor: FeatureExtractor, parts: Sequence[_Part]) -> Statistics:
    moments: Moments | None = None
    for part in parts:
        if part.moments is not None:
            moments = moments or Moments(part.moments.dim)
            moments.merge(part.moments)
    indices = np.concatenate([np.array(part.indices, dtype=np.int64) for part in parts])
    order = np.argsort(indices)
    digests = [digest for part in parts for digest in part.digests]
    labels = [label for part in parts for label in part.labels]
    guesses = [guess for part in parts for guess in part.guesses]
    differences = np.array([value for part in parts for value in part.differences])
    features = [batch for part in parts for batch in part.features]
    all_labelled, all_guessed = len(labels) == len(indices), len(guesses) == len(indices)
    sizes = set().union(*(part.sizes for part in parts))
    return Statistics(
        name=source.name,
        mu=moments.mu,
        sigma=moments.sigma,
        count=moments.count,
        sha256=content_hash([digests[i] for i in order]),
        image_size="x".join(map(str, next(iter(sizes)))) if len(sizes) == 1 else "mixed",
        file_format=source.file_format,
        protocol=extractor.protocol,
        features=_in_order(np.concatenate(features), order) if features else None,
        class_counts=np.bincount(labels).tolist() if all_labelled else None,
        agreement=float(np.mean(np.array(guesses) == np.array(labels))) if all_labelled and all_guessed else None,
        clips=None if source.clips is None else {**source.clips, "features_of": extractor.of},
        flicker=_flicker(differences[order]) if len(differences) else None,
    )


def _in_order(features: NDArray[np.float32], order: NDArray[np.int64]) -> NDArray[np.float32]:
    """Features in the order of the items, which may have several each."""
    return features.reshape(len(order), -1, features.shape[1])[order].reshape(features.shape)


def _flicker(differences: Float64) -> dict[str, float]:
    """Temporal flickering (VBench, Huang et al. 2024), 1 for still clips, and its standard error over the clips."""
    scores = 1 - differences / 255
    return {"value": float(scores.mean()), "standard_error": float(scores.std(ddof=1) / np.sqrt(len(scores)))}
