"""The Mamba-2 scan as torch custom ops, ``genssm::ssd_fwd`` and ``_bwd``: fake, autograd and flop rules.

One pair of ops serves all fast implementations; the backend is an argument. An implementation is a module with

    ssd_forward(x, ..., reduce_sum) -> (out, last_state, saved)
    ssd_backward(grad_out, grad_last_state, saved, x, ..., reduce_sum) -> nine gradients
    new_saved(x, B, C, directions, sequences) -> ``saved``, not yet filled

with the canonical arguments that `genssm.kernels.ssd` prepares.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from genssm.kernels import arguments
from genssm.kernels.custom_op import custom_op
from genssm.kernels.ssd.reference import directions_of

_MODULES = {"chunked": "chunked", "triton": "triton_ssd"}
_TENSORS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "Tensor? orders, Tensor? initial_state, Tensor? lengths, Tensor? cu_seqlens, bool reduce_sum, str backend"
)


@functools.cache
def implementation(backend: str) -> ModuleType:
    """The module that holds ``backend``, imported on first use."""
    return importlib.import_module(f"genssm.kernels.ssd.{_MODULES[backend]}")


@custom_op("genssm::ssd_fwd", schema=f"({_TENSORS}) -> (Tensor, Tensor, Tensor)")
def ssd_fwd(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, orders, initial_state, lengths, cu_seqlens, reduce_sum, backend
):
    arguments.check_visits("ssd", orders, cu_seqlens, x.shape[2])
    return implementation(backend).ssd_forward(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, orders, initial_state, lengths, cu_seqlens, reduce_sum
    )


@custom_op(
    "genssm::ssd_bwd",
    schema=f"(Tensor grad_out, Tensor? grad_last_state, Tensor saved, {_TENSORS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def ssd_bwd(grad_out, grad_last_state, saved, x, *rest):
    *arguments_, backend = rest
    gradients = implementation(backend).ssd_backward(grad_out, grad_last_state, saved, x, *arguments_)
    return tuple(x.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients)


@ssd_fwd.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, orders, initial_state, lengths, cu_seqlens, reduce_sum, backend):
    batch, _, *sizes = x.shape
    directions = directions_of(orders, x, dt, A, B, C, D, z, dt_bias)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = x.new_empty((batch, *sizes) if reduce_sum else (batch, directions, *sizes))
    last_state = x.new_empty((sequences, directions, *sizes[1:], B.shape[-1]), dtype=arguments.compute_dtype(x))
    return out, last_state, implementation(backend).new_saved(x, B, C, directions, sequences)


@ssd_bwd.register_fake
def _(grad_out, grad_last_state, saved, x, dt, A, B, C, D, z, dt_bias, dt_softplus, orders, initial_state, *rest):
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(x.new_empty(0) if y is None else y.new_empty(y.shape) for y in inputs)


def _setup_context(ctx, inputs, output) -> None:
    tensors, ctx.dt_softplus = inputs[:8], inputs[8]
    ctx.reduce_sum, ctx.backend = inputs[13:]
    out, _, saved = output
    ctx.save_for_backward(saved, *tensors, *inputs[9:13])
    ctx.out_shape, ctx.out_dtype = out.shape, out.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_last_state: Tensor | None, grad_saved: Tensor | None) -> tuple:
    saved, x, *rest = ctx.saved_tensors
    tensors, visits = (x, *rest[:7]), rest[7:]
    if grad_out is None:
        grad_out = x.new_zeros(ctx.out_shape)
    given = (*tensors, ctx.dt_softplus, *visits, ctx.reduce_sum)
    gradients = ssd_bwd(grad_out, grad_last_state, saved, *given, ctx.backend)
    present = (*tensors, visits[1])
    *of_tensors, initial = (g if y is not None else None for g, y in zip(gradients, present))
    return *of_tensors, None, None, initial, None, None, None, None


ssd_fwd.register_autograd(_backward, _setup_context)


# Multiplications and additions per token, head, channel and state of the recurrence; terms without the state are left
# out, and so is what a chunked form adds.
_FORWARD_OPERATIONS = 5
_BACKWARD_OPERATIONS = 13


@register_flop_formula(torch.ops.genssm.ssd_fwd)
def _forward_flops(x, dt, A, B, C, D, z, dt_bias, dt_softplus, orders, *rest, out_shape=None, **kwargs) -> int:
    return _FORWARD_OPERATIONS * _scanned(x, dt, A, B, C, D, z, dt_bias, orders)


@register_flop_formula(torch.ops.genssm.ssd_bwd)
def _backward_flops(
    grad_out, grad_last, saved, x, dt, A, B, C, D, z, dt_bias, dt_softplus, orders, *rest, out_shape=None, **kwargs
) -> int:
    return _BACKWARD_OPERATIONS * _scanned(x, dt, A, B, C, D, z, dt_bias, orders)


def _scanned(x, dt, A, B, C, D, z, dt_bias, orders) -> int:
    """Elements of all states of all tokens in all directions, from the shapes of the arguments."""
    batch, _, length, heads, width = x
    counts = [y[1] for y in (x, dt, B, C, z) if y is not None] + [y[0] for y in (A, D, dt_bias) if y is not None]
    return batch * (orders[0] if orders is not None else max(counts)) * length * heads * width * B[-1]


def scan(*args) -> tuple[Tensor, Tensor]:
    """Result and last state of the forward op on canonical arguments and a backend; differentiable once."""
    out, last_state, _ = ssd_fwd(*args)
    return out, last_state
