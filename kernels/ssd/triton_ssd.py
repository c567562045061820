"""The Mamba-2 scan in Triton: tile sizes, buffers and launches. The kernels are in ``triton_forward`` and
``triton_backward``; the arguments are the canonical ones of `genssm.kernels.ssd.op`.

Sizes depend on H, G, P, N, the types and the device only. Where sequences x heads cannot fill the device, time is split
into segments. Nothing is added atomically, so two runs give the same bits.
"""

import dataclasses

import torch
from torch import Tensor

from genssm.kernels.ssd.reference import directions_of
from genssm.kernels.ssd.triton_backward import ssd_adjoint_kernel, ssd_maps_kernel, ssd_tokens_kernel
from genssm.kernels.ssd.triton_forward import ssd_chain_kernel, ssd_forward_kernel, ssd_local_kernel
from genssm.kernels.triton_launch import (
    device_of,
    first_steps,
    launch,
    named,
    next_power_of_2,
    processors,
    refuse_double,
    register_limit,
    strides,
    wide,
)

_NAME = "ssd"
_ENOUGH = 2  # programs per multiprocessor from which on time and heads are not split
_WANTED = 4  # programs per multiprocessor to aim at when they are
_CHAIN_BLOCK = 1024
_WALK = (64, 16384)  # channels of a block and bytes of its state, in the kernels that walk along a sequence
_CHUNK = (32, 8192)  # the same in the kernels of single chunks, which hold more tiles


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of a program's tiles, constants of its binary."""

    CHUNK: int
    NB: int
    PB: int


def chunk_steps(states: int, half: bool) -> int:
    """Steps of a chunk: 64, fewer where the rows of B and C would leave no room for the rest."""
    states = next_power_of_2(states) * (1 if half else 2)
    return 64 if states <= (128 if half else 64) else 32 if states <= 256 else 16


def is_half(x: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether the matrix products take bfloat16: where x, B and C all are."""
    return all(t.dtype == torch.bfloat16 for t in (x, B, C))


def new_saved(x: Tensor, B: Tensor, C: Tensor, directions: int, sequences: int) -> Tensor:
    """Room for the state before every `chunk_steps` steps of each order, (Bt, K, chunks, H, N, P).

    In bfloat16 where the products take the states in it anyway.
    """
    batch, _, length, heads, width = x.shape
    half = is_half(x, B, C)
    chunk = chunk_steps(B.shape[-1], half)
    sizes = (batch, directions, (length + chunk - 1) // chunk, heads, B.shape[-1], width)
    return x.new_empty(sizes, dtype=torch.bfloat16 if half else torch.float32)


def ssd_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    reduce_sum: bool,
    *,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan all directions.

    Args:
        segments: pieces that time is split into; None takes the built-in choice. For measurements.
    Returns:
        The result, the last state and the checkpoints (`new_saved`); see `genssm.kernels.ssd.op`.
    Raises:
        ValueError: float64 inputs.
    """
    refuse_double(_NAME, x, dt, B, C, z)
    batch, _, length, heads, width = x.shape
    states, groups = B.shape[-1], B.shape[3]
    directions = directions_of(orders, x, dt, A, B, C, D, z, dt_bias)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    saved = new_saved(x, B, C, directions, sequences)
    chunks = saved.shape[2]
    last = x.new_empty(sequences, directions, heads, width, states, dtype=torch.float32)
    out = x.new_empty((batch, length, heads, width) if reduce_sum else (batch, directions, length, heads, width))
    target = out
    if reduce_sum and directions > 1:
        target = x.new_empty((batch, directions, length, heads, width), dtype=torch.float32)
    if not sequences:
        return out, last, saved
    tile = _tile(states, width, is_half(x, B, C), *_WALK)
    programs = -(-width // tile.PB) * heads * sequences * directions
    segments, segment_chunks = _split(programs, chunks, cu_seqlens, segments, x.device)
    with device_of(x):
        a, skip, bias, initial_state = (_dense(t) for t in (A, D, dt_bias, initial_state))
        arguments = {
            **_inputs(x, dt, a, B, C, z, bias, orders, lengths),
            **named("x", "bklhp", strides(x)),
            **named("b", "bklgn", strides(B)),
            "length": length,
            "directions": directions,
            "segments": segments,
            "segment_chunks": segment_chunks,
            "SOFTPLUS": dt_softplus,
            "ALIGNED": _aligned(x, B, C, z),
            "WIDE": wide(x, dt, B, C, z, out),
            **_constants(x, B, C, groups),
            **vars(tile),
        }
        carry = None
        if segments > 1:
            carry = x.new_empty(sequences, directions, segments, heads, states, width, dtype=torch.float32)
            decay = x.new_empty(sequences, directions, segments, heads, dtype=torch.float32)
            launch(
                ssd_local_kernel,
                (programs * segments,),
                **_only(ssd_local_kernel, arguments),
                x=x,
                b=B,
                carry=carry,
                decay=decay,
                **_options(x, B, C, tile, tile.PB, walk=True),
            )
            _chain(carry, decay, initial_state, reverse=False)
        launch(
            ssd_forward_kernel,
            (programs * segments,),
            **arguments,
            x=x,
            b=B,
            skip=skip,
            initial=initial_state,
            first_steps=first_steps(orders, cu_seqlens, length, directions),
            borders=cu_seqlens,
            carry=carry,
            out=target,
            last=last,
            saved=saved,
            skip_k=strides(skip, 2, directions=0)[0],
            o_b=target.stride(0),
            o_k=target.stride(1) if target.ndim == 5 else 0,
            sequences=sequences,
            chunks=chunks,
            SEGMENTED=segments > 1,
            **_options(x, B, C, tile, tile.PB, walk=True),
        )
    if target is not out:
        torch.sum(target, dim=1, out=out)
    return out, last, saved


def ssd_backward(
    grad_out: Tensor,
    grad_last_state: Tensor | None,
    saved: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    orders: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    reduce_sum: bool,
    *,
    segments: int | None = None,
    slots: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias, initial_state, each in the shape and dtype of its input.

    Args:
        segments: as in `ssd_forward`.
        slots: programs that share the heads of a group; None takes the built-in choice. For measurements.
    """
    batch, _, length, heads, width = x.shape
    states, groups = B.shape[-1], B.shape[3]
    _, directions, chunks = saved.shape[:3]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    g = grad_out.unsqueeze(1) if reduce_sum else grad_out
    works = sequences * chunks

    def new(*sizes: int) -> Tensor:
        return x.new_empty(sizes, dtype=torch.float32)

    per_token = [_Summed(t, directions) for t in (x, dt, z)]
    slots = slots or _slots(works * directions * groups, heads // groups, x.device)
    da, dskip, dbias = (new(works, directions, heads) if t is not None else None for t in (A, D, dt_bias))
    db, dc = (new(slots, batch, directions, length, groups, states) for _ in range(2))
    dinitial = None
    if initial_state is not None:
        dinitial = x.new_empty(initial_state.shape, dtype=torch.float32)
    if sequences:
        half = is_half(x, B, C)
        walk = _tile(states, width, half, *_WALK)
        # Warp groups multiply whole chunks in bfloat16, for which blocks must not be narrow (`_options`).
        tile = walk if half and walk.CHUNK >= 64 else _tile(states, width, half, *_CHUNK)
        programs = -(-width // walk.PB) * heads * sequences * directions
        segments, segment_chunks = _split(programs, chunks, cu_seqlens, segments, x.device)
        with device_of(x):
            given = (A, D, dt_bias, initial_state, grad_last_state)
            a, skip, bias, start, grad_last = (_dense(t) for t in given)
            adjoints = torch.empty_like(saved)
            arguments = {
                **_inputs(x, dt, a, B, C, z, bias, orders, lengths),
                "grad": g,
                "grad_last": grad_last,
                "adjoints": adjoints,
                "first_steps": first_steps(orders, cu_seqlens, length, directions),
                "borders": cu_seqlens,
                **named("g", "bklhp", strides(g)),
                "length": length,
                "sequences": sequences,
                "directions": directions,
                "chunks": chunks,
                "SOFTPLUS": dt_softplus,
                "ALIGNED": _aligned(x, B, C, z, g),
                "WIDE": wide(x, dt, B, C, z, g, per_token[0].final, db),
                **_constants(x, B, C, groups),
            }
            parts = {"segments": segments, "segment_chunks": segment_chunks, "dinitial": dinitial}
            parts.update(_options(x, B, C, walk, walk.PB, walk=True), carry=None, decay=None)
            parts.update(vars(walk), SEGMENTED=segments > 1)
            if segments > 1:
                parts["carry"] = new(sequences, directions, segments, heads, states, width)
                parts["decay"] = new(sequences, directions, segments, heads)
                grid = (programs * segments,)
                launch(ssd_adjoint_kernel, grid, **arguments, **parts, LOCAL=True)
                _chain(parts["carry"], parts["decay"], grad_last, reverse=True)
            launch(
                ssd_adjoint_kernel,
                (programs * segments,),
                **arguments,
                **parts,
                LOCAL=False,
            )
            arguments.update(
                saved=saved,
                x=x,
                b=B,
                initial=start,
                **named("x", "bklhp", strides(x)),
                **named("b", "bklgn", strides(B)),
                **vars(tile),
            )
            launch(
                ssd_tokens_kernel,
                (works * directions * heads,),
                **arguments,
                skip=skip,
                dx=per_token[0].final,
                ddt=per_token[1].final,
                dz=per_token[2].final,
                da=da,
                dskip=dskip,
                dbias=dbias,
                skip_k=strides(skip, 2, directions=0)[0],
                **named("dx", "bk", per_token[0].strides),
                **named("dd", "bk", per_token[1].strides),
                **named("dz", "bk", per_token[2].strides),
                **_options(x, B, C, tile, tile.PB),
            )
            launch(
                ssd_maps_kernel,
                (works * directions * groups * slots,),
                **arguments,
                db=db,
                dc=dc,
                batch=batch,
                slots=slots,
                **_options(x, B, C, tile, min(tile.PB, tile.NB)),
            )
    dx, ddt, dz = (t.result() for t in per_token)
    dB, dC = (_sum(part.sum(0), t.shape[1], 1).to(t.dtype) for part, t in ((db, B), (dc, C)))
    parameters = ((da, A), (dskip, D), (dbias, dt_bias))
    dA, dD, dbias = (None if p is None else _sum(part.sum(0), p.shape[0], 0).to(p.dtype) for part, p in parameters)
    dinitial = None if dinitial is None else dinitial.to(initial_state.dtype)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


class _Summed:
    """A gradient per token that directions may share: where the kernel writes it, and its sum over directions."""

    def __init__(self, x: Tensor | None, directions: int) -> None:
        self.like, self.final, self.strides = x, None, (0, 0)
        if x is None:
            return
        batch, own, *rest = x.shape
        if own < directions:
            self.final = x.new_empty((batch, directions, *rest), dtype=torch.float32)
        else:
            self.final = x.new_empty(x.shape)
        self.strides = (self.final.stride(0), self.final.stride(1))

    def result(self) -> Tensor | None:
        if self.like is None or self.final.shape == self.like.shape:
            return self.final
        return self.final.sum(1, keepdim=True).to(self.like.dtype)


def _inputs(x, dt, a, B, C, z, bias, orders, lengths) -> dict[str, Tensor | int | None]:
    """Arguments that the walks and the backward share, with their strides."""
    return {
        "dt": dt,
        "a": a,
        "c": C,
        "z": z,
        "bias": bias,
        "orders": orders,
        "lengths": lengths,
        **named("d", "bklh", strides(dt)),
        **named("z", "bklhp", strides(z, 5)),
        **named("c", "bklgn", strides(C)),
        "a_k": strides(a, directions=0)[0],
        "bias_k": strides(bias, 2, directions=0)[0],
    }


def _constants(x: Tensor, B: Tensor, C: Tensor, groups: int) -> dict[str, int | bool | str]:
    heads, width = x.shape[3:]
    sizes = {"HEADS": heads, "GROUP_HEADS": heads // groups, "WIDTH": width, "STATES": B.shape[-1]}
    return {**sizes, "HALF": is_half(x, B, C), "PRECISION": precision(x, B, C)}


def precision(*operands: Tensor) -> str:
    """Of products that are not in bfloat16: TF32 where it loses nothing that the inputs hold, else all of float32."""
    half = all(t.dtype in (torch.bfloat16, torch.float16) for t in operands)
    return "tf32" if half and torch.version.hip is None else "ieee"


def _only(kernel, arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name in kernel.arg_names}


def _options(x: Tensor, B: Tensor, C: Tensor, tile: Tile, columns: int, walk: bool = False) -> dict[str, int | bool]:
    """Eight warps where four would spill more; without a limit given, ptxas at times settles for 32 registers.

    Two for narrow products: with four and more, Triton 3.6 and 3.7 multiply tiles of 64 rows by warp groups on Hopper,
    and with 16 or 32 columns such products came out wrong or read outside of their memory.

    Args:
        columns: the fewest that a product of the kernel has.
        walk: the kernel walks along a sequence, and has products with a row for each state.
    """
    rows = max(tile.CHUNK, tile.NB if walk else 0)
    narrow = x.shape[-1] <= 32 or (columns <= 32 and rows >= 64 and precision(x, B, C) == "tf32")
    warps = 2 if narrow else 4 if walk and tile.NB * tile.PB <= 1024 else 8
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, **register_limit(x.device, 255)}


def _tile(states: int, width: int, half: bool, widest: int, room: int) -> Tile:
    """Blocks of at most ``widest`` channels, whose states have at most ``room`` bytes as operands of a product.

    16 is the least that a matrix product takes.
    """
    padded = max(16, next_power_of_2(states))
    block = max(16, min(widest, next_power_of_2(width), room // (padded * (2 if half else 4))))
    return Tile(chunk_steps(states, half), padded, block)


def _split(
    programs: int, chunks: int, cu_seqlens: Tensor | None, segments: int | None, device: torch.device
) -> tuple[int, int]:
    """Segments of whole chunks, and chunks of a segment. Packed sequences are the pieces already."""
    if cu_seqlens is not None:
        return 1, chunks
    if segments is None:
        segments = 1
        if 0 < programs < _ENOUGH * processors(device):
            segments = max(1, min(-(-_WANTED * processors(device) // programs), chunks // 2))
    segment_chunks = -(-chunks // segments)
    return -(-chunks // segment_chunks), segment_chunks


def _slots(programs: int, heads: int, device: torch.device) -> int:
    """Into how many parts the heads of a group are shared out: as few as fill the device."""
    if programs >= _ENOUGH * processors(device):
        return 1
    return max(1, min(heads, -(-_WANTED * processors(device) // max(1, programs))))


def _chain(carry: Tensor, decay: Tensor, seed: Tensor | None, reverse: bool) -> None:
    sequences, directions, segments, heads, states, width = carry.shape
    launch(
        ssd_chain_kernel,
        (-(-states * width // _CHAIN_BLOCK), sequences * directions * heads),
        carry=carry,
        decay=decay,
        seed=seed,
        segments=segments,
        REVERSE=reverse,
        HEADS=heads,
        WIDTH=width,
        STATES=states,
        BLOCK=_CHAIN_BLOCK,
    )


def _sum(total: Tensor, own: int, dim: int) -> Tensor:
    """Sum the directions (``dim``) where they are shared."""
    return total.sum(dim, keepdim=True) if own < total.shape[dim] else total


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether every row can start a 16-byte load; a matter of its own stride, whatever the length and the batch."""
    return all(stride % 8 == 0 for x in tensors if x is not None for stride in x.stride()[:4])
