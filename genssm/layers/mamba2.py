"""The Mamba-2 mixer: one projection, causal convolution, scan with one decay per head along any order, gated norm."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from genssm.kernels.add_norm import add_norm
from genssm.kernels.arguments import keep_state
from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.mamba2_step import fill_windows, mamba2_step, read_windows
from genssm.kernels.ssd import ssd
from genssm.layers.directions import DepthwiseTaps, DirectedMixer, initial_dt_bias
from genssm.layers.modulation import product_dtype, upcast

# B batch, L tokens, K directions, D hidden_size, E = expand * D, P headdim, H = E / P heads, G ngroups, N d_state,
# W d_conv, M = E + 2 G N channels of the convolution


class GroupRMSNorm(nn.Module):
    """Root-mean-square norm over each of G groups of channels; float32 inside, the result has the weight's dtype.

    One group, the usual case, is one operator, whose result is for a matrix product, as :class:`Norm` says.

    Args:
        dim: channels E.
        groups: G; every group has statistics of its own.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` (..., E); returns (..., E)."""
        if self.groups == 1:
            return add_norm(x, weight=self.weight, eps=self.eps, dtype=product_dtype(x))[1]
        x = upcast(x).unflatten(-1, (self.groups, -1))
        x = F.rms_norm(x, x.shape[-1:], eps=self.eps).flatten(-2)
        return (x * upcast(self.weight)).to(self.weight.dtype)


@dataclasses.dataclass
class Mamba2State:
    """What a mixer keeps between tokens; updated in place.

    Args:
        conv: two windows of the convolution's inputs, (B, 2, M, W), read and written in turns.
        turns: which one is to be read, (B, E), uint8; see :func:`genssm.kernels.mamba2_step.mamba2_step`.
        ssm: state of the scan, (B, 1, H, P, N).
    """

    conv: torch.Tensor
    turns: torch.Tensor
    ssm: torch.Tensor

    @property
    def window(self) -> torch.Tensor:
        """The W - 1 latest inputs of the convolution, oldest first, (B, 1, M, W - 1), a copy."""
        return read_windows(self.conv, self.turns)


class Mamba2(DirectedMixer):
    """Mamba-2 mixer (Dao and Gu 2024, arXiv:2405.21060) that visits tokens along given orders.

        z, x, B, C, dt = W_in h;   [x, B, C] = silu(conv([x, B, C]));   dt = softplus(dt + dt_bias)
        y = scan(x, dt, -exp(A_log), B, C, D);   out = W_out RMSNorm(y * silu(z))

    Decay, step and skip are one number per head. Convolution and scan follow the orders; tokens stay in their own rows
    throughout. Several orders run in one call and their results are summed before gate and norm. With
    ``bidirectional`` there are two directions with their own convolution, ``dt_bias``, ``A_log`` and ``D`` (suffix
    ``_b``), sharing ``in_proj``, ``norm`` and ``out_proj``.

    Args:
        hidden_size: width D of the tokens.
        d_state: state size N, 1..256.
        d_conv: width W of the causal convolution, 1..8.
        expand: inner width E = expand * D.
        headdim: channels P of a head, 1..256, a divisor of E.
        ngroups: groups G of heads, each with its own B, C and norm statistics; a divisor of E / P.
        bidirectional: own parameters for a second direction.
        bias: biases in ``in_proj`` and ``out_proj``, starting at zero.
        conv_bias: bias in the convolution.
        A_min, A_max: exp(A_log) starts uniform in this range.
        dt_min, dt_max: softplus(dt_bias) starts log-uniform in this range, for every direction.
        dt_floor: least initial step.
        norm_eps: of the gated norm.
        out_scale: factor on the initial ``out_proj.weight``; deep models pass num_layers ** -0.5.

    Raises:
        ValueError: a size is out of range or does not divide another.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        bidirectional: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
        A_min: float = 1.0,
        A_max: float = 16.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        norm_eps: float = 1e-5,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__(bidirectional)
        inner = expand * hidden_size
        if not 1 <= d_state <= 256 or not 1 <= d_conv <= 8:
            raise ValueError(f"d_state is {d_state} and d_conv is {d_conv}; expected 1..256 and 1..8")
        if not 1 <= headdim <= 256 or inner % headdim:
            raise ValueError(f"headdim is {headdim}; expected 1..256 and a divisor of expand * hidden_size = {inner}")
        heads = inner // headdim
        if ngroups < 1 or heads % ngroups:
            raise ValueError(f"ngroups is {ngroups}; expected a divisor of the {heads} heads")
        self.d_conv = d_conv
        self.state_shape = (heads, headdim, d_state)
        self.map_shape = (ngroups, d_state)
        self.sizes = (inner, inner + 2 * ngroups * d_state, heads)  # z; x, B and C; dt
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=bias)
        for suffix in self.suffixes:
            self.add_module("conv1d" + suffix, DepthwiseTaps(self.sizes[1], d_conv, conv_bias))
            dt_bias = initial_dt_bias(heads, dt_min, dt_max, dt_floor)
            self.register_parameter("dt_bias" + suffix, nn.Parameter(dt_bias))
            A_log = torch.empty(heads).uniform_(A_min, A_max).log()
            self.register_parameter("A_log" + suffix, nn.Parameter(A_log))
            self.register_parameter("D" + suffix, nn.Parameter(torch.ones(heads)))
        self.norm = GroupRMSNorm(inner, ngroups, norm_eps)
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)
        with torch.no_grad():
            self.out_proj.weight.mul_(out_scale)
            if bias:
                self.in_proj.bias.zero_()
                self.out_proj.bias.zero_()

    def forward(
        self,
        hidden_states: torch.Tensor,
        orders: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        state: Mamba2State | None = None,
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
            return self._continue(hidden_states, orders, state)
        orders = self.direction_orders(orders, hidden_states)
        scan_over = {"orders": orders, "lengths": lengths, "cu_seqlens": cu_seqlens}
        z, mapped, dt = self.in_proj(hidden_states).split(self.sizes, dim=-1)  # (B, L, E), (B, L, M), (B, L, H)
        mapped = causal_conv1d(mapped, *self.taps(), activation="silu", **scan_over)  # (B, L, M) or (B, K, L, M)
        y = ssd(*self._scan_inputs(mapped, dt, z), **self._scan_options(), **scan_over)  # (B, L, H, P)
        return self.out_proj(self.norm(y.flatten(-2)))

    @torch.no_grad()
    def _continue(self, hidden_states: torch.Tensor, orders: torch.Tensor | None, state: Mamba2State) -> torch.Tensor:
        """Mix the tokens (B, L, D) that follow ``state``, and advance it."""
        z, mapped, dt = self.in_proj(hidden_states).split(self.sizes, dim=-1)
        keep = {"orders": orders, "return_last_state": True}
        mapped, conv = causal_conv1d(mapped, *self.taps(), activation="silu", initial_state=state.window, **keep)
        inputs = self._scan_inputs(mapped, dt, z)
        y, ssm = ssd(*inputs, **self._scan_options(), initial_state=state.ssm, **keep)
        fill_windows(state.conv, state.turns, conv)
        keep_state(state.ssm, ssm)
        return self.out_proj(self.norm(y.flatten(-2)))

    @torch.no_grad()
    def step(self, hidden_states: torch.Tensor, state: Mamba2State) -> torch.Tensor:
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
        y = mamba2_step(
            self.in_proj(hidden_states), state.conv, state.turns, state.ssm, *self.taps(),
            self.A_log, self.D, self.dt_bias, ngroups=self.map_shape[0],
        )  # (B, E)  # fmt: skip
        return self.out_proj(self.norm(y))

    def allocate_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Mamba2State:
        """State before the first token, zeros.

        Args:
            batch_size: B.
            device: None means that of the parameters.
            dtype: of the scan's state, float32 or a half precision, whose steps move fewer bytes and compute in float32
                all the same. Windows of the convolution have the type of its taps, which is that of its inputs.

        Raises:
            ValueError: the mixer is bidirectional.
        """
        self.check_state()
        device, taps = device or self.out_proj.weight.device, self.conv1d.weight
        return Mamba2State(
            torch.zeros(batch_size, 2, self.sizes[1], self.d_conv, device=device, dtype=taps.dtype),
            torch.zeros(batch_size, self.sizes[0], device=device, dtype=torch.uint8),
            torch.zeros(batch_size, 1, *self.state_shape, device=device, dtype=dtype),
        )

    def _scan_inputs(self, mapped: torch.Tensor, dt: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x, dt, A, B, C, D and z of the scan, for all tokens or one."""
        inner, maps = self.sizes[0], self.map_shape[0] * self.map_shape[1]
        x, B, C = mapped.split([inner, maps, maps], dim=-1)
        per_head = self.state_shape[:2]
        A, D = -upcast(self.stacked("A_log")).exp(), upcast(self.stacked("D"))
        B, C = (m.unflatten(-1, self.map_shape) for m in (B, C))
        return x.unflatten(-1, per_head), dt, A, B, C, D, z.unflatten(-1, per_head)

    def _scan_options(self) -> dict[str, torch.Tensor | bool]:
        return {"dt_bias": upcast(self.stacked("dt_bias")), "dt_softplus": True}
