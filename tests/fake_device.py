"""An accelerator that is not there: tensors on it have shapes, types and a device, but no numbers.

On a machine with CPUs only, code that is meant for a GPU is run on it to the end. What would fail there fails here:
tensors of two devices in one operation, a table that was left on the CPU, a generator on the wrong device, a number
that the host wants to know while it should only launch (``item``, ``nonzero``, a mask as an index).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from genssm.kernels import dispatch

CUDA = torch.device("cuda", 0)
# Autograd's threads would ask the driver for a CUDA device; for this one they do not ask.
DIFFERENTIABLE = torch.device("lazy", 0)


class _Placing(TorchFunctionMode):
    """Does on fake tensors what touches the device, and everything else as usual."""

    def __init__(self, device: torch.device, fake: FakeTensorMode) -> None:
        super().__init__()
        self.device, self.fake = device, fake

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not (self._concerned(args) or self._concerned(kwargs.values())):
            return func(*args, **kwargs)
        args, kwargs = tree_map(self._faked, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    def _concerned(self, values: Iterable[Any]) -> bool:
        """Whether a fake tensor or the device is among the arguments, or in a list of them."""
        return any(
            self._concerned(x) if isinstance(x, list | tuple) else isinstance(x, FakeTensor) or self._means_device(x)
            for x in values
        )

    def _means_device(self, x: Any) -> bool:
        name = x if isinstance(x, str) else x.type if isinstance(x, torch.device) else ""
        return name.split(":")[0] == self.device.type

    def _faked(self, x: Any) -> Any:
        real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
        return self.fake.from_tensor(x) if real else x


class Copies(TorchDispatchMode):
    """Remembers the operations between two devices; not those that take a number of the host into their launch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kinds = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        if len(kinds) > 1 and func is not torch.ops.aten.fill_.Tensor:
            self.seen.append(str(func))
        return result


@contextmanager
def fake_device(monkeypatch: Any, device: torch.device = CUDA) -> Iterator[None]:
    """Inside the block ``device`` exists, as a good one that Triton can launch on."""
    monkeypatch.setattr(dispatch, "_resolve", lambda *_: "triton")
    with _Placing(device, FakeTensorMode(allow_non_fake_inputs=False)):
        yield


def place(x: Any, device: torch.device) -> Any:
    """Tensors, in a nest of lists and dicts, moved to the device."""
    return tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, x)
