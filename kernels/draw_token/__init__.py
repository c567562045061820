"""A token drawn from guided logits with a given random number. See README.md here."""

from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.draw_token import op as _op
from genssm.kernels.draw_token.reference import draw_reference, invert_cdf

__all__ = ["draw_token", "invert_cdf"]

_NAME = "draw_token"
LARGEST = 65536  # tokens that a program of the triton backend can hold


def draw_token(
    logits: Tensor,
    uniform: Tensor,
    scale: Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Draw a token for each image: the first whose cumulative probability exceeds the random number.

        l = null + scale (condition - null);   p = softmax(l / temperature)

    Not differentiable. Letters: B images, V vocabulary.

    Args:
        logits: (B, V), any float type; with ``scale`` (2 B, V), those with the condition first. -inf is never drawn.
        uniform: random numbers in [0, 1), (B,), float32.
        scale: weight of the guidance, (1,), float32; None for logits that need none.
        temperature: above 0.
        backend: "auto", "triton", or any other of `genssm.kernels.dispatch`, which all mean PyTorch here. "auto" takes
            PyTorch for more than 65536 tokens.
    Returns:
        (B,), int64; never a token of probability 0.
    Raises:
        ValueError: shapes disagree; the message names both.
    """
    rows = uniform.shape[0] * (1 if scale is None else 2)
    if uniform.ndim != 1 or logits.ndim != 2 or logits.shape[0] != rows:
        raise ValueError(
            f"{_NAME}: logits are {arguments.shape(logits)} and uniform {arguments.shape(uniform)}, expected "
            f"({rows}, V) and (B,)"
        )
    if scale is not None and scale.shape != (1,):
        raise ValueError(f"{_NAME}: scale is {arguments.shape(scale)}, expected (1,)")
    arguments.check_devices(_NAME, logits.device, {"uniform": uniform} | ({} if scale is None else {"scale": scale}))
    if backend == "auto" and logits.shape[1] > LARGEST:
        backend = "reference"
    if dispatch.resolve(_NAME, backend, logits) == "triton":
        return _op.draw(logits, uniform, scale, temperature)
    return draw_reference(logits, uniform, scale, temperature)
