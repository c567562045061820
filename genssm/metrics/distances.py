"""Measures of a set of images beside the Frechet and kernel distances, from features, in float64.

n, m samples, d features, K classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

ROWS = 2048  # rows of a matrix of distances that are held at a time


class InceptionScore(NamedTuple):
    """Mean over the splits, its standard deviation over them, and how many there were."""

    value: float
    deviation: float
    splits: int


class PrecisionRecall(NamedTuple):
    """Share of the samples near real images, share of the real images near samples, and neighbours counted."""

    precision: float
    recall: float
    neighbours: int


def inception_score(logits: ArrayLike | Tensor, *, split_size: int = 5000) -> InceptionScore:
    r"""Inception score (Salimans et al., 2016): exp of the mean divergence of class scores from their mean.

        IS = exp(mean_i KL(p_i || mean_j p_j)),     p = softmax(logits)

    Args:
        logits: (n, K), in the order of the images.
        split_size: images per split, in order; the ADM evaluator takes 5,000. The last split may be smaller.
    Returns:
        Mean and standard deviation over the splits.
    Raises:
        ValueError: not (n, K) with finite numbers, or a split size below 1.
    """
    x = _matrix(logits)
    if split_size < 1:
        raise ValueError(f"split_size is {split_size}; expected at least 1")
    scores = []
    for part in x.split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        scores.append(float((p * (log_p - p.mean(0, keepdim=True).clamp(min=1e-300).log())).sum(1).mean().exp()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), len(scores))


def precision_recall(
    samples: ArrayLike | Tensor, real: ArrayLike | Tensor, *, neighbours: int = 3, device: str | torch.device = "cpu"
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al., 2019).

    A set's manifold is the union of balls around its vectors, each as wide as the distance to the vector's ``k``-th
    nearest neighbour in the set.

    Args:
        samples: (n, d).
        real: (m, d).
        neighbours: k; the paper and the ADM evaluator take 3.
        device: where distances are computed.
    Returns:
        Share of the samples in the manifold of the real images, and the other way round.
    Raises:
        ValueError: lengths disagree, a set has no k neighbours, or a value is not finite.
    """
    x, y = _matrix(samples).to(device), _matrix(real).to(device)
    _check_pair(x, y)
    if min(len(x), len(y)) <= neighbours or neighbours < 1:
        raise ValueError(f"{neighbours} neighbours need more than that many images, got {len(x)} and {len(y)}")
    return PrecisionRecall(_inside(x, y, neighbours), _inside(y, x, neighbours), neighbours)


def cmmd(
    samples: ArrayLike | Tensor,
    real: ArrayLike | Tensor,
    *,
    bandwidth: float = 10.0,
    scale: float = 1000.0,
    device: str | torch.device = "cpu",
) -> float:
    r"""Maximum mean discrepancy of CLIP embeddings (Jayasumana et al., 2024), with the Gaussian kernel.

        scale (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),     k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2))

    The means go over all pairs, a vector with itself included, as in the paper.

    Args:
        samples, real: embeddings of length one, (n, d) and (m, d).
        bandwidth: of the kernel.
        scale: factor that makes the numbers readable.
        device: where kernels are computed.
    Raises:
        ValueError: lengths disagree or a value is not finite.
    """
    x, y = _matrix(samples).to(device), _matrix(real).to(device)
    _check_pair(x, y)

    def mean_kernel(a: Tensor, b: Tensor) -> float:
        total = sum(float(torch.exp(-rows / (2 * bandwidth**2)).sum()) for rows in _square_distances(a, b))
        return total / (len(a) * len(b))

    return scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def _inside(x: Tensor, y: Tensor, neighbours: int) -> float:
    """Share of the rows of ``x`` in the manifold of ``y``."""
    # The nearest vector of a set to one of its own is itself.
    radii = torch.cat([rows.kthvalue(neighbours + 1, dim=1).values for rows in _square_distances(y, y, same=True)])
    return float(torch.cat([(rows <= radii).any(1) for rows in _square_distances(x, y)]).double().mean())


def _square_distances(x: Tensor, y: Tensor, *, same: bool = False) -> Iterator[Tensor]:
    """Squared distances of the rows of ``x`` to those of ``y``, some rows at a time; exactly zero to itself."""
    y_norms = y.square().sum(1)
    for start in range(0, len(x), ROWS):
        part = x[start : start + ROWS]
        rows = (part.square().sum(1, keepdim=True) + y_norms - 2 * part @ y.T).clamp(min=0)
        if same:
            here = torch.arange(len(part), device=x.device)
            rows[here, start + here] = 0
        yield rows


def _matrix(values: ArrayLike | Tensor) -> Tensor:
    x = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"features have shape {tuple(x.shape)}; expected (images, length), neither of them 0")
    x = x.double()
    if not torch.isfinite(x).all():
        row = int((~torch.isfinite(x).all(dim=1)).nonzero()[0])
        raise ValueError(f"the features of image {row} are not finite")
    return x


def _check_pair(x: Tensor, y: Tensor) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features have length {x.shape[1]} and {y.shape[1]}; they must agree")
