"""Tensors that say they are on a GPU while a CPU computes them: what would mix devices there fails here."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda:0")
_INSIDE = torch.device("lazy:0")
_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}  # indices may be on the CPU
_WAITING = {_aten.nonzero.default, _aten._local_scalar_dense.default}
_ONE_DEVICE = {_aten.cat.default, _aten.stack.default, _aten.index_select.default, _aten.index_copy_.default}


_GENERATORS: set[int] = set()  # those on the GPU: operations get them without their class
WAITS: list[str] = []  # what would have made the CPU wait for the GPU, or a captured graph fail
# At these only a captured graph would fail: a number on the CPU goes along with the launch, some copies do not wait.
PASSING = ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor",
           "aten._to_copy.default non_blocking")  # fmt: skip


class PretendTensor(torch.Tensor):
    """A tensor whose ``device`` is a GPU and whose numbers lie in ``held``, on the CPU.

    PyTorch's own code is told of another device, "lazy": for CUDA its methods and its autograd would ask the driver.
    """

    held: torch.Tensor
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        size, offset = held.untyped_storage().nbytes() // held.itemsize, held.storage_offset()
        shell = torch.empty(size, dtype=held.dtype, device="meta").as_strided(held.shape, held.stride(), offset)
        # Told to ask __torch_dispatch__ for its device, as PyTorch's own fake tensors are.
        tensor = torch.Tensor._make_subclass(cls, shell, False, dispatch_device=True, device_for_backend_keys=_INSIDE)
        tensor.held = held
        return tensor

    @property
    def data(self) -> "PretendTensor":
        """Its numbers without its history."""
        return self.detach()

    @data.setter
    def data(self, value: "PretendTensor") -> None:
        self.held = value.held
        torch.Tensor.data.__set__(self, value)

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file gets the numbers; ``map_location`` has nothing to move when they are read."""
        return self.held.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """Its numbers; PyTorch refuses those of a subclass."""
        WAITS.append("tolist")
        return self.held.tolist()

    def numpy(self, **options: Any) -> Any:
        """Refused, as on a GPU."""
        raise TypeError(f"{CUDA} tensors have no arrays; copy them to the CPU first")

    def data_ptr(self) -> int:
        """Where its numbers lie."""
        return self.held.data_ptr()

    def new_tensor(self, data: Any, **options: Any) -> "PretendTensor":
        """Made on the CPU and copied, as on a GPU."""
        WAITS.append("new_tensor")
        return PretendTensor(self.held.new_tensor(data, **options))

    def __setitem__(self, index: Any, value: Any) -> None:
        """Numbers are written where they lie: PyTorch would first make a tensor of them on the device "lazy"."""
        if isinstance(value, torch.Tensor):
            super().__setitem__(index, value)
        elif self.requires_grad:
            raise NotImplementedError("a number written into a tensor that has a gradient")
        else:
            self.held[_held(index)] = value

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Outside of :class:`PretendCuda`, too, the tensors keep what they are."""
        return _run(func, args, dict(kwargs or {}))


class PretendGenerator(torch.Generator):
    """A generator that says it is on a GPU, and draws what one on the CPU does."""

    def __new__(cls, device: torch.device | str = "cpu") -> "PretendGenerator":
        generator = super().__new__(cls, "cpu")
        (_GENERATORS.add if torch.device(device).type == CUDA.type else _GENERATORS.discard)(generator._cdata)
        return generator

    @property
    def device(self) -> torch.device:
        """Where it would be."""
        return CUDA if self._cdata in _GENERATORS else torch.device("cpu")


class PretendCuda(TorchDispatchMode):
    """While it is entered, "cuda" is a device of this machine and mixing it with the CPU raises a RuntimeError."""

    _mode_key: ClassVar = torch._C._TorchDispatchModeKey.FAKE  # or PyTorch looks for a driver

    def __enter__(self) -> "PretendCuda":
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy from the CPU
        self._generator, torch.Generator = torch.Generator, PretendGenerator
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        torch.Generator = self._generator
        _GENERATORS.clear()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every operation of PyTorch."""
        return _run(func, args, dict(kwargs or {}))


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return _INSIDE
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    on_cuda = any(isinstance(tensor, PretendTensor) for tensor in tensors)
    if kwargs.get("device") is not None:
        on_cuda = torch.device(kwargs["device"]).type in (CUDA.type, _INSIDE.type)
        kwargs["device"] = torch.device("cpu") if on_cuda else kwargs["device"]
    elif func is _aten.copy_.default:
        on_cuda = isinstance(args[0], PretendTensor)
    elif on_cuda:
        _check(func, tensors)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in _GENERATORS) != on_cuda:
        one, other = ("cpu", CUDA) if on_cuda else (CUDA, "cpu")
        raise RuntimeError(f"{func}: a generator on {one} draws for a tensor on {other}")
    from_both = any(isinstance(t, PretendTensor) != on_cuda for t in tensors[: 2 if func is _aten.copy_.default else 1])
    if (on_cuda and func in _WAITING) or from_both:
        WAITS.append(f"{func} non_blocking" if kwargs.get("non_blocking") else str(func))
    if func in _INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1]):
        WAITS.append("index by mask")
    held_args, held_kwargs = _held((args, kwargs))
    out = func(*held_args, **held_kwargs)
    if not on_cuda:
        return out
    changed = [i for i, value in enumerate(func._schema.arguments) if value.alias_info and value.alias_info.is_write]
    if changed and isinstance(out, torch.Tensor):  # in place: the tensor that was given
        name = func._schema.arguments[changed[0]].name
        return args[changed[0]] if changed[0] < len(args) else kwargs[name]
    return tree_map_only(torch.Tensor, PretendTensor, out)


def _held(values: Any) -> Any:
    """The same with the tensors of the CPU."""
    return tree_map_only(PretendTensor, lambda tensor: tensor.held, values)


def _check(func: Any, tensors: list[torch.Tensor]) -> None:
    """Refuse what a GPU would: tensors of both devices, unless the ones on the CPU are numbers or indices."""
    if func in _INDEXED:
        return
    for tensor in tensors:
        if not isinstance(tensor, PretendTensor) and (tensor.dim() or func in _ONE_DEVICE):
            raise RuntimeError(f"{func}: a tensor {tuple(tensor.shape)} on the CPU meets one on {CUDA}")
