"""Selective scan in C (scan.c), float32 on the CPU: the same chunks and the same adjoint as chunked.py, much faster.

Opt in with ``backend="compiled"`` or ``GENSSM_BACKEND=compiled``; `genssm.kernels.native` builds it on first use.
"""

import ctypes

import torch
from torch import Tensor

from genssm.kernels import native
from genssm.kernels.selective_scan.chunked import chunk_steps, saved_shape
from genssm.kernels.selective_scan.reference import directions_of
from genssm.kernels.spans import packed_spans, spans

__all__ = ["saved_shape", "scan_backward", "scan_forward"]

_LOG2E = 1.4426950408889634
_STRIP = 32  # channels, as in vectors.c
_ITEMS = 32  # independent pieces of backward work, whatever the number of threads: the same bits on every machine
_INPUTS = ("u", "delta", "B", "C", "z", "grad_out")


class _Input(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch", "direction", "row", "group", "directions")
    ]


class _Scan(ctypes.Structure):
    """Mirror of ``Scan`` in scan.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "directions", "length", "groups", "width", "states")),
        *((name, ctypes.c_int64) for name in ("chunks", "max_chunk", "parts", "threads", "softplus", "reduce")),
        *((name, _Input) for name in _INPUTS),
        *((name, ctypes.c_void_p) for name in ("A", "D", "bias")),
        *((name, ctypes.c_int64) for name in ("A_step", "D_step", "bias_step")),
        ("plan", ctypes.c_void_p),
        ("plan_step", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("orders", "lengths", "initial", "grad_last", "out", "last", "saved")),
        *((name, ctypes.c_void_p) for name in ("du", "ddelta", "dz", "dB", "dC", "dA", "dD", "dbias", "dinitial")),
    ]


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    reduce_sum: bool,
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, last state (empty where not wanted) and the states before each chunk; canonical arguments as in
    `reference.scan_reference`."""
    call = _Call(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, initial_state, lengths, cu_seqlens, reduce_sum
    )
    K, N, (batch, _, length, channels) = call.directions, A.shape[-1], u.shape
    out = torch.empty((batch, length, channels) if reduce_sum else (batch, K, length, channels))
    last_state = torch.empty(call.sequences, K, channels, N)
    saved = torch.empty(saved_shape(batch, K, length, channels, N, call.sequences))
    if cu_seqlens is not None:  # slots that no chunk uses, and sequences without a token
        saved.zero_()
        last_state.copy_(initial_state) if initial_state is not None else last_state.zero_()
    call.pointers(out=out, last=last_state, saved=saved)
    call.run("genssm_scan_forward")
    return out.to(u.dtype), last_state if return_last_state else last_state.new_empty(0), saved


def scan_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    reduce_sum: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, each in the shape and dtype of its input."""
    call = _Call(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, initial_state, lengths, cu_seqlens, reduce_sum
    )
    K, G, N, (batch, _, _, channels) = call.directions, B.shape[3], A.shape[-1], u.shape
    call.input("grad_out", grad_out.unsqueeze(1) if reduce_sum else grad_out)
    du, ddelta = torch.empty(u.shape), torch.empty(delta.shape)
    dz = None if z is None else torch.empty(z.shape)
    dB, dC = (torch.zeros(call.parts, *x.shape) for x in (B, C))
    dA, dD, dbias = (
        torch.zeros(batch, K, G, N, channels // G),
        torch.zeros(batch, K, channels),
        torch.zeros(batch, K, channels),
    )
    dinitial = None
    if initial_state is not None:  # a sequence without a token hands its state through
        dinitial = torch.zeros_like(initial_state, memory_format=torch.contiguous_format)
        if cu_seqlens is not None and grad_last_state is not None:
            dinitial.copy_(grad_last_state)
    call.pointers(du=du, ddelta=ddelta, dz=dz, dB=dB, dC=dC, dA=dA, dD=dD, dbias=dbias, dinitial=dinitial)
    call.pointers(saved=saved.contiguous(), grad_last=None if grad_last_state is None else grad_last_state.contiguous())
    call.run("genssm_scan_backward")

    def shared(full: Tensor, x: Tensor) -> Tensor:
        full = full.sum(0)
        return full.sum(0, keepdim=True) if x.shape[0] < K else full

    return (
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        shared(dA, A).transpose(-1, -2).reshape(A.shape).to(A.dtype),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        None if D is None else shared(dD, D).to(D.dtype),
        None if z is None else dz.to(z.dtype),
        None if delta_bias is None else shared(dbias, delta_bias).to(delta_bias.dtype),
        dinitial,
    )


class _Call:
    """The arguments of one call in the form that scan.c takes, and the tensors that must outlive it."""

    def __init__(
        self, u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders, initial, lengths, cu_seqlens, reduce_sum
    ) -> None:
        batch, _, length, channels = u.shape
        groups = B.shape[3]
        self.directions = directions_of(orders, u, delta, A, B, C, D, z, delta_bias)
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        strips = -(-(channels // groups) // _STRIP)
        self.parts = min(strips, -(-_ITEMS // max(1, batch * groups)))
        self.kept: list[Tensor] = []
        sizes = {"batch": batch, "directions": self.directions, "length": length, "groups": groups}
        sizes.update(width=channels // groups, states=A.shape[-1], parts=self.parts, threads=torch.get_num_threads())
        self.scan = _Scan(**sizes, softplus=delta_softplus, reduce=reduce_sum)
        for name, x in (("u", u), ("delta", delta), ("B", B), ("C", C), ("z", z)):
            if x is not None:
                self.input(name, x)
        A = (A * _LOG2E).unflatten(1, (groups, channels // groups)).transpose(-1, -2).contiguous()
        self.pointers(A=A, D=D, bias=delta_bias, orders=orders, lengths=lengths, initial=initial)
        self.scan.A_step, self.scan.D_step, self.scan.bias_step = (
            0 if x is None or x.shape[0] == 1 else x[0].numel() for x in (A, D, delta_bias)
        )
        self._plan(length, cu_seqlens, orders)

    def _plan(self, length: int, cu_seqlens: Tensor | None, orders: Tensor | None) -> None:
        steps = chunk_steps(length)
        if cu_seqlens is None:
            rows = [spans(length, steps)]
        else:
            orders_k = [None] * self.directions if orders is None else orders
            rows = [packed_spans(length, steps, cu_seqlens, order) for order in orders_k]
        longest = max(len(row) for row in rows)
        plan = torch.zeros(len(rows), longest, 4, dtype=torch.int32)
        for row, to in zip(rows, plan):
            values = [(x.low, x.high, -1 if x.sequence is None else x.sequence, x.first + 2 * x.last) for x in row]
            to[: len(row)] = torch.tensor(values, dtype=torch.int32)
        self.pointers(plan=plan)
        self.scan.chunks, self.scan.plan_step = longest, 0 if cu_seqlens is None else longest
        self.scan.max_chunk = min(length, steps)

    def input(self, name: str, x: Tensor) -> None:
        """Hand over (Bt, 1 or K, L, E) or (Bt, 1 or K, L, G, N), by its strides where the last dimension is dense."""
        x = x.detach().float()
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            x = x.contiguous()
        self.kept.append(x)
        batch, direction, row, group = (*x.stride()[:3], x.stride(3) if x.ndim == 5 else 0)
        direction = 0 if x.shape[1] == 1 else direction
        setattr(self.scan, name, _Input(x.data_ptr(), batch, direction, row, group, x.shape[1]))

    def pointers(self, **tensors: Tensor | None) -> None:
        """Hand over dense tensors."""
        for name, x in tensors.items():
            if x is not None:
                x = x.detach().contiguous()
                self.kept.append(x)
                setattr(self.scan, name, x.data_ptr())

    def run(self, function: str) -> None:
        library = native.load("selective_scan/scan.c")
        if library.genssm_scan_size() != ctypes.sizeof(_Scan):
            raise RuntimeError("scan.c and compiled.py describe different structures; reinstall genssm")
        if getattr(library, function)(ctypes.byref(self.scan)):
            raise MemoryError(f"{function}: no memory for the workspace")
