"""Loading a pipeline folder for a command line, where a damaged folder is the user's news and not a fault of ours."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError


def load_pipeline(folder: str | Path, **options: Any) -> DiffusionPipeline:
    """The pipeline in a folder.

    Args:
        folder: with ``model_index.json``.
        options: further arguments of ``DiffusionPipeline.from_pretrained``, such as ``dtype``.

    Raises:
        ValueError: a part of the folder is missing or cannot be read.
    """
    try:
        return DiffusionPipeline.from_pretrained(str(folder), **options)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the pipeline in {folder} is damaged or incomplete: {reason}") from error
