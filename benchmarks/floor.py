"""The floor of whole models: their matrix products and scans alone, each as fast as it runs by itself.

    python -m benchmarks.floor                                  DiM-L, DiM-H and DiMSUM-L/2 on a GPU, small on a CPU
    python -m benchmarks.floor --models zigma:B/1 --pixels 256 512 --tokens 32768 --each

One forward pass is watched, and one with its backward pass. Each product and each scan of another shape, layout or type
is then called again with the tensors that the model gave it, on CUDA inside a captured graph; calls times time, summed,
is the floor. What a pass takes beyond it went into everything else: norms, convolutions, attention, casts, the update
of the stream. The measured passes are replayed graphs on CUDA and eager elsewhere.

"limit" needs no model: the operations of the products at the rate of one large product, and the exponentials of the
scans (one for each state of each step, in the backward pass once more) at 16 per clock and multiprocessor, what the
special-function units of NVIDIA's chips make.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.models import CPU, GPU, TYPES, Case, call_of, check, make, measure, parser, sample, tokens_of
from genssm.errors import cli
from genssm.kernels.benchmarking import captured_microseconds, fill_in, hardware, print_table
from genssm.kernels.selective_scan.reference import directions_of

aten, own = torch.ops.aten, torch.ops.genssm  # the models have registered theirs
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}  # place of the first factor
SCANS = {own.selective_scan_fwd: 0, own.selective_scan_bwd: 3}  # place of u
PASSES = ("forward", "both")
EXPONENTIALS = 16  # per clock and multiprocessor
HEAD = ("pixels", "batch x tokens", "model", "pass", "products", "scans", "products ms", "scans ms", "floor ms",
        "measured ms", "x floor", "limit ms")  # fmt: skip


@dataclass
class Operation:
    """Calls that differ in numbers only."""

    name: str
    scan: bool
    work: int  # operations of a product, exponentials of a scan
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PASSES, 0))
    milliseconds: float = 0.0

    def spent(self, which: str) -> float:
        """Milliseconds of all its calls in a pass."""
        return self.calls[which] * self.milliseconds


class Watch(TorchDispatchMode):
    """Counts the products and scans of what runs under it.

    Attributes:
        found: the operations by their kind.
        examples: the first call of each, with its tensors.
        which: the pass that runs, one of PASSES.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple, Operation] = {}
        self.examples: dict[tuple, functools.partial] = {}
        self.which = PASSES[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result, packet = func(*args, **(kwargs or {})), func.overloadpacket
        if packet in PRODUCTS or packet in SCANS:
            given = tree_leaves((args, kwargs))
            kind = (func, *((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in given))
            if kind not in self.found:
                work = _exponentials(args[SCANS[packet] :]) if packet in SCANS else _operations(packet, args, result)
                shapes = [x for x in given if isinstance(x, Tensor)][:3]
                name = f"{packet.__name__} {', '.join('x'.join(map(str, x.shape)) for x in shapes)}"
                self.found[kind] = Operation(name, packet in SCANS, work)
                self.examples[kind] = functools.partial(func, *args, **(kwargs or {}))
            self.found[kind].calls[self.which] += 1
        return result


def _operations(packet: Any, args: tuple, result: Tensor) -> int:
    """Multiplications and additions of a product."""
    return 2 * result.numel() * args[PRODUCTS[packet]].shape[-1]


def _exponentials(args: tuple) -> int:
    """Steps, directions, channels and states of a scan with these canonical arguments."""
    u, delta, A, B, C, D, z, bias, _, orders, *_ = args
    return u.shape[0] * u.shape[2] * directions_of(orders, u, delta, A, B, C, D, z, bias) * A.shape[1] * A.shape[2]


def operations_of(
    model: torch.nn.Module, batch: int, side: int, device: torch.device, dtype: torch.dtype | None
) -> list[Operation]:
    """The operations of a forward pass, and of one with its backward pass, each timed by itself."""
    given, run = sample(batch, side, device), call_of(model, device, dtype)
    with Watch() as seen:
        with torch.no_grad():
            run(*given)
        seen.which = "both"
        run(*given).float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for kind, operation in seen.found.items():
            operation.milliseconds = captured_microseconds(seen.examples.pop(kind), device) / 1e3
    return list(seen.found.values())


def product_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """Operations per millisecond of one large product."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=dtype or torch.float32)
    return 2 * side**3 / captured_microseconds(functools.partial(torch.mm, a, a), device) * 1e3


def exponential_rate(device: torch.device) -> float | None:
    """Exponentials per millisecond of an NVIDIA chip at its highest clock; None for others."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    from triton.runtime import driver

    known = driver.active.utils.get_device_properties(torch.cuda.current_device())
    return EXPONENTIALS * known["multiprocessor_count"] * known["sm_clock_rate"]  # in kHz


def lines(
    operations: list[Operation], measured: dict[str, float], rates: tuple[float, float | None]
) -> Iterator[tuple[str, ...]]:
    """Cells of both passes from "pass" on."""
    for which in PASSES:
        kinds = [[o for o in operations if o.scan == scan] for scan in (False, True)]
        calls = (str(sum(o.calls[which] for o in each)) for each in kinds)
        times = [sum(o.spent(which) for o in each) for each in kinds]
        work = [sum(o.calls[which] * o.work for o in each) for each in kinds]
        limit = "" if rates[1] is None else f"{work[0] / rates[0] + work[1] / rates[1]:.2f}"
        took, floor = measured[which], sum(times)
        label = "forward" if which == "forward" else "forward + backward"
        yield label, *calls, *(f"{t:.2f}" for t in (*times, floor, took)), f"{took / floor:.2f}", limit


def tell_each(operations: list[Operation]) -> None:
    """Print the operations, those first that take longest."""
    for o in sorted(operations, key=lambda o: -o.spent("both")):
        rate = o.work / o.milliseconds / (1e6 if o.scan else 1e9)
        print(f"  {o.spent('both'):9.3f} ms = {o.calls['both']:4d} x {o.milliseconds:8.4f} ms, "
              f"{rate:7.1f} {'G exponentials/s' if o.scan else 'TFLOP/s'}  {o.name}")  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, ("dim:L-256", "dim:H-256", "dimsum:L/2"), "256", "128")
    made.add_argument("--each", action="store_true", help="also every operation of forward + backward")
    return fill_in(made.parse_args(arguments), GPU | {"pixels": [256]}, CPU | {"pixels": [128]})


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    check(args)
    device, dtype = torch.device(args.device), TYPES[args.dtype]
    print(hardware(device, torch.get_num_threads()))
    rates = product_rate(device, dtype), exponential_rate(device)
    print(f"a large product: {rates[0] / 1e9:.1f} TFLOP/s", end="")
    print("" if rates[1] is None else f"; exponentials: {rates[1] / 1e6:.0f} G/s", flush=True)
    table = []
    for pixels, name in itertools.product(args.pixels, args.models):
        model, size = make(Case(pixels, name, "model", "captured"), args)
        batch, tokens = tokens_of(size, args)
        operations = operations_of(model, batch, size.side, device, dtype)
        if args.each:
            print(f"{name}, {pixels} pixels")
            tell_each(operations)
        measured = measure(model, batch, size.side, device, dtype, device.type == "cuda")
        table += [(str(pixels), f"{batch} x {tokens}", name, *cells) for cells in lines(operations, measured, rates)]
        for cells in table[-2:]:
            print(f"{name}, {pixels} pixels, {cells[3]}: floor {cells[8]} ms, measured {cells[9]} ms", flush=True)
    print()
    print_table(HEAD, table, args.csv)
    print("x floor: time measured over the floor")


if __name__ == "__main__":
    cli(main)
