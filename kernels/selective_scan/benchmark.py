"""Time the selective scan and what else a user could run: ``python -m genssm.kernels.selective_scan.benchmark``."""

import functools
import importlib.util
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from genssm.kernels import benchmarking, dispatch
from genssm.kernels.benchmarking import Contender
from genssm.kernels.selective_scan import selective_scan

_LETTERS = "BxLxExN"
_SHAPES = {
    "cpu": ("4x256x384x16", "1x1024x768x16", "32x64x256x16"),
    "cuda": ("64x1024x1536x16", "8x4096x1536x16", "1x4096x1536x16", "1x16384x2304x16", "32x256x2304x16"),
}
_USUAL, _TRANSFORMERS = "usual loop", "transformers fallback"
_SLICING, _LONGEST = (_USUAL, _TRANSFORMERS), 1024  # on a GPU: backward passes of 4,096 steps take minutes


def arguments(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, directions: int = 1
) -> dict[str, Tensor]:
    """Inputs such as a Mamba block has after its projections; ordinary step sizes. Several directions share z alone."""
    batch, length, channels, states = shape
    own = () if directions == 1 else (directions,)
    g = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, device=device).to(dtype)

    inputs = {name: random(batch, *own, length, channels) for name in ("u", "delta")}
    inputs["z"] = random(batch, length, channels)
    inputs.update({name: random(batch, *own, length, states) for name in ("B", "C")})
    inputs["A"] = -torch.arange(1.0, states + 1).expand(*own, channels, states).contiguous()
    inputs["D"], inputs["delta_bias"] = torch.ones(*own, channels), torch.full((*own, channels), -4.0)
    return {name: x.to(device).requires_grad_() for name, x in inputs.items()}


def paths(order: str, directions: int, length: int, device: torch.device) -> Tensor | None:
    """Orders (K, L): "raster" to and fro, or "random" ones; None for one direction in raster order."""
    if order == "raster":
        if directions == 1:
            return None
        steps = torch.arange(length)
        rows = [steps if k % 2 == 0 else steps.flip(0) for k in range(directions)]
    else:
        rows = [torch.randperm(length, generator=torch.Generator().manual_seed(k)) for k in range(directions)]
    return torch.stack(rows).int().to(device)


def usual_loop(
    u: Tensor, delta: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """What most public code does without a kernel: all decays and inputs of (B, E, L, N) at once, a loop that slices
    them, autograd. Each slice's gradient fills a tensor of the full size, so the backward grows with L squared."""
    u, delta, B, C = (x.float().transpose(1, 2) for x in (u, delta, B, C))  # channels first
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    decay = torch.exp(delta[..., None] * A[:, None])  # (B, E, L, N)
    inputs = (delta * u)[..., None] * B.transpose(1, 2)[:, None]
    h = torch.zeros_like(decay[:, :, 0])
    y = []
    for i in range(u.shape[2]):
        h = decay[:, :, i] * h + inputs[:, :, i]
        y.append((h * C[:, None, :, i]).sum(dim=-1))
    result = (torch.stack(y, dim=2) + u * D[:, None]).transpose(1, 2)
    return (result * torch.nn.functional.silu(z.float())).to(z.dtype)


def alternatives(device: torch.device) -> Iterator[Contender]:
    """Other ways to compute the op that this machine has."""
    yield Contender(_USUAL, usual_loop)
    if importlib.util.find_spec("transformers") is not None:
        from transformers.models.mamba import modeling_mamba

        fallback = getattr(modeling_mamba, "mamba_selective_scan", None)  # since transformers 5
        if fallback is not None:
            yield Contender(_TRANSFORMERS, _channels_first(fallback, ("B", "C")))
    if importlib.util.find_spec("mambapy") is not None:
        from mambapy.pscan import pscan

        yield Contender("mambapy pscan", _parallel_scan(pscan))
    if device.type == "cuda" and importlib.util.find_spec("mamba_ssm") is not None:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        yield Contender("mamba_ssm CUDA", _channels_first(selective_scan_fn, ("B", "C")))


def _channels_first(scan, maps: tuple[str, ...]):
    """Call a scan whose tensors are (B, E, L) and (B, N, L)."""

    def call(u, delta, z, B, C, A, D, delta_bias) -> Tensor:
        u, delta, z, B, C = (x.transpose(1, 2) for x in (u, delta, z, B, C))
        y = scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True)
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)

    return call


def _parallel_scan(pscan):
    def call(u, delta, z, B, C, A, D, delta_bias) -> Tensor:
        delta = torch.nn.functional.softplus(delta + delta_bias)
        inputs = (delta * u)[..., None] * B[:, :, None]
        h = pscan(torch.exp(delta[..., None] * A), inputs)  # (B, L, E, N)
        y = (h @ C[..., None]).squeeze(-1) + D * u
        return y * torch.nn.functional.silu(z)

    return call


def check_backends(backends: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Compare every backend with the reference, gradients included, along one order and along two."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for orders in (None, torch.stack([torch.arange(67), torch.arange(66, -1, -1)]).int()):
        inputs = arguments((2, 67, 72, 16), torch.device("cpu"), dtype)
        doubles = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
        options = {"delta_softplus": True, "orders": orders}

        def run(backend: str, options: dict = options, **inputs: Tensor) -> Tensor:
            return selective_scan(**inputs, **options, backend=backend)

        expected = benchmarking.gradients(lambda run=run, **x: run("reference", **x), doubles)
        placed = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
        for backend in backends:
            found = benchmarking.gradients(lambda run=run, backend=backend, **x: run(backend, **x), placed)
            error = benchmarking.check(backend, found, expected, tolerance)
            print(f"parity {backend}, {1 if orders is None else 2} orders: {error:.1e}")


def main() -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    parser = benchmarking.parser(__doc__, _SHAPES[device_type], _LETTERS)
    parser.add_argument("--directions", nargs="+", type=int, default=[1], metavar="K", help="summed scans of a call")
    parser.add_argument("--orders", nargs="+", default=["raster"], choices=("raster", "random"), help="of the tokens")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(benchmarking.hardware(device, args.threads))
    try:
        benchmarking.check_captured(args)
        if min(args.directions) < 1:
            raise ValueError(f"--directions {min(args.directions)}: expected 1 or more")
        shapes = [benchmarking.sizes(shape, _LETTERS) for shape in args.shapes]
        possible = {b: dispatch.why_not(b, device.type, device.index or 0) for b in ("chunked", "compiled", "triton")}
        backends = benchmarking.choose(args.backends, possible)
        check_backends(backends, device, dtype)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    others = [] if args.no_alternatives else list(alternatives(device))
    rows = []
    for shape, directions, order in itertools.product(shapes, args.directions, args.orders):
        orders = paths(order, directions, shape[1], device)
        inputs = arguments(shape, device, dtype, directions)
        name, elements = "x".join(map(str, shape)), shape[0] * shape[1] * shape[2]
        if orders is not None:
            name += f", {directions} x {order}"
        for contender in () if orders is not None else others:  # which scan one direction, first to last
            if device.type != "cpu" and contender.name in _SLICING and shape[1] > _LONGEST:
                print(f"{name}: {contender.name} left out, its backward pass grows with the square of the length")
                continue
            rows.append(benchmarking.measure(name, elements, contender, inputs, captured=args.captured))
        for b in backends:
            contender = Contender(b, functools.partial(selective_scan, delta_softplus=True, orders=orders, backend=b))
            rows.append(benchmarking.measure(name, elements, contender, inputs, captured=args.captured))
    benchmarking.report(rows, _USUAL, args.csv)


if __name__ == "__main__":
    main()
