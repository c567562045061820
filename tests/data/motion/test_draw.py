"""Pictures and files of motion: sizes, what is visible, frames, endings."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.data.motion.draw import (
    BEHIND,
    FLOOR,
    LEFT,
    PATH,
    RIGHT,
    View,
    animation_frames,
    contact_sheet,
    draw_frame,
    write_animation,
)
from genssm.data.motion.export import save_motion
from genssm.motion import T2M

pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning")


def share(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    """Part of the pixels that have nearly this colour."""
    distance = np.abs(np.asarray(picture, np.int16) - np.array(colour)).max(-1)
    return float((distance < 12).mean())


def test_a_panel_shows_body_floor_and_path(joints: torch.Tensor) -> None:
    picture = draw_frame(joints, T2M, 15)
    assert picture.size == (256, 256)
    assert share(picture, FLOOR) > 0.1
    for colour in (LEFT, RIGHT, PATH, BEHIND):
        assert share(picture, colour) > 0.0005, colour
    assert share(draw_frame(joints, T2M, 0), BEHIND) == 0, "nothing is behind the first frame"


def test_left_and_right_are_where_they_belong(joints: torch.Tensor) -> None:
    """Seen from the front, the body's left is on the picture's right."""
    placed = joints - joints[:1, :1] * torch.tensor([1.0, 0, 1.0])
    picture = np.asarray(draw_frame(placed, T2M, 0, View(azimuth=0)), np.int16)
    columns = [np.argwhere(np.abs(picture - np.array(c)).max(-1) < 12)[:, 1].mean() for c in (LEFT, RIGHT)]
    assert columns[0] > columns[1] + 20


def test_contact_sheet(joints: torch.Tensor) -> None:
    sheet = contact_sheet([joints, joints[:7]], T2M, ["a walk", "a caption that is much too long " * 20], columns=5)
    assert sheet.size == (5 * 192, 2 * 192)
    panels = [np.asarray(sheet.crop((192 * i, 60, 192 * (i + 1), 192))) for i in range(5)]
    assert not np.array_equal(panels[0], panels[4])


def test_animation_holds_the_last_frame_of_short_clips(joints: torch.Tensor) -> None:
    frames = list(animation_frames([joints[:6], joints[:3]], T2M, view=View(size=96)))
    assert len(frames) == 6 and frames[0].size == (192, 96)
    right = [np.asarray(frame.crop((96, 0, 192, 96))) for frame in frames]
    assert np.array_equal(right[2], right[5]) and not np.array_equal(right[1], right[2])


def test_files(joints: torch.Tensor, tmp_path: Path) -> None:
    save_motion(tmp_path / "deep" / "a.npy", joints, T2M)
    np.testing.assert_array_equal(np.load(tmp_path / "deep" / "a.npy"), joints.numpy())
    save_motion(tmp_path / "a.bvh", joints, T2M)
    assert (tmp_path / "a.bvh").read_text().startswith("HIERARCHY\nROOT pelvis")
    save_motion(tmp_path / "a.png", joints, T2M, title="a walk")
    assert Image.open(tmp_path / "a.png").size == (8 * 192, 192)
    save_motion(tmp_path / "a.gif", joints[:8], T2M)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 8 and picture.info["duration"] == 50
    with pytest.raises(ValueError, match=r"\.fbx"):
        save_motion(tmp_path / "a.fbx", joints, T2M)


def test_mp4(joints: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("ffmpeg"):
        write_animation(tmp_path / "a.mp4", [joints[:5]], T2M)
        assert (tmp_path / "a.mp4").stat().st_size > 1000
    program = tmp_path / "bin" / "ffmpeg"  # one that keeps the raw frames that it is given
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor last; do :; done\nexec cat > "$last"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    write_animation(tmp_path / "raw.mp4", [joints[:5]], T2M, view=View(size=65))
    raw = np.frombuffer((tmp_path / "raw.mp4").read_bytes(), np.uint8).reshape(5, 64, 64, 3)
    expected = next(animation_frames([joints[:5]], T2M, view=View(size=65)))
    np.testing.assert_array_equal(raw[0], np.asarray(expected)[:64, :64])
    program.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(ValueError, match="could not write"):
        write_animation(tmp_path / "c.mp4", [joints], T2M)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ffmpeg"):
        write_animation(tmp_path / "b.mp4", [joints[:5]], T2M)


def test_what_cannot_be_drawn(joints: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="2 clips and 1 titles"):
        contact_sheet([joints, joints], T2M, ["one"])
    with pytest.raises(ValueError, match="0 clips"):
        contact_sheet([], T2M)
    joints[3, 0] = torch.inf
    with pytest.raises(ValueError, match="frame 3"):
        draw_frame(joints, T2M, 0)
