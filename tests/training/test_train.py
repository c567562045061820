"""The whole loop: it learns, it resumes exactly, it shares a batch between processes, it stops when numbers break."""

import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

import genssm.pipelines  # noqa: F401 - lets diffusers know the pipeline
import train
from genssm.config import DataConfig, load_config
from genssm.data.encode import encode_dataset
from genssm.errors import cli
from genssm.tasks import images
from genssm.training.checkpoint import latest_checkpoint, list_checkpoints, resolve_pipeline
from genssm.training.guard import NonFiniteError
from genssm.training.logging import MetricsLog
from genssm.training.seeding import derive
from tests.training.conftest import (
    DEBUG,
    EMA_WEIGHTS,
    ROOT,
    largest_difference,
    metrics,
    run_train,
    weights,
)  # fmt: skip

STEPS = 24


def test_debug_config_learns(tmp_path: Path) -> None:
    """The shipped debug run, as it is: the loss falls, grid and pipeline are there."""
    run = tmp_path / "run"
    options = ("train.max_train_steps=60", "train.checkpointing_steps=30", "log.sample_every=60", "log.log_every=10")
    run_train(run, *options)
    lines = metrics(run)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert {"grad_norm", "learning_rate", "images_per_second", "ema_decay"} <= lines[0].keys()
    for name in ("config.yaml", "env.json", "log.txt", "labels.json"):
        assert (run / name).stat().st_size > 0
    assert load_config(run / "config.yaml").train.max_train_steps == 60
    assert [c.name for c in list_checkpoints(run)] == ["step_0000030", "step_0000060"]
    grid = Image.open(run / "samples" / "step_0000060.png")
    assert grid.size == (10 * 66 + 2, 66 + 2)
    assert np.asarray(grid).std() > 10

    pipeline = DiffusionPipeline.from_pretrained(resolve_pipeline(run))
    assert pipeline.config.class_names == [str(i) for i in range(10)]
    generators = [torch.Generator().manual_seed(i) for i in range(10)]
    images = pipeline(list(range(10)), generator=generators, num_inference_steps=10).images
    third = np.asarray(grid)[2:66, 2 + 3 * 66 : 66 + 3 * 66]
    assert np.array_equal(third[::8, ::8], np.asarray(images[3]))  # the grid is what the saved pipeline draws
    card = (resolve_pipeline(run) / "README.md").read_text()
    assert "63,124 parameters" in card and "60 steps" in card and "3,840" in card


def test_runs_repeat_bitwise(straight: Path, tmp_path: Path) -> None:
    again = run_train(tmp_path / "run", "data.cache=none", "data.num_workers=2")
    assert largest_difference(weights(straight, STEPS), weights(again, STEPS)) == 0
    other = run_train(tmp_path / "other", "train.seed=1", "train.max_train_steps=1")
    assert largest_difference(weights(straight, STEPS), weights(other, 1)) > 0


def test_stopped_and_resumed_equals_straight(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM at step 13, inside an epoch: saved there, and the same command goes on to the same bits."""
    steps = []

    def step_and_signal(self: MetricsLog) -> None:
        steps.append(1)
        if len(steps) == 13:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "step", step_and_signal)
    run = run_train(tmp_path / "run")
    assert latest_checkpoint(run).name == "step_0000013" and len(steps) == 13
    torch.manual_seed(99)  # what global generators hold must not matter
    np.random.seed(99)  # noqa: NPY002
    run_train(run)
    assert len(steps) == STEPS
    for part in ("model.safetensors", EMA_WEIGHTS):
        assert largest_difference(weights(straight, STEPS, part), weights(run, STEPS, part)) == 0
    assert [line["step"] for line in metrics(run)] == [6, 12, 18, 24]
    # The means over steps 13 to 18 differ: the numbers of step 13 were in the process that stopped.
    assert metrics(run)[-1]["loss"] == metrics(straight)[-1]["loss"]


def test_finished_run_is_left_alone_and_can_be_prolonged(straight: Path, tmp_path: Path) -> None:
    run = run_train(tmp_path / "run", "train.max_train_steps=12")
    before = weights(run, 12)
    run_train(run, "train.max_train_steps=12")
    assert largest_difference(before, weights(run, 12)) == 0
    run_train(run)
    assert largest_difference(weights(straight, STEPS), weights(run, STEPS)) == 0


@pytest.mark.slow
def test_killed_run_goes_on(straight: Path, tmp_path: Path, command: Callable[[Path], list[str]]) -> None:
    """kill -9 somewhere after the first checkpoint."""
    run = tmp_path / "run"
    slower = [sys.executable, "-c", _SLOW_TRAIN, *command(run)]
    process = subprocess.Popen(slower, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while latest_checkpoint(run) is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it could be killed"
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert latest_checkpoint(run) is not None and latest_checkpoint(run).name != f"step_{STEPS:07d}"
    run_train(run)
    for part in ("model.safetensors", EMA_WEIGHTS):
        assert largest_difference(weights(straight, STEPS, part), weights(run, STEPS, part)) == 0
    assert [line["step"] for line in metrics(run)] == [6, 12, 18, 24]


_SLOW_TRAIN = """
import sys, time, train
from genssm.training.logging import MetricsLog
from genssm.training.seeding import derive
plain = MetricsLog.step
MetricsLog.step = lambda self: (time.sleep(0.1), plain(self))
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes_equal_one(straight: Path, tmp_path: Path, command: Callable[[Path], list[str]]) -> None:
    """Each process takes half of the same global batch; sampling and saving run on both without a hang."""
    run = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if torch.accelerator.is_available():  # without one nothing needs to be said
        environment["ACCELERATE_USE_CPU"] = "true"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "train.py"]
    options = ["log.sample_every=24", "log.num_samples=5", "train.gradient_accumulation_steps=2"]
    process = subprocess.Popen(
        [*launch, *command(run), *options], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-3000:]
    assert json.loads((run / "env.json").read_text())["processes"] == 2
    assert largest_difference(weights(straight, STEPS), weights(run, STEPS)) < 1e-5
    for one, two in zip(metrics(straight), metrics(run), strict=True):
        assert math.isclose(one["loss"], two["loss"], rel_tol=1e-4)
        assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=1e-3)
    assert Image.open(run / "samples" / "step_0000024.png").size[0] > 100


_LATE_LOOK = """
import os, sys, time, train
from pathlib import Path
there = Path.exists
def late(path, **options):  # between the two looks of a process at the folder that it finds missing
    looked = path.with_name("looked")
    if path.name == "run" and os.environ["RANK"] == "0":
        looked.touch()
    elif path.name == "run":
        while not there(looked):
            time.sleep(0.05)
        time.sleep(2)
    return there(path, **options)
Path.exists = late
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_folder_is_made_when_all_have_looked(tmp_path: Path, command: Callable[[Path], list[str]]) -> None:
    """A process that is late does not meet the folder of its own run and take it for another's."""
    script = tmp_path / "late.py"
    script.write_text(_LATE_LOOK)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", str(script)]
    done = subprocess.run(
        [*launch, *command(tmp_path / "run"), "train.max_train_steps=1"], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert latest_checkpoint(tmp_path / "run").name == "step_0000001"


@pytest.mark.parametrize(
    "options",
    [
        ("train.gradient_accumulation_steps=4",),
        ("train.gradient_checkpointing=true",),
    ],
)
def test_memory_savers_change_nothing(straight: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    run = run_train(tmp_path / "run", *options)
    assert largest_difference(weights(straight, STEPS), weights(run, STEPS)) < 1e-5


def test_bf16_and_diffusion_objective(tmp_path: Path) -> None:
    options = ("objective.name=diffusion", "objective.prediction_type=v_prediction", "objective.weighting=min_snr")
    run = run_train(
        tmp_path / "run", *options, "train.mixed_precision=bf16", "train.lr_scheduler=cosine", "train.weight_decay=0.1",
        "train.max_grad_norm=0", "train.ema_decay=0", "model.args.num_classes=0", "train.class_dropout_prob=0",
        "log.sample_every=24",
    )  # fmt: skip
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"] and "ema_decay" not in lines[0]
    assert lines[-1]["learning_rate"] < 1e-6
    assert all(v.dtype == torch.float32 for v in weights(run, STEPS).values())
    assert largest_difference(weights(run, STEPS), weights(run, STEPS, EMA_WEIGHTS)) == 0


def test_labels_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share class_dropout_prob of all labels becomes the null class."""
    seen = []
    build = images.build_objective

    def spying(config: object) -> object:
        objective = build(config)
        loss = objective.loss

        def spy(model: object, clean: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
            seen.append(condition["class_labels"].clone())
            return loss(model, clean, **condition)

        objective.loss = spy
        return objective

    monkeypatch.setattr(images, "build_objective", spying)
    run_train(tmp_path / "run", "train.class_dropout_prob=0.3", "data.cache=none")
    labels = torch.cat(seen[-STEPS:])  # the first calls measured the memory
    share = (labels == 10).float().mean().item()
    assert len(labels) == STEPS * 64 and abs(share - 0.3) < 4 * math.sqrt(0.21 / len(labels))
    assert set(labels.tolist()) == set(range(11))


def test_nonfinite_stops_and_names_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    build, fifth_step = train.build, derive(0, "dropout", 5, 0, 0)

    def build_faulty(*arguments: object) -> train.Run:
        built = build(*arguments)
        fault = built.model.blocks[1].mixer
        fault.register_forward_hook(lambda _, __, out: out / 0 if torch.initial_seed() == fifth_step else out)
        return built

    monkeypatch.setattr(train, "build", build_faulty)
    with pytest.raises(NonFiniteError) as error:
        run_train(run, "train.checkpointing_steps=2")
    message = str(error.value)
    assert message.startswith(
        "step 5: loss or gradient is not finite; the output of blocks.1.mixer (Mamba) is not finite"
    )
    assert "although its inputs are finite" in message and "train.learning_rate" in message
    assert [c.name for c in list_checkpoints(run)] == ["step_0000002", "step_0000004"]
    assert all(torch.isfinite(value).all() for value in weights(run, 4).values())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_divergence_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 2: .* not finite.*learning_rate"):
        run_train(tmp_path / "run", "train.learning_rate=1e37", "train.lr_warmup_steps=0")


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    run_train(run, flags=("--dry-run",))
    text = capsys.readouterr().out
    for part in (
        "63,124 parameters",
        "16 tokens",
        "1,442 items",
        "24 steps, 1,536 images, 1.1 epochs",
        "MiB",
        "seed: 0",
    ):
        assert part in text
    assert not run.exists()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["model.name=zigme"], ValueError, "zigma"),
        (["model.args.hiden_size=3"], ValueError, "did you mean hidden_size"),
        (["model.args.in_channels=3"], ValueError, r"1 channel\(s\) but model\.args\.in_channels is 3"),
        (["model.args.sample_size=16"], ValueError, r"8x8 but model\.args\.sample_size is 16x16"),
        (["model.args.num_classes=7"], ValueError, "set it to 10"),
        (["data.label=none"], ValueError, "no labels"),
        (["model.args.null_condition=false"], ValueError, "null class"),
        (["log.guidance_scale=2", "train.class_dropout_prob=0"], ValueError, "guidance_scale"),
        (["train.train_batch_size=30", "train.gradient_accumulation_steps=4"], ValueError, "multiple of 4"),
        (["train.max_train_steps=0"], ValueError, "more than 0"),
        (["train.ema_decay=1"], ValueError, "less than 1"),
        (["train.learning_rate=.nan"], ValueError, "learning_rate is nan"),
        (["train.resume_from_checkpoint=nowhere"], FileNotFoundError, r"state\.pt"),
        (["data.vae=nowhere"], FileNotFoundError, r"config\.json"),
        (["objective.name=diffusion"], ValueError, "flow_prediction"),
    ],
)
def test_mistakes_are_found_before_the_work(
    tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_train(tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_missing_tracker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"wandb; pip install genssm\[track\]"):
        run_train(tmp_path / "run", "log.report_to=wandb")


@pytest.mark.gpu
def test_on_an_accelerator(tmp_path: Path) -> None:
    """bf16, compiled blocks, the data on the device: the loss falls as it does on the CPU."""
    options = ("train.mixed_precision=bf16", "data.cache=device", "log.sample_every=24")
    eager = metrics(run_train(tmp_path / "eager", *options))
    compiled = metrics(run_train(tmp_path / "compiled", *options, "train.compile=true"))
    for lines in (eager, compiled):
        assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and lines[-1]["memory_gib"] > 0
    assert math.isclose(eager[-1]["loss"], compiled[-1]["loss"], rel_tol=0.02)


def test_a_run_is_not_overwritten(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.seed: 0 -> 3"):
        run_train(straight, "train.seed=3")
    with pytest.raises(FileExistsError, match="step_0000024"):
        run_train(straight, "train.resume_from_checkpoint=none")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else"):
        run_train(tmp_path)
    fresh = run_train(
        tmp_path / "branch", f"train.resume_from_checkpoint={straight / 'checkpoints' / 'step_0000020'}",
        "train.checkpoints_total_limit=1", "train.checkpointing_steps=2",
    )  # fmt: skip
    assert largest_difference(weights(straight, STEPS), weights(fresh, STEPS)) == 0
    assert [c.name for c in list_checkpoints(fresh)] == ["step_0000024"]


def test_command_line_prints_mistakes_without_traceback(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        cli(lambda: train.main(["--config", str(DEBUG), "--quiet", "train.learning_rat=1"]))
    assert end.value.code == 2
    message = "error: command line: train.learning_rat: unknown key; did you mean train.learning_rate?\n"
    assert capsys.readouterr().err == message


def test_help_names_every_section(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for key in ("train.train_batch_size", "data.crop", "objective.weighting", "--dry-run", "log.report_to"):
        assert key in text


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=2, scaling_factor=0.8,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("cached", [False, True])
def test_latents_on_the_fly_and_cached(tmp_path: Path, vae_folder: Path, cached: bool) -> None:
    model = (
        "model.args.sample_size=4",
        "model.args.in_channels=2",
        "model.args.patch_size=1",
        f"data.vae={vae_folder}",
    )
    data = ("data.channels=3",)
    if cached:
        digits = DataConfig(name="digits", resolution=8)
        out = encode_dataset(digits, str(vae_folder), tmp_path / "latents", quiet=True)
        data = ("data.name=latents", f"data.path={out}", "data.resolution=null", "data.channels=null")
    options = (*model, *data, "log.sample_every=24", "log.num_inference_steps=3", "model.args.num_layers=1")
    run = run_train(tmp_path / "run", *options)
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"]
    assert Image.open(run / "samples" / "step_0000024.png").mode == "RGB"
    assert (resolve_pipeline(run) / "vae" / "config.json").is_file()
    if cached:
        with pytest.raises(ValueError, match="need a VAE"):
            run_train(tmp_path / "other", *options, "data.vae=null")
        with pytest.raises(ValueError, match="cache=ram with latents"):
            run_train(tmp_path / "third", *options, "data.cache=device")


def test_video_latents(tmp_path: Path) -> None:
    """Clips (F, C, H, W) train as images do; without a VAE they cannot be drawn."""
    clips = np.random.default_rng(0).standard_normal((20, 3, 2, 4, 4), np.float32)
    np.savez(tmp_path / "clips.npz", latents=clips, labels=np.arange(20) % 10)
    options = (
        "data.name=latents", f"data.path={tmp_path / 'clips.npz'}", "data.resolution=null", "data.channels=null",
        "data.latents.form=sample", "data.latents.scaled=true", "model.args.sample_size=4", "model.args.in_channels=2",
        "model.args.patch_size=2", "model.args.num_frames=3", "model.args.video_pattern=st", "train.max_train_steps=2",
        "train.train_batch_size=4",
    )  # fmt: skip
    run = run_train(tmp_path / "run", *options)
    assert latest_checkpoint(run).name == "step_0000002"
    for wrong, message in (("log.sample_every=2", "need a VAE"), ("model.args.num_frames=5", "num_frames is 5")):
        with pytest.raises(ValueError, match=message):
            run_train(tmp_path / "other", *options, wrong)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = run_train(tmp_path / "run", "log.report_to=tensorboard", "log.sample_every=24", "log.num_inference_steps=2")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(run.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [6, 12, 18, 24]
    assert events.Images("samples")
