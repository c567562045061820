"""Sums of what the programs of a backward pass leave in slots, in Triton.

Gradients of the maps B and C are sums over blocks of channels, those of parameters over sequences and stretches of
them. A launch reads every slot once, adds in an order that is always the same, and writes the gradients as they are
returned.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.arguments import empty_gradient
from genssm.kernels.triton_launch import cdiv, launch, named

_PAIRS = 512  # of dB and dC, in a program
_MANY_PAIRS = 2**30  # whose offsets need 64 bits
_UNROLL = 8  # slots of them that are loaded together
_CHANNELS, _STATES, _SLOTS = 32, 4, 32  # of parameters, that a program reads together


def map_gradient(x: Tensor, directions: int) -> Tensor:
    """Where `sum_maps` writes the gradient of B or C, (Bt, K, L, G, N): what directions share they do not share yet."""
    if x.shape[1] == directions:
        return empty_gradient(x)
    batch, _, *rest = x.shape
    return x.new_empty((batch, directions, *rest), dtype=torch.float32)


def sum_maps(slots: Tensor, first_direction: int, dB: Tensor, dC: Tensor) -> None:
    """Add the slots of dB and dC, (slots, Bt, K', L, G, N, 2) in float32, into K' directions of both from one on."""
    count, batch, directions, length, groups, states, _ = slots.shape
    row = groups * states
    rows = batch * directions * length
    if rows * row:
        launch(
            sum_maps_kernel,
            (cdiv(rows * row, _PAIRS),),
            slots=slots,
            db=dB,
            dc=dC,
            **named("db", "bk", [stride // row for stride in dB.stride()]),
            **named("dc", "bk", [stride // row for stride in dC.stride()]),
            count=count,
            rows=rows,
            first_direction=first_direction,
            directions=directions,
            length=length,
            WIDE=rows * row >= _MANY_PAIRS,
            ROW=row,
            UNROLL=_UNROLL,
            PAIRS=_PAIRS,
            num_warps=4,
        )


def sum_parameters(
    matrices: Tensor, vectors: tuple[Tensor | None, Tensor | None], like: tuple[Tensor, Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of a matrix and two vectors of every channel: A, D and the step bias of a scan, taps of a convolution.

    Where directions share one, its gradient is the sum over them.

    Args:
        matrices: slots (W, K, N, E), float32; a slot of a direction lies in one piece, at equal distances.
        vectors: slots (W, K, E), float32, likewise; None for an absent one.
        like: the parameters, (1 or K, E, N) and (1 or K, E).

    Returns:
        What is like these.
    """
    works, directions, states, channels = matrices.shape
    grads = [None if x is None else x.new_empty(x.shape) for x in like]
    own = [0 if x is None else x.shape[0] for x in like]
    steps = [0 if x is None else x.stride(1) for x in (matrices, *vectors)]
    if channels:
        launch(
            sum_parameters_kernel,
            (cdiv(channels, _CHANNELS), cdiv(states, _STATES) + len(vectors), max(own)),
            matrices=matrices,
            vectors_0=vectors[0],
            vectors_1=vectors[1],
            grad=grads[0],
            grad_0=grads[1],
            grad_1=grads[2],
            slots=works * directions,
            own=own[0],
            own_0=own[1],
            own_1=own[2],
            step=steps[0],
            step_0=steps[1],
            step_1=steps[2],
            CHANNELS=channels,
            STATES=states,
            SLOTS=_SLOTS,
            BLOCK=_CHANNELS,
            BLOCK_N=_STATES,
            num_warps=16,
        )
    return tuple(grads)


_MAPS = ["db_b", "db_k", "dc_b", "dc_k", "count", "rows", "first_direction", "directions", "length"]


@triton.jit(do_not_specialize=_MAPS)
def sum_maps_kernel(
    slots,
    db,
    dc,
    db_b,
    db_k,
    dc_b,
    dc_k,
    count,
    rows,
    first_direction,
    directions,
    length,
    WIDE: tl.constexpr,
    ROW: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Add PAIRS neighbouring pairs of dB and dC over all slots; a row of ROW pairs are the maps of a token."""
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
        rows = rows.to(tl.int64)
    start = start * PAIRS
    place = 2 * start + tl.arange(0, 2 * PAIRS)
    inside = place < rows * (2 * ROW)
    total = tl.zeros([2 * PAIRS], tl.float32)
    for first in range(0, count, UNROLL):
        for i in tl.static_range(UNROLL):
            slot = tl.full([], 0, tl.int64) + first + i
            total += tl.load(slots + slot * rows * (2 * ROW) + place, mask=inside & (slot < count), other=0.0)
    of_b, of_c = tl.split(tl.reshape(total, [PAIRS, 2]))
    pair = start + tl.arange(0, PAIRS)
    token = pair % (length * ROW)  # and what of it, in one direction of one sample
    bk = pair // (length * ROW)
    b = (bk // directions).to(tl.int64)
    k = bk % directions + first_direction
    mask = pair < rows * ROW
    tl.store(db + (b * db_b + k * db_k) * ROW + token, of_b.to(db.dtype.element_ty), mask=mask)
    tl.store(dc + (b * dc_b + k * dc_k) * ROW + token, of_c.to(dc.dtype.element_ty), mask=mask)


@triton.jit
def _add(here, slots, step, grad, k, own, count, offsets, grad_offsets, mask, SLOTS: tl.constexpr):
    """Write the sum of every ``own``-th of ``count`` slots from the k-th on; ``step`` elements from one to the next."""
    if here & (k < own):
        total = tl.zeros([SLOTS, offsets.shape[0]], tl.float32)
        for first in range(k, count, own * SLOTS):
            slot = first + own * tl.arange(0, SLOTS)[:, None].to(tl.int64)
            total += tl.load(slots + slot * step + offsets[None, :], mask=mask[None, :] & (slot < count), other=0.0)
        tl.store(grad + grad_offsets, tl.sum(total, 0).to(grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["slots", "own", "own_0", "own_1"])
def sum_parameters_kernel(
    matrices,
    vectors_0,
    vectors_1,
    grad,
    grad_0,
    grad_1,
    slots,
    own,
    own_0,
    own_1,
    step,
    step_0,
    step_1,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of a block of channels of one parameter, for one direction or for all that share it.

    Programs along dimension 1: blocks of the states of the matrix, then the vectors.
    """
    PARTS: tl.constexpr = (STATES + BLOCK_N - 1) // BLOCK_N
    k = tl.program_id(2)
    part = tl.program_id(1)
    first = tl.program_id(0) * BLOCK
    e = first + tl.arange(0, BLOCK)
    if vectors_0 is not None:
        _add(part == PARTS, vectors_0, step_0, grad_0, k, own_0, slots, e, k * CHANNELS + e, e < CHANNELS, SLOTS)
    if vectors_1 is not None:
        _add(part == PARTS + 1, vectors_1, step_1, grad_1, k, own_1, slots, e, k * CHANNELS + e, e < CHANNELS, SLOTS)
    inside = tl.arange(0, BLOCK_N * BLOCK)
    n = part * BLOCK_N + inside // BLOCK
    e = first + inside % BLOCK
    mask = (n < STATES) & (e < CHANNELS)
    in_grad = (k * CHANNELS + e) * STATES + n
    _add(part < PARTS, matrices, step, grad, k, own, slots, n * CHANNELS + e, in_grad, mask, SLOTS)
