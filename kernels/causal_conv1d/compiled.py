"""Causal convolution along orders in C (conv.c), float32 on the CPU.

Opt in with ``backend="compiled"`` or ``GENSSM_BACKEND=compiled``; `genssm.kernels.native` builds it on first use.
"""

import ctypes
import itertools

import torch
from torch import Tensor

from genssm.kernels import native
from genssm.kernels.arguments import empty_directions, empty_gradient


class _Conv(ctypes.Structure):
    """Mirror of ``Conv`` in conv.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "directions", "length", "channels", "taps")),
        *((name, ctypes.c_int64) for name in ("runs", "plan_step", "silu", "threads", "x_directions")),
        *((name, ctypes.c_void_p) for name in ("x", "grad_out")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_direction", "x_row")),
        *((name, ctypes.c_int64) for name in ("grad_batch", "grad_direction", "grad_row")),
        *((name, ctypes.c_int64) for name in ("out_batch", "out_direction", "out_row")),
        *((name, ctypes.c_int64) for name in ("dx_batch", "dx_direction", "dx_row")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("weight_step", "bias_step")),
        *((name, ctypes.c_void_p) for name in ("plan", "orders", "lengths", "initial", "grad_last", "out", "last")),
        *((name, ctypes.c_void_p) for name in ("dx", "dweight", "dbias", "dinitial")),
    ]


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    K: int,
) -> tuple[Tensor, Tensor]:
    """Result (Bt, K, L, E) and last state (S, K, E, W - 1); canonical arguments as in `reference.conv_reference`."""
    call = _Call(x, weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K)
    out = empty_directions(x, K, torch.float32)
    last_state = torch.empty(call.sequences, K, x.shape[3], weight.shape[-1] - 1)
    call.strided("out", "out", out)
    call.pointers(last=last_state)
    call.run("genssm_conv_forward")
    return out.to(x.dtype), last_state


def conv_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    K: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state, each in the shape and dtype of its input."""
    call = _Call(x, weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K)
    batch, channels = x.shape[0], x.shape[3]
    call.strided("grad_out", "grad", grad_out)
    dx = empty_gradient(x, torch.float32)
    call.strided("dx", "dx", dx)
    dweight, dbias = torch.empty(batch, K, weight.shape[-1], channels), torch.empty(batch, K, channels)
    dinitial = None if initial_state is None else torch.empty(initial_state.shape)
    call.pointers(dweight=dweight, dbias=dbias, dinitial=dinitial, grad_last=grad_last_state)
    call.run("genssm_conv_backward")
    dweight, dbias = dweight.sum(0).transpose(1, 2), dbias.sum(0)  # (K, E, W), (K, E)
    dweight = dweight.sum(0, keepdim=True) if weight.shape[0] < K else dweight.contiguous()
    if bias is not None:
        dbias = (dbias.sum(0, keepdim=True) if bias.shape[0] < K else dbias).to(bias.dtype)
    return dx.to(x.dtype), dweight.to(weight.dtype), None if bias is None else dbias, dinitial


class _Call:
    """The arguments of one call in the form that conv.c takes, and the tensors that must outlive it."""

    def __init__(self, x, weight, bias, silu, orders, initial_state, lengths, cu_seqlens, K) -> None:
        batch, _, length, channels = x.shape
        self.kept: list[Tensor] = []
        self.conv = _Conv(batch=batch, directions=K, length=length, channels=channels, taps=weight.shape[-1])
        self.conv.silu, self.conv.threads, self.conv.x_directions = silu, torch.get_num_threads(), x.shape[1]
        self.strided("x", "x", x)
        taps = weight.float().transpose(1, 2).contiguous()  # (1 or K, W, E)
        bias = None if bias is None else bias.float()
        self.pointers(weight=taps, bias=bias, orders=orders, lengths=lengths, initial=initial_state)
        self.conv.weight_step = 0 if taps.shape[0] == 1 else taps[0].numel()
        self.conv.bias_step = 0 if bias is None or bias.shape[0] == 1 else channels
        self.sequences = batch
        plan = torch.tensor([[[0, length, -1, 0]]], dtype=torch.int32)
        if cu_seqlens is not None:
            self.sequences = cu_seqlens.shape[0] - 1
            plan = _packed_plan(cu_seqlens, orders, length)
            self.conv.plan_step = 0 if orders is None else self.sequences
        self.conv.runs = plan.shape[1]
        self.pointers(plan=plan)

    def strided(self, name: str, prefix: str, x: Tensor) -> None:
        """Hand over (Bt, 1 or K, L, E) by its strides where the last dimension is dense."""
        x = x.detach().float()
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            x = x.contiguous()
        self.kept.append(x)
        setattr(self.conv, name, x.data_ptr())
        steps = (x.stride(0), 0 if x.shape[1] == 1 else x.stride(1), x.stride(2))
        for field, step in zip(("batch", "direction", "row"), steps):
            setattr(self.conv, f"{prefix}_{field}", step)

    def pointers(self, **tensors: Tensor | None) -> None:
        """Hand over dense tensors."""
        for name, x in tensors.items():
            if x is not None:
                x = x.detach().contiguous()
                self.kept.append(x)
                setattr(self.conv, name, x.data_ptr())

    def run(self, function: str) -> None:
        library = native.load("causal_conv1d/conv.c")
        if library.genssm_conv_size() != ctypes.sizeof(_Conv):
            raise RuntimeError("conv.c and compiled.py describe different structures; reinstall genssm")
        if getattr(library, function)(ctypes.byref(self.conv)):
            raise MemoryError(f"{function}: no memory for the workspace")


def _packed_plan(cu_seqlens: Tensor, orders: Tensor | None, length: int) -> Tensor:
    """First step, last step + 1 and number of every sequence in every direction, (1 or K, S, 4)."""
    borders = list(itertools.pairwise(cu_seqlens.tolist()))
    visits = torch.arange(length)[None] if orders is None else torch.argsort(orders, dim=1)
    plan = torch.zeros(visits.shape[0], len(borders), 4, dtype=torch.int32)
    for k, steps in enumerate(visits):
        for s, (low, high) in enumerate(borders):
            first = int(steps[low:high].min()) if high > low else 0
            plan[k, s] = torch.tensor([first, first + high - low, s, 0])
    return plan
