"""A token drawn from guided logits with a given random number, and put where the next step reads it. See README.md."""

from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.draw_token import op as _op
from genssm.kernels.draw_token.reference import draw_reference, invert_cdf, put_token

__all__ = ["draw_token", "invert_cdf", "put_token"]

_NAME = "draw_token"
LARGEST = 65536  # tokens that a program of the triton backend can hold


def draw_token(
    logits: Tensor,
    uniform: Tensor,
    scales: Tensor | None,
    position: Tensor,
    codes: Tensor,
    previous: Tensor,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> None:
    """Draw the next token of each image: the first whose cumulative probability exceeds the random number.

        l = null + scale (condition - null);   p = softmax(l / temperature)

    Everything is read and written in place, so that a captured graph of it draws on when it is replayed; what moves
    ``position`` on is another launch. Not differentiable. Letters: B images, V vocabulary, T tokens of an image, R rows
    of the model's batch, a multiple of B: row b of the model belongs to image b mod B.

    Args:
        logits: (B, V), any float type; with ``scales`` (2 B, V), those with the condition first. -inf is never drawn.
        uniform: random numbers in [0, 1) of all tokens, (B, T), float32.
        scales: weight of the guidance at each token, (T,), float32; None for logits that need none.
        position: which token is drawn, (1,), int64.
        codes: receives it in column ``position``, (B, T), int64; never a token of probability 0.
        previous: receives it in each row of its image, (R, 1), int64.
        temperature: above 0.
        backend: "auto", "triton", or any other of `genssm.kernels.dispatch`, which all mean PyTorch here. "auto" takes
            PyTorch for more than 65536 tokens.
    Raises:
        ValueError: shapes disagree; the message names both.
    """
    images, tokens = codes.shape
    rows = images * (1 if scales is None else 2)
    if logits.ndim != 2 or logits.shape[0] != rows:
        raise ValueError(f"{_NAME}: logits are {arguments.shape(logits)}, expected ({rows}, V)")
    expected = {"uniform": (uniform, (images, tokens)), "position": (position, (1,))}
    if scales is not None:
        expected["scales"] = (scales, (tokens,))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{_NAME}: {name} is {arguments.shape(x)}, expected {shape}")
    if previous.shape[1:] != (1,) or previous.shape[0] % images:
        raise ValueError(f"{_NAME}: previous is {arguments.shape(previous)}, expected (R, 1), R a multiple of {images}")
    given = {"codes": codes, "previous": previous, **{name: x for name, (x, _) in expected.items()}}
    arguments.check_devices(_NAME, logits.device, given)
    if backend == "auto" and logits.shape[1] > LARGEST:
        backend = "reference"
    chosen = dispatch.resolve(_NAME, backend, logits)
    draw = _op.draw if chosen == "triton" else draw_reference
    draw(logits, uniform, scales, position, codes, previous, temperature)
