"""Checkpoints: complete, written whole or not at all, and findable.

``RUN/checkpoints/step_0000200/`` holds

- ``model.safetensors``: the weights being trained;
- ``state.pt``: optimiser, schedule, loss scaler, step, seed. The order of data and every random draw are functions of
  (seed, step), so nothing else is needed to go on exactly;
- ``pipeline/``: the diffusers pipeline with the averaged weights, what ``sample.py`` and users load. The averaged
  weights of a resumed run are read back from there.

A checkpoint is written under a temporary name, flushed to the disk and renamed: a folder called ``step_*`` is complete.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

FORMAT = 1
_STEP = re.compile(r"step_(\d+)$")
_TEMPORARY = ".partial-"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(_STEP.search(checkpoint.name)[1])


def list_checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    folder = Path(run) / "checkpoints"
    found = [f for f in folder.iterdir() if f.is_dir() and _STEP.match(f.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def latest_checkpoint(run: str | Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return (list_checkpoints(run) or [None])[-1]


def resolve_pipeline(path: str | Path) -> Path:
    """The pipeline folder that ``path`` means: itself, that of a checkpoint, or that of a run's newest checkpoint.

    Raises:
        FileNotFoundError: none of these.
    """
    path = Path(path)
    newest = latest_checkpoint(path)
    for folder in (path, path / "pipeline", *([newest / "pipeline"] if newest else [])):
        if (folder / "model_index.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{path} is no pipeline folder (model_index.json), no checkpoint and no run with a complete checkpoint; "
        "train one with train.py"
    )


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder that appears under the name ``target`` complete, or not at all.

    Yields a temporary folder beside the target. When the block ends well its files are flushed to the disk and the
    folder is renamed; an older folder of that name is replaced. After an exception nothing is left.
    """
    temporary = target.with_name(f"{_TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _flush(os.path.join(folder, name))
            _flush(folder)
        if target.exists():
            outdated = target.with_name(f"{_TEMPORARY}old-{target.name}")
            shutil.rmtree(outdated, ignore_errors=True)
            os.rename(target, outdated)
            os.rename(temporary, target)
            shutil.rmtree(outdated, ignore_errors=True)
        else:
            os.rename(temporary, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: str | Path) -> None:
    if os.path.isdir(path) and os.name == "nt":
        return  # Windows has no handle on a folder to flush
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    run: str | Path, step: int, model: torch.nn.Module, state: dict[str, Any], save_pipeline: Any
) -> Path:
    """Write the checkpoint of a step.

    Args:
        run: the run folder.
        step: optimiser steps done.
        model: the trained module, without wrappers.
        state: what ``state.pt`` holds: tensors, numbers, texts, lists and dicts of these.
        save_pipeline: called with the folder to write the pipeline into.

    Returns:
        The checkpoint folder.
    """
    target = Path(run) / "checkpoints" / f"step_{step:07d}"
    with atomic_folder(target) as folder:
        save_model(model, str(folder / "model.safetensors"))
        torch.save({"format": FORMAT, "step": step, **state}, folder / "state.pt")
        save_pipeline(folder / "pipeline")
    return target


def load_checkpoint(checkpoint: str | Path, model: torch.nn.Module) -> dict[str, Any]:
    """Put the weights of a checkpoint into ``model`` and return its state.

    Raises:
        FileNotFoundError: the folder is no checkpoint.
        ValueError: written by a later version, or of another model.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "state.pt").is_file():
        raise FileNotFoundError(f"{checkpoint} is no checkpoint (no state.pt in it)")
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    if state["format"] > FORMAT:
        raise ValueError(f"{checkpoint} has format {state['format']}, this version reads up to {FORMAT}; update genssm")
    try:
        load_model(model, str(checkpoint / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} holds another model than the configuration describes: {error}") from None
    return state


def remove_old_checkpoints(run: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints (0 keeps all) and what interrupted writes have left."""
    folder = Path(run) / "checkpoints"
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for checkpoint in list_checkpoints(run)[:-keep] if keep else []:
        shutil.rmtree(checkpoint)
