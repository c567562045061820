"""Host side that the Triton implementations share: launches, strides, devices, packed sequences.

Triton is imported only by what a launch needs.
"""

import contextlib
import functools
import operator
import os
import threading
import types
from collections.abc import Iterator

import torch
from torch import Tensor

from genssm.kernels.arguments import outer_directions

# Arguments of kernels that hold rows and sizes. They are read one by one, so their alignment must not make a binary: an
# order is a row of a table, and starts anywhere.
TABLES = ("orders", "lengths", "first_steps", "borders")


def cdiv(n: int, size: int) -> int:
    """How many pieces of ``size`` cover n. Triton's own serves kernels as well, and takes microseconds on the host."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def refuse_double(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError for float64 tensors."""
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise ValueError(f"{op}: the triton backend computes in float32, got float64; use backend='chunked'")


def strides(x: Tensor | None, ndim: int = 0, directions: int = 1) -> tuple[int, ...]:
    """Strides in elements, zero along the dimension ``directions`` where all share one; ``ndim`` zeros for None."""
    if x is None:
        return (0,) * ndim
    found = x.stride()
    return (*found[:directions], 0, *found[directions + 1 :]) if x.shape[directions] == 1 else found


def wide(*tensors: Tensor | None) -> bool:
    """Whether an offset inside one batch row and direction needs 64 bits."""
    return any(_last_offset(x.shape, x.stride(), 1 + outer_directions(x)) >= 2**31 for x in tensors if x is not None)


@functools.lru_cache(maxsize=4096)
def _last_offset(sizes: tuple[int, ...], strides: tuple[int, ...], first: int) -> int:
    """Offset of the last element from the first along the dimensions from ``first`` on."""
    return sum(map(operator.mul, sizes[first:], strides[first:])) - sum(strides[first:])


def named(prefix: str, dims: str, values: tuple[int, ...]) -> dict[str, int]:
    """Kernel arguments ``prefix_d`` for the letters of ``dims``."""
    return dict(zip(_names(prefix, dims), values))


@functools.cache
def _names(prefix: str, dims: str) -> tuple[str, ...]:
    return tuple(f"{prefix}_{dim}" for dim in dims)


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


def compiled_for_nvidia(device: str) -> bool:
    """Whether kernels become NVIDIA's binaries on a type of device; the interpreter takes tensors of any device."""
    return device == "cuda" and torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1"


def register_limit(device: torch.device, registers: int) -> dict[str, int]:
    """Option that limits the registers of a lane. Triton knows it for NVIDIA's devices; for XPUs it is an error."""
    return {} if device.type == "xpu" or torch.version.hip else {"maxnreg": registers}


_KNOWN = ((3, 6), (3, 8))  # first and last version of Triton that were tried here
_MOST = 4096  # launches of a kernel to remember


def known_triton() -> bool:
    """Whether Triton is of a version whose launches this file repeats truly, and whose Gluon is the one used here."""
    import triton

    return _KNOWN[0] <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= _KNOWN[1]


def launch(kernel, grid: tuple[int, ...], /, **arguments) -> None:
    """``kernel[grid](**arguments)``, without most of its time on the host once the same was launched before.

    Triton looks at every argument at every launch, for the binary made for its type, for pointers to multiples of 16,
    for integers that are 1, multiples of 16 or long. Here the binary is found by more than that, in one look-up: all
    types and alignments, and whatever is no tensor by its value. An argument is a tensor or None in all launches of a
    kernel, or in none.
    """
    if _compiling and compiles_only():
        _compile(kernel, grid, arguments)
        return
    triton = _triton(next(iter(arguments.values())).device.type)
    if triton is None or kernel.pre_run_hooks or any(_hooks(triton)):
        kernel[grid](**arguments)
        return
    launches = _launches.get(kernel.fn)
    if launches is None or launches.given != len(arguments):
        launches = _launches[kernel.fn] = _Launches(kernel, arguments)
    device = triton.driver.get_current_device()
    values = launches.values(arguments)
    key = [device, triton.knobs.runtime.debug, triton.knobs.compilation.instrumentation_mode, *values]
    values = list(values[: launches.parameters])
    for i in launches.tensors:
        tensor = values[i]
        if tensor is not None:
            values[i] = address = tensor.data_ptr()
            key[i + 3] = (tensor.dtype, address % 16)
    key = tuple(key)
    binary = launches.binaries.get(key)
    if binary is None:
        with _lock(kernel):
            binary = kernel[grid](**arguments)
        if binary is not None:
            launches.remember(key, binary)
        return
    binary.run(
        *grid, *(1,) * (3 - len(grid)), triton.driver.get_current_stream(device), binary.function,
        binary.packed_metadata, None, None, None, *values,
    )  # fmt: skip


class _Launches:
    """Binaries of a kernel by the arguments that they were launched with."""

    def __init__(self, kernel, arguments: dict) -> None:
        names = [*kernel.arg_names, *(name for name in arguments if name not in kernel.arg_names)]
        self.values = operator.itemgetter(*names)
        self.given, self.parameters = len(arguments), len(kernel.arg_names)
        self.tensors = [
            i
            for i, parameter in enumerate(kernel.params)
            if not parameter.is_constexpr and isinstance(arguments[parameter.name], Tensor | None)
        ]
        self.binaries = {}

    def remember(self, key: tuple, binary) -> None:
        if len(self.binaries) >= _MOST:
            self.binaries.clear()
        self.binaries[key] = binary


_launches: dict[types.FunctionType, _Launches] = {}

_compiling: set[int] = set()  # threads whose launches launch nothing
# Of each kernel: Triton lets two threads compile one twice, and launch a binary that is not loaded to the end.
_locks: dict[types.FunctionType, threading.Lock] = {}


def _lock(kernel) -> threading.Lock:
    return _locks.setdefault(kernel.fn, threading.Lock())  # one step, whatever other threads do


@contextlib.contextmanager
def only_compiling() -> Iterator[None]:
    """Inside, this thread's launches, of fake tensors, compile and load what others will launch."""
    _compiling.add(threading.get_ident())
    try:
        yield
    finally:
        _compiling.discard(threading.get_ident())


def compiles_only() -> bool:
    """Whether this thread is in `only_compiling`."""
    return threading.get_ident() in _compiling


class _Pointer:
    """What Triton looks at in a tensor. A fake one's storage begins at a multiple of 16."""

    def __init__(self, x: Tensor) -> None:
        self.dtype, self.address = x.dtype, x.storage_offset() * x.itemsize

    def data_ptr(self) -> int:
        return self.address


def _compile(kernel, grid: tuple[int, ...], arguments: dict) -> None:
    """Make the binary that `launch` would launch, and load it."""
    triton = _triton(next(iter(arguments.values())).device.type)
    if kernel.pre_run_hooks or any(_hooks(triton)):
        return  # launches are Triton's, which wait for nobody
    pointers = {name: _Pointer(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with _lock(kernel):
        binary = kernel.warmup(grid=grid, **pointers)
        if binary is not None:
            binary[grid]  # its launcher, which is not called


def repeats(device: str) -> bool:
    """Whether `launch` repeats launches on a type of device, instead of leaving all to Triton."""
    return _triton(device) is not None


@functools.cache
def _triton(device: str) -> types.SimpleNamespace | None:
    """Triton's settings and its driver, or None where launches go its own way: in the interpreter, on other devices
    than NVIDIA's, in versions that are not known."""
    if not compiled_for_nvidia(device) or not known_triton():
        return None
    from triton import knobs
    from triton.runtime import driver

    return types.SimpleNamespace(knobs=knobs, driver=driver.active)


def _hooks(triton: types.SimpleNamespace) -> tuple:
    """What wants to be called at every launch: profilers of Triton's own."""
    runtime = triton.knobs.runtime
    return tuple(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
