"""One token of the Mamba-2 scan, for decoding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from genssm.kernels import arguments
from genssm.kernels.ssd.reference import softplus

_NAME = "ssd_step"


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Advance the Mamba-2 scan by one token; equal to `ssd` token by token.

        h = exp(dt A) h + dt x B',     y = (h C + D x) silu(z), summed over directions

    Args:
        state: h, (Bt, K, H, P, N), float32 (float64 for float64 ``x``), as `ssd` returns it, or a half
            precision to keep it in, see `mamba2_step`; updated in place.
        x: input, (Bt, H, P) or (Bt, K, H, P).
        dt: step size, (Bt, H) or (Bt, K, H).
        A: decay rates, (H,) or (K, H).
        B: input map, (Bt, G, N) or (Bt, K, G, N); head h belongs to group h // (H / G).
        C: output map, shape as ``B``.
        D: skip, (H,) or (K, H).
        z: gate, (Bt, H, P) or (Bt, K, H, P).
        dt_bias: (H,) or (K, H).
        dt_softplus: apply softplus to ``dt + dt_bias``.
    Returns:
        y, (Bt, H, P), dtype of ``x``.
    Raises:
        ValueError: shapes disagree; the message names both.
    """
    if state.ndim != 5:
        raise ValueError(f"{_NAME}: state is {arguments.shape(state)}, expected (Bt, K, H, P, N)")
    batch, directions, heads, width, states = state.shape
    dtype = arguments.compute_dtype(x)
    per_token, per_head = (batch, heads, width), (heads,)
    h = state.to(dtype)
    x_ = arguments.with_directions(_NAME, "x", x, 1, per_token).to(dtype)
    dt = arguments.with_directions(_NAME, "dt", dt, 1, (batch, heads)).to(dtype)
    A = arguments.with_directions(_NAME, "A", A, 0, per_head).to(dtype)
    B, C = (_per_head(name, y.to(dtype), batch, heads, states) for name, y in (("B", B), ("C", C)))
    sizes = {"x": x_.shape[1], "dt": dt.shape[1], "A": A.shape[0], "B": B.shape[1], "C": C.shape[1]}
    if D is not None:
        D = arguments.with_directions(_NAME, "D", D, 0, per_head).to(dtype)
        sizes["D"] = D.shape[0]
    if z is not None:
        z = arguments.with_directions(_NAME, "z", z, 1, per_token).to(dtype)
        sizes["z"] = z.shape[1]
    if dt_bias is not None:
        dt_bias = arguments.with_directions(_NAME, "dt_bias", dt_bias, 0, per_head).to(dtype)
        sizes["dt_bias"] = dt_bias.shape[0]
        dt = dt + dt_bias
    arguments.state_directions(_NAME, sizes, directions)
    if dt_softplus:
        dt = softplus(dt)
    h = torch.exp(dt * A)[..., None, None] * h + (dt[..., None] * x_)[..., None] * B  # (Bt, K, H, P, N)
    arguments.keep_state(state, h)
    y = (h * C).sum(dim=-1)  # (Bt, K, H, P)
    if D is not None:
        y = y + D[..., None] * x_
    if z is not None:
        y = y * F.silu(z)
    return y.sum(dim=1).to(x.dtype)


def _per_head(name: str, x: Tensor, batch: int, heads: int, states: int) -> Tensor:
    """(Bt, G, N) or (Bt, K, G, N) -> (Bt, 1 or K, H or 1, 1, N)."""
    view = x.unsqueeze(1) if x.ndim == 3 else x
    if view.ndim != 4 or (view.shape[0], view.shape[3]) != (batch, states) or heads % view.shape[2]:
        raise ValueError(
            f"{_NAME}: {name} is {arguments.shape(x)}, expected ({batch}, G, {states}) or ({batch}, K, G, {states}) "
            f"with G dividing {heads}"
        )
    groups = view.shape[2]
    view = view if groups == 1 else view.repeat_interleave(heads // groups, dim=2)
    return view.unsqueeze(3)
