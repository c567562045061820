"""One token of the selective scan, for decoding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from genssm.kernels import arguments
from genssm.kernels.selective_scan.reference import softplus

_NAME = "selective_scan_step"


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Advance the selective scan by one token; equal to `selective_scan` token by token.

        h = exp(delta A) h + delta u B,     y = (C h + D u) silu(z), summed over directions

    Args:
        state: h, (Bt, K, E, N), float32 (float64 for float64 ``u``), as `selective_scan` returns it, or a half
            precision to keep it in, see `mamba2_step`; updated in place.
        u: input, (Bt, E) or (Bt, K, E).
        delta: step size, (Bt, E) or (Bt, K, E).
        A: state matrix, (E, N) or (K, E, N).
        B: input map, (Bt, N), (Bt, K, N) or, with groups, (Bt, 1 or K, G, N).
        C: output map, shape as ``B``.
        D: skip, (E,) or (K, E).
        z: gate, (Bt, E) or (Bt, K, E).
        delta_bias: (E,) or (K, E).
        delta_softplus: apply softplus to ``delta + delta_bias``.
    Returns:
        y, (Bt, E), dtype of ``u``.
    Raises:
        ValueError: shapes disagree; the message names both.
    """
    if state.ndim != 4:
        raise ValueError(f"{_NAME}: state is {arguments.shape(state)}, expected (Bt, K, E, N)")
    batch, directions, channels, states = state.shape
    dtype = arguments.compute_dtype(u)
    per_token, per_channel = (batch, channels), (channels,)
    h = state.to(dtype)
    u_, dt = (arguments.with_directions(_NAME, n, x, 1, per_token).to(dtype) for n, x in (("u", u), ("delta", delta)))
    A = arguments.with_directions(_NAME, "A", A, 0, (channels, states)).to(dtype)
    B, C = (_per_channel(name, x.to(dtype), batch, channels, states) for name, x in (("B", B), ("C", C)))
    sizes = {"u": u_.shape[1], "delta": dt.shape[1], "A": A.shape[0], "B": B.shape[1], "C": C.shape[1]}
    if D is not None:
        D = arguments.with_directions(_NAME, "D", D, 0, per_channel).to(dtype)
        sizes["D"] = D.shape[0]
    if z is not None:
        z = arguments.with_directions(_NAME, "z", z, 1, per_token).to(dtype)
        sizes["z"] = z.shape[1]
    if delta_bias is not None:
        delta_bias = arguments.with_directions(_NAME, "delta_bias", delta_bias, 0, per_channel).to(dtype)
        sizes["delta_bias"] = delta_bias.shape[0]
        dt = dt + delta_bias
    arguments.state_directions(_NAME, sizes, directions)
    if delta_softplus:
        dt = softplus(dt)
    h = torch.exp(dt[..., None] * A) * h + (dt * u_)[..., None] * B  # (Bt, K, E, N)
    arguments.keep_state(state, h)
    y = (h * C).sum(dim=-1)  # (Bt, K, E)
    if D is not None:
        y = y + D * u_
    if z is not None:
        y = y * F.silu(z)
    return y.sum(dim=1).to(u.dtype)


def _per_channel(name: str, x: Tensor, batch: int, channels: int, states: int) -> Tensor:
    """(Bt, N), (Bt, K, N) or (Bt, K, G, N) -> (Bt, K, E or 1, N)."""
    view = x.unsqueeze(1) if x.ndim == 2 else x
    view = view.unsqueeze(2) if view.ndim == 3 else view
    if view.ndim != 4 or (view.shape[0], view.shape[3]) != (batch, states) or channels % view.shape[2]:
        raise ValueError(
            f"{_NAME}: {name} is {arguments.shape(x)}, expected ({batch}, {states}), ({batch}, K, {states}) "
            f"or ({batch}, K or 1, G, {states}) with G dividing {channels}"
        )
    groups = view.shape[2]
    return view if groups == 1 else view.repeat_interleave(channels // groups, dim=2)
