"""Time of a linear map of few rows, after a parity check: microseconds per call, captured where possible.

python -m genssm.kernels.row_linear.benchmark --shapes 16x768x3352 16x1536x768

The weights of the calls are different ones, more than a cache holds, as those of a model's layers are.
"""

import argparse
import functools
import itertools

import torch
from torch import Tensor

from genssm.kernels import benchmarking, dispatch
from genssm.kernels.row_linear import row_linear

_LETTERS = "RxKxN"
_SHAPES = {"cuda": ("16x768x3352", "16x1536x768", "16x1536x6680", "16x3072x1536"), "cpu": ("2x64x48",)}
_BYTES = {"cuda": 200e6, "cpu": 1e5}  # of all weights


def arguments(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype, layers: int) -> tuple[Tensor, Tensor]:
    """Rows, and the weights of some layers."""
    rows, channels_in, channels_out = sizes
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, channels_in, generator=generator, device=device).to(dtype)
    weights = torch.randn(layers, channels_out, channels_in, generator=generator, device=device) / channels_in**0.5
    return x, weights.to(dtype)


def check(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """``backend`` against float64."""
    x, weights = arguments((20, 300, 70), device, dtype, 1)
    benchmarking.synchronize(device)
    expected = {"y": row_linear(x.double(), weights[0].double(), backend="reference")}
    found = {"y": row_linear(x, weights[0], backend=backend)}
    error = benchmarking.check(backend, found, expected, 1e-5 if dtype == torch.float32 else 1e-2)
    print(f"parity {backend}: {error:.1e}")


def main() -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device_type, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--shapes", nargs="+", default=list(_SHAPES[device_type]), metavar=_LETTERS)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    try:
        shapes = [benchmarking.sizes(shape, _LETTERS) for shape in args.shapes]
        backends = [b for b in ("reference", "triton") if dispatch.why_not(b, device.type, device.index or 0) is None]
        for backend in backends:
            check(backend, device, dtype)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    for shape in shapes:
        size = shape[1] * shape[2] * dtype.itemsize
        x, weights = arguments(shape, device, dtype, max(1, int(_BYTES[device.type] / size)))
        for backend in backends:
            layers = map(functools.partial(row_linear, x, backend=backend), itertools.cycle(weights))
            time = benchmarking.captured_microseconds(functools.partial(next, layers), device)
            print(f"{'x'.join(map(str, shape)):>16} {backend:<10} {time:8.1f} us, {size / time / 1e3:7.1f} GB/s")


if __name__ == "__main__":
    main()
