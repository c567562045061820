"""Statistics of image sets: independent of batches and processes; files of every maker."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from genssm.metrics.features import ClassifierFeatures, FeatureExtractor, FeatureProtocol
from genssm.metrics.sources import file_source
from genssm.metrics.statistics import collect, load_statistics, save_statistics

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)


class Means(FeatureExtractor):
    """Two features: the means of red and of green."""

    protocol = FeatureProtocol("means", "ab" * 32, "none", False, "test 1")

    def extract(self, images: Tensor) -> Tensor:
        return images.double().mean(dim=(2, 3))[:, :2]


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "images.npz", arr_0=PIXELS, arr_1=np.arange(11) % 3)
    return tmp_path / "images.npz"


def test_equal_numpy_whatever_the_batches(npz: Path) -> None:
    means = PIXELS.astype(np.float64).mean(axis=(1, 2))[:, :2].astype(np.float32).astype(np.float64)
    for batch_size in (1, 4, 11, 50):
        statistics = collect(file_source(npz), Means("cpu"), batch_size=batch_size)
        np.testing.assert_allclose(statistics.mu, means.mean(0), rtol=1e-13)
        np.testing.assert_allclose(statistics.sigma, np.cov(means.T), rtol=1e-10)
        np.testing.assert_array_equal(statistics.features, means.astype(np.float32))
        assert (statistics.count, statistics.image_size, statistics.file_format) == (11, "8x8", "npz")
        assert statistics.class_counts == [4, 4, 3]
        assert statistics.agreement is None
        assert statistics.sha256 == collect(file_source(npz), Means("cpu")).sha256
    lean = collect(file_source(npz), Means("cpu"), keep_features=False)
    assert lean.features is None
    np.testing.assert_allclose(lean.sigma, np.cov(means.T), rtol=1e-10)


def test_label_agreement(npz: Path, classifier_file: Path) -> None:
    """The share of images that the classifier puts into their class."""
    extractor = ClassifierFeatures(classifier_file)
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    right = (extractor.network(images).argmax(1).numpy() == np.arange(11) % 3).mean()
    assert collect(file_source(npz), extractor, batch_size=4).agreement == pytest.approx(right)


def test_not_finite_names_the_image(npz: Path) -> None:
    class Broken(Means):
        def extract(self, images: Tensor) -> Tensor:
            features = super().extract(images)
            features[images[:, 0, 0, 0] == int(PIXELS[6, 0, 0, 0]), 1] = torch.nan
            return features

    with pytest.raises(ValueError, match="the features of image 6 are not finite"):
        collect(file_source(npz), Broken("cpu"), batch_size=4)


def test_one_image_is_too_few(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", arr_0=PIXELS[:1])
    with pytest.raises(ValueError, match="holds 1 images; a covariance needs at least 2"):
        collect(file_source(tmp_path / "one.npz"), Means("cpu"))


@pytest.mark.parametrize("with_features", [True, False])
def test_saved_and_read(npz: Path, tmp_path: Path, with_features: bool) -> None:
    statistics = collect(file_source(npz), Means("cpu"))
    save_statistics(tmp_path / "new" / "stats.npz", statistics, with_features=with_features)
    again = load_statistics(tmp_path / "new" / "stats.npz")
    for name in ("mu", "sigma"):
        np.testing.assert_array_equal(getattr(again, name), getattr(statistics, name))
    if with_features:
        np.testing.assert_array_equal(again.features, statistics.features)
    else:
        assert again.features is None
    names = ("name", "count", "sha256", "image_size", "file_format", "protocol", "class_counts")
    assert all(getattr(again, name) == getattr(statistics, name) for name in names)
    with np.load(tmp_path / "new" / "stats.npz") as archive:  # what pytorch-fid and the ADM evaluator look for
        assert {"mu", "sigma"} <= set(archive.files)
        assert archive["sigma"].dtype == np.float64


def test_other_makers(tmp_path: Path) -> None:
    """pytorch-fid: mu, sigma. ADM: also spatial ones and images. clean-fid: features in a file of their own."""
    mu, sigma = np.zeros(3, np.float32), np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "pytorch_fid.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=PIXELS)
    for name in ("pytorch_fid", "adm"):
        statistics = load_statistics(tmp_path / f"{name}.npz")
        assert statistics.mu.dtype == statistics.sigma.dtype == np.float64
        assert (statistics.count, statistics.protocol, statistics.features) == (None, None, None)
        assert len(statistics.sha256) == 64
    np.savez(tmp_path / "feats.npz", mu=mu, sigma=sigma, feats=np.ones((5, 3)))
    assert load_statistics(tmp_path / "feats.npz").count == 5


def test_mistakes(npz: Path, tmp_path: Path) -> None:
    statistics = collect(file_source(npz), Means("cpu"), keep_features=False)
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        save_statistics(tmp_path / "stats.npy", statistics)
    with pytest.raises(ValueError, match="were not kept"):
        save_statistics(tmp_path / "stats.npz", statistics, with_features=True)
    with pytest.raises(ValueError, match="reference statistics are mu and sigma"):
        load_statistics(npz)
    with pytest.raises(FileNotFoundError, match=r"make one with --reference SOURCE --save-stats"):
        load_statistics(tmp_path / "none.npz")


WORKER = """
import sys
from genssm.errors import cli
sys.path.insert(0, sys.argv[3])
from test_statistics import Means
from genssm.metrics.sources import file_source
from genssm.metrics.statistics import collect, save_statistics
from accelerate import PartialState
def main():
    assert PartialState(cpu=True).num_processes == 2
    statistics = collect(file_source(sys.argv[1]), Means("cpu"), batch_size=2)
    save_statistics(sys.argv[2] + f"/{PartialState().process_index}.npz", statistics, with_features=True)
cli(main)
"""


@pytest.mark.slow
def test_two_processes_equal_one(npz: Path, tmp_path: Path) -> None:
    """Both processes hold the statistics of all images, in the order of the images."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(tmp_path / "worker.py"), str(npz), str(tmp_path), str(Path(__file__).parent)]
    subprocess.run([*command, *arguments], check=True, timeout=120)
    single = collect(file_source(npz), Means("cpu"))
    for rank in (0, 1):
        both = load_statistics(tmp_path / f"{rank}.npz")
        np.testing.assert_array_equal(both.features, single.features)
        np.testing.assert_allclose(both.sigma, single.sigma, rtol=1e-12)
        assert replace(both, mu=0, sigma=0, features=0) == replace(single, mu=0, sigma=0, features=0)
