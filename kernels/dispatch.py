"""Which implementation of an op runs, and why: the only place that knows.

``auto`` takes Triton for tensors on a device that Triton can launch on and the chunked PyTorch path everywhere else.
The environment variable ``GENSSM_BACKEND`` replaces ``auto``. A choice that is written down (argument or variable) and
cannot run is refused with the reason; nothing falls back silently.

    backend     runs on                             what it is
    reference   any device                          plain loop over time, autograd; the definition
    chunked     any device                          pure PyTorch, hand-written backward
    compiled    CPU, float32 arithmetic; not ssd    C, built once into the user's cache; needs a C compiler
    triton      CUDA, ROCm, XPU; float32 arithmetic Triton kernels
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

BACKENDS = ("reference", "chunked", "compiled", "triton")
VARIABLE = "GENSSM_BACKEND"
_NOT_IN_C = ("ssd",)  # matrix products, which PyTorch leaves little to win on

logger = logging.getLogger("genssm")
_said: set[tuple[str, ...]] = set()


def resolve(op: str, backend: str, tensor: Tensor) -> str:
    """Name of the backend that runs ``op`` on ``tensor``.

    Args:
        op: name of the op, for messages.
        backend: "auto" or one of `BACKENDS`.
        tensor: the op's main input; its device and dtype decide.
    Returns:
        One of `BACKENDS`.
    Raises:
        ValueError: unknown name, or a backend that cannot run on this tensor.
    """
    return _resolve(op, backend, tensor.device.type, tensor.device.index or 0, tensor.dtype == torch.float64)


# A constant to torch.compile: chosen while tracing, so neither logging nor the environment breaks the graph.
@torch.compiler.assume_constant_result
def _resolve(op: str, backend: str, device: str, index: int, double: bool) -> str:
    requested = backend
    source = f"backend={backend!r}"
    if backend == "auto":
        requested = os.environ.get(VARIABLE, "auto") or "auto"
        source = f"{VARIABLE}={requested}"
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"{op}: unknown {source}; choose one of auto, {', '.join(BACKENDS)}")
    if requested == "auto":
        on_host = device in ("cpu", "meta")
        reason = None if on_host else why_not("triton", device, index, double, op)
        chosen = "chunked" if on_host or reason else "triton"
        if reason:
            _say(logging.WARNING, op, f"{op}: slow PyTorch path on {device}, because {reason}", chosen, device)
            return chosen
    else:
        chosen = requested
        reason = why_not(chosen, device, index, double, op)
        impossible = double or op in _NOT_IN_C
        if chosen == "compiled" and impossible and device == "cpu" and backend == "auto":
            chosen, reason = "chunked", None  # the variable states a preference for a whole process, not for one call
        if reason:
            remedy = f"unset {VARIABLE}" if backend == "auto" else "use backend='auto'"
            raise ValueError(f"{op}: {source} is not possible: {reason}; {remedy}")
    _say(logging.INFO, op, f"{op}: backend {chosen} on {device}", chosen, device)
    return chosen


def why_not(backend: str, device: str, index: int = 0, double: bool = False, op: str | None = None) -> str | None:
    """Why ``backend`` cannot run on a device, or None when it can.

    Args:
        backend: one of `BACKENDS`.
        device: type of the device, such as "cpu" or "cuda".
        index: which device of that type.
        double: whether the inputs are float64.
        op: for which op; None asks about the device alone.
    """
    if backend == "triton":
        return _why_not_triton(device, index, double)
    if backend == "compiled":
        if device != "cpu":
            return f"the compiled backend needs CPU tensors, got {device}"
        if op in _NOT_IN_C:
            return f"{op} has no compiled backend, only reference, chunked and triton"
        if double:
            return "the compiled backend computes in float32, got float64 inputs"
        from genssm.kernels import native

        return native.why_not()
    return None


def _why_not_triton(device: str, index: int, double: bool) -> str | None:
    if not _has_triton():
        return "triton is not installed (pip install triton; it exists for Linux)"
    if double:
        return "the Triton kernels compute in float32, got float64 inputs"
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "triton needs a CUDA, ROCm or XPU tensor, got cpu (TRITON_INTERPRET=1 interprets kernels, slowly)"
    if device not in ("cuda", "xpu"):
        return f"triton needs a CUDA, ROCm or XPU tensor, got {device}"
    if device == "cuda" and torch.version.hip is None:
        capability = _capability(index)
        if capability < (7, 0):
            return f"triton needs compute capability 7.0 or newer, device {index} has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _say(level: int, op: str, message: str, *key: str) -> None:
    """Log a message the first time its key is seen."""
    if (op, *key) not in _said:
        _said.add((op, *key))
        logger.log(level, message)
