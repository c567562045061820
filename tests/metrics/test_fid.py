"""The evaluation command on tiny sets: files, statistics, pipelines, and what sample.py wrote."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.metrics import weights
from genssm.metrics.fid import main
from genssm.metrics.frechet import frechet_distance_from_features
from genssm.metrics.generated import PipelineSource, choose_labels
from genssm.metrics.sources import content_hash, file_source, image_digest

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of grey 8x8 images: the second one is brighter."""
    for name, count, low in (("samples", 12, 0), ("real", 14, 60)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(RNG.integers(low, 200, (count, 8, 8), dtype=np.uint8)):
            Image.fromarray(image).save(tmp_path / name / f"{i:03d}.png")
    return tmp_path / "samples", tmp_path / "real"


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained ZigMa of 8x8 grey images and ten classes in a run folder, saved as a user would find it."""
    from genssm import ZigMa
    from genssm.pipelines import ClassConditionalImagePipeline
    from genssm.training.objectives import FlowObjective

    torch.manual_seed(0)
    denoiser = ZigMa(sample_size=8, in_channels=1, patch_size=2, hidden_size=16, num_layers=1, num_classes=10)
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints" / "step_0000002" / "pipeline"
    ClassConditionalImagePipeline(denoiser.eval(), FlowObjective().scheduler()).save_pretrained(folder)
    (run / "config.yaml").write_text("model: {name: zigma}\ndata: {name: digits}\ntrain: {ema_decay: 0.99}\n")
    return folder


def run(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_folders_in_inception_features(
    folders: tuple[Path, Path], stand_in_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The distance of the features that clean-fid makes of the two folders; the stand-in is not called FID."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    samples, real = folders
    network = InceptionV3W(str(stand_in_file.parent), download=False)
    ours, theirs = (
        get_folder_features(str(folder), network, num_workers=0, device=torch.device("cpu"), verbose=False)
        for folder in folders
    )
    shown = run(
        capsys, "--samples", samples, "--reference", real, "--weights", stand_in_file, "--report", tmp_path / "r.json"
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["value"] == pytest.approx(frechet_distance_from_features(ours, theirs), rel=1e-5)
    assert report["metric"].startswith("Frechet distance in the features of inception-2015-12-05.pt (")
    assert report["metric"].endswith("not FID")
    assert "resize clean 299" in shown
    assert report["protocol"]["samples"] == {"count": 12, "image_size": "8x8", "file_format": "png"}
    assert report["protocol"]["reference"]["count"] == 14
    images = file_source(real)
    digests = [image_digest(images.read(i)[0]) for i in range(14)]
    assert report["protocol"]["reference"]["sha256"] == content_hash(digests)
    assert report["kid"]["subset_size"] == 12


def test_published_weights_give_fid(
    folders: tuple[Path, Path], stand_in_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    known = weights.INCEPTION_FILES["torchscript"]
    digest = hashlib.sha256(stand_in_file.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.INCEPTION_FILES, "torchscript", dataclasses.replace(known, sha256=digest))
    monkeypatch.setenv("GENSSM_CACHE", str(stand_in_file.parent))
    shown = run(capsys, "--samples", folders[0], "--reference", folders[1])
    assert shown.startswith("FID, to ")
    assert "\nFID: " in shown


def test_statistics_instead_of_the_reference(
    folders: tuple[Path, Path], classifier_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Built by one command; the same report as with the images themselves, also compared as equal in protocol."""
    features = ("--features", f"classifier:{classifier_file}")
    stats = tmp_path / "stats.npz"
    shown = run(capsys, "--reference", folders[1], *features, "--save-stats", stats, "--with-features")
    assert "14 images" in shown
    for reference, name in ((stats, "a.json"), (folders[1], "b.json")):
        run(capsys, "--samples", folders[0], "--reference", reference, *features, "--report", tmp_path / name)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first == second
    shown = run(capsys, "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert shown.count(f"{first['value']:.4f}") == 2
    with pytest.raises(ValueError, match="holds statistics already"):
        main(["--reference", str(stats), *features, "--save-stats", str(tmp_path / "again.npz")])


def test_digits_with_landmarks(classifier_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Real test digits are near the training digits, blurred ones farther, noise far; labels are confirmed."""
    from genssm.data import build_dataset

    digits = build_dataset(name="digits", split="test")
    pixels = np.stack([digits.pixels(i)[0] for i in range(len(digits))])
    blurred = ((pixels.astype(np.int64) + np.roll(pixels, 1, axis=2) + np.roll(pixels, 1, axis=1)) // 3).astype(
        np.uint8
    )
    np.savez(tmp_path / "blurred.npz", arr_0=blurred, arr_1=digits.labels)
    shown = run(
        capsys, "--samples", tmp_path / "blurred.npz", "--reference", "dataset:digits", "--floor", "--noise-ceiling",
        "--features", f"classifier:{classifier_file}", "--report", tmp_path / "r.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["floor"]["name"] == "digits test"
    assert report["floor"]["count"] == report["noise_ceiling"]["count"] == len(digits)
    assert 2 * report["floor"]["value"] < report["value"] < report["noise_ceiling"]["value"] / 2
    assert report["label_agreement"]["on_real_images"] >= 0.97
    assert 0.3 < report["label_agreement"]["value"] < 1
    assert "the digits train classifier" in shown
    assert "not FID" in shown


def test_floor_from_another_source(folders: tuple[Path, Path], classifier_file: Path, tmp_path: Path, capsys) -> None:
    """With as many images as there are samples; without a name only a data set has another split."""
    arguments = ["--samples", folders[0], "--reference", folders[0], "--features", f"classifier:{classifier_file}"]
    run(capsys, *arguments, "--floor", folders[1], "--report", tmp_path / "r.json")
    floor = json.loads((tmp_path / "r.json").read_text())["floor"]
    assert (floor["count"], floor["name"]) == (12, f"{folders[1]} (12 of 14)")
    with pytest.raises(ValueError, match="--floor needs real images that are not the reference"):
        run(capsys, *arguments, "--floor")


def test_pipeline_images_depend_on_their_number_alone(pipeline_folder: Path) -> None:
    from genssm.metrics.fid import load_pipeline

    pipeline, folder = load_pipeline(pipeline_folder.parents[2], torch.device("cpu"), torch.float32)
    assert folder == pipeline_folder
    source = PipelineSource(pipeline, "p", 7, choose_labels("balanced", 7, 10), seed=5, num_inference_steps=2)
    whole = next(source.batches(range(7), 7))
    assert whole.labels.tolist() == list(range(7))
    for batch in source.batches([1, 4, 6], 2):
        assert (batch.images == whole.images[batch.indices]).all()
        assert batch.labels.tolist() == batch.indices
    assert (source.read(3)[0] == whole.images[3]).all()
    assert (whole.images[0] != whole.images[1]).any()


@pytest.mark.parametrize("solver", [[], ["--ode-solver", "rk4"]])
def test_run_equals_what_sample_py_wrote(
    solver: list[str], pipeline_folder: Path, classifier_file: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Drawn on demand or read from the folder of sample.py: the same images, the same protocol, the same report."""
    spec = importlib.util.spec_from_file_location("sample_program", ROOT / "sample.py")
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    drawing = ["--num-inference-steps", "3", "--guidance-scale", "2", "--seed", "4", "--device", "cpu", *solver]
    out = ["--num-images", "20", "--out", str(tmp_path / "images"), "--grid", str(tmp_path / "images" / "grid.png")]
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(pipeline_folder.parents[2]), *out, *drawing])
    sample.main()
    evaluation = ["--reference", "dataset:digits", "--features", f"classifier:{classifier_file}"]
    run(capsys, "--samples", tmp_path / "images", *evaluation, "--report", tmp_path / "a.json")
    run(
        capsys, "--samples", pipeline_folder.parents[2], "--num-samples", 20, "--batch-size", 7, *evaluation, *drawing,
        "--report", tmp_path / "b.json",
    )  # fmt: skip
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first["subject"]["sha256"] == second["subject"]["sha256"]
    assert first["protocol"] == second["protocol"]
    assert first["value"] == pytest.approx(second["value"], rel=1e-6)
    assert first["label_agreement"] == second["label_agreement"]
    sampling = first["protocol"]["sampling"]
    assert sampling["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert sampling["ode_solver"] == ({"method": "rk4"} if solver else None)
    expected = {"num_inference_steps": 3, "guidance_scale": 2.0, "weights": "EMA 0.99", "labels": "0..9 in turn"}
    assert {key: sampling[key] for key in expected} == expected
    assert (sampling["seeds"], sampling["dtype"]) == ("4..23", "float32")
    (tmp_path / "images" / "000003.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 20 samples, first 000003\.png"):
        run(capsys, "--samples", tmp_path / "images", *evaluation)


def test_protocols_are_compared_and_refused_on_the_command_line(
    pipeline_folder: Path, classifier_file: Path, tmp_path: Path, capsys
) -> None:
    evaluation = ["--reference", "dataset:digits:test", "--features", f"classifier:{classifier_file}", "--no-kid"]
    for steps in (1, 2):
        run(
            capsys, "--samples", pipeline_folder, "--num-samples", 10, "--num-inference-steps", steps, *evaluation,
            "--report", tmp_path / f"{steps}.json",
        )  # fmt: skip
    files = ["--compare", tmp_path / "1.json", tmp_path / "2.json"]
    with pytest.raises(ValueError, match=r"sampling\.num_inference_steps: 1 and 2"):
        run(capsys, *files)
    with pytest.raises(ValueError, match=r"safetensors is no JSON"):
        run(capsys, "--compare", tmp_path / "1.json", classifier_file)
    shown = run(capsys, *files, "--allow", "sampling.num_inference_steps")
    assert "they differ in sampling.num_inference_steps: 1 and 2" in shown


def test_other_samplers_and_labels(pipeline_folder: Path, classifier_file: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--samples", pipeline_folder, "--num-samples", 6, "--num-inference-steps", 2, "--no-kid",
                 "--features", f"classifier:{classifier_file}", "--reference", "dataset:digits:test",
                 "--report", tmp_path / "r.json"]  # fmt: skip

    def sampling(*more: object) -> dict:
        run(capsys, *arguments, *more)
        return json.loads((tmp_path / "r.json").read_text())["protocol"]["sampling"]

    heun = sampling("--scheduler", "heun", "--labels", 3)
    assert heun["scheduler"]["class"] == "FlowMatchHeunDiscreteScheduler"
    assert heun["labels"] == "3 only"
    ode = sampling("--ode-solver", "midpoint", "--labels", "reference")
    assert ode["ode_solver"] == {"method": "midpoint"}
    assert ode["labels"] == "reference"
    adaptive = sampling("--ode-solver", "bosh3", "--ode-rtol", 0.1)
    assert adaptive["ode_solver"] == {"method": "bosh3", "rtol": 0.1, "atol": 1e-6}


def test_choice_of_labels() -> None:
    assert choose_labels("balanced", 5, 3).tolist() == [0, 1, 2, 0, 1]
    assert choose_labels("2", 3, 3).tolist() == [2, 2, 2]
    drawn = choose_labels("reference", 4000, 4, [1, 0, 3])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.25, 0, 0.75, 0], atol=0.03)
    assert drawn[:10].tolist() == choose_labels("reference", 10, 4, [1, 0, 3]).tolist()
    for which, frequencies, message in (
        ("reference", None, "which has no labels"),
        ("reference", [1] * 5, "which has 5 classes and the model 3"),
        ("3", None, r"expected balanced, reference or a class in 0\.\.2"),
        ("all", None, "expected balanced"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_labels(which, 3, 3, frequencies)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "x"], "give --samples and --reference"),
        (["--reference", "{real}"], "give --samples and --reference"),
        (["--samples", "{samples}", "--reference", "{real}", "--with-features"], "is about the file of --save-stats"),
        (
            ["--samples", "{samples}", "--reference", "{real}", "--guidance-scale", "2"],
            "--guidance-scale: for sampling",
        ),
        (["--samples", "{samples}", "--reference", "{real}", "--num-samples", "13"], "holds 12 images, 13 were asked"),
        (["--samples", "{pipeline}", "--reference", "{real}"], "how many images to draw with --num-samples"),
        (["--samples", "{pipeline}", "--num-samples", "4", "--reference", "{real}", "--labels", "10"], r"in 0\.\.9"),
        (["--samples", "{pipeline}", "--num-samples", "4", "--reference", "{real}", "--ode-rtol", "1"], "tolerances"),
        (
            [
                "--samples",
                "{pipeline}",
                "--num-samples",
                "4",
                "--reference",
                "{real}",
                "--ode-solver",
                "bosh3",
                "--ode-rtol",
                "-1",
            ],
            "above 0",
        ),
        (["--samples", "{samples}", "--reference", "{real}", "--resize-mode", "clean"], "is for inception"),
        (["--samples", "{samples}", "--reference", "{real}", "--batch-size", "0"], "batch size of features is 0"),
        (["--samples", "{cut}", "--reference", "{real}"], r"cannot read .*cut\.npz"),
        (["--samples", "{samples}", "--reference", "{cut}"], r"cannot read .*cut\.npz.*no \.npz file, or damaged"),
        (["--samples", "{samples}", "--reference", "{array}"], r"array\.npz is a single array"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, folders: tuple[Path, Path], pipeline_folder: Path, classifier_file: Path
) -> None:
    cut, array = folders[0].parent / "cut.npz", folders[0].parent / "array.npz"
    np.savez(cut, arr_0=np.zeros((4, 8, 8), np.uint8))
    cut.write_bytes(cut.read_bytes()[:200])
    with array.open("wb") as stream:
        np.save(stream, np.zeros(3))
    places = {"samples": folders[0], "real": folders[1], "pipeline": pipeline_folder, "cut": cut, "array": array}
    with pytest.raises(ValueError, match=message):
        main([*(a.format(**places) for a in arguments), "--features", f"classifier:{classifier_file}"])


def test_program_ends_with_one_line(tmp_path: Path) -> None:
    """As a program: a user's mistake is one clear line and exit code 2."""
    command = [sys.executable, "-m", "genssm.metrics.fid", "--samples", "nowhere", "--reference", str(tmp_path)]
    environment = {**os.environ, "GENSSM_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: the Inception weights are not here" in done.stderr
