"""Matrix products around the scan of a mixer, without passes over memory of their own for what lies between them.

Autograd joins the gradients of a split, adds those of a tensor that is read twice, and stacks those of directions with
weights of their own: each is a pass over all tokens. Here the products write into the parts and add to what is there.
Compilers, transforms, adapters and hooks see the modules called instead (`bare`), which computes the same.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from genssm.kernels import dispatch
from genssm.kernels.custom_op import batched, watched
from genssm.layers.modulation import product_dtype

# Whether CUDA's products of half precisions can have a result in float32.
_WIDENS = torch.version.cuda is not None and "dtype" in torch.ops.aten.mm.overloads()

# B batch, K directions, L tokens, E channels, R dt_rank, N d_state, S sets of weights (1 or K), M = K B L / S rows each


def bare(x: torch.Tensor, *modules: nn.Module) -> bool:
    """Whether these modules on ``x`` are their matrix products without a bias and nothing else.

    Not so where something looks on, or where an adapter, an offloading hook or a weight of a kind of its own does more.
    The reference, which can be differentiated twice, stands in plain operations.
    """
    return (
        not watched()
        and all(map(_is_product, modules))
        and dispatch.resolve("selective_scan", "auto", x) != "reference"
    )


def _is_product(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.bias is None
        and type(module.weight) in (torch.Tensor, nn.Parameter)
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def halves(linear: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of ``linear(x)`` along its last dimension."""
    if torch.is_grad_enabled() and bare(x, linear):
        return _Halves.apply(_for_product(x), linear.weight)
    return linear(x).chunk(2, dim=-1)


def steps_and_maps(
    x: torch.Tensor, x_projs: Sequence[nn.Module], dt_projs: Sequence[nn.Module], sizes: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """What a scan reads: [dt, B, C] = W_x x, delta = W_dt dt.

    Args:
        x: (..., E), or (B, K, L, E) with the directions outermost in memory.
        x_projs, dt_projs: W_x and W_dt of each of K directions, or of all.
        sizes: R, N and N.

    Returns:
        u, which is x and to be read by the scan alone: it may add to its gradient in place. delta, shaped as x, B and C
        (..., N).
    """
    several = len(x_projs) > 1
    if (several or torch.is_grad_enabled()) and bare(x, *x_projs, *dt_projs):
        weights = (module.weight for module in (*x_projs, *dt_projs))
        return _StepsAndMaps.apply(sizes, _for_product(x), *weights)
    return _one_by_one(x, x_projs, dt_projs, sizes)


def _one_by_one(
    x: torch.Tensor, x_projs: Sequence[Callable], dt_projs: Sequence[Callable], sizes: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """`steps_and_maps` in plain operations."""
    outer = _outermost(x)
    if len(x_projs) == 1:
        dt, *maps = x_projs[0](outer).split(sizes, dim=-1)
        return x, *(_outermost(part) for part in (dt_projs[0](dt), *maps))
    found = []
    for part, x_proj, dt_proj in zip(outer.unbind(0), x_projs, dt_projs):
        dt, *maps = x_proj(part).split(sizes, dim=-1)
        found.append((dt_proj(dt), *maps))
    return x, *(_outermost(torch.stack(parts)) for parts in zip(*found))


def _outermost(x: torch.Tensor) -> torch.Tensor:
    """(B, K, L, ...) as (K, B, L, ...) and back; anything else as it is."""
    return x.transpose(0, 1) if x.dim() == 4 else x


def _for_product(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the type that autocast gives to a matrix product."""
    return x.to(product_dtype(x) or x.dtype)


def _weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """grad^T x, for rows (M, F) and (M, E), in the type of the weight: under autocast a wider one than theirs.

    Where the device can, it comes from the product's own sums, without being rounded to the narrow type before.
    """
    if dtype == grad.dtype:
        return torch.mm(grad.t(), x, out=out)
    if _WIDENS and grad.is_cuda and dtype == torch.float32:
        return torch.mm(grad.t(), x, out_dtype=dtype) if out is None else torch.mm(grad.t(), x, dtype, out=out)
    rounded = torch.mm(grad.t(), x)
    return rounded.to(dtype) if out is None else out.copy_(rounded)


def _differentiated(function: Callable, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> tuple:
    """Gradients by autograd's own rules: of many results at once, which nothing can be written into."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*inputs), inputs, grads)


def _copy(part: torch.Tensor, rows: torch.Tensor) -> None:
    """``part.copy_(rows)`` for columns of a wider matrix, in words of eight bytes where they consist of such: what does
    not lie in one piece is copied element by element."""
    if part.dtype == rows.dtype and _in_words(part) and _in_words(rows):
        part, rows = part.view(torch.int64), rows.view(torch.int64)
    part.copy_(rows)


def _in_words(x: torch.Tensor) -> bool:
    size = torch.int64.itemsize // x.itemsize
    return x.stride(-1) == 1 and all(n % size == 0 for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.dtype, weight = weight.dtype, _for_product(weight)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight).chunk(2, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        if batched():
            dx, dweight = _differentiated(lambda x, w: F.linear(x, w).chunk(2, dim=-1), (x, weight), grads)
            return dx, dweight.to(ctx.dtype)
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # (M, E) each
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            first, second = weight.chunk(2)
            dx = torch.mm(grads[0], first).addmm_(grads[1], second).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = torch.empty_like(weight, dtype=ctx.dtype, memory_format=torch.contiguous_format)
            rows = x.reshape(-1, x.shape[-1])
            for grad, part in zip(grads, dweight.chunk(2)):
                _weight_gradient(grad, rows, ctx.dtype, out=part)
        return dx, dweight


class _StepsAndMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sizes, x, *weights):
        sets, outer = len(weights) // 2, _outermost(x)
        ctx.dtypes, weights = [weight.dtype for weight in weights], [_for_product(weight) for weight in weights]
        rows = outer.reshape(sets, -1, x.shape[-1])  # (S, M, E)
        mapped = x.new_empty(sets, rows.shape[1], sum(sizes))
        delta = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dt = mapped[..., : sizes[0]]
        for s in range(sets):
            torch.mm(rows[s], weights[s].t(), out=mapped[s])
            torch.mm(dt[s], weights[sets + s].t(), out=delta[s])
        ctx.sizes = sizes
        ctx.save_for_backward(x, mapped, *weights)
        _, *maps = mapped.view(*outer.shape[:-1], -1).split(sizes, dim=-1)
        return x.view_as(x), *(_outermost(part) for part in (delta.view(outer.shape), *maps))

    @staticmethod
    @once_differentiable
    def backward(ctx, du, ddelta, *dmaps):
        x, mapped, *weights = ctx.saved_tensors
        sets, outer = len(weights) // 2, _outermost(du)
        if batched():

            def again(x, *weights):
                projs = [functools.partial(F.linear, weight=weight) for weight in weights]
                u, *found = _one_by_one(x, projs[:sets], projs[sets:], ctx.sizes)
                return u.view_as(u), *found

            dx, *found = _differentiated(again, (x, *weights), (du, ddelta, *dmaps))
            return None, dx, *(grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes))
        x, du, ddelta, *dmaps = (_outermost(t).reshape(sets, mapped.shape[1], -1) for t in (x, du, ddelta, *dmaps))
        du, dmapped = du.contiguous(), torch.empty_like(mapped)
        for part, grad in zip(dmapped.split(ctx.sizes, dim=-1)[1:], dmaps):
            _copy(part, grad)
        dt, ddt = mapped[..., : ctx.sizes[0]], dmapped[..., : ctx.sizes[0]]
        needed, of_x, of_dt = ctx.needs_input_grad, [], []
        for s in range(sets):
            torch.mm(ddelta[s], weights[sets + s], out=ddt[s])
            of_x.append(_weight_gradient(dmapped[s], x[s], ctx.dtypes[s]) if needed[2 + s] else None)
            of_dt.append(_weight_gradient(ddelta[s], dt[s], ctx.dtypes[sets + s]) if needed[2 + sets + s] else None)
            if needed[1]:
                du[s].addmm_(dmapped[s], weights[s])
        return None, _outermost(du.view(outer.shape)) if needed[1] else None, *of_x, *of_dt
