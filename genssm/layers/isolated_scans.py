"""Several selective scans over the same tokens, each with parameters of its own, in one call."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from genssm.kernels.isolated_scans import isolated_scans
from genssm.layers.directions import DepthwiseTaps
from genssm.paths import check_choice

# B batch, L tokens, K scans, E channels, N d_state, R dt_rank, W d_conv

# Scans of each of N blocks on the way down a U, as the paper compares them.
SCAN_PLANS = {
    "2N-1..1": lambda n: list(range(2 * n - 1, 0, -2)),
    "1..2N-1": lambda n: list(range(1, 2 * n, 2)),
    "N..1": lambda n: list(range(n, 0, -1)),
    "1..N": lambda n: list(range(1, n + 1)),
}


class GroupedLinear(nn.Module):
    """Weights (K, out, in) of K linear maps side by side, without biases.

    The maps run with the scans they belong to, so this module only hands its weights out, as
    :class:`genssm.layers.directions.DepthwiseTaps` does.

    Args:
        groups: K.
        in_features, out_features: of each map.
        bound: weights start uniform in +- this.
    """

    def __init__(self, groups: int, in_features: int, out_features: int, bound: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features).uniform_(-bound, bound))

    def forward(self) -> torch.Tensor:
        """Return the weights."""
        return self.weight


class IsolatedScans(nn.Module):
    """K isolated Mamba-1 scans of one input (Zhang et al. 2024, "Motion Mamba", algorithms 1 and 2).

        c_i = silu(conv_i(x)),   [dt, B, C]_i = W^x_i c_i,   delta_i = softplus(W^dt_i dt_i + bias_i)
        y = sum_i scan(c_i, delta_i, -exp(A_log_i), B_i, C_i, D_i) * silu(z)

    The scans are directions of one operator, :func:`genssm.kernels.isolated_scans.isolated_scans`.

    Args:
        channels: E.
        scans: K.
        d_state: state size N.
        d_conv: width W of the causal convolution.
        dt_rank: rank R of the step projection.
        dt_min, dt_max: softplus(dt_bias) starts log-uniform in this range.
    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        channels: int,
        scans: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int = 16,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        if not 1 <= d_state <= 256 or not 1 <= d_conv <= 8 or min(channels, scans, dt_rank) < 1:
            raise ValueError(
                f"{scans} scans of {channels} channels, d_state {d_state}, d_conv {d_conv}, dt_rank {dt_rank}; "
                "expected positive numbers, d_state up to 256 and d_conv up to 8"
            )
        self.scans = scans
        self.conv1d = DepthwiseTaps(scans * channels, d_conv)
        self.x_proj = GroupedLinear(scans, channels, dt_rank + 2 * d_state, channels**-0.5)
        self.dt_proj = GroupedLinear(scans, dt_rank, channels, dt_rank**-0.5)
        step = torch.empty(scans, channels).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
        A_log = torch.arange(1, d_state + 1, dtype=torch.float32).log()
        self.A_log = nn.Parameter(A_log.repeat(scans, channels, 1))
        self.D = nn.Parameter(torch.ones(scans, channels))

    def forward(
        self,
        x: torch.Tensor,
        z: torch.Tensor | None = None,
        orders: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        reduce: str = "sum",
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scan.

        Args:
            x: (B, L, E).
            z: gate, (B, L, E); None leaves it out.
            orders: (K, L), one permutation per scan; None walks first to last in all of them.
            lengths: (B,), valid tokens; later rows are neither visited nor written (zero).
            reduce: "sum" of the scans, or "none".
            cu_seqlens: (S+1,) borders of sequences packed into one row of the batch (B = 1), in place of ``lengths``.
        Returns:
            (B, L, E), or (B, K, L, E) with "none".
        """
        weight, bias = (p.unflatten(0, (self.scans, -1)) for p in self.conv1d())  # (K, E, W), (K, E)
        return isolated_scans(
            x, z, weight, bias, self.x_proj(), self.dt_proj(), self.dt_bias, self.A_log, self.D,
            orders=orders, lengths=lengths, cu_seqlens=cu_seqlens, reduce=reduce,
        )  # fmt: skip


def two_ways(length: int, device: torch.device) -> torch.Tensor:
    """Orders (2, L) int32: first to last, and last to first."""
    forward = torch.arange(length, dtype=torch.int32, device=device)
    return torch.stack([forward, forward.flip(0)])


def scan_counts(plan: str | Sequence[int], blocks: int) -> list[int]:
    """Scans of each of the N ``blocks`` on the way down: those of a named plan, or the given list.

    Raises:
        ValueError: an unknown plan, or not one positive number per block.
    """
    if isinstance(plan, str):
        check_choice("scan_plan", plan, tuple(SCAN_PLANS))
        return SCAN_PLANS[plan](blocks)
    if len(plan) != blocks or min(plan, default=0) < 1:
        raise ValueError(
            f"scan_plan is {list(plan)}; expected {blocks} positive numbers, one per block on the way down"
        )
    return list(plan)
