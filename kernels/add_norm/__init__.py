"""What stands between two mixers in one call: residual update, norm, modulation. See README.md here."""

import torch
from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.add_norm import op as _op
from genssm.kernels.add_norm.reference import add_norm_reference

__all__ = ["add_norm"]

_NAME = "add_norm"
_NORMS = ("rms", "layer")


def add_norm(
    hidden_states: Tensor,
    x: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    add_normed: bool = False,
    factor: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    return_normed: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Add to a residual stream, normalise it, modulate the result.

        h <- h + gate x;   n = norm(h) weight + bias;   y = n (1 + scale) + shift;   h <- h + factor n

    with norm(h) = h / sqrt(mean(h^2) + eps) ("rms") or (h - mean(h)) / sqrt(var(h) + eps) ("layer"), in float32. Every
    step but those inside the norm is rounded to the type that PyTorch's promotion gives it; n has the type of the
    weight, or of h without one. Letters: B batch, L tokens, D channels.

    Args:
        hidden_states: h, (..., D), any float type.
        x: what is added, shape of h; None leaves h as it is.
        gate: factor of ``x``, (B, 1, D) for all tokens of a sample or (B, L, D); B may be 1. h is then (B, L, D).
        weight, bias: of the norm, (D,); an rms norm has no bias.
        shift, scale: modulation, both or neither, shapes as of ``gate``.
        add_normed: make the last step above, of a block with an inner skip; not together with ``x``.
        factor: of n there, such as that of stochastic depth: (B, 1, 1) or (B, L, 1), B may be 1. None means 1. It takes
            no gradient.
        norm: "rms" or "layer".
        eps: added to the mean square or the variance.
        dtype: type that y is rounded to in the end, for a reader that would cast it; None leaves it.
        return_normed: return n too.
        backend: "auto", "triton", or any other of `genssm.kernels.dispatch`, which all mean PyTorch here and can be
            differentiated twice.
    Returns:
        h (the given tensor where nothing is added) and y, (..., D); with ``return_normed`` also n, (..., D).
    Raises:
        ValueError: shapes or devices disagree, or options do not go together; the message names both sides.

    Example:
        >>> h, x, gate = torch.randn(2, 16, 8), torch.randn(2, 16, 8), torch.randn(2, 1, 8)
        >>> [tuple(t.shape) for t in add_norm(h, x, gate, weight=torch.ones(8))]
        [(2, 16, 8), (2, 16, 8)]
    """
    _check(hidden_states, x, gate, weight, bias, shift, scale, add_normed, factor, norm)
    args = (x, gate, weight, bias, shift, scale, factor, add_normed, norm == "layer", eps, dtype)
    chosen = dispatch.resolve(_NAME, backend, hidden_states)
    run = _op.add_norm if chosen == "triton" else add_norm_reference
    h, y, n = run(hidden_states, *args, return_normed)
    return (h, y, n) if return_normed else (h, y)


def _check(h, x, gate, weight, bias, shift, scale, add_normed: bool, factor, norm: str) -> None:
    if norm not in _NORMS:
        raise ValueError(f"{_NAME}: norm is {norm!r}, expected 'rms' or 'layer'")
    if h.ndim < 1 or not h.dtype.is_floating_point:
        raise ValueError(f"{_NAME}: hidden_states are {arguments.shape(h)} {h.dtype}, expected floats (..., D)")
    if bias is not None and (norm == "rms" or weight is None):
        raise ValueError(f"{_NAME}: bias belongs to a layer norm with a weight; leave it out or give both")
    if gate is not None and x is None:
        raise ValueError(f"{_NAME}: gate is given without x, which it multiplies")
    if (shift is None) != (scale is None):
        raise ValueError(f"{_NAME}: shift and scale go together; give both or neither")
    if add_normed and x is not None:
        raise ValueError(f"{_NAME}: add_normed is of a block's beginning, where nothing is added first; leave x out")
    if factor is not None and not add_normed:
        raise ValueError(f"{_NAME}: factor is given without add_normed, to which it belongs")
    vectors = {"gate": gate, "weight": weight, "bias": bias, "shift": shift, "scale": scale, "factor": factor}
    arguments.check_devices(_NAME, h.device, {"x": x, **vectors})
    if x is not None and x.shape != h.shape:
        raise ValueError(f"{_NAME}: x is {arguments.shape(x)}, expected {arguments.shape(h)} as hidden_states")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != h.shape[-1:]:
            raise ValueError(f"{_NAME}: {name} is {arguments.shape(parameter)}, expected {arguments.shape(h)[-1:]}")
    for name, vector in (("gate", gate), ("shift", shift), ("scale", scale)):
        if vector is not None:
            arguments.check_of_tokens(_NAME, name, vector, "hidden_states", h)
    if factor is not None:
        arguments.check_factor(_NAME, factor, "hidden_states", h)
