"""Time of one draw, after a parity check: microseconds per call, captured where possible.

python -m genssm.kernels.draw_token.benchmark --shapes 8x16384 64x16384
"""

import argparse
import functools

import torch
from torch import Tensor

from genssm.kernels import benchmarking, dispatch
from genssm.kernels.draw_token import draw_token

_LETTERS = "BxV"
_SHAPES = {"cuda": ("8x16384", "64x16384"), "cpu": ("2x1024",)}


def arguments(sizes: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Guided logits of images."""
    images, vocabulary = sizes
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2 * images, vocabulary, generator=generator)
    given = {
        "logits": logits,
        "uniform": torch.rand(images, 1, generator=generator),
        "scales": torch.tensor([4.0]),
        "position": torch.zeros(1, dtype=torch.int64),
        "codes": torch.zeros(images, 1, dtype=torch.int64),
        "previous": torch.zeros(2 * images, 1, dtype=torch.int64),
    }
    return {name: x.to(device) for name, x in given.items()}


def check(backend: str, device: torch.device) -> None:
    """Tokens of ``backend`` against those of PyTorch on the CPU; one in a thousand may lie at a border."""
    inputs = arguments((1000, 300), torch.device("cpu"))
    placed = {name: x.to(device, copy=True) for name, x in inputs.items()}
    draw_token(**placed, backend=backend)
    draw_token(**inputs, backend="reference")
    others = int((placed["codes"].cpu() != inputs["codes"]).sum())
    if others > 1:
        raise ValueError(f"{backend} draws {others} of 1000 tokens differently")
    print(f"parity {backend}: {others} of 1000 tokens differ")


def main() -> None:
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=device_type, help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", default=list(_SHAPES[device_type]), metavar=_LETTERS)
    args = parser.parse_args()
    device = torch.device(args.device)
    try:
        shapes = [benchmarking.sizes(shape, _LETTERS) for shape in args.shapes]
        backends = [b for b in ("reference", "triton") if dispatch.why_not(b, device.type, device.index or 0) is None]
        for backend in backends:
            check(backend, device)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    for shape in shapes:
        inputs = arguments(shape, device)
        for backend in backends:
            time = benchmarking.captured_microseconds(functools.partial(draw_token, **inputs, backend=backend), device)
            print(f"{'x'.join(map(str, shape)):>16} {backend:<10} {time:8.1f} us")


if __name__ == "__main__":
    main()
