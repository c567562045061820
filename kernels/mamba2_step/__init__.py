"""One token through a Mamba-2 mixer, from its input projection to its gate. See README.md here."""

import torch
from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.mamba2_step import op as _op
from genssm.kernels.mamba2_step.reference import fill_windows, read_windows, step_reference

__all__ = ["fill_windows", "mamba2_step", "read_windows"]

_NAME = "mamba2_step"


def mamba2_step(
    projected: Tensor,
    conv_windows: Tensor,
    conv_turns: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    ngroups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Advance convolution and scan by one token.

        z, x, B, C, dt = projected;   [x, B, C] = silu(conv([x, B, C]));   dt = softplus(dt + dt_bias)
        h = exp(-dt exp(A_log)) h + dt x B';   y = (h C + D x) silu(z)

    Not differentiable. Letters: Bt batch, H heads, P channels of a head, E = H P, G groups, N state,
    M = E + 2 G N channels of the convolution, W taps.

    Args:
        projected: (Bt, E + M + H), any float type.
        conv_windows: two windows of the convolution's inputs, (Bt, 2, M, W), any float type; updated in place. One
            holds the W - 1 inputs before the new token, oldest first (its last column has no meaning), the other one is
            written. `read_windows` and `fill_windows` translate to and from the states of `causal_conv1d`.
        conv_turns: which window is read, 0 or 1, (Bt, E), uint8; updated in place. It is the same for all channels of a
            sample: every part of a step has its own, which no other part reads.
        ssm_state: h, (Bt, 1, H, P, N), any float type; updated in place. The arithmetic is float32 (float64 for float64
            ``projected``); only what is kept is rounded, in float16 to at most its largest number.
        conv_weight: (M, W); the last tap multiplies the current token.
        conv_bias: (M,) or None.
        A_log, D, dt_bias: (H,).
        ngroups: G, a divisor of H.
        backend: "auto", "triton", or any other of `genssm.kernels.dispatch`, which all mean PyTorch here.
    Returns:
        y, (Bt, E), dtype of ``projected``.
    Raises:
        ValueError: shapes disagree; the message names both.
    """
    heads = A_log.shape[0]
    if ssm_state.ndim != 5 or ssm_state.shape[1:3] != (1, heads) or heads % ngroups:
        raise ValueError(
            f"{_NAME}: ssm_state is {arguments.shape(ssm_state)}, expected (Bt, 1, {heads}, P, N) with ngroups="
            f"{ngroups} dividing {heads}"
        )
    batch, _, _, width, states = ssm_state.shape
    mapped = heads * width + 2 * ngroups * states
    expected = {
        "projected": (projected, (batch, heads * width + mapped + heads)),
        "conv_windows": (conv_windows, (batch, 2, mapped, conv_weight.shape[-1])),
        "conv_turns": (conv_turns, (batch, heads * width)),
        "conv_weight": (conv_weight, (mapped, conv_weight.shape[-1])),
        "A_log": (A_log, (heads,)),
        "D": (D, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
    }
    if conv_bias is not None:
        expected["conv_bias"] = (conv_bias, (mapped,))
    arguments.check_devices(_NAME, projected.device, {name: x for name, (x, _) in expected.items()})
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{_NAME}: {name} is {arguments.shape(x)}, expected {shape}")
    if conv_turns.dtype != torch.uint8:
        raise ValueError(f"{_NAME}: conv_turns are {conv_turns.dtype}, expected torch.uint8")
    args = (projected, conv_windows, conv_turns, ssm_state, conv_weight, conv_bias, A_log, D, dt_bias, ngroups)
    return _op.step(*args) if dispatch.resolve(_NAME, backend, projected) == "triton" else step_reference(*args)
