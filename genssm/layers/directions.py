"""What the Mamba mixers share: depthwise taps, parameters of one or two directions, initial step sizes."""

import math

import torch
from torch import nn


class DepthwiseTaps(nn.Module):
    """Weights of a depthwise causal convolution: ``weight`` (E, 1, W), last tap for the token itself, ``bias`` (E).

    The convolution itself runs for all directions in one call, so this module only hands its weights out. They are
    handed out by a call, not read as attributes, so that offloading hooks notice.

    Args:
        channels: E.
        width: W.
        bias: have a bias.
    """

    def __init__(self, channels: int, width: int, bias: bool = True) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight, (E, W), and the bias, (E) or None."""
        return self.weight.squeeze(1), self.bias


def initial_dt_bias(size: int, dt_min: float, dt_max: float, dt_floor: float) -> torch.Tensor:
    """Step biases (size,) whose softplus is log-uniform in [dt_min, dt_max], at least dt_floor (Mamba, section 3.6)."""
    step = torch.empty(size).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=dt_floor)
    return step + torch.log(-torch.expm1(-step))  # inverse of softplus


class DirectedMixer(nn.Module):
    """Base of the mixers: parameters named with the suffix of their direction, "" and, for a second one, "_b".

    Args:
        bidirectional: two directions with their own parameters.
    """

    def __init__(self, bidirectional: bool) -> None:
        super().__init__()
        self.suffixes = ("", "_b") if bidirectional else ("",)

    def direction_orders(self, orders: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Complete ``orders`` with the second direction of a bidirectional mixer.

        Raises:
            ValueError: ``orders`` has the wrong number of directions.
        """
        if len(self.suffixes) == 1:
            return orders
        if orders is None:
            orders = torch.arange(hidden_states.shape[1], dtype=torch.int32, device=hidden_states.device)
        if orders.dim() == 1:
            orders = torch.stack([orders, orders.flip(0)])
        if orders.shape[0] != 2:
            raise ValueError(f"orders has shape {tuple(orders.shape)}; a bidirectional mixer takes (2, L) or (L,)")
        return orders

    def check_state(
        self,
        orders: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> None:
        """Refuse a state where none can be kept.

        Raises:
            ValueError: two directions, or sequences of different lengths.
        """
        if len(self.suffixes) > 1 or (orders is not None and orders.dim() == 2 and orders.shape[0] > 1):
            raise ValueError("a state is kept along one direction; this mixer or its orders have two or more")
        if lengths is not None or cu_seqlens is not None:
            raise ValueError("state and lengths or cu_seqlens are both given; a state follows whole, equal sequences")

    def taps(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights and biases of the convolution, (E, W) and (E), or (K, E, W) and (K, E) for K directions."""
        taps = [getattr(self, "conv1d" + suffix)() for suffix in self.suffixes]
        if len(taps) == 1:
            return taps[0]
        weights, biases = zip(*taps)
        return torch.stack(weights), None if biases[0] is None else torch.stack(biases)

    def stacked(self, name: str) -> torch.Tensor:
        """A parameter of one direction, or of all of them along a new first dimension."""
        if len(self.suffixes) == 1:
            return getattr(self, name)
        return torch.stack([getattr(self, name + suffix) for suffix in self.suffixes])
