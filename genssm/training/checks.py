"""What would go wrong later is said before the long work starts."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch

from genssm.config import RunConfig, differences, dump_config, get_value, iter_keys, load_config
from genssm.training.checkpoint import TEMPORARY, latest_checkpoint, restore_replaced, write_text
from genssm.values import write_yaml

_NOT_NEGATIVE = (
    "train.lr_warmup_steps", "train.weight_decay", "train.max_grad_norm", "train.ema_decay", "train.class_dropout_prob",
    "train.layer_shuffle",
    "train.checkpoints_total_limit", "log.sample_every", "data.num_workers", "evaluate.every", "data.pack_tokens",
    "motion.pack_frames",
)  # fmt: skip
_POSITIVE_ARGUMENTS = ("in_channels", "patch_size", "hidden_size", "num_layers", "d_state", "expand", "headdim")
_POSITIVE = (
    "train.max_train_steps", "train.train_batch_size", "train.gradient_accumulation_steps", "train.learning_rate",
    "train.checkpointing_steps", "log.log_every", "log.num_samples", "log.num_inference_steps",
    "evaluate.num_inference_steps", "evaluate.batch_size", "data.multiple",
)  # fmt: skip


def check_numbers(config: RunConfig) -> None:
    """Refuse numbers outside their range."""
    for keys, low in ((_NOT_NEGATIVE, 0), (_POSITIVE, 1e-300)):
        for dotted in keys:
            value = get_value(config, dotted)
            if not (math.isfinite(value) and value >= low):
                raise ValueError(f"{dotted} is {value}; expected {'more than' if low else 'at least'} 0")
    for dotted in ("train.ema_decay", "train.class_dropout_prob", "train.layer_shuffle"):
        if get_value(config, dotted) >= 1:
            raise ValueError(f"{dotted} is {get_value(config, dotted)}; expected less than 1")
    if config.data.resolution is not None and config.data.resolution < 1:
        raise ValueError(f"data.resolution is {config.data.resolution}; expected at least 1 pixel")
    if config.train.layer_shuffle and config.train.compile:
        raise ValueError("train.layer_shuffle draws orders between compiled blocks; set train.compile=false with it")
    if config.align.encoder is not None and config.train.compile:
        raise ValueError("align.encoder watches a block from inside the model; set train.compile=false with it")
    if config.evaluate.num_samples < 2:
        raise ValueError(f"evaluate.num_samples is {config.evaluate.num_samples}; a distance needs at least 2 images")
    for name in _POSITIVE_ARGUMENTS:
        value = config.model.args.get(name)
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"model.args.{name} is {value}; expected more than 0")
    tracker = config.log.report_to
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ImportError(f"log.report_to={tracker} needs the package {tracker}; pip install genssm[track]")
    if config.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("train.mixed_precision=fp16 needs a GPU; use bf16 or no")


def check_fit(
    config: RunConfig, model: torch.nn.Module, dataset: Any, item_shape: tuple[int, ...], decodes: bool
) -> None:
    """Refuse a model, data set and settings that do not go together.

    Args:
        config: the run.
        model: the denoiser.
        dataset: the data set, with ``num_classes``.
        item_shape: shape of what the model sees, (..., C, H, W), after encoding with a VAE.
        decodes: whether samples can be turned into images.

    Raises:
        ValueError: shapes, classes or options disagree.
    """
    size = model.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if item_shape[-3] != model.config.in_channels:
        raise ValueError(
            f"the data have {item_shape[-3]} channel(s) but model.args.in_channels is {model.config.in_channels}; "
            "change it, or set data.channels"
        )
    if tuple(item_shape[-2:]) != size:
        what = "latents are" if config.data.vae or config.data.name == "latents" else "images are"
        raise ValueError(
            f"{what} {item_shape[-2]}x{item_shape[-1]} but model.args.sample_size is {size[0]}x{size[1]}; "
            "change it, or data.resolution"
        )
    frames = model.config.get("num_frames", 0)
    if (item_shape[0] if len(item_shape) == 4 else 0) != frames:
        raise ValueError(f"an item is {item_shape} but model.args.num_frames is {frames}; video items are (F, C, H, W)")
    classes, labels = model.config.get("num_classes", 0), dataset.num_classes
    if classes and not labels:
        raise ValueError(f"model.args.num_classes is {classes} but the data have no labels; set it to 0, or data.label")
    if classes and classes != labels:
        raise ValueError(f"model.args.num_classes is {classes} but the data have {labels} classes; set it to {labels}")
    has_null = getattr(model, "null_class_label", None) is not None
    if config.train.class_dropout_prob and not has_null:
        raise ValueError("train.class_dropout_prob drops labels to the null class, but the model has none; set it to 0")
    has_null_text = getattr(model, "has_null_text", False)
    if config.text.dropout_prob and not has_null_text:
        raise ValueError("text.dropout_prob drops captions to the null text, but the model has none; set it to 0")
    reads = bool(model.config.get("context_dim"))
    for section in ("log", "evaluate"):
        scale = getattr(config, section).guidance_scale
        if scale != 1 and reads and not config.text.dropout_prob:
            raise ValueError(
                f"{section}.guidance_scale={scale} needs a null text that was trained; "
                "set it to 1, or text.dropout_prob to 0.1"
            )
        if scale != 1 and not reads and not (has_null and config.train.class_dropout_prob):
            raise ValueError(
                f"{section}.guidance_scale={scale} needs a null class that was trained; "
                "set it to 1, or train.class_dropout_prob to 0.1"
            )
    for dotted in ("log.sample_every", "evaluate.every"):
        if get_value(config, dotted) and not decodes:
            raise ValueError(f"pictures of latents need a VAE; set data.vae to its folder, or {dotted}=0")


def check_cuda_graph(config: RunConfig, recordable: bool, device: torch.device, processes: int) -> None:
    """Refuse what a recorded step would get wrong, or cannot do.

    Args:
        config: the run, with ``train.cuda_graph``.
        recordable: whether the model of the task does the same for every batch.
        device: of the run.
        processes: that share a batch.

    Raises:
        ValueError: another device, several processes, or an option that changes the model from step to step.
    """
    if device.type != "cuda":
        raise ValueError(f"train.cuda_graph needs a CUDA device, and this run is on {device.type}; set it to false")
    if processes > 1:
        raise ValueError(
            f"train.cuda_graph is for one process, and {processes} share the batch: their gradients are exchanged "
            "between the operations of the backward pass; set it to false"
        )
    for dotted, off, reason in (
        ("train.layer_shuffle", 0, "draws orders anew in each step"),
        ("train.compile", False, "makes graphs of its own"),
        ("train.gradient_checkpointing", False, "sets random numbers back while a step runs"),
        ("align.encoder", None, "watches a block from inside the model"),
        ("data.pack_tokens", 0, "makes batches of many shapes"),
        ("motion.pack_frames", 0, "makes batches of many shapes"),
    ):
        if get_value(config, dotted) != off:
            raise ValueError(f"{dotted} {reason}; with train.cuda_graph set it to {write_yaml(off)}")
    if not recordable:
        raise ValueError(f"a step of model.name={config.model.name} cannot be recorded; set train.cuda_graph=false")


def check_packing(config: RunConfig) -> None:
    """Refuse what cannot be packed, and settings that packing would break.

    Raises:
        ValueError: a model, data or an option that does not go with ``data.pack_tokens`` or ``motion.pack_frames``.
    """
    motion = bool(config.motion.pack_frames)
    name = "motion.pack_frames" if motion else "data.pack_tokens"
    if motion and config.data.pack_tokens:
        raise ValueError("data.pack_tokens packs images and motion.pack_frames motions; set one of them to 0")
    if config.model.name != ("motion_mamba_frames" if motion else "zigma"):
        able = "motion_mamba_frames" if motion else "zigma"
        raise ValueError(f"model.name={config.model.name} cannot be packed; use {able}, or set {name}=0")
    if config.model.args.get("num_frames"):
        raise ValueError(f"clips of video are not packed; set model.args.num_frames=0, or {name}=0")
    for dotted, off, reason in (
        ("train.layer_shuffle", 0, "would exchange tokens of different samples"),
        ("data.cache", "none", "keeps items of one size"),
        ("align.encoder", None, "reads images of one size"),
        ("evaluate.every", 0, "measures images of one size"),
    ):
        if get_value(config, dotted) != off:
            raise ValueError(f"{dotted} {reason}; with {name} set it to {'null' if off is None else off}")


def claim_run_folder(config: RunConfig, *, write: bool = True) -> Path | None:
    """Make the run folder, or find that it continues a run; say which checkpoint to resume from.

    Args:
        config: the run.
        write: False only looks.

    Returns:
        The checkpoint to resume from, or None.

    Raises:
        ValueError: the folder holds another run.
        FileExistsError: it holds a run that was not to be resumed.
        FileNotFoundError: there is no checkpoint where ``train.resume_from_checkpoint`` says.
        PermissionError: the folder cannot be written.
    """
    run, resume = Path(config.train.output_dir), config.train.resume_from_checkpoint
    existing = run / "config.yaml"
    if write:
        restore_replaced(run)
    newest = latest_checkpoint(run)
    if existing.is_file():
        changed = differences(load_config(existing), config)
        if changed:
            raise ValueError(
                f"{run} holds a run with another configuration ({'; '.join(changed)}); "
                "choose another train.output_dir, or remove the folder"
            )
    elif run.exists() and any(not entry.name.startswith(TEMPORARY) for entry in run.iterdir()):
        raise FileExistsError(f"{run} exists and holds something else than a run; choose another train.output_dir")
    if resume == "none" and newest is not None:
        raise FileExistsError(
            f"{run} already holds {newest.name}; train.resume_from_checkpoint=latest goes on with it, "
            "or choose another train.output_dir"
        )
    if write:
        _make_folder(run, config)
    if resume in ("latest", "none"):
        return newest if resume == "latest" else None
    if not (Path(resume) / "state.pt").is_file():
        raise FileNotFoundError(f"train.resume_from_checkpoint={resume} is no checkpoint (no state.pt in it)")
    return Path(resume)


def _make_folder(run: Path, config: RunConfig) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.yaml", dump_config(config))  # first: with it the folder is a run, whatever comes then
        for folder in ("samples", "checkpoints"):
            (run / folder).mkdir(exist_ok=True)
    except OSError as error:
        raise PermissionError(f"cannot write to the run folder {run}: {error}") from None


def flat_config(config: RunConfig) -> dict[str, str | int | float | bool]:
    """Dotted key -> value, texts for what a tracker cannot show."""
    values = {dotted: get_value(config, dotted) for dotted, _ in iter_keys()}
    return {k: v if isinstance(v, str | int | float | bool) else str(v) for k, v in values.items()}
