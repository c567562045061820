"""Norms with fp32 statistics, adaptive-norm modulation and stochastic depth."""

import torch
import torch.nn.functional as F
from torch import nn

from genssm.kernels.add_norm import add_norm
from genssm.layers.buffers import table_device
from genssm.layers.packing import Packing

# Asking any other kind of device, such as "meta", is an error; and torch 2.11 cannot ask in a compiled graph.
_AUTOCASTING = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind))


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32, or unchanged when it is float64 (so that gradient checks in double precision work)."""
    return x if x.dtype == torch.float64 else x.float()


def product_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Type that autocast gives to what a matrix product reads beside ``x``; None where it changes nothing."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in _AUTOCASTING or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class Norm(nn.Module):
    """Base of the norms: alone they are one function of PyTorch, with what stands around them in a block one operator.

    A derived class has ``kind`` ("rms" or "layer"), ``eps``, ``weight`` and ``bias``.
    """

    kind: str

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` (..., D) over its last dimension; returns (..., D)."""
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        shift: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        *,
        add: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        add_normed: bool = False,
        factor: torch.Tensor | None = None,
        return_normed: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Normalise over the last dimension; first update the stream and then modulate, where that is asked for.

            x <- x + gate add;   n = norm(x);   y = n (1 + scale) + shift;   x <- x + factor n

        Types are those of the steps one by one (:func:`genssm.kernels.add_norm.add_norm`). A modulated y is for a
        matrix product: under autocast it comes in the type that the product would cast it to.

        Args:
            x: (..., D); (B, L, D) where it meets gates or modulations.
            shift, scale: both or neither, (B, 1, D).
            add: what is added first, shape of ``x``.
            gate: factor of ``add``, (B, 1, D); None adds it as it is.
            add_normed: add n to the stream in the end, for a block whose inner skip starts from n; not with ``add``.
            factor: of n there, (B, 1, 1) or (1, L, 1); None means 1.
            return_normed: return n too.

        Returns:
            y, which is n where nothing modulates it, (..., D). With ``add`` or ``add_normed`` the new x comes before
            it, with ``return_normed`` n behind it.
        """
        if add is None and shift is None and not (add_normed or return_normed):
            return self.alone(x)
        new, *found = add_norm(
            x, add, gate, weight=self.weight, bias=self.bias, shift=shift, scale=scale, add_normed=add_normed,
            factor=factor, norm=self.kind, eps=self.eps, dtype=None if shift is None else product_dtype(x),
            return_normed=return_normed,
        )  # fmt: skip
        if add is not None or add_normed:
            return new, *found
        return tuple(found) if return_normed else found[0]


class RMSNorm(Norm):
    """Root-mean-square norm (Zhang and Sennrich 2019), y = x / sqrt(mean(x^2) + eps) * weight.

    Statistics and product are computed in float32 whatever the input; the result has the dtype of the weight.

    Args:
        dim: size D of the last dimension.
        eps: added to the mean square.
    """

    kind = "rms"
    bias = None

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(upcast(x), self.weight.shape, upcast(self.weight), self.eps).to(self.weight.dtype)


class LayerNorm(Norm):
    """Layer norm with float32 statistics; the result has the dtype of the weight, or of the input without one.

    Args:
        dim: size D of the last dimension.
        eps: added to the variance.
        affine: learn a weight and a bias.
    """

    kind = "layer"

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            return F.layer_norm(upcast(x), (self.dim,), eps=self.eps).to(x.dtype)
        weight, bias = self.weight, self.bias
        if x.dtype != weight.dtype:  # of one type, PyTorch's kernels keep the statistics in float32 by themselves
            x, weight, bias = upcast(x), upcast(weight), upcast(bias)
        return F.layer_norm(x, (self.dim,), weight, bias, self.eps).to(self.weight.dtype)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x (1 + scale) + shift, for ``x`` (B, L, D) and ``shift``, ``scale`` (B, 1, D) or (B, L, D)."""
    return x * (1 + scale) + shift


class Modulation(nn.Module):
    """Shifts, scales and gates of a block from the conditioning vector: chunks of Linear(SiLU(c)) (adaLN-zero, DiT).

    Weight and bias start at zero, so shifts and scales do nothing and gates are closed.

    Args:
        hidden_size: width D of the conditioning vector.
        num_chunks: how many vectors to return.
        chunk_size: width of each; None means ``hidden_size``.
        zero: start with the weight at zero; False keeps torch's default, for gates that start open.
    """

    def __init__(self, hidden_size: int, num_chunks: int, chunk_size: int | None = None, zero: bool = True) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(hidden_size, num_chunks * (chunk_size or hidden_size))
        if zero:
            nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, conditioning: torch.Tensor, packing: Packing | None = None, *, activated: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Map ``conditioning`` (B, D) to ``num_chunks`` tensors (B, 1, chunk_size) that broadcast over tokens.

        With ``packing``, where B samples share one row: to tensors (1, L, chunk_size), each token that of its sample.
        ``activated`` says that SiLU(c) is given, which a model with many blocks computes once for all of them.
        """
        chunks = self.linear(conditioning if activated else F.silu(conditioning))[:, None]
        return (chunks if packing is None else packing.per_token(chunks)).chunk(self.num_chunks, dim=-1)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training each sample's branch is dropped with probability ``rate``.

    Kept branches are divided by 1 - rate, so the expectation is unchanged. Uses torch's global generator.

    Args:
        rate: probability of dropping, 0 <= rate < 1.

    Raises:
        ValueError: ``rate`` is outside [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate is {rate}; expected 0 <= rate < 1")
        self.rate = rate
        # A tensor, so that one compiled graph serves blocks of different rates.
        keep = torch.tensor(1.0 - rate, device=table_device()) if rate else None
        self.keep = None if keep is None else nn.Buffer(keep, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop samples of ``x`` (B, ...); the identity in evaluation mode."""
        factor = self.factor(x)
        return x if factor is None else x * factor

    def factor(self, x: torch.Tensor, packing: Packing | None = None) -> torch.Tensor | None:
        """What to multiply the branch by, in the type of ``x`` (B, ...): (B, 1, ...), or None in evaluation mode.

        With ``packing``, of the samples in the row ``x`` (1, L, D): (1, L, 1), each token that of its sample.
        """
        if not self.training or self.keep is None:
            return None
        samples = x.shape[0] if packing is None else packing.cu_seqlens.shape[0] - 1
        draws = torch.rand((samples,) + (1,) * (x.dim() - 1), device=x.device)
        draws = draws if packing is None else packing.per_token(draws)
        return ((draws < self.keep) / self.keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"
