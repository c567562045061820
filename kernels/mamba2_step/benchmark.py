"""Time of one decoding step of a Mamba-2 mixer, after a parity check: microseconds per call, captured where possible.

python -m genssm.kernels.mamba2_step.benchmark --shapes 16x24x64x128 128x24x64x128
"""

import argparse
import functools

import torch
from torch import Tensor

from genssm.kernels import benchmarking, dispatch
from genssm.kernels.mamba2_step import mamba2_step

_LETTERS = "BxHxPxN"
_SHAPES = {"cuda": ("16x24x64x128", "128x24x64x128", "16x48x64x128"), "cpu": ("2x4x16x16",)}


def arguments(
    sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Inputs of a step; batch, heads, channels of a head, state."""
    batch, heads, width, states = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    channels = heads * width + 2 * states
    return {
        "projected": random(batch, heads * width + channels + heads).to(dtype),
        "conv_windows": random(batch, 2, channels, 4).to(dtype),
        "conv_turns": torch.zeros(batch, heads * width, dtype=torch.uint8, device=device),
        "ssm_state": random(batch, 1, heads, width, states).to(state_dtype),
        "conv_weight": random(channels, 4).to(dtype),
        "conv_bias": random(channels).to(dtype),
        "A_log": random(heads),
        "D": random(heads),
        "dt_bias": random(heads) - 4,
    }


def check(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Three steps of ``backend`` against float64."""
    inputs = arguments((3, 4, 24, 20), torch.device("cpu"), dtype)
    exact = {name: x.double() if x.is_floating_point() else x.clone() for name, x in inputs.items()}
    placed = {name: x.clone().to(device) for name, x in inputs.items()}
    found = {f"y{i}": mamba2_step(**placed, backend=backend) for i in range(3)}
    expected = {f"y{i}": mamba2_step(**exact, backend="reference") for i in range(3)}
    found, expected = found | {"h": placed["ssm_state"]}, expected | {"h": exact["ssm_state"]}
    error = benchmarking.check(backend, found, expected, 1e-5 if dtype == torch.float32 else 2e-2)
    print(f"parity {backend}: {error:.1e}")


def main() -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device_type, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--state-dtype", default="float16", choices=("float32", "bfloat16", "float16"))
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
        inputs = arguments(shape, device, dtype, getattr(torch, args.state_dtype))
        traffic = 2 * inputs["ssm_state"].nbytes
        for backend in backends:
            call = functools.partial(mamba2_step, **inputs, backend=backend)
            time = benchmarking.captured_microseconds(call, device)
            print(f"{'x'.join(map(str, shape)):>16} {backend:<10} {time:8.1f} us, {traffic / time / 1e3:7.1f} GB/s")


if __name__ == "__main__":
    main()
