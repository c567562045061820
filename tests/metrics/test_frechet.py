"""Distances between Gaussians and between sets of features: closed forms, invariances, and clean-fid's own values."""

import importlib.util

import numpy as np
import pytest
import torch

from genssm.metrics.frechet import Moments, frechet_distance, frechet_distance_from_features, kid

RNG = np.random.default_rng(0)


def covariance(d: int, rank: int | None = None, seed: int = 0) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((d, d if rank is None else rank))
    return factor @ factor.T


@pytest.mark.parametrize("d", [1, 2, 17])
def test_diagonal_gaussians(d: int) -> None:
    """For diagonal covariances d^2 = |mu1 - mu2|^2 + sum (s1 - s2)^2."""
    mu1, mu2 = RNG.standard_normal((2, d))
    s1, s2 = RNG.uniform(0.1, 3, (2, d))
    expected = ((mu1 - mu2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-12)


def test_commuting_gaussians() -> None:
    """Covariances with common axes differ as diagonal ones do."""
    axes, _ = np.linalg.qr(RNG.standard_normal((9, 9)))
    s1, s2 = RNG.uniform(0, 3, (2, 9))
    sigma1, sigma2 = ((axes * s**2) @ axes.T for s in (s1, s2))
    assert frechet_distance(np.zeros(9), sigma1, np.zeros(9), sigma2) == pytest.approx(((s1 - s2) ** 2).sum(), rel=1e-9)


def test_two_dimensions_closed_form() -> None:
    """In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) with M = S1 S2, which commutes with nothing here."""
    sigma1, sigma2 = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    product = sigma1 @ sigma2
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(sigma1) + np.trace(sigma2) - 2 * root
    assert frechet_distance(np.zeros(2), sigma1, np.zeros(2), sigma2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 3, 1])
def test_identical_is_zero_and_swap_changes_nothing(rank: int | None) -> None:
    mu1, mu2 = RNG.standard_normal((2, 20))
    sigma1, sigma2 = covariance(20, rank, 1), covariance(20, rank, 2)
    assert frechet_distance(mu1, sigma1, mu1, sigma1) == pytest.approx(0, abs=1e-10 * np.trace(sigma1))
    forth, back = frechet_distance(mu1, sigma1, mu2, sigma2), frechet_distance(mu2, sigma2, mu1, sigma1)
    assert forth > 0
    assert forth == pytest.approx(back, rel=1e-12)


def test_singular_covariances() -> None:
    """Gaussians on orthogonal axes share nothing: the traces add up. A point mass leaves one trace."""
    sigma1, sigma2 = np.diag([4.0, 0, 0]), np.diag([0, 9.0, 0])
    assert frechet_distance(np.zeros(3), sigma1, np.zeros(3), sigma2) == pytest.approx(13, rel=1e-12)
    assert frechet_distance(np.ones(3), np.zeros((3, 3)), np.zeros(3), sigma2) == pytest.approx(12, rel=1e-12)
    assert frechet_distance(np.ones(3), np.zeros((3, 3)), np.zeros(3), np.zeros((3, 3))) == pytest.approx(3)


def test_float32_statistics_are_accepted() -> None:
    """Published statistics are often float32: rounding makes their small eigenvalues negative."""
    sigma = covariance(60, 5)
    rounded = sigma.astype(np.float32)
    assert np.linalg.eigvalsh(rounded.astype(np.float64))[0] < 0
    zeros = np.zeros(60)
    assert frechet_distance(zeros, rounded, zeros, sigma) == pytest.approx(0, abs=1e-4 * np.trace(sigma))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:2], "expected"),
        (lambda s: s + np.triu(np.ones_like(s), 1), "symmetric"),
        (lambda s: -s, "negative eigenvalue"),
        (lambda s: s * np.nan, "finite"),
    ],
)
def test_refuses_what_is_no_covariance(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros(3), change(np.eye(3)), np.zeros(3), np.eye(3))


def test_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="length 3 and 4"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


@pytest.mark.parametrize(("n1", "n2"), [(200, 150), (200, 12), (12, 200), (12, 9), (2, 2)])
def test_features_equal_their_statistics(n1: int, n2: int) -> None:
    """Also with fewer vectors than dimensions, where the vectors themselves are the factor."""
    x, y = RNG.standard_normal((n1, 30)), RNG.standard_normal((n2, 30)) * 2 + 1
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert frechet_distance_from_features(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance_from_features(x, x) == pytest.approx(0, abs=1e-9)


def test_shift_and_rotation() -> None:
    """A shift adds its squared length; a common rotation changes nothing."""
    x, y = RNG.standard_normal((100, 8)), RNG.standard_normal((80, 8))
    shift = RNG.standard_normal(8)
    assert frechet_distance_from_features(x, x + shift) == pytest.approx((shift**2).sum(), rel=1e-9)
    axes, _ = np.linalg.qr(RNG.standard_normal((8, 8)))
    plain, turned = frechet_distance_from_features(x, y), frechet_distance_from_features(x @ axes, y @ axes)
    assert turned == pytest.approx(plain, rel=1e-10)


def test_streaming_equals_whole() -> None:
    """Batches, their order and merging change nothing, even with a mean a million times the spread."""
    x = RNG.standard_normal((1000, 6)) + 1e6
    whole = Moments.of(x)
    np.testing.assert_allclose(whole.mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(whole.sigma, np.cov(x, rowvar=False), rtol=0, atol=1e-8)
    first, second = Moments(6), Moments(6)
    for rows in np.array_split(x[:300], [1, 50, 299]):
        first.update(rows)
    second.update(torch.from_numpy(x[300:]))
    first.merge(second)
    first.merge(Moments(6))
    assert first.count == 1000
    np.testing.assert_allclose(first.mu, whole.mu, rtol=1e-14)
    np.testing.assert_allclose(first.sigma, whole.sigma, rtol=0, atol=1e-8)


def test_moments_refuse() -> None:
    moments = Moments(3)
    for features, message in ((np.zeros(3), "shape"), (np.zeros((2, 4)), "length 4"), (np.zeros((0, 3)), "shape")):
        with pytest.raises(ValueError, match=message):
            moments.update(features)
    with pytest.raises(ValueError, match="image 1 are not finite"):
        moments.update(np.array([[0.0, 0, 0], [0, np.inf, 0]]))
    moments.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = moments.sigma
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance_from_features(np.zeros((1, 3)), np.zeros((5, 3)))


def test_kid_closed_form() -> None:
    """One subset that holds everything is the unbiased estimate written out term by term."""
    x, y = RNG.standard_normal((5, 3)), RNG.standard_normal((5, 3)) + 1
    kernel = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(5) for j in range(5)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / 20
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 25
    result = kid(x, y, subsets=1)
    assert result.value == pytest.approx(expected, rel=1e-12)
    assert (result.subset_size, result.standard_error) == (5, 0.0)


def test_kid_is_unbiased() -> None:
    """Two samples of one distribution: zero on average over many draws, within four standard errors, both signs."""
    values = np.array(
        [kid(*np.random.default_rng(seed).standard_normal((2, 40, 4)), subsets=1).value for seed in range(400)]
    )
    assert abs(values.mean()) < 4 * values.std() / 20
    assert values.min() < 0 < values.max()


def test_kid_sees_a_difference_and_has_its_own_randomness() -> None:
    x, y = RNG.standard_normal((2, 300, 4))
    np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    near = kid(x, y, subset_size=100)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert near == kid(x, y, subset_size=100)
    assert near != kid(x, y, subset_size=100, seed=1)
    far = kid(x, y + 1, subset_size=100)
    assert far.value > 20 * abs(near.value)
    with pytest.raises(ValueError, match="subsets of at least 2"):
        kid(x[:1], y)


@pytest.mark.skipif(importlib.util.find_spec("cleanfid") is None, reason="clean-fid is not installed")
def test_equals_clean_fid() -> None:
    """The same numbers as clean-fid on the same features. Its own Frechet distance needs SciPy below 1.18."""
    import scipy
    from cleanfid import fid as cleanfid

    x, y = RNG.standard_normal((150, 40)) ** 2, RNG.standard_normal((150, 40)) + 1
    # With every vector in the one subset its global random order does not matter.
    assert kid(x, y, subsets=1).value == pytest.approx(cleanfid.kernel_distance(x, y, 1, 150), rel=1e-10)
    if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18):
        pytest.skip("clean-fid's Frechet distance does not run with this SciPy")
    theirs = cleanfid.fid_from_feats(x, y)
    assert frechet_distance_from_features(x, y) == pytest.approx(theirs, rel=1e-6)
    theirs = cleanfid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)) == pytest.approx(theirs, rel=1e-6)
