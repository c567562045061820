"""One token through a Mamba-2 mixer in PyTorch, from the one-token steps of its parts: the definition."""

import torch
from torch import Tensor

from genssm.kernels import arguments
from genssm.kernels.causal_conv1d import causal_conv1d_step
from genssm.kernels.ssd import ssd_step


def step_reference(
    projected: Tensor,
    conv_windows: Tensor,
    conv_turns: Tensor,
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
    window = read_windows(conv_windows, conv_turns)
    mapped = causal_conv1d_step(window, mapped, conv_weight, conv_bias, activation="silu")
    conv_turns.bitwise_xor_(1)
    conv_windows[..., :-1][_places(conv_turns)] = window[:, 0].to(conv_windows.dtype)
    x, B, C = mapped.split([inner, maps, maps], dim=-1)
    B, C = (m.unflatten(-1, (ngroups, states)) for m in (B, C))
    dtype = arguments.compute_dtype(projected)
    return ssd_step(
        ssm_state, x.unflatten(-1, (heads, width)), dt, -A_log.to(dtype).exp(), B, C, D.to(dtype),
        z.unflatten(-1, (heads, width)), dt_bias=dt_bias.to(dtype), dt_softplus=True,
    ).flatten(-2)  # (Bt, E)  # fmt: skip


def read_windows(windows: Tensor, turns: Tensor) -> Tensor:
    """The W - 1 latest inputs of a convolution, oldest first, (Bt, 1, M, W - 1), as `causal_conv1d` takes them."""
    return windows[..., :-1][_places(turns)][:, None]


def fill_windows(windows: Tensor, turns: Tensor, window: Tensor) -> None:
    """Keep the W - 1 latest inputs, (Bt, 1, M, W - 1), as `causal_conv1d` returns them."""
    turns.zero_()
    windows[:, 0, :, :-1] = window[:, 0]


def _places(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each sample's window whose turn it is."""
    return torch.arange(turns.shape[0], device=turns.device), turns[:, 0].long()
