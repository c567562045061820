"""A linear map of few rows in Triton, whose weights are on their way before the rows are there."""

# R rows, K channels in, N channels out; S = SHARES warps, each with channels of its own in every chunk

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.triton_launch import device_of, launch
from genssm.kernels.triton_overlap import overlap, wait_for_inputs

_NAME = "row_linear"
_COLUMNS = 32  # channels out of a program
_SHARES = 8
_SHARE = 32  # channels in of a warp in a chunk
_AHEAD = 3  # chunks on their way


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


def row_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments and result as of `row_linear`."""
    rows, channels_in = x.shape
    channels_out = weight.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(rows, channels_out)
    block = 16 if rows <= 16 else 32
    with device_of(x):
        launch(
            row_linear_kernel, (triton.cdiv(channels_out, _COLUMNS), triton.cdiv(rows, block)),
            x=x, weight=weight.contiguous(), bias=bias, y=y, rows=rows, x_r=x.stride(0),
            channels_in=channels_in, channels_out=channels_out, BLOCK_R=block, BLOCK_N=_COLUMNS,
            SHARES=_SHARES, SHARE=_SHARE, CHUNKS=triton.cdiv(channels_in, _SHARES * _SHARE), AHEAD=_AHEAD,
            num_warps=_SHARES, **overlap(x.device),
        )  # fmt: skip
    return y
