"""Where clips come from: a folder of them, a data set, or a pipeline; all give uint8 (B, F, 3, H, W) with labels."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from genssm.config import DataConfig, load_config
from genssm.data import CLIP_DATASETS, build_dataset
from genssm.data.clips import list_clips
from genssm.data.sources import READ_ERRORS, Source
from genssm.data.transforms import ImageTransform
from genssm.data.video import FORMATS, Clip
from genssm.metrics.generated import (
    PipelineSource,
    describe_texts,
    read_record,
    recorded_files,
    recorded_labels,
    recorded_protocol,
)
from genssm.metrics.sources import ImageBatch, ImageSource

CUTS = ("middle", "first", "all")


@dataclass(frozen=True)
class Cut:
    """Which frames of a stored clip are measured, and at which size.

    Attributes:
        num_frames: F, frames of a measured clip.
        frame_stride: stored frames from one to the next.
        which: ``middle`` or ``first`` takes one clip of each stored one; ``all`` takes them one after the other.
        transform: of every frame.
    """

    num_frames: int = 16
    frame_stride: int = 1
    which: str = "middle"
    transform: ImageTransform = field(default_factory=ImageTransform)

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.frame_stride < 1:
            raise ValueError(
                f"--num-frames is {self.num_frames}, --frame-stride {self.frame_stride}; expected at least 1"
            )

    @property
    def span(self) -> int:
        """Stored frames from the first to the last one used."""
        return (self.num_frames - 1) * self.frame_stride + 1

    def starts(self, length: int) -> list[int]:
        """First frames of the measured clips in a stored one of ``length`` frames."""
        if length < self.span:
            raise ValueError(
                f"the clip has {length} frames; {self.num_frames} with stride {self.frame_stride} need {self.span}; "
                "set --num-frames and --frame-stride"
            )
        if self.which == "all":
            return list(range(0, length - self.span + 1, self.span))
        return [(length - self.span) // 2 if self.which == "middle" else 0]

    def take(self, stored: Clip | Sequence[Image.Image], start: int) -> Tensor:
        """uint8 (F, 3, H, W) from the frame ``start`` on."""
        frames = range(start, start + self.span, self.frame_stride)
        pixels = [np.broadcast_to(p, (3, *p.shape[1:])) for p in (self.transform.pixels(stored[i]) for i in frames)]
        sizes = {f"{p.shape[1]}x{p.shape[2]}" for p in pixels}
        if len(sizes) > 1:
            raise ValueError(f"its frames are {' and '.join(sorted(sizes))}; a clip has one size, or set --resolution")
        return torch.from_numpy(np.stack(pixels))

    def protocol(self) -> dict[str, Any]:
        """What must be equal for two results to be comparable."""
        size = self.transform.resolution
        frames = "as stored" if size is None else f"{size}px {self.transform.crop}"
        return {
            "num_frames": self.num_frames,
            "frame_stride": self.frame_stride,
            "cut": self.which,
            "frames": frames if self.transform.channels is None else f"{frames}, {self.transform.channels} channels",
        }


class StoredClips(ImageSource):
    """Stored clips of :mod:`genssm.data`, cut.

    Args:
        listed: its ``read`` gives :class:`genssm.data.video.Clip`, or a list of images.
        cut: which frames.
        name, file_format: as :class:`ImageSource`.
    """

    def __init__(self, listed: Source, cut: Cut, name: str, file_format: str) -> None:
        self.listed, self.cut, self.name, self.file_format = listed, cut, name, file_format
        self.clips = cut.protocol()
        self._read = lru_cache(maxsize=1)(listed.read)  # several clips may be cut from one file, one after the other
        self.places: list[tuple[int, int | None]] = [(i, None) for i in range(listed.count)]  # None: found in reading
        if cut.which == "all":
            self.places = [(i, start) for i in range(listed.count) for start in self._starts(i)]

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> tuple[Tensor, int | None]:
        number, start = self.places[index]
        start = self._starts(number)[0] if start is None else start
        with _naming(self.listed.names(number)):
            clip = self.cut.take(self._read(number), start)
        return clip, None if self.listed.labels is None else int(self.listed.labels[number])

    def _starts(self, number: int) -> list[int]:
        with _naming(self.listed.names(number)):
            return self.cut.starts(len(self._read(number)))


class DrawnClips(PipelineSource):
    """Clips of a pipeline; clip i depends on ``seed + i`` and its label or prompt, not on batches or processes.

    Args:
        pipeline: a :class:`genssm.pipelines.VideoPipeline`, on its device.
        name, count, labels, seed, call: as :class:`PipelineSource`.
        cut: which frames.
        prompts: gone through over and over, for a pipeline that reads text.
        negative_prompt: for such a pipeline.
    """

    def __init__(
        self,
        pipeline: Any,
        name: str,
        count: int,
        cut: Cut,
        labels: NDArray[np.int64] | None = None,
        seed: int = 0,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        **call: Any,
    ) -> None:
        super().__init__(pipeline, name, count, labels, seed, **call)
        self.cut, self.prompts = cut, prompts
        self.negative = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
        self.clips, self.texts = cut.protocol(), describe_texts(prompts, negative_prompt)
        self.starts = cut.starts(pipeline.denoiser.config["num_frames"])
        if len(self.starts) > 1:
            raise ValueError("--cut all is for files; clips of a pipeline give one each, choose --cut middle or first")

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[ImageBatch]:
        """As :meth:`ImageSource.batches`; each batch is one call of the pipeline."""
        for first in range(0, len(indices), batch_size):
            chosen = list(indices[first : first + batch_size])
            generators = [torch.Generator().manual_seed(self.seed + index) for index in chosen]
            labels = None if self.labels is None else self.labels[chosen]
            if self.prompts is None:
                what = {"class_labels": None if labels is None else labels.tolist(), "num_videos": len(chosen)}
            else:
                what = {"prompt": [self.prompts[index % len(self.prompts)] for index in chosen], **self.negative}
            clips = self.pipeline(**what, generator=generators, output_type="pil", **self.call).frames
            yield ImageBatch(chosen, torch.stack([self.cut.take(clip, self.starts[0]) for clip in clips]), labels)


def add_cut_options(parser: argparse.ArgumentParser) -> None:
    """Options that make a :class:`Cut`, beside those of :func:`genssm.metrics.sources.add_data_options`."""
    group = parser.add_argument_group("clips (all part of the protocol)")
    group.add_argument("--num-frames", type=int, default=16, metavar="F", help="of a clip (default: %(default)s)")
    group.add_argument("--frame-stride", type=int, default=1, metavar="N", help="take every N-th frame (default: 1)")
    group.add_argument(
        "--cut", choices=CUTS, default="middle", help="of a longer clip: its middle, its beginning, or all, one after "
        "the other (default: %(default)s)",
    )  # fmt: skip


def make_cut(options: argparse.Namespace, data: DataConfig | None = None) -> Cut:
    """The cut of command line options; frames of samples and reference are resized alike.

    Args:
        options: of :func:`add_cut_options` and :func:`genssm.metrics.sources.add_data_options`.
        data: says how frames reach their size where no option does: that of the run whose data are the reference.
    Raises:
        ValueError: a number below 1, a crop without a resolution, or a crop that draws.
    """
    given = {key: getattr(options, key) for key in ("resolution", "crop", "channels")}
    if given["crop"] is not None and given["resolution"] is None and (data is None or data.resolution is None):
        raise ValueError(f"--crop {given['crop']} says how frames reach --resolution; give it, too")
    base = ImageTransform() if data is None else ImageTransform(data.resolution, data.channels, data.crop)
    transform = replace(base, **{key: value for key, value in given.items() if value is not None})
    if transform.resolution is not None and transform.is_random_crop:
        raise ValueError(f"crop {transform.crop} draws; a measurement needs another --crop")
    return Cut(options.num_frames, options.frame_stride, options.cut, transform)


def folder_clips(path: str | Path, cut: Cut) -> StoredClips:
    """The clips in a folder, at any depth: folders of frames, ``.npy``, ``.gif`` and video files.

    Raises:
        FileNotFoundError: no such folder, or no clips in it.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder of clips, nor an .npz file of statistics")
    files = list_clips(path)
    return StoredClips(_listed(files), cut, str(path), _format(files))


def recorded_clips(
    folder: Path, cut: Cut, first: int | None = None
) -> tuple[StoredClips, dict[str, Any], dict[str, Any]] | None:
    """The clips that ``sample.py`` wrote into a folder, how it drew them, and from which model.

    Args:
        folder: the folder.
        cut: which frames.
        first: take only so many, those of the lowest seeds.
    Returns:
        As :func:`genssm.metrics.generated.recorded_samples`; None for a folder of another maker.
    Raises:
        ValueError: clips are missing, there are fewer than ``first``, or the samples are images.
    """
    record = read_record(folder)
    if record is None:
        return None
    written = record["settings"].get("video_format")
    if written is None:
        raise ValueError(f"{folder} holds images of sample.py; measure them with python -m genssm.metrics.fid")
    files = recorded_files(folder, record, first, FORMATS[written])
    listed = replace(_listed(files), labels=recorded_labels(record, len(files)))
    return StoredClips(listed, cut, str(folder), _format(files)), *recorded_protocol(record, len(files))


def data_config(name: str) -> DataConfig:
    """How the data set ``name`` is read; ``name`` may also be a configuration file or a run folder.

    Raises:
        ValueError: the data set holds no clips.
    """
    file = Path(name) / "config.yaml" if Path(name).is_dir() else Path(name)
    config = load_config(file).data if file.suffix in (".yaml", ".yml") else DataConfig(name=name)
    if config.name not in CLIP_DATASETS:
        raise ValueError(f"{config.name} is no data set of clips; those are {', '.join(CLIP_DATASETS)}")
    return config


def dataset_clips(config: DataConfig, split: str, cut: Cut) -> StoredClips:
    """The clips of a data set; the cut says which frames, whatever those are that training takes."""
    config = replace(config, flip=False, caption=None, num_frames=1, frame_stride=1)
    return StoredClips(build_dataset(config, split=split).source, cut, f"{config.name} {split}", "dataset")


def _listed(files: Sequence[Path]) -> Source:
    return Source(lambda i: Clip(files[i]), len(files), names=lambda i: str(files[i]))


def _format(files: Sequence[Path]) -> str:
    """Suffixes of the files, of folders those of their frames."""
    frames = [Clip(file).frames[0] if file.is_dir() else file for file in files]
    return "+".join(sorted({frame.suffix.lower().lstrip(".") for frame in frames}))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say which clip could not be read."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"clip {name}: {error}") from None
    except READ_ERRORS as error:
        raise ValueError(f"cannot read clip {name}: {error or type(error).__name__}") from error
