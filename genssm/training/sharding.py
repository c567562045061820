"""Sharded training (FSDP2): parameters, gradients and optimiser state divided among the processes.

torch's ``fully_shard`` does the work, on GPUs with NCCL and on CPUs with gloo alike. accelerate would shard by itself
on GPUs and ignore the wish on a CPU; here one path serves both, so what is tested is what runs. The numbers are those
of data parallelism: parameters stay float32, autocast chooses the type of the computation.

The trained module is a sharded copy. The plain module beside it stays on the CPU and gets whole weights when something
is saved or drawn, so checkpoints are the same with and without sharding, and with any number of processes.
"""

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def wants_sharding() -> bool:
    """Whether accelerate was launched with an FSDP configuration; takes the wish out of the environment.

    Raises:
        ValueError: it asks for FSDP version 1.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"fsdp_version is {version}; this program shards with 2, see configs/accelerate/fsdp2.yaml")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return True


def shard(model: nn.Module, device: torch.device, processes: int) -> nn.Module:
    """A copy of ``model`` on ``device`` whose repeated blocks, and the rest, are each divided among all processes.

    Args:
        model: whole, the same in every process; stays as it is.
        device: of this process.
        processes: their number.
    """
    # It warns of operations in place on an output that is a view; objectives have none.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (processes,))
    sharded = copy.deepcopy(model).to(device)
    names = {name for part in model.modules() for name in getattr(part, "_repeated_blocks", None) or ()}
    for block in [m for m in sharded.modules() if type(m).__name__ in names]:
        fully_shard(block, mesh=mesh)
    return fully_shard(sharded, mesh=mesh)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor, the same in every process, into one that may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.detach().to(target.device), target.device_mesh, target.placements)
    local(target).copy_(local(value))


@torch.no_grad()
def gather(sources: Iterable[torch.Tensor], targets: Iterable[torch.Tensor]) -> None:
    """Copy sharded tensors into whole ones, one after the other; every process must take part."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(whole(source.detach()))


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser with whole tensors on the CPU, as if it were not sharded; every process must ask."""

    def widen(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: widen(inner) for key, inner in value.items()}
        return whole(value.detach()).cpu() if isinstance(value, torch.Tensor) else value

    return widen(optimizer.state_dict())


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what :func:`whole_state`, or an optimiser that is not sharded, gave."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not isinstance(parameter, DTensor):
                continue
            held = optimizer.state[parameter]
            for name, value in held.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim:
                    held[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
