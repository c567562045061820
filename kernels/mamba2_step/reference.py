"""One token through a Mamba-2 mixer in PyTorch, from the one-token steps of its parts: the definition."""

from torch import Tensor

from genssm.kernels import arguments
from genssm.kernels.causal_conv1d import causal_conv1d_step
from genssm.kernels.ssd import ssd_step


def step_reference(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ngroups: int,
) -> Tensor:
    """Arguments and result as of `mamba2_step`."""
    _, _, heads, width, states = ssm_state.shape
    inner, maps = heads * width, ngroups * states
    z, mapped, dt = projected.split([inner, inner + 2 * maps, heads], dim=-1)  # (Bt, E), (Bt, M), (Bt, H)
    mapped = causal_conv1d_step(conv_state, mapped, conv_weight, conv_bias, activation="silu")
    x, B, C = mapped.split([inner, maps, maps], dim=-1)
    B, C = (m.unflatten(-1, (ngroups, states)) for m in (B, C))
    dtype = arguments.compute_dtype(projected)
    return ssd_step(
        ssm_state, x.unflatten(-1, (heads, width)), dt, -A_log.to(dtype).exp(), B, C, D.to(dtype),
        z.unflatten(-1, (heads, width)), dt_bias=dt_bias.to(dtype), dt_softplus=True,
    ).flatten(-2)  # (Bt, E)  # fmt: skip
