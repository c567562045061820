"""The selective scan in Triton: tile sizes, buffers and launches. The kernels are in ``triton_forward``,
``triton_backward`` and, where the device has the shared memory, ``triton_forward_shared`` and
``triton_backward_shared``; the arguments are the canonical ones of `genssm.kernels.selective_scan.op`.

Sizes depend on E, G, N and the device; the plain forward has two, by the number of programs. Where batch x channels (x
directions) cannot fill the device, time is split into segments; where they can and directions share a result, they come
in turn, each adding to what is there, without a buffer per direction: inside a program of the plain forward, else in a
launch for each. So they do in the backward where segments of one of them fill the device. Nothing is added
atomically, so two runs give the same bits; a batch row alone may differ in the last bits from the same row in a batch.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from genssm.kernels.arguments import empty_gradient
from genssm.kernels.selective_scan.reference import directions_of
from genssm.kernels.selective_scan.triton_backward import scan_adjoint_kernel, scan_backward_kernel
from genssm.kernels.selective_scan.triton_forward import chain_kernel, scan_forward_kernel
from genssm.kernels.selective_scan.triton_states import backward_in_parts
from genssm.kernels.selective_scan.triton_tiles import LANES, backward_tile, forward_tile
from genssm.kernels.triton_launch import (
    compiled_for_nvidia,
    device_of,
    first_steps,
    known_triton,
    launch,
    named,
    processors,
    refuse_double,
    register_limit,
    strides,
    wide,
)
from genssm.kernels.triton_sums import map_gradient, sum_maps, sum_parameters

_NAME = "selective_scan"
CHUNK = 32  # steps between two checkpoints
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
_WINDOW = 4  # steps that are prefetched at a time
_FORWARD_RESIDENT = 12  # programs of the forward on a multiprocessor
_FORWARD_REGISTERS = 160  # of a lane; without a limit the compiler stops at 128 and waits more
_BACKWARD_RESIDENT = 12  # programs of the backward on a multiprocessor
_BACKWARD_REGISTERS = 168  # twelve programs on a multiprocessor are worth some spilled registers
_FORWARD_ENOUGH, _BACKWARD_ENOUGH = 4, 6  # programs per multiprocessor from which on time is not split
_BACKWARD_ALONE = 8  # from which on segments of one direction are enough, and those with a shared result come in turn
_FORWARD_FULL = 8  # programs per multiprocessor from which on the forward needs no smaller ones
_FORWARD_LONG = 256  # tokens of a sequence from which on the forward in shared memory is not slower than the plain one
_SHARING_WARPS = 4  # of a program of the forward in shared memory: they share the states of its channels
_SHARING_TRIP = 16  # tokens of its trips
_SHARING_RESIDENT, _SHARING_ENOUGH = 4, 2  # as above, of its programs
_SHARING_LOCAL = 0.7  # of a pass is what a local pass takes
_SHARING_REGISTERS = 128  # of a lane; with four programs at once more is worth less than they are
_FORWARD_SHARED_BYTES = _SHARING_RESIDENT * (29 + 1) * 1024  # that they take, with what the device adds to each
_CHAIN_BLOCK = 128  # states of a program that chains segments
_SEGMENT_CHUNKS = 4  # shortest segment worth its second pass
_SHORTEST_CHUNKS = 2  # of a segment of the forward
_SHARED_WARPS = 2  # of a program of the backward in shared memory: they join dB and dC, which halves the slots
_SHARED_TRIP = 4  # tokens of its trips
_SHARED_BYTES = 6 * (33 + 1) * 1024  # that six of its programs take, with what the device adds to each
_PARTIAL_BYTES = 4  # bytes of partial dB and dC per token and channel to stay under where the device stays full


def saved_shape(
    batch: int, directions: int, length: int, channels: int, states: int, sequences: int
) -> tuple[int, int, int, int, int]:
    """Shape of the checkpoints: the state before every `CHUNK` steps of each order but the first, whose state is the
    initial one, (Bt, K, chunks - 1, N, E)."""
    return batch, directions, (length - 1) // CHUNK, states, channels


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
    *,
    block_e: int | None = None,
    state_lanes: int | None = None,
    unroll: int | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all directions.

    Args:
        block_e, state_lanes, unroll, segments: channels of a program, lanes that share the states of a channel,
            tokens per trip, and pieces that time is split into; None takes the built-in choice. For measurements.
    Returns:
        The result, the last state (empty where not wanted) and the checkpoints (`saved_shape`); see
        `genssm.kernels.selective_scan.op`.
    Raises:
        ValueError: float64 inputs.
    """
    refuse_double(_NAME, u, delta, B, C, z)
    batch, _, length, channels = u.shape
    states, groups = A.shape[-1], B.shape[3]
    directions = directions_of(orders, u, delta, A, B, C, D, z, delta_bias)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    summed = reduce_sum and directions > 1
    out = u.new_empty((batch, length, channels) if reduce_sum else (batch, directions, length, channels))
    works = sequences * groups
    # Where its programs fill the device the plain kernel is faster for directions in turn, with their sums in memory,
    # and along few tokens: it walks no more than there are, and has less to prepare.
    full = works * channels // groups >= 2 * LANES * _FORWARD_FULL * processors(u.device)
    plain = full and (summed or batch * length < _FORWARD_LONG * sequences)
    in_shared = block_e is state_lanes is unroll is None and not plain and _forward_shares(u, delta, B, C, z, out)
    if block_e is None and state_lanes is None:
        block_e, state_lanes = _forward_sizes(works, channels // groups, states, directions, summed, u.device)
    tile = forward_tile(channels // groups, states, block_e, state_lanes)
    unroll = unroll or 4
    block = LANES if in_shared else tile.channels
    group_blocks = -(-(channels // groups) // block)
    saved = u.new_empty(saved_shape(batch, directions, length, channels, states, sequences), dtype=torch.float32)
    chunks = saved.shape[2] + 1
    # The kernel in shared memory is as fast with it, even faster along orders: the compiler's luck.
    wanted = (sequences, directions, channels, states) if return_last_state or in_shared else 0
    last = u.new_empty(wanted, dtype=torch.float32)
    plan = _forward_split(works * group_blocks, in_shared, directions, summed, chunks, cu_seqlens, segments, u.device)
    in_turn = summed and plan.direction_programs == 1
    target = u.new_empty(batch, directions, length, channels) if summed and not in_turn else out
    asked = last if return_last_state else last.new_empty(0)
    if not sequences:
        return out, asked, saved

    with device_of(u):
        turned = None
        if in_shared and plan.segments > 1:  # the first launch makes the copy on its way
            a = A.float().contiguous()
            turned = a.new_empty(a.shape[0], states, channels)
        else:
            a = A.float().transpose(-1, -2).contiguous()  # (K, N, E)
        skip, bias = _rows(D), _rows(delta_bias)
        carry = decay = None
        if plan.segments > 1:  # in shared memory all segments of a direction, then those of the next
            carry = u.new_empty(sequences, plan.segments, directions, states, channels, dtype=torch.float32)
            decay = u.new_empty(sequences, plan.segments, directions, channels, dtype=torch.float32)
        b_strides, c_strides = strides(B), strides(C)
        arguments = {
            "u": u,
            "delta": delta,
            "a": a,
            "b": B,
            "c": C,
            "skip": skip,
            "z": z,
            "bias": bias,
            "orders": orders,
            "initial": initial_state,
            "lengths": lengths,
            "first_steps": first_steps(orders, cu_seqlens, length, directions),
            "borders": cu_seqlens,
            "out": target,
            "last": last if last.numel() else None,
            "saved": saved,
            "carry": carry,
            "decay": decay,
            **named("u", "bkle", strides(u)),
            **named("d", "bkle", strides(delta)),
            **named("z", "bkle", strides(z, 4)),
            **named("b", "bklgn", b_strides),
            **named("c", "bklgn", c_strides),
            "a_k": strides(a, directions=0)[0],
            "skip_k": strides(skip, 2, directions=0)[0],
            "bias_k": strides(bias, 2, directions=0)[0],
            **named("i", "sken", strides(initial_state, 4)),
            "out_b": target.stride(0),
            "out_k": 0 if target.ndim == 3 else target.stride(1),
            "length": length,
            "sequences": sequences,
            "directions": directions,
            "direction_programs": plan.direction_programs,
            "segments": plan.segments,
            "segment_programs": plan.segments,
            "segment_chunks": plan.segment_chunks,
            "chunks": saved.shape[2],
            "zero": 0,
            "SOFTPLUS": delta_softplus,
            "SEGMENTED": plan.segments > 1,
            "ACCUMULATE": in_turn,
            "CHANNELS": channels,
            "GROUP_CHANNELS": channels // groups,
            "STATES": states,
            "CHUNK": CHUNK,
            **_OPTIONS,
        }
        if in_shared:
            kernel = _forward_kernel()
            arguments |= {"first_direction": 0, "turned": turned, "WARPS": _SHARING_WARPS, "TRIP": _SHARING_TRIP}
            arguments |= {"num_warps": _SHARING_WARPS}
            arguments |= register_limit(u.device, _SHARING_REGISTERS)
        else:
            kernel = scan_forward_kernel
            arguments |= {
                "ALIGNED": _aligned(b_strides, c_strides),
                "WIDE": wide(u, delta, B, C, z, out),
                "WINDOW": max(_WINDOW, unroll),  # whole trips
                "PREFETCH": compiled_for_nvidia(u.device.type),
                "UNROLL": unroll,
                **vars(tile),
                **register_limit(u.device, _FORWARD_REGISTERS),
            }
        programs = works * group_blocks * plan.direction_programs
        if plan.segments > 1:
            local = {**arguments, "segment_programs": plan.segments - 1, "OUTPUT": False}
            launch(kernel, (programs * (plan.segments - 1),), **local)
            if in_shared:  # which has scanned the first segment for good by now
                arguments |= {"segment_programs": plan.segments - 1, "a": turned, "turned": None}
            else:
                _chain(carry, decay, a, initial_state, reverse=False)
        launch(kernel, (programs * arguments["segment_programs"],), **arguments, OUTPUT=True)
        if in_shared and in_turn:  # launches one after the other; a program of the plain kernel has taken all in turn
            for k in range(1, directions):
                launch(kernel, (programs,), **{**arguments, "first_direction": k}, OUTPUT=True)
        if target.ndim > out.ndim:
            torch.sum(target, 1, out=out)
    return out, asked, saved


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
    *,
    block_e: int | None = None,
    state_lanes: int | None = None,
    unroll: int | None = None,
    segments: int | None = None,
    block_programs: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of `scan_forward`.

    Args:
        block_e, state_lanes, unroll, segments: as in `scan_forward`. ``unroll`` divides `CHUNK`.
        block_programs: programs that share the blocks of a group, and slots of partial dB and dC. For measurements,
            all of them; all but ``segments`` are about the kernel that does without shared memory, and choose it.
    Returns:
        The nine gradients, each in the shape and dtype of its input, None for an absent one; see
        `genssm.kernels.selective_scan.op`.
    Raises:
        ValueError: float64 inputs.
    """
    refuse_double(_NAME, u, delta, B, C, z)
    batch, _, length, channels = u.shape
    states, groups = A.shape[-1], B.shape[3]
    directions, chunks = saved.shape[1], saved.shape[2] + 1
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    in_shared = block_e is state_lanes is unroll is block_programs is None and _shared_fits(u, delta, B, C, z, grad_out)
    if in_shared and states > 16:
        given = (grad_out, grad_last_state, saved, u, delta, A, B, C, D, z, delta_bias, delta_softplus, orders)
        given = (*given, initial_state, lengths, cu_seqlens, reduce_sum)
        return backward_in_parts(functools.partial(scan_backward, segments=segments), *given)
    tile = backward_tile(states, block_e, state_lanes)
    unroll = unroll or 2
    warps = _SHARED_WARPS if in_shared else 1
    group_blocks = -(-(channels // groups) // (LANES * warps)) if in_shared else tile.blocks(channels // groups)
    if in_shared:
        block_programs = group_blocks
    elif block_programs is None:
        block_programs = _block_programs(group_blocks, groups, channels, states)
    shared = [x is not None and x.shape[1] == 1 for x in (u, delta, z)]
    summed = directions > 1 and any(shared)
    programs = sequences * groups * block_programs * warps
    plan = _split(programs, directions, summed, chunks, cu_seqlens, segments, _BACKWARD_ENOUGH, u.device)
    works = sequences * plan.segments
    work_programs = works
    if plan.segments == 1:
        wanted = _BACKWARD_RESIDENT * processors(u.device) // warps
        work_programs = min(works, -(-wanted // (groups * block_programs * plan.direction_programs)))
        work_programs = -(-works // -(-works // max(work_programs, 1))) if works else 0
    programs = block_programs * groups * plan.direction_programs * work_programs

    per_token = [_Summed(x, directions, plan.direction_programs) for x in (u, delta, z)]
    new = functools.partial(u.new_empty, dtype=torch.float32)
    da = new(work_programs, directions, states, channels)
    carry = None
    if plan.segments > 1:  # which a program has read when it writes ``da``
        carry = da.view(sequences, plan.segments, directions, states, channels)
    slots = new(block_programs, batch, plan.direction_programs, length, groups, states, 2)
    dB, dC = (map_gradient(x, directions) for x in (B, C))
    dskip = None if D is None else new(work_programs, directions, channels)
    dbias = None if delta_bias is None else new(work_programs, directions, channels)
    dinitial = None if initial_state is None else new(sequences, directions, channels, states)
    if programs:
        with device_of(u):
            a = A.float().transpose(-1, -2).contiguous()  # (K, N, E)
            skip, bias = _rows(D), _rows(delta_bias)
            g = grad_out.unsqueeze(1) if reduce_sum else grad_out  # (Bt, 1 or K, L, E)
            b_strides, c_strides, last_strides = strides(B), strides(C), strides(grad_last_state, 4)
            inputs = {
                "grad": g,
                "delta": delta,
                "a": a,
                "c": C,
                "z": z,
                "bias": bias,
                "orders": orders,
                "lengths": lengths,
                **named("g", "bkle", strides(g)),
                **named("d", "bkle", strides(delta)),
                **named("z", "bkle", strides(z, 4)),
                **named("c", "bklgn", c_strides),
                "a_k": strides(a, directions=0)[0],
                "bias_k": strides(bias, 2, directions=0)[0],
                "length": length,
                "directions": directions,
                "segments": plan.segments,
                "segment_chunks": plan.segment_chunks,
                "zero": 0,
                "SOFTPLUS": delta_softplus,
                "CHANNELS": channels,
                "GROUP_CHANNELS": channels // groups,
                "STATES": states,
                "CHUNK": CHUNK,
            }
            sizes = {
                "ALIGNED": _aligned(b_strides, c_strides),
                "WIDE": wide(u, delta, B, C, z, g, slots),
                "UNROLL": unroll,
                **vars(tile),
                **_OPTIONS,
            }
            if plan.segments > 1:
                decay = new(sequences, plan.segments, directions, channels)
                grid = (groups * tile.blocks(channels // groups) * plan.segments * sequences * directions,)
                launch(scan_adjoint_kernel, grid, carry=carry, decay=decay, **inputs, **sizes)
                _chain(carry, decay, a, grad_last_state, reverse=True)
            arguments = {
                **inputs,
                **register_limit(u.device, _BACKWARD_REGISTERS),
                "grad_last": grad_last_state,
                "saved": saved,
                "u": u,
                "b": B,
                "skip": skip,
                "initial": initial_state,
                "first_steps": first_steps(orders, cu_seqlens, length, directions),
                "borders": cu_seqlens,
                "carry": carry,
                "du": per_token[0].final,
                "ddelta": per_token[1].final,
                "dz": per_token[2].final,
                "da": da,
                "dbc": slots,
                "dskip": dskip,
                "dbias": dbias,
                "dinitial": dinitial,
                **named("u", "bkle", strides(u)),
                **named("b", "bklgn", b_strides),
                "skip_k": strides(skip, 2, directions=0)[0],
                **named("i", "sken", strides(initial_state, 4)),
                **named("gl", "sken", last_strides),
                **named("kept", "bkc", strides(saved)[:3]),
                **named("du", "bk", per_token[0].strides),
                **named("dd", "bk", per_token[1].strides),
                **named("dz", "bk", per_token[2].strides),
                "sequences": sequences,
                "direction_programs": plan.direction_programs,
                "batch": batch,
                "works": works,
                "work_programs": work_programs,
                "SEGMENTED": plan.segments > 1,
                "ADD_U": per_token[0].in_turn,
                "ADD_DELTA": per_token[1].in_turn,
                "ADD_Z": per_token[2].in_turn,
            }
            if in_shared:
                kernel = _shared_kernel()
                sizes = {**_OPTIONS, "num_warps": warps, "WARPS": warps, "UNROLL": _SHARED_TRIP}
            else:
                kernel = scan_backward_kernel
                arguments["scratch"] = new(programs, CHUNK // unroll, tile.channels * tile.NI * tile.NL)
                arguments["block_programs"], arguments["AGAIN"] = block_programs, block_programs < group_blocks
                arguments["PREFETCH"] = compiled_for_nvidia(u.device.type)
            # Directions that add up are launches one after the other, which take the same slots.
            for first in range(0, directions, plan.direction_programs):
                launch(kernel, (programs,), **arguments, first_direction=first, **sizes)
                sum_maps(slots, first, dB, dC)
    with device_of(u):
        dA, dD, ddelta_bias = sum_parameters(da, (dskip, dbias), (A, D, delta_bias))
    du, ddelta, dz = (x.result() for x in per_token)
    dB, dC = (g if g.shape == x.shape else g.sum(1, keepdim=True).to(x.dtype) for g, x in zip((dB, dC), (B, C)))
    dinitial = None if dinitial is None else dinitial.to(initial_state.dtype)
    return du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial


def _shared_fits(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None, grad_out: Tensor) -> bool:
    """Whether the backward runs in `triton_backward_shared`; elsewhere `triton_backward` computes the same, slower.

    For 9 to 16 states, or more in parts (`triton_states`), offsets of 32 bits, and NVIDIA's devices whose
    multiprocessors have the shared memory for as many programs as their registers allow; in the versions of Triton that
    are known to compile it: Gluon is young.
    """
    return (
        B.shape[-1] > 8
        and compiled_for_nvidia(u.device.type)
        and _shared_memory(u.device.index or 0) >= _SHARED_BYTES
        and not wide(u, delta, B, C, z, grad_out)
        and _shared_kernel() is not None
    )


@functools.cache
def _shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_multiprocessor


@functools.cache
def _shared_kernel():
    """The backward in shared memory, None without a Triton for it."""
    if not known_triton():
        return None
    from genssm.kernels.selective_scan.triton_backward_shared import scan_backward_shared_kernel

    return scan_backward_shared_kernel


class _Summed:
    """A gradient per token that directions may share: where the kernel writes it, and its sum over directions."""

    def __init__(self, x: Tensor | None, directions: int, direction_programs: int) -> None:
        self.like, self.final, self.in_turn, self.strides = x, None, False, (0, 0)
        if x is None:
            return
        batch, own, length, channels = x.shape
        shared = own < directions
        self.in_turn = shared and direction_programs == 1
        apart = shared and not self.in_turn
        self.final = x.new_empty(batch, directions, length, channels) if apart else empty_gradient(x)
        self.strides = (self.final.stride(0), 0 if self.final.shape[1] == 1 else self.final.stride(1))

    def result(self) -> Tensor | None:
        if self.like is None or self.final.shape == self.like.shape:
            return self.final
        return self.final.sum(1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class _Split:
    direction_programs: int
    segments: int
    segment_chunks: int


def _split(
    programs: int,
    directions: int,
    summed: bool,
    chunks: int,
    cu_seqlens: Tensor | None,
    segments: int | None,
    enough: int,
    device: torch.device,
) -> _Split:
    """Share directions and time out to programs, of which batch and channels give ``programs`` already."""
    enough *= processors(device)
    if summed and (segments == 1 or (segments is None and programs >= enough)):
        return _Split(1, 1, chunks)
    together = directions
    if segments is None:
        segments = 1
        if cu_seqlens is None and 0 < programs * directions < enough:
            most = chunks // _SEGMENT_CHUNKS
            if summed and programs * most >= _BACKWARD_ALONE * processors(device):
                together = 1  # as fast, with the memory of one
            fitting = _BACKWARD_RESIDENT * processors(device) // (programs * together)
            segments = max(1, min(fitting, most))
    if cu_seqlens is not None:
        segments = 1  # packed sequences are the pieces already
    segment_chunks = -(-chunks // segments)
    return _Split(together, -(-chunks // segment_chunks), segment_chunks)


def _forward_sizes(
    works: int, channels: int, states: int, directions: int, summed: bool, device: torch.device
) -> tuple[int | None, int | None]:
    """Channels of a program and lanes that share a channel's states, for ``works`` sequences x groups.

    Half the channels with their states over two lanes make twice as many programs, each with more instructions: worth
    it where there are few, and where twice as many are enough not to split time.
    """
    if not 8 < states <= 16 or channels % (2 * LANES):
        return None, None
    enough, full = _FORWARD_ENOUGH * processors(device), _FORWARD_FULL * processors(device)
    programs = works * channels // LANES  # of half the channels
    if not summed or programs < enough:
        programs *= directions
    return (LANES, 2) if enough <= programs < 2 * full else (None, None)


def _forward_shares(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None, out: Tensor) -> bool:
    """Whether the forward runs in `triton_forward_shared`: as `_shared_fits`, with less shared memory."""
    return (
        8 < B.shape[-1] <= 16
        and compiled_for_nvidia(u.device.type)
        and _shared_memory(u.device.index or 0) >= _FORWARD_SHARED_BYTES
        and not wide(u, delta, B, C, z, out)
        and _forward_kernel() is not None
    )


@functools.cache
def _forward_kernel():
    """The forward in shared memory, None without a Triton for it."""
    if not known_triton():
        return None
    from genssm.kernels.selective_scan.triton_forward_shared import scan_forward_shared_kernel

    return scan_forward_shared_kernel


def _forward_split(
    programs: int,
    in_shared: bool,
    directions: int,
    summed: bool,
    chunks: int,
    cu_seqlens: Tensor | None,
    segments: int | None,
    device: torch.device,
) -> _Split:
    """As `_split`; as many segments as make programs that all run at once, because a few more would run alone.

    In shared memory one more, because the first is scanned in the launch of the local passes and the others in the next
    one. It is made as short as its pass takes longer than a local one.
    """
    resident, enough = (_SHARING_RESIDENT, _SHARING_ENOUGH) if in_shared else (_FORWARD_RESIDENT, _FORWARD_ENOUGH)
    if segments is None:
        if summed and programs >= enough * processors(device):
            return _Split(1, 1, chunks)
        segments = 1
        programs *= directions
        if 0 < programs < enough * processors(device):
            fitting = resident * processors(device) // programs + in_shared
            segments = max(1, min(fitting, chunks // _SHORTEST_CHUNKS))
    elif summed and segments == 1:
        return _Split(1, 1, chunks)
    if cu_seqlens is not None:
        segments = 1  # packed sequences are the pieces already
    segment_chunks = -(-chunks // segments)
    if in_shared and segments > 1:
        segment_chunks = math.ceil(chunks / (segments - 1 + _SHARING_LOCAL))
    return _Split(directions, -(-chunks // segment_chunks), segment_chunks)


def _block_programs(group_blocks: int, groups: int, channels: int, states: int) -> int:
    """As many as the memory for partial dB and dC allows: a program of several blocks reads back and adds."""
    memory = _PARTIAL_BYTES * channels // (8 * states * groups)
    programs = max(1, min(group_blocks, memory))
    return -(-group_blocks // (-(-group_blocks // programs)))


def _chain(carry: Tensor, decay: Tensor, a: Tensor, seed: Tensor | None, reverse: bool) -> None:
    sequences, segments, directions, states, channels = carry.shape
    launch(
        chain_kernel,
        (-(-states * channels // _CHAIN_BLOCK), sequences * directions),
        carry=carry,
        decay=decay,
        a=a,
        seed=seed,
        a_k=strides(a, directions=0)[0],
        **named("i", "sken", strides(seed, 4)),
        directions=directions,
        segments=segments,
        REVERSE=reverse,
        CHANNELS=channels,
        STATES=states,
        UNROLL=8,
        BLOCK=_CHAIN_BLOCK,
        **_OPTIONS,
    )


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _aligned(*strides: tuple[int, ...]) -> bool:
    """Whether every row of B and C can start a 16-byte load, as far as batch, direction and group decide it."""
    return all(stride % 8 == 0 for b, k, _, g, _ in strides for stride in (b, k, g))
