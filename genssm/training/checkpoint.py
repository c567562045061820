"""Checkpoints: complete, written whole or not at all, and findable.

``RUN/checkpoints/step_0000200/`` holds

- ``model.safetensors``: the weights being trained;
- ``state.pt``: optimiser, schedule, loss scaler, step, seed. The order of data and every random draw are functions of
  (seed, step), so nothing else is needed to go on exactly;
- ``pipeline/``: the diffusers pipeline with the averaged weights, what ``sample.py`` and users load. The averaged
  weights of a resumed run are read back from there.

A checkpoint is written under a temporary name, flushed to the disk and renamed, and renamed before it is deleted: a
folder called ``step_*`` is complete at every moment.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from genssm.errors import SaveError

FORMAT = 1
BEST = "best.json"
_STEP = re.compile(r"step_(\d+)$")
TEMPORARY = ".partial-"
_REPLACED = ".replaced-"  # the older folder while a new one of the same name takes its place


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

    ``RUN/best`` means the checkpoint of the run with the smallest distance (``evaluate.every``).

    Raises:
        FileNotFoundError: none of these.
    """
    path = Path(path)
    best = best_checkpoint(path.parent) if path.name == "best" else None
    if best is not None:
        return Path(path.parent, "checkpoints", best["checkpoint"], "pipeline")
    newest = latest_checkpoint(path)
    for folder in (path, path / "pipeline", *([newest / "pipeline"] if newest else [])):
        if (folder / "model_index.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{path} is no pipeline folder (model_index.json), no checkpoint and no run with a complete checkpoint; "
        "train one with train.py"
    )


def best_checkpoint(run: str | Path) -> dict[str, Any] | None:
    """What ``best.json`` of a run says: ``checkpoint``, ``step``, ``metric``, ``value``; None if it is not there."""
    file = Path(run) / BEST
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found if found and (Path(run) / "checkpoints" / found["checkpoint"]).is_dir() else None


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder that appears under the name ``target`` complete, or not at all.

    Yields a temporary folder beside the target. When the block ends well its files are flushed to the disk and the
    folder is renamed; an older folder of that name is replaced. After an exception nothing is left.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _flush(os.path.join(folder, name))
            _flush(folder)
        if target.exists():
            outdated = target.with_name(f"{_REPLACED}{target.name}")
            shutil.rmtree(outdated, ignore_errors=True)
            os.rename(target, outdated)
            os.rename(temporary, target)
            _remove(outdated)
        else:
            os.rename(temporary, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; an older one of that name stays until then."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def restore_replaced(run: str | Path) -> None:
    """Put back a checkpoint whose replacement was killed between taking the old folder away and naming the new one."""
    for outdated in (Path(run) / "checkpoints").glob(f"{_REPLACED}*"):
        target = outdated.with_name(outdated.name.removeprefix(_REPLACED))
        if target.exists():
            _remove(outdated)
        else:
            os.rename(outdated, target)


def _remove(folder: Path) -> None:
    """Delete a folder that is called complete: it loses its name first."""
    doomed = folder.with_name(f"{TEMPORARY}deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


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

    Raises:
        SaveError: it cannot be written, for instance because the disk is full; older checkpoints are untouched.
    """
    target = Path(run) / "checkpoints" / f"step_{step:07d}"
    try:
        with atomic_folder(target) as folder:
            save_model(model, str(folder / "model.safetensors"))
            torch.save({"format": FORMAT, "step": step, **state}, folder / "state.pt")
            save_pipeline(folder / "pipeline")
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # how torch.save fails to write
            raise
        newest = latest_checkpoint(run)
        rest = "there is no older one" if newest is None else f"{newest.name} is whole"
        raise SaveError(
            f"cannot write the checkpoint {target} (is the disk full?): {error}; {rest}. "
            "Make room and run the same command again"
        ) from error
    return target


def load_checkpoint(checkpoint: str | Path, model: torch.nn.Module, component: str = "denoiser") -> dict[str, Any]:
    """Put the weights of a checkpoint into ``model`` and return its state.

    Args:
        checkpoint: the folder.
        model: the trained module, without wrappers.
        component: the model's name in the pipeline folder.

    Raises:
        FileNotFoundError: the folder is no checkpoint.
        ValueError: a file is damaged, written by a later version, or of another model.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / "state.pt").is_file():
        raise FileNotFoundError(f"{checkpoint} is no checkpoint (no state.pt in it)")
    with readable(checkpoint, "state.pt"):
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"format", "step"} <= state.keys():
            raise EOFError("it does not say its format and step")
    if state["format"] > FORMAT:
        raise ValueError(f"{checkpoint} has format {state['format']}, this version reads up to {FORMAT}; update genssm")
    _check_config(checkpoint, model, component)
    with readable(checkpoint, "model.safetensors"):
        try:
            load_model(model, str(checkpoint / "model.safetensors"))
        except RuntimeError as error:
            raise ValueError(f"{checkpoint} holds another model than the configuration describes: {error}") from None
    return state


def _check_config(checkpoint: Path, model: torch.nn.Module, component: str) -> None:
    """Refuse weights whose shapes may fit but whose model is another one."""
    file = checkpoint / "pipeline" / component / "config.json"
    if not file.is_file() or not hasattr(model, "config"):
        return
    with readable(checkpoint, f"pipeline/{component}/config.json"):
        saved = json.loads(file.read_text(encoding="utf-8"))
    denoiser = getattr(model, "denoiser", model)  # a text encoder may be trained beside it
    ours = json.loads(json.dumps({"_class_name": type(denoiser).__name__, **denoiser.config}, default=str))
    differ = [
        f"{name}: {saved[name]!r} -> {value!r}"
        for name, value in ours.items()
        if name in saved and saved[name] != value and (name == "_class_name" or not name.startswith("_"))
    ]
    if differ:
        raise ValueError(
            f"{checkpoint} holds another model than the configuration describes ({'; '.join(differ)}); "
            "train.init_from starts a new run from its weights"
        )


@contextmanager
def readable(checkpoint: Path, file: str) -> Iterator[None]:
    """Turns the failures of reading a file of a checkpoint inside the block into a ValueError that says what to do."""
    try:
        yield
    except (
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        json.JSONDecodeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        others = [c.name for c in list_checkpoints(checkpoint.parent.parent) if c.name != checkpoint.name]
        after = f"the run then goes on from {others[-1]}" if others else "there is no other checkpoint"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{checkpoint / file} is damaged ({reason}); remove the folder {checkpoint.name}: {after}"
        ) from error


def remove_old_checkpoints(run: str | Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints (0 keeps all) and the best, and what interrupted writes left."""
    folder = Path(run) / "checkpoints"
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    best = best_checkpoint(run)
    for checkpoint in list_checkpoints(run)[:-keep] if keep else []:
        if best is None or checkpoint.name != best["checkpoint"]:
            _remove(checkpoint)
