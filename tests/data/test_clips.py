"""Clips: every kind of file gives the same frames; what a training item cuts out of a clip."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.data import CachedImages, build_dataset
from genssm.data.loading import Shares, Stream, training_batches
from genssm.data.video import Clip, write_clip

FRAMES = 6


def frames(seed: int = 0, count: int = FRAMES, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    """Smooth colours that move, so that compressed files stay near."""
    y, x = np.mgrid[: size[0], : size[1]] / 16
    waves = [np.stack([128 + 100 * np.sin(x * 3 + i / 2 + c + seed) * np.cos(y * 2 + c) for c in range(3)], -1)
             for i in range(count)]  # fmt: skip
    return [Image.fromarray(wave.astype(np.uint8)) for wave in waves]


@pytest.mark.parametrize("name", ["folder", "a.npy", "a.gif", "a.mp4"])
def test_written_clips_are_read_back(name: str, tmp_path: Path) -> None:
    if name == "a.mp4":
        pytest.importorskip("av")
    clip = Clip(write_clip(frames(), tmp_path / name))
    assert len(clip) == FRAMES
    far = {"a.gif": 12, "a.mp4": 12}.get(name, 0)  # 256 colours; a lossy codec
    for i, frame in enumerate(frames()):
        difference = np.abs(np.asarray(clip[i].convert("RGB"), int) - np.asarray(frame, int))
        assert difference.mean() <= far, i
    assert np.abs(np.asarray(clip[0].convert("RGB"), int) - np.asarray(frames()[3], int)).mean() > 20


def make_folder(root: Path, captions: bool = False) -> dict:
    for i, (name, kind) in enumerate([("jump/a", "a"), ("jump/b.npy", "b"), ("run/c.gif", "c")]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_clip(frames(i), root / name)
        if captions:
            (root / name).with_suffix(".txt").write_text(f"clip {kind}\n")
    return {"name": "clips", "path": str(root), "num_frames": 3}


def test_folder_of_clips(tmp_path: Path) -> None:
    dataset = build_dataset(**make_folder(tmp_path, captions=True), caption="sidecar")
    assert len(dataset) == 3 and dataset.item_shape == (3, 3, 16, 16)
    assert dataset.class_names == ("jump", "run") and dataset.labels.tolist() == [0, 0, 1]
    item = dataset[1]
    assert item["text"] == "clip b" and item["class_labels"] == 0
    middle = np.stack([np.asarray(f) for f in frames(1)[1:4]])  # three of six frames, from the middle
    assert np.array_equal(((item["pixel_values"] + 1) * 127.5).round().numpy(), middle.transpose(0, 3, 1, 2))


def test_cuts_strides_and_mirrors(tmp_path: Path) -> None:
    arguments = make_folder(tmp_path) | {"num_frames": 2, "frame_stride": 2, "flip": True}
    dataset = build_dataset(**arguments)
    stored = np.stack([np.asarray(f) for f in frames(1)]).transpose(0, 3, 1, 2)
    found = set()
    for key in range(64):
        pixels = ((dataset.item(1, key)["pixel_values"] + 1) * 127.5).round().numpy()
        pixels = pixels[..., ::-1] if key & 1 else pixels  # all frames alike
        starts = [s for s in range(4) if np.array_equal(pixels, stored[[s, s + 2]])]
        assert len(starts) == 1
        found |= set(starts)
    assert found == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="the beginning of longer clips is random"):
        CachedImages(dataset)
    fixed = build_dataset(**arguments | {"num_frames": 6, "frame_stride": 1})
    kept = CachedImages(fixed)
    for a, b in zip(
        *(training_batches(d, Stream(3, 1), Shares(3), first=0, last=4) for d in (fixed, kept)), strict=True
    ):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert a["pixel_values"].shape == (3, 6, 3, 16, 16)


def test_metadata_names_clips_and_splits(tmp_path: Path) -> None:
    make_folder(tmp_path)
    lines = ["file_name,text,split", "jump/a,someone jumps,train", "run/c.gif,someone runs,test"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    call = {"name": "clips", "path": str(tmp_path), "num_frames": 4, "caption": "text", "resolution": 8}
    assert build_dataset(**call)[0]["text"] == "someone jumps"
    test = build_dataset(**call, split="test")
    assert len(test) == 1 and test[0]["text"] == "someone runs" and test.item_shape == (4, 3, 8, 8)


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no clips in"):
        build_dataset(name="clips", path=str(tmp_path / "empty"))
    arguments = make_folder(tmp_path)
    with pytest.raises(ValueError, match=r"image .*jump/a: the clip has 6 frames; 9 with data.frame_stride=1 need 9"):
        build_dataset(**arguments | {"num_frames": 9})
    with pytest.raises(ValueError, match=r"data\.num_frames=0"):
        build_dataset(**arguments | {"num_frames": 0})
    with pytest.raises(ValueError, match=r"data\.num_frames means nothing to"):
        build_dataset(name="digits", num_frames=3)
    np.save(tmp_path / "jump" / "b.npy", np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match=r"b\.npy is float32 \(4, 4\)"):
        build_dataset(**arguments)[1]
    (tmp_path / "run" / "c.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"cannot read image .*c\.gif"):
        build_dataset(**arguments)[2]
    with pytest.raises(ValueError, match=r"cannot write a clip as a\.webp"):
        write_clip(frames(), tmp_path / "a.webp")
    with pytest.raises(ValueError, match="fps is 0; expected more than 0"):
        write_clip(frames(), tmp_path / "a.gif", 0)


def test_video_of_odd_size_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="an MP4 has even sides, the frames are 8x7"):
        write_clip(frames(size=(7, 8)), tmp_path / "odd.mp4")


def test_damaged_video_is_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_bytes(b"no video" * 50)
    with pytest.raises(ValueError, match=r"cannot read video .*a\.mp4"):
        Clip(tmp_path / "a.mp4")
