"""Samples drawn from a pipeline on demand, and what a report says about how they were drawn."""

import argparse
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssm.config import load_config
from genssm.data.sources import from_files
from genssm.data.transforms import ImageTransform
from genssm.metrics.sources import ImageBatch, ImageSource, ListedSource
from genssm.metrics.weights import file_hash
from genssm.schedulers import SCHEDULER_NAMES, swap_scheduler
from genssm.solvers import ADAPTIVE_METHODS, FIXED_METHODS

RECORD = "samples.json"  # written by sample.py beside its images
SETTINGS = (
    "num_inference_steps", "guidance_scale", "guidance_interval", "guidance_rescale", "guidance_power", "ode_solver",
    "temperature", "top_k", "top_p",
)  # fmt: skip
DRAWING = (*SETTINGS, "scheduler", "ode_rtol", "ode_atol", "labels", "seed", "dtype")


class PipelineSource(ImageSource):
    """Images of a pipeline; image i depends on ``seed + i`` and its label, not on batches or processes.

    Args:
        pipeline: an image pipeline of genssm (or one that is called like it), on its device.
        name: what reports call it.
        count: number of images.
        labels: class of each image, (count,) int64, or None for a model without classes.
        seed: of image 0.
        call: further arguments of the pipeline: steps, guidance.

    Attributes:
        texts: what it is drawn from besides labels, for the report: prompts.
    """

    texts: Mapping[str, Any] = MappingProxyType({})

    file_format = "png"  # 8-bit pixels, those that sample.py writes

    def __init__(
        self,
        pipeline: Any,
        name: str,
        count: int,
        labels: NDArray[np.int64] | None = None,
        seed: int = 0,
        **call: Any,
    ) -> None:
        self.pipeline, self.name, self.count = pipeline, name, count
        self.labels, self.seed, self.call = labels, seed, call
        pipeline.set_progress_bar_config(disable=True)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Tensor, int | None]:
        batch = next(self.batches([index], 1))
        return batch.images[0], None if batch.labels is None else int(batch.labels[0])

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[ImageBatch]:
        """As :meth:`ImageSource.batches`; each batch is one call of the pipeline."""
        for start in range(0, len(indices), batch_size):
            chosen = list(indices[start : start + batch_size])
            generators = [torch.Generator().manual_seed(self.seed + index) for index in chosen]
            labels = None if self.labels is None else self.labels[chosen]
            output = self.pipeline(
                None if labels is None else labels.tolist(),
                num_images=len(chosen),
                generator=generators,
                output_type="pil",
                **self.call,
            )
            images = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in output.images]
            yield ImageBatch(chosen, torch.stack(images), labels)


def add_drawing_options(parser: argparse.ArgumentParser) -> Any:
    """Options that say how a pipeline with a scheduler draws; returns their group."""
    draw = parser.add_argument_group("sampling from a pipeline (default: as the pipeline does)")
    draw.add_argument("--num-inference-steps", type=int, metavar="N")
    draw.add_argument("--guidance-scale", type=float, metavar="W", help="1 is none")
    draw.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="0 data to 1 noise")
    draw.add_argument("--guidance-rescale", type=float, metavar="PHI")
    draw.add_argument("--guidance-power", type=float, metavar="P", help="less guidance near the data")
    draw.add_argument("--scheduler", choices=SCHEDULER_NAMES, help="another sampler than the model's own")
    draw.add_argument("--ode-solver", choices=ADAPTIVE_METHODS + FIXED_METHODS, help="instead of the scheduler")
    draw.add_argument("--ode-rtol", type=float, help="its relative tolerance (default: 1e-3)")
    draw.add_argument("--ode-atol", type=float, help="its absolute tolerance (default: 1e-6)")
    draw.add_argument("--labels", help="balanced (default), reference (its frequencies) or the number of one class")
    draw.add_argument("--seed", type=int, help="sample i is drawn from seed + i (default: 0)")
    draw.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: float32)")
    return draw


def refuse_drawing_options(options: argparse.Namespace, path: Path, *more: str) -> None:
    """Raise a ValueError if options of drawing, or ``more`` options, are given although ``path`` holds files."""
    given = [key for key in (*DRAWING, *more) if getattr(options, key, None) is not None]
    if given:
        names = ", ".join("--" + key.replace("_", "-") for key in given)
        raise ValueError(f"{names}: for sampling from a pipeline or run, but {path} is neither")


def drawing_arguments(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Give a pipeline the scheduler of the options; returns the arguments of its call.

    Raises:
        ValueError: an option that the pipeline does not know, such as steps where codes are drawn one by one, or
            tolerances without an adaptive solver.
    """
    given = {key: getattr(options, key, None) for key in SETTINGS}
    call = {key: value for key, value in given.items() if value is not None}
    known = inspect.signature(type(pipeline).__call__).parameters
    idle = [key for key in call if key not in known]
    if options.scheduler is not None and "scheduler" not in pipeline.components:
        idle.append("scheduler")
    if idle:
        names = ", ".join("--" + key.replace("_", "-") for key in idle)
        raise ValueError(f"{names}: no option of {type(pipeline).__name__}; leave it out")
    if options.scheduler is not None:
        pipeline.scheduler = swap_scheduler(pipeline.scheduler, options.scheduler)
    tolerances = {key: getattr(options, f"ode_{key}") for key in ("rtol", "atol")}
    if any(value is not None for value in tolerances.values()) and options.ode_solver not in ADAPTIVE_METHODS:
        raise ValueError(f"tolerances are for the adaptive ODE solvers: {', '.join(ADAPTIVE_METHODS)}")
    if any(value is not None and value <= 0 for value in tolerances.values()):
        raise ValueError("--ode-rtol and --ode-atol are above 0")
    if options.ode_solver in ADAPTIVE_METHODS:
        call["ode_options"] = {"rtol": tolerances["rtol"] or 1e-3, "atol": tolerances["atol"] or 1e-6}
    return call


def choose_labels(
    which: str, count: int, num_classes: int, frequencies: Sequence[int] | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """Classes of ``count`` samples, (count,); the label of image i does not depend on ``count``.

    Args:
        which: ``balanced`` (0, 1, ..., 0, 1, ...), ``reference`` (drawn with the frequencies of the reference) or the
            number of one class.
        count: number of samples.
        num_classes: classes of the model.
        frequencies: images per class of the reference; for ``reference``.
        seed: of the draw; for ``reference``.
    Raises:
        ValueError: an unknown choice, a class out of range, or frequencies that are not known.
    """
    if which == "balanced":
        return np.arange(count, dtype=np.int64) % num_classes
    if which == "reference":
        if frequencies is None or len(frequencies) > num_classes:
            known = "no labels" if frequencies is None else f"{len(frequencies)} classes and the model {num_classes}"
            raise ValueError(f"labels 'reference' need the classes of the reference, which has {known}; use balanced")
        shares = np.cumsum(frequencies) / np.sum(frequencies)
        shares[-1] = 1.0
        return np.searchsorted(shares, np.random.default_rng(seed).random(count), side="right").astype(np.int64)
    if not which.isdecimal() or int(which) >= num_classes:
        raise ValueError(f"labels {which!r}; expected balanced, reference or a class in 0..{num_classes - 1}")
    return np.full(count, int(which), dtype=np.int64)


def sampling_protocol(source: PipelineSource, labels: str, folder: Path) -> dict[str, Any]:
    """Everything about the drawing that changes the samples; the part ``sampling`` of a report.

    Args:
        source: what draws.
        labels: the choice of :func:`choose_labels`.
        folder: pipeline folder; the run around it says whether its weights are averaged.
    """
    pipeline = source.pipeline
    defaults = inspect.signature(type(pipeline).__call__).parameters
    call = {key: source.call.get(key, defaults[key].default) for key in SETTINGS if key in defaults}
    if call.get("ode_solver"):
        call["ode_solver"] = {"method": call["ode_solver"], **source.call.get("ode_options", {})}
    if source.labels is None:
        labels = "none"
    elif labels == "balanced":
        labels = _cycle(range(pipeline.denoiser.config["num_classes"]))
    return _protocol(
        sampler_settings(pipeline),
        call,
        folder,
        labels if not labels.isdecimal() else _cycle([int(labels)]),
        source.seed,
        source.count,
        str(pipeline.dtype).removeprefix("torch."),
        source.texts,
    )


def sampler_settings(pipeline: Any) -> dict[str, Any]:
    """Class and settings of a pipeline's scheduler; of a pipeline without one, its own class."""
    if "scheduler" not in pipeline.components:
        return {"_class_name": type(pipeline).__name__}
    return json.loads(pipeline.scheduler.to_json_string())


def recorded_samples(
    folder: Path, first: int | None = None
) -> tuple[ImageSource, dict[str, Any], dict[str, Any]] | None:
    """The images that ``sample.py`` wrote into a folder, how it drew them, and from which model.

    Args:
        folder: the folder.
        first: take only so many, those of the lowest seeds.
    Returns:
        Source with labels, ``sampling`` as :func:`sampling_protocol` gives it, facts about the model; None for a folder
        of another maker.
    Raises:
        ValueError: images are missing, or there are fewer than ``first``.
    """
    record = read_record(folder)
    if record is None:
        return None
    if "video_format" in record["settings"]:
        raise ValueError(f"{folder} holds clips of sample.py; measure them with python -m genssm.metrics.video")
    files = recorded_files(folder, record, first, ".png")
    labels = recorded_labels(record, len(files))
    listed = replace(from_files(files, folder, "none"), labels=labels)
    sampling, model = recorded_protocol(record, len(files))
    return ListedSource(listed, ImageTransform(), str(folder), "png"), sampling, model


def read_record(folder: Path) -> dict[str, Any] | None:
    """What ``sample.py`` wrote beside its samples, None in a folder of another maker."""
    record_file = folder / RECORD
    return json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else None


def recorded_files(folder: Path, record: Mapping[str, Any], first: int | None, suffix: str) -> list[Path]:
    """The samples of a record, or the first so many of them; a ValueError if there are fewer, or some are missing."""
    count = record["num_images"] if first is None else first
    if count > record["num_images"]:
        raise ValueError(f"{folder} holds {record['num_images']} samples, {count} were asked for")
    files = [folder / f"{index:06d}{suffix}" for index in range(count)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {count} samples, first {missing[0]}; run sample.py again")
    return files


def recorded_labels(record: Mapping[str, Any], count: int) -> NDArray[np.int64] | None:
    """The class of each of the first ``count`` samples of a record, None without classes."""
    classes = record["settings"]["class_labels"]
    return np.array(classes, dtype=np.int64)[np.arange(count) % len(classes)] if classes else None


def recorded_protocol(record: Mapping[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """How the first ``count`` samples of a record were drawn, and from which model; parts of a report."""
    settings = record["settings"]
    call = {key: settings[key] for key in SETTINGS if key in settings}
    if call["ode_solver"] and call["ode_solver"]["method"] in FIXED_METHODS:
        call["ode_solver"] = {"method": call["ode_solver"]["method"]}  # tolerances mean nothing to these
    sampling = _protocol(
        settings["scheduler"],
        call,
        Path(record["pipeline"]),
        _cycle(settings["class_labels"]) if settings["class_labels"] else "none",
        settings["seed"],
        count,
        settings["dtype"],
        describe_texts(settings.get("prompt"), settings.get("negative_prompt")),
    )
    return sampling, {"pipeline": record["pipeline"], "sha256": settings["pipeline_sha256"]}


def describe_texts(prompts: Sequence[str] | None, negative_prompt: str | None) -> dict[str, Any]:
    """What a report says of texts that are gone through over and over: themselves if few, else their sha256."""
    texts: dict[str, Any] = {}
    if prompts is not None:
        digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
        texts["prompts"] = list(prompts) if len(prompts) <= 8 else f"{len(prompts)}, sha256 {digest}"
    if negative_prompt is not None:
        texts["negative_prompt"] = negative_prompt
    return texts


def model_facts(folder: Path) -> dict[str, Any]:
    """Which model was evaluated: its folder and the sha256 of each weight file in it."""
    files = sorted(folder.glob("*/*.safetensors"))
    return {
        "pipeline": str(folder),
        "weights_sha256": {file.relative_to(folder).as_posix(): file_hash(file) for file in files},
    }


def _kind_of_weights(folder: Path) -> str | None:
    """How a run made the weights in RUN/checkpoints/step_N/pipeline; None for a folder that is in no run."""
    parents = folder.resolve().parents
    config = parents[2] / "config.yaml" if len(parents) > 2 else None
    if config is None or parents[1].name != "checkpoints" or not config.is_file():
        return None
    decay = load_config(config).train.ema_decay
    return f"EMA {decay}" if decay else "as trained"


def _protocol(
    scheduler: Mapping[str, Any],
    call: Mapping[str, Any],
    folder: Path,
    labels: str,
    seed: int,
    count: int,
    dtype: str,
    texts: Mapping[str, Any],
) -> dict[str, Any]:
    protocol = {
        # Other names with an underscore are versions and file names of diffusers, not settings.
        "scheduler": {
            "class": scheduler["_class_name"],
            **{key: value for key, value in scheduler.items() if not key.startswith("_")},
        },
        **call,
        **texts,
        "weights": _kind_of_weights(folder),
        "labels": labels,
        "seeds": f"{seed}..{seed + count - 1}",
        "dtype": dtype,
    }
    return json.loads(json.dumps(protocol, default=str))  # tuples become lists, as in a report read back


def _cycle(labels: Sequence[int]) -> str:
    """A short text for labels that are gone through over and over."""
    first, last = labels[0], labels[-1]
    if len(labels) > 1 and list(labels) == list(range(first, last + 1)):
        return f"{first}..{last} in turn"
    return ", ".join(map(str, labels)) + (" in turn" if len(labels) > 1 else " only")
