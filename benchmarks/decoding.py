"""Seconds for the codes of images, drawn one after the other by AiM with guidance, and what a step spends them on.

    python -m benchmarks.decoding                                AiM-B at 8 and 64 images and AiM-XL at 8 on a GPU
    python -m benchmarks.decoding --models L:16 --profile
    python -m benchmarks.decoding --device cpu --models B:1 --layers 2 --tokens-side 4

Weights are random, since time does not depend on them; codes are not turned into pixels. "step" is one replay of the
captured graph (a step of the plain loop where there is none); the rest of the time is the condition, the launches and
the end. A guided batch has twice as many rows as images.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from genssm.devices import device_option
from genssm.errors import cli
from genssm.kernels.benchmarking import fill_in, hardware, print_table, synchronize
from genssm.models import AIM_PRESETS, AiM, VQTokenizer
from genssm.pipelines import AutoregressiveImagePipeline

GPU = {"models": ["B:8", "B:64", "XL:8"], "dtype": "bfloat16", "tokens_side": 16}
CPU = {"models": ["B:1"], "dtype": "float32", "tokens_side": 8}
HEAD = ("model", "parameters", "images", "codes", "guidance", "seconds", "images per second", "step ms")
REPEATS = 5


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="PRESET:IMAGES", help="default: B:8 B:64 XL:8; CPU: B:1")
    parser.add_argument("--tokens-side", type=int, help="side of the grid of codes (default: 16; CPU: 8)")
    parser.add_argument("--layers", type=int, help="num_layers (default: the presets')")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="1 is none, at half the cost")
    parser.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights (default: bfloat16; CPU: float32)")
    parser.add_argument("--plain", action="store_true", help="also the plain loop, without a captured graph")
    parser.add_argument("--profile", action="store_true", help="also the kernels of one step (GPU)")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    return fill_in(parser.parse_args(arguments), GPU, CPU)


def build(preset: str, args: argparse.Namespace) -> AutoregressiveImagePipeline:
    """The model with random weights, beside a tokenizer that nothing is asked of."""
    torch.manual_seed(0)
    depth = {} if args.layers is None else {"num_layers": args.layers}
    settings = {**AIM_PRESETS[preset], **depth, "sample_size": args.tokens_side, "num_classes": 1000}
    model = AiM(**settings).to(args.device)
    for name, parameter in model.named_parameters():  # as from_pretrained(torch_dtype=...) loads them
        if name.rpartition(".")[2] not in model._keep_in_fp32_modules:
            parameter.data = parameter.data.to(getattr(torch, args.dtype))
    tokenizer = VQTokenizer(
        base_channels=32, channel_multipliers=[1], num_vq_embeddings=model.config.vocab_size, vq_embed_dim=8
    )
    pipe = AutoregressiveImagePipeline(model.eval(), tokenizer.to(args.device))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(pipe: AutoregressiveImagePipeline, images: int, graph: bool, args: argparse.Namespace) -> tuple:
    """Seconds of a call, median, and milliseconds of a step."""
    device = torch.device(args.device)

    def call() -> float:
        start = time.perf_counter()
        generators = [torch.Generator().manual_seed(i) for i in range(images)]
        pipe([i % 1000 for i in range(images)], guidance_scale=args.guidance_scale, generator=generators,
             output_type="latent", cuda_graph=graph)  # fmt: skip
        synchronize(device)
        return time.perf_counter() - start

    call()  # kernels are built and the graph is captured before anything counts
    taken = sorted(call() for _ in range(REPEATS))[REPEATS // 2]
    codes = pipe.model.num_tokens
    decoder = pipe.kept_decoder
    if not graph or decoder is None or decoder.graph is None:
        return taken, taken / codes * 1e3
    decoder.rewind()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(codes - 1):
        decoder.step()
    synchronize(device)
    return taken, (time.perf_counter() - start) / (codes - 1) * 1e3


def profile_step(pipe: AutoregressiveImagePipeline) -> None:
    """Print the kernels of one replay of the graph."""
    decoder = pipe.kept_decoder
    decoder.rewind()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        decoder.step()
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    total, launches = sum(k.self_device_time_total for k in kernels), sum(k.count for k in kernels)
    print(f"one step: {launches} launches, {total / 1e3:.3f} ms in kernels")
    for kernel in kernels[:10]:
        print(f"  {kernel.self_device_time_total / 1e3:8.3f} ms  {kernel.count:4d} x  {kernel.key[:90]}")


def rows(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Cells of the table, model by model."""
    for name in args.models:
        preset, _, images = name.partition(":")
        pipe = build(preset, args)
        size = sum(p.numel() for p in pipe.model.parameters())
        graphs = torch.device(args.device).type == "cuda"
        for graph in (True, False) if graphs and args.plain else (graphs,):
            seconds, step = measure(pipe, int(images), graph, args)
            label = f"AiM-{preset}{'' if graph else ', plain loop'}"
            yield (
                label, f"{size / 1e6:.1f} M", images, str(pipe.model.num_tokens), f"{args.guidance_scale:g}",
                f"{seconds:.3f}", f"{int(images) / seconds:.1f}", f"{step:.3f}",
            )  # fmt: skip
            if graph and args.profile and pipe.kept_decoder.graph is not None:
                profile_step(pipe)
        del pipe


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    for name in args.models:  # mistakes are found before the first model is timed
        preset, _, images = name.partition(":")
        if preset not in AIM_PRESETS or not images.isdigit() or int(images) < 1:
            raise ValueError(f"--models {name}: expected PRESET:IMAGES with a preset of {', '.join(AIM_PRESETS)}")
    if (args.plain or args.profile) and torch.device(args.device).type != "cuda":
        raise ValueError(f"--plain and --profile are about a captured graph, which {args.device} does not have")
    if args.tokens_side < 1 or (args.layers is not None and args.layers < 1):
        raise ValueError("--tokens-side and --layers must be 1 or more")
    print(hardware(torch.device(args.device), torch.get_num_threads()))
    table = []
    for line in rows(args):
        table.append(line)
        print(f"{line[0]}, {line[2]} images: {line[5]} s, {line[7]} ms a step", flush=True)
    print()
    print_table(HEAD, table, args.csv)


if __name__ == "__main__":
    cli(main)
