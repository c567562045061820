"""Time and memory of whole denoisers beside a diffusion transformer of the same width, depth and patch, in one run.

    python -m benchmarks.models                     the sizes of the papers on a GPU, small versions on a CPU
    python -m benchmarks.models --models zigma:B/2 dim:L-256 --modes eager compiled captured
    python -m benchmarks.models --models zigma:B/2 --pixels 256                  the shortest that compares
    python -m benchmarks.models --pixels 256 512 1024 2048 --modes captured --equal --processes 4

Inputs are latents of images (8 pixels to a latent). A batch holds ``--tokens`` tokens, so that every row works through
the same number. The transformer is diffusers' DiTTransformer2DModel (scaled-dot-product attention); ``--equal`` adds
one with as many layers as bring its parameters nearest to the model's. Weights stay float32; ``--dtype`` is the
autocast type, as in training. Models run as they are (eager), with their blocks compiled, or captured: forward and
backward pass as recorded CUDA graphs, which leaves the GPU's own time, without Python's. A ratio above 1 means faster
than the transformer of the same width and depth in the same mode; with several sizes, a second table says from which
one on a model wins. ``--processes`` measures so many rows at a time, each process on a GPU of its own. Where the
memory does not suffice a cell is "-", and the table goes on; ``--tokens`` makes the batches smaller. A captured pass
keeps its memory, so its peak is not measured.
"""

import argparse
import gc
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch.utils._pytree import tree_flatten

from genssm.devices import device_option
from genssm.errors import cli
from genssm.graphs import ForwardGraph, TrainingGraphs
from genssm.kernels.benchmarking import attempt, fill_in, hardware, milliseconds, peak_memory, print_table
from genssm.models import DIM_PRESETS, DIMSUM_PRESETS, MODELS, ZIGMA_PRESETS

PRESETS = {"dim": DIM_PRESETS, "dimsum": DIMSUM_PRESETS, "zigma": ZIGMA_PRESETS}
GPU = {"width": None, "layers": None, "pixels": [256, 512], "tokens": 8192, "dtype": "bfloat16"}
CPU = {"width": 128, "layers": 5, "pixels": [128, 256], "tokens": 1024, "dtype": "float32"}
MODES = ("eager", "compiled", "captured")
CHANNELS, CLASSES, PIXELS_PER_LATENT = 4, 1000, 8
TYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD = ("pixels", "batch x tokens", "model", "mode", "parameters", "forward ms", "fwd+bwd ms", "x fwd", "x both",
        "forward MiB", "training MiB")  # fmt: skip


LABELS = {"model": "{}", "dit": "dit as {}", "equal": "dit of equal parameters as {}"}
WINS = ("model wins", "against", "mode", "forward", "fwd+bwd", "forward memory", "training memory")


@dataclass(frozen=True)
class Case:
    """What a row measures."""

    pixels: int
    name: str  # NAME:PRESET
    which: str  # a key of LABELS: that model, or a transformer beside it
    mode: str

    @property
    def label(self) -> str:
        """How the table calls it."""
        return LABELS[self.which].format(self.name)


@dataclass
class Row:
    """A measured case; milliseconds, MiB beyond weights and inputs, NaN for what ran out of memory or failed."""

    case: Case
    batch: int
    tokens: int
    parameters: int
    forward: float = math.nan
    both: float = math.nan
    forward_memory: float | None = math.nan
    both_memory: float | None = math.nan
    problem: str = ""  # why it failed
    seconds: float = 0.0  # until it was measured


@dataclass(frozen=True)
class Size:
    """What two models are compared at."""

    width: int
    layers: int
    patch: int
    side: int  # of the latents


def parser(description: str, models: Sequence[str], gpu: str, cpu: str) -> argparse.ArgumentParser:
    """The options of benchmarks of whole models; default models, and default pixels on a GPU and on a CPU."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", default=list(models), metavar="NAME:PRESET",
                      help=f"default: {' '.join(models)}")  # fmt: skip
    made.add_argument("--pixels", nargs="+", type=int, help=f"sides of images (default: {gpu}; CPU: {cpu})")
    made.add_argument("--tokens", type=int, help="tokens in a batch (default: 8192; CPU: 1024)")
    made.add_argument("--width", type=int, help="hidden_size (default: the presets'; CPU: 128)")
    made.add_argument("--layers", type=int, help="num_layers (default: the presets'; CPU: 5)")
    made.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=TYPES, help="autocast type (default: bfloat16; CPU: float32)")
    made.add_argument("--csv", type=Path, help="also write the table to this file")
    return made


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, ("zigma:B/2", "dimsum:L/2", "dim:L-256"), "256 512", "128 256")
    made.add_argument("--modes", nargs="+", choices=MODES, default=["eager"], help="how models run (default: eager)")
    made.add_argument("--equal", action="store_true", help="also a transformer of equal parameters")
    made.add_argument("--processes", type=int, default=1, metavar="N", help="rows at a time, GPU by GPU (default: 1)")
    return fill_in(made.parse_args(arguments), GPU, CPU)


def check(args: argparse.Namespace) -> None:
    """Find mistakes before the first model is timed.

    Raises:
        ValueError: a size or a model that there is not.
    """
    sizes = [side for side in args.pixels if side < PIXELS_PER_LATENT or side % PIXELS_PER_LATENT]
    if sizes:
        raise ValueError(f"--pixels {sizes[0]} is not a multiple of {PIXELS_PER_LATENT}, the pixels of a latent")
    for name in args.models:
        with torch.device("meta"):
            build(name, None, args, args.pixels[0] // PIXELS_PER_LATENT)


def build(name: str, size: Size | None, args: argparse.Namespace, side: int) -> tuple[torch.nn.Module, Size]:
    """A denoiser with classes for latents of ``side``, and its size; NAME:PRESET, or "dit" with the size of another."""
    if name == "dit":
        head = next(h for h in (64, 72, 32, 16, 8, 4, 2, 1) if size.width % h == 0)
        model = DiTTransformer2DModel(
            num_attention_heads=size.width // head, attention_head_dim=head, in_channels=CHANNELS,
            num_layers=size.layers, sample_size=side, patch_size=size.patch, num_embeds_ada_norm=CLASSES,
        )  # fmt: skip
        return model, size
    model_name, _, preset = name.partition(":")
    if model_name not in PRESETS:
        raise ValueError(f"unknown model {model_name!r}; expected one of {', '.join(PRESETS)}")
    if preset not in PRESETS[model_name]:
        raise ValueError(f"{model_name} has no preset {preset!r}; it has {', '.join(PRESETS[model_name])}")
    arguments = {**PRESETS[model_name][preset], "sample_size": side, "in_channels": CHANNELS, "num_classes": CLASSES}
    given = {"hidden_size": args.width, "num_layers": args.layers}
    arguments |= {key: value for key, value in given.items() if value is not None}
    model = MODELS[model_name](**arguments)
    config = model.config
    return model, Size(config.hidden_size, config.num_layers, config.patch_size, side)


def count(model: torch.nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def equal_depth(parameters: int, size: Size, args: argparse.Namespace) -> int:
    """Layers of the transformer of this width whose parameters come nearest to so many."""
    one, two = (count(build("dit", replace(size, layers=n), args, size.side)[0]) for n in (1, 2))
    return max(1 + round((parameters - one) / (two - one)), 1)


def make(case: Case, args: argparse.Namespace) -> tuple[torch.nn.Module, Size]:
    """The model of a case, in training, where it is measured, and its size."""
    side = case.pixels // PIXELS_PER_LATENT
    name, size = case.name, None
    if case.which != "model":
        with torch.device("meta"):
            model, size = build(case.name, None, args, side)
            if case.which == "equal":
                size = replace(size, layers=equal_depth(count(model), size, args))
        name = "dit"
    torch.manual_seed(0)
    with torch.device(args.device):  # where a large model has its initial weights soonest
        model, size = build(name, size, args, side)
    return model.to(args.device).train(), size


def tokens_of(size: Size, args: argparse.Namespace) -> tuple[int, int]:
    """Images of a batch and tokens of an image."""
    tokens = (size.side // size.patch) ** 2
    return max(args.tokens // tokens, 1), tokens


def sample(batch: int, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, times and labels of a batch."""
    times = torch.linspace(0, 999, batch, device=device).long()
    labels = torch.arange(batch, device=device) % CLASSES
    return torch.randn(batch, CHANNELS, side, side, device=device), times, labels


def call_of(model: torch.nn.Module, device: torch.device, dtype: torch.dtype | None) -> Callable[..., torch.Tensor]:
    """The model as a function of latents, times and labels, under autocast to ``dtype``."""

    def run(inputs: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            return model(inputs, timestep=times, class_labels=labels, return_dict=False)[0]

    return run


def measure(
    model: torch.nn.Module, batch: int, side: int, device: torch.device, dtype: torch.dtype | None, captured: bool
) -> dict[str, float | None]:
    """Times of a forward pass, and of one with its backward pass; their peak memory, unless they are captured."""
    given, run = sample(batch, side, device), call_of(model, device, dtype)
    leaves, spec = tree_flatten((given, {}))
    recorded: list[ForwardGraph] = []
    trained = TrainingGraphs(run, model.parameters()) if captured else run

    @torch.no_grad()
    def forward() -> None:
        if not captured:
            run(*given)
            return
        if not recorded:
            recorded.append(ForwardGraph(run, leaves, spec))
        recorded[0](leaves)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        trained(*given).float().square().mean().backward()

    def figure(of: Callable[..., float | None], call: Callable[[], None]) -> float | None:
        def measured() -> float | None:
            call()  # kernels are built, optimised code is made and graphs are recorded before anything counts
            model.zero_grad(set_to_none=True)  # its gradients would hide those of the measured call
            return of(call, device)

        found = attempt(measured)
        model.zero_grad(set_to_none=True)
        recorded.clear()
        return found

    peak = (lambda call: None) if captured else (lambda call: figure(peak_memory, call))
    return {
        "forward": figure(milliseconds, forward),
        "both": figure(milliseconds, both),
        "forward_memory": peak(forward),
        "both_memory": peak(both),
    }


def measure_case(case: Case, args: argparse.Namespace) -> Row:
    """One row."""
    start, device = time.perf_counter(), torch.device(args.device)
    model, size = make(case, args)
    batch, tokens = tokens_of(size, args)
    row = Row(case, batch, tokens, count(model))
    if case.mode == "compiled":
        torch.compiler.reset()  # models of a kind share what is compiled, and its limit of variants
        _compile(model)
    try:
        found = measure(model, batch, size.side, device, TYPES[args.dtype], case.mode == "captured")
        row = replace(row, **found)
    except RuntimeError as error:  # of a compiler, for one; the other rows are wanted all the same
        row.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    del model
    gc.collect()
    return replace(row, seconds=time.perf_counter() - start)


def cases(args: argparse.Namespace) -> list[Case]:
    """Every model at every size, each followed by the transformers beside it, in each mode."""
    kinds = [which for which in LABELS if which != "equal" or args.equal]
    return [Case(*each) for each in itertools.product(args.pixels, args.models, kinds, args.modes)]


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each case, as they are done."""
    if args.processes == 1:
        yield from (measure_case(case, args) for case in cases(args))
        return
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for place in range(args.processes):
        places.put(place)
    with ProcessPoolExecutor(args.processes, context, _settle, (places, args.device)) as pool:
        longest_first = sorted(cases(args), key=lambda case: case.mode != "compiled")
        for done in as_completed([pool.submit(measure_case, case, args) for case in longest_first]):
            yield done.result()


def _settle(places: multiprocessing.Queue, device: str) -> None:
    """Take a GPU for this process."""
    place = places.get()
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(place % torch.cuda.device_count())


def _compile(model: torch.nn.Module) -> None:
    """Compile each repeated block; diffusers' DiT names none."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True)


def lines(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """Cells of the table; ratios to the transformer of the same size in the same mode."""
    table, by_case = [], {row.case: row for row in found}
    for row in found:
        case, other = row.case, by_case[replace(row.case, which="dit")]
        memory = ("" if m is None else f"{m:,.0f}" for m in (row.forward_memory, row.both_memory))
        ratios = (f"{other.forward / row.forward:.2f}", f"{other.both / row.both:.2f}")
        cells = (
            str(case.pixels), f"{row.batch} x {row.tokens}", case.label, case.mode, f"{row.parameters / 1e6:.1f} M",
            f"{row.forward:.1f}", f"{row.both:.1f}", *ratios, *memory,
        )  # fmt: skip
        table.append(tuple("-" if cell == "nan" else cell for cell in cells))
    return table


def winners(found: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """From which size on each model wins against each transformer, in each mode; ``found`` holds all cases."""
    by_case = {row.case: row for row in found}
    sizes = sorted({row.case.pixels for row in found}, reverse=True)
    for kind in (case for case in by_case if case.pixels == sizes[0] and case.which != "model"):
        others = [by_case[replace(kind, pixels=pixels)] for pixels in sizes]
        owns = [by_case[replace(row.case, which="model")] for row in others]
        cells = []
        for figure in ("forward", "both", "forward_memory", "both_memory"):
            pairs = [(getattr(own, figure), getattr(other, figure)) for own, other in zip(owns, others)]
            if any(row.problem for row in (*owns, *others)) or None in itertools.chain(*pairs):
                cells.append("")  # not all was measured
                continue
            ahead = sum(1 for _ in itertools.takewhile(lambda pair: _less(*pair), pairs))
            cells.append(f"from {sizes[ahead - 1]} on" if ahead else f"not at {sizes[0]}")
        yield kind.name, kind.label, kind.mode, *cells


def _less(own: float, other: float) -> bool:
    """Whether a figure is smaller; one that ran out of memory is larger than any."""
    return own < other or (math.isnan(other) and not math.isnan(own))


def tell(row: Row) -> str:
    """One line on a row that is done."""
    figures = ("out of memory" if math.isnan(ms) else f"{ms:.1f} ms" for ms in (row.forward, row.both))
    peaks = [m for m in (row.forward_memory, row.both_memory) if m is not None and not math.isnan(m)]
    memory = "".join(f", {m:,.0f} MiB" for m in peaks)
    said = row.problem or "{} forward, {} with backward".format(*figures) + memory
    return f"{row.case.pixels}  {row.case.label}, {row.case.mode}: {said} ({row.seconds:.0f} s)"


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if "captured" in args.modes and torch.device(args.device).type != "cuda":
        raise ValueError(f"--modes captured records CUDA graphs, which {args.device} does not have")
    if args.processes < 1:
        raise ValueError(f"--processes {args.processes}: expected 1 or more")
    check(args)
    print(hardware(torch.device(args.device), torch.get_num_threads()))
    found = []
    for row in rows(args):
        found.append(row)
        print(tell(row), flush=True)
    order = cases(args)
    found.sort(key=lambda row: order.index(row.case))
    print()
    print_table(HEAD, lines(found), args.csv)
    if len(args.pixels) > 1:
        print()
        print_table(WINS, list(winners(found)), None)
    return int(any(row.problem for row in found))


if __name__ == "__main__":
    cli(main)
