"""The Triton draw as a custom op, which `torch.compile` takes as it is."""

import torch
from torch import Tensor

from genssm.kernels.custom_op import custom_op


@custom_op("genssm::draw_token")
def draw(logits: Tensor, uniform: Tensor, scale: Tensor | None, temperature: float) -> Tensor:
    from genssm.kernels.draw_token.triton_draw import draw_triton

    return draw_triton(logits, uniform, scale, temperature)


@draw.register_fake
def _(logits, uniform, scale, temperature) -> Tensor:
    return uniform.new_empty(uniform.shape, dtype=torch.int64)
