"""The running average of the weights that samples are drawn with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from genssm.training.sharding import local, put


class EMA:
    """Exponential moving average of all parameters of a module.

        average <- d average + (1 - d) weights,      d = min(decay, (1 + step) / (10 + step))

    The second term (that of diffusers' ``EMAModel``) lets a young average forget the initial weights.

    Args:
        module: the module, without wrappers; its parameters stay its own.
        decay: of the average, 0 < decay < 1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay is {decay}; expected a number between 0 and 1, or 0 for no average")
        self.module, self.decay = module, decay
        self.average = [p.detach().clone() for p in module.parameters()]

    def decay_at(self, step: int) -> float:
        """The decay of the update after ``step`` optimiser steps."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step number ``step`` (from 1)."""
        weights = [local(p.detach()) for p in self.module.parameters()]
        torch._foreach_lerp_([local(a) for a in self.average], weights, 1 - self.decay_at(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged weights inside the block, its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, parameter in enumerate(self.module.parameters()):
            parameter.data, self.average[index] = self.average[index], parameter.data

    def load(self, module: nn.Module) -> None:
        """Take the parameters of ``module`` as the average."""
        with torch.no_grad():
            for average, (name, parameter) in zip(self.average, module.named_parameters(), strict=True):
                if average.shape != parameter.shape:
                    raise ValueError(f"averaged {name} is {tuple(parameter.shape)}, expected {tuple(average.shape)}")
                put(average, parameter)
