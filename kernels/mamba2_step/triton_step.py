"""One token through a Mamba-2 mixer in Triton: one launch or two, each state read and written once."""

# P channels of a head, N state, W taps, E channels, M channels of the convolution

import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.selective_scan.triton_tiles import sigmoid, softplus
from genssm.kernels.triton_launch import cdiv, device_of, launch, next_power_of_2, refuse_double

_NAME = "mamba2_step"
# Heads of all rows up to which one launch takes less time than two. More of them fill the device several times over:
# small programs keep its memory busiest then, and those cannot each convolve B and C again for a few channels of x.
_FEW_HEADS = 512
_CONV_BLOCK = 256
_TILE = 8192  # numbers of the state that a program holds, at most
_SMALL_TILE = 2048  # bytes of the state that it holds after a convolution
_OF_A_WARP = 2048  # numbers
_LARGEST = tl.constexpr(65504.0)  # number in float16


@triton.jit
def tap_tile(channel, mask, W: tl.constexpr, BLOCK_W: tl.constexpr, AXIS: tl.constexpr):
    """Offsets of the W taps of some channels, along AXIS, their mask, and the numbers of the taps."""
    tap = tl.expand_dims(tl.arange(0, BLOCK_W), 1 - AXIS)
    return tl.expand_dims(channel, AXIS) * W + tap, tl.expand_dims(mask, AXIS) & (tap < W), tap


@triton.jit
def convolve(
    inputs, windows, weight, bias, turn, channel, mask, channels,
    W: tl.constexpr, BLOCK_W: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Some channels of the convolution after silu, rounded as the operator over sequences rounds them."""
    at, within, tap = tap_tile(channel, mask, W, BLOCK_W, AXIS)
    x = tl.load(inputs + channel, mask=mask, other=0.0)
    # Which window is to be read is not known yet: asking for both is faster than asking for one later.
    first = tl.load(windows + at, mask=within, other=0.0)
    second = tl.load(windows + channels * W + at, mask=within, other=0.0)
    taps = tl.load(weight + at, mask=within, other=0.0).to(tl.float32)
    kept = tl.where(turn, second, first).to(tl.float32)
    total = tl.sum(tl.where(tap == W - 1, tl.expand_dims(x.to(tl.float32), AXIS), kept) * taps, axis=AXIS)
    if bias is not None:
        total += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    return (total * sigmoid(total)).to(x.dtype).to(tl.float32)


@triton.jit
def move_window(inputs, windows, turn, channel, mask, channels, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Write the window of the next token: all of this one's but the oldest, and the new input."""
    at, within, tap = tap_tile(channel, mask, W, BLOCK_W, 1)
    old, new = windows + tl.where(turn, channels * W, 0), windows + tl.where(turn, 0, channels * W)
    kept = tl.load(old + at, mask=within & (tap > 0) & (tap < W - 1), other=0.0).to(tl.float32)
    x = tl.load(inputs + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(new + (at - 1), tl.where(tap == W - 1, x[:, None], kept), mask=within & (tap > 0))


@triton.jit(do_not_specialize=["p_b"])
def conv_kernel(
    projected, windows, turns, weight, bias, mapped, p_b,
    INNER: tl.constexpr, MAPS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The convolution of BLOCK channels of a row, before `step_kernel`, which ends the turn of their window."""
    channels = INNER + 2 * MAPS
    b = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    turn = tl.load(turns + b * INNER) > 0
    given = projected + b * p_b + INNER
    windows += b * 2 * channels * W
    x = convolve(given, windows, weight, bias, turn, channel, mask, channels, W, BLOCK_W, 1)
    tl.store(mapped + b * channels + channel, x, mask=mask)
    move_window(given, windows, turn, channel, mask, channels, W, BLOCK_W)


@triton.jit(do_not_specialize=["p_b", "y_b"])
def step_kernel(
    projected, windows, turns, state, weight, bias, mapped, a_log, skip, dt_bias, y, p_b, y_b, per_group, width, states,
    INNER: tl.constexpr, MAPS: tl.constexpr, W: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_P channels of a head moved on by one token; their output, gated. They are convolved here or in `mapped`."""
    channels = INNER + 2 * MAPS
    b = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_P
    p = first + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_mask, n_mask = p < width, n < states
    channel = head * width + p
    # The state is nearly all there is to read: ask for it first.
    at = state + (b * INNER + channel)[:, None] * states + n[None, :]
    mask = p_mask[:, None] & n_mask[None, :]
    before = tl.load(at, mask=mask, other=0.0)

    turn = tl.load(turns + b * INNER + head * width + first) > 0
    projected += b * p_b
    windows += b * 2 * channels * W
    given = projected + INNER
    maps = INNER + (head // per_group) * states + n
    if mapped is None:
        # Taps lie along the other axis than the state has them: Triton would carry their layout on to the state.
        x = convolve(given, windows, weight, bias, turn, channel, p_mask, channels, W, BLOCK_W, 0)
        to_state = convolve(given, windows, weight, bias, turn, maps, n_mask, channels, W, BLOCK_W, 1)
        to_output = convolve(given, windows, weight, bias, turn, maps + MAPS, n_mask, channels, W, BLOCK_W, 1)
    else:
        mapped += b * channels
        x = tl.load(mapped + channel, mask=p_mask, other=0.0).to(tl.float32)
        to_state = tl.load(mapped + maps, mask=n_mask, other=0.0).to(tl.float32)
        to_output = tl.load(mapped + maps + MAPS, mask=n_mask, other=0.0).to(tl.float32)
    gate = tl.load(projected + channel, mask=p_mask, other=0.0).to(tl.float32)
    dt = tl.load(given + channels + head).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias + head).to(tl.float32))
    decay = tl.exp(-dt * tl.exp(tl.load(a_log + head).to(tl.float32)))
    through = tl.load(skip + head).to(tl.float32)

    h = decay * before.to(tl.float32) + (dt * x)[:, None] * to_state[None, :]
    kept = h
    if state.dtype.element_ty == tl.float16:
        kept = tl.clamp(h, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(at, kept, mask=mask)
    out = tl.sum(h * to_output[None, :], axis=1) + through * x
    tl.store(y + b * y_b + channel, out * gate * sigmoid(gate), mask=p_mask)

    if mapped is None:
        # Nobody reads the other window in this step, so that one program can write what all heads of a group have read.
        move_window(given, windows, turn, channel, p_mask, channels, W, BLOCK_W)
        if (first == 0) & (head % per_group == 0):
            move_window(given, windows, turn, maps, n_mask, channels, W, BLOCK_W)
            move_window(given, windows, turn, maps + MAPS, n_mask, channels, W, BLOCK_W)
    tl.debug_barrier()  # all warps have read whose turn it is
    tl.store(turns + b * INNER + channel, tl.where(turn, tl.zeros_like(p), 1), mask=p_mask)


def step_triton(
    projected: Tensor,
    conv_windows: Tensor,
    conv_turns: Tensor,
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
    if not all(x.is_contiguous() for x in (conv_windows, conv_turns, ssm_state)):
        raise ValueError(f"{_NAME}: the states are updated in place and must be contiguous")
    batch, _, heads, width, states = ssm_state.shape
    inner, maps = heads * width, ngroups * states
    projected = projected.contiguous()
    y = projected.new_empty(batch, inner)
    few = batch * heads <= _FEW_HEADS
    mapped = None if few else projected.new_empty(batch, inner + 2 * maps)
    block_p, block_n, warps = tile(width, states, _TILE if few else _SMALL_TILE // ssm_state.element_size())
    convolution = {
        "projected": projected, "windows": conv_windows, "turns": conv_turns, "weight": conv_weight.contiguous(),
        "bias": conv_bias, "mapped": mapped, "p_b": projected.stride(0), "INNER": inner, "MAPS": maps,
        "W": conv_weight.shape[-1], "BLOCK_W": next_power_of_2(conv_weight.shape[-1]),
    }  # fmt: skip
    with device_of(projected):
        if not few:
            grid = (cdiv(inner + 2 * maps, _CONV_BLOCK), batch)
            launch(conv_kernel, grid, **convolution, BLOCK=_CONV_BLOCK, num_warps=4)
        launch(
            step_kernel, (cdiv(width, block_p), heads, batch),
            **convolution, state=ssm_state, a_log=A_log, skip=D, dt_bias=dt_bias, y=y, y_b=y.stride(0),
            per_group=heads // ngroups, width=width, states=states,
            BLOCK_P=block_p, BLOCK_N=block_n, num_warps=warps,
        )  # fmt: skip
    return y


def tile(width: int, states: int, numbers: int) -> tuple[int, int, int]:
    """Channels and states of a program that holds about so many numbers, and its warps.

    A tile has at least as many elements as its warps have threads: where two threads held the same element, one could
    store the new state before the other has loaded the old one.
    """
    block_n = max(16, next_power_of_2(states))
    block_p = max(4, min(next_power_of_2(width), numbers // block_n))
    return block_p, block_n, max(1, block_p * block_n // _OF_A_WARP)
