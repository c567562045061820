"""The convolution as torch custom ops, ``genssm::causal_conv1d_fwd`` and ``_bwd``: fake, autograd and flop rules.

One pair of ops serves all fast implementations; the backend is an argument. An implementation is a module with
``conv_forward`` and ``conv_backward`` on the canonical arguments that `genssm.kernels.causal_conv1d` prepares. Results
lie as in `arguments.empty_directions`, gradients of tokens as in `arguments.empty_gradient`.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from genssm.kernels import arguments
from genssm.kernels.custom_op import custom_op

_MODULES = {"chunked": "chunked", "compiled": "compiled", "triton": "triton_conv"}
_TENSORS = (
    "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? orders, Tensor? initial_state, Tensor? lengths, "
    "Tensor? cu_seqlens, int K, str backend"
)


@functools.cache
def implementation(backend: str) -> ModuleType:
    """The module that holds ``backend``, imported on first use."""
    return importlib.import_module(f"genssm.kernels.causal_conv1d.{_MODULES[backend]}")


@custom_op("genssm::causal_conv1d_fwd", schema=f"({_TENSORS}) -> (Tensor, Tensor)")
def conv_fwd(x, weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K, backend):
    arguments.check_visits("causal_conv1d", orders, cu_seqlens, x.shape[2])
    return implementation(backend).conv_forward(x, weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K)


@custom_op(
    "genssm::causal_conv1d_bwd",
    schema=f"(Tensor grad_out, Tensor? grad_last_state, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def conv_bwd(grad_out, grad_last_state, x, *rest):
    *arguments_, backend = rest
    gradients = implementation(backend).conv_backward(grad_out, grad_last_state, x, *arguments_)
    inputs = (x, arguments_[0], arguments_[1], arguments_[4])
    return tuple(x.new_empty(0) if g is None else arguments.as_gradient(g, y) for g, y in zip(gradients, inputs))


@conv_fwd.register_fake
def _(x, weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K, backend):
    batch, channels = x.shape[0], x.shape[3]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last_state = x.new_empty((sequences, K, channels, weight.shape[-1] - 1), dtype=arguments.compute_dtype(x))
    return arguments.empty_directions(x, K), last_state


@conv_bwd.register_fake
def _(grad_out, grad_last_state, x, weight, bias, silu, orders, initial_state, *rest):
    inputs = (x, weight, bias, initial_state)
    return tuple(x.new_empty(0) if y is None else arguments.empty_gradient(y) for y in inputs)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.silu, orders, initial, lengths, cu_seqlens, ctx.directions, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, orders, initial, lengths, cu_seqlens)
    ctx.out_shape = output[0].shape
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_last_state: Tensor | None) -> tuple:
    x, weight, bias, orders, initial, lengths, cu_seqlens = ctx.saved_tensors
    if grad_out is None:
        grad_out = x.new_zeros(ctx.out_shape)
    given = (x, weight, bias, ctx.silu, orders, initial, lengths, cu_seqlens, ctx.directions, ctx.backend)
    dx, dweight, dbias, dinitial = conv_bwd(grad_out, grad_last_state, *given)
    dbias = None if bias is None else dbias
    dinitial = None if initial is None else dinitial
    return dx, dweight, dbias, None, None, dinitial, None, None, None, None


conv_fwd.register_autograd(_backward, _setup_context)


@register_flop_formula(torch.ops.genssm.causal_conv1d_fwd)
def _forward_flops(
    x, weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K, *rest, out_shape=None, **kwargs
) -> int:
    batch, _, length, channels = x
    return 2 * batch * K * length * channels * weight[-1]


@register_flop_formula(torch.ops.genssm.causal_conv1d_bwd)
def _backward_flops(
    grad_out,
    grad_last,
    x,
    weight,
    bias,
    silu,
    orders,
    initial_state,
    lengths,
    cu_seqlens,
    K,
    *rest,
    out_shape=None,
    **kwargs,
) -> int:
    batch, _, length, channels = x
    return 4 * batch * K * length * channels * weight[-1]


def conv(*args) -> tuple[Tensor, Tensor]:
    """Result and last state of the forward op on canonical arguments and a backend; differentiable once."""
    return conv_fwd(*args)
