"""One token through a Mamba-2 mixer in Triton: two launches, each state read and written once."""

# P channels of a head, N state, W taps, E channels, M channels of the convolution

import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.selective_scan.triton_tiles import sigmoid, softplus
from genssm.kernels.triton_launch import device_of, launch, refuse_double
from genssm.kernels.triton_overlap import overlap, wait_for_inputs

_NAME = "mamba2_step"
_CONV_BLOCK = 256
_TILE = 2048  # bytes of the state that a program, one warp, holds: many small ones keep the memory busiest
_LARGEST = tl.constexpr(65504.0)  # number in float16


@triton.jit(do_not_specialize=["p_b", "c_b", "m_b"])
def conv_step_kernel(
    projected, state, weight, bias, mapped, p_b, c_b, m_b, first, channels,
    W: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Convolution of the new token with the W - 1 before it, silu; the state moves on by one."""
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < channels
    wait_for_inputs(OVERLAP)
    x = tl.load(projected + b * p_b + first + e, mask=mask, other=0.0).to(tl.float32)
    total = x * tl.load(weight + e * W + (W - 1), mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + e, mask=mask, other=0.0).to(tl.float32)
    at = state + b * c_b + e * (W - 1)
    for j in tl.static_range(W - 1):
        old = tl.load(at + j, mask=mask, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + e * W + j, mask=mask, other=0.0).to(tl.float32)
        if j > 0:
            tl.store(at + (j - 1), old, mask=mask)
    if W > 1:
        tl.store(at + (W - 2), x, mask=mask)
    tl.store(mapped + b * m_b + e, total * sigmoid(total), mask=mask)


@triton.jit(do_not_specialize=["p_b", "m_b", "y_b"])
def scan_step_kernel(
    mapped, projected, state, a_log, skip, dt_bias, y, p_b, m_b, y_b, per_group, width, states,
    INNER: tl.constexpr, MAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """State of BLOCK_P channels of a head moved on by one token; its output, gated."""
    b = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_mask, n_mask = p < width, n < states
    channel = head * width + p
    # The state is nearly all there is to read: ask for it first, while the convolution still runs.
    at = state + (b * INNER + channel)[:, None] * states + n[None, :]
    mask = p_mask[:, None] & n_mask[None, :]
    before = tl.load(at, mask=mask, other=0.0)
    dt_shift = tl.load(dt_bias + head).to(tl.float32)
    rate = tl.exp(tl.load(a_log + head).to(tl.float32))
    through = tl.load(skip + head).to(tl.float32)
    wait_for_inputs(OVERLAP)
    maps = mapped + b * m_b + INNER + (head // per_group) * states + n
    x = tl.load(mapped + b * m_b + channel, mask=p_mask, other=0.0).to(tl.float32)
    to_state = tl.load(maps, mask=n_mask, other=0.0).to(tl.float32)
    to_output = tl.load(maps + MAPS, mask=n_mask, other=0.0).to(tl.float32)
    gate = tl.load(projected + b * p_b + channel, mask=p_mask, other=0.0).to(tl.float32)
    dt = tl.load(projected + b * p_b + 2 * INNER + 2 * MAPS + head).to(tl.float32)
    dt = softplus(dt + dt_shift)
    decay = tl.exp(-dt * rate)
    h = decay * before.to(tl.float32) + (dt * x)[:, None] * to_state[None, :]
    kept = h
    if state.dtype.element_ty == tl.float16:
        kept = tl.clamp(h, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(at, kept, mask=mask)
    out = tl.sum(h * to_output[None, :], axis=1) + through * x
    tl.store(y + b * y_b + channel, out * gate * sigmoid(gate), mask=p_mask)


def step_triton(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ngroups: int,
) -> Tensor:
    """Arguments and result as of `mamba2_step`; the states must be contiguous.

    Raises:
        ValueError: float64 tensors, or a state that is not contiguous.
    """
    refuse_double(_NAME, projected, ssm_state)
    if not (conv_state.is_contiguous() and ssm_state.is_contiguous()):
        raise ValueError(f"{_NAME}: the states are updated in place and must be contiguous")
    batch, _, heads, width, states = ssm_state.shape
    inner, maps, taps = heads * width, ngroups * states, conv_weight.shape[-1]
    channels = inner + 2 * maps
    projected, conv_weight = projected.contiguous(), conv_weight.contiguous()
    mapped, y = projected.new_empty(batch, channels), projected.new_empty(batch, inner)
    block_n = max(16, triton.next_power_of_2(states))
    block_p = max(4, min(triton.next_power_of_2(width), _TILE // ssm_state.element_size() // block_n))
    early = overlap(projected.device)
    with device_of(projected):
        launch(
            conv_step_kernel, (triton.cdiv(channels, _CONV_BLOCK), batch),
            projected=projected, state=conv_state, weight=conv_weight, bias=conv_bias, mapped=mapped,
            p_b=projected.stride(0), c_b=conv_state.stride(0), m_b=mapped.stride(0), first=inner, channels=channels,
            W=taps, BLOCK=_CONV_BLOCK, num_warps=4, **early,
        )  # fmt: skip
        launch(
            scan_step_kernel, (triton.cdiv(width, block_p), heads, batch),
            mapped=mapped, projected=projected, state=ssm_state, a_log=A_log, skip=D, dt_bias=dt_bias, y=y,
            p_b=projected.stride(0), m_b=mapped.stride(0), y_b=y.stride(0),
            per_group=heads // ngroups, width=width, states=states,
            INNER=inner, MAPS=maps, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=1, **early,
        )  # fmt: skip
    return y
