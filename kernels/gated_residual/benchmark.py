"""Time a block's residual update beside PyTorch: ``python -m genssm.kernels.gated_residual.benchmark``.

The stream is float32, what the branch made and the gate have the type of --dtype; the gate is of a sample and there is
no factor, as in sampling. "eager" is the path of the CPU, one step after the other, "torch.compile" the same compiled.
With --captured both directions are replayed graphs, where nothing waits for the host.
"""

import functools

import torch
from torch import Tensor

from genssm.kernels import benchmarking, dispatch
from genssm.kernels.gated_residual import gated_residual
from genssm.kernels.gated_residual.reference import residual_reference

_LETTERS = "BxLxD"
_SHAPES = {"cpu": ("2x256x768",), "cuda": ("32x1024x768", "8x4096x768", "32x256x1024", "32x256x512")}
_USUAL = "eager"


def arguments(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stream, what a branch has made, and the gate as a projection leaves it."""
    batch, _, channels = shape
    g = torch.Generator().manual_seed(0)
    inputs = {
        "stream": torch.randn(shape, generator=g).to(device),
        "x": torch.randn(shape, generator=g).to(device, dtype),
        "gate": torch.randn(batch, 1, 3 * channels, generator=g).to(device, dtype).chunk(3, dim=-1)[2],
    }
    return {name: t.detach().requires_grad_() for name, t in inputs.items()}


def check_backends(backends: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Compare every backend with the reference in float64, gradients included."""
    inputs = arguments((3, 67, 200), torch.device("cpu"), dtype)
    doubles = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = benchmarking.gradients(functools.partial(gated_residual, backend="reference"), doubles)
    placed = {name: t.detach().to(device).requires_grad_() for name, t in inputs.items()}
    for backend in backends:
        found = benchmarking.gradients(functools.partial(gated_residual, backend=backend), placed)
        error = benchmarking.check(backend, found, expected, 1e-5 if dtype == torch.float32 else 2e-2)
        print(f"parity {backend}: {error:.1e}")


def composed(stream: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """The reference, for `torch.compile`."""
    return residual_reference(stream, x, gate, None, None)


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
        possible = {"triton": dispatch.why_not("triton", device.type, device.index or 0)}
        backends = benchmarking.choose(args.backends, possible)
        check_backends(backends, device, dtype)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    contenders = []
    if not args.no_alternatives:
        contenders = [
            benchmarking.Contender(_USUAL, composed),
            benchmarking.Contender("torch.compile", torch.compile(composed, dynamic=False)),
        ]
    contenders += [benchmarking.Contender(b, functools.partial(gated_residual, backend=b)) for b in backends]
    rows = []
    for shape in shapes:
        torch.compiler.reset()  # beyond some shapes it gives up and runs the rest as it is
        inputs = arguments(shape, device, dtype)
        name, elements = "x".join(map(str, shape)), shape[0] * shape[1] * shape[2]
        rows += [benchmarking.measure(name, elements, each, inputs, captured=args.captured) for each in contenders]
    benchmarking.report(rows, _USUAL, args.csv)


if __name__ == "__main__":
    main()
