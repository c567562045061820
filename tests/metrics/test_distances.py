"""Inception score, precision and recall, CMMD: closed forms, and what torch-fidelity and clean-fid make of the same."""

import math

import numpy as np
import pytest
import torch

from genssm.metrics.distances import cmmd, inception_score, precision_recall
from genssm.metrics.frechet import frechet_distance, frechet_distance_from_features, kid

RNG = np.random.default_rng(0)


def features(n: int, d: int = 16, shift: float = 0.0) -> np.ndarray:
    return (RNG.standard_normal((n, d)) @ RNG.standard_normal((d, d)) + shift).astype(np.float32)


def test_frechet_distance_is_clean_fids(monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-6 of the value, also where the covariance is singular; its sqrtm is called as SciPy still allows."""
    cleanfid = pytest.importorskip("cleanfid.fid")
    scipy = pytest.importorskip("scipy.linalg")

    plain = scipy.sqrtm

    def sqrtm(matrix: np.ndarray, disp: bool = True) -> tuple | np.ndarray:
        root = plain(matrix)
        return root if disp else (root, 0.0)

    monkeypatch.setattr(cleanfid.linalg, "sqrtm", sqrtm)
    for n, d in ((200, 16), (400, 48), (30, 12)):
        x, y = features(n, d), features(n + 7, d, 0.4)
        statistics = [(v.astype(np.float64).mean(0), np.cov(v.astype(np.float64), rowvar=False)) for v in (x, y)]
        theirs = cleanfid.frechet_distance(*statistics[0], *statistics[1])
        assert frechet_distance(*statistics[0], *statistics[1]) == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        assert frechet_distance_from_features(x, y) == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_equal_to_torch_fidelity() -> None:
    """FID, KID (one subset of everything), inception score and precision/recall of the same features."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    x, y = features(300), features(300, shift=0.5)
    double = [torch.from_numpy(v.astype(np.float64)) for v in (x, y)]
    statistics = [metric_fid.fid_features_to_statistics(v) for v in double]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance_from_features(x, y) == pytest.approx(theirs, rel=1e-6)

    options = {"kid_subsets": 1, "kid_subset_size": 300, "verbose": False}
    theirs = metric_kid.kid_features_to_metric(*double, **options)["kernel_inception_distance_mean"]
    assert kid(x, y, subsets=1, subset_size=300).value == pytest.approx(theirs, rel=1e-6)

    found = metric_isc.isc_features_to_metric(torch.from_numpy(x), splits=10, shuffle=False)
    ours = inception_score(x, split_size=30)
    assert ours.value == pytest.approx(found["inception_score_mean"], rel=1e-9)
    assert ours.deviation == pytest.approx(found["inception_score_std"], rel=1e-9)
    assert ours.splits == 10

    found = metric_prc.prc_features_to_metric(*double, prc_neighborhood=3, verbose=False)
    ours = precision_recall(x, y)
    assert 0.05 < ours.precision < 0.95
    assert (ours.precision, ours.recall) == pytest.approx((found["precision"], found["recall"]))


def test_inception_score_of_known_scores() -> None:
    """One sure class each of K: K; the same scores for all: 1; the last split is smaller."""
    sure = 1e3 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure).value == pytest.approx(5.0)
    assert inception_score(torch.zeros(7, 3)).value == pytest.approx(1.0)
    assert inception_score(sure, split_size=15).splits == 2
    with pytest.raises(ValueError, match="split_size is 0"):
        inception_score(sure, split_size=0)


def test_precision_and_recall_of_known_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    line = torch.arange(10.0)[:, None]
    inside = torch.tensor([[1.4], [5.5], [8.2], [4.1], [30.0]])
    found = precision_recall(inside, line, neighbours=1)
    assert found.precision == pytest.approx(0.8)
    # Balls of the samples: around 1.4 (2.7), 5.5 (1.4), 8.2 (2.7), 4.1 (1.4), 30 (21.8): all of 0..9 are inside.
    assert found.recall == pytest.approx(1.0)
    assert precision_recall(line, line)[:2] == (1.0, 1.0)
    far = precision_recall(line + 100, line)
    assert far[:2] == (0.0, 0.0)
    monkeypatch.setattr("genssm.metrics.distances.ROWS", 3)
    assert precision_recall(inside, line, neighbours=1) == found
    with pytest.raises(ValueError, match="3 neighbours need more"):
        precision_recall(line[:3], line)
    with pytest.raises(ValueError, match="length 1 and 2"):
        precision_recall(line, torch.zeros(5, 2))


def test_cmmd_of_two_points() -> None:
    """All samples at a, all real ones at b: 2 scale (1 - k(a, b))."""
    a, b = torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.tensor([[0.0, 1.0]]).expand(6, 2)
    assert cmmd(a, b) == pytest.approx(2000 * (1 - math.exp(-2 / 200)))
    assert cmmd(a, a) == pytest.approx(0.0, abs=1e-9)
    x, y = (torch.nn.functional.normalize(torch.from_numpy(features(n, 8)), dim=1) for n in (50, 60))
    assert cmmd(x, y) == pytest.approx(cmmd(y, x))
    with pytest.raises(ValueError, match="image 2 are not finite"):
        cmmd(torch.tensor([[0.0], [1.0], [math.nan]]), x[:, :1])
