"""A new run that starts from the weights of another."""

import json
from pathlib import Path

from diffusers import ModelMixin

from genssm.training.checkpoint import resolve_pipeline


def saved_component(cls: type[ModelMixin], pipeline: str | Path, component: str) -> ModelMixin:
    """A model in a pipeline folder.

    Args:
        cls: its class.
        pipeline: the folder.
        component: the model's name there.
    """
    return cls.from_pretrained(pipeline, subfolder=component)


def start_from(model: ModelMixin, path: str | Path, component: str = "denoiser") -> Path:
    """Put the weights of a run, a checkpoint or a pipeline folder into ``model``.

    Of a run these are the averaged weights of its newest checkpoint. A model that can take over weights from another
    input size (``load_resized``) does so: a high resolution starts from a low one.

    Args:
        model: of a new run.
        path: as for :func:`genssm.training.checkpoint.resolve_pipeline`.
        component: the model's name in the pipeline folder.

    Returns:
        The pipeline folder.

    Raises:
        FileNotFoundError: there is no pipeline at ``path``.
        ValueError: the pipeline's model is another one.
    """
    folder = resolve_pipeline(path)
    described = folder / component / "config.json"
    if not described.is_file():
        raise ValueError(f"{folder} has no {component}, which a {type(model).__name__} could start from")
    name = json.loads(described.read_text(encoding="utf-8"))["_class_name"]
    if name != type(model).__name__:
        raise ValueError(f"{folder} holds a {name}, which a {type(model).__name__} cannot start from")
    source = saved_component(type(model), folder, component)
    try:
        if hasattr(model, "load_resized"):
            model.load_resized(source)
        else:
            model.load_state_dict(source.state_dict())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the run cannot start from {folder}: {error}") from None
    return folder
