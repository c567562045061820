"""Data sets of clips: ``{"pixel_values": float32 (F, C, H, W) in -1..1, "class_labels": int, "text": str}``."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from genssm.data.images import ImageDataset
from genssm.data.sources import EXTENSIONS, Source, choose_label, class_labels, digits, open_folder, read_captions
from genssm.data.transforms import ImageTransform
from genssm.data.video import CLIPS, Clip
from genssm.training.seeding import derive, hash_integers

WAYS = ("right", "left", "down", "up")
_CUT = derive(0, "clip")


def clips(path: str | None, split: str, label: str | None, download: bool, caption: str | None = None) -> Source:
    """Clips in a folder: sub-folders of frames, ``.npy``, ``.gif`` and video files, with or without class folders.

    Args:
        path: the folder; a sub-folder with the name of the split is used when there is one, else the rows of a
            metadata file (``file_name`` names a clip) that say so in a column ``split``.
        label: ``folder`` (the first folder on the way to the clip), ``none``, or a column of the metadata file. None:
            the column ``label`` of a metadata file, else class folders where there are any.
        caption: a column of the metadata file, or ``sidecar``: the lines of ``a.txt`` beside the clip ``a`` or
            ``a.mp4``; None reads none.

    Raises:
        FileNotFoundError: no clips, or captions that are not there.
        ValueError: an option that does not fit.
    """
    if path is None:
        raise ValueError("the data set kind clips needs data.path, the folder of the clips")
    if not Path(path).is_dir():
        raise FileNotFoundError(f"data.path={path} is no folder")
    root, table = open_folder(Path(path), split)
    found = list_clips(root) if table is None else [root / row["file_name"] for row in table]
    labels, names = class_labels(found, root, choose_label(found, root, table, label))
    captions = read_captions(found, root, table, caption)
    return Source(lambda i: Clip(found[i]), len(found), labels, names, lambda i: str(found[i]), captions)


def moving_digits(path: str | None, split: str, label: str | None, download: bool) -> Source:
    """The digits of scikit-learn moving across 16x16 pixels, one pixel per frame for nine frames, to try things out.

    The class is where a digit goes: "right", "left", "down" or "up"; digit i of the data set goes to place i modulo 4.
    """
    still = digits(None, split, None, download)

    def read(index: int) -> list[Image.Image]:
        digit = still.read(index)
        way = index % len(WAYS)
        frames = []
        for step in range(9) if way % 2 == 0 else range(8, -1, -1):
            frame = Image.new("L", (16, 16))
            frame.paste(digit, (step, 4) if way < 2 else (4, step))
            frames.append(frame)
        return frames

    labels = None if label == "none" else np.arange(still.count) % len(WAYS)
    if label not in (None, "none"):
        raise ValueError(f"data.label={label!r}: moving_digits has its classes, or none")
    return Source(read, still.count, labels, () if labels is None else WAYS)


def list_clips(root: Path) -> list[Path]:
    """All clips below ``root``, sorted by relative path: folders that hold images, and files of clips.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        if Path(folder) != root and any(Path(name).suffix.lower() in EXTENSIONS for name in names):
            found.append(Path(folder))
        found += [Path(folder, name) for name in names if Path(name).suffix.lower() in CLIPS]
    if not found:
        raise FileNotFoundError(f"no clips in {root}; looked for folders of images and {', '.join(CLIPS)}")
    return sorted(found, key=lambda f: f.relative_to(root).as_posix())


class ClipDataset(ImageDataset):
    """Clips of equal length: every ``stride``-th frame from a start that the key draws, or from the middle part.

    All frames of a clip are cropped and mirrored alike.

    Args:
        source: its ``read`` gives :class:`genssm.data.video.Clip`, or a list of images.
        transform: of every frame.
        num_frames: F.
        stride: frames from one to the next.

    Attributes:
        as :class:`genssm.data.images.ImageDataset`; ``item_shape`` is (F, C, H, W).
    """

    def __init__(self, source: Source, transform: ImageTransform, num_frames: int, stride: int = 1) -> None:
        if num_frames < 1 or stride < 1:
            raise ValueError(f"data.num_frames={num_frames}, data.frame_stride={stride}: expected at least 1")
        self.num_frames, self.stride = num_frames, stride
        super().__init__(source, transform)

    @property
    def span(self) -> int:
        """Stored frames from the first to the last one used."""
        return (self.num_frames - 1) * self.stride + 1

    @property
    def is_random(self) -> bool:
        """Whether the pixels depend on the key: a random crop, or clips that are longer than needed."""
        return super().is_random or any(len(self.source.read(i)) > self.span for i in range(len(self)))

    def arrange(self, stored: Clip | list[Image.Image], key: int | None) -> np.ndarray:
        """uint8 (F, C, H, W) of a clip."""
        spare = len(stored) - self.span
        if spare < 0:
            raise ValueError(
                f"the clip has {len(stored)} frames; {self.num_frames} with data.frame_stride={self.stride} need "
                f"{self.span}"
            )
        start = spare // 2
        if key is not None:
            start = int(hash_integers(np.asarray([key], np.uint64), _CUT)[0] % np.uint64(spare + 1))
        frames = range(start, start + self.span, self.stride)
        return np.stack([self.transform.pixels(stored[i], key) for i in frames])
