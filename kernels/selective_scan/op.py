"""The scan as torch custom ops, ``genssm::selective_scan_fwd`` and ``_bwd``: fake, autograd and flop rules.

One pair of ops serves all fast implementations; the backend is an argument. An implementation is a module with

    scan_forward(u, ..., reduce_sum, return_last_state) -> (out, last_state or an empty tensor, saved)
    scan_backward(grad_out, grad_last_state, saved, u, ..., reduce_sum) -> nine gradients
    saved_shape(batch, directions, length, channels, states, sequences) -> shape of ``saved``, float32 or float64

with the canonical arguments that `genssm.kernels.selective_scan` prepares. Gradients end up as in
`arguments.empty_gradient`.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from genssm.kernels import arguments
from genssm.kernels.custom_op import custom_op
from genssm.kernels.selective_scan.reference import directions_of

_MODULES = {"chunked": "chunked", "compiled": "compiled", "triton": "triton_scan"}
_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? orders, Tensor? initial_state, Tensor? lengths, Tensor? cu_seqlens, "
    "bool reduce_sum"
)


@functools.cache
def implementation(backend: str) -> ModuleType:
    """The module that holds ``backend``, imported on first use."""
    return importlib.import_module(f"genssm.kernels.selective_scan.{_MODULES[backend]}")


@custom_op(
    "genssm::selective_scan_fwd",
    schema=f"({_TENSORS}, bool return_last_state, str backend) -> (Tensor, Tensor, Tensor)",
)
def scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, initial_state, lengths, cu_seqlens, *rest):
    arguments.check_visits("selective_scan", orders, cu_seqlens, u.shape[2])
    *rest, backend = rest
    return implementation(backend).scan_forward(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, initial_state, lengths, cu_seqlens, *rest
    )


@custom_op(
    "genssm::selective_scan_bwd",
    schema=f"(Tensor grad_out, Tensor? grad_last_state, Tensor saved, {_TENSORS}, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def scan_bwd(grad_out, grad_last_state, saved, u, *rest):
    *arguments_, backend = rest
    gradients = implementation(backend).scan_backward(grad_out, grad_last_state, saved, u, *arguments_)
    inputs = (u, *arguments_[:7], arguments_[9])
    return tuple(u.new_empty(0) if g is None else arguments.as_gradient(g, x) for g, x in zip(gradients, inputs))


@scan_fwd.register_fake
def _(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    orders,
    initial_state,
    lengths,
    cu_seqlens,
    reduce_sum,
    return_last_state,
    backend,
):
    batch, _, length, channels = u.shape
    states = A.shape[-1]
    directions = directions_of(orders, u, delta, A, B, C, D, z, delta_bias)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = arguments.compute_dtype(u)
    out = u.new_empty((batch, length, channels) if reduce_sum else (batch, directions, length, channels))
    last_state = u.new_empty((sequences, directions, channels, states) if return_last_state else 0, dtype=dtype)
    saved = implementation(backend).saved_shape(batch, directions, length, channels, states, sequences)
    return out, last_state, u.new_empty(saved, dtype=dtype)


@scan_bwd.register_fake
def _(
    grad_out, grad_last_state, saved, u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, initial_state, *rest
):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(u.new_empty(0) if x is None else arguments.empty_gradient(x) for x in inputs)


def _setup_context(ctx, inputs, output) -> None:
    (
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        bias,
        ctx.delta_softplus,
        orders,
        initial,
        lengths,
        cu_seqlens,
        ctx.reduce_sum,
        ctx.return_last_state,
        ctx.backend,
    ) = inputs
    out, _, saved = output
    ctx.save_for_backward(saved, u, delta, A, B, C, D, z, bias, orders, initial, lengths, cu_seqlens)
    ctx.out_shape, ctx.out_dtype = out.shape, out.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_last_state: Tensor | None, grad_saved: Tensor | None) -> tuple:
    saved, u, delta, A, B, C, D, z, bias, orders, initial, lengths, cu_seqlens = ctx.saved_tensors
    if grad_out is None:
        grad_out = u.new_zeros(ctx.out_shape)
    given = (u, delta, A, B, C, D, z, bias, ctx.delta_softplus, orders, initial, lengths, cu_seqlens, ctx.reduce_sum)
    grad_last_state = grad_last_state if ctx.return_last_state else None  # else of an empty tensor
    gradients = scan_bwd(grad_out, grad_last_state, saved, *given, ctx.backend)
    present = (u, delta, A, B, C, D, z, bias, initial)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = (g if x is not None else None for g, x in zip(gradients, present))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, None, None, dinitial, None, None, None, None, None


scan_fwd.register_autograd(_backward, _setup_context)


# Multiplications, additions and exponentials per token, channel and state; terms without the state are left out.
_FORWARD_OPERATIONS = 7
_BACKWARD_OPERATIONS = 20


@register_flop_formula(torch.ops.genssm.selective_scan_fwd)
def _forward_flops(u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, *rest, out_shape=None, **kwargs) -> int:
    return _FORWARD_OPERATIONS * _scanned(u, delta, A, B, C, D, z, delta_bias, orders)


@register_flop_formula(torch.ops.genssm.selective_scan_bwd)
def _backward_flops(
    grad_out,
    grad_last,
    saved,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    delta_softplus,
    orders,
    *rest,
    out_shape=None,
    **kwargs,
) -> int:
    return _BACKWARD_OPERATIONS * _scanned(u, delta, A, B, C, D, z, delta_bias, orders)


def _scanned(u, delta, A, B, C, D, z, delta_bias, orders) -> int:
    """Elements of all states of all tokens in all directions, from the shapes of the arguments."""
    batch, _, length, channels = u
    counts = [x[1] for x in (u, delta, B, C, z) if x is not None] + [x[0] for x in (A, D, delta_bias) if x is not None]
    return batch * (orders[0] if orders is not None else max(counts)) * length * channels * A[-1]


def scan(*args) -> tuple[Tensor, Tensor]:
    """Result and last state of the forward op on canonical arguments and a backend; differentiable once."""
    out, last_state, _ = scan_fwd(*args)
    return out, last_state
