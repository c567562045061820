"""The benchmark command: exactly N images, the same numbers however they are made, references, caching, the report."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from genssm.metrics import benchmark
from genssm.metrics.features import ClassifierFeatures, InceptionFeatures
from genssm.metrics.frechet import frechet_distance_from_features, kid
from genssm.metrics.networks import AdmFeatures
from genssm.metrics.sources import file_source
from genssm.metrics.statistics import Statistics, save_statistics
from genssm.models import ZigMa
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.training.objectives import FlowObjective
from tests.metrics.conftest import single_thread

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
Command = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of 8x8 grey images and ten classes whose every parameter contributes."""
    torch.manual_seed(0)
    denoiser = ZigMa(sample_size=8, in_channels=1, patch_size=4, hidden_size=16, num_layers=1, num_classes=10)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("model")
    ClassConditionalImagePipeline(denoiser.eval(), FlowObjective().scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(model: Path, tmp_path: Path, cache: Path, classifier_file: Path) -> Command:
    """``benchmarks/fid.py`` in this process, on the digits in the features of their classifier."""

    def call(*options: object, out: str = "out", count: int = 12, features: bool = True) -> Path:
        target = tmp_path / out
        fixed = ["--model", model, "--num-samples", count, "--out", target, "--cache", cache, "--device", "cpu",
                 "--num-inference-steps", 2]  # fmt: skip
        if features:
            fixed += ["--features", f"classifier:{classifier_file}", "--reference", "dataset:digits:test"]
        benchmark.main(sample.main, [str(o) for o in (*fixed, *options)])
        return target

    return call


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def values(report: dict) -> dict[str, float]:
    return {
        f"{name} {key}": value
        for name, entry in report["metrics"].items()
        for key, value in entry.items()
        if isinstance(value, float)
    }


def test_classifier_features(run: Command, classifier_file: Path) -> None:
    """Every number of the report is that of the features of the images on the disk."""
    out = run("--floor", "--guidance-scale", 2)
    assert sorted(path.name for path in (out / "images").glob("*.png")) == [f"{i:06d}.png" for i in range(12)]
    report, extractor = report_of(out), ClassifierFeatures(classifier_file)
    ours = next(file_source(out / "images").batches(range(12), 12)).images
    digits = benchmark.Reference("dataset:digits:test", benchmark.parser().parse_args(
        ["--model", "m", "--num-samples", "2", "--reference", "r", "--out", "o"]
    )).images  # fmt: skip
    real = torch.cat([extractor(batch.images) for batch in digits.batches(range(len(digits)), 64)])
    fake = extractor(ours)
    expected = frechet_distance_from_features(fake, real)
    assert report["metrics"]["fid"]["value"] == pytest.approx(expected, rel=1e-6)
    assert report["value"] == pytest.approx(expected, rel=1e-6)
    assert report["metrics"]["kid"]["value"] == pytest.approx(kid(fake, real).value, rel=1e-6)
    scores = extractor.scores(fake).double().softmax(1)
    divergence = (scores * (scores / scores.mean(0)).log()).sum(1).mean()
    assert report["metrics"]["is"]["value"] == pytest.approx(float(divergence.exp()), rel=1e-6)
    assert 0 <= report["metrics"]["precision_recall"]["precision"] <= 1
    assert report["metrics"]["fid"]["title"] == "Frechet distance in the features of the digits train classifier"
    assert report["floor"]["value"] < report["value"]
    assert report["label_agreement"]["on_real_images"] > 0.9
    text = (out / "report.md").read_text()
    digest = report["protocol"]["features"]["weights_sha256"][:8]
    for part in ("guidance_scale | 2.0", "num_inference_steps | 2", "seeds | 0..11", digest, "Floor", "355 images",
                 report["subject"]["sha256"], "FlowMatchEulerDiscreteScheduler", "torch 2"):  # fmt: skip
        assert part in text
    assert Image.open(out / "samples.png").size[0] > 100


def test_processes_and_batches_do_not_matter(run: Command, model: Path, tmp_path: Path, classifier_file: Path) -> None:
    one = values(report_of(run()))
    for size in (1, 5):
        found = values(report_of(run("--feature-batch-size", size, "--batch-size", size, out=f"by_{size}")))
        assert found == pytest.approx(one, rel=1e-6)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--model", model, "--num-samples", 12, "--out", tmp_path / "two", "--cache", tmp_path / "other_cache",
                 "--device", "cpu", "--num-inference-steps", 2, "--features", f"classifier:{classifier_file}",
                 "--reference", "dataset:digits:test"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "benchmarks/fid.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two/images/samples.json").read_text())["processes"] == 2
    assert values(report_of(tmp_path / "two")) == pytest.approx(one, rel=1e-6)
    assert report_of(tmp_path / "two")["subject"]["sha256"] == report_of(tmp_path / "out")["subject"]["sha256"]


def test_broken_off_and_prolonged(run: Command, capsys: pytest.CaptureFixture) -> None:
    """Missing images are drawn and nothing else; what is measured is not measured again; more images are the same."""
    out = run()
    first = report_of(out)
    kept = (out / "images/000003.png").stat().st_mtime_ns
    for name in ("000005.png", "000011.png"):
        (out / "images" / name).unlink()
    (out / "images/.partial-000005.png").write_bytes(b"half")
    (out / "report.json").unlink()
    capsys.readouterr()
    assert report_of(run()) == first
    assert "12 files, 2 new" in capsys.readouterr().out
    assert (out / "images/000003.png").stat().st_mtime_ns == kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "collect", lambda *a, **k: pytest.fail("measured again"))
        assert report_of(run()) == first
    more = report_of(run(count=14))
    assert more["protocol"]["samples"]["count"] == 14
    fewer = report_of(run(count=12, out="out"))  # two images too many lie there
    assert fewer["protocol"]["samples"]["count"] == 12
    assert values(fewer) == pytest.approx(values(first))


def test_reference_statistics_are_cached_by_what_they_are_of(
    run: Command, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    for i in range(6):
        Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "real" / f"{i}.png")
    options = ("--reference", tmp_path / "real", "--metrics", "fid", "kid")
    seen = []
    collect = benchmark.collect

    def counting(source: object, *arguments: object, **keys: object) -> Statistics:
        seen.append(source.name)
        return collect(source, *arguments, **keys)

    monkeypatch.setattr("genssm.metrics.reference.collect", counting)
    first = report_of(run(*options))
    again = report_of(run(*options, out="again"))
    assert seen == [str(tmp_path / "real")]
    assert values(first) == values(again)
    assert first["protocol"]["reference"] == again["protocol"]["reference"]
    assert not list(cache.glob(".partial*"))
    Image.new("L", (8, 8)).save(tmp_path / "real" / "6.png")
    assert report_of(run(*options, out="third"))["protocol"]["reference"]["count"] == 7
    assert len(seen) == 2


def test_adm_reference_batch(
    run: Command, tmp_path: Path, fidelity_file: Path, stand_in_file: Path, cache: Path
) -> None:
    """``mu`` and ``mu_s`` for FID and sFID of TensorFlow's network, ``arr_0`` for everything else."""
    images = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    real = torch.from_numpy(images).permute(0, 3, 1, 2)
    adm = AdmFeatures(fidelity_file)
    found = adm(real).double()
    pool, spatial = (found[:, adm.parts[name]].numpy() for name in ("pool", "spatial"))
    arrays = {"arr_0": images, "mu": pool.mean(0) + 0.5, "sigma": np.cov(pool.T)}
    arrays |= {"mu_s": spatial.mean(0) + 0.25, "sigma_s": np.cov(spatial.T)}
    np.savez(tmp_path / "adm.npz", **arrays)
    weights = ("--weights", stand_in_file, "--adm-weights", fidelity_file)
    metrics = ("--metrics", "fid", "kid", "fid_adm", "sfid", "is", "precision_recall")
    out = run("--reference", tmp_path / "adm.npz", *weights, *metrics, features=False, count=5)
    report = report_of(out)
    fake = next(file_source(out / "images").batches(range(5), 5)).images
    ours = adm(fake).double()
    shifted = frechet_distance_from_features(ours[:, adm.parts["pool"]], torch.from_numpy(pool + 0.5))
    assert report["metrics"]["fid_adm"]["value"] == pytest.approx(shifted, rel=1e-4)
    shifted = frechet_distance_from_features(ours[:, adm.parts["spatial"]], torch.from_numpy(spatial + 0.25))
    assert report["metrics"]["sfid"]["value"] == pytest.approx(shifted, rel=1e-4)
    clean = InceptionFeatures("clean", stand_in_file)
    assert report["metrics"]["fid"]["value"] == pytest.approx(
        frechet_distance_from_features(clean(fake), clean(real)), rel=1e-4
    )
    assert set(report["networks"]) == {"main", "adm"}
    assert report["networks"]["adm"]["library"].startswith("torch-fidelity")
    assert "not" not in report["metrics"]["is"]["title"] and "in the features of" in report["metrics"]["is"]["title"]
    assert "mu_s, sigma_s of the file" in report["reference"]


def test_vision_networks(run: Command, dinov2_folder: Path, clip_folder: Path) -> None:
    out = run("--metrics", "fd_dinov2", "cmmd", "--dinov2", dinov2_folder, "--clip", clip_folder, count=4)
    report = report_of(out)
    assert list(report["metrics"]) == ["fid", "fd_dinov2", "cmmd"]
    assert report["metrics"]["fd_dinov2"]["value"] > 0
    assert report["metrics"]["cmmd"]["value"] > 0
    assert report["networks"]["clip"]["resize"] == "Pillow bicubic 28"


def test_sweep(run: Command) -> None:
    pytest.importorskip("matplotlib")
    grid = ("--sweep", "guidance_scale=1,2", "scheduler=default,heun", "--sweep-samples", 6)
    out = run(*grid, "--metrics", "fid", "kid")
    points = report_of(out)["sweep"]
    assert [point["settings"] for point in points] == [
        {"guidance_scale": g, "scheduler": s} for g in (1.0, 2.0) for s in ("default", "heun")
    ]
    assert len({point["metrics"]["fid"]["value"] for point in points}) == 4
    assert all(point["count"] == 6 for point in points)
    assert Image.open(out / "sweep.png").size[0] > 300
    text = (out / "report.md").read_text()
    assert "## Sweep" in text and "| 2.0 | heun | 6 |" in text
    single = report_of(out / "sweep" / "guidance_scale_2.0-scheduler_heun")
    assert single["protocol"]["sampling"]["scheduler"]["class"] == "FlowMatchHeunDiscreteScheduler"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "collect", lambda *a, **k: pytest.fail("measured again"))
        assert report_of(run(*grid, "--metrics", "fid", "kid"))["sweep"] == points


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-samples", 1), "at least 2 images"),
        (("--grid", "g.png"), "--grid: the benchmark sets these"),
        (("--sweep", "seed=1,2"), "expected KEY=A,B"),
        (("--sweep", "guidance_scale=a"), "takes float numbers"),
        (("--sweep", "num_inference_steps=5,0"), "num_inference_steps is at least 1"),
        (("--sweep", "scheduler=default,foo"), "scheduler 'foo' is unknown; there are ddpm"),
        (("--sweep", "ode_solver=rk5"), "ode_solver 'rk5' is unknown"),
        (("--feature-batch-size", 0), "--feature-batch-size is 0"),
        (("--model", "{clips}"), "makes clips; measure them with python -m genssm.metrics.video"),
        (("--metrics", "fd_dinov2"), "dinov2-large"),
        (("--metrics", "is", "--features", "torchscript:{net}"), "needs class scores"),
        (("--reference", "{stats}", "--metrics", "kid"), "holds statistics but no images, which kid need"),
        (("--reference", "nowhere"), "neither a folder of images nor an .npz file"),
        (("--floor", "--reference", "{images}"), "name them: --floor SOURCE"),
    ],
)
def test_mistakes(
    run: Command, options: tuple, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in_file: Path
) -> None:
    monkeypatch.setenv("GENSSM_CACHE", str(tmp_path / "empty"))
    eye = np.eye(3)
    save_statistics(tmp_path / "s.npz", Statistics("x", eye[0], eye, 9, "0" * 64))
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "clips" / "denoiser").mkdir(parents=True)
    (tmp_path / "clips" / "model_index.json").write_text("{}")
    (tmp_path / "clips" / "denoiser" / "config.json").write_text('{"num_frames": 4}')
    places = {
        "clips": tmp_path / "clips",
        "net": stand_in_file,
        "stats": tmp_path / "s.npz",
        "images": tmp_path / "images",
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*(str(o).format(**places) for o in options))
    assert not (tmp_path / "out").exists(), "found before the work"


def test_help_runs_as_a_program() -> None:
    with single_thread():
        done = subprocess.run(
            [sys.executable, "benchmarks/fid.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "precision_recall" in done.stdout and "--sweep" in done.stdout
