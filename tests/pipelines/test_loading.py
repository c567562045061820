"""Saved pipelines: what the index says, and loading in a process that has imported nothing yet."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

import genssm
from genssm import registration
from genssm.models import ZigMa
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.schedulers import FlowODEScheduler, FlowSDEScheduler
from tests.pipelines.conftest import make_denoiser

MakePipe = Callable[..., ClassConditionalImagePipeline]
ROOT = Path(__file__).resolve().parents[2]
RUN = """
pipe.set_progress_bar_config(disable=True)
assert type(pipe).__name__ == "ClassConditionalImagePipeline", type(pipe)
assert pipe.config.class_names == ["a", "b", "c"]
image = pipe("b", generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="latent").images
torch.save(image, sys.argv[2])
"""


def test_index_names_the_library(make_pipe: MakePipe, tmp_path: Path) -> None:
    for scheduler in (FlowSDEScheduler(), FlowODEScheduler()):
        make_pipe(scheduler).save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == "ClassConditionalImagePipeline"
        assert index["denoiser"] == ["genssm", "ZigMa"]
        assert index["scheduler"] == ["genssm", type(scheduler).__name__]
        assert index["vae"] == [None, None]
        assert type(DiffusionPipeline.from_pretrained(tmp_path).scheduler) is type(scheduler)


@pytest.mark.parametrize(
    "load",
    [
        "import genssm; pipe = genssm.ClassConditionalImagePipeline.from_pretrained(sys.argv[1])",
        "import genssm.pipelines; from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])",
    ],
    ids=["genssm", "diffusers"],
)
def test_fresh_process(make_pipe: MakePipe, tmp_path: Path, load: str) -> None:
    pipe = make_pipe(FlowSDEScheduler(path="gvp"), class_names=["a", "b", "c"])
    pipe.save_pretrained(tmp_path / "pipe")
    code = f"import sys, torch\n{load}\n{RUN}"
    arguments = [sys.executable, "-c", code, str(tmp_path / "pipe"), str(tmp_path / "image.pt")]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    expected = pipe(1, generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="latent").images
    assert torch.equal(torch.load(tmp_path / "image.pt"), expected)


def test_vae_travels_along(make_pipe: MakePipe, kl: AutoencoderKL, tmp_path: Path) -> None:
    pipe = make_pipe(model=make_denoiser(sample_size=4, in_channels=4), vae=kl)
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    call = {"latents": torch.ones(1, 4, 4, 4), "num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(loaded(0, **call).images, pipe(0, **call).images)
    without = ClassConditionalImagePipeline.from_pretrained(tmp_path, vae=None)
    assert without.vae is None


def test_from_pipe_keeps_the_components(make_pipe: MakePipe) -> None:
    pipe = make_pipe(class_names=["a", "b", "c"])
    again = ClassConditionalImagePipeline.from_pipe(pipe)
    assert again.denoiser is pipe.denoiser
    assert isinstance(again.denoiser, ZigMa)
    assert again.config.class_names == ["a", "b", "c"]


def test_registration_is_repeatable_and_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines import pipeline_loading_utils

    assert registration.register_library()
    assert registration.register_library()
    known = {"ModelMixin", "SchedulerMixin", "CaptionTokenizer"}
    assert set(pipeline_loading_utils.LOADABLE_CLASSES["genssm"]) == known
    for name in ("ModelMixin", "SchedulerMixin"):
        assert getattr(genssm, name) is getattr(diffusers, name)
    assert diffusers.ClassConditionalImagePipeline is ClassConditionalImagePipeline
    monkeypatch.delattr(pipeline_loading_utils, "LOADABLE_CLASSES")
    assert not registration.register_library()
