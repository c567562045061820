"""Seconds for a long motion: the frame-level Motion Mamba beside an attention denoiser of the same size.

    python -m benchmarks.motion_frames                         10,000 frames on a GPU, 2,000 on a CPU
    python -m benchmarks.motion_frames --frames 196 2000 10000 --dtype bfloat16 --csv frames.csv

Both denoise frames without a VAE, through the same pipeline, in one call for the whole motion: sampling steps with
guidance, that is two passes of the denoiser in each, then joints. Weights are random, since time does not depend on
them. The attention denoiser is MLD's form without VAE, of the same width and depth, its feed-forwards as wide as makes
the numbers of parameters equal. A ratio above 1 means faster than attention.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from genssm.devices import device_option
from genssm.errors import cli
from genssm.kernels.benchmarking import fill_in, hardware, peak_memory, print_table
from genssm.models import MLD, MotionMambaFrames
from genssm.motion import T2M
from genssm.pipelines import TextToMotionPipeline

GPU = {"width": 256, "layers": 9, "frames": [10000], "steps": 50, "dtype": "float32"}
CPU = {"width": 64, "layers": 3, "frames": [500, 2000], "steps": 2, "dtype": "float32"}
TYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT_WIDTH = 256
HEAD = ("frames", "model", "parameters", "steps", "seconds", "frames per second", "x attention", "MiB")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", nargs="+", type=int, help="lengths (default: 10000; CPU: 500 2000)")
    parser.add_argument("--steps", type=int, help="steps of the sampler (default: 50; CPU: 2)")
    parser.add_argument("--width", type=int, help="hidden_size of both (default: 256; CPU: 64)")
    parser.add_argument("--layers", type=int, help="num_layers of both (default: 9; CPU: 3)")
    parser.add_argument("--patch", type=int, default=1, help="frames of a token of Motion Mamba (default: 1)")
    parser.add_argument("--device", type=device_option, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=TYPES, help="autocast type (default: float32, none)")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    return fill_in(parser.parse_args(arguments), GPU, CPU)


def size_of(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def denoisers(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """Both denoisers, of equal width, depth and number of parameters.

    Raises:
        ValueError: the transformer has more parameters than Motion Mamba without any feed-forward.
    """
    common = {"in_channels": T2M.feature_dim, "hidden_size": args.width, "num_layers": args.layers}
    common["context_dim"] = TEXT_WIDTH
    mamba = MotionMambaFrames(**common, patch_size=args.patch, channel_group=16)

    def attention(ff_size: int) -> MLD:
        # Fixed positions: a learned table of 10,000 rows would count as parameters and compute nothing.
        positions = {"pos_embed": "sinusoidal", "num_positions": max(args.frames) + 2}
        return MLD(**common, **positions, num_heads=4, ff_size=ff_size, dropout=0.0)

    with torch.device("meta"):
        narrow, wider = size_of(attention(1)), size_of(attention(2))
    ff_size = 1 + round((size_of(mamba) - narrow) / (wider - narrow))
    if ff_size < 1:
        raise ValueError(f"attention of width {args.width} is larger than Motion Mamba of that width; change --width")
    return {"motion_mamba_frames": mamba, "attention": attention(ff_size)}


def measure(denoiser: torch.nn.Module, frames: int, args: argparse.Namespace) -> tuple[float, float | None]:
    """Seconds for a motion of so many frames, and the peak memory beyond the weights in MiB, None on a CPU."""
    device, dtype = torch.device(args.device), TYPES[args.dtype]
    numbers: dict[str, Any] = {"mean": [0.0] * T2M.feature_dim, "std": [0.05] * T2M.feature_dim}
    scheduler = DDIMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2", clip_sample=False)
    pipe = TextToMotionPipeline(denoiser.eval(), scheduler, **numbers).to(device)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(2, 1, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))

    def run(steps: int, cuda_graph: bool = True) -> None:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            pipe(
                prompt_embeds=text[:1], null_prompt_embeds=text[1:], num_frames=frames, num_inference_steps=steps,
                guidance_scale=2.5, generator=torch.Generator().manual_seed(0), cuda_graph=cuda_graph,
            )  # fmt: skip
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    run(1)  # kernels are built before anything counts
    memory = peak_memory(lambda: run(1, cuda_graph=False), device)  # a recorded evaluation keeps what it needs
    start = time.perf_counter()
    run(args.steps)
    return time.perf_counter() - start, memory


def rows(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Cells of the table, Motion Mamba and attention at each length."""
    for frames in args.frames:
        torch.manual_seed(0)
        models = denoisers(args)
        found = {name: measure(model, frames, args) for name, model in models.items()}
        for name, (seconds, memory) in found.items():
            ratio = found["attention"][0] / seconds
            yield (
                f"{frames:,}", name, f"{size_of(models[name]) / 1e6:.2f} M", str(args.steps), f"{seconds:.3g}",
                f"{frames / seconds:,.0f}", f"{ratio:.2f}", "" if memory is None else f"{memory:,.0f}",
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if min(args.frames) < 2 or args.steps < 1:
        raise ValueError("--frames must be 2 or more each, and --steps 1 or more")
    print(hardware(torch.device(args.device), torch.get_num_threads()))
    table = []
    for line in rows(args):
        table.append(line)
        print(f"{line[0]} frames  {line[1]}: {line[4]} s", flush=True)
    print()
    print_table(HEAD, table, args.csv)


if __name__ == "__main__":
    cli(main)
