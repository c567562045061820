"""A token drawn from guided logits in Triton: one program per image, one launch."""

# B images, V vocabulary, laid out as rows of COLUMNS

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssm.kernels.triton_launch import device_of, launch, refuse_double
from genssm.kernels.triton_overlap import overlap, wait_for_inputs

_NAME = "draw_token"
_COLUMNS = 128


@triton.jit(do_not_specialize=["images"])
def draw_kernel(
    logits, uniform, scale, drawn, images, vocabulary, temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sums of rows find the row, sums within it the token: float64, as one long sum would be, but short."""
    b = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    token = tl.arange(0, ROWS)[:, None] * COLUMNS + columns[None, :]
    mask = token < vocabulary
    wait_for_inputs(OVERLAP)
    value = tl.load(logits + b * vocabulary + token, mask=mask, other=-float("inf")).to(tl.float32)
    if scale is not None:
        null = tl.load(logits + (images + b) * vocabulary + token, mask=mask, other=0.0).to(tl.float32)
        value = null + tl.load(scale) * (value - null)
    value = tl.where(mask, value / temperature, -float("inf"))
    weight = tl.exp(value - tl.max(tl.max(value, axis=1), axis=0))
    until = tl.cumsum(tl.sum(weight.to(tl.float64), axis=1), axis=0)
    wanted = tl.load(uniform + b).to(tl.float64) * tl.max(until, axis=0)
    row = tl.sum((until <= wanted).to(tl.int32), axis=0)
    before = tl.max(tl.where(until <= wanted, until, 0.0), axis=0)
    own = tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == row, weight, 0.0), axis=0)
    column = tl.sum((before + tl.cumsum(own.to(tl.float64), axis=0) <= wanted).to(tl.int32), axis=0)
    # Rounded, the sums of a row may end below its share: its last possible token then.
    column = tl.minimum(column, tl.max(tl.where(own > 0, columns, 0), axis=0))
    tl.store(drawn + b, (row * COLUMNS + column).to(tl.int64))


def draw_triton(logits: Tensor, uniform: Tensor, scale: Tensor | None, temperature: float) -> Tensor:
    """Arguments and result as of `draw_token`.

    Raises:
        ValueError: float64 logits.
    """
    refuse_double(_NAME, logits)
    images, vocabulary = uniform.shape[0], logits.shape[1]
    rows = max(2, triton.next_power_of_2(triton.cdiv(vocabulary, _COLUMNS)))
    drawn = uniform.new_empty(images, dtype=torch.int64)
    with device_of(logits):
        launch(
            draw_kernel, (images,),
            logits=logits.contiguous(), uniform=uniform.contiguous(), scale=scale, drawn=drawn, images=images,
            vocabulary=vocabulary, temperature=float(temperature), ROWS=rows, COLUMNS=_COLUMNS,
            num_warps=max(1, min(16, rows // 8)), **overlap(logits.device),
        )  # fmt: skip
    return drawn
