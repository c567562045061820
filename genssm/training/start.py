"""A new run that starts from the weights of another."""

import json
from pathlib import Path

from diffusers import ModelMixin

from genssm.training.checkpoint import resolve_pipeline


def start_from(model: ModelMixin, path: str | Path) -> Path:
    """Put the denoiser's weights of a run, a checkpoint or a pipeline folder into ``model``.

    Of a run these are the averaged weights of its newest checkpoint. A model that can take over weights from another
    input size (``load_resized``) does so: a high resolution starts from a low one.

    Args:
        model: denoiser of a new run.
        path: as for :func:`genssm.training.checkpoint.resolve_pipeline`.

    Returns:
        The pipeline folder.

    Raises:
        FileNotFoundError: there is no pipeline at ``path``.
        ValueError: the pipeline's denoiser is another model.
    """
    folder = resolve_pipeline(path)
    name = json.loads((folder / "denoiser" / "config.json").read_text(encoding="utf-8"))["_class_name"]
    if name != type(model).__name__:
        raise ValueError(f"{folder} holds a {name}, which a {type(model).__name__} cannot start from")
    source = type(model).from_pretrained(folder, subfolder="denoiser")
    try:
        if hasattr(model, "load_resized"):
            model.load_resized(source)
        else:
            model.load_state_dict(source.state_dict())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the run cannot start from {folder}: {error}") from None
    return folder
