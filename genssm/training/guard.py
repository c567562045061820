"""When a number stops being one: find the first module that made it so."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class NonFiniteError(ValueError):
    """A loss or gradient is infinite or not a number; the message names where it began."""


def _bad(value: Any) -> bool:
    """Whether any tensor in ``value`` (a tensor, or a nest of tuples, lists and dicts) holds a non-finite number."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and not bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        value = value.values()
    return isinstance(value, list | tuple | type({}.values())) and any(_bad(v) for v in value)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def explain_nonfinite(
    model: nn.Module, batch: dict[str, torch.Tensor], replay: Callable[[], torch.Tensor]
) -> str | None:
    """Run a step again with a watch on every module and say where the first non-finite number appears.

    Args:
        model: the module, without wrappers, with the weights of the failed step.
        batch: the step's input.
        replay: runs the step's forward pass through ``model`` and returns the loss.

    Returns:
        One sentence: the input, a parameter, a module's output, the loss, or a gradient. None if all was finite.
    """
    for name, value in batch.items():
        if _bad(value):
            return f"the data are not finite: {name}"
    for name, parameter in model.named_parameters():
        if _bad(parameter.detach()):
            return f"the parameter {name} is already not finite"
    found: list[str] = []
    handles = []

    def watch(name: str, kind: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not found and _bad(output):
                state = "although its inputs are finite" if not _bad(inputs) else "its inputs are already not finite"
                found.append(f"the output of {name} ({kind}) is not finite, {state}")
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: note(name, kind, gradient))

        return hook

    def note(name: str, kind: str, gradient: torch.Tensor) -> None:
        if not found and _bad(gradient):
            found.append(f"the gradient arriving at the output of {name} ({kind}) is not finite")

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(name or "the model", type(module).__name__)))
    try:
        model.zero_grad(set_to_none=True)
        loss = replay()
        if not found and _bad(loss.detach()):
            found.append("the loss is not finite although the model's output is")
        if not found:
            loss.backward()
        if not found:
            broken = [n for n, p in model.named_parameters() if p.grad is not None and _bad(p.grad)]
            found += [f"the gradient of {broken[0]} is not finite (and {len(broken) - 1} others)"] if broken else []
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return found[0] if found else None
