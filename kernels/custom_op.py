"""Functions that are torch custom ops to whoever looks at operations, and plain calls to everybody else.

Compilers, exporters, fake tensors, counters and function transforms see the op and take its rules. Eager PyTorch sees
none of it, and would only spend more time on the way to many kernels than these take: there the function is called as
it is, inside an autograd node where gradients are wanted.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genssm.kernels import triton_launch
from genssm.kernels.ahead import Ahead


class CustomOp:
    """A custom op on tensors and plain values, all given by position.

    Args:
        name: with its namespace.
        function: what it computes; its results are new tensors.
        schema: types of arguments and results; None reads the annotations of ``function``.
        mutates: names of the arguments that are changed in place.
    """

    def __init__(self, name: str, function: Callable, schema: str | None = None, mutates: tuple[str, ...] = ()) -> None:
        self.function, self.differentiable, self.ahead = function, None, None
        self.op = torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)
        self.name = name.rpartition(":")[2]
        self.mutated = [i for i, key in enumerate(inspect.signature(function).parameters) if key in mutates]
        self.register_fake = self.op.register_fake

    def register_autograd(self, backward: Callable, setup_context: Callable, differentiated: int = 1) -> None:
        """Take the rules of `torch.library.custom_op`, for both ways of a call.

        Args:
            differentiated: results, the first ones, that usually have gradients; what `Ahead` compiles is for these.
        """
        self.op.register_autograd(backward, setup_context=setup_context)
        function, name = self.function, self.name
        self.ahead = ahead = Ahead(name, self.op, backward, setup_context, differentiated)

        def forward(ctx, *args):
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        later = _autograd_function(name, forward, backward)

        def first_forward(ctx, *args):
            ahead(args, ctx.needs_input_grad)
            return forward(ctx, *args)

        def first_backward(ctx, *gradients):
            self.differentiable = later  # what is compiled by now, nobody has to compile ahead
            return backward(ctx, *gradients)

        self.differentiable = _autograd_function(name, first_forward, first_backward)

    def __call__(self, *args):
        if watched():
            if torch.compiler.is_compiling() or not triton_launch.compiles_only():
                return self.op(*args)
            return self.function(*args)
        recorded = False
        for x in args:
            if isinstance(x, Tensor):
                if type(x) not in _PLAIN or x.is_meta or x.is_neg() or x._is_zerotensor():
                    return self.op(*args)
                recorded = recorded or x.requires_grad
        if recorded and torch.is_grad_enabled():
            return (self.differentiable.apply if self.differentiable else self.op)(*args)
        for i in self.mutated:
            if not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return self.function(*args)


def _autograd_function(name: str, forward: Callable, backward: Callable) -> type[torch.autograd.Function]:
    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


_PLAIN = (Tensor, torch.nn.Parameter)
_BATCHED = torch._C._dispatch_key_parse("VmapMode")  # of batched gradients, which are no functorch transform


def watched() -> bool:
    """Whether something wants to see operations: a compiler, a mode, a transform, a tracer, forward-mode derivatives.

    The compiler comes first, for which the rest does not exist.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or batched()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def batched() -> bool:
    """Whether many gradients are asked for at once, ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_BATCHED)


def custom_op(name: str, schema: str | None = None, mutates: tuple[str, ...] = ()) -> Callable[[Callable], CustomOp]:
    """Decorator that makes a function a `CustomOp`."""
    return lambda function: CustomOp(name, function, schema, mutates)
