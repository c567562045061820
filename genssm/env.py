"""What this machine has and which implementation every op takes on it: ``python -m genssm.env [--check]``."""

import argparse
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator

import torch

import genssm
from genssm.errors import cli
from genssm.kernels import dispatch
from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.selective_scan import selective_scan
from genssm.kernels.ssd import ssd
from genssm.metrics.weights import cache_folder

PACKAGES = (
    "torch", "torchvision", "triton", "diffusers", "accelerate", "einops", "clean-fid", "transformers", "peft",
    "safetensors", "numpy", "torchdiffeq", "scikit-learn", "datasets",
)  # fmt: skip
OPS = ("selective_scan", "ssd", "causal_conv1d")


def versions() -> dict[str, str]:
    """Installed versions of genssm, Python and the packages genssm builds on; "absent" where one is missing."""
    found = {"genssm": genssm.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def devices() -> list[torch.device]:
    """The CPU and every accelerator that torch sees."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if kind is not None else 0
    return [torch.device("cpu"), *(torch.device(kind.type, index) for index in range(count))]


def device_name(device: torch.device) -> str:
    """What the device is, for people."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        return f"{properties.name}, {memory:.0f} GiB, {properties.multi_processor_count} multiprocessors"
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    return device.type


def report() -> Iterator[str]:
    """Lines of the report: versions, devices, backends, caches."""
    yield "versions"
    for name, version in versions().items():
        yield f"  {name:<14}{version}"
    yield f"environment: {dispatch.VARIABLE}={os.environ.get(dispatch.VARIABLE, '(not set: auto)')}"
    for device in devices():
        yield f"{device}: {device_name(device)}"
        probe = torch.empty(1, device=device)
        yield "  auto takes " + ", ".join(f"{dispatch.resolve(op, 'auto', probe)} for {op}" for op in OPS)
        for backend in dispatch.BACKENDS:
            reason = dispatch.why_not(backend, device.type, device.index or 0)
            yield f"  {backend:<10}" + ("available" if reason is None else f"not here: {reason}")
    yield f"cache: {cache_folder()}"


def check(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Compare every backend of every op with the reference on one device, forward and every gradient.

    Yields:
        A name, the largest relative root-mean-square error, and the bound that it must keep (1e-4; float32 inputs of
        odd sizes, two directions, gate, skip, softplus).
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    batch, length, channels, states = 2, 77, 40, 16
    orders = torch.stack([torch.arange(length), torch.randperm(length, generator=draw)]).int().to(device)
    scan_inputs = {
        "u": normal(batch, length, channels),
        "delta": 0.5 * normal(batch, 2, length, channels),
        "A": -normal(2, channels, states).exp(),
        "B": normal(batch, 2, length, states),
        "C": normal(batch, 2, length, states),
        "D": normal(2, channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(2, channels) - 2,
    }
    heads = 5
    ssd_inputs = {
        "x": normal(batch, length, heads, channels // heads),
        "dt": 0.5 * normal(batch, 2, length, heads),
        "A": -normal(2, heads).exp(),
        "B": normal(batch, 2, length, 1, states),
        "C": normal(batch, 2, length, 1, states),
        "D": normal(2, heads),
        "z": normal(batch, length, heads, channels // heads),
        "dt_bias": normal(2, heads) - 2,
    }
    conv_inputs = {"x": normal(batch, length, channels), "weight": normal(2, channels, 4), "bias": normal(2, channels)}
    scan = functools.partial(selective_scan, delta_softplus=True, orders=orders)
    heads_scan = functools.partial(ssd, dt_softplus=True, orders=orders)
    conv = functools.partial(causal_conv1d, activation="silu", orders=orders)
    calls = {
        "selective_scan": (scan, scan_inputs),
        "ssd": (heads_scan, ssd_inputs),
        "causal_conv1d": (conv, conv_inputs),
    }
    for op in OPS:
        call, inputs = calls[op]
        expected = _results(call, "reference", inputs)
        for backend in dispatch.BACKENDS[1:]:
            if dispatch.why_not(backend, device.type, device.index or 0, op=op) is None:
                got = _results(call, backend, inputs)
                error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected))
                yield f"{op} {backend} on {device}", error, 1e-4


def _results(call: Callable[..., torch.Tensor], backend: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of one op, in the order of its inputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = call(**leaves, backend=backend)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), list(leaves.values()))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m genssm.env", description=__doc__)
    parser.add_argument("--check", action="store_true", help="also run every op against its reference, in seconds")
    args = parser.parse_args()
    print("\n".join(report()))
    failed = 0
    if args.check:
        for device in devices():
            start = time.perf_counter()
            for name, error, bound in check(device):
                good = error <= bound
                failed += not good
                print(f"{'ok  ' if good else 'FAIL'} {name}: relative error {error:.1e}, at most {bound:.0e}")
            print(f"checked {device} in {time.perf_counter() - start:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    cli(main)
