"""Measuring while training: the saved pipeline's number, the best checkpoint stays, training is untouched."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from genssm.metrics.fid import main as fid
from genssm.training.checkpoint import best_checkpoint, list_checkpoints, resolve_pipeline
from genssm.training.evaluation import Evaluation
from tests.training.conftest import ROOT, largest_difference, metrics, run_train, weights

STEPS = 24
MEASURE = ("evaluate.every=8", "evaluate.num_samples=20", "evaluate.num_inference_steps=3", "evaluate.batch_size=7")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENSSM_CACHE", str(tmp_path / "cache"))


def measured(run: Path) -> dict[int, float]:
    return {line["step"]: line["frechet_distance"] for line in metrics(run) if "frechet_distance" in line}


def test_numbers_and_the_best(straight: Path, tmp_path: Path, features: Path, capsys: pytest.CaptureFixture) -> None:
    run = run_train(
        tmp_path / "run", *MEASURE, f"evaluate.features=classifier:{features}", "train.checkpoints_total_limit=1"
    )
    found = measured(run)
    assert list(found) == [8, 16, 24]
    assert largest_difference(weights(straight, STEPS), weights(run, STEPS)) == 0  # training is as without
    best = best_checkpoint(run)
    assert best["value"] == pytest.approx(min(found.values()), rel=1e-5)
    assert best["value"] == pytest.approx(found[best["step"]], rel=1e-5)
    assert best["metric"].startswith("Frechet distance in the features of the digits classifier")
    assert resolve_pipeline(run / "best") == run / "checkpoints" / best["checkpoint"] / "pipeline"
    report = tmp_path / "r.json"
    fid(["--samples", str(run), "--num-samples", "20", "--num-inference-steps", "3", "--reference", f"dataset:{run}",
         "--features", f"classifier:{features}", "--device", "cpu", "--report", str(report)])  # fmt: skip
    assert json.loads(report.read_text())["value"] == pytest.approx(found[STEPS], rel=1e-4)


def test_the_best_is_not_the_last(tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays through later checkpoints, interruptions and a history that is trained again."""
    values = iter([3.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(Evaluation, "measure", lambda self, pipeline: next(values))
    options = (*MEASURE, f"evaluate.features=classifier:{features}", "train.checkpoints_total_limit=1")
    run = run_train(tmp_path / "run", *options)
    assert [c.name for c in list_checkpoints(run)] == ["step_0000016", "step_0000024"]
    assert best_checkpoint(run) == {
        "checkpoint": "step_0000016", "step": 16, "value": 1.0,
        "metric": json.loads((run / "best.json").read_text())["metric"],
    }  # fmt: skip
    run_train(run, *options, "train.max_train_steps=32")
    assert [c.name for c in list_checkpoints(run)] == ["step_0000016", "step_0000032"]
    assert (resolve_pipeline(run / "best") / "model_index.json").is_file()
    shutil.rmtree(run / "checkpoints" / "step_0000016")
    assert best_checkpoint(run) is None
    with pytest.raises(FileNotFoundError):
        resolve_pipeline(run / "best")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(
    tmp_path: Path, features: Path, command: Callable[[Path], list[str]]
) -> None:
    options = (*MEASURE, f"evaluate.features=classifier:{features}", "train.max_train_steps=8")
    one = measured(run_train(tmp_path / "one", *options))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command(tmp_path / "two"), *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert measured(tmp_path / "two") == pytest.approx(one, rel=1e-4)
    assert best_checkpoint(tmp_path / "two")["step"] == 8


def test_models_of_text_are_not_measured(tmp_path: Path, features: Path) -> None:
    pytest.importorskip("tokenizers")
    text = ("--quiet", "--config", str(ROOT / "configs" / "debug" / "text.yaml"))
    with pytest.raises(ValueError, match=r"cannot be measured; set evaluate\.every=0"):
        run_train(tmp_path / "run", "evaluate.every=1", f"evaluate.features=classifier:{features}", flags=text)


@pytest.mark.parametrize("name", ["aim", "maskmamba"])
def test_models_of_codes_are_measured(tmp_path: Path, features: Path, name: str) -> None:
    """The number in the run is that of ``genssm.metrics.fid`` for its last checkpoint."""
    short = ("--quiet", "--config", str(ROOT / "configs" / "debug" / "vq.yaml"))
    vq = run_train(tmp_path / "vq", "train.max_train_steps=2", flags=short)
    flags = ("--quiet", "--config", str(ROOT / "configs" / "debug" / f"{name}.yaml"))
    options = (
        f"data.vae={vq}", *MEASURE, f"evaluate.features=classifier:{features}", "evaluate.guidance_scale=1.5",
        "train.max_train_steps=8",
    )  # fmt: skip
    run = run_train(tmp_path / "run", *options, flags=flags)
    found = measured(run)
    assert list(found) == [8] and best_checkpoint(run)["step"] == 8
    steps = ["--num-inference-steps", "3"] if name == "maskmamba" else []
    command = [
        "--samples", str(run), "--num-samples", "20", "--reference", f"dataset:{run}", "--guidance-scale", "1.5",
        "--features", f"classifier:{features}", "--device", "cpu", "--report", str(tmp_path / "r.json"),
    ]  # fmt: skip
    fid([*command, *steps])
    assert json.loads((tmp_path / "r.json").read_text())["value"] == pytest.approx(found[8], rel=1e-4)
    wrong = ["--ode-solver", "dopri5"] if name == "maskmamba" else ["--num-inference-steps", "3", "--scheduler", "heun"]
    with pytest.raises(ValueError, match=f"{wrong[0]}.*: no option of"):
        fid([*command, *wrong])


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["evaluate.num_samples=1"], ValueError, "at least 2 images"),
        (["evaluate.every=-1"], ValueError, "at least 0"),
        (["evaluate.features=resnet"], ValueError, "expected inception, classifier:FILE"),
        (["evaluate.features=classifier:none.safetensors"], FileNotFoundError, "no classifier at"),
        (["evaluate.reference=nowhere"], FileNotFoundError, "nowhere"),
        (["evaluate.guidance_scale=2", "train.class_dropout_prob=0"], ValueError, r"evaluate\.guidance_scale"),
    ],
)
def test_mistakes_are_found_before_the_work(
    tmp_path: Path, features: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_train(tmp_path / "run", *MEASURE, f"evaluate.features=classifier:{features}", *overrides)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
