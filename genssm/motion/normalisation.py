"""Mean and deviation of features, with the rule that columns of one group share a deviation."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genssm.motion.skeleton import Skeleton

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and deviation of each column; x_norm = (x - mean) / std.

    Attributes:
        mean, std: (dim,), float32.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise ValueError(f"mean is {tuple(self.mean.shape)}, std {tuple(self.std.shape)}; expected (dim,) twice")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"{name} of the features is not finite in column {int((~values.isfinite()).nonzero()[0])}"
                )
        if not bool((self.std > 0).all()):
            raise ValueError(f"std of the features is not positive in column {int((self.std <= 0).nonzero()[0])}")

    def normalise(self, features: Tensor) -> Tensor:
        """(features - mean) / std, (..., dim)."""
        return (features - self.mean.to(features)) / self.std.to(features)

    def denormalise(self, features: Tensor) -> Tensor:
        """features * std + mean, (..., dim)."""
        return features * self.std.to(features) + self.mean.to(features)

    def with_feature_bias(self, bias: float, skeleton: Skeleton) -> "FeatureStatistics":
        """Deviations of the root and contact columns divided by ``bias``, which gives these columns more weight.

        One pass, as a model is trained with. The published evaluator's own statistics went through two; use its files.
        """
        std = self.std.clone()
        for name in ("yaw_velocity", "linear_velocity", "height", "contacts"):
            std[skeleton.groups[name]] /= bias
        return FeatureStatistics(self.mean, std)

    @classmethod
    def load(cls, mean: str | Path, std: str | Path) -> "FeatureStatistics":
        """From two .npy files, e.g. ``Mean.npy`` and ``Std.npy`` of a data set.

        Raises:
            FileNotFoundError: a file is missing; the message names it.
        """
        arrays = []
        for path in (mean, std):
            if not Path(path).is_file():
                raise FileNotFoundError(f"no feature statistics at {path}")
            arrays.append(torch.from_numpy(np.load(path).astype(np.float32)))
        return cls(*arrays)

    def save(self, mean: str | Path, std: str | Path) -> None:
        """Write two .npy files, float32."""
        np.save(mean, self.mean.cpu().numpy())
        np.save(std, self.std.cpu().numpy())


def feature_statistics(clips: Iterable[Tensor], skeleton: Skeleton) -> FeatureStatistics:
    """Mean and deviation (divisor n) over all frames of all clips; within a group the deviation is the group's mean.

    Clips with a value that is not finite are left out, as they were when the published statistics were made. A group
    that never varies gets a deviation of 1.

    Args:
        clips: features, (T_i, dim) each, not normalised; read once.
        skeleton: whose groups of columns apply.
    Raises:
        ValueError: no usable clip, or columns that do not fit.
    """
    count, mean, scatter = 0, None, None
    for clip in clips:
        if clip.shape[-1] != skeleton.feature_dim:
            raise ValueError(
                f"a clip has {clip.shape[-1]} columns; skeleton {skeleton.name!r} has {skeleton.feature_dim}"
            )
        rows = clip.reshape(-1, clip.shape[-1]).double()
        if not bool(rows.isfinite().all()):
            continue
        own = rows.mean(0)
        spread = (rows - own).square().sum(0)
        if mean is None:
            count, mean, scatter = len(rows), own, spread
            continue
        total = count + len(rows)
        shift = own - mean
        mean = mean + shift * (len(rows) / total)
        scatter = scatter + spread + shift.square() * (count * len(rows) / total)
        count = total
    if mean is None:
        raise ValueError("there is no clip of finite features to take statistics of")
    std = (scatter / count).sqrt()
    for columns in skeleton.groups.values():
        std[columns] = std[columns].mean() or 1.0
    return FeatureStatistics(mean.float(), std.float())
