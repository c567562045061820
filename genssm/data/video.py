"""Clips as files: a folder of frames, an animated GIF, an array of frames, or a video file; read and written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from genssm.data.sources import EXTENSIONS

ARRAYS, ANIMATIONS, VIDEOS = (".npy",), (".gif",), (".mp4", ".avi", ".mov", ".mkv", ".webm")
CLIPS = (*ARRAYS, *ANIMATIONS, *VIDEOS)
FORMATS = {"gif": ".gif", "mp4": ".mp4", "npy": ".npy", "frames": ""}  # name -> suffix; frames are a folder


class Clip:
    """The frames of a clip, in order; ``clip[i]`` is a Pillow image.

    Args:
        path: a folder of images (in the order of their names), an ``.npy`` of uint8 (F, H, W, 3) or (F, H, W), a
            ``.gif``, or a video file, which needs the package av.

    Raises:
        ValueError: the file holds no frames, or is damaged.
        ImportError: a video file without the package av.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        suffix = path.suffix.lower()
        if path.is_dir():
            self.frames: Sequence[Any] = sorted(f for f in path.iterdir() if f.suffix.lower() in EXTENSIONS)
        elif suffix in ARRAYS:
            self.frames = self._open_array()
        elif suffix in ANIMATIONS:
            with Image.open(path) as animation:
                self.frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
        else:
            self.frames = _decode(path)
        if not len(self.frames):
            raise ValueError(f"{path} holds no frames")

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Image.Image:
        frame = self.frames[index]
        if isinstance(frame, Path):
            with Image.open(frame) as image:
                image.load()
                return image
        return frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))

    def _open_array(self) -> np.ndarray:
        array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] not in (1, 3)):
            raise ValueError(
                f"{self.path} is {array.dtype} {array.shape}; a clip is uint8 (F, H, W, 3), (F, H, W, 1) or (F, H, W)"
            )
        return array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ImportError("video files need the package av; pip install genssm[video]") from None
    return av


def _decode(path: Path) -> list[Image.Image]:
    """All frames of a video file."""
    av = _av()
    try:
        with av.open(str(path)) as container:
            return [frame.to_image() for frame in container.decode(video=0)]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"cannot read video {path}: {error}") from None


def write_clip(frames: Sequence[Image.Image], path: str | Path, fps: float = 8.0) -> Path:
    """Write a clip.

    Args:
        frames: Pillow images of one size.
        path: ``*.gif`` (loops), ``*.mp4`` (H.264), ``*.npy``, or a folder without suffix for ``000000.png``, ...
        fps: frames per second, of a GIF or MP4.

    Returns:
        ``path``.

    Raises:
        ValueError: no frames, another suffix, an fps of 0 or less, or an MP4 of odd size.
        ImportError: an MP4 without the package av.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if fps <= 0:
        raise ValueError(f"fps is {fps:g}; expected more than 0")
    if not frames:
        raise ValueError(f"no frames to write to {path}")
    if suffix not in ("", ".gif", ".mp4", ".npy"):
        raise ValueError(f"cannot write a clip as {path.name}; use .gif, .mp4, .npy or a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == "":
        path.mkdir(exist_ok=True)
        for i, frame in enumerate(frames):
            frame.save(path / f"{i:06d}.png")
    elif suffix == ".gif":
        frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)
    elif suffix == ".npy":
        with path.open("wb") as stream:
            np.save(stream, np.stack([np.asarray(frame) for frame in frames]))
    else:
        _encode(frames, path, fps)
    return path


def _encode(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    av = _av()
    width, height = frames[0].size
    if width % 2 or height % 2:
        raise ValueError(f"an MP4 has even sides, the frames are {width}x{height}; write a .gif or a folder")
    with av.open(str(path), mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=max(round(fps), 1))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
