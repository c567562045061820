"""Published checkpoints to diffusers pipeline folders: ``python -m genssm.convert zigma CHECKPOINT OUT``."""

import argparse
import inspect
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from genssm.errors import cli
from genssm.models.aim import AIM_PRESETS, AiM, aim_config_from_published, convert_aim_state_dict
from genssm.models.dim import DIM_PRESETS, DiM
from genssm.models.dim_published import convert_dim_state_dict, dim_config_from_published
from genssm.models.dimsum import DIMSUM_PRESETS, DiMSUM
from genssm.models.dimsum_published import (
    DIMSUM_DEAD_KEYS,
    convert_dimsum_state_dict,
    dimsum_config_from_published,
)
from genssm.models.mld import MLD, MLD_DEAD_KEYS, MLD_PRESETS, convert_mld_state_dict, mld_config_from_published
from genssm.models.motion_mamba import (
    MOTION_MAMBA_PRESETS,
    MotionMamba,
    convert_motion_mamba_state_dict,
    motion_mamba_config_from_published,
)
from genssm.models.motion_vae import (
    MOTION_VAE_PRESETS,
    MotionVAE,
    convert_motion_vae_state_dict,
    motion_vae_config_from_published,
)
from genssm.models.vq import VQ_PRESETS, VQTokenizer, convert_vq_state_dict, vq_config_from_published
from genssm.models.zigma import ZIGMA_PRESETS, ZigMa
from genssm.models.zigma_published import convert_zigma_state_dict, zigma_config_from_published
from genssm.schedulers import FlowODEScheduler
from genssm.single_step_solver import ContinuousDPMSolverScheduler

Weights = dict[str, torch.Tensor]
Second = ModelMixin | str | Path | None  # a VAE or tokenizer beside the model, or the folder it is in


@dataclass(frozen=True)
class Published:
    """How the checkpoints of a paper's released code become ours.

    Args:
        model: our class.
        presets: constructor arguments by name.
        config: (published weights, arguments known from elsewhere) -> constructor arguments that the weights show.
        weights: published weights -> ours, under our names; differentiable.
        scheduler: makes the scheduler that the weights were trained for; None for models that need none.
        origin: where such weights come from and under which terms, for the model card.
        dead: pattern of our names of weights that the released code stores but never uses; where our model does not
            have them they are reported and left out.
        folder: what is written, a key of :data:`FOLDERS`.
        tokenizer: key of :data:`PUBLISHED` of a tokenizer whose weights may stand in the same file.
    """

    model: type[ModelMixin]
    presets: Mapping[str, Mapping[str, Any]]
    config: Callable[[Mapping[str, torch.Tensor], Mapping[str, Any]], dict[str, Any]]
    weights: Callable[[Mapping[str, torch.Tensor]], Weights]
    scheduler: Callable[[], SchedulerMixin] | None
    origin: str
    dead: str | None = None
    folder: str = "denoiser"
    tokenizer: str | None = None


# MLD's sampler: 50 steps at 981, 961, ..., 1.
_motion_scheduler = partial(
    DDIMScheduler, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    clip_sample=False, set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip

PUBLISHED = {
    "aim": Published(
        model=AiM,
        presets=AIM_PRESETS,
        config=aim_config_from_published,
        weights=convert_aim_state_dict,
        scheduler=None,
        origin="AiM (arXiv:2408.12245), weights and code by Haopeng Li et al.",
        folder="autoregressive",
        tokenizer="vq",
    ),
    "dim": Published(
        model=DiM,
        presets=DIM_PRESETS,
        config=dim_config_from_published,
        weights=convert_dim_state_dict,
        scheduler=partial(
            ContinuousDPMSolverScheduler, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        origin="DiM (arXiv:2405.14224), weights and code by Yao Teng et al.",
    ),
    "dimsum": Published(
        model=DiMSUM,
        presets=DIMSUM_PRESETS,
        config=dimsum_config_from_published,
        weights=convert_dimsum_state_dict,
        scheduler=partial(FlowODEScheduler, path="gvp", solver="heun"),
        origin="DiMSUM (arXiv:2411.04168), weights and code by VinAI Research",
        dead=DIMSUM_DEAD_KEYS,
    ),
    "mld": Published(
        model=MLD,
        presets=MLD_PRESETS,
        config=mld_config_from_published,
        weights=convert_mld_state_dict,
        scheduler=_motion_scheduler,
        origin="MLD (arXiv:2212.04048), weights and code by Xin Chen et al., MIT",
        dead=MLD_DEAD_KEYS,
        folder="motion",
    ),
    "motion_mamba": Published(
        model=MotionMamba,
        presets=MOTION_MAMBA_PRESETS,
        config=motion_mamba_config_from_published,
        weights=convert_motion_mamba_state_dict,
        scheduler=_motion_scheduler,
        origin="weights of Motion Mamba (arXiv:2403.07487) under names that go on with MLD's",
        folder="motion",
    ),
    "motion_vae": Published(
        model=MotionVAE,
        presets=MOTION_VAE_PRESETS,
        config=motion_vae_config_from_published,
        weights=convert_motion_vae_state_dict,
        scheduler=None,
        origin="the motion VAE of MLD (arXiv:2212.04048), weights and code by Xin Chen et al., MIT",
        folder="model",
    ),
    "vq": Published(
        model=VQTokenizer,
        presets=VQ_PRESETS,
        config=vq_config_from_published,
        weights=convert_vq_state_dict,
        scheduler=None,
        origin="VQ tokenizer of LlamaGen (arXiv:2406.06525), weights and code by FoundationVision, MIT",
        folder="model",
    ),
    "zigma": Published(
        model=ZigMa,
        presets=ZIGMA_PRESETS,
        config=zigma_config_from_published,
        weights=convert_zigma_state_dict,
        scheduler=FlowMatchEulerDiscreteScheduler,
        origin="ZigMa (arXiv:2403.13802), weights and code by CompVis, Apache-2.0",
    ),
}


@dataclass
class KeyReport:
    """How the keys of a checkpoint fit a model. ``dead`` ones were left out because they never had an effect."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        lines = []
        for title in ("missing", "unexpected", "reshaped"):
            keys = getattr(self, title)
            lines += [f"{title} keys: {len(keys) or 'none'}", *(f"  {key}" for key in keys)]
        if self.dead:
            lines += [f"dead keys, left out: {len(self.dead)}", *(f"  {key}" for key in self.dead)]
        return "\n".join(lines)


_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")  # of data parallelism and of torch.compile


class _Ignored:
    """Stands for every foreign class in a pickle (configurations, optimisers): takes anything, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint(path: str | Path, weights: str | None = None) -> Weights:
    """Read the weights of a published checkpoint without running any code that it contains.

    Args:
        path: a ``.safetensors`` file, or a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` pickle, flat or with the parts
            "ema", "model" or "state_dict". Objects of foreign classes beside the tensors, such as the configuration
            that training scripts store, are replaced by empty ones.
        weights: which part to take; None takes the first of these that is there.

    Returns:
        Tensors on the CPU by name, without what wrappers put in front of it (``module.``, ``_orig_mod.``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, cannot be read safely, or has no such part.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; download the published file and give its path")
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        content = _read_pickle(path)
    else:
        raise ValueError(f"{path.name} ends in {path.suffix!r}; expected .safetensors, .pt, .pth, .bin or .ckpt")
    part = _part(content, weights, path)
    return {_WRAPPERS.sub("", key): value for key, value in part.items()}


def _read_safetensors(path: Path) -> Weights:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); download it again") from error


def _read_pickle(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (RuntimeError, KeyError, IndexError, EOFError) as error:
        reason = str(error).split(". ")[0] or type(error).__name__
        raise ValueError(f"{path} is no whole checkpoint file ({reason}); download it again") from error
    except (pickle.UnpicklingError, AttributeError, TypeError) as error:
        named = f" ({', '.join(sorted(foreign))})" if foreign else ""
        raise ValueError(
            f"{path} holds objects beside its tensors that a safe read refuses{named}: {str(error).splitlines()[0]} "
            "If you trust its source, write its tensors once with the packages it came from: "
            "content = torch.load(FILE, map_location='cpu', weights_only=False); "
            "safetensors.torch.save_file(content['ema'], 'weights.safetensors'); then convert weights.safetensors"
        ) from error


def _part(content: Any, weights: str | None, path: Path) -> Weights:
    """The named part of a checkpoint, or the best one."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if tensors and weights is None:
        return tensors
    parts = [weights] if weights else ["ema", "model", "state_dict"]
    for name in parts:
        part = content.get(name)
        if isinstance(part, Mapping) and part:
            return {key: value for key, value in part.items() if isinstance(value, torch.Tensor)}
    raise ValueError(
        f"{path} has no part {' or '.join(map(repr, parts))}; it holds {', '.join(map(str, content))}"[:500]
    )


def resolve_config(name: str, state_dict: Weights, given: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments from what the tensors show and what is given; the two may not contradict each other.

    Args:
        name: key of :data:`PUBLISHED`.
        state_dict: published weights.
        given: constructor arguments from a preset or the user.

    Raises:
        ValueError: an argument is unknown, missing, or differs from what the tensors show, or a tensor is missing.
    """
    published = PUBLISHED[name]
    known = set(inspect.signature(published.model.__init__).parameters) - {"self"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{published.model.__name__} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    try:
        shown = published.config(state_dict, given)
    except KeyError as error:
        raise ValueError(
            f"the checkpoint has no {error.args[0]}, from which the size of a {published.model.__name__} is read; "
            "it is not complete, or of another model"
        ) from None
    for key, value in shown.items():
        if key in given and given[key] != value:
            raise ValueError(f"{key} is {value!r} in the checkpoint but {given[key]!r} was given; leave it out")
    return {**given, **shown}


def load_published(
    name: str, state_dict: Weights, given: Mapping[str, Any] | None = None
) -> tuple[ModelMixin, KeyReport]:
    """Build our model and load published weights into it.

    Args:
        name: key of :data:`PUBLISHED`.
        state_dict: published weights, as :func:`read_checkpoint` returns them.
        given: constructor arguments that the weights do not show (see the model's ``*_config_from_published``).

    Returns:
        The model in evaluation mode, and how the keys fitted; what did not fit keeps its initial value.

    Raises:
        ValueError: see :func:`resolve_config`.
    """
    published = PUBLISHED[name]
    model = published.model(**resolve_config(name, state_dict, given or {}))
    ours, weights = model.state_dict(), published.weights(state_dict)
    dead = [key for key in weights if published.dead and key not in ours and re.search(published.dead, key)]
    weights = {key: value for key, value in weights.items() if key not in dead}
    report = KeyReport(
        dead=dead,
        missing=[key for key in ours if key not in weights],
        unexpected=[key for key in weights if key not in ours],
        reshaped=[
            f"{key}: {tuple(value.shape)} in the checkpoint, {tuple(ours[key].shape)} in the model"
            for key, value in weights.items()
            if key in ours and value.shape != ours[key].shape
        ],
    )
    fitting = {k: v for k, v in weights.items() if k in ours and v.shape == ours[k].shape}
    model.load_state_dict(fitting, strict=False)
    return model.eval(), report


def write_pipeline(
    name: str,
    model: ModelMixin,
    out: str | Path,
    vae: Second = None,
    text_encoder: str | None = None,
    statistics: str | Path | None = None,
) -> None:
    """Write a diffusers folder in one step: it appears complete under its name, or not at all.

    Class-conditional and unconditional image models become a :class:`ClassConditionalImagePipeline`, models that read
    text a :class:`TextToImagePipeline` and models of video a :class:`VideoPipeline`; these two read padding tokens too,
    as the released code does. AiM becomes an :class:`AutoregressiveImagePipeline`; a tokenizer of images and a motion
    VAE are written as a model's folder. Denoisers of motion become a :class:`TextToMotionPipeline` with the statistics
    of their features, which no checkpoint holds; without these, the folders ``denoiser/`` and ``scheduler/``.

    Args:
        name: key of :data:`PUBLISHED`.
        model: the model.
        out: folder to write; must not exist.
        vae: VAE or tokenizer to put in, or its folder.
        text_encoder: text encoder to put in, see :func:`genssm.text.load_frozen_encoder`; without one, calls give
            embeddings.
        statistics: of motion: the data set's folder, with Mean.npy and Std.npy.

    Raises:
        FileExistsError: ``out`` exists.
        ValueError: a text encoder for a model that reads no text, or AiM without a tokenizer.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; give a new folder, nothing is overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        published = PUBLISHED[name]
        if statistics is not None:
            _save_motion_pipeline(published, model, partial, vae, text_encoder, Path(statistics))
        else:
            FOLDERS[published.folder](published, model, partial, vae, text_encoder)
        _write_card(published, model, partial)
        partial.chmod(0o755)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _save_denoiser(
    published: Published, model: ModelMixin, folder: Path, vae: Second, text_encoder: str | None
) -> None:
    from diffusers import AutoModel

    from genssm.pipelines import ClassConditionalImagePipeline, TextToImagePipeline, VideoPipeline
    from genssm.text import load_frozen_encoder

    vae = AutoModel.from_pretrained(vae) if isinstance(vae, str | Path) else vae
    parts: dict[str, Any] = {"vae": vae}
    reads, video = bool(model.config.get("context_dim")), bool(model.config.get("num_frames"))
    if text_encoder is not None:
        if not reads:
            raise ValueError("--text-encoder is for models that read text, and this one has none (context_dim is 0)")
        parts["tokenizer"], parts["text_encoder"] = load_frozen_encoder(text_encoder)
    if reads:
        parts["read_padding"] = True
    kind = VideoPipeline if video else TextToImagePipeline if reads else ClassConditionalImagePipeline
    kind(denoiser=model, scheduler=published.scheduler(), **parts).save_pretrained(folder)


def _save_autoregressive(
    published: Published, model: ModelMixin, folder: Path, vae: Second, text_encoder: str | None
) -> None:
    from genssm.pipelines import AutoregressiveImagePipeline

    _refuse_text_encoder(text_encoder)
    if vae is None:
        raise ValueError(
            "the checkpoint holds no tokenizer (vqvae.*); convert one with 'vq' and give its folder: --vae"
        )
    vae = VQTokenizer.from_pretrained(vae) if isinstance(vae, str | Path) else vae
    AutoregressiveImagePipeline(model=model, vqvae=vae).save_pretrained(folder)


def _save_model(published: Published, model: ModelMixin, folder: Path, vae: Second, text_encoder: str | None) -> None:
    _refuse_text_encoder(text_encoder)
    if vae is not None:
        raise ValueError("--vae is given but a tokenizer is written alone; leave it out")
    model.save_pretrained(folder)


def _save_motion(published: Published, model: ModelMixin, folder: Path, vae: Second, text_encoder: str | None) -> None:
    if vae is not None or text_encoder is not None:
        raise ValueError("a pipeline of motion also needs the statistics of its features; give --statistics")
    model.save_pretrained(folder / "denoiser")
    published.scheduler().save_pretrained(folder / "scheduler")


def _save_motion_pipeline(
    published: Published, model: ModelMixin, folder: Path, vae: Second, text_encoder: str | None, statistics: Path
) -> None:
    from genssm.motion import FeatureStatistics, skeleton_of_features
    from genssm.pipelines import TextToMotionPipeline
    from genssm.pipelines.motion_conditions import load_motion_text

    if published.folder != "motion":
        raise ValueError("--statistics are for denoisers of motion; leave them out")
    if (vae is None) != bool(model.config.get("in_channels")):
        raise ValueError("a denoiser of latents needs --vae, a converted motion VAE, and one of frames has none")
    numbers = FeatureStatistics.load(statistics / "Mean.npy", statistics / "Std.npy")
    parts: dict[str, Any] = {"vae": MotionVAE.from_pretrained(vae) if isinstance(vae, str | Path) else vae}
    if text_encoder is not None:
        parts["tokenizer"], parts["text_encoder"] = load_motion_text(text_encoder, None, "pooled")
    TextToMotionPipeline(
        denoiser=model, scheduler=published.scheduler(), mean=numbers.mean.tolist(), std=numbers.std.tolist(),
        skeleton=skeleton_of_features(len(numbers.mean)).name, max_frames=196, **parts,
    ).save_pretrained(folder)  # fmt: skip


def _refuse_text_encoder(text_encoder: str | None) -> None:
    if text_encoder is not None:
        raise ValueError("--text-encoder is for models that read text, and this one reads none; leave it out")


FOLDERS: dict[str, Callable[[Published, ModelMixin, Path, Second, str | None], None]] = {
    "denoiser": _save_denoiser,
    "autoregressive": _save_autoregressive,
    "model": _save_model,
    "motion": _save_motion,
}


def _write_card(published: Published, model: ModelMixin, folder: Path) -> None:
    (folder / "README.md").write_text(
        f"# Converted weights\n\nFrom: {published.origin}.\nThe terms of the source apply to these weights.\n"
        f"Model: `{type(model).__name__}`, {sum(p.numel() for p in model.parameters()):,} parameters.\n"
    )


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Constructor arguments from ``--preset`` and ``--config``."""
    presets = PUBLISHED[args.model].presets
    if args.preset is not None and args.preset not in presets:
        raise ValueError(f"no preset {args.preset!r} of {args.model}; there are {', '.join(presets)}")
    given = dict(presets[args.preset]) if args.preset else {}
    if args.config is None:
        return given
    inline = args.config.lstrip().startswith("{")
    if not inline and not Path(args.config).is_file():
        raise FileNotFoundError(f"no configuration at {args.config}; give a JSON file or an inline object")
    try:
        config = json.loads(args.config if inline else Path(args.config).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--config is not JSON: {error}") from error
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    return {**given, **config}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m genssm.convert",
        description="Convert a published checkpoint to a diffusers pipeline folder. Sizes are read off the tensors; "
        "what they do not show (the scan order, the input size of a model without positions) comes from --preset or "
        "--config. No code in the checkpoint is run.",
        epilog="example: python -m genssm.convert zigma churches256_0280000.pt zigma-churches --preset zigzag8_b1_pe2",
    )
    parser.add_argument("model", choices=sorted(PUBLISHED), help="which paper's code wrote the checkpoint")
    parser.add_argument("checkpoint", help=".safetensors, or .pt, .pth, .bin, .ckpt (read with weights_only)")
    parser.add_argument("out", help="pipeline folder to write; must not exist")
    parser.add_argument("--preset", help="named configuration, a key of the model's presets")
    parser.add_argument(
        "--config", help="constructor arguments: a JSON file or an inline JSON object; adds to --preset"
    )
    parser.add_argument(
        "--weights",
        choices=["ema", "model", "state_dict"],
        help="part of a nested checkpoint; by default the first of these that is there",
    )
    parser.add_argument("--vae", help="folder of a diffusers VAE, or of a tokenizer, to put into the pipeline")
    parser.add_argument("--text-encoder", help="folder or Hub name of the text encoder (ZigMa: CLIP ViT-L/14)")
    parser.add_argument("--statistics", help="motion: folder with Mean.npy and Std.npy, to write a whole pipeline")
    parser.add_argument("--allow-missing", action="store_true", help="write even if keys do not fit")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the converter; returns 1 when keys did not fit and nothing was written."""
    args = parse_args(arguments)
    if Path(args.out).exists():
        raise FileExistsError(f"{args.out} exists; give a new folder, nothing is overwritten")
    state_dict = read_checkpoint(args.checkpoint, args.weights)
    model, report = load_published(args.model, state_dict, _given(args))
    print(report)
    complete, vae, tokenizer = report.complete, args.vae, PUBLISHED[args.model].tokenizer
    if tokenizer and vae is None and any(key.startswith("vqvae.") for key in state_dict):
        vae, report = load_published(tokenizer, state_dict)
        print(f"tokenizer: {report}")
        complete = complete and report.complete
    if not complete and not args.allow_missing:
        print("nothing written: the checkpoint does not fit this configuration (--allow-missing writes anyway)")
        return 1
    write_pipeline(args.model, model, args.out, vae, args.text_encoder, args.statistics)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {args.out}")
    return 0


if __name__ == "__main__":
    cli(main)
