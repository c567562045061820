"""The fused path as a custom op, which `torch.compile` takes as it is, and when it stands for the composed one."""

import torch
from torch import Tensor

from genssm.kernels.custom_op import custom_op
from genssm.kernels.triton_launch import next_power_of_2, processors

PIECES = 16  # directions, each split in time, that a program of the walk takes at once
CHANNELS = 4  # of such a program
STATES = 64  # most states
TOKENS = 512  # longest sequence
WEIGHTS = 8192  # of W_r, rank times channels, rounded up to powers of two: a warp of the projections holds them all
_ENOUGH = 4  # programs of the walk per multiprocessor up to which launches and waiting decide, not arithmetic


@custom_op("genssm::isolated_scans")
def fused(
    x: Tensor,
    z: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    orders: Tensor | None,
) -> Tensor:
    from genssm.kernels.isolated_scans.triton_scans import scans_triton

    return scans_triton(x, z, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, orders)


@fused.register_fake
def _(x, z, *rest) -> Tensor:
    return x.new_empty(x.shape)


def fits(x: Tensor, parameters: tuple[Tensor | None, ...], directions: int, states: int, rank: int) -> bool:
    """Whether the fused path may run: nothing to differentiate, products of one type, and little to compute.

    Args:
        x: (Bt, L, E).
        parameters: what meets ``x`` in products, and the parameters of the scans.
        directions, states, rank: K, N and R.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        return False
    batch, length, channels = x.shape
    if length > TOKENS or directions > PIECES or states > STATES:
        return False
    if next_power_of_2(channels) * max(8, next_power_of_2(rank)) > WEIGHTS:
        return False
    return batch * -(-channels // CHANNELS) <= _ENOUGH * _processors(x.device.type, x.device.index or 0)


# A constant to torch.compile, which need not trace how a device is asked.
@torch.compiler.assume_constant_result
def _processors(kind: str, index: int) -> int:
    return processors(torch.device(kind, index))
