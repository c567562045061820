"""Training on clips: the debug run learns, draws and saves; captions, latents on the fly, exact resuming."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from genssm.config import DataConfig
from genssm.data import build_dataset
from genssm.data.encode import encode_dataset
from genssm.pipelines import VideoPipeline
from genssm.training.checkpoint import resolve_pipeline
from tests.training.conftest import ROOT, largest_difference, metrics, run_train, weights

VIDEO = ("--config", str(ROOT / "configs" / "debug" / "video.yaml"))
SHORT = ("train.max_train_steps=4", "train.checkpointing_steps=2", "log.sample_every=0", "log.log_every=1")


def test_debug_config_learns(tmp_path: Path) -> None:
    options = ("train.max_train_steps=40", "train.checkpointing_steps=20", "log.sample_every=40", "log.log_every=10")
    run = run_train(tmp_path / "run", *options, flags=("--quiet", *VIDEO))
    lines = metrics(run)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"] and "clips_per_second" in lines[0]
    assert Image.open(run / "samples" / "step_0000040.png").size[0] > 4 * 64  # four clips, a strip of four frames each
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(run))
    assert type(pipe) is VideoPipeline and pipe.config.class_names == ["right", "left", "down", "up"]
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe("left", num_inference_steps=2).frames[0]) == 4
    assert "of video, 4 frames" in (resolve_pipeline(run) / "README.md").read_text()


def test_resumes_bitwise(tmp_path: Path) -> None:
    straight = run_train(tmp_path / "a", *SHORT, flags=("--quiet", *VIDEO))
    run_train(tmp_path / "b", *SHORT, "train.max_train_steps=2", flags=("--quiet", *VIDEO))
    resumed = run_train(tmp_path / "b", *SHORT, flags=("--quiet", *VIDEO))
    assert largest_difference(weights(straight, 4), weights(resumed, 4)) == 0.0


def test_captions_of_clips(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    options = (
        "model.args.num_classes=0", "train.class_dropout_prob=0", "model.args.context_dim=16", "data.caption=class",
        "text.args.num_layers=1", "text.args.num_heads=2", "text.max_length=4", "text.dropout_prob=0.1",
        "log.sample_every=4",
    )  # fmt: skip
    run = run_train(tmp_path / "run", *SHORT, *options, flags=("--quiet", *VIDEO))
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(run))
    assert type(pipe) is VideoPipeline
    pipe.set_progress_bar_config(disable=True)
    clips = pipe(prompt=["up", "down"], guidance_scale=2.0, num_inference_steps=2, output_type="pt").frames
    assert clips.shape == (2, 4, 1, 16, 16)
    assert (run / "samples" / "step_0000004.png").is_file()


def test_latents_of_frames(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    options = (
        f"data.vae={tmp_path / 'vae'}", "data.channels=3", "model.args.sample_size=8", "model.args.in_channels=4",
        "model.args.patch_size=2", "log.sample_every=4",
    )  # fmt: skip
    run = run_train(tmp_path / "run", *SHORT, *options, flags=("--quiet", *VIDEO))
    grid = np.asarray(Image.open(run / "samples" / "step_0000004.png"))
    assert grid.ndim == 3 and grid.std() > 1
    data = DataConfig(name="moving_digits", channels=3, num_frames=4, frame_stride=2)
    with pytest.raises(ValueError, match="clips are stored as samples"):
        encode_dataset(data, str(tmp_path / "vae"), tmp_path / "x", quiet=True)
    stored = encode_dataset(data, str(tmp_path / "vae"), tmp_path / "stored", form="sample", batch_size=256, quiet=True)
    latents = build_dataset(name="latents", path=str(stored))
    assert latents.item_shape == (4, 4, 8, 8) and latents.num_classes == 4
    with torch.no_grad():
        vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
        third = build_dataset(data)[7]["pixel_values"][2:3]
        expected = vae.encode(third).latent_dist.mean[0] * vae.config.scaling_factor
    torch.testing.assert_close(latents[7]["latents"][2], expected, rtol=1e-2, atol=1e-2)
