"""A token drawn from guided logits in Triton: one program per image, one launch."""

# B images, V vocabulary, laid out as rows of COLUMNS

import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.triton_launch import cdiv, device_of, launch, next_power_of_2, refuse_double

_NAME = "draw_token"
_COLUMNS = 128


@triton.jit(do_not_specialize=["images", "tokens"])
def draw_kernel(
    logits, uniform, scales, position, codes, previous, images, tokens, vocabulary, temperature,
    COPIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of rows find the row, sums within it the token: float64, as one long sum would be, but short."""
    b = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    token = tl.arange(0, ROWS)[:, None] * COLUMNS + columns[None, :]
    mask = token < vocabulary
    value = tl.load(logits + b * vocabulary + token, mask=mask, other=-float("inf")).to(tl.float32)
    at = tl.load(position)
    wanted = tl.load(uniform + b * tokens + at).to(tl.float64)
    if scales is not None:
        null = tl.load(logits + (images + b) * vocabulary + token, mask=mask, other=0.0).to(tl.float32)
        value = null + tl.load(scales + at) * (value - null)
    value = tl.where(mask, value / temperature, -float("inf"))
    weight = tl.exp(value - tl.max(tl.max(value, axis=1), axis=0))
    until = tl.cumsum(tl.sum(weight.to(tl.float64), axis=1), axis=0)
    wanted *= tl.max(until, axis=0)
    row = tl.sum((until <= wanted).to(tl.int32), axis=0)
    before = tl.max(tl.where(until <= wanted, until, 0.0), axis=0)
    own = tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == row, weight, 0.0), axis=0)
    column = tl.sum((before + tl.cumsum(own.to(tl.float64), axis=0) <= wanted).to(tl.int32), axis=0)
    # Rounded, the sums of a row may end below its share: its last possible token then.
    column = tl.minimum(column, tl.max(tl.where(own > 0, columns, 0), axis=0))
    drawn = (row * COLUMNS + column).to(tl.int64)
    tl.store(codes + b * tokens + at, drawn)
    for i in tl.static_range(COPIES):
        tl.store(previous + i * images + b, drawn)


def draw_triton(
    logits: Tensor,
    uniform: Tensor,
    scales: Tensor | None,
    position: Tensor,
    codes: Tensor,
    previous: Tensor,
    temperature: float,
) -> None:
    """Arguments as of `draw_token`; what is written must be contiguous.

    Raises:
        ValueError: float64 logits, or ``codes`` or ``previous`` that are not contiguous.
    """
    refuse_double(_NAME, logits)
    if not (codes.is_contiguous() and previous.is_contiguous()):
        raise ValueError(f"{_NAME}: codes and previous are written in place and must be contiguous")
    (images, tokens), vocabulary = codes.shape, logits.shape[1]
    rows = max(2, next_power_of_2(cdiv(vocabulary, _COLUMNS)))
    with device_of(logits):
        launch(
            draw_kernel, (images,),
            logits=logits.contiguous(), uniform=uniform.contiguous(), scales=scales, position=position, codes=codes,
            previous=previous, images=images, tokens=tokens, vocabulary=vocabulary, temperature=float(temperature),
            COPIES=previous.shape[0] // images, ROWS=rows, COLUMNS=_COLUMNS, num_warps=max(1, min(16, rows // 16)),
        )  # fmt: skip
