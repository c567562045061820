"""A linear map of few rows in Triton, whose weights are on their way before the rows are there."""

# R rows, K channels in, N channels out; S = SHARES warps, each with channels of its own in every chunk
# ruff: noqa: RUF005 - Triton's compiler knows no starred tuples

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.triton_launch import device_of, launch, overlaps, processors, refuse_double, shared_memory
from genssm.kernels.triton_overlap import overlap, wait_for_inputs

_NAME = "row_linear"
_SHARES = 8
_SHARED = 160 * 1024  # bytes of shared memory that suffice for all choices
_ROWS = 16  # of a program, the least that the matrix units take


@triton.jit
def load_weights(weight, n, k, channels_in, channels_out):
    """A chunk of the weights, (S, share, columns)."""
    mask = (n[None, None, :] < channels_out) & (k[:, :, None] < channels_in)
    return tl.load(weight + n[None, None, :] * channels_in + k[:, :, None], mask=mask, other=0.0)


@triton.jit
def load_rows(x, r, k, rows, x_r, channels_in):
    """A chunk of the rows, (S, R, share)."""
    mask = (r[None, :, None] < rows) & (k[:, None, :] < channels_in)
    return tl.load(x + r[None, :, None] * x_r + k[:, None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def row_linear_kernel(
    x, weight, bias, y, rows, x_r, channels_in, channels_out,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SHARES: tl.constexpr, SHARE: tl.constexpr,
    CHUNKS: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of BLOCK_R rows. Every warp sums over channels of its own; their sums meet at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, SHARES)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    CHUNK: tl.constexpr = SHARES * SHARE
    parts = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        parts = parts + (load_weights(weight, n, k + i * CHUNK, channels_in, channels_out),)
    wait_for_inputs(OVERLAP)
    values = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        values = values + (load_rows(x, r, k + i * CHUNK, rows, x_r, channels_in),)
    sums = tl.zeros([SHARES, BLOCK_R, BLOCK_N], tl.float32)
    for i in tl.static_range(CHUNKS):
        part = parts[i]
        value = values[i]
        if i + AHEAD < CHUNKS:
            parts = parts + (load_weights(weight, n, k + (i + AHEAD) * CHUNK, channels_in, channels_out),)
            values = values + (load_rows(x, r, k + (i + AHEAD) * CHUNK, rows, x_r, channels_in),)
        sums = tl.dot(value, part, sums, input_precision="ieee")
    out = tl.sum(sums, axis=0)
    if bias is not None:
        out += tl.load(bias + n, mask=n < channels_out, other=0.0).to(tl.float32)[None, :]
    mask = (r[:, None] < rows) & (n[None, :] < channels_out)
    tl.store(y + r[:, None] * channels_out + n[None, :], out, mask=mask)


def sizes(channels_out: int, device: torch.device, bytes_each: int) -> tuple[int, int, int]:
    """Channels out of a program, channels in of a warp in a chunk, and chunks on their way.

    Where there are few programs each has more bytes on their way. 64 KB of shared memory suffice for the last choice.
    """
    if not overlaps(device) or shared_memory(device) < _SHARED:
        return 32, 16, 4 // bytes_each
    return (16, 32, 6) if triton.cdiv(channels_out, 16) <= processors(device) else (32, 32, 3)


def row_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments and result as of `row_linear`.

    Raises:
        ValueError: float64 tensors.
    """
    refuse_double(_NAME, x, weight)
    rows, channels_in = x.shape
    channels_out = weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(rows, channels_out)
    columns, share, ahead = sizes(channels_out, x.device, x.element_size())
    if rows:
        with device_of(x):
            launch(
                row_linear_kernel, (triton.cdiv(channels_out, columns), triton.cdiv(rows, _ROWS)),
                x=x, weight=weight.contiguous(), bias=bias, y=y, rows=rows, x_r=x.stride(0),
                channels_in=channels_in, channels_out=channels_out, BLOCK_R=_ROWS, BLOCK_N=columns, SHARES=_SHARES,
                SHARE=share, CHUNKS=triton.cdiv(channels_in, _SHARES * share), AHEAD=ahead, num_warps=_SHARES,
                **overlap(x.device),
            )  # fmt: skip
    return y
