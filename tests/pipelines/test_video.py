"""Clips: same clip in any batch, classes and texts, other lengths, VAE, outputs, saved folders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from genssm.pipelines import VideoPipeline
from genssm.training.objectives import FlowObjective
from tests.pipelines.conftest import make_denoiser
from tests.pipelines.test_text_to_image import make_pipe as make_text_pipe

FACTORISED = {"num_frames": 4, "video_pattern": "sst", "num_layers": 3, "temporal_pos_embed": True}
CALL = {"num_inference_steps": 3, "output_type": "latent"}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers


def quiet(pipe: VideoPipeline) -> VideoPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipe(**changes: object) -> VideoPipeline:
    return quiet(VideoPipeline(make_denoiser(**{**FACTORISED, **changes}), FlowObjective().scheduler()))


def make_text_video() -> VideoPipeline:
    text = make_text_pipe()
    denoiser = make_denoiser(**FACTORISED, num_classes=0, context_dim=16)
    return quiet(VideoPipeline(denoiser, text.scheduler, text.text_encoder, text.tokenizer))


def generators(rows: range) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in rows]


@pytest.mark.parametrize(
    "changes", [{}, {"video_pattern": None}, {"scan": "raster_bidirectional", "video_pattern": None}], ids=str
)
def test_clips_do_not_depend_on_the_batch(changes: dict) -> None:
    pipe = make_pipe(**changes)
    batch = pipe([0, 2, 1], generator=generators(range(3)), guidance_scale=2.0, **CALL).frames
    assert batch.shape == (3, 4, 1, 8, 8) and torch.isfinite(batch).all()
    for i, label in enumerate([0, 2, 1]):
        one = pipe(label, generator=generators(range(i, i + 1)), guidance_scale=2.0, **CALL).frames
        assert torch.equal(one[0], batch[i])


def test_text_clips() -> None:
    pipe = make_text_video()
    texts = ["a red circle", "a blue square"]
    clips = pipe(prompt=texts, negative_prompt="a circle", guidance_scale=2.0, num_videos=2,
                 generator=generators(range(4)), **CALL).frames  # fmt: skip
    one = pipe(prompt=texts[1], negative_prompt="a circle", guidance_scale=2.0, generator=generators(range(2, 3)),
               **CALL).frames  # fmt: skip
    assert clips.shape == (4, 4, 1, 8, 8) and torch.equal(clips[2], one[0])
    noise = torch.randn(1, 4, 1, 8, 8)
    a, b = (pipe(prompt=text, latents=noise, **CALL).frames for text in texts)
    assert not torch.allclose(a, b, atol=1e-4)


def test_frames_and_sizes_beyond_the_native_ones() -> None:
    clips = make_pipe()(1, num_frames=6, height=12, width=10, num_inference_steps=2).frames
    assert len(clips) == 1 and len(clips[0]) == 6 and clips[0][0].size == (10, 12)


def test_output_types(kl: AutoencoderKL) -> None:
    pipe = make_pipe()
    found = {kind: pipe([0, 1], generator=generators(range(2)), num_inference_steps=2, output_type=kind).frames
             for kind in ("pil", "np", "pt", "latent")}  # fmt: skip
    assert found["pt"].shape == found["latent"].shape == (2, 4, 1, 8, 8) and found["np"].shape == (2, 4, 8, 8, 1)
    torch.testing.assert_close(found["pt"], (found["latent"] / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(found["np"][..., 0], found["pt"][:, :, 0].numpy())
    assert isinstance(found["pil"][1][3], Image.Image)
    np.testing.assert_array_equal(np.asarray(found["pil"][1][3]), (found["np"][1, 3, ..., 0] * 255).round())
    latent = quiet(VideoPipeline(make_denoiser(**FACTORISED, sample_size=4, in_channels=4), FlowObjective().scheduler(),
                                 vae=kl))  # fmt: skip
    assert latent(0, num_inference_steps=1).frames[0][0].size == (8, 8)


@pytest.mark.parametrize("make", [make_pipe, make_text_video])
def test_saved_folder(make: Callable[[], VideoPipeline], tmp_path: Path) -> None:
    pipe = make()
    call = {"latents": torch.ones(1, 4, 1, 8, 8), **CALL}
    call |= {"prompt": "a circle"} if make is make_text_video else {"class_labels": 1}
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is VideoPipeline
    assert torch.equal(loaded(**call).frames, pipe(**call).frames)


def test_impossible_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="makes images, not videos"):
        VideoPipeline(make_denoiser(), FlowObjective().scheduler())
    pipe, text = make_pipe(), make_text_video()
    for call, message in (
        ({"prompt": "a"}, "reads no text"),
        ({"class_labels": 7}, "class label 7"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"latents": torch.zeros(1, 3, 1, 8, 8)}, r"expected \(1, 4, 1, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**call)
    with pytest.raises(ValueError, match="give prompt, not class_labels"):
        text(0, prompt="a")
    with pytest.raises(ValueError, match="got neither"):
        text()
