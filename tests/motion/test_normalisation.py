"""Normalisation: group rules, files, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genssm.motion import T2M, FeatureStatistics, feature_statistics


def clips(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [3 + 2 * torch.randn(20 + i, 263, generator=generator) for i in range(count)]


def test_statistics_do_not_depend_on_how_frames_are_cut() -> None:
    parts = clips()
    whole = feature_statistics([torch.cat(parts)], T2M)
    found = feature_statistics(parts, T2M)
    torch.testing.assert_close(found.mean, whole.mean)
    torch.testing.assert_close(found.std, whole.std)
    for columns in T2M.groups.values():
        assert found.std[columns].unique().numel() == 1
    rows = torch.cat(parts)
    torch.testing.assert_close(found.std[5], rows.std(0, correction=0)[4:67].mean())


def test_normalising_comes_back_and_bias_divides_root_and_contacts() -> None:
    found = feature_statistics(clips(), T2M)
    x = clips(1)[0]
    torch.testing.assert_close(found.denormalise(found.normalise(x)), x)
    ratio = found.std / found.with_feature_bias(5.0, T2M).std
    assert ratio[:4].allclose(torch.tensor(5.0)) and ratio[259:].allclose(torch.tensor(5.0))
    assert ratio[4:259].eq(1).all()


def test_clips_that_are_not_finite_are_left_out() -> None:
    bad = clips(1)[0].clone()
    bad[3, 5] = torch.nan
    torch.testing.assert_close(feature_statistics([*clips(), bad], T2M).mean, feature_statistics(clips(), T2M).mean)
    with pytest.raises(ValueError, match="no clip"):
        feature_statistics([bad], T2M)


def test_a_group_that_never_varies_is_not_divided_by_zero() -> None:
    constant = torch.ones(9, 263)
    assert feature_statistics([constant], T2M).normalise(constant).eq(0).all()


def test_files(tmp_path: Path) -> None:
    found = feature_statistics(clips(), T2M)
    found.save(tmp_path / "Mean.npy", tmp_path / "Std.npy")
    again = FeatureStatistics.load(tmp_path / "Mean.npy", tmp_path / "Std.npy")
    assert torch.equal(again.mean, found.mean) and torch.equal(again.std, found.std)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FeatureStatistics.load(tmp_path / "nowhere.npy", tmp_path / "Std.npy")
    np.save(tmp_path / "Std.npy", np.zeros(263))
    with pytest.raises(ValueError, match="not positive in column 0"):
        FeatureStatistics.load(tmp_path / "Mean.npy", tmp_path / "Std.npy")
