"""The Triton draw as a custom op, which `torch.compile` takes as it is."""

from torch import Tensor

from genssm.kernels.custom_op import custom_op


@custom_op("genssm::draw_token", mutates=("codes", "previous"))
def draw(
    logits: Tensor,
    uniform: Tensor,
    scales: Tensor | None,
    position: Tensor,
    codes: Tensor,
    previous: Tensor,
    temperature: float,
) -> None:
    from genssm.kernels.draw_token.triton_draw import draw_triton

    draw_triton(logits, uniform, scales, position, codes, previous, temperature)


@draw.register_fake
def _(logits, uniform, scales, position, codes, previous, temperature) -> None:
    pass
