"""The README.md of a saved pipeline: what it is, what made it, how to use it, what is not known about it."""

from pathlib import Path
from typing import Any

from genssm.config import RunConfig, dump_config

_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [genssm, {model}, state-space-model, mamba]
---

# {title}

{article} {model} denoiser ({parameters:,} parameters), trained with genssm {version}
on `{data}` ({items:,} items{classes}) for {step:,} steps of {batch} images ({images:,} seen).
Weights: {weights}.

```python
import torch
from genssm import {pipeline}

pipe = {pipeline}.from_pretrained("THIS_FOLDER")
images = pipe({call}generator=[torch.Generator().manual_seed(i) for i in range(4)], num_inference_steps={steps}).images
```

| | |
|---|---|
| objective | {objective}, predicts {prediction} |
| scheduler saved here | {scheduler} |
| precision in training | {precision} |
| seed | {seed} |
| versions | {versions} |

**Limits.** No evaluation is part of this file: `python -m genssm.metrics.fid` measures samples and states its protocol.
What the model makes is bounded by its data; nothing was done to filter either.
**Licence.** That of the training data and of the person who trained it; genssm sets none.

## The run

```yaml
{config}```
"""


def write_model_card(
    folder: Path,
    config: RunConfig,
    *,
    step: int,
    pipeline: Any,
    items: int,
    parameters: int,
    versions: dict[str, str],
) -> None:
    """Write ``README.md`` into a pipeline folder.

    Args:
        folder: the pipeline folder.
        config: the run.
        step: optimiser steps done.
        pipeline: what was saved.
        items: length of the training data.
        parameters: trained parameters.
        versions: versions of the packages in use.
    """
    classes = len(pipeline.config.class_names or ())
    shown = ("genssm", "torch", "diffusers", "accelerate", "triton")
    text = _CARD.format(
        title=Path(config.train.output_dir).name,
        article="A class-conditional" if classes else "An unconditional",
        model=config.model.name,
        parameters=parameters,
        version=versions["genssm"],
        data=config.data.name,
        items=items,
        classes=f", {classes} classes" if classes else "",
        step=step,
        batch=config.train.train_batch_size,
        images=step * config.train.train_batch_size,
        weights=f"exponential average, decay {config.train.ema_decay}" if config.train.ema_decay else "as trained",
        pipeline=type(pipeline).__name__,
        call="[0, 1, 2, 3], " if classes >= 4 else "[0] * 4, " if classes else "num_images=4, ",
        steps=config.log.num_inference_steps,
        objective=config.objective.name,
        prediction=config.objective.prediction_type,
        scheduler=type(pipeline.scheduler).__name__,
        precision=config.train.mixed_precision.replace("no", "float32"),
        seed=config.train.seed,
        versions=", ".join(f"{name} {versions[name]}" for name in shown if name in versions),
        config=dump_config(config),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
