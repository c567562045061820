"""The causal depthwise convolution along orders in Triton: sizes, buffers and launches. The kernels are in
``triton_walks``; the arguments are the canonical ones of the op.

Directions that share x add to its gradient in launches one after the other, in its own type. Sums of dweight and dbias
go to a slot per program and are added afterwards, so two runs give the same bits.
"""

import torch
from torch import Tensor

from genssm.kernels.arguments import empty_directions, empty_gradient
from genssm.kernels.causal_conv1d.triton_walks import conv_backward_kernel, conv_forward_kernel
from genssm.kernels.triton_launch import (
    cdiv,
    device_of,
    first_steps,
    launch,
    named,
    next_power_of_2,
    processors,
    refuse_double,
    register_limit,
    sequence_of,
    strides,
)
from genssm.kernels.triton_sums import sum_parameters

_NAME = "causal_conv1d"
_BLOCK_E = 128
_UNROLL = 4
_OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
_REGISTERS = 128  # of a lane: sixteen programs on a multiprocessor instead of twelve
_WANTED = 32  # programs per multiprocessor
_SHARING_WANTED = 128  # where directions share x: what runs at once then fits the cache, and x is fetched once
_SHORTEST = 32  # steps of a program: it reads W - 1 tokens more at either end


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    K: int,
) -> tuple[Tensor, Tensor]:
    """Convolve along K orders.

    Returns:
        The result (Bt, K, L, E) in the dtype of ``x`` and the last W - 1 inputs of every sequence (S, K, E, W - 1).
    Raises:
        ValueError: float64 inputs.
    """
    refuse_double(_NAME, x, weight, bias)
    batch, channels, taps = x.shape[0], x.shape[3], weight.shape[-1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = empty_directions(x, K)
    last = x.new_empty(sequences, K, channels, taps - 1, dtype=torch.float32)
    with device_of(x):
        given = (weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K)
        wanted = _SHARING_WANTED if x.shape[1] < K else _WANTED
        common, grid, _ = _arguments((x,), *given, states=taps > 1, wanted=wanted)
        if grid[0]:
            launch(conv_forward_kernel, grid, **common, out=out, last=last, **named("o", "bk", strides(out)))
    return out, last


def conv_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    K: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `conv_forward`: dx, dweight, dbias or None, dinitial_state or None, like their inputs.

    Raises:
        ValueError: float64 inputs.
    """
    refuse_double(_NAME, x, weight, bias)
    channels, taps = weight.shape[-2:]
    turns = K if x.shape[1] < K else 1  # launches: directions that share x add their gradients one after the other
    dx = empty_gradient(x)
    dinitial = None
    if initial_state is not None:
        dinitial = x.new_empty(initial_state.shape, dtype=torch.float32)
    states = dinitial is not None and taps > 1
    with device_of(x):
        given = (weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K)
        common, grid, slots = _arguments((x, grad_out), *given, states=states, turns=turns)
        parts = x.new_empty(slots, K, taps + 1, channels, dtype=torch.float32)
        for first in range(turns if grid[0] else 0):
            launch(
                conv_backward_kernel,
                grid,
                **common,
                grad=grad_out,
                grad_last=grad_last_state if taps > 1 else None,
                dx=dx,
                parts=parts,
                dinitial=dinitial,
                **named("g", "bkle", strides(grad_out)),
                **named("gl", "skew", strides(grad_last_state, 4)),
                **named("dx", "bk", strides(dx)),
                first_direction=first,
                direction_programs=K // turns,
                ACCUMULATE=turns > 1,
            )
        of_bias = None if bias is None else parts[:, :, taps]
        dweight, dbias, _ = sum_parameters(parts[:, :, :taps], (of_bias, None), (weight, bias, None))
    return dx, dweight, dbias, None if dinitial is None else dinitial.to(initial_state.dtype)


def _arguments(
    per_token, weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K, states, turns=1, wanted=_WANTED
) -> tuple[dict, tuple[int], int]:
    """What both kernels take, the grid of one of ``turns`` launches, and its programs along time: slots of the sums.

    A launch has about ``wanted`` programs per multiprocessor.
    """
    x = per_token[0]
    batch, _, length, channels = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    taps = weight.shape[-1]
    block_e = min(_BLOCK_E, next_power_of_2(channels))
    blocks = cdiv(channels, block_e)
    blocks *= K // turns
    pieces = cdiv(wanted * processors(x.device), max(1, blocks * batch))
    unroll = _UNROLL if turns == 1 else _UNROLL // 2  # the sums so far take registers as well
    stretch = cdiv(max(cdiv(length, pieces), _SHORTEST), unroll) * unroll
    time_programs = cdiv(length, stretch)
    step_programs = batch * time_programs
    sequence_of_row = None
    if cu_seqlens is not None:
        sequence_of_row = sequence_of(torch.arange(length, device=x.device), cu_seqlens)
    arguments = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "orders": orders,
        "initial": initial_state,
        "lengths": lengths,
        "first_steps": first_steps(orders, cu_seqlens, length, K),
        "borders": cu_seqlens,
        "sequence_of_row": sequence_of_row,
        **named("x", "bkle", strides(x)),
        "w_k": strides(weight, directions=0)[0],
        "bias_k": strides(bias, 2, directions=0)[0],
        **named("i", "skew", strides(initial_state, 4)),
        "length": length,
        "sequences": sequences,
        "directions": K,
        "CHANNELS": channels,
        "stretch": stretch,
        "time_programs": time_programs,
        "step_programs": step_programs,
        "SILU": silu,
        "ALIGNED": all(x_.stride(d) % 8 == 0 for x_ in per_token for d in (0, 1)),
        "W": taps,
        "COLUMNS": next_power_of_2(max(taps - 1, 1)),
        "UNROLL": unroll,
        "BLOCK_E": block_e,
        **_OPTIONS,
        **register_limit(x.device, _REGISTERS),
    }
    programs = step_programs + (sequences if states else 0)
    return arguments, (blocks * programs,), step_programs
