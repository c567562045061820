"""Argument checks that the ops share. Messages name the op, what was given and what was expected."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type of the arithmetic and of the states: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def keep_state(state: Tensor, new: Tensor) -> None:
    """Write a new state over the kept one, in its type; float16 keeps its largest number where its range ends."""
    if state.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        new = new.clamp(-limit, limit)
    state.copy_(new)


def outer_directions(x: Tensor) -> bool:
    """Whether the directions of ``x``, (Bt, K, L, ...), lie one after the other in memory, the batch within each.

    Results and gradients lie so where they can: what is computed for each direction with weights of its own then reads
    and writes whole matrices. Vectors of channels and matrices of states, which have fewer dimensions, do not.
    """
    return x.ndim >= 4 and x.shape[1] > 1 and x.stride(1) > x.stride(0)


def empty_directions(x: Tensor, directions: int, dtype: torch.dtype | None = None) -> Tensor:
    """A new (Bt, K, L, ...) for results of K directions that read ``x``, (Bt, 1 or K, L, ...); directions outermost."""
    batch, _, *rest = x.shape
    return x.new_empty((directions, batch, *rest), dtype=dtype).transpose(0, 1)


def empty_gradient(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor for the gradient of ``x``: dense, with the directions outermost where they are in ``x``."""
    if not outer_directions(x):
        return x.new_empty(x.shape, dtype=dtype)
    batch, directions, *rest = x.shape
    return x.new_empty((directions, batch, *rest), dtype=dtype).transpose(0, 1)


def as_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient`` as it would lie in `empty_gradient`, itself where it does."""
    if outer_directions(x):
        return gradient.transpose(0, 1).contiguous().transpose(0, 1)
    return gradient.contiguous()


def shape(x: Tensor) -> tuple[int, ...]:
    """Shape as a plain tuple, for messages."""
    return tuple(x.shape)


def with_directions(op: str, name: str, x: Tensor, dim: int, plain: tuple[int, ...]) -> Tensor:
    """Insert the direction dimension at ``dim`` where ``x`` has the shape ``plain``; check the shape otherwise."""
    if x.shape == plain:
        return x.unsqueeze(dim)
    if x.ndim != len(plain) + 1 or x.shape != (*plain[:dim], x.shape[dim], *plain[dim:]):
        given = x.squeeze(dim) if x.ndim == len(plain) + 1 and x.shape[dim] == 1 else x
        full = (*plain[:dim], "K", *plain[dim:])
        raise ValueError(f"{op}: {name} is {shape(given)}, expected {plain} or {_text(full)}")
    return x


def common_directions(op: str, sizes: dict[str, int]) -> int:
    """The number of directions, from the size that each argument has there (1 where it is shared)."""
    directions = max(sizes.values())
    for name, size in sizes.items():
        if size not in (1, directions):
            largest = next(other for other, value in sizes.items() if value == directions)
            raise ValueError(
                f"{op}: {name} has {size} directions but {largest} has {directions}; give 1 or {directions}"
            )
    return directions


def state_directions(op: str, sizes: dict[str, int], directions: int) -> None:
    """Every argument of a step has the directions of the state, or shares one value."""
    for name, size in sizes.items():
        if size not in (1, directions):
            raise ValueError(f"{op}: {name} has {size} directions but the state has {directions}")


def canonical_orders(op: str, orders: Tensor | None, length: int, device: torch.device) -> Tensor | None:
    """Orders as (K or 1, L) dense int32 on the device of the inputs."""
    if orders is None:
        return None
    if orders.dtype.is_floating_point or orders.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ValueError(f"{op}: orders are {orders.dtype}, expected integers")
    if orders.ndim == 1:
        orders = orders.unsqueeze(0)
    if orders.ndim != 2 or orders.shape[1] != length:
        raise ValueError(
            f"{op}: orders are {shape(orders)}, expected (K, {length}): one permutation of the tokens each"
        )
    return orders.to(device=device, dtype=torch.int32).contiguous()


def canonical_lengths(
    op: str, lengths: Tensor | None, cu_seqlens: Tensor | None, batch: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, int]:
    """``lengths`` and ``cu_seqlens`` as dense int32 on the device of the inputs, and the number of sequences."""
    if lengths is not None and cu_seqlens is not None:
        raise ValueError(
            f"{op}: lengths and cu_seqlens are both given; padded batches take lengths, packed ones cu_seqlens"
        )
    if lengths is not None:
        if lengths.shape != (batch,):
            raise ValueError(f"{op}: lengths are {shape(lengths)}, expected ({batch},), one per batch row")
        return lengths.to(device=device, dtype=torch.int32).contiguous(), None, batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"{op}: cu_seqlens needs a batch of 1, all sequences one after the other; got {batch}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"{op}: cu_seqlens is {shape(cu_seqlens)}, expected (S + 1,): 0, ..., L")
        return None, cu_seqlens.to(device=device, dtype=torch.int32).contiguous(), cu_seqlens.shape[0] - 1
    return None, None, batch


def check_devices(op: str, device: torch.device, tensors: dict[str, Tensor | None]) -> None:
    """Every tensor must lie on ``device``."""
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(f"{op}: {name} is on {x.device}, the first input on {device}; move it there")


def check_of_tokens(op: str, name: str, vector: Tensor, main: str, h: Tensor, channels: str = "D") -> None:
    """Beside ``h`` (B, L, D) a vector is (B or 1, L or 1, D), a number, with ``channels`` "1", (B or 1, L or 1, 1)."""
    fits = h.ndim == vector.ndim == 3 and vector.shape[2] == (h.shape[2] if channels == "D" else 1)
    if not fits or any(size not in (1, full) for size, full in zip(vector.shape[:2], h.shape[:2])):
        raise ValueError(
            f"{op}: {name} is {shape(vector)} beside {main} {shape(h)}, expected "
            f"(B, 1, {channels}) or (B, L, {channels}) beside (B, L, D)"
        )


def check_factor(op: str, factor: Tensor, main: str, h: Tensor) -> None:
    """A number of a sample or of a token, which nothing is learnt from."""
    check_of_tokens(op, "factor", factor, main, h, channels="1")
    if factor.requires_grad:
        raise ValueError(f"{op}: factor requires a gradient, which it does not get; detach it")


def check_visits(op: str, orders: Tensor | None, cu_seqlens: Tensor | None, length: int) -> None:
    """Check the values of ``orders`` and ``cu_seqlens`` where that costs no device synchronisation (on the CPU)."""
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != length or sorted(borders) != borders:
            raise ValueError(f"{op}: cu_seqlens is {borders}, expected rising borders from 0 to {length}")
    if orders is None or orders.device.type != "cpu":
        return
    rows = orders.long()
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= length):
        raise ValueError(f"{op}: orders hold {int(rows.min())}..{int(rows.max())}, expected rows 0..{length - 1}")
    offsets = torch.arange(rows.shape[0])[:, None] * length
    if not bool((torch.bincount((rows + offsets).view(-1), minlength=rows.numel()) == 1).all()):
        raise ValueError(f"{op}: an order is not a permutation of 0..{length - 1}: it must visit every token once")
    if cu_seqlens is not None:
        sequence = torch.bucketize(rows, cu_seqlens.long()[1:], right=True)  # (K, L)
        changes = (sequence[:, 1:] != sequence[:, :-1]).sum(dim=1)
        filled = int((cu_seqlens[1:] > cu_seqlens[:-1]).sum())
        if bool((changes != filled - 1).any()):
            raise ValueError(f"{op}: an order leaves a packed sequence and comes back; visit each sequence in one go")


def _text(sizes: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(size) for size in sizes) + ")"
