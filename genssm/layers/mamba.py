"""The Mamba-1 mixer: projections, causal convolution and selective scan along any order, gate."""

import math

import torch
from torch import nn

from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.selective_scan import selective_scan
from genssm.layers.directions import DepthwiseTaps, DirectedMixer, initial_dt_bias
from genssm.layers.modulation import upcast

# B batch, L tokens, K directions, D hidden_size, E = expand * D, N d_state, R dt_rank, W d_conv


class Mamba(DirectedMixer):
    """Mamba-1 mixer (Gu and Dao 2023, arXiv:2312.00752) that visits tokens along given orders.

        x, z = W_in h;   x = silu(conv(x));   [dt, B, C] = W_x x;   delta = softplus(W_dt dt + dt_bias)
        y = scan(x, delta, -exp(A_log), B, C, D) * silu(z);   out = W_out y

    Convolution and scan follow the orders; tokens stay in their own rows throughout. Several orders run in one call
    and their results are summed before ``out_proj``. With ``bidirectional`` there are two directions with their own
    convolution and scan parameters (suffix ``_b``), sharing ``in_proj`` and ``out_proj`` (Vim, arXiv:2401.09417).

    The step bias is a parameter of its own (``dt_bias``, not ``dt_proj.bias``): it is added inside the scan in float32,
    since rounding it to bfloat16 would change the step sizes by percents.

    Args:
        hidden_size: width D of the tokens.
        d_state: state size N, 1..256.
        d_conv: width W of the causal convolution, 1..8.
        expand: inner width E = expand * D.
        dt_rank: rank R of the step projection; "auto" means ceil(D / 16).
        bidirectional: own parameters for a second direction.
        bias: biases in ``in_proj`` and ``out_proj``, starting at zero.
        conv_bias: bias in the convolution.
        dt_min, dt_max: softplus(dt_bias) starts log-uniform in this range, for every direction.
        dt_floor: least initial step.
        out_scale: factor on the initial ``out_proj.weight``; deep models pass num_layers ** -0.5.

    Raises:
        ValueError: ``dt_rank`` is neither "auto" nor a positive integer, or a size is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        bidirectional: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__(bidirectional)
        if dt_rank == "auto":
            dt_rank = math.ceil(hidden_size / 16)
        if not isinstance(dt_rank, int) or dt_rank < 1:
            raise ValueError(f'dt_rank is {dt_rank!r}; expected a positive integer or "auto"')
        if not 1 <= d_state <= 256 or not 1 <= d_conv <= 8:
            raise ValueError(f"d_state is {d_state} and d_conv is {d_conv}; expected 1..256 and 1..8")
        inner = expand * hidden_size
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.in_proj = nn.Linear(hidden_size, 2 * inner, bias=bias)
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)
        for suffix in self.suffixes:
            self._add_direction(suffix, inner, d_conv, conv_bias, (dt_min, dt_max, dt_floor))
        with torch.no_grad():
            self.out_proj.weight.mul_(out_scale)
            if bias:
                self.in_proj.bias.zero_()
                self.out_proj.bias.zero_()

    def _add_direction(
        self, suffix: str, inner: int, d_conv: int, conv_bias: bool, dt_range: tuple[float, float, float]
    ) -> None:
        """Make and initialise the parameters of one direction (Mamba, section 3.6)."""
        conv1d = DepthwiseTaps(inner, d_conv, conv_bias)
        x_proj = nn.Linear(inner, self.dt_rank + 2 * self.d_state, bias=False)
        dt_proj = nn.Linear(self.dt_rank, inner, bias=False)
        nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt_bias = initial_dt_bias(inner, *dt_range)
        A_log = torch.arange(1, self.d_state + 1, dtype=torch.float32).log().repeat(inner, 1)
        self.add_module("conv1d" + suffix, conv1d)
        self.add_module("x_proj" + suffix, x_proj)
        self.add_module("dt_proj" + suffix, dt_proj)
        self.register_parameter("dt_bias" + suffix, nn.Parameter(dt_bias))
        self.register_parameter("A_log" + suffix, nn.Parameter(A_log))
        self.register_parameter("D" + suffix, nn.Parameter(torch.ones(inner)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        orders: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix tokens.

        Args:
            hidden_states: (B, L, D).
            orders: permutations of 0..L-1, integer. One direction's parameters: (L,) or (K, L), K passes with shared
                parameters. ``bidirectional``: (2, L), one per direction, or (L,), the second then runs it backwards.
                None means raster order.
            lengths: (B,) valid tokens of each sample; later rows are neither visited nor written (zero).
            cu_seqlens: (S+1,) boundaries of sequences packed into one row of the batch (B = 1).

        Returns:
            (B, L, D), each token in its own row.

        Raises:
            ValueError: ``orders`` has the wrong number of directions.
        """
        orders = self.direction_orders(orders, hidden_states)
        scan_over = {"orders": orders, "lengths": lengths, "cu_seqlens": cu_seqlens}
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, L, E) each
        weight, bias = self.taps()  # (K, E, W) or (E, W)
        x = causal_conv1d(x, weight, bias, activation="silu", **scan_over)  # (B, K, L, E) or (B, L, E)
        delta, B, C = self._project_steps(x)
        A_log, D, dt_bias = (self.stacked(name) for name in ("A_log", "D", "dt_bias"))
        y = selective_scan(
            x, delta, -upcast(A_log).exp(), B, C, upcast(D), z,
            delta_bias=upcast(dt_bias), delta_softplus=True, **scan_over,
        )  # (B, L, E), summed over directions  # fmt: skip
        return self.out_proj(y)

    def _project_steps(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """delta before bias and softplus (..., L, E), B and C (..., L, N), with each direction's own projections."""
        sizes = [self.dt_rank, self.d_state, self.d_state]
        if len(self.suffixes) == 1:
            dt, B, C = self.x_proj(x).split(sizes, dim=-1)
            return self.dt_proj(dt), B, C
        per_direction = []
        for k, suffix in enumerate(self.suffixes):
            dt, B, C = getattr(self, "x_proj" + suffix)(x[:, k]).split(sizes, dim=-1)
            per_direction.append((getattr(self, "dt_proj" + suffix)(dt), B, C))
        delta, B, C = (torch.stack(parts, dim=1) for parts in zip(*per_direction))
        return delta, B, C
