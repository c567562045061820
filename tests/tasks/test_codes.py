"""Training of tokenizers and of models of codes through ``train.py``: they learn, resume exactly, refuse misfits."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import sample
from genssm.config import load_config
from genssm.data.codes import load_tokenizer
from genssm.data.encode_codes import encode_codes
from genssm.metrics.reconstruction import main as reconstruction_main
from genssm.metrics.reconstruction import psnr, ssim
from genssm.tasks import build_task
from genssm.training.checkpoint import resolve_pipeline
from tests.tasks.conftest import ROOT, run_train
from tests.training.conftest import _logger_as_before, largest_difference, metrics, weights  # noqa: F401


def test_tokenizer_learns(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = metrics(tokenizer)
    assert lines[-1]["loss"] < 0.25 * lines[0]["loss"]
    assert 16 < lines[-1]["code_perplexity"] <= lines[-1]["codes_used"] <= 64
    grid = np.asarray(Image.open(tokenizer / "samples" / "step_0000120.png"))
    assert grid.std() > 10
    model = load_tokenizer(tokenizer)
    assert model.quantize.usage_statistics()["used"] > 32
    card = (resolve_pipeline(tokenizer) / "README.md").read_text()
    assert "A VQ tokenizer of images" in card and "of 64, perplexity" in card

    report = tmp_path / "report.json"
    given = ["--tokenizer", str(tokenizer), "--data", str(tokenizer), "--report", str(report), "--device", "cpu"]
    reconstruction_main([*given, "--out", str(tmp_path / "files"), "--num-images", "50"])
    numbers = json.loads(report.read_text())
    assert numbers["psnr"] > 16 and numbers["ssim"] > 0.8 and numbers["codes_used"] > 20
    assert len(list((tmp_path / "files").glob("*.png"))) == 50
    assert "PSNR" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        reconstruction_main([*given, "--out", str(tmp_path / "files")])


def test_reconstruction_metrics() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert psnr(images, (images + 0.1)).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert ssim(images, noise).abs().max() < 0.3


@pytest.mark.parametrize(("name", "fall"), [("aim", 0.6), ("maskmamba", 0.85)])
def test_models_of_codes_learn(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fall: float
) -> None:
    """The shipped debug runs; the grid is what the saved pipeline and ``sample.py`` draw."""
    run = run_train(name, tmp_path / "run", f"data.vae={tokenizer}")
    lines = metrics(run)
    assert lines[-1]["loss"] < fall * lines[0]["loss"]
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(run))
    assert pipe.config.class_names == [str(i) for i in range(10)]
    options = ["--num-inference-steps", "8"] if name == "maskmamba" else []
    command = ["sample.py", "--model", str(run), "--out", str(tmp_path / "out"), "--device", "cpu", *options]
    monkeypatch.setattr(sys, "argv", [*command, "--guidance-scale", "1.5"])
    sample.main()
    grid = np.asarray(Image.open(run / "samples" / "step_0000100.png"))
    third = grid[2:66, 2 + 3 * 66 : 66 + 3 * 66]
    drawn = np.asarray(Image.open(tmp_path / "out" / "000003.png"))
    assert np.array_equal(third[::8, ::8], drawn)
    settings = json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]
    assert settings["temperature"] == 1.0 and "height" not in settings
    wrong = "--height" if name == "maskmamba" else "--num-inference-steps"
    monkeypatch.setattr(sys, "argv", [*command, wrong, "16"])
    with pytest.raises(ValueError, match=f"{wrong}: no option of"):
        sample.main()


def test_stored_codes_are_the_same_run(tokenizer: Path, tmp_path: Path) -> None:
    """Codes made while training and codes stored before give the same weights."""
    short = (f"data.vae={tokenizer}", "train.max_train_steps=6", "train.checkpointing_steps=6", "log.sample_every=0")
    images = run_train("aim", tmp_path / "images", *short)
    data = load_config(ROOT / "configs" / "debug" / "aim.yaml").data
    out = encode_codes(data, str(tokenizer), tmp_path / "codes", quiet=True)
    plain = ("data.resolution=null", "data.channels=null", "data.name=codes", f"data.path={out}")
    stored = run_train("aim", tmp_path / "stored", *short, *plain)
    assert largest_difference(weights(images, 6), weights(stored, 6)) == 0


def test_tokenizer_with_discriminator_resumes_exactly(tmp_path: Path) -> None:
    """Discriminator, its optimiser, use of the codes and restarts go on as if nothing had happened."""
    given = (
        "train.max_train_steps=8", "train.checkpointing_steps=4", "log.sample_every=0", "objective.restart_every=3",
        "objective.adversarial_weight=0.1", "objective.adversarial_start=2", "train.gradient_accumulation_steps=2",
    )  # fmt: skip
    straight = run_train("vq", tmp_path / "straight", *given)
    resumed = run_train("vq", tmp_path / "resumed", *given, "train.max_train_steps=4")
    run_train("vq", resumed, *given)
    assert largest_difference(weights(straight, 8), weights(resumed, 8)) == 0
    states = [torch.load(run / "checkpoints" / "step_0000008" / "state.pt") for run in (straight, resumed)]
    assert largest_difference(*(state["task"]["discriminator"] for state in states)) == 0
    options = ("objective.adversarial_weight=0", "train.max_train_steps=4")
    without = run_train("vq", tmp_path / "without", *given, *options)
    assert largest_difference(weights(straight, 4), weights(without, 4)) > 0


def test_another_model_of_the_same_shapes_cannot_go_on(tmp_path: Path) -> None:
    """Also one that is no denoiser: its name in the pipeline folder is another."""
    short = ("train.max_train_steps=1", "train.checkpointing_steps=1", "log.sample_every=0")
    checkpoint = run_train("vq", tmp_path / "run", *short) / "checkpoints" / "step_0000001"
    other = ("model.args.commitment_weight=0.5", f"train.resume_from_checkpoint={checkpoint}")
    with pytest.raises(ValueError, match=r"another model than .*commitment_weight: 0\.25 -> 0\.5"):
        run_train("vq", tmp_path / "other", *short, *other)


def test_tokenizer_trains_in_bfloat16(tmp_path: Path) -> None:
    run = run_train(
        "vq", tmp_path / "run", "train.mixed_precision=bf16", "train.max_train_steps=5", "log.sample_every=0"
    )
    assert np.isfinite(metrics(run)[-1]["loss"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("aim", "model.args.vocab_size=32", "vocab_size is 32 but the tokenizer has 64 codes"),
        ("aim", "model.args.sample_size=5", "images have 4x4 codes but model.args.sample_size is 5x5"),
        ("aim", "model.args.num_classes=4", "num_classes is 4 but the data have 10 classes"),
        ("aim", "model.args.context_dim=4", "the data have none; set data.caption"),
        ("aim", "train.class_dropout_prob=0", "needs a null class that was trained"),
        ("aim", "data.vae=null", "needs its tokenizer"),
        ("aim", "data.resolution=9", "set data.channels and data.resolution"),
        ("aim", "objective.name=flow", "expected one of next_token"),
        ("maskmamba", "objective.name=next_token", "expected one of masked_token"),
        ("vq", "data.resolution=9", "images are 9x9 but the tokenizer shrinks them 2 times"),
        ("vq", "model.args.in_channels=3", "the data have 1 channel"),
        ("vq", "model.args.has_encoder=false", "needs its encoder"),
        ("vq", "train.class_dropout_prob=0.1", "a tokenizer knows no classes"),
        ("vq", "train.gradient_checkpointing=true", "no blocks to recompute"),
    ],
)
def test_misfits_are_refused(tokenizer: Path, name: str, change: str, message: str) -> None:
    overrides = [change] if name == "vq" or change.startswith("data.vae") else [f"data.vae={tokenizer}", change]
    config = load_config(ROOT / "configs" / "debug" / f"{name}.yaml", overrides)
    with pytest.raises(ValueError, match=message):
        build_task(config, torch.device("cpu"))
