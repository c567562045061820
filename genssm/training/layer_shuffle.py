"""A regulariser for models without causality: now and then a layer scans its tokens in a random order.

Stochastic layer-wise shuffle (Huang et al., 2024) moves the tokens before a layer and back after it. Here tokens never
move, so the layer is given a shuffled scan order instead, which is the same function.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

ORDERS = ("order", "frequency_order")  # arguments of blocks that are scan orders


def shuffle_layers(model: nn.Module, probability: float) -> int:
    """Let every block with a scan order replace it at random while training.

    Block l of n shuffles with the probability ``probability * l / n``: early layers keep the neighbourhoods of the
    image, late ones must not rely on them. The draws come from torch's global generator.

    Args:
        model: its blocks have an argument ``order`` (and perhaps ``frequency_order``).
        probability: of the last block, 0 to 1.

    Returns:
        Number of blocks that may shuffle.

    Raises:
        ValueError: no block of the model has a scan order.
    """
    kinds = {name for part in model.modules() for name in getattr(part, "_repeated_blocks", None) or ()}
    found = [m for m in model.modules() if kinds & {cls.__name__ for cls in type(m).__mro__}]  # a shard has a subclass
    blocks = [(block, places) for block in found if (places := _orders_of(block))]
    if not blocks:
        raise ValueError(f"no block of a {type(model).__name__} has a scan order to shuffle; set train.layer_shuffle=0")
    for depth, (block, places) in enumerate(blocks, 1):
        hook = partial(_maybe_shuffle, places=places, probability=probability * depth / len(blocks))
        block.register_forward_pre_hook(hook)
    return len(blocks)


def _orders_of(module: nn.Module) -> list[int]:
    """Places of the scan orders among the arguments of a block."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return [names.index(name) for name in ORDERS if name in names]


def _maybe_shuffle(
    block: nn.Module, arguments: tuple[Any, ...], *, places: list[int], probability: float
) -> tuple[Any, ...] | None:
    if not block.training or float(torch.rand(())) >= probability:
        return None
    shuffled = list(arguments)
    for place in places:
        order = arguments[place] if place < len(arguments) else None
        if order is not None:  # (..., N), rows over the same tokens: both directions stay each other's reverse
            new = torch.randperm(order.shape[-1]).to(order.device, order.dtype)
            shuffled[place] = new[order.long()]
    return tuple(shuffled)
