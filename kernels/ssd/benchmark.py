"""Time the Mamba-2 scan and what else a user could run: ``python -m genssm.kernels.ssd.benchmark``."""

import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from genssm.kernels import benchmarking, dispatch
from genssm.kernels.benchmarking import Contender
from genssm.kernels.ssd import ssd

_LETTERS = "BxLxHxPxN"
_SHAPES = {
    "cpu": ("4x256x12x64x64", "1x1024x24x64x128", "32x64x8x64x16"),
    "cuda": ("64x1024x24x64x64", "64x1024x24x64x128", "8x4096x24x64x64", "1x4096x24x64x64", "4x16384x24x64x64"),
}
_USUAL = "usual loop"
_CHUNK = 64  # of the matrix form by autograd


def arguments(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs such as a Mamba-2 block has after its projection and convolution; ordinary step sizes."""
    batch, length, heads, width, states = shape
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(batch, length, heads, width, generator=g) for name in ("x", "z")}
    inputs["dt"] = torch.randn(batch, length, heads, generator=g)
    inputs.update({name: torch.randn(batch, length, 1, states, generator=g) for name in ("B", "C")})
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    inputs["A"] = -torch.linspace(1.0, 16.0, heads)
    inputs["D"], inputs["dt_bias"] = torch.ones(heads), torch.full((heads,), -4.0)
    return {name: x.to(device).requires_grad_() for name, x in inputs.items()}


def usual_loop(x: Tensor, z: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Token by token with autograd; every step keeps a state (B, H, P, N)."""
    x_, B_, C_ = (t.float() for t in (x, B, C))
    dt = F.softplus(dt.float() + dt_bias)
    inputs = x_ * dt[..., None]
    h = x_.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    y = []
    for decay, u, b, c in zip((dt * A).exp().unbind(1), inputs.unbind(1), B_.unbind(1), C_.unbind(1)):
        h = decay[..., None, None] * h + u[..., None] * b[:, :, None]
        y.append((h * c[:, :, None]).sum(dim=-1))
    return ((torch.stack(y, dim=1) + x_ * D[:, None]) * F.silu(z.float())).to(z.dtype)


def matrix_form(
    x: Tensor, z: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """All chunks at once as matrix products with autograd, which keeps every triangular matrix; whole chunks only."""
    x_, B_, C_ = (t.float().unflatten(1, (-1, _CHUNK)) for t in (x, B[:, :, 0], C[:, :, 0]))  # (B, c, T, ...)
    dt = F.softplus(dt.float() + dt_bias).unflatten(1, (-1, _CHUNK))
    total = (dt * A).cumsum(2).movedim(3, 2)  # (B, c, H, T)
    above = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=x.device).triu(1)
    between = (total[..., None] - total[..., None, :]).masked_fill(above, -torch.inf).exp()  # (B, c, H, T, T)
    u = (x_ * dt[..., None]).movedim(3, 2)  # (B, c, H, T, P)
    y = (between * (C_ @ B_.mT)[:, :, None]) @ u
    made = (u * (total[..., -1:] - total).exp()[..., None]).mT @ B_[:, :, None]  # (B, c, H, P, N)
    h, before = torch.zeros_like(made[:, 0]), []
    for added, through in zip(made.unbind(1), total[..., -1].exp().unbind(1)):
        before.append(h)
        h = h * through[..., None, None] + added
    y = y + (C_[:, :, None] @ torch.stack(before, dim=1).mT) * total.exp()[..., None]
    y = (y.movedim(2, 3) + x_ * D[:, None]).flatten(1, 2)
    return (y * F.silu(z.float())).to(z.dtype)


def alternatives(device: torch.device) -> Iterator[Contender]:
    """Other ways to compute the op that this machine has."""
    yield Contender(_USUAL, usual_loop)
    yield Contender("matrix form, autograd", matrix_form)
    if device.type == "cuda" and importlib.util.find_spec("mamba_ssm") is not None:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        def combined(x, z, dt, B, C, A, D, dt_bias) -> Tensor:
            return mamba_chunk_scan_combined(
                x, dt, A, B, C, chunk_size=256, D=D, z=z, dt_bias=dt_bias, dt_softplus=True
            )

        yield Contender("mamba_ssm Triton", combined)


def check_backends(backends: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Compare every backend with the reference, gradients included, along one order and along two."""
    for orders in (None, torch.stack([torch.arange(131), torch.arange(130, -1, -1)]).int()):
        inputs = arguments((2, 131, 3, 24, 16), torch.device("cpu"), dtype)
        doubles = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
        options = {"dt_softplus": True, "orders": orders}

        def run(backend: str, options: dict = options, **inputs: Tensor) -> Tensor:
            return ssd(**inputs, **options, backend=backend)

        expected = benchmarking.gradients(lambda run=run, **x: run("reference", **x), doubles)
        placed = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
        for backend in backends:
            found = benchmarking.gradients(lambda run=run, backend=backend, **x: run(backend, **x), placed)
            error = benchmarking.check(backend, found, expected, 1e-5 if dtype == torch.float32 else 2e-2)
            print(f"parity {backend}, {1 if orders is None else 2} orders: {error:.1e}")


def main() -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    parser = benchmarking.parser(__doc__, _SHAPES[device_type], _LETTERS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(benchmarking.hardware(device, args.threads))
    try:
        benchmarking.check_captured(args)
        shapes = [benchmarking.sizes(shape, _LETTERS) for shape in args.shapes]
        possible = {b: dispatch.why_not(b, device.type, device.index or 0, op="ssd") for b in ("chunked", "triton")}
        backends = benchmarking.choose(args.backends, possible)
        check_backends(backends, device, dtype)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    contenders = [Contender(b, lambda b=b, **inputs: ssd(**inputs, dt_softplus=True, backend=b)) for b in backends]
    others = [] if args.no_alternatives else list(alternatives(device))
    rows = []
    for shape in shapes:
        inputs = arguments(shape, device, dtype)
        name, elements = "x".join(map(str, shape)), shape[0] * shape[1] * shape[2] * shape[3]
        whole = [c for c in (*others, *contenders) if c.call is not matrix_form or shape[1] % _CHUNK == 0]
        rows += [benchmarking.measure(name, elements, c, inputs, captured=args.captured) for c in whole]
    benchmarking.report(rows, _USUAL, args.csv)


if __name__ == "__main__":
    main()
