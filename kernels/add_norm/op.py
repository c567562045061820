"""The Triton path as torch custom ops, ``genssm::add_norm_fwd`` and ``_bwd``, with fake and autograd rules."""

import torch
from torch import Tensor

from genssm.kernels.custom_op import custom_op

_TENSORS = "Tensor? gate, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, Tensor? factor"
_OPTIONS = "bool add_normed, bool layer, float eps"


def stream_dtype(h: Tensor, x: Tensor | None, gate: Tensor | None) -> torch.dtype:
    """Type of h + gate x."""
    return h.dtype if x is None else torch.promote_types(h.dtype, product_dtype(gate, x))


def product_dtype(factor: Tensor | None, x: Tensor) -> torch.dtype:
    """Type of factor x."""
    return x.dtype if factor is None else torch.promote_types(factor.dtype, x.dtype)


def modulated_dtypes(normed: torch.dtype, shift: Tensor | None, scale: Tensor | None) -> tuple[torch.dtype, ...]:
    """Types of n (1 + scale) and of n (1 + scale) + shift."""
    if scale is None:
        return normed, normed
    scaled = torch.promote_types(normed, scale.dtype)
    return scaled, torch.promote_types(scaled, shift.dtype)


def added_dtypes(h: Tensor, normed: torch.dtype, factor: Tensor | None) -> tuple[torch.dtype, ...]:
    """Types of factor n and of h + factor n."""
    scaled = normed if factor is None else torch.promote_types(normed, factor.dtype)
    return scaled, torch.promote_types(h.dtype, scaled)


@custom_op(
    "genssm::add_norm_fwd",
    schema=f"(Tensor h, Tensor? x, {_TENSORS}, {_OPTIONS}, ScalarType? dtype, bool normed) -> (Tensor, Tensor, Tensor)",
)
def add_norm_fwd(h, x, gate, weight, bias, shift, scale, factor, add_normed, layer, eps, dtype, normed):
    from genssm.kernels.add_norm.triton_norm import norm_forward

    return norm_forward(h, x, gate, weight, bias, shift, scale, factor, add_normed, layer, eps, dtype, normed)


@custom_op(
    "genssm::add_norm_bwd",
    schema=f"(Tensor? dh, Tensor? dy, Tensor? dn, Tensor h, Tensor? x, {_TENSORS}, {_OPTIONS}, "
    "ScalarType? added) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def add_norm_bwd(dh, dy, dn, h, x, gate, weight, bias, shift, scale, factor, add_normed, layer, eps, added):
    from genssm.kernels.add_norm.triton_norm import norm_backward

    return norm_backward(dh, dy, dn, h, x, gate, weight, bias, shift, scale, factor, add_normed, layer, eps, added)


@add_norm_fwd.register_fake
def _(h, x, gate, weight, bias, shift, scale, factor, add_normed, layer, eps, dtype, normed):
    stream = stream_dtype(h, x, gate)
    kept = stream if weight is None else weight.dtype
    dtype = dtype or modulated_dtypes(kept, shift, scale)[1]
    if add_normed:
        stream = added_dtypes(h, kept, factor)[1]
    new_h = h.new_empty(h.shape if add_normed or x is not None else 0, dtype=stream)
    return new_h, h.new_empty(h.shape, dtype=dtype), h.new_empty(h.shape if normed else 0, dtype=kept)


@add_norm_bwd.register_fake
def _(dh, dy, dn, h, x, gate, weight, bias, shift, scale, factor, add_normed, layer, eps, added):
    dx = h.new_empty(0) if added is None else h.new_empty(h.shape, dtype=added)
    others = (h.new_empty(0) if t is None else t.new_empty(t.shape) for t in (gate, weight, bias, shift, scale))
    return h.new_empty(h.shape), dx, *others


def _setup_context(ctx, inputs, output) -> None:
    h, x, gate, weight, bias, shift, scale, factor, ctx.add_normed, ctx.layer, ctx.eps, _, ctx.normed = inputs
    stream = h if x is None else output[0]
    ctx.save_for_backward(stream, None if gate is None else x, gate, weight, bias, shift, scale, factor)
    ctx.stream_dtype, ctx.added_dtype = h.dtype, None if x is None else x.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, dh: Tensor | None, dy: Tensor | None, dn: Tensor | None) -> tuple:
    stream, x, gate, weight, bias, shift, scale, factor = ctx.saved_tensors
    # Without a gate the gradient of x is that of h, and one tensor serves both where they have one type.
    own = ctx.added_dtype is not None and (gate is not None or ctx.added_dtype != stream.dtype)
    found = add_norm_bwd(
        dh if ctx.added_dtype is not None or ctx.add_normed else None, dy, dn if ctx.normed else None, stream, x, gate,
        weight, bias, shift, scale, factor, ctx.add_normed, ctx.layer, ctx.eps, ctx.added_dtype if own else None,
    )  # fmt: skip
    dstream, dx, *others = found
    dx = None if ctx.added_dtype is None else dx if own else dstream
    given = (gate, weight, bias, shift, scale)
    others = (None if t is None else d for t, d in zip(given, others))
    return dstream.to(ctx.stream_dtype), dx, *others, *(None,) * 6


add_norm_fwd.register_autograd(_backward, _setup_context, differentiated=3)


def add_norm(h: Tensor, x: Tensor | None, gate: Tensor | None, *rest) -> tuple[Tensor, Tensor, Tensor | None]:
    """h, y and n, or None for n where it is not asked for; arguments as of `add_norm_reference`."""
    weight, bias, shift, scale, factor, add_normed, layer, eps, dtype, normed = rest
    shape = h.shape
    if gate is None and scale is None and factor is None:  # nothing belongs to a sample: all tokens are one sequence
        rows = (1, -1, shape[-1])
        given, x = h.reshape(rows), None if x is None else x.reshape(rows)
    else:
        given = h
    own = normed and (scale is not None or dtype is not None)
    new_h, y, n = add_norm_fwd(given, x, gate, weight, bias, shift, scale, factor, add_normed, layer, eps, dtype, own)
    y = y.view(shape)
    new_h = new_h.view(shape) if add_normed or x is not None else h
    return new_h, y, n.view(shape) if own else y if normed else None
