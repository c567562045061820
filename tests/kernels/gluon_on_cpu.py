"""Gluon kernels on the CPU, which Triton's interpreter does not run: their Python code with numpy in Gluon's place.

Every lane is an element, so layouts mean nothing here; what a kernel does with lanes (exchanges by number) is kept.
Addresses are real ones: an access outside of the tensors of a launch, or two lanes storing to one place, is an error.
Shared memory begins as NaN, and with the largest integer.
"""

import builtins
import ctypes
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor


class Type:
    def __init__(self, name: str, held: type) -> None:
        self.name, self.held = name, np.dtype(held)
        self.primitive_bitwidth = 8 * self.held.itemsize
        self.unset = np.iinfo(held).max if np.issubdtype(held, np.integer) else np.nan


TYPES = {name: Type(name, getattr(np, name)) for name in ("float32", "float16", "int16", "int32", "int64")}
TYPES["bfloat16"], TYPES["int1"] = Type("bfloat16", np.uint16), Type("int1", np.bool_)


class Pointer:
    def __init__(self, element_ty: Type) -> None:
        self.element_ty = element_ty


class Value:
    """A tensor or a scalar of a kernel: numbers, or addresses with a pointer's type."""

    type = types.SimpleNamespace(layout=None)

    def __init__(self, x, dtype: Type | Pointer | None = None) -> None:
        self.x, self.dtype = np.asarray(x), dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    def __getitem__(self, index) -> "Value":
        return Value(self.x[index], self.dtype)

    def __index__(self) -> int:
        return int(self.x)

    def __bool__(self) -> bool:
        return bool(self.x)

    def __add__(self, other) -> "Value":
        if isinstance(self.dtype, Pointer):
            size = self.dtype.element_ty.primitive_bitwidth // 8
            return Value(self.x + _numbers(other).astype(np.int64) * size, self.dtype)
        return _apply(np.add, self, other)

    def to(self, dtype: Type | Pointer, bitcast: bool = False) -> "Value":
        if isinstance(dtype, Pointer) or isinstance(self.dtype, Pointer):
            return Value(self.x, dtype if isinstance(dtype, Pointer) else None)
        if bitcast:
            return Value(self.x.view(dtype.held), dtype if dtype.name in ("bfloat16", "float16") else None)
        if dtype.name == "bfloat16":  # the nearest, of two the even one
            bits = self.x.astype(np.float32).view(np.uint32).astype(np.uint64)
            return Value(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), dtype)
        if isinstance(self.dtype, Type) and self.dtype.name == "bfloat16":
            return Value((self.x.astype(np.uint32) << 16).view(np.float32))
        return Value(self.x.astype(dtype.held), dtype if dtype.name == "float16" else None)


def _numbers(x) -> np.ndarray:
    return x.x if isinstance(x, Value) else np.float32(x) if isinstance(x, float) else np.asarray(x)


def _apply(function: Callable, *values) -> Value:
    plain = [int(x) if isinstance(x, int) else _numbers(x) for x in values]  # Python's integers take numpy's types
    with np.errstate(all="ignore"):
        return Value(function(*plain))


for _name, _function in {
    "mul": np.multiply, "sub": np.subtract, "floordiv": np.floor_divide, "mod": np.mod, "and": np.bitwise_and,
    "xor": np.bitwise_xor, "rshift": np.right_shift, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}.items():  # fmt: skip
    setattr(Value, f"__{_name}__", lambda self, other, f=_function: _apply(f, self, other))
    setattr(Value, f"__r{_name}__", lambda self, other, f=_function: _apply(f, other, self))
Value.__radd__ = Value.__add__


class Shared:
    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers, self.shape = numbers, numbers.shape

    def index(self, i) -> "Shared":
        assert 0 <= int(i) < len(self.numbers)
        return Shared(self.numbers[int(i)])

    def slice(self, start: int, length: int) -> "Shared":
        assert start >= 0 and start + length <= len(self.numbers)
        return Shared(self.numbers[start : start + length])

    def store(self, value: Value) -> None:
        self.numbers[...] = value.x

    def load(self, layout) -> Value:
        return Value(self.numbers.copy())


class Memory:
    """The tensors of a launch."""

    def __init__(self) -> None:
        self.ranges = []

    def pointer(self, tensor: Tensor) -> Value:
        storage = tensor.untyped_storage()
        self.ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        element = TYPES[str(tensor.dtype).removeprefix("torch.")]
        return Value(np.int64(tensor.data_ptr()), Pointer(element))

    def _places(self, pointers: Value, mask) -> list[tuple[tuple[int, ...], int]]:
        size = pointers.dtype.element_ty.held.itemsize
        wanted = np.broadcast_to(True if mask is None else _numbers(mask), pointers.shape)
        places = [(i, int(pointers.x[i])) for i in np.ndindex(pointers.shape) if wanted[i]]
        for _, place in places:
            assert any(low <= place <= high - size for low, high in self.ranges), "outside of all tensors"
        return places

    def load(self, pointers: Value, mask=None, other: float = 0.0) -> Value:
        element = pointers.dtype.element_ty
        found = np.full(pointers.shape, other).astype(element.held)
        for i, place in self._places(pointers, mask):
            found[i] = np.frombuffer(ctypes.string_at(place, element.held.itemsize), element.held)[0]
        return Value(found, element if element.name in ("bfloat16", "float16") else None)

    def store(self, pointers: Value, value: Value, mask=None) -> None:
        element, places = pointers.dtype.element_ty, self._places(pointers, mask)
        assert len({place for _, place in places}) == len(places), "two lanes store to one place"
        numbers = np.broadcast_to(value.x.astype(element.held), pointers.shape)
        for i, place in places:
            ctypes.memmove(place, numbers[i].tobytes(), element.held.itemsize)


def assembly(text: str, constraints: str, args: list, dtype: Type, is_pure: bool, pack: int) -> Value:
    """The instructions that the kernels use."""
    x = args[0]
    lanes = np.arange(x.shape[0]) if x.shape else None
    if "prefetch" in text:
        return Value(np.zeros(x.shape, np.int32))
    if text.startswith("mov") or "and.b32" in text:
        return x
    if text.startswith("cvt.u32.u16"):
        return Value(x.x.view(np.uint16).astype(np.int32))
    if "mul.wide" in text:
        return Value(args[2].x + x.x.astype(np.int64) * _numbers(args[1]).astype(np.int64))
    if "rcp" in text:
        return Value(np.float32(1) / x.x)
    if "shfl.sync.idx" in text:
        return Value(x.x[(lanes & ~31) + (np.broadcast_to(_numbers(args[1]), x.shape) & 31)])
    assert "shfl.sync.bfly" in text
    if pack > 1:
        return Value(np.stack([x.x[lanes ^ i, i] for i in range(pack)], 1))
    return Value(x.x[lanes ^ int(args[1])])


def _language(memory: Memory, state: types.SimpleNamespace) -> types.ModuleType:
    gl = types.ModuleType("triton.experimental.gluon.language")

    def where(condition, x, y) -> Value:
        return Value(np.where(_numbers(condition), _numbers(x), _numbers(y)).astype(_numbers(x).dtype))

    def static_assert(condition: bool) -> None:
        assert condition

    vars(gl).update(
        **TYPES,
        constexpr=lambda x: x,
        pointer_type=Pointer,
        **dict.fromkeys(("BlockedLayout", "SliceLayout", "SwizzledSharedLayout"), lambda *sizes: None),
        arange=lambda low, high, layout=None: Value(np.arange(low, high, dtype=np.int32)),
        full=lambda shape, value, dtype, layout=None: Value(np.full(shape, value, dtype.held)),
        where=where,
        minimum=lambda x, y: _apply(np.minimum, x, y),
        maximum=lambda x, y: _apply(np.maximum, x, y),
        exp2=lambda x: _apply(np.exp2, x),
        abs=lambda x: _apply(np.abs, x),
        cdiv=lambda x, y: Value(-(-_numbers(x) // _numbers(y))),
        sum=lambda x, axis: Value(x.x.sum(axis, dtype=x.x.dtype)),
        broadcast=lambda x, y: tuple(Value(part.copy()) for part in np.broadcast_arrays(x.x, y.x)),
        join=lambda x, y: Value(np.stack([x.x, y.x], -1)),
        split=lambda x: (Value(x.x[..., 0]), Value(x.x[..., 1])),
        reshape=lambda x, shape: Value(x.x.reshape(shape)),
        permute=lambda x, order: Value(x.x.transpose(order)),
        convert_layout=lambda x, layout: x,
        program_id=lambda axis: Value(np.int32(state.program)),
        static_range=builtins.range,
        static_assert=static_assert,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(np.full(shape, dtype.unset, dtype.held)),
        load=memory.load,
        store=memory.store,
        inline_asm_elementwise=assembly,
    )
    return gl


class Kernel:
    """A kernel of the last of some modules, to be launched with arguments by name."""

    def __init__(self, name: str, *modules: str) -> None:
        self.memory, self.state = Memory(), types.SimpleNamespace(program=0)
        gluon = types.ModuleType("triton.experimental.gluon")
        gluon.language = _language(self.memory, self.state)
        gluon.jit = lambda function=None, **options: function or (lambda given: given)
        with pytest.MonkeyPatch.context() as patch:
            import triton.experimental.gluon

            patch.setattr(triton.experimental, "gluon", gluon)
            patch.setitem(sys.modules, "triton.experimental.gluon", gluon)
            patch.setitem(sys.modules, "triton.experimental.gluon.language", gluon.language)
            for module in modules:
                source = Path(importlib.util.find_spec(module).origin)
                made = types.ModuleType(module)
                made.range = lambda *ends: (Value(np.int32(i)) for i in range(*map(int, ends)))
                exec(compile(source.read_text(), str(source), "exec"), vars(made))  # whose imports find the above
                patch.setitem(sys.modules, module, made)
        self.function = vars(made)[name]
        self.parameters = set(inspect.signature(self.function).parameters)

    def launch(self, grid: tuple[int, ...], arguments: dict) -> None:
        self.memory.ranges.clear()
        given = {}
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                x = self.memory.pointer(x)
            elif isinstance(x, int) and not name.isupper():
                x = Value(np.int32(x))
            if name in self.parameters:  # else an option of the compiler
                given[name] = x
        for program in range(grid[0]):
            self.state.program = program
            self.function(**given)


def use_for_the_scan(patch: pytest.MonkeyPatch) -> None:
    """The scan of 9 states and more as it runs on large NVIDIA devices."""
    from genssm.kernels.selective_scan import triton_scan

    modules = "genssm.kernels.selective_scan.triton_shared_tiles", "genssm.kernels.selective_scan."
    forward = Kernel("scan_forward_shared_kernel", modules[0], modules[1] + "triton_forward_shared")
    backward = Kernel("scan_backward_shared_kernel", modules[0], modules[1] + "triton_backward_shared")
    others = triton_scan.launch

    def launch(launched, grid: tuple[int, ...], /, **arguments) -> None:
        if isinstance(launched, Kernel):
            launched.launch(grid, arguments)
        else:
            others(launched, grid, **arguments)

    patch.setattr(triton_scan, "launch", launch)
    patch.setattr(triton_scan, "_shared_kernel", lambda: backward)
    patch.setattr(triton_scan, "_shared_fits", lambda *tensors: True)
    patch.setattr(triton_scan, "_forward_kernel", lambda: forward)
    patch.setattr(triton_scan, "_forward_shares", lambda u, delta, B, *given: B.shape[-1] <= 16)
