"""What a run will need, before it runs: parameters, tokens, memory."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode


def count_parameters(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_tokens(model: nn.Module, item_shape: tuple[int, ...]) -> int:
    """Tokens that the model makes of an item (..., C, H, W)."""
    patch = getattr(model.config, "patch_size", 1)
    frames = item_shape[0] if len(item_shape) == 4 else 1
    return frames * math.prod(side // patch for side in item_shape[-2:])


def saved_for_backward(forward: Callable[[], torch.Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes that autograd keeps between a forward and a backward pass, without running either.

    Args:
        forward: returns the loss; it runs on fake tensors, which have shapes and types but no numbers.
        dtype: autocast to this type; None for none.
    """
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        owner = tensor if tensor._base is None else tensor._base
        if not isinstance(owner, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # or its storage's address could be given to another
        return tensor

    autocast = torch.autocast("cpu", dtype) if dtype is not None else contextlib.nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), autocast, hooks:
        forward()
    return sum(kept.values())


def estimate_memory(
    model: nn.Module, forward: Callable[[], torch.Tensor], *, dtype: torch.dtype | None, ema: bool, checkpointing: bool
) -> dict[str, int]:
    """Bytes that one process needs to train.

    Args:
        model: the model on the CPU.
        forward: one micro-batch through ``model``; returns the loss.
        dtype: autocast type, or None.
        ema: whether averaged weights are kept.
        checkpointing: whether blocks are recomputed; counted as what is kept plus one block.

    Returns:
        ``weights``, ``gradients``, ``optimizer``, ``ema``, ``activations`` and ``total``.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    activations = saved_for_backward(forward, dtype)
    if checkpointing:
        whole = activations
        model.enable_gradient_checkpointing()
        try:
            activations = saved_for_backward(forward, dtype)
        finally:
            model.disable_gradient_checkpointing()
        activations += whole // max(getattr(model.config, "num_layers", 1), 1)
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weights,
        "ema": weights if ema else 0,
        "activations": activations,
    }
    return parts | {"total": sum(parts.values())}


def describe_run(task: Any, shares: Any) -> str:
    """Size, length and memory of a run, before its model leaves the CPU.

    Args:
        task: :class:`genssm.tasks.Task`.
        shares: :class:`genssm.data.loading.Shares`.
    """
    config, train = task.config, task.config.train
    half = None if train.mixed_precision == "no" else torch.bfloat16  # of the same size as float16
    memory = estimate_memory(
        task.model.train(),
        lambda: task.sketch(shares.piece).mean(),
        dtype=half,
        ema=train.ema_decay > 0,
        checkpointing=train.gradient_checkpointing,
    )
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.items() if name != "total")
    seen = train.max_train_steps * train.train_batch_size
    epochs = seen / task.items_per_epoch()
    lines = {
        "model": f"{type(task.model).__name__}, {count_parameters(task.model):,} parameters",
        **task.describe(),
        "batch": f"{train.train_batch_size} = {shares.world} processes x {shares.parts} parts x {shares.piece}",
        "length": f"{train.max_train_steps:,} steps, {seen:,} {task.unit}, {epochs:.1f} epochs",
        "memory": f"about {memory['total'] / 2**20:,.0f} MiB per process ({parts})",
        **({} if train.init_from is None else {"start": f"the weights of {train.init_from}"}),
        "run folder": config.train.output_dir,
    }
    return "\n".join(f"{title:<12}{text}" for title, text in lines.items())
