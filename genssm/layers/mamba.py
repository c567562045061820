"""The Mamba-1 mixer: projections, causal convolution and selective scan along any order, gate."""

import dataclasses
import math

import torch
from torch import nn

from genssm.kernels.arguments import keep_state
from genssm.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from genssm.kernels.selective_scan import selective_scan, selective_scan_step
from genssm.layers.directions import DepthwiseTaps, DirectedMixer, initial_dt_bias
from genssm.layers.modulation import upcast
from genssm.layers.projections import halves, steps_and_maps

# B batch, L tokens, K directions, D hidden_size, E = expand * D, N d_state, R dt_rank, W d_conv


@dataclasses.dataclass
class MambaState:
    """What a mixer keeps between tokens; updated in place.

    Args:
        conv: the W - 1 latest tokens before the convolution, oldest first, (B, 1, E, W - 1).
        ssm: state of the scan, (B, 1, E, N).
    """

    conv: torch.Tensor
    ssm: torch.Tensor


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
        state: MambaState | None = None,
    ) -> torch.Tensor:
        """Mix tokens.

        Args:
            hidden_states: (B, L, D).
            orders: permutations of 0..L-1, integer. One direction's parameters: (L,) or (K, L), K passes with shared
                parameters. ``bidirectional``: (2, L), one per direction, or (L,), the second then runs it backwards.
                None means raster order.
            lengths: (B,) valid tokens of each sample; later rows are neither visited nor written (zero).
            cu_seqlens: (S+1,) boundaries of sequences packed into one row of the batch (B = 1).
            state: tokens before these, from :meth:`allocate_state`; the state after them is written into it. For one
                direction, without ``lengths`` and ``cu_seqlens``, and not differentiable.

        Returns:
            (B, L, D), each token in its own row.

        Raises:
            ValueError: ``orders`` has the wrong number of directions, or ``state`` is given where none can be kept.
        """
        if state is not None:
            self.check_state(orders, lengths, cu_seqlens)
            if hidden_states.shape[1] == 1:
                return self.step(hidden_states[:, 0], state)[:, None]
        orders = self.direction_orders(orders, hidden_states)
        scan_over = {"orders": orders, "lengths": lengths, "cu_seqlens": cu_seqlens}
        x, z = halves(self.in_proj, hidden_states)  # (B, L, E) each
        weight, bias = self.taps()  # (K, E, W) or (E, W)
        conv, ssm = (None, None) if state is None else (state.conv, state.ssm)
        x, conv_last = causal_conv1d(
            x, weight, bias, activation="silu", initial_state=conv, return_last_state=True, **scan_over
        )  # (B, K, L, E) or (B, L, E)
        x, delta, B, C = self._project_steps(x)
        A_log, D, dt_bias = (self.stacked(name) for name in ("A_log", "D", "dt_bias"))
        y = selective_scan(
            x, delta, -upcast(A_log).exp(), B, C, upcast(D), z,
            delta_bias=upcast(dt_bias), delta_softplus=True,
            initial_state=ssm, return_last_state=state is not None, **scan_over,
        )  # (B, L, E), summed over directions  # fmt: skip
        if state is not None:
            y, ssm_last = y
            with torch.no_grad():
                conv.copy_(conv_last)
                keep_state(ssm, ssm_last)
        return self.out_proj(y)

    @torch.no_grad()
    def step(self, hidden_states: torch.Tensor, state: MambaState) -> torch.Tensor:
        """Mix one more token; equal to :meth:`forward` token by token.

        Args:
            hidden_states: (B, D).
            state: of the tokens before it, updated in place.

        Returns:
            (B, D).

        Raises:
            ValueError: the mixer is bidirectional.
        """
        self.check_state()
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)  # (B, E) each
        x = causal_conv1d_step(state.conv, x, *self.taps(), activation="silu")
        x, delta, B, C = self._project_steps(x)
        y = selective_scan_step(
            state.ssm, x, delta, -upcast(self.A_log).exp(), B, C, upcast(self.D), z,
            delta_bias=upcast(self.dt_bias), delta_softplus=True,
        )  # (B, E)  # fmt: skip
        return self.out_proj(y)

    def allocate_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> MambaState:
        """State before the first token, zeros.

        Args:
            batch_size: B.
            device: None means that of the parameters.
            dtype: of the scan's state, float32 or a half precision, whose steps move fewer bytes and compute in float32
                all the same; the convolution's has at least float32.

        Raises:
            ValueError: the mixer is bidirectional.
        """
        self.check_state()
        inner, width = self.conv1d.weight.shape[0], self.conv1d.weight.shape[-1]
        device, conv_dtype = device or self.out_proj.weight.device, torch.promote_types(dtype, torch.float32)
        conv = torch.zeros(batch_size, 1, inner, width - 1, device=device, dtype=conv_dtype)
        return MambaState(conv, torch.zeros(batch_size, 1, inner, self.d_state, device=device, dtype=dtype))

    def _project_steps(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x, delta before bias and softplus (..., E), B and C (..., N), with each direction's own projections."""
        x_projs = [getattr(self, "x_proj" + suffix) for suffix in self.suffixes]
        dt_projs = [getattr(self, "dt_proj" + suffix) for suffix in self.suffixes]
        return steps_and_maps(x, x_projs, dt_projs, (self.dt_rank, self.d_state, self.d_state))
