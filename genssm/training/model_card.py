"""The README.md of a saved pipeline: what it is, what made it, how to use it, what is not known about it."""

from pathlib import Path
from typing import Any

from genssm.config import dump_config
from genssm.training.memory import count_parameters

_CARD = """---
library_name: diffusers
pipeline_tag: {tag}
tags: [genssm, {model}, state-space-model, mamba]
---

# {title}

{subject} ({parameters:,} parameters), trained with genssm {version}
on `{data}` ({items:,} items{classes}) for {step:,} steps of {batch} {unit} ({seen:,} seen).
Weights: {weights}.

```python
import torch
from genssm import {pipeline}

pipe = {pipeline}.from_pretrained("THIS_FOLDER")
{example}
```

| | |
|---|---|
{facts}
| precision in training | {precision} |
| seed | {seed} |
| versions | {versions} |

**Limits.** No evaluation is part of this file; the commands in `genssm.metrics` measure and state their protocol.
What the model makes is bounded by its data; nothing was done to filter either.
**Licence.** That of the training data and of the person who trained it; genssm sets none.

## The run

```yaml
{config}```
"""


def write_model_card(folder: Path, task: Any, *, step: int, pipeline: Any, versions: dict[str, str]) -> None:
    """Write ``README.md`` into a pipeline folder.

    Args:
        folder: the pipeline folder.
        task: :class:`genssm.tasks.Task` of the run.
        step: optimiser steps done.
        pipeline: what was saved.
        versions: versions of the packages in use.
    """
    config, card, classes = task.config, task.card(), task.dataset.num_classes
    train = config.train
    shown = ("genssm", "torch", "diffusers", "accelerate", "triton")
    text = _CARD.format(
        tag=card.tag,
        title=Path(train.output_dir).name,
        model=config.model.name,
        subject=card.subject,
        parameters=count_parameters(task.model),
        version=versions["genssm"],
        data=config.data.name,
        items=len(task.dataset),
        classes=f", {classes} classes" if classes else "",
        step=step,
        batch=train.train_batch_size,
        unit=task.unit,
        seen=step * train.train_batch_size,
        weights=f"exponential average, decay {train.ema_decay}" if train.ema_decay else "as trained",
        pipeline=type(pipeline).__name__,
        example=card.example,
        facts="\n".join(f"| {title} | {text} |" for title, text in card.facts.items()),
        precision=train.mixed_precision.replace("no", "float32"),
        seed=train.seed,
        versions=", ".join(f"{name} {versions[name]}" for name in shown if name in versions),
        config=dump_config(config),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
