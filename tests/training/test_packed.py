"""Training on packed rows: the debug run learns and samples its sizes; exact resuming; the mean over images."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

import train
from genssm.config import load_config
from genssm.data import loading
from genssm.data.loading import Shares, training_batches
from genssm.errors import cli
from genssm.models import MotionMambaFrames
from genssm.tasks import PackedImageDenoising, build_task
from genssm.training.checkpoint import resolve_pipeline
from genssm.training.guard import NonFiniteError
from genssm.training.seeding import generator_for
from tests.training.conftest import ROOT, forget_processes, largest_difference, metrics, run_train, weights

PACKED = ROOT / "configs" / "debug" / "packed.yaml"
MOTION = ROOT / "configs" / "debug" / "motion_frames.yaml"
FLAGS = ("--quiet", "--config", str(PACKED))
SHORT = ("train.max_train_steps=7", "train.checkpointing_steps=3", "log.sample_every=0", "log.log_every=1")
SIZES = ((40, 20), (20, 40), (16, 16), (6, 5), (30, 29), (12, 16), (64, 8))  # width, height


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-eight stripes in colours of their own, of seven shapes, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(28):
        width, height = SIZES[number % len(SIZES)]
        rows, columns = np.mgrid[:height, :width]
        wave = 127 + 120 * np.sin((rows + number % 3 * columns) / 3)
        tint = np.array([number % 2, number % 3 / 2, number % 5 / 4])
        Image.fromarray((wave[..., None] * tint).astype(np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("upright" if height > width else "lying")
    return folder


def task_of(*overrides: str, config: Path = PACKED) -> PackedImageDenoising:
    return build_task(load_config(config, overrides), torch.device("cpu"))


def step_gradients(task: PackedImageDenoising, world: int, parts: int = 1, step: int = 1) -> dict[str, torch.Tensor]:
    """Gradients of a step that several processes share, computed one after the other as ``train.py`` would."""
    task.model.zero_grad()
    batch_size = task.config.train.train_batch_size
    draws = task.random_numbers(batch_size, generator_for(0, "noise", step))
    for rank in range(world):
        shares = Shares(batch_size, parts, world, rank)
        batches = training_batches(task.feed(), task.stream(), shares, first=step, last=step + 1)
        for part, batch in enumerate(batches):
            own = {name: numbers[shares.slice(part)] for name, numbers in draws.items()}
            (task.loss(task.model, batch, own).mean() / parts / world).backward()
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def test_debug_config_learns_and_samples_its_sizes(tmp_path: Path, pictures: Path) -> None:
    run = run_train(
        tmp_path / "run", f"data.path={pictures}", "train.max_train_steps=30", "log.sample_every=30", flags=FLAGS
    )
    lines = metrics(run)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"] and "rows_per_second" in lines[0]
    assert np.asarray(Image.open(run / "samples" / "step_0000030.png")).std() > 10
    pipeline = DiffusionPipeline.from_pretrained(resolve_pipeline(run))
    pipeline.set_progress_bar_config(disable=True)
    for width, height in {*task_of(f"data.path={pictures}").dataset.sizes, (20, 8)}:
        assert pipeline(height=height, width=width, num_inference_steps=2).images[0].size == (width, height)


def test_runs_repeat_and_resume_bitwise(tmp_path: Path, pictures: Path) -> None:
    """Stopped inside an epoch; loader processes and a resumed stream give the same rows."""
    data = f"data.path={pictures}"
    straight = run_train(tmp_path / "a", data, *SHORT, flags=FLAGS)
    run_train(tmp_path / "b", data, *SHORT, "train.max_train_steps=4", flags=FLAGS)
    resumed = run_train(tmp_path / "b", data, *SHORT, "data.num_workers=2", flags=FLAGS)
    assert largest_difference(weights(straight, 7), weights(resumed, 7)) == 0.0
    assert [line["loss"] for line in metrics(straight)] == [line["loss"] for line in metrics(resumed)]


def test_loss_is_the_mean_over_images(pictures: Path) -> None:
    """That of a step is the mean of what its images would have alone, however the rows are divided."""
    task = task_of(f"data.path={pictures}")
    torch.manual_seed(0)
    for parameter in task.model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    whole = step_gradients(task, 1)
    for world, parts in ((2, 1), (4, 2)):
        divided = step_gradients(task, world, parts)
        for name, gradient in whole.items():
            torch.testing.assert_close(divided[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    rows = [task.packed_rows.item(place, key) for place, key in zip(*task.stream().piece(Shares(8), 1, 0))]
    draws = task.random_numbers(8, generator_for(0, "noise", 1))
    losses = []
    for number, row in enumerate(rows):
        place = 0
        for item in row.items:
            image = item["pixel_values"][None]
            tokens = image.shape[-1] * image.shape[-2] // 4
            noise = draws["noise"][number, place : place + tokens].reshape(image.shape)
            time = draws["timesteps"][number, place][None]
            losses.append(task.objective.loss(task.model, image, noise=noise, timesteps=time))
            place += tokens
    task.model.zero_grad()
    torch.cat(losses).mean().backward()
    for name, gradient in whole.items():
        torch.testing.assert_close(task.model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_captions(tmp_path: Path, pictures: Path) -> None:
    pytest.importorskip("tokenizers")
    options = (
        f"data.path={pictures}", "data.caption=sidecar", "model.args.context_dim=16", "text.args.num_layers=1",
        "text.args.num_heads=2", "text.max_length=4", "text.dropout_prob=0.2", "log.sample_every=7",
        "log.num_samples=2", "log.num_inference_steps=2",
    )  # fmt: skip
    run = run_train(tmp_path / "run", *SHORT, *options, flags=FLAGS)
    assert (run / "samples" / "step_0000007.png").is_file()
    pipeline = DiffusionPipeline.from_pretrained(resolve_pipeline(run))
    pipeline.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 2.0, "num_inference_steps": 2, "height": 8, "width": 20}
    assert pipeline(prompt=["upright", "lying"], **call).images[1].size == (20, 8)


def test_latents_while_training(tmp_path: Path, pictures: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    options = (
        f"data.path={pictures}", f"data.vae={tmp_path / 'vae'}", "model.args.in_channels=4", "model.args.sample_size=8",
        "log.num_samples=2", "log.num_inference_steps=2",
    )  # fmt: skip
    run = run_train(tmp_path / "run", *SHORT, *options, "log.sample_every=7", flags=FLAGS)
    assert (run / "samples" / "step_0000007.png").is_file()
    task = task_of(*options)
    assert task.item_shape == (4, 8, 8) and max(task.packed_rows.sizes) <= 16  # 16x16 pixels are 4x4 tokens of latents
    with pytest.raises(ValueError, match=r"data\.multiple is 4; a token is 8 pixels wide"):
        task_of(*options, "model.args.patch_size=4")


def test_motion_clips(tmp_path: Path) -> None:
    flags = ("--quiet", "--config", str(MOTION))
    packed = ("motion.pack_frames=96", "train.train_batch_size=6")
    drawn = ("log.sample_every=7", "log.num_samples=2", "log.num_inference_steps=2")
    straight = run_train(tmp_path / "a", *packed, *SHORT, *drawn, flags=flags)
    assert (straight / "samples" / "step_0000007.png").is_file()
    run_train(tmp_path / "b", *packed, *SHORT, "train.max_train_steps=4", flags=flags)
    resumed = run_train(tmp_path / "b", *packed, *SHORT, flags=flags)
    assert largest_difference(weights(straight, 7), weights(resumed, 7)) == 0.0

    task = task_of(*packed, config=MOTION)
    assert {**task.describe()}["packed"].startswith("rows of 96, ")
    torch.manual_seed(0)
    for parameter in task.model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    whole, divided = step_gradients(task, 1), step_gradients(task, 3)
    for name, gradient in whole.items():
        torch.testing.assert_close(divided[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_captioned_motion_with_contrast() -> None:
    pytest.importorskip("tokenizers")
    options = (
        "model.args.num_classes=0", "model.args.context_dim=16", "train.class_dropout_prob=0", "text.dropout_prob=0.1",
        "text.args.num_layers=1", "text.args.num_heads=2", "text.max_length=8", "motion.contrastive_weight=0.5",
        "motion.key_frame_ratio=0.2", "motion.pack_frames=64", "train.train_batch_size=4",
    )  # fmt: skip
    task = task_of(*options, config=MOTION)
    gradients = step_gradients(task, 1)
    assert {"text_encoder", "denoiser", "alignment"} <= {name.partition(".")[0] for name in gradients}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def test_dry_run(capsys: pytest.CaptureFixture, pictures: Path, tmp_path: Path) -> None:
    forget_processes()
    options = (f"data.path={pictures}", f"train.output_dir={tmp_path / 'run'}")
    train.main(["--config", str(PACKED), *options, "--dry-run"])
    text = capsys.readouterr().out
    assert (
        "packed      rows of 128, " in text and "% full" in text and "480 rows" in text and "of width x height" in text
    )
    assert not (tmp_path / "run").exists()


BAD = {
    "data.pack_tokens=16": r"image .*\d\d\.png becomes 16x16 pixels, 64 tokens, more than data\.pack_tokens=16",
    "model.name=dim": r"model\.name=dim cannot be packed; use zigma",
    "model.args.num_frames=2": r"clips of video are not packed",
    "train.layer_shuffle=0.5": r"train\.layer_shuffle would exchange tokens",
    "data.cache=ram": r"data\.cache keeps items of one size; with data\.pack_tokens set it to none",
    "evaluate.every=5": r"evaluate\.every measures images of one size",
    "align.encoder=x": r"align\.encoder reads images of one size",
    "data.crop=pad": r"data\.crop means nothing to data\.name=image_folder with data\.pack_tokens",
    "data.name=moving_digits": r"packs images, not data\.name=moving_digits",
    "data.multiple=3": r"data\.multiple is 3; a token is 2 pixels wide",
    "data.min_resolution=32": r"data\.min_resolution=32 is above data\.resolution=16",
    "data.resolution=2": r"data\.resolution is 2; expected at least data\.multiple=4",
    "data.pack_tokens=0": r"data\.min_resolution means nothing to data\.name=image_folder; leave it out",
    "motion.pack_frames=8": r"set one of them to 0",
    "data.pack_tokens=-1": r"data\.pack_tokens is -1; expected at least 0",
    "data.multiple=0": r"data\.multiple is 0; expected more than 0",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_settings(override: str, tmp_path: Path, pictures: Path) -> None:
    forget_processes()
    arguments = ["--config", str(PACKED), f"data.path={pictures}", f"train.output_dir={tmp_path / 'run'}", override]
    with pytest.raises(ValueError, match=BAD[override]):
        train.main([*arguments, "--quiet"])
    assert not (tmp_path / "run").exists()


def test_bad_motion_settings() -> None:
    with pytest.raises(ValueError, match=r"clip \w+ has \d+ frames, more than motion\.pack_frames=8; raise that"):
        task_of("motion.pack_frames=8", config=MOTION)
    with pytest.raises(ValueError, match=r"model\.name=mld cannot be packed; use motion_mamba_frames"):
        task_of("motion.pack_frames=64", "model.name=mld", config=MOTION)


def test_damaged_image_is_named(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for file in list(pictures.glob("*.png"))[:6]:
        (folder / file.name).write_bytes(file.read_bytes())
    bad = folder / "zz.png"
    bad.write_bytes(b"no image")
    forget_processes()
    with pytest.raises(SystemExit):
        cli(lambda: train.main([*FLAGS[1:], f"data.path={folder}", f"train.output_dir={tmp_path / 'run'}"]))
    assert f"cannot read image {bad}" in capsys.readouterr().err


def test_memory_savers(tmp_path: Path, pictures: Path) -> None:
    """Accumulation and checkpointing train the same; bf16 is finite."""
    data = f"data.path={pictures}"
    plain = run_train(tmp_path / "plain", data, *SHORT, flags=FLAGS)
    options = ("train.gradient_accumulation_steps=4", "train.gradient_checkpointing=true")
    saving = run_train(tmp_path / "saving", data, *SHORT, *options, flags=FLAGS)
    assert largest_difference(weights(plain, 7), weights(saving, 7)) < 1e-5
    half = run_train(tmp_path / "half", data, *SHORT, "train.mixed_precision=bf16", flags=FLAGS)
    assert all(np.isfinite(line["loss"]) for line in metrics(half))


def test_more_graphs_than_torch_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of several scan counts, and rows of one clip or more, need more graphs than torch's own limit."""
    compile_blocks = MotionMambaFrames.compile_repeated_blocks
    eagerly = functools.partialmethod(compile_blocks, backend="eager")
    monkeypatch.setattr(MotionMambaFrames, "compile_repeated_blocks", eagerly)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)  # fewer layers show the same
    torch._dynamo.reset()
    options = ("motion.pack_frames=96", "train.train_batch_size=2", "train.compile=true", "train.max_train_steps=3")
    run = run_train(tmp_path / "run", *SHORT, *options, flags=("--quiet", "--config", str(MOTION)))
    torch._dynamo.reset()
    assert len(metrics(run)) == 3


def test_not_a_number_is_explained(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join = loading.join_rows

    def broken(rows: list) -> dict:
        batch = join(rows)
        batch["pixel_values"][1][0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(loading, "join_rows", broken)
    with pytest.raises(NonFiniteError, match=r"step 1: .*pixel_values"):
        run_train(tmp_path / "run", f"data.path={pictures}", *SHORT, flags=FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_equal_one(tmp_path: Path, pictures: Path, sharded: bool) -> None:
    """Each process takes half of the rows of a step, which hold different numbers of images."""
    data = f"data.path={pictures}"
    straight = run_train(tmp_path / "one", data, *SHORT, flags=FLAGS)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if sharded:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "train.py"]
    options = [*SHORT, data, f"train.output_dir={tmp_path / 'two'}", "log.sample_every=7"]
    done = subprocess.run(
        [*launch, *FLAGS, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert largest_difference(weights(straight, 7), weights(tmp_path / "two", 7)) < 1e-5
    assert (tmp_path / "two" / "samples" / "step_0000007.png").is_file()
