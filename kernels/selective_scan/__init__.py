"""Selective scan (Mamba-1) along K orders in one call. See README.md here for the derivation and the measurements."""

from torch import Tensor

from genssm.kernels import arguments, dispatch
from genssm.kernels.selective_scan import op as _op
from genssm.kernels.selective_scan.reference import scan_reference
from genssm.kernels.selective_scan.step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]

_NAME = "selective_scan"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    orders: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduce: str = "sum",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan along K orders of the tokens (Mamba, arXiv 2312.00752, section 3).

        delta_t = softplus(delta_t + delta_bias)                            where asked for
        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t
        y_t = (C_t h_t + D u_t) silu(z_t)

    for t = order[0], order[1], ... in every direction; each y_t stands in its own row t. Letters: Bt batch, K
    directions, L >= 1 tokens, E channels, 1 <= N <= 256 state, G channel groups, S sequences (Bt, or the packed ones).
    An argument without its K dimension is shared by all directions. Any strides are taken without a copy.

    Args:
        u: inputs, (Bt, L, E) or (Bt, K, L, E), float32/bfloat16/float16, or float64 for tests.
        delta: step sizes, shape as ``u``, any float type.
        A: state matrix, negative reals, (E, N) or (K, E, N), float32.
        B: input map, (Bt, L, N), (Bt, K, L, N) or, with groups, (Bt, 1 or K, L, G, N); channel e belongs to group
            e // (E / G).
        C: output map, shape as ``B``.
        D: skip, (E,) or (K, E), float32.
        z: gate, (Bt, L, E) or (Bt, K, L, E).
        delta_bias: added to ``delta``, (E,) or (K, E), float32.
        delta_softplus: apply softplus(x) = log(1 + e^x) to ``delta + delta_bias``; x itself above 20.
        orders: permutations of 0..L-1, (K, L) or (L,), integers; order[t] is the row visited at step t. None means
            first to last in every direction. Keep them as int32 on the device of ``u``: nothing is copied then.
            Their values are checked on the CPU only.
        initial_state: state before the first visited token, (S, K, E, N), float32 (float64 for float64 ``u``).
        return_last_state: also return the state after the last visited token.
        lengths: valid rows of each batch row, (Bt,), integers. The rows from there on are visited in no direction:
            the state passes over them, their outputs and gradients are zero.
        cu_seqlens: borders 0, ..., L of sequences packed into a batch of 1, (S + 1,), integers. Every order must visit
            each sequence in one go; the state starts anew at its first token. Not together with ``lengths``.
        reduce: "sum" adds the directions, "none" returns each. On a GPU half types are rounded after each direction, in
            the result and in gradients of arguments that directions share.
        backend: "auto", "reference", "chunked", "compiled" or "triton"; see `genssm.kernels.dispatch`. Only
            "reference" can be differentiated twice; forward-mode derivatives are not supported by the others.
    Returns:
        y, dtype of ``u``, (Bt, L, E), or (Bt, K, L, E) with ``reduce="none"``; with ``return_last_state`` also the last
        state, (S, K, E, N), float32 (float64 for float64 ``u``). Both are differentiable.
    Raises:
        ValueError: shapes, devices or values disagree, or the backend cannot run here; the message names both sides.

    Example:
        >>> u, delta = torch.randn(2, 16, 8), torch.rand(2, 16, 8)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 16, 4), torch.randn(2, 16, 4)
        >>> both_ways = torch.stack([torch.arange(16), torch.arange(15, -1, -1)]).int()
        >>> selective_scan(u, delta, A, B, C, orders=both_ways).shape
        torch.Size([2, 16, 8])
    """
    if reduce not in ("sum", "none"):
        raise ValueError(f"{_NAME}: reduce is {reduce!r}, expected 'sum' or 'none'")
    args = _canonical(u, delta, A, B, C, D, z, delta_bias, orders, initial_state, lengths, cu_seqlens)
    *tensors, bias, orders, initial_state, lengths, cu_seqlens = args
    args = (*tensors, bias, delta_softplus, orders, initial_state, lengths, cu_seqlens, reduce == "sum")
    chosen = dispatch.resolve(_NAME, backend, u)
    if chosen == "reference":
        out, last_state = scan_reference(*args)
    else:
        out, last_state = _op.scan(*args, return_last_state, chosen)
    return (out, last_state) if return_last_state else out


def _canonical(u, delta, A, B, C, D, z, delta_bias, orders, initial_state, lengths, cu_seqlens) -> tuple:
    """Check everything and give every tensor its direction (and group) dimension, by views only."""
    if u.ndim not in (3, 4) or not u.dtype.is_floating_point or 0 in u.shape[1:]:
        raise ValueError(
            f"{_NAME}: u is {arguments.shape(u)} {u.dtype}, expected floats (Bt, L, E) or (Bt, K, L, E), L >= 1"
        )
    if A.ndim not in (2, 3) or not 1 <= A.shape[-1] <= 256:
        raise ValueError(f"{_NAME}: A is {arguments.shape(A)}, expected (E, N) or (K, E, N) with N from 1 to 256")
    batch, length, channels, states = u.shape[0], u.shape[-2], u.shape[-1], A.shape[-1]
    named = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    arguments.check_devices(_NAME, u.device, {**named, "initial_state": initial_state})
    dtype = arguments.compute_dtype(u)
    tokens, per_channel = (batch, length, channels), (channels,)
    u = arguments.with_directions(_NAME, "u", u, 1, tokens)
    delta = arguments.with_directions(_NAME, "delta", delta, 1, tokens)
    A = arguments.with_directions(_NAME, "A", A, 0, (channels, states)).to(dtype)
    B, C = _grouped(B, C, batch, length, channels, states)
    if D is not None:
        D = arguments.with_directions(_NAME, "D", D, 0, per_channel).to(dtype)
    if z is not None:
        z = arguments.with_directions(_NAME, "z", z, 1, tokens)
    if delta_bias is not None:
        delta_bias = arguments.with_directions(_NAME, "delta_bias", delta_bias, 0, per_channel).to(dtype)
    orders = arguments.canonical_orders(_NAME, orders, length, u.device)
    lengths, cu_seqlens, sequences = arguments.canonical_lengths(_NAME, lengths, cu_seqlens, batch, u.device)

    sizes = {"u": u.shape[1], "delta": delta.shape[1], "A": A.shape[0], "B": B.shape[1], "C": C.shape[1]}
    optional = {"D": (D, 0), "z": (z, 1), "delta_bias": (delta_bias, 0), "orders": (orders, 0)}
    sizes.update({name: x.shape[dim] for name, (x, dim) in optional.items() if x is not None})
    directions = arguments.common_directions(_NAME, sizes)
    if orders is not None and orders.shape[0] != directions:
        orders = orders.expand(directions, length).contiguous()
    if initial_state is not None:
        expected = (sequences, directions, channels, states)
        if initial_state.shape != expected:
            raise ValueError(f"{_NAME}: initial_state is {arguments.shape(initial_state)}, expected {expected}")
        initial_state = initial_state.to(dtype)
    return u, delta, A, B, C, D, z, delta_bias, orders, initial_state, lengths, cu_seqlens


def _grouped(B: Tensor, C: Tensor, batch: int, length: int, channels: int, states: int) -> tuple[Tensor, Tensor]:
    """B and C as (Bt, 1 or K, L, G, N) with the same G."""
    views = []
    for name, x in (("B", B), ("C", C)):
        view = x.unsqueeze(1) if x.ndim == 3 else x
        view = view.unsqueeze(3) if view.ndim == 4 else view
        if view.ndim != 5 or (view.shape[0], view.shape[2], view.shape[4]) != (batch, length, states):
            raise ValueError(
                f"{_NAME}: {name} is {arguments.shape(x)}, expected ({batch}, {length}, {states}), "
                f"({batch}, K, {length}, {states}) or ({batch}, K or 1, {length}, G, {states})"
            )
        if channels % view.shape[3]:
            raise ValueError(f"{_NAME}: {name} has {view.shape[3]} groups, which do not divide {channels} channels")
        views.append(view)
    groups = max(view.shape[3] for view in views)
    for name, view in zip("BC", views):
        if view.shape[3] not in (1, groups):
            raise ValueError(
                f"{_NAME}: {name} has {view.shape[3]} groups and the other map {groups}; give 1 or {groups}"
            )
    return tuple(v if v.shape[3] == groups else v.expand(-1, -1, -1, groups, -1) for v in views)
