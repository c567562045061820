"""What a block adds to its residual stream at its end: gate, inner skip and stochastic depth. See README.md here."""

from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.gated_residual import op as _op
from genssm.kernels.gated_residual.reference import residual_reference

__all__ = ["gated_residual"]

_NAME = "gated_residual"


def gated_residual(
    stream: Tensor,
    x: Tensor,
    gate: Tensor,
    *,
    skip: Tensor | None = None,
    factor: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add the gated result of a branch to a residual stream.

        stream + factor (skip + gate x)

    Every step is rounded to the type that PyTorch's promotion gives it. Letters: B batch, L tokens, D channels.

    Args:
        stream: (B, L, D), any float type.
        x: what the branch has made, shape of the stream.
        gate: (B, 1, D) for all tokens of a sample or (B, L, D); B may be 1.
        skip: what the branch adds ungated, shape of the stream; None adds nothing.
        factor: of the whole branch, such as that of stochastic depth: (B, 1, 1) or (B, L, 1); B may be 1. None means
            1. It takes no gradient.
        backend: "auto", "triton", or any other of `genssm.kernels.dispatch`, which all mean PyTorch here and can be
            differentiated twice.
    Returns:
        The new stream, (B, L, D).
    Raises:
        ValueError: shapes or devices disagree, or the factor wants a gradient; the message names both sides.

    Example:
        >>> stream, x, gate = torch.randn(2, 16, 8), torch.randn(2, 16, 8), torch.randn(2, 1, 8)
        >>> torch.equal(gated_residual(stream, x, gate), stream + gate * x)
        True
    """
    _check(stream, x, gate, skip, factor)
    chosen = dispatch.resolve(_NAME, backend, stream)
    run = _op.gated_residual_fwd if chosen == "triton" else residual_reference
    return run(stream, x, gate, skip, factor)


def _check(stream: Tensor, x: Tensor, gate: Tensor, skip: Tensor | None, factor: Tensor | None) -> None:
    if stream.ndim != 3 or not stream.dtype.is_floating_point:
        raise ValueError(f"{_NAME}: stream is {arguments.shape(stream)} {stream.dtype}, expected floats (B, L, D)")
    arguments.check_devices(_NAME, stream.device, {"x": x, "gate": gate, "skip": skip, "factor": factor})
    for name, t in (("x", x), ("skip", skip)):
        if t is not None and t.shape != stream.shape:
            raise ValueError(f"{_NAME}: {name} is {arguments.shape(t)}, expected {arguments.shape(stream)} as stream")
    arguments.check_of_tokens(_NAME, "gate", gate, "stream", stream)
    if factor is not None:
        arguments.check_factor(_NAME, factor, "stream", stream)
