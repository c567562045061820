"""Time residual update, norm and modulation beside PyTorch: ``python -m genssm.kernels.add_norm.benchmark``.

The stream is float32, all else has the type of --dtype; rms norm, gate and modulation per sample. "eager" is the path
of the CPU, one step after the other, "torch.compile" the same compiled. On CUDA the forward is timed inside a captured
graph, where nothing waits for the host; forward + backward with --captured only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from genssm.kernels import benchmarking, dispatch
from genssm.kernels.add_norm import add_norm
from genssm.kernels.add_norm.reference import add_norm_reference

_LETTERS = "BxLxD"
_SHAPES = {"cpu": ("2x256x768",), "cuda": ("32x1024x768", "8x4096x768", "32x256x1024", "32x256x1536", "16x1x768")}
_USUAL = "eager"
_CALLS = 20  # in one captured graph

Call = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


def arguments(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stream, what a mixer has made, the weight of the norm, and vectors as a projection leaves them."""
    batch, _, channels = shape
    g = torch.Generator().manual_seed(0)
    gate, shift, scale = torch.randn(batch, 1, 3 * channels, generator=g).to(device, dtype).chunk(3, dim=-1)
    inputs = {
        "hidden_states": torch.randn(shape, generator=g).to(device),
        "x": torch.randn(shape, generator=g).to(device, dtype),
        "gate": gate,
        "weight": (1 + 0.1 * torch.randn(channels, generator=g)).to(device, dtype),
        "shift": shift,
        "scale": scale,
    }
    return {name: t.detach().requires_grad_() for name, t in inputs.items()}


def gradients(call: Call, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both results for ``inputs``, and the gradients for a fixed random weighting of them."""
    results = call(inputs)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=g).to(t) for t in results]
    grads = torch.autograd.grad(results, list(inputs.values()), weights)
    return dict(zip("hy", (t.detach() for t in results))) | {f"d{n}": grad for n, grad in zip(inputs, grads)}


def check_backends(backends: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """Compare every backend with the reference in float64, gradients included."""
    inputs = arguments((3, 67, 200), torch.device("cpu"), dtype)
    doubles = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = gradients(lambda given: add_norm(**given, backend="reference"), doubles)
    placed = {name: t.detach().to(device).requires_grad_() for name, t in inputs.items()}
    for backend in backends:
        found = gradients(lambda given, backend=backend: add_norm(**given, backend=backend), placed)
        error = benchmarking.check(backend, found, expected, 1e-5 if dtype == torch.float32 else 2e-2)
        print(f"parity {backend}: {error:.1e}")


def composed(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The reference on canonical arguments, for `torch.compile`."""
    h, x, gate, weight, shift, scale = inputs.values()
    return add_norm_reference(h, x, gate, weight, None, shift, scale, None, False, False, 1e-5, None)[:2]


def measure(
    shape: str, elements: int, name: str, call: Call, inputs: dict[str, Tensor], captured: bool
) -> benchmarking.Row:
    """Times in milliseconds and peak memory of one contender."""
    device = inputs["x"].device
    weights = [torch.ones_like(t) for t in call(inputs)]

    @torch.no_grad()
    def forward() -> None:
        for _ in range(_CALLS):
            call(inputs)

    def both() -> None:
        torch.autograd.grad(call(inputs), list(inputs.values()), weights)

    run = benchmarking.capture(forward) if device.type == "cuda" else forward
    time = benchmarking.milliseconds(run, device) / _CALLS
    both_time = benchmarking.milliseconds(benchmarking.capture(both) if captured else both, device)
    peak, data = benchmarking.peak_memory(both, device), benchmarking.data_size(*inputs.values(), *weights)
    return benchmarking.Row(shape, name, elements, time, both_time, peak, data)


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
    contenders: dict[str, Call] = {}
    if not args.no_alternatives:
        contenders = {_USUAL: composed, "torch.compile": torch.compile(composed, dynamic=False)}
    contenders |= {b: lambda given, b=b: add_norm(**given, backend=b) for b in backends}
    rows = []
    for shape in shapes:
        torch.compiler.reset()  # beyond some shapes it gives up and runs the rest as it is
        inputs = arguments(shape, device, dtype)
        elements = shape[0] * shape[1] * shape[2]
        text = "x".join(map(str, shape))
        rows += [measure(text, elements, name, call, inputs, args.captured) for name, call in contenders.items()]
    benchmarking.report(rows, _USUAL, args.csv)


if __name__ == "__main__":
    main()
