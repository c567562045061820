"""A block's residual update in Triton: one launch forward; one launch and a short sum backward."""

# B batch, L tokens, D channels; a row is one token, and a program holds whole rows

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.gated_residual.op import result_dtypes
from genssm.kernels.triton_launch import device_of, launch, refuse_double
from genssm.kernels.triton_rows import (
    TYPES,
    load_number,
    load_row,
    of_token,
    rounded,
    row_arguments,
    stages,
    stretches,
    sums,
    total,
    warps,
)

_NAME = "gated_residual"
_WANTED = 4  # programs of the backward per multiprocessor: each keeps sums over its tokens
# Nothing is compiled anew for another batch or length.
_FORWARD = ["length", *(f"{name}_{dim}" for name in ("h", "x", "gate", "skip", "factor") for dim in "bl")]
_BACKWARD = ["length", "chunks", *(f"{name}_{dim}" for name in ("grad", "x", "gate", "factor") for dim in "bl")]


@triton.jit(do_not_specialize=_FORWARD)
def residual_forward_kernel(
    h, x, gate, skip, factor, out,
    h_b, h_l, x_b, x_l, gate_b, gate_l, skip_b, skip_l, factor_b, factor_l, length,
    PRODUCT: tl.constexpr, SKIPPED: tl.constexpr, SCALED: tl.constexpr,
    D: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token."""
    row = tl.program_id(0)
    b, l = (row // length).to(tl.int64), (row % length).to(tl.int64)
    e = tl.arange(0, BLOCK)
    u = load_row(x, b, l, x_b, x_l, e, D, ALIGNED) * load_row(gate, b, l, gate_b, gate_l, e, D, ALIGNED)
    u = rounded(u, PRODUCT)
    if skip is not None:
        u = rounded(load_row(skip, b, l, skip_b, skip_l, e, D, ALIGNED) + u, SKIPPED)
    if factor is not None:
        u = rounded(u * load_number(factor, b, l, factor_b, factor_l), SCALED)
    u += load_row(h, b, l, h_b, h_l, e, D, ALIGNED)
    tl.store(out + row.to(tl.int64) * D + e, u, mask=e < D)


@triton.jit(do_not_specialize=_BACKWARD)
def residual_backward_kernel(
    grad, x, gate, factor, dx, dgate, dskip,
    grad_b, grad_l, x_b, x_l, gate_b, gate_l, factor_b, factor_l, length, chunks,
    GATE_OF_TOKEN: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A stretch of one sample's tokens; the sum over them goes to the program's own row."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    tokens = tl.cdiv(length, chunks)
    first = (program % chunks) * tokens
    e = tl.arange(0, BLOCK)
    mask = e < D
    sum_gate = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(tl.minimum(tokens, length - first), num_stages=STAGES):
        l = first.to(tl.int64) + i
        at = (b * length + l) * D + e
        g = load_row(grad, b, l, grad_b, grad_l, e, D, ALIGNED)
        if factor is not None:
            g *= load_number(factor, b, l, factor_b, factor_l)
        if dskip is not None:
            tl.store(dskip + at, g, mask=mask)
        to_gate = g * load_row(x, b, l, x_b, x_l, e, D, ALIGNED)
        if GATE_OF_TOKEN:
            tl.store(dgate + at, to_gate, mask=mask)
        else:
            sum_gate += to_gate
        tl.store(dx + at, g * load_row(gate, b, l, gate_b, gate_l, e, D, ALIGNED), mask=mask)
    if not GATE_OF_TOKEN:
        tl.store(dgate + program.to(tl.int64) * D + e, sum_gate, mask=mask)


def residual_forward(stream: Tensor, x: Tensor, gate: Tensor, skip: Tensor | None, factor: Tensor | None) -> Tensor:
    """The new stream, (B, L, D) and contiguous.

    Raises:
        ValueError: float64 tensors, or more channels than a program can hold.
    """
    refuse_double(_NAME, stream, x, gate, skip, factor)
    batch, length, channels = stream.shape
    product, skipped, scaled, dtype = result_dtypes(stream, x, gate, skip, factor)
    rows = {"h": stream, "x": x, "gate": gate, "skip": skip}
    common = row_arguments(_NAME, channels, rows, factor)
    out = stream.new_empty(stream.shape, dtype=dtype)
    if batch * length:
        with device_of(stream):
            launch(
                residual_forward_kernel,
                (batch * length,),
                **common,
                out=out,
                length=length,
                PRODUCT=TYPES[product],
                SKIPPED=TYPES[skipped],
                SCALED=TYPES[scaled],
                num_warps=warps(common["BLOCK"], 16),
                enable_fp_fusion=False,  # a product is rounded before something is added to it, as in PyTorch
            )
    return out


def residual_backward(
    dout: Tensor, x: Tensor, gate: Tensor, factor: Tensor | None, skipped: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and skip from that of the new stream.

    Args:
        skipped: type of the gradient of the skip, which is empty for None.
    """
    batch, length, channels = dout.shape
    rows = {"grad": dout, "x": x, "gate": gate}
    common = row_arguments(_NAME, channels, rows, factor)
    chunks = stretches(dout, _WANTED)
    dx = x.new_empty(x.shape)
    dskip = None if skipped is None else dout.new_empty(dout.shape, dtype=skipped)
    dgate = sums(gate, dout, chunks)
    if batch:
        with device_of(dout):
            launch(
                residual_backward_kernel,
                (batch * chunks,),
                **common,
                dx=dx,
                dgate=dgate,
                dskip=dskip,
                length=length,
                chunks=chunks,
                GATE_OF_TOKEN=of_token(gate, length),
                STAGES=stages(common["BLOCK"], rows),
                num_warps=warps(common["BLOCK"], 8),
            )
    return dx, total(dgate, gate), dout.new_empty(0) if dskip is None else dskip
