"""Metrics of motion against closed forms and plain loops."""

import numpy as np
import pytest
import torch

from genssm.metrics import motion_distances as d


def rows(count: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_retrieval_by_a_plain_loop() -> None:
    texts, motions = rows(70), rows(70) + 0.8 * rows(70, seed=1)
    hits, matched = np.zeros(3), []
    for group in range(2):  # the last 6 are no group
        for i in range(32 * group, 32 * group + 32):
            distances = [float((texts[i] - motions[j]).norm()) for j in range(32 * group, 32 * group + 32)]
            rank = sorted(range(32), key=distances.__getitem__).index(i - 32 * group)
            hits += rank < np.arange(1, 4)
            matched.append(distances[i - 32 * group])
    found = d.retrieval(texts, motions)
    assert found.r_precision == pytest.approx(tuple(hits / 64)) and found.count == 64
    assert 0.1 < found.r_precision[0] < 0.95
    assert found.mm_dist == pytest.approx(np.mean(matched), rel=1e-5)


def test_retrieval_asks_texts_for_motions() -> None:
    """Rows are texts: all texts in one place find the same nearest motion."""
    motions = torch.arange(32.0)[:, None].expand(32, 4).contiguous()
    texts = torch.full((32, 4), 5.0)
    assert d.retrieval(texts, motions).r_precision[0] == 1 / 32
    assert d.retrieval(motions, motions).r_precision == (1, 1, 1)


def test_a_collapsed_model_scores_chance() -> None:
    same = torch.ones(64, 8)
    assert d.retrieval(rows(64), same).r_precision == pytest.approx((1 / 32, 2 / 32, 3 / 32))


def test_group_size_matters_and_small_sets_are_refused() -> None:
    texts, motions = rows(64), rows(64) + rows(64, seed=1)
    assert d.retrieval(texts, motions).r_precision[0] < d.retrieval(texts, motions, group_size=8).r_precision[0]
    with pytest.raises(ValueError, match="groups of 32"):
        d.retrieval(texts[:31], motions[:31])
    motions[3] = torch.nan
    with pytest.raises(ValueError, match="motion 3 is not finite"):
        d.retrieval(texts, motions)


def test_diversity_and_multimodality() -> None:
    wide = rows(4000, 3) * 2
    value = d.diversity(wide, *d.diversity_indices(4000, 0, 3000))
    assert value == pytest.approx(2 * 2**0.5 * 2 * (2 / np.pi) ** 0.5, rel=0.03)  # |N(0, 8 I_3)|
    first, second = d.diversity_indices(400, 1)
    assert len(set(first)) == len(first) == 300 and not np.array_equal(first, second)
    with pytest.raises(ValueError, match="300 pairs"):
        d.diversity_indices(299, 0)
    samples = rows(60, 8).reshape(2, 30, 8)
    pairs = d.diversity_indices(30, 0, 10)
    expected = np.mean([float((s[a] - s[b]).norm()) for s in samples for a, b in zip(*pairs)])
    assert d.multimodality(samples, *pairs) == pytest.approx(expected, rel=1e-5)
    assert d.multimodality(samples[:, :1].expand(-1, 30, -1), *pairs) == 0


def test_interval() -> None:
    found = d.Interval.of([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5 and found.half_width == pytest.approx(1.96 * np.sqrt(1.25) / 2) and found.repetitions == 4
    assert str(found) == "2.500±1.096"


def test_jerk_of_a_cubic_is_its_third_derivative() -> None:
    t = torch.arange(10, dtype=torch.float64)
    joints = torch.zeros(2, 10, 3, 3, dtype=torch.float64)
    joints[0, :, 1] = torch.stack([t**3, -(t**3), t**2], -1) / 6
    curves = d.jerk(joints, torch.tensor([10, 8]))
    assert curves.shape == (2, 7)
    torch.testing.assert_close(curves[0], torch.full((7,), 2.0, dtype=torch.float64))
    assert d.peak_jerk(curves) == pytest.approx(1.0) and d.area_under_jerk(curves, 0.75) == pytest.approx(7 * 0.25)
    torch.testing.assert_close(d.jerk(joints, torch.tensor([8, 8]))[0], torch.tensor([2.0] * 5 + [0] * 2).double())


def test_transitions_are_windows_around_borders() -> None:
    joints = torch.arange(100.0)[:, None, None].expand(100, 2, 3)
    windows = d.transitions(joints, [30, 60], 20)
    assert windows.shape == (2, 20, 2, 3) and windows[:, 0, 0, 0].tolist() == [20, 50]
    with pytest.raises(ValueError, match="do not fit into a motion of 100 frames"):
        d.transitions(joints, [95], 20)


def test_foot_skating_needs_contact_and_slide() -> None:
    joints = torch.zeros(1, 11, 2, 3)
    joints[0, :, 0, 0] = torch.arange(11) * 0.03  # slides on the floor
    joints[0, :, 1] = 1.0
    assert d.foot_skating(joints, (0, 1)) == 1.0
    assert d.foot_skating(joints, (1,)) == 0.0
    joints[0, 5:, 0, 1] = 0.2  # lifted from frame 5 on
    assert d.foot_skating(joints, (0,)) == pytest.approx(0.4)
    assert d.foot_skating(joints, (0,), torch.tensor([6])) == pytest.approx(0.8)


def test_paired_errors() -> None:
    real = rows(20 * 5 * 3, 1).reshape(20, 5, 3)
    moved = real + torch.tensor([3.0, 0.0, 4.0])
    assert d.average_position_error(moved, real) == pytest.approx((5, 5, 0, 5), abs=1e-5)
    assert d.average_variance_error(moved, real) == pytest.approx((0, 0, 0, 0), abs=1e-5)
    assert d.average_variance_error(2 * real, real).root > 0.5
