"""The Triton path as torch custom ops, ``genssm::gated_residual_fwd`` and ``_bwd``, with fake and autograd rules."""

import torch
from torch import Tensor

from genssm.kernels.custom_op import custom_op


def result_dtypes(
    stream: Tensor, x: Tensor, gate: Tensor, skip: Tensor | None, factor: Tensor | None
) -> tuple[torch.dtype, ...]:
    """Types of gate x, of skip + gate x, of factor times that, and of the new stream."""
    found = [torch.promote_types(gate.dtype, x.dtype)]
    for other in (skip, factor, stream):
        found.append(found[-1] if other is None else torch.promote_types(found[-1], other.dtype))
    return tuple(found)


@custom_op(
    "genssm::gated_residual_fwd",
    schema="(Tensor stream, Tensor x, Tensor gate, Tensor? skip, Tensor? factor) -> Tensor",
)
def gated_residual_fwd(stream, x, gate, skip, factor):
    from genssm.kernels.gated_residual.triton_residual import residual_forward

    return residual_forward(stream, x, gate, skip, factor)


@custom_op(
    "genssm::gated_residual_bwd",
    schema="(Tensor dout, Tensor x, Tensor gate, Tensor? factor, ScalarType? skipped) -> (Tensor, Tensor, Tensor)",
)
def gated_residual_bwd(dout, x, gate, factor, skipped):
    from genssm.kernels.gated_residual.triton_residual import residual_backward

    return residual_backward(dout, x, gate, factor, skipped)


@gated_residual_fwd.register_fake
def _(stream, x, gate, skip, factor):
    return stream.new_empty(stream.shape, dtype=result_dtypes(stream, x, gate, skip, factor)[-1])


@gated_residual_bwd.register_fake
def _(dout, x, gate, factor, skipped):
    dskip = dout.new_empty(0) if skipped is None else dout.new_empty(dout.shape, dtype=skipped)
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dskip


def _setup_context(ctx, inputs, output) -> None:
    stream, x, gate, skip, factor = inputs
    ctx.save_for_backward(x, gate, factor)
    ctx.stream_dtype, ctx.skip_dtype = stream.dtype, None if skip is None else skip.dtype


def _backward(ctx, dout: Tensor) -> tuple:
    x, gate, factor = ctx.saved_tensors
    # Without a factor the gradient of the skip is that of the stream, and one tensor serves both.
    own = ctx.skip_dtype is not None and factor is not None
    dx, dgate, dskip = gated_residual_bwd(dout, x, gate, factor, ctx.skip_dtype if own else None)
    if not own:
        dskip = None if ctx.skip_dtype is None else dout.to(ctx.skip_dtype)
    return dout.to(ctx.stream_dtype), dx, dgate, dskip, None


gated_residual_fwd.register_autograd(_backward, _setup_context)
