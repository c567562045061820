"""What the kernels on rows share: a row is the D channels of one token, and a program holds whole rows."""

# B batch, L tokens, D channels

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.triton_launch import named, next_power_of_2, processors

_LARGEST = 16384  # channels that a program can hold
_AHEAD, _BUFFERS = 2, 32 * 1024  # tokens to fetch ahead, and the bytes that they may take
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` as a tensor of ``dtype`` would hold it, in float32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def load_row(x, b, l, stride_b, stride_l, e, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Channels of a token in float32, zero beyond D; ALIGNED says that wide loads may start there."""
    shift = b * stride_b + l * stride_l
    if ALIGNED:
        shift = tl.multiple_of(shift, 8)
    return tl.load(x + shift + e, mask=e < D, other=0.0).to(tl.float32)


@triton.jit
def load_number(x, b, l, stride_b, stride_l):
    """The number of a token in float32."""
    return tl.load(x + b * stride_b + l * stride_l).to(tl.float32)


def row_arguments(op: str, channels: int, rows: dict[str, Tensor | None], factor: Tensor | None) -> dict:
    """Rows (B, L, D) and numbers (B, L, 1) with their strides, as kernels take them; a size of 1 is shared (stride 0).

    Rows lie in one piece, whatever their other strides.

    Raises:
        ValueError: more channels than a program can hold.
    """
    if channels > _LARGEST:
        raise ValueError(
            f"{op}: {channels} channels, the triton backend takes up to {_LARGEST}; use backend='reference'"
        )
    rows = {name: r if r is None or r.stride(2) == 1 else r.contiguous() for name, r in rows.items()}
    strides = {name: _strides(r) for name, r in rows.items()}
    arguments = {
        **rows,
        "factor": factor,
        "D": channels,
        "ALIGNED": channels % 8 == 0 and all(stride % 8 == 0 for pair in strides.values() for stride in pair),
        "BLOCK": next_power_of_2(channels),
    }
    for name, pair in {**strides, "factor": _strides(factor)}.items():
        arguments.update(named(name, "bl", pair))
    return arguments


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else tuple(0 if x.shape[dim] == 1 else x.stride(dim) for dim in (0, 1))


def warps(block: int, elements: int) -> int:
    """So many that a thread of 32 lanes holds about ``elements`` channels."""
    return max(1, min(16, block // (32 * elements)))


def stages(block: int, rows: dict[str, Tensor | None]) -> int:
    """Of a loop over tokens whose rows of ``block`` channels are fetched ahead: one more than are on the way."""
    size = block * sum(r.element_size() for r in rows.values() if r is not None)
    return 1 + min(_AHEAD, _BUFFERS // size)


def stretches(h: Tensor, wanted: int) -> int:
    """Into how many stretches of tokens each sample of ``h`` is cut, for ``wanted`` programs per multiprocessor."""
    batch, length, _ = h.shape
    return max(1, min(length, wanted * processors(h.device) // max(1, batch)))


def of_token(vector: Tensor | None, length: int) -> bool:
    """Whether every token has its own row of a gate, shift or scale."""
    return vector is not None and vector.ndim == 3 and vector.shape[1] == length and length > 1


def sums(vector: Tensor | None, h: Tensor, chunks: int) -> Tensor | None:
    """Where programs put what adds up to the gradient of a vector: sums over their stretches, or rows of the tokens."""
    if vector is None:
        return None
    batch, length, channels = h.shape
    if of_token(vector, length):
        return vector.new_empty(h.shape, dtype=torch.float32 if vector.shape[0] < batch else vector.dtype)
    return vector.new_empty(batch, chunks, channels, dtype=torch.float32)


def total(part: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Sums of the programs, (B, chunks, D), or rows of the tokens, (B, L, D), added up to the shape of ``like``."""
    if part is None:
        return None
    if like.ndim == 1:
        return part.sum((0, 1)).to(like.dtype)
    if like.shape[1] == 1:
        part = part.sum(1, keepdim=True)
    if like.shape[0] < part.shape[0]:
        part = part.sum(0, keepdim=True)
    return part.to(like.dtype)
