"""What the ops' benchmarks share: timing, peak memory, the table, the command line.

A benchmark first compares every backend with the reference and stops where they disagree: a wrong kernel has no speed.
"""

import argparse
import csv
import ctypes
import gc
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SECONDS = 1.0  # spent on one figure, beyond its first run


@dataclass(frozen=True)
class Contender:
    """Something that computes the op: a name and a function of the shape's arguments that returns the result."""

    name: str
    call: Callable[..., Tensor]


@dataclass
class Row:
    """One line of the table; times in milliseconds (NaN: out of memory), memory in MiB, speeds in 1e9 elements/s."""

    shape: str
    name: str
    elements: int
    forward: float
    both: float
    memory: float | None
    data: float  # MiB of inputs, results and the gradients of both

    def speed(self, milliseconds: float) -> float:
        return self.elements / milliseconds / 1e6


def parser(description: str, shapes: Sequence[str], letters: str) -> argparse.ArgumentParser:
    """The options that the benchmarks have in common."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, xpu")
    made.add_argument("--shapes", nargs="+", default=list(shapes), metavar=letters, help="sizes joined by x")
    made.add_argument("--backends", default="all", help="names joined by commas; all: every one that runs here")
    made.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="type of the inputs"
    )
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    made.add_argument("--no-alternatives", action="store_true", help="leave out other libraries and the usual loop")
    made.add_argument("--captured", action="store_true", help="time replayed CUDA graphs, without the host's part")
    made.add_argument("--csv", type=Path, help="also write the table to this file")
    return made


def check_captured(args: argparse.Namespace) -> None:
    """Refuse ``--captured`` where there are no graphs.

    Raises:
        ValueError: the device is not a CUDA device.
    """
    if args.captured and torch.device(args.device).type != "cuda":
        raise ValueError(f"--captured needs a CUDA device, not {args.device}")


def fill_in(args: argparse.Namespace, gpu: dict[str, Any], cpu: dict[str, Any]) -> argparse.Namespace:
    """Give options that were left out the values of the device that ``args.device`` names."""
    for name, value in (cpu if torch.device(args.device).type == "cpu" else gpu).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def sizes(shape: str, letters: str) -> tuple[int, ...]:
    """Numbers of a shape such as 4x256x384x16.

    Raises:
        ValueError: not as many positive numbers as letters.
    """
    parts = shape.split("x")
    if len(parts) != len(letters.split("x")) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"shape {shape!r}, expected positive numbers {letters}")
    return tuple(int(part) for part in parts)


def choose(names: str, possible: dict[str, str | None]) -> list[str]:
    """Backends to run.

    Args:
        names: "all" or names joined by commas.
        possible: every backend and why it cannot run here, or None.
    Raises:
        ValueError: an unknown name, or one that cannot run; says why.
    """
    if names == "all":
        return [name for name, reason in possible.items() if reason is None]
    chosen = names.split(",")
    for name in chosen:
        if name not in possible:
            raise ValueError(f"unknown backend {name!r}; choose from {', '.join(possible)}")
        if possible[name]:
            raise ValueError(f"backend {name!r} is not possible: {possible[name]}")
    return chosen


def check(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> float:
    """Largest relative RMS difference of two runs.

    Raises:
        ValueError: it exceeds the tolerance.
    """
    worst = 0.0
    for key, value in expected.items():
        difference = found[key].double().cpu() - value.double().cpu()
        error = (difference.norm() / value.double().norm().clamp_min(1e-12)).item()
        if not error <= tolerance:
            raise ValueError(f"{name} is wrong: {key} differs by {error:.1e} from the reference; nothing was timed")
        worst = max(worst, error)
    return worst


def gradients(call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The result for ``inputs`` and its gradients for a fixed random weighting of the result."""
    y = call(**inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, list(inputs.values()), weights)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(inputs, grads)}}


def measure(
    shape: str, elements: int, contender: Contender, inputs: dict[str, Tensor], *, captured: bool = False
) -> Row:
    """Time forward, and forward with backward; peak memory of the latter.

    ``captured`` times replayed CUDA graphs of both: without the host's part, which a model that is replayed never pays.
    """
    device = next(iter(inputs.values())).device
    weights = None

    def forward() -> None:
        with torch.no_grad():
            contender.call(**inputs)

    def both() -> None:
        nonlocal weights
        y = contender.call(**inputs)
        if weights is None:
            weights = torch.randn_like(y)
        torch.autograd.grad(y, list(inputs.values()), weights)

    prepared = capture if captured else lambda run: run
    forward_time = attempt(lambda: milliseconds(prepared(forward), device))
    both_time = attempt(lambda: milliseconds(prepared(both), device))
    memory = None if math.isnan(both_time) else attempt(lambda: peak_memory(both, device))
    data = data_size(*inputs.values(), *(() if weights is None else (weights,)))
    figures = ("out of memory" if math.isnan(ms) else f"{ms:.2f} ms" for ms in (forward_time, both_time))
    print(f"{shape}  {contender.name}: " + "{} forward, {} with backward".format(*figures), flush=True)
    return Row(shape, contender.name, elements, forward_time, both_time, memory, data)


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """The replay of a CUDA graph of ``run``."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are built before the recording
            run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def data_size(*tensors: Tensor) -> float:
    """MiB of inputs, results and the gradients of both."""
    return 2 * sum(x.nbytes for x in tensors) / 2**20


def attempt(figure: Callable[[], float | None]) -> float | None:
    """A figure, NaN where the device has not the memory for it; what it took is given back."""
    try:
        return figure()
    except torch.OutOfMemoryError:
        pass  # outside of this block nothing holds the frames that hold the tensors
    gc.collect()
    torch.cuda.empty_cache()
    return math.nan


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """Best time of one call on the CPU, median on an accelerator; of calls that take long, the second.

    As in `timeit`, Python collects no garbage meanwhile: behind a compiler that takes a second, and falls on any call.
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        return _milliseconds(run, device)
    finally:
        if collects:
            gc.enable()


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        run()  # kernels are built and optimised code is made before anything counts
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
        return taken * 1e3 if taken > _SECONDS else do_bench(run, return_mode="median")
    best, spent, repeats = float("inf"), 0.0, 0
    while repeats < 2 or (spent < _SECONDS and repeats < 100):
        start = time.perf_counter()
        run()
        synchronize(device)
        taken = time.perf_counter() - start
        best, spent, repeats = min(best, taken), spent + taken, repeats + 1
        if taken > 10 * _SECONDS:
            break
    return best * 1e3


_CALLS = 20  # in one captured graph


def captured_microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call; on CUDA of calls inside a captured graph, where no host is waited for."""

    def calls() -> None:
        for _ in range(_CALLS):
            call()

    if device.type == "cuda":
        calls()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        calls = graph.replay
    return 1000 * milliseconds(calls, device) / _CALLS


def peak_memory(run: Callable[[], None], device: torch.device) -> float | None:
    """MiB that one call needs beyond what was there before; None where the system does not say."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if device.type != "cpu" or not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept would hide what the call needs
    reset.write_text("5")  # forget the peak so far
    before = _resident(status, "VmRSS")
    run()
    return (_resident(status, "VmHWM") - before) / 1024


def _resident(status: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize()


def hardware(device: torch.device, threads: int) -> str:
    """One line on what the figures were taken with."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"


def print_table(head: Sequence[str], lines: Sequence[Sequence[str]], path: Path | None) -> None:
    """Print a table in Markdown, its columns aligned; write it as CSV to ``path``, if that is given."""
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    for line in (head, tuple("-" * width for width in widths), *lines):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")
    if path is not None:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows((head, *lines))


def report(rows: list[Row], baseline: str, path: Path | None) -> None:
    """Print the table, one shape after the other, with ratios to the slowest-known way; write it as CSV on request."""
    head = ("shape", "what", "forward ms", "fwd+bwd ms", "G el/s fwd", "G el/s both", "x fwd", "x both", "peak MiB",
            "x data")  # fmt: skip
    lines = []
    for row in rows:
        base = next((r for r in rows if r.shape == row.shape and r.name == baseline), None)
        ratios = ("", "") if base is None else (f"{base.forward / row.forward:.1f}", f"{base.both / row.both:.1f}")
        speeds = (f"{row.speed(row.forward):.3f}", f"{row.speed(row.both):.3f}")
        memory = ("", "") if row.memory is None else (f"{row.memory:.0f}", f"{row.memory / row.data + 0.5:.2f}")
        cells = (row.shape, row.name, f"{row.forward:.2f}", f"{row.both:.2f}", *speeds, *ratios, *memory)
        lines.append(tuple("-" if cell == "nan" else cell for cell in cells))
    print()
    print_table(head, lines, path)
    print("x data: peak memory over that of inputs, results and the gradients of both")
    if any(row.name == baseline for row in rows):
        print(f"x: times faster than {baseline!r} of the same shape")
    if any(math.isnan(row.both) for row in rows):
        print("-: out of memory")
