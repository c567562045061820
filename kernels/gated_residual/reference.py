"""A block's residual update composed in PyTorch: the definition, and the path of the CPU and of float64."""

from torch import Tensor


def residual_reference(stream: Tensor, x: Tensor, gate: Tensor, skip: Tensor | None, factor: Tensor | None) -> Tensor:
    """The new stream; arguments as of `gated_residual`."""
    u = gate * x if skip is None else skip + gate * x
    return stream + (u if factor is None else factor * u)
