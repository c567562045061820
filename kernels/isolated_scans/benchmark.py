"""Time of isolated scans, fused and composed, after a parity check: microseconds per call, captured where possible.

python -m genssm.kernels.isolated_scans.benchmark --shapes 2x4x256x9x16 2x256x256x2x1
"""

import argparse

import torch
from torch import Tensor

from genssm.kernels import benchmarking, dispatch
from genssm.kernels.isolated_scans import op
from genssm.kernels.isolated_scans.reference import scans_reference

_LETTERS = "BxLxExKxR"
# One text of Motion Mamba with guidance: scans along the tokens, and along the channels.
_SHAPES = {"cuda": ("2x4x256x9x16", "2x4x256x1x16", "2x256x256x2x1", "32x256x256x2x1"), "cpu": ("2x4x16x3x2",)}
_CALLS = 20  # in one captured graph
_STATES, _TAPS = 16, 4


def arguments(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of a call: batch, tokens, channels, scans, rank of the step; two scans go both ways."""
    batch, length, channels, directions, rank = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device)

    x, z = random(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)
    decay = torch.arange(1.0, _STATES + 1).log().expand(directions, channels, _STATES)
    forward = torch.arange(length, dtype=torch.int32, device=device)
    return {
        "x": x,
        "z": z,
        "conv_weight": random(directions, channels, _TAPS, scale=0.5).to(dtype),
        "conv_bias": random(directions, channels).to(dtype),
        "x_proj": random(directions, rank + 2 * _STATES, channels, scale=channels**-0.5).to(dtype),
        "dt_proj": random(directions, channels, rank, scale=rank**-0.5).to(dtype),
        "dt_bias": random(directions, channels) - 3,
        "A_log": decay.to(device).contiguous(),
        "D": random(directions, channels),
        "orders": torch.stack([forward, forward.flip(0)]) if directions == 2 else None,
    }


def check(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """``backend`` ("fused", or one of the composed operators) against float64."""
    worst = 0.0
    for sizes in ((2, 4, 24, 9, 16), (2, 70, 20, 2, 1)):
        inputs = arguments(sizes, torch.device("cpu"), dtype)
        exact = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
        placed = {k: None if v is None else v.to(device) for k, v in inputs.items()}
        found, expected = {"y": _call(backend, placed)}, {"y": scans_reference(**exact, backend="reference")}
        worst = max(worst, benchmarking.check(backend, found, expected, 1e-5 if dtype == torch.float32 else 2e-2))
    print(f"parity {backend}: {worst:.1e}")


def _call(backend: str, inputs: dict[str, Tensor]) -> Tensor:
    return op.fused(*inputs.values()) if backend == "fused" else scans_reference(**inputs, backend=backend)


@torch.no_grad()
def microseconds(backend: str, inputs: dict[str, Tensor]) -> float:
    """Of one call; on CUDA of calls inside a captured graph, where no host is waited for."""
    device = inputs["x"].device

    def calls() -> None:
        for _ in range(_CALLS):
            _call(backend, inputs)

    if device.type == "cuda":
        calls()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        calls = graph.replay
    return 1000 * benchmarking.milliseconds(calls, device) / _CALLS


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
        fused = dispatch.why_not("triton", device.type, device.index or 0) is None
        backends = ["triton", "fused"] if fused else ["chunked"]
        for backend in backends:
            check(backend, device, dtype)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    for shape in shapes:
        inputs = arguments(shape, device, dtype)
        times = ", ".join(f"{backend} {microseconds(backend, inputs):8.1f} us" for backend in backends)
        print(f"{'x'.join(map(str, shape)):>18} {times}")


if __name__ == "__main__":
    main()
