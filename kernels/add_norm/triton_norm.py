"""Residual update, norm and modulation in Triton: one launch forward; one launch and short sums backward."""

# B batch, L tokens, D channels; a row is one token, and a program holds whole rows

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.add_norm.op import added_dtypes, modulated_dtypes, product_dtype, stream_dtype
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

_NAME = "add_norm"
_WANTED = 4  # programs of the backward per multiprocessor: each keeps sums over its tokens
# Nothing is compiled anew for another batch or length.
_FORWARD = ["length", *(f"{name}_{dim}" for name in ("h", "x", "gate", "shift", "scale", "factor") for dim in "bl")]
_BACKWARD = [
    "length",
    "chunks",
    *(f"{name}_{dim}" for name in ("h", "x", "gate", "scale", "gh", "gy", "gn", "factor") for dim in "bl"),
]


@triton.jit
def load_vector(x, e, D: tl.constexpr):
    """A parameter in float32, zero beyond D."""
    return tl.load(x + e, mask=e < D, other=0.0).to(tl.float32)


@triton.jit
def standardise(t, e, LAYER: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr):
    """A row with mean square 1 (LAYER: and mean 0), zero beyond D, and what it was multiplied by."""
    if LAYER:
        t = tl.where(e < D, t - tl.sum(t, axis=0) / D, 0.0)
    spread = tl.rsqrt(tl.sum(t * t, axis=0) / D + EPS)
    return t * spread, spread


@triton.jit(do_not_specialize=_FORWARD)
def norm_forward_kernel(
    h, x, gate, weight, bias, shift, scale, factor, new_h, y, n,
    h_b, h_l, x_b, x_l, gate_b, gate_l, shift_b, shift_l, scale_b, scale_l, factor_b, factor_l, length,
    PRODUCT: tl.constexpr, STREAM: tl.constexpr, NORMED: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
    ADDED: tl.constexpr, ADD_NORMED: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr,
    D: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token."""
    row = tl.program_id(0)
    b, l = (row // length).to(tl.int64), (row % length).to(tl.int64)
    at = row.to(tl.int64) * D
    e = tl.arange(0, BLOCK)
    mask = e < D
    t = load_row(h, b, l, h_b, h_l, e, D, ALIGNED)
    if x is not None:
        added = load_row(x, b, l, x_b, x_l, e, D, ALIGNED)
        if gate is not None:
            added = rounded(added * load_row(gate, b, l, gate_b, gate_l, e, D, ALIGNED), PRODUCT)
        t = rounded(t + added, STREAM)
        tl.store(new_h + at + e, t, mask=mask)
    r, _ = standardise(t, e, LAYER, EPS, D)
    if weight is not None:
        r *= load_vector(weight, e, D)
    if bias is not None:
        r += load_vector(bias, e, D)
    r = rounded(r, NORMED)
    if n is not None:
        tl.store(n + at + e, r, mask=mask)
    if ADD_NORMED:
        added = r
        if factor is not None:
            added = rounded(added * load_number(factor, b, l, factor_b, factor_l), ADDED)
        tl.store(new_h + at + e, t + added, mask=mask)
    if scale is not None:
        s = rounded(1.0 + load_row(scale, b, l, scale_b, scale_l, e, D, ALIGNED), scale.dtype.element_ty)
        r = rounded(r * s, SCALED)
        r = rounded(r + load_row(shift, b, l, shift_b, shift_l, e, D, ALIGNED), SHIFTED)
    tl.store(y + at + e, r, mask=mask)


@triton.jit(do_not_specialize=_BACKWARD)
def norm_backward_kernel(
    gh, gy, gn, h, x, gate, weight, bias, scale, factor, dh, dx, dgate, dweight, dbias, dshift, dscale,
    h_b, h_l, x_b, x_l, gate_b, gate_l, scale_b, scale_l, gh_b, gh_l, gy_b, gy_l, gn_b, gn_l,
    factor_b, factor_l, length, chunks,
    NORMED: tl.constexpr, GATE_OF_TOKEN: tl.constexpr, SHIFT_OF_TOKEN: tl.constexpr, SCALE_OF_TOKEN: tl.constexpr,
    STAGES: tl.constexpr, ADD_NORMED: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr,
    D: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A stretch of one sample's tokens; sums over them go to the program's own row."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    tokens = tl.cdiv(length, chunks)
    first = (program % chunks) * tokens
    e = tl.arange(0, BLOCK)
    mask = e < D
    w = load_vector(weight, e, D) if weight is not None else 1.0
    offset = load_vector(bias, e, D) if bias is not None else 0.0
    zeros = tl.zeros([BLOCK], tl.float32)
    sum_gate, sum_weight, sum_bias, sum_shift, sum_scale = zeros, zeros, zeros, zeros, zeros
    for i in tl.range(tl.minimum(tokens, length - first), num_stages=STAGES):
        l = first.to(tl.int64) + i
        at = (b * length + l) * D + e
        t = load_row(h, b, l, h_b, h_l, e, D, ALIGNED)
        r, spread = standardise(t, e, LAYER, EPS, D)
        g = zeros
        if gy is not None:
            g = load_row(gy, b, l, gy_b, gy_l, e, D, ALIGNED)
            if scale is not None:
                to_scale = g * rounded(r * w + offset, NORMED)
                if SHIFT_OF_TOKEN:
                    tl.store(dshift + at, g, mask=mask)
                else:
                    sum_shift += g
                if SCALE_OF_TOKEN:
                    tl.store(dscale + at, to_scale, mask=mask)
                else:
                    sum_scale += to_scale
                s = load_row(scale, b, l, scale_b, scale_l, e, D, ALIGNED)
                g *= rounded(1.0 + s, scale.dtype.element_ty)
        if gn is not None:
            g += load_row(gn, b, l, gn_b, gn_l, e, D, ALIGNED)
        if ADD_NORMED:
            added = load_row(gh, b, l, gh_b, gh_l, e, D, ALIGNED)
            g += added * load_number(factor, b, l, factor_b, factor_l) if factor is not None else added
        if bias is not None:
            sum_bias += g
        if weight is not None:
            sum_weight += g * r
            g *= w
        d = g - r * (tl.sum(g * r, axis=0) / D)
        if LAYER:
            d -= tl.sum(g, axis=0) / D
        d *= spread
        if gh is not None:
            d += load_row(gh, b, l, gh_b, gh_l, e, D, ALIGNED)
        tl.store(dh + at, d, mask=mask)
        if gate is not None:
            to_gate = d * load_row(x, b, l, x_b, x_l, e, D, ALIGNED)
            if GATE_OF_TOKEN:
                tl.store(dgate + at, to_gate, mask=mask)
            else:
                sum_gate += to_gate
            d *= load_row(gate, b, l, gate_b, gate_l, e, D, ALIGNED)
        if dx is not None:
            tl.store(dx + at, d, mask=mask)

    own = program.to(tl.int64) * D + e
    if gate is not None and not GATE_OF_TOKEN:
        tl.store(dgate + own, sum_gate, mask=mask)
    if weight is not None:
        tl.store(dweight + own, sum_weight, mask=mask)
    if bias is not None:
        tl.store(dbias + own, sum_bias, mask=mask)
    if scale is not None:
        if not SHIFT_OF_TOKEN:
            tl.store(dshift + own, sum_shift, mask=mask)
        if not SCALE_OF_TOKEN:
            tl.store(dscale + own, sum_scale, mask=mask)


def norm_forward(
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    add_normed: bool,
    layer: bool,
    eps: float,
    dtype: torch.dtype | None,
    normed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """New h, y and n, all (B, L, D) and contiguous; empty where h stays as it is and where n is not asked for.

    Raises:
        ValueError: float64 tensors, or more channels than a program can hold.
    """
    refuse_double(_NAME, h, x, gate, weight, bias, shift, scale, factor)
    stream = stream_dtype(h, x, gate)
    kept = stream if weight is None else weight.dtype
    scaled, shifted = modulated_dtypes(kept, shift, scale)
    added, new = added_dtypes(h, kept, factor) if add_normed else (stream, stream)
    rows = {"h": h, "x": x, "gate": gate, "shift": shift, "scale": scale}
    common = _arguments(h, rows, weight, bias, factor, add_normed, layer, eps)
    new_h = h.new_empty(h.shape if add_normed or x is not None else 0, dtype=new)
    y = h.new_empty(h.shape, dtype=dtype or shifted)
    n = h.new_empty(h.shape if normed else 0, dtype=kept)
    if h.shape[0] * h.shape[1]:
        with device_of(h):
            launch(
                norm_forward_kernel,
                (h.shape[0] * h.shape[1],),
                **common,
                new_h=new_h,
                y=y,
                n=n if normed else None,
                PRODUCT=None if x is None else TYPES[product_dtype(gate, x)],
                STREAM=TYPES[stream],
                NORMED=TYPES[kept],
                SCALED=TYPES[scaled],
                SHIFTED=TYPES[shifted],
                ADDED=TYPES[added],
                num_warps=warps(common["BLOCK"], 16),
                enable_fp_fusion=False,  # a product is rounded before something is added to it, as in PyTorch
            )
    return new_h, y, n


def norm_backward(
    dh: Tensor | None,
    dy: Tensor | None,
    dn: Tensor | None,
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    factor: Tensor | None,
    add_normed: bool,
    layer: bool,
    eps: float,
    added: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """Gradients of `norm_forward` from those of its three results.

    Args:
        h: after the addition.
        x: only where there is a gate.
        added: type of the gradient of what was added; None where it is not to be stored beside that of ``h``.
    Returns:
        Gradients of h, x, gate, weight, bias, shift and scale, in their types; empty where there are none.
    """
    batch, length, _ = h.shape
    rows = {"h": h, "x": x, "gate": gate, "scale": scale, "gh": dh, "gy": dy, "gn": dn}
    common = _arguments(h, rows, weight, bias, factor, add_normed and dh is not None, layer, eps)
    chunks = stretches(h, _WANTED)
    dh_in = torch.empty_like(h, memory_format=torch.contiguous_format)
    dx = None if added is None else h.new_empty(h.shape, dtype=added)
    dgate, dweight, dbias, dshift, dscale = (sums(v, h, chunks) for v in (gate, weight, bias, shift, scale))
    if batch:
        with device_of(h):
            launch(
                norm_backward_kernel, (batch * chunks,),
                **common, dh=dh_in, dx=dx, dgate=dgate, dweight=dweight, dbias=dbias, dshift=dshift, dscale=dscale,
                chunks=chunks, NORMED=TYPES[h.dtype if weight is None else weight.dtype],
                GATE_OF_TOKEN=of_token(gate, length), SHIFT_OF_TOKEN=of_token(shift, length),
                SCALE_OF_TOKEN=of_token(scale, length), STAGES=stages(common["BLOCK"], rows),
                num_warps=warps(common["BLOCK"], 8),
            )  # fmt: skip
    parts = ((dgate, gate), (dweight, weight), (dbias, bias), (dshift, shift), (dscale, scale))
    found = (dx, *(total(part, like) for part, like in parts))
    return dh_in, *(h.new_empty(0) if d is None else d for d in found)


def _arguments(
    h: Tensor,
    rows: dict[str, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    add_normed: bool,
    layer: bool,
    eps: float,
) -> dict:
    """What both kernels take."""
    return {
        **row_arguments(_NAME, h.shape[2], rows, factor),
        "weight": None if weight is None else weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "length": h.shape[1],
        "ADD_NORMED": add_normed,
        "LAYER": layer,
        "EPS": eps,
    }
