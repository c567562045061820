"""Kernels of the backward pass, compiled by other threads while the first forward pass runs.

A process that trains for the first time spends seconds in Triton's compiler, in the forward pass and again in the
backward pass. Half of that time does not hold the interpreter's lock: passes of MLIR, the assembler, a C compiler for
the code that launches. So a call that will be differentiated starts a thread that walks through the backward pass on
tensors without numbers, and compiles and loads what that would launch. Such threads are an offer: whoever launches a
kernel waits for a thread that is at work on it, or does the work. What fails in a thread is met again by the launch.
Python 3.12 or newer.
"""

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from genssm.kernels import triton_launch

# Older ones may collect garbage inside of `ast.parse`, switch threads there, and fail in whichever thread parses then.
_PARSES_IN_THREADS = sys.version_info >= (3, 12)
_MOST = 32  # kinds of calls of an op, where no backward pass ever comes
_slots = threading.Semaphore(4)  # threads at work: they share one interpreter


class _Like(NamedTuple):
    """What a kernel's host code and Triton may look at in a tensor; not the tensor, whose memory would stay."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    past: int  # the last multiple of 16, in bytes

    @classmethod
    def of(cls, x: Tensor) -> "_Like":
        return cls(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)

    def fake(self) -> Tensor:
        """Such a tensor without numbers; its storage begins at a multiple of 16, as all that PyTorch allocates."""
        first = self.past // self.dtype.itemsize
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.stride)) if 0 not in self.shape else 0
        return torch.empty(first + size, dtype=self.dtype, device=self.device).as_strided(
            self.shape, self.stride, first
        )


class _Context(FunctionCtx):
    """What a rule knows of the forward pass."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return self.to_save


class Ahead:
    """Called with the arguments of an op before it computes: compiles its backward pass, once for calls alike.

    Args:
        name: of the op.
        op: with a rule for fake tensors.
        backward, setup_context: as of `torch.library.custom_op`.
        differentiated: the number of its results, the first ones, that usually have gradients; empty ones have none.
    """

    def __init__(
        self, name: str, op: Callable, backward: Callable, setup_context: Callable, differentiated: int
    ) -> None:
        self.name, self.op, self.backward, self.setup_context = name, op, backward, setup_context
        self.differentiated = differentiated
        self.seen: set[tuple] = set()

    def __call__(self, args: tuple, needs_input_grad: tuple[bool, ...]) -> None:
        device = next(x for x in args if isinstance(x, Tensor)).device
        # The only strings are names of implementations.
        others = any(isinstance(x, str) and x != "triton" for x in args)
        if others or not _PARSES_IN_THREADS or not triton_launch.repeats(device.type):
            return
        call = tuple(_Like.of(x) if isinstance(x, Tensor) else x for x in args), needs_input_grad
        if call not in self.seen and len(self.seen) < _MOST:
            self.seen.add(call)
            # Not a daemon, which would be torn out of the compiler when the process ends.
            threading.Thread(target=self._work, args=call, name=f"ahead of {self.name}").start()

    def _work(self, args: tuple, needs_input_grad: tuple[bool, ...]) -> None:
        with _slots:
            if threading.main_thread().is_alive():
                with triton_launch.only_compiling(), contextlib.suppress(Exception):
                    self._compile(args, needs_input_grad)

    def _compile(self, args: tuple, needs_input_grad: tuple[bool, ...]) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with torch.no_grad(), FakeTensorMode(allow_fallback_kernels=False):
            inputs: tuple[Any, ...] = tuple(x.fake() if isinstance(x, _Like) else x for x in args)
            output = self.op(*inputs)
            context = _Context(needs_input_grad)
            self.setup_context(context, inputs, output)
            results = output if isinstance(output, tuple) else (output,)
            given = [i < self.differentiated and x.numel() > 0 for i, x in enumerate(results)]
            self.backward(context, *(torch.empty_like(x) if has else None for x, has in zip(results, given)))
