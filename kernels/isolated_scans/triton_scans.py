"""Isolated scans over few tokens in Triton: sizes, buffers and the two launches. The kernels are in ``triton_kernels``.

A walk takes P pieces at once: all directions, each split into as many pieces of time as that leaves. The number of
pieces decides between at most five binaries; lengths and batch sizes are not in them.
"""

import torch
from torch import Tensor

from genssm.kernels.isolated_scans.op import CHANNELS, PIECES
from genssm.kernels.isolated_scans.triton_kernels import project_kernel, walk_kernel
from genssm.kernels.triton_launch import cdiv, device_of, launch, next_power_of_2, refuse_double

_NAME = "isolated_scans"
_LANES = 32
_SHORT = 16  # steps up to which time is not split
_UNROLL, _UNROLL_SHORT = 8, 4  # steps of the walk whose loads are issued together
_STRETCH, _STRETCH_SHORT = 2, 1  # steps of a projecting program
_COLUMNS = 16  # of B and C, of a projecting program; fewer where they are longer than _COLUMN
_COLUMN = 256


def scans_triton(
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
    *,
    channels_each: int = CHANNELS,
    pieces: int = PIECES,
    unroll: int | None = None,
    stretch: int | None = None,
    columns: int | None = None,
) -> Tensor:
    """Arguments and result as of `isolated_scans`; ``x``, ``z`` (Bt, L, E), ``orders`` (K, L) int32 or None.

    Args:
        channels_each, pieces, unroll, stretch, columns: sizes of the programs. For measurements.
    Raises:
        ValueError: float64 tensors.
    """
    refuse_double(_NAME, x, z, A_log)
    batch, length, channels = x.shape
    directions, states, rank = A_log.shape[0], A_log.shape[-1], dt_proj.shape[-1]
    conv_weight, x_proj, dt_proj = conv_weight.contiguous(), x_proj.contiguous(), dt_proj.contiguous()
    conv_bias = None if conv_bias is None else conv_bias.contiguous()
    dt_bias, A_log, D = dt_bias.contiguous(), A_log.contiguous(), D.contiguous()
    out = x.new_empty(batch, length, channels)
    if not batch:
        return out
    segments = 1 if length <= _SHORT else pieces // next_power_of_2(directions)
    unroll = unroll or (_UNROLL if segments > 1 else _UNROLL_SHORT)
    stretch = stretch or (_STRETCH if segments > 1 else _STRETCH_SHORT)
    span = cdiv(cdiv(length, segments), unroll) * unroll
    padded = cdiv(span * segments, stretch) * stretch
    groups = _LANES // channels_each
    lane_states = 2 * next_power_of_2(cdiv(states, 2 * groups))
    row = 2 * groups * lane_states
    block_e = next_power_of_2(channels)
    columns = columns or max(4, _COLUMNS * _COLUMN // max(_COLUMN, block_e))
    shape = (batch, directions, padded)
    inputs, steps = x.new_empty(*shape, channels), x.new_empty(*shape, channels, dtype=torch.float32)
    maps = x.new_empty(*shape, row, dtype=torch.float32)
    partial = x.new_empty(batch, directions, length, channels, dtype=torch.float32)
    blocks = cdiv(channels, channels_each)
    tile = (lane_states + 1) * pieces * _LANES
    carry = x.new_empty(batch * blocks, tile, dtype=torch.float32) if segments > 1 else None
    tiles = padded // stretch
    z_strides = (0, 0, 0) if z is None else z.stride()
    with device_of(x):
        launch(
            project_kernel, (batch * directions * tiles, 1 + row // columns),
            x=x, orders=orders, taps=conv_weight, bias=conv_bias, x_proj=x_proj, dt_proj=dt_proj, dt_bias=dt_bias,
            inputs=inputs, steps=steps, maps=maps, x_b=x.stride(0), x_l=x.stride(1), x_e=x.stride(2), length=length,
            padded=padded, directions=directions, tiles=tiles, CHANNELS=channels, STATES=states, RANK=rank,
            W=conv_weight.shape[-1], ROW=row, COLUMNS=columns, RANKS=next_power_of_2(rank),
            TAPS=next_power_of_2(conv_weight.shape[-1]), ALIGNED=x.stride(0) % 8 == 0, BLOCK_L=stretch,
            BLOCK_E=block_e, num_warps=1, num_stages=1,
        )  # fmt: skip
        launch(
            walk_kernel, (batch * blocks,),
            inputs=inputs, steps=steps, maps=maps, a_log=A_log, skip=D, z=z, orders=orders, partial=partial,
            carry=carry, out=out, z_b=z_strides[0], z_l=z_strides[1], z_e=z_strides[2], length=length, padded=padded,
            directions=directions, span=span, zero=0, CHANNELS=channels, STATES=states, ROW=row, P=pieces,
            SEGS=segments, NI=lane_states, NL=groups, EL=channels_each, UNROLL=unroll, ROWS=pieces * _LANES // 4,
            num_warps=pieces,
        )  # fmt: skip
    return out
