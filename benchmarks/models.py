"""Time and memory of whole denoisers beside a diffusion transformer of the same width, depth and patch, in one run.

    python -m benchmarks.models                     the sizes of the papers on a GPU, small versions on a CPU
    python -m benchmarks.models --models zigma:B/2 dim:L-256 --modes eager compiled captured
    python -m benchmarks.models --models zigma:B/2 --pixels 256                  the shortest that compares

Inputs are latents of images (8 pixels to a latent). A batch holds ``--tokens`` tokens, so that every row works through
the same number. The transformer is diffusers' DiTTransformer2DModel (scaled-dot-product attention). Weights stay
float32; ``--dtype`` is the autocast type, as in training. Models run as they are (eager), with their blocks compiled,
or captured: forward and backward pass as recorded CUDA graphs, which leaves the GPU's own time, without Python's. A
ratio above 1 means faster than the transformer in the same mode. Where the memory does not suffice a cell is "-", and
the table goes on; ``--tokens`` makes the batches smaller. A captured pass keeps its memory, so its peak is not
measured.
"""

import argparse
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
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


@dataclass
class Row:
    """One measured model at one size; milliseconds, MiB beyond weights and inputs, NaN for what ran out of memory."""

    pixels: int
    batch: int
    tokens: int
    name: str
    mode: str
    parameters: int
    forward: float
    both: float
    forward_memory: float | None
    both_memory: float | None


@dataclass(frozen=True)
class Size:
    """What two models are compared at."""

    width: int
    layers: int
    patch: int
    side: int  # of the latents


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["zigma:B/2", "dimsum:L/2", "dim:L-256"], metavar="NAME:PRESET",
                        help="default: zigma:B/2 dimsum:L/2 dim:L-256")  # fmt: skip
    parser.add_argument("--pixels", nargs="+", type=int, help="sides of images (default: 256 512; CPU: 128 256)")
    parser.add_argument("--tokens", type=int, help="tokens in a batch (default: 8192; CPU: 1024)")
    parser.add_argument("--width", type=int, help="hidden_size (default: the presets'; CPU: 128)")
    parser.add_argument("--layers", type=int, help="num_layers (default: the presets'; CPU: 5)")
    parser.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=TYPES, help="autocast type (default: bfloat16; CPU: float32)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"], help="how models run (default: eager)")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    return fill_in(parser.parse_args(arguments), GPU, CPU)


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


def measure(
    model: torch.nn.Module, batch: int, side: int, device: torch.device, dtype: torch.dtype | None, captured: bool
) -> dict[str, float | None]:
    """Times of a forward pass, and of one with its backward pass; their peak memory, unless they are captured."""
    model = model.to(device).train()
    inputs = torch.randn(batch, CHANNELS, side, side, device=device)
    times = torch.linspace(0, 999, batch, device=device).long()
    labels = torch.arange(batch, device=device) % CLASSES
    leaves, spec = tree_flatten(((inputs, times, labels), {}))
    recorded: list[ForwardGraph] = []

    def run(inputs: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            return model(inputs, timestep=times, class_labels=labels, return_dict=False)[0]

    trained = TrainingGraphs(run, model.parameters()) if captured else run

    @torch.no_grad()
    def forward() -> None:
        if not captured:
            run(inputs, times, labels)
            return
        if not recorded:
            recorded.append(ForwardGraph(run, leaves, spec))
        recorded[0](leaves)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        trained(inputs, times, labels).float().square().mean().backward()

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


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """Every model at every size, each followed by the transformer of its size, in each mode."""
    device = torch.device(args.device)
    for pixels in args.pixels:
        side = pixels // PIXELS_PER_LATENT
        for name in args.models:
            size = None
            for which in (name, "dit"):
                for mode in args.modes:
                    torch.manual_seed(0)
                    with device:  # where a large model has its initial weights soonest
                        model, size = build(which, size, args, side)
                    tokens = (side // size.patch) ** 2
                    batch = max(args.tokens // tokens, 1)
                    if mode == "compiled":
                        torch.compiler.reset()  # models of a kind share what is compiled, and its limit of variants
                        _compile(model)
                    parameters = sum(p.numel() for p in model.parameters())
                    label = which if which != "dit" else f"dit as {name}"
                    found = measure(model, batch, side, device, TYPES[args.dtype], mode == "captured")
                    yield Row(pixels, batch, tokens, label, mode, parameters, **found)
                    del model
                    gc.collect()


def _compile(model: torch.nn.Module) -> None:
    """Compile each repeated block; diffusers' DiT names none."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True)


def lines(found: list[Row]) -> list[tuple[str, ...]]:
    """Cells of the table; ratios to the transformer of the same size in the same mode."""
    table, base = [], {}
    for row in found:
        if row.name.startswith("dit as "):
            base[row.pixels, row.mode, row.name.removeprefix("dit as ")] = row
    for row in found:
        other = base[row.pixels, row.mode, row.name.removeprefix("dit as ")]
        memory = ("" if m is None else f"{m:,.0f}" for m in (row.forward_memory, row.both_memory))
        cells = (
            str(row.pixels), f"{row.batch} x {row.tokens}", row.name, row.mode, f"{row.parameters / 1e6:.1f} M",
            f"{row.forward:.1f}", f"{row.both:.1f}", f"{other.forward / row.forward:.2f}",
            f"{other.both / row.both:.2f}", *memory,
        )  # fmt: skip
        table.append(tuple("-" if cell == "nan" else cell for cell in cells))
    return table


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if "captured" in args.modes and torch.device(args.device).type != "cuda":
        raise ValueError(f"--modes captured records CUDA graphs, which {args.device} does not have")
    sizes = [side for side in args.pixels if side < PIXELS_PER_LATENT or side % PIXELS_PER_LATENT]
    if sizes:
        raise ValueError(f"--pixels {sizes[0]} is not a multiple of {PIXELS_PER_LATENT}, the pixels of a latent")
    for name in args.models:  # mistakes are found before the first model is timed
        with torch.device("meta"):
            build(name, None, args, args.pixels[0] // PIXELS_PER_LATENT)
    print(hardware(torch.device(args.device), torch.get_num_threads()))
    found = []
    for row in rows(args):
        found.append(row)
        figures = ("out of memory" if math.isnan(ms) else f"{ms:.1f} ms" for ms in (row.forward, row.both))
        peaks = [m for m in (row.forward_memory, row.both_memory) if m is not None and not math.isnan(m)]
        memory = "".join(f", {m:,.0f} MiB" for m in peaks)
        times = "{} forward, {} with backward".format(*figures)
        print(f"{row.pixels}  {row.name}, {row.mode}: {times}{memory}", flush=True)
    print()
    print_table(HEAD, lines(found), args.csv)


if __name__ == "__main__":
    cli(main)
