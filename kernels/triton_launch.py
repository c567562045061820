"""Host side that the Triton implementations share: strides, devices, packed sequences. Nothing here imports Triton."""

import contextlib
import functools

import torch
from torch import Tensor


def refuse_double(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError for float64 tensors."""
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise ValueError(f"{op}: the triton backend computes in float32, got float64; use backend='chunked'")


def strides(x: Tensor | None, ndim: int = 0, directions: int | None = 1) -> tuple[int, ...]:
    """Strides in elements, zero along the dimension ``directions`` where all share one; ``ndim`` zeros for None."""
    if x is None:
        return (0,) * ndim
    return tuple(0 if dim == directions and size == 1 else x.stride(dim) for dim, size in enumerate(x.shape))


def wide(*tensors: Tensor | None) -> bool:
    """Whether an offset inside one batch row and direction needs 64 bits."""
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(x.shape[1:], x.stride()[1:])) >= 2**31
        for x in tensors
        if x is not None
    )


def named(prefix: str, dims: str, values: tuple[int, ...]) -> dict[str, int]:
    """Kernel arguments ``prefix_d`` for the letters of ``dims``."""
    return {f"{prefix}_{dim}": value for dim, value in zip(dims, values)}


def first_steps(orders: Tensor | None, cu_seqlens: Tensor | None, length: int, directions: int) -> Tensor | None:
    """First step of every packed sequence in every order, (K, S) int32, found on the device; 0 for empty sequences."""
    if cu_seqlens is None:
        return None
    sequences = cu_seqlens.shape[0] - 1
    if orders is None:
        return cu_seqlens[:-1].expand(directions, sequences).contiguous()
    steps = torch.arange(length, device=orders.device).expand(directions, length)
    sequence = sequence_of(orders, cu_seqlens).long()
    first = steps.new_full((directions, sequences), length).scatter_reduce(1, sequence, steps, "amin")
    return first.masked_fill(first == length, 0).int()


def sequence_of(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed sequence that each row belongs to, int32."""
    ends = cu_seqlens[1:].contiguous()
    return torch.bucketize(rows.int(), ends, right=True, out_int32=True).clamp(max=ends.shape[0] - 1)


@functools.cache
def _processor_count(kind: str, index: int) -> int:
    if kind == "cpu":
        return 1  # the interpreter
    properties = getattr(torch, kind).get_device_properties(index)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_eu_count


def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return _processor_count(device.type, device.index or 0)


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make that the one of the inputs."""
    return contextlib.nullcontext() if x.device.type == "cpu" else getattr(torch, x.device.type).device_of(x)
