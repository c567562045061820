"""Time the causal convolution and what else a user could run: ``python -m genssm.kernels.causal_conv1d.benchmark``."""

import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from genssm.kernels import benchmarking, dispatch
from genssm.kernels.benchmarking import Contender
from genssm.kernels.causal_conv1d import causal_conv1d

_LETTERS = "BxLxExW"
_SHAPES = {
    "cpu": ("4x256x384x4", "1x1024x768x4", "32x64x256x4"),
    "cuda": ("64x1024x1536x4", "8x4096x1536x4", "1x4096x1536x4"),
}
_USUAL = "torch conv1d"


def arguments(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tokens as a projection leaves them, channels last."""
    batch, length, channels, taps = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, channels, generator=g).to(dtype)
    inputs = {"x": x, "weight": torch.randn(channels, taps, generator=g), "bias": torch.randn(channels, generator=g)}
    return {name: x.to(device).requires_grad_() for name, x in inputs.items()}


def torch_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The usual way without a kernel: channels first, depthwise, both ends padded and the tail cut off."""
    taps = weight.shape[-1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=x.shape[-1])
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def alternatives(device: torch.device) -> Iterator[Contender]:
    """Other ways to compute the op that this machine has."""
    yield Contender(_USUAL, torch_convolution)
    if device.type == "cuda" and importlib.util.find_spec("causal_conv1d") is not None:
        from causal_conv1d import causal_conv1d_fn

        yield Contender(
            "causal_conv1d CUDA",
            lambda x, weight, bias: causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(
                1, 2
            ),
        )


def check_backends(backends: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Compare every backend with the reference, gradients included, along one order and along two."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for orders in (None, torch.stack([torch.arange(67), torch.arange(66, -1, -1)]).int()):
        inputs = arguments((2, 67, 72, 4), torch.device("cpu"), dtype)
        doubles = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}

        def run(backend: str, orders: Tensor | None = orders, **inputs: Tensor) -> Tensor:
            return causal_conv1d(**inputs, activation="silu", orders=orders, backend=backend)

        expected = benchmarking.gradients(lambda run=run, **x: run("reference", **x), doubles)
        placed = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
        for backend in backends:
            found = benchmarking.gradients(lambda run=run, backend=backend, **x: run(backend, **x), placed)
            error = benchmarking.check(backend, found, expected, tolerance)
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
        possible = {b: dispatch.why_not(b, device.type, device.index or 0) for b in ("chunked", "compiled", "triton")}
        backends = benchmarking.choose(args.backends, possible)
        check_backends(backends, device, dtype)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    contenders = [
        Contender(b, lambda b=b, **inputs: causal_conv1d(**inputs, activation="silu", backend=b)) for b in backends
    ]
    others = [] if args.no_alternatives else list(alternatives(device))
    rows = []
    for shape in shapes:
        inputs = arguments(shape, device, dtype)
        name, elements = "x".join(map(str, shape)), shape[0] * shape[1] * shape[2]
        for contender in (*others, *contenders):
            rows.append(benchmarking.measure(name, elements, contender, inputs, captured=args.captured))
    benchmarking.report(rows, _USUAL, args.csv)


if __name__ == "__main__":
    main()
