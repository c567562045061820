"""Motions from the command line: files that open again, long motions, given beginnings, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from genssm import motion_samples
from genssm.data.motion.bvh import read_bvh
from tests.pipelines.test_text_to_motion import CAPTIONS, action_pipeline, frame_pipeline

QUICK = ["--num-inference-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of frames that reads text."""
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    frame_pipeline().save_pretrained(folder)
    return folder


def draw(model: Path, *options: str) -> None:
    motion_samples.main(["--model", str(model), *QUICK, *options])


def test_knows_a_model_of_motion(model: Path) -> None:
    assert motion_samples.makes_motion(["--prompt", "x", "--model", str(model)])
    assert not motion_samples.makes_motion(["--help"])


def test_bvh_holds_the_same_motion(model: Path, tmp_path: Path, capsys) -> None:
    for name in ("walk.bvh", "walk.npy"):
        draw(model, "--prompt", CAPTIONS[0], "--seconds", "1", "--out", str(tmp_path / name))
    joints = np.load(tmp_path / "walk.npy")
    assert joints.shape == (20, 22, 3) and np.isfinite(joints).all()
    found = read_bvh((tmp_path / "walk.bvh").read_text()).recording()
    assert found.fps == pytest.approx(20) and len(found.positions) == 20
    root = found.positions[:, 0].numpy() / 100  # centimetres
    assert np.abs(root - joints[:, 0]).max() < 1e-4
    record = json.loads((tmp_path / "walk.json").read_text())
    assert record["seconds"] == [1.0] and record["asked"] == [CAPTIONS[0]] and record["guidance_scale"] == 7.5
    assert "1.0 seconds of movement" in capsys.readouterr().out


def test_a_motion_has_its_own_seed(model: Path, tmp_path: Path) -> None:
    options = ["--seconds", "0.5", "--format", "npy"]
    draw(model, "--prompt", *CAPTIONS[:2], *options, "--out", str(tmp_path / "both"))
    draw(model, "--prompt", CAPTIONS[1], "--seed", "1", "--seconds", "0.5", "--out", str(tmp_path / "one.npy"))
    assert np.array_equal(np.load(tmp_path / "both" / "000001.npy"), np.load(tmp_path / "one.npy"))
    with pytest.raises(FileExistsError, match="--overwrite"):
        draw(model, "--prompt", *CAPTIONS[:2], *options, "--out", str(tmp_path / "both"))


def test_long_motion_says_how_smooth_it_is(model: Path, tmp_path: Path, capsys) -> None:
    options = ["--long", "--seconds", "1", "--transition-seconds", "0.4"]
    draw(model, "--prompt", *CAPTIONS[:3], *options, "--out", str(tmp_path / "long.npy"))
    assert np.load(tmp_path / "long.npy").shape == (60, 22, 3)
    printed = capsys.readouterr().out
    assert "transition at 1.0 s: peak jerk" in printed and "transition at 2.0 s" in printed


def test_a_motion_goes_on_from_a_file(model: Path, tmp_path: Path) -> None:
    draw(model, "--prompt", CAPTIONS[0], "--seconds", "1", "--out", str(tmp_path / "first.npy"))
    joints = torch.from_numpy(np.load(tmp_path / "first.npy"))
    begin = ["--begin", str(tmp_path / "first.npy"), "--begin-seconds", "0.5"]
    draw(model, "--prompt", CAPTIONS[1], "--seconds", "1", *begin, "--out", str(tmp_path / "next.npy"))
    made = torch.from_numpy(np.load(tmp_path / "next.npy"))
    given = motion_samples.read_frames(tmp_path / "first.npy", frame_pipeline().skeleton, 0.5)
    assert given.shape == (10, 263)
    # Root-relative: heights and the distances within the body are those given, on every given frame.
    torch.testing.assert_close(made[:10, 0, 1], given[:, 3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made[10:, 0, 1], joints[10:, 0, 1], atol=1e-4)


def test_a_motion_between_two_files(model: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        draw(model, "--prompt", CAPTIONS[0], "--seconds", "1", "--seed", seed, "--out", str(tmp_path / f"{seed}.npy"))
    given = ["--begin", str(tmp_path / "0.npy"), "--begin-seconds", "0.25"]
    given += ["--end", str(tmp_path / "1.npy"), "--end-seconds", "0.25"]
    draw(model, "--prompt", CAPTIONS[1], "--seconds", "1", *given, "--out", str(tmp_path / "between.npy"))
    made, skeleton = torch.from_numpy(np.load(tmp_path / "between.npy")), frame_pipeline().skeleton
    first = motion_samples.read_frames(tmp_path / "0.npy", skeleton, 0.25)
    last = motion_samples.read_frames(tmp_path / "1.npy", skeleton, 0.25, first=True)
    torch.testing.assert_close(made[:5, 0, 1], first[:, 3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made[-5:, 0, 1], last[:, 3], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="more than the 8 of the motion"):
        draw(model, "--prompt", CAPTIONS[1], "--seconds", "0.4", *given, "--out", str(tmp_path / "short.npy"))
    broken = np.load(tmp_path / "0.npy")
    broken[3] = np.nan
    np.save(tmp_path / "nan.npy", broken)
    with pytest.raises(ValueError, match=r"nan\.npy: joints are not finite in frame 3"):
        draw(model, "--prompt", "a", "--begin", str(tmp_path / "nan.npy"), "--out", str(tmp_path / "x.bvh"))
    with pytest.raises(ValueError, match="--end needs motions of one length"):
        draw(model, "--prompt", *CAPTIONS[:2], "--seconds", "1", "2", *given, "--out", str(tmp_path / "two"))


def test_a_prompt_for_a_model_without_text(tmp_path: Path) -> None:
    action_pipeline().save_pretrained(tmp_path / "actions")
    with pytest.raises(ValueError, match="reads no text; name actions with --class-labels: walk, run, jump"):
        draw(tmp_path / "actions", "--prompt", "a person walks", "--out", str(tmp_path / "x.bvh"))
    draw(tmp_path / "actions", "--class-labels", "jump", "--seconds", "0.5", "--out", str(tmp_path / "x.bvh"))
    assert (tmp_path / "x.bvh").is_file()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--class-labels", "walk", "--out", "x.bvh"], ValueError, "reads text: give --prompt"),
        (["--prompt", "a", "--seconds", "-1", "--out", "x.bvh"], ValueError, "motion of -20 frames"),
        (["--prompt", "a", "--end-seconds", "1", "--out", "x.bvh"], SystemExit, "2"),
        (["--prompt", "a", "b", "--out", "x.bvh"], ValueError, "is one file and 2 motions"),
        (["--class-labels", "walk", "--prompt", "a", "--out", "x.bvh"], ValueError, "reads text"),
        (["--prompt", "a", "--begin", "missing.bvh", "--out", "x.bvh"], FileNotFoundError, "no motion at"),
        (["--prompt", "a", "--begin-seconds", "1", "--out", "x.bvh"], SystemExit, "2"),
        (["--prompt", "a", "--out", "x.docx"], ValueError, r"motions are written as \.bvh"),
        (["--prompt", "a", "--long", "--num-motions", "2", "--out", "x.bvh"], SystemExit, "2"),
    ],
)
def test_what_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], error: type, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        draw(model, *options)
    assert not list(tmp_path.iterdir())
