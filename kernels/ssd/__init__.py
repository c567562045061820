"""The Mamba-2 scan (scalar decay per head) along K orders in one call. See README.md for derivation and figures."""

from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.ssd import op as _op
from genssm.kernels.ssd.reference import ssd_reference
from genssm.kernels.ssd.step import ssd_step

__all__ = ["ssd", "ssd_step"]

_NAME = "ssd"


def ssd(
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
    orders: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduce: str = "sum",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan with one decay per head along K orders of the tokens (Mamba-2, arXiv 2405.21060, section 6).

        dt_t = softplus(dt_t + dt_bias)                            where asked for
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t'                  (P, N) for every head
        y_t = (h_t C_t + D x_t) silu(z_t)

    for t = order[0], order[1], ... in every direction; each y_t stands in its own row t. Letters: Bt batch, K
    directions, L >= 1 tokens, H heads, 1 <= P <= 256 channels of a head, G groups of heads, 1 <= N <= 256 state, S
    sequences (Bt, or the packed ones). An argument without its K dimension is shared by all directions. Any strides are
    taken without a copy.

    Args:
        x: inputs, (Bt, L, H, P) or (Bt, K, L, H, P), float32/bfloat16/float16, or float64 for tests.
        dt: step sizes, (Bt, L, H) or (Bt, K, L, H), any float type.
        A: decay rates, negative reals, (H,) or (K, H), float32.
        B: input map, (Bt, L, G, N) or (Bt, K, L, G, N); head h belongs to group h // (H / G).
        C: output map, shape as ``B``.
        D: skip, (H,) or (K, H), float32.
        z: gate, (Bt, L, H, P) or (Bt, K, L, H, P).
        dt_bias: added to ``dt``, (H,) or (K, H), float32.
        dt_softplus: apply softplus(x) = log(1 + e^x) to ``dt + dt_bias``; x itself above 20.
        orders: permutations of 0..L-1, (K, L) or (L,), integers; order[t] is the row visited at step t. None means
            first to last in every direction. Keep them as int32 on the device of ``x``: nothing is copied then.
            Their values are checked on the CPU only.
        initial_state: state before the first visited token, (S, K, H, P, N), float32 (float64 for float64 ``x``).
        return_last_state: also return the state after the last visited token.
        lengths: valid rows of each batch row, (Bt,), integers. The rows from there on are visited in no direction:
            the state passes over them, their outputs and gradients are zero.
        cu_seqlens: borders 0, ..., L of sequences packed into a batch of 1, (S + 1,), integers. Every order must visit
            each sequence in one go; the state starts anew at its first token. Not together with ``lengths``.
        reduce: "sum" adds the directions in float32, "none" returns each.
        backend: "auto", "reference", "chunked" or "triton"; see `genssm.kernels.dispatch`. Only "reference" can be
            differentiated twice; forward-mode derivatives are not supported by the others.
    Returns:
        y, dtype of ``x``, (Bt, L, H, P), or (Bt, K, L, H, P) with ``reduce="none"``; with ``return_last_state`` also
        the last state, (S, K, H, P, N), float32 (float64 for float64 ``x``). Both are differentiable.
    Raises:
        ValueError: shapes, devices or values disagree, or the backend cannot run here; the message names both sides.

    Example:
        >>> x, dt, A = torch.randn(2, 16, 3, 8), torch.rand(2, 16, 3), -torch.rand(3)
        >>> B, C = torch.randn(2, 16, 1, 4), torch.randn(2, 16, 1, 4)
        >>> both_ways = torch.stack([torch.arange(16), torch.arange(15, -1, -1)]).int()
        >>> ssd(x, dt, A, B, C, orders=both_ways).shape
        torch.Size([2, 16, 3, 8])
    """
    if reduce not in ("sum", "none"):
        raise ValueError(f"{_NAME}: reduce is {reduce!r}, expected 'sum' or 'none'")
    args = _canonical(x, dt, A, B, C, D, z, dt_bias, orders, initial_state, lengths, cu_seqlens)
    *tensors, bias, orders, initial_state, lengths, cu_seqlens = args
    args = (*tensors, bias, dt_softplus, orders, initial_state, lengths, cu_seqlens, reduce == "sum")
    chosen = dispatch.resolve(_NAME, backend, x)
    out, last_state = ssd_reference(*args) if chosen == "reference" else _op.scan(*args, chosen)
    return (out, last_state) if return_last_state else out


def _canonical(x, dt, A, B, C, D, z, dt_bias, orders, initial_state, lengths, cu_seqlens) -> tuple:
    """Check everything and give every tensor its direction dimension, by views only."""
    if x.ndim not in (4, 5) or not x.dtype.is_floating_point or 0 in x.shape[1:] or x.shape[-1] > 256:
        raise ValueError(
            f"{_NAME}: x is {arguments.shape(x)} {x.dtype}, expected floats (Bt, L, H, P) or (Bt, K, L, H, P), "
            "L and H from 1, P from 1 to 256"
        )
    batch, (length, heads, width) = x.shape[0], x.shape[-3:]
    named = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "initial_state": initial_state}
    arguments.check_devices(_NAME, x.device, named)
    dtype = arguments.compute_dtype(x)
    tokens, per_head = (batch, length, heads, width), (heads,)
    x = arguments.with_directions(_NAME, "x", x, 1, tokens)
    dt = arguments.with_directions(_NAME, "dt", dt, 1, (batch, length, heads))
    A = arguments.with_directions(_NAME, "A", A, 0, per_head).to(dtype)
    B, C = _grouped(B, C, batch, length, heads)
    if D is not None:
        D = arguments.with_directions(_NAME, "D", D, 0, per_head).to(dtype)
    if z is not None:
        z = arguments.with_directions(_NAME, "z", z, 1, tokens)
    if dt_bias is not None:
        dt_bias = arguments.with_directions(_NAME, "dt_bias", dt_bias, 0, per_head).to(dtype)
    orders = arguments.canonical_orders(_NAME, orders, length, x.device)
    lengths, cu_seqlens, sequences = arguments.canonical_lengths(_NAME, lengths, cu_seqlens, batch, x.device)

    sizes = {"x": x.shape[1], "dt": dt.shape[1], "A": A.shape[0], "B": B.shape[1], "C": C.shape[1]}
    optional = {"D": (D, 0), "z": (z, 1), "dt_bias": (dt_bias, 0), "orders": (orders, 0)}
    sizes.update({name: y.shape[dim] for name, (y, dim) in optional.items() if y is not None})
    directions = arguments.common_directions(_NAME, sizes)
    if orders is not None and orders.shape[0] != directions:
        orders = orders.expand(directions, length).contiguous()
    if initial_state is not None:
        expected = (sequences, directions, heads, width, B.shape[-1])
        if initial_state.shape != expected:
            raise ValueError(f"{_NAME}: initial_state is {arguments.shape(initial_state)}, expected {expected}")
        initial_state = initial_state.to(dtype)
    return x, dt, A, B, C, D, z, dt_bias, orders, initial_state, lengths, cu_seqlens


def _grouped(B: Tensor, C: Tensor, batch: int, length: int, heads: int) -> tuple[Tensor, Tensor]:
    """B and C as (Bt, 1 or K, L, G, N) with the same G and N."""
    views = []
    for name, x in (("B", B), ("C", C)):
        view = x.unsqueeze(1) if x.ndim == 4 else x
        states = x.shape[-1] if x.ndim else 0
        if view.ndim != 5 or (view.shape[0], view.shape[2]) != (batch, length) or not 1 <= states <= 256:
            raise ValueError(
                f"{_NAME}: {name} is {arguments.shape(x)}, expected ({batch}, {length}, G, N) or "
                f"({batch}, K, {length}, G, N) with N from 1 to 256"
            )
        if view.shape[3] < 1 or heads % view.shape[3]:
            raise ValueError(f"{_NAME}: {name} has {view.shape[3]} groups, which do not divide {heads} heads")
        views.append(view)
    if views[0].shape[3:] != views[1].shape[3:]:
        sizes = " and ".join(f"{tuple(view.shape[3:])}" for view in views)
        raise ValueError(f"{_NAME}: B and C have groups and states {sizes}; give both the same (G, N)")
    return views[0], views[1]
