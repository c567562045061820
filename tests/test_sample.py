"""sample.py: the same files from any batch size and number of processes, resuming, refusing, the record, the grid."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from genssm.data.video import Clip
from genssm.errors import cli
from genssm.pipelines import ClassConditionalImagePipeline, TextToImagePipeline, VideoPipeline
from genssm.schedulers import FlowSDEScheduler
from tests.pipelines.conftest import make_denoiser
from tests.pipelines.test_text_to_image import make_pipe as make_text_pipe

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., Path]
OPTIONS = ["--num-inference-steps", "3", "--guidance-scale", "2", "--seed", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with random steps and named classes."""
    path = tmp_path_factory.mktemp("pipeline")
    ClassConditionalImagePipeline(make_denoiser(), FlowSDEScheduler(), class_names=["a", "b", "c"]).save_pretrained(
        path
    )
    return path


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run sample.py in this process; returns the folder of images."""

    def call(*options: object, out: str = "out", model: Path = folder) -> Path:
        target = tmp_path / out
        arguments = ["sample.py", "--model", str(model), "--out", str(target), *OPTIONS, *map(str, options)]
        monkeypatch.setattr(sys, "argv", arguments)
        sample.main()
        return target

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def record(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


def test_files_are_the_images_of_their_index(run: Run, folder: Path) -> None:
    out = run("--num-images", 5)
    assert list(contents(out)) == [f"{i:06d}.png" for i in range(5)]
    pipe = ClassConditionalImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(5 + 4)]
    image = pipe(4 % 3, generator=generator, num_inference_steps=3, guidance_scale=2.0).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "000004.png")), np.asarray(image))


def test_batch_size_and_processes_do_not_matter(run: Run, folder: Path, tmp_path: Path) -> None:
    expected = contents(run("--num-images", 7))
    for size in (1, 4):
        assert contents(run("--num-images", 7, "--batch-size", size, out=f"by_{size}")) == expected
    two = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sample.py"]
    arguments = ["--model", str(folder), "--out", str(two), *OPTIONS, "--num-images", "7"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    subprocess.run([*launch, *arguments], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert record(two)["processes"] == 2
    assert contents(two) == expected


def test_the_record_says_how(run: Run, folder: Path) -> None:
    found = record(run("--class-labels", "b", 2, "--scheduler", "heun", "--guidance-interval", 0.1, 0.9))
    settings = found["settings"]
    assert found["num_images"] == 2
    assert settings["class_labels"] == [1, 2]
    assert settings["seed"] == 5
    assert settings["scheduler"]["_class_name"] == "FlowMatchHeunDiscreteScheduler"
    assert settings["guidance_interval"] == [0.1, 0.9]
    assert settings["backends"]["selective_scan"] in ("chunked", "compiled", "reference")
    assert len(settings["pipeline_sha256"]) == 64
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert "--guidance-interval" in found["command"]


def test_a_broken_off_run_goes_on(run: Run, capsys: pytest.CaptureFixture) -> None:
    out = run("--num-images", 6)
    expected, kept = contents(out), (out / "000003.png").stat().st_mtime_ns
    for name in ("000001.png", "000005.png"):
        (out / name).unlink()
    (out / ".partial-000005.png").write_bytes(b"half")
    run("--num-images", 6)
    assert "2 new" in capsys.readouterr().out
    assert contents(out) == expected
    assert (out / "000003.png").stat().st_mtime_ns == kept
    more = contents(run("--num-images", 8))
    assert {name: more[name] for name in expected} == expected
    assert len(more) == 8


def test_other_settings_need_overwrite(run: Run, capsys: pytest.CaptureFixture) -> None:
    out = run("--num-images", 4)
    before = contents(out)
    with pytest.raises(SystemExit) as stopped:
        cli(lambda: run("--num-images", 2, "--num-inference-steps", 2) and None)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "error: " in error and "4 images of other settings (num_inference_steps)" in error
    assert "Traceback" not in error
    assert contents(out) == before
    replaced = contents(run("--num-images", 2, "--num-inference-steps", 2, "--overwrite"))
    assert len(replaced) == 2
    assert replaced["000000.png"] != before["000000.png"]


def test_images_of_unknown_origin_are_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"no samples\.json"):
        run()
    assert (tmp_path / "out" / "000000.png").read_bytes() == b"mine"


def test_a_run_means_its_newest_checkpoint(run: Run, tmp_path: Path) -> None:
    for step, seed in ((10, 0), (20, 1)):
        torch.manual_seed(seed)
        pipe = ClassConditionalImagePipeline(make_denoiser(num_classes=0), FlowSDEScheduler(diffusion_norm=1.0 + seed))
        pipe.save_pretrained(tmp_path / f"run/checkpoints/step_{step:07d}/pipeline")
    out = run("--guidance-scale", 1, "--batch-size", 20, model=tmp_path / "run")
    found = record(out)
    assert found["pipeline"].endswith("step_0000020/pipeline")
    assert found["settings"]["scheduler"]["diffusion_norm"] == 2.0
    assert len(contents(out)) == 16  # without classes


def test_grid(run: Run, tmp_path: Path) -> None:
    run("--num-images", 6, "--grid", tmp_path / "deep/grid.png", "--upscale", 3)
    grid = Image.open(tmp_path / "deep/grid.png")
    assert grid.size == (3 * 26 + 2, 2 * 26 + 2)  # a column for each class
    first = np.asarray(Image.open(tmp_path / "out/000000.png"))
    np.testing.assert_array_equal(np.asarray(grid)[2:26:3, 2:26:3], first)


def test_ode_solver_and_size(run: Run) -> None:
    out = run("--ode-solver", "dopri5", "--ode-rtol", 1e-2, "--height", 12, "--width", 10)
    assert Image.open(out / "000002.png").size == (10, 12)
    assert record(out)["settings"]["ode_solver"] == {"method": "dopri5", "rtol": 1e-2, "atol": 1e-6}
    assert len(contents(out)) == 3  # one for each class


@pytest.mark.parametrize("option", ["--num-images", "--batch-size", "--num-inference-steps", "--upscale"])
def test_numbers_are_positive(run: Run, option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(option, 0)
    assert "'0' is not a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fps", 0), "--fps: 0 frames per second; expected more than 0"),
        (("--ode-solver", "dopri5", "--ode-rtol", -1), "tolerances are -1 and 1e-06; expected more than 0"),
        (("--ode-rtol", 0.1), "tolerances are for the adaptive ODE solvers: dopri5"),
        (("--ode-solver", "rk4", "--ode-atol", 0.1), "tolerances are for the adaptive ODE solvers: dopri5"),
    ],
)
def test_options_that_mean_nothing(run: Run, options: tuple, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(*options)
    assert message in capsys.readouterr().err


def test_options_of_clips_are_refused_for_images(run: Run) -> None:
    with pytest.raises(ValueError, match=r"--video-format, --fps: for clips, but the model in .* makes images"):
        run("--video-format", "mp4", "--fps", 12)


def test_mistakes_are_explained(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no pipeline folder"):
        run(model=tmp_path)
    with pytest.raises(ValueError, match="no class named 'd'; the names are a, b, c"):
        run("--class-labels", "d")
    with pytest.raises(ValueError, match="'ddpm' cannot sample a flow model"):
        run("--scheduler", "ddpm")


@pytest.mark.parametrize("device", ["cude", "meta", "cuda:99"])
def test_the_device_must_be_there(run: Run, device: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        run("--device", device)
    assert end.value.code == 2
    assert f"'{device}' is no device of this machine, which has cpu" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["weights", "part", "index"])
def test_a_damaged_folder_is_the_users_news(run: Run, folder: Path, damage: str, tmp_path: Path) -> None:
    """What a broken copy leaves behind."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "denoiser" / "diffusion_pytorch_model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "part":
        shutil.rmtree(copy / "denoiser")
    else:
        (copy / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"the pipeline in .*copy is damaged or incomplete: "):
        run(model=copy)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image pipeline."""
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("text")
    make_text_pipe().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of clips of four frames, three classes."""
    path = tmp_path_factory.mktemp("video")
    denoiser = make_denoiser(num_frames=4, video_pattern="st", in_channels=3)
    VideoPipeline(denoiser, FlowSDEScheduler(), class_names=["a", "b", "c"]).save_pretrained(path)
    return path


def test_prompts(run: Run, text_folder: Path) -> None:
    texts = ["a red circle", "a blue square"]
    out = run("--prompt", *texts, "--negative-prompt", "a circle", "--num-images", 3, model=text_folder)
    settings = record(out)["settings"]
    assert settings["prompt"] == texts and settings["negative_prompt"] == "a circle"
    pipe = TextToImagePipeline.from_pretrained(text_folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "a circle"}
    image = pipe(texts[0], generator=[torch.Generator().manual_seed(5 + 2)], **call).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "000002.png")), np.asarray(image))
    with pytest.raises(FileExistsError, match="of other settings"):
        run("--prompt", "a circle", model=text_folder)


@pytest.mark.parametrize("kind", ["gif", "frames", "npy", "mp4"])
def test_clips(run: Run, video_folder: Path, kind: str, tmp_path: Path) -> None:
    if kind == "mp4":
        pytest.importorskip("av")
    call = ("--class-labels", "a", "c", "--video-format", kind, "--num-images", 3)
    out = run(*call, "--grid", tmp_path / "grid.png", model=video_folder)
    suffix = {"frames": ""}.get(kind, f".{kind}")
    names = [f"{i:06d}{suffix}" for i in range(3)]
    assert sorted(path.name for path in out.iterdir() if path.name != "samples.json") == names
    clip = Clip(out / names[1])
    assert len(clip) == 4 and clip[0].size == (8, 8)
    assert Image.open(tmp_path / "grid.png").size == (4 * 66 + 2, 3 * 66 + 2)
    if kind == "frames":
        pipe = VideoPipeline.from_pretrained(video_folder)
        pipe.set_progress_bar_config(disable=True)
        generator = [torch.Generator().manual_seed(5 + 1)]
        expected = pipe("c", generator=generator, num_inference_steps=3, guidance_scale=2.0).frames[0]
        np.testing.assert_array_equal(np.asarray(clip[3]), np.asarray(expected[3]))
        before = (out / names[0]).stat().st_mtime_ns
        shutil.rmtree(out / names[2])
        run(*call, model=video_folder)  # goes on with what is missing
        assert (out / names[2]).is_dir() and (out / names[0]).stat().st_mtime_ns == before
        run("--class-labels", "b", "--video-format", kind, "--overwrite", model=video_folder)
        assert [path.name for path in out.iterdir() if path.is_dir()] == ["000000"]


def test_what_does_not_fit_the_model_is_refused(run: Run, folder: Path, text_folder: Path) -> None:
    with pytest.raises(ValueError, match="reads no text; leave --prompt"):
        run("--prompt", "a")
    for options in ((), ("--prompt", "a", "--class-labels", "1")):
        with pytest.raises(ValueError, match="give --prompt and no --class-labels"):
            run(*options, model=text_folder)
