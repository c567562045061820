"""One YAML file describes a whole run: read, overridden by ``key=value``, converted by type, checked, written back.

There is no inheritance, no interpolation and no second file: what stands in the file (and in ``config.yaml`` of the run
folder) is the run. :mod:`genssm.values` says how texts become numbers.
"""
# ruff: noqa: RUF009 - key() returns dataclasses.field

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from genssm.values import convert, read_yaml, write_yaml


def key(
    comment: str, default: Any = MISSING, *, resumable: bool = False, factory: Callable[[], Any] | None = None
) -> Any:
    """A configuration key: its one-line comment, its default, and whether a run may be resumed with another value."""
    metadata = {"comment": comment, "resumable": resumable}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The denoiser: a class of ``genssm.models.MODELS`` and the arguments of its constructor."""

    name: str = key("key of genssm.models.MODELS")
    args: dict[str, Any] = key("arguments of the model's constructor", factory=dict)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the denoiser learns to predict, at which noise levels, with which weights."""

    name: Literal["flow", "diffusion", "next_token", "masked_token", "reconstruction"] = key(
        "flow (interpolant, velocity), diffusion (DDPM-type schedule), next_token (aim), masked_token (maskmamba), "
        "reconstruction (vq)",
        "flow",
    )
    prediction_type: Literal["flow_prediction", "epsilon", "sample", "score", "v_prediction"] = key(
        "flow: flow_prediction, epsilon, sample, score; diffusion: epsilon, v_prediction, sample", "flow_prediction"
    )
    path: Literal["linear", "gvp", "vp"] = key("flow: linear, gvp (sine and cosine) or vp interpolation", "linear")
    time_sampling: Literal["uniform", "logit_normal"] = key("flow: distribution of the noise level", "uniform")
    logit_mean: float = key("flow, logit_normal: mean of the logit; positive favours noise", 0.0)
    logit_std: float = key("flow, logit_normal: standard deviation of the logit", 1.0)
    time_epsilon: float | None = key("flow: distance kept from both ends of time; null takes what is regular", None)
    weighting: Literal["none", "velocity", "likelihood", "min_snr"] = key(
        "flow: none, velocity, likelihood; diffusion: none, min_snr", "none"
    )
    min_snr_gamma: float = key("diffusion, min_snr: bound of the signal-to-noise ratio", 5.0)
    scheduler: dict[str, Any] = key("arguments of the diffusers scheduler saved with the model", factory=dict)
    label_smoothing: float = key("next_token, masked_token: share of the target spread over all codes", 0.0)
    mask_schedule: Literal["cosine", "linear"] = key("masked_token: share of masked codes over the steps", "cosine")
    pixel_loss: Literal["l1", "l2"] = key("reconstruction: distance of pixels", "l2")
    perceptual_weight: float = key("reconstruction: weight of the distance of VGG-16 features; 0 is none", 0.0)
    perceptual_network: str | None = key("reconstruction: file of VGG-16 weights (torchvision's)", None)
    perceptual_heads: str | None = key("reconstruction: file of LPIPS weights for them; null weighs all alike", None)
    adversarial_weight: float = key("reconstruction: weight of a patch discriminator's verdict; 0 is none", 0.0)
    adversarial_start: int = key("reconstruction: step from which it counts", 0)
    restart_every: int = key("reconstruction: steps between restarts of dead codes; 0 never restarts", 0)


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """How stored latents are to be read; each null takes what the layout (or its meta.json) declares."""

    layout: str = key("auto, or a key of genssm.data.latents.LAYOUTS", "auto")
    form: Literal["sample", "mean_logvar", "mean_std"] | None = key("what one stored array holds", None)
    scaled: bool | None = key("whether shift and scale were applied before storing", None)
    scale: list[float] | None = key("latent = (stored - shift) * scale; one number or one per channel", None)
    shift: list[float] | None = key("see scale", None)
    flip_rows: bool | None = key("whether rows N..2N-1 are the mirrored copies of rows 0..N-1", None)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images (or latents) come from and how they become tensors."""

    name: str = key("kind of data set, a key of genssm.data.DATASETS")
    path: str | None = key("folder or file; not needed by digits", None, resumable=True)
    split: str = key("part of the data set", "train")
    resolution: int | None = key(
        "side of the square images in pixels; null keeps the stored size; packed: largest area, as that of this square",
        None,
    )
    channels: Literal[1, 3] | None = key("1 grey, 3 colour; null keeps what is stored", None)
    crop: Literal["adm", "resize_center", "resize_random", "pad", "none"] = key(
        "how an image gets its size: adm, resize_center, resize_random, pad or none", "adm"
    )
    pack_tokens: int = key("pack images of all shapes into rows of at most so many tokens; 0: one size, no packing", 0)
    min_resolution: int | None = key("packed: smaller images are enlarged to the area of this square; null: none", None)
    multiple: int = key("packed: sides are multiples of so many pixels, patch_size times the VAE's factor", 16)
    flip: bool = key("mirror half of the images left to right", False)
    label: str | None = key("folder, prefix, none, or the name of a column; null takes what the kind has", None)
    caption: str | None = key(
        "a column, sidecar (a.txt beside a.png), class (its name), or the field of a webdataset; null: no captions",
        None,
    )
    num_frames: int = key("clips: frames of an item", 16)
    frame_stride: int = key("clips: stored frames from one to the next", 1)
    download: bool = key("let torchvision fetch its data sets into path", False, resumable=True)
    vae: str | None = key(
        "folder of a VAE or VQ tokenizer: encodes images while training, decodes samples", None, resumable=True
    )
    latents: LatentsConfig = key("reading of stored latents", factory=LatentsConfig)
    cache: Literal["none", "ram", "device"] = key(
        "keep the decoded data set in memory or on the device", "none", resumable=True
    )
    num_workers: int = key("loader processes per training process", 0, resumable=True)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What reads the captions, for a model with ``context_dim``."""

    encoder: str = key("learned (trained along), or folder or Hub name of CLIP, T5, ... which stays frozen", "learned")
    args: dict[str, Any] = key("learned: num_layers and num_heads of genssm.models.TextEncoder", factory=dict)
    vocab_size: int = key("learned: most tokens of the tokenizer", 4096)
    max_length: int | None = key("tokens of a caption; null: 32, or what the frozen encoder's tokenizer says", None)
    dropout_prob: float = key("share of captions replaced by the null text", 0.0)
    cache: str | None = key("frozen: folder that python -m genssm.data.text_states made", None, resumable=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    output_dir: str | None = key("run folder; null: runs/<name of the config file>", None, resumable=True)
    seed: int = key("the one seed; data order, noise, dropout and samples derive from it", 0)
    init_from: str | None = key("run, checkpoint or pipeline whose averaged weights a new run starts from", None)
    max_train_steps: int = key("optimiser steps", 1000, resumable=True)
    train_batch_size: int = key(
        "images (packed: rows) per optimiser step, all processes and accumulation steps together", 32
    )
    gradient_accumulation_steps: int = key("parts in which a process works through its share", 1, resumable=True)
    learning_rate: float = key("peak learning rate", 1e-4)
    lr_scheduler: Literal["constant", "linear", "cosine", "polynomial"] = key(
        "course of the learning rate after the warm-up", "constant"
    )
    lr_warmup_steps: int = key("steps of linear warm-up", 0)
    adam_beta1: float = key("AdamW: decay of the first moment", 0.9)
    adam_beta2: float = key("AdamW: decay of the second moment", 0.999)
    adam_epsilon: float = key("AdamW: added to the denominator", 1e-8)
    weight_decay: float = key("decay of matrices; never of A_log, D, norms, biases, embeddings", 0.0)
    max_grad_norm: float = key("gradient norm to clip at; 0 never clips", 1.0)
    ema_decay: float = key("decay of the averaged weights; 0 keeps none", 0.9999)
    class_dropout_prob: float = key("share of labels replaced by the null class", 0.0)
    layer_shuffle: float = key("probability that the last block scans in a random order, less in earlier ones", 0.0)
    mixed_precision: Literal["no", "fp16", "bf16"] = key("autocast type; weights stay float32", "no")
    gradient_checkpointing: bool = key("recompute each block in the backward pass", False, resumable=True)
    compile: bool = key("torch.compile of the repeated blocks", False, resumable=True)
    cuda_graph: bool = key("replay forward and backward pass as recorded CUDA graphs", False, resumable=True)
    tf32: bool = key("TensorFloat-32 matrix products on CUDA", True, resumable=True)
    resume_from_checkpoint: str = key("latest, none, or the path of a checkpoint", "latest", resumable=True)
    checkpointing_steps: int = key("steps between checkpoints", 500, resumable=True)
    checkpoints_total_limit: int = key("checkpoints kept; 0 keeps all", 2, resumable=True)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells while it runs."""

    report_to: Literal["none", "tensorboard", "wandb"] = key("tracker beside metrics.jsonl", "none", resumable=True)
    log_every: int = key("steps between lines of metrics.jsonl", 10, resumable=True)
    sample_every: int = key("steps between sample grids; 0 draws none", 500, resumable=True)
    num_samples: int = key("images per grid", 16, resumable=True)
    sample_seed: int = key("image i of a grid starts from the noise of seed sample_seed + i", 0, resumable=True)
    prompts: list[str] = key(
        "texts of the grid, over and over; none: captions of the data", factory=list, resumable=True
    )
    num_inference_steps: int = key("sampler steps for grids; aim has none", 50, resumable=True)
    guidance_scale: float = key("classifier-free guidance for grids; 1 is none", 1.0, resumable=True)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measuring samples while training; the checkpoint with the smallest distance is kept."""

    every: int = key("steps between measurements; 0 makes none", 0, resumable=True)
    num_samples: int = key("images drawn for each, by all processes together", 1000, resumable=True)
    reference: str | None = key(
        "real images or statistics as for benchmarks/fid.py; null takes the run's data set", None, resumable=True
    )
    features: str = key("feature network: inception, classifier:FILE, ...", "inception", resumable=True)
    weights: str | None = key("weight file for inception; null takes the cached one", None, resumable=True)
    num_inference_steps: int = key("sampler steps; aim has none", 50, resumable=True)
    guidance_scale: float = key("classifier-free guidance; 1 is none", 1.0, resumable=True)
    seed: int = key("image i starts from the noise of seed + i", 0, resumable=True)
    batch_size: int = key("images at once in each process", 64, resumable=True)


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Representation alignment with a vision encoder (REPA)."""

    encoder: str | None = key("folder of a DINOv2 saved by transformers; null: no alignment", None)
    weight: float = key("of the alignment in the loss", 0.5)
    layer: int | None = key("block whose output is aligned, from 1; null: a third of the way", None)
    projector_width: int = key("width of the projector's hidden layers", 2048)


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """Training on human motion: ``data.name`` is motion (a folder in ``data.path``) or synthetic_motion."""

    min_frames: int = key("shorter clips are left out; KIT-ML is usually read with 24", 40)
    max_frames: int = key("frames of an item", 196)
    unit_length: int = key("lengths are multiples of it", 4)
    longer: Literal["leave_out", "window"] | None = key(
        "of clips that are longer: leave them out, or a random part (window); null: window for recordings", None
    )
    mirror: bool = key("of recordings: add mirror images, words for left and right exchanged", False)
    joint_map: str | None = key("of recordings: key of genssm.data.motion.recording.JOINT_MAPS; null finds it", None)
    up: Literal["y", "z"] = key("of recordings: vertical axis", "y")
    pack_frames: int = key("frames: pack whole clips into rows of at most so many frames; 0 pads each", 0)
    vae: str | None = key("run or pipeline of the motion VAE in whose latents a denoiser works; null: frames", None)
    text_states: Literal["pooled", "tokens"] = key("what of a text the denoiser reads", "pooled")
    kl_weight: float = key("VAE: weight of the KL divergence", 1e-4)
    joints_weight: float = key("VAE: weight of the error of the joints", 1.0)
    loss_on_padding: bool = key("VAE: count the padding, as the released code does", True)
    key_frame_ratio: float = key("frames: part of a clip's frames hidden as key frames (KMM); 0 hides none", 0.0)
    key_frame_prob: float = key("frames: share of clips whose key frames are hidden", 0.5)
    key_frame_bandwidth: float = key("frames: squared distance of normalised frames, per feature, that is near", 1.0)
    contrastive_weight: float = key("learned text: weight of the text-motion contrast (KMM: 0.5)", 0.0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig = key("the denoiser")
    objective: ObjectiveConfig = key("the training objective", factory=ObjectiveConfig)
    data: DataConfig = key("the data set")
    text: TextConfig = key("the text encoder", factory=TextConfig)
    train: TrainConfig = key("the optimisation", factory=TrainConfig)
    log: LogConfig = key("logging and samples", factory=LogConfig)
    evaluate: EvaluateConfig = key("measuring samples while training", factory=EvaluateConfig)
    align: AlignConfig = key("representation alignment", factory=AlignConfig)
    motion: MotionConfig = key("human motion", factory=MotionConfig)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run from a YAML file and ``section.key=value`` overrides.

    Args:
        path: the YAML file.
        overrides: texts such as ``train.learning_rate=3e-4`` or ``model.args.hidden_size=128``.

    Returns:
        The run, every value converted to the type of its field; ``train.output_dir`` is filled in.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown or missing key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; the shipped ones are in configs/")
    values = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold the sections model, objective, data, text, train, log; got {values!r}")
    config = _build(RunConfig, values, "", str(path), given=_apply_overrides(values, overrides))
    if config.train.output_dir is None:
        train = dataclasses.replace(config.train, output_dir=str(Path("runs") / path.stem))
        config = dataclasses.replace(config, train=train)
    return config


def load_data_config(path: str | Path | None, overrides: Iterable[str] = ()) -> DataConfig:
    """A data section alone: that of a run file, if one is given, with ``key=value`` changes (no ``data.`` in front)."""
    typed = [f"data.{override}" for override in overrides]
    if path is not None:
        return load_config(path, typed).data
    values: dict[str, Any] = {"data": {}}
    given = _apply_overrides(values, typed)
    return _build(DataConfig, values["data"], "data.", "command line", given)


def _apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, str]:
    """Set each override in ``values``; returns dotted key -> text as typed, to say so in errors."""
    typed = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ValueError(
                f"cannot read {override!r} on the command line; write section.key=value, e.g. train.seed=1"
            )
        value = read_yaml(text, f"the value of {name} on the command line")
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ValueError(f"command line: {name} cannot be set, {parent} is a value and not a section")
        place[last] = value
        typed[name] = text
    return typed


def _build(cls: type, values: Any, prefix: str, source: str, given: Mapping[str, str]) -> Any:
    """An instance of the dataclass ``cls`` from a plain mapping."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: {prefix.rstrip('.')} must be a section with keys, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"{_where(prefix + str(name), source, given)}: unknown key{_nearest(prefix, str(name))}")
    arguments = {}
    for name, f in known.items():
        dotted = prefix + name
        if dataclasses.is_dataclass(hints[name]):
            required = f.default is MISSING and f.default_factory is MISSING
            if name in values or not required:
                section = values.get(name)
                arguments[name] = _build(hints[name], {} if section is None else section, dotted + ".", source, given)
        elif name in values:
            text = given.get(dotted)
            where = _where(dotted, source, given)
            arguments[name] = convert(values[name], hints[name], where, text)
        if name not in arguments and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{source}: {dotted} is missing ({f.metadata['comment']})")
    return cls(**arguments)


def _where(dotted: str, source: str, given: Mapping[str, str]) -> str:
    typed = any(name == dotted or name.startswith(dotted + ".") for name in given)
    return f"{'command line' if typed else source}: {dotted}"


def _nearest(prefix: str, name: str) -> str:
    """ "; did you mean ...?" for a key that does not exist."""
    keys = [dotted for dotted, _ in iter_keys()]
    here = [k for k in keys if k.startswith(prefix)]
    level = here if prefix else [f.name for f in dataclasses.fields(RunConfig)]
    leaves = {k.rpartition(".")[2]: k for k in reversed(keys)}
    initials = ["".join(word[0] for word in leaf.split("_")) for leaf in leaves]
    best = (
        difflib.get_close_matches(prefix + name, [*here, *level], n=1, cutoff=0.8)
        or [k for k in [*here, *leaves.values()] if len(name) > 2 and name in k.rpartition(".")[2]]
        or [k for k, short in zip(leaves.values(), initials) if len(short) > 1 and short == name]
        or [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, n=1, cutoff=0.6)]
    )
    return f"; did you mean {best[0]}?" if best else f"; there are {', '.join(level)}"


def iter_keys(cls: type = RunConfig, prefix: str = "") -> Iterable[tuple[str, dataclasses.Field]]:
    """Every dotted key with its dataclass field, in order."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from iter_keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def describe_keys() -> str:
    """Every key with its default and its comment, one per line, for ``--help``."""
    lines = []
    for dotted, f in iter_keys():
        if f.default is not MISSING:
            default = write_yaml(f.default)
        else:
            default = "(required)" if f.default_factory is MISSING else write_yaml(f.default_factory())
        lines.append(f"  {dotted:<38} {default:<22} {f.metadata['comment']}")
    return "\n".join(lines)


def get_value(config: RunConfig, dotted: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def dump_config(config: RunConfig) -> str:
    """The whole run as YAML with the comment of every key; :func:`load_config` reads it back equal."""
    lines: list[str] = []
    _dump_section(config, "", lines)
    return "\n".join(lines) + "\n"


def _dump_section(section: Any, indent: str, lines: list[str]) -> None:
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            lines.append(f"{indent}{f.name}:")
            _dump_section(value, indent + "  ", lines)
        else:
            lines.append(f"{indent}{f.name}: {write_yaml(value)}  # {f.metadata['comment']}")


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Keys that differ between two runs and may not differ when one continues the other, as ``key: old -> new``."""
    changed = []
    for dotted, f in iter_keys():
        before, after = get_value(old, dotted), get_value(new, dotted)
        if before != after and not f.metadata["resumable"]:
            changed.append(f"{dotted}: {before!r} -> {after!r}")
    return changed
