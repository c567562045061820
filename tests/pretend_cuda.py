"""Tensors that say they are on a GPU while a CPU computes them: what would mix devices there fails here."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda:0")
_aten = torch.ops.aten
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}  # indices may be on the CPU
_ONE_DEVICE = {_aten.cat.default, _aten.stack.default, _aten.index_select.default, _aten.index_copy_.default}


WAITS: list[str] = []  # what would have made the CPU wait for the GPU, or a captured graph fail


class PretendTensor(torch.Tensor):
    """A tensor whose ``device`` is a GPU and whose numbers lie in ``held``, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        size, offset = held.untyped_storage().nbytes() // held.itemsize, held.storage_offset()
        shell = torch.empty(size, dtype=held.dtype, device="meta").as_strided(held.shape, held.stride(), offset)
        # Told to ask __torch_dispatch__ for its device, as PyTorch's own fake tensors are: no driver is asked.
        tensor = torch.Tensor._make_subclass(cls, shell, False, dispatch_device=True, device_for_backend_keys=CUDA)
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"

    def tolist(self) -> Any:
        """Its numbers; PyTorch refuses those of a subclass."""
        WAITS.append("tolist")
        return self.held.tolist()

    def numpy(self, **options: Any) -> Any:
        """Refused, as on a GPU."""
        raise TypeError(f"{CUDA} tensors have no arrays; copy them to the CPU first")

    # In PyTorch the methods from here on set the device first, which takes a driver.

    def __getitem__(self, index: Any) -> "PretendTensor":
        if any(value.dtype == torch.bool for value in tree_flatten(index)[0] if isinstance(value, torch.Tensor)):
            WAITS.append("index by mask")
        return PretendTensor(self.held[_held(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.held[_held(index)] = _held(value)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> "PretendTensor":
        if not isinstance(source, PretendTensor):
            WAITS.append("copy_")
        self.held.copy_(_held(source))
        return self

    def __invert__(self) -> "PretendTensor":
        return PretendTensor(~self.held)

    def nonzero(self, **options: Any) -> Any:
        WAITS.append("nonzero")
        return tree_map_only(torch.Tensor, PretendTensor, self.held.nonzero(**options))

    def new_tensor(self, data: Any, **options: Any) -> "PretendTensor":
        WAITS.append("new_tensor")
        return PretendTensor(self.held.new_tensor(data, **options))

    def __float__(self) -> float:
        WAITS.append("float")
        return float(self.held)

    def __int__(self) -> int:
        WAITS.append("int")
        return int(self.held)

    def __bool__(self) -> bool:
        WAITS.append("bool")
        return bool(self.held)

    def __index__(self) -> int:
        WAITS.append("index")
        return int(self.held)

    def item(self) -> bool | int | float:
        WAITS.append("item")
        return self.held.item()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Outside of :class:`PretendCuda`, too, the tensors keep what they are."""
        return _run(func, args, dict(kwargs or {}))


class PretendCuda(TorchDispatchMode):
    """While it is entered, "cuda" is a device of this machine and mixing it with the CPU raises a RuntimeError."""

    _mode_key: ClassVar = torch._C._TorchDispatchModeKey.FAKE  # or PyTorch looks for a driver

    def __enter__(self) -> "PretendCuda":
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy from the CPU
        self._overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to() puts new parameters in
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrites)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every operation of PyTorch."""
        return _run(func, args, dict(kwargs or {}))


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return CUDA
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    on_cuda = any(isinstance(tensor, PretendTensor) for tensor in tensors)
    if kwargs.get("device") is not None:
        on_cuda = torch.device(kwargs["device"]).type == "cuda"
        kwargs["device"] = torch.device("cpu") if on_cuda else kwargs["device"]
    elif func is _aten.copy_.default:
        on_cuda = isinstance(args[0], PretendTensor)
    elif on_cuda:
        _check(func, tensors)
    generator = kwargs.get("generator")
    if generator is not None and on_cuda:
        raise RuntimeError(f"{func}: a generator on {generator.device} draws for a tensor on {CUDA}")
    if func is _aten.nonzero.default or any(isinstance(tensor, PretendTensor) != on_cuda for tensor in tensors[:1]):
        WAITS.append(str(func))
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
