"""Motions from a run or a pipeline folder to files; ``sample.py`` comes here when its model makes motion."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from genssm import env
from genssm.data.motion.bvh import read_bvh
from genssm.data.motion.clips import joints_to_clip_features
from genssm.data.motion.export import ENDINGS, save_motion
from genssm.data.motion.folders import load_array
from genssm.devices import device_option
from genssm.metrics.motion_distances import jerk
from genssm.motion import Skeleton
from genssm.pipelines import TextToMotionPipeline
from genssm.pipelines.loading import load_pipeline
from genssm.pipelines.text_to_motion import PROMPT_SECONDS
from genssm.schedulers import SCHEDULER_NAMES, swap_scheduler
from genssm.training.checkpoint import resolve_pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def makes_motion(arguments: Sequence[str]) -> bool:
    """Whether the ``--model`` of a command line is a pipeline of motion."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model")
    model = parser.parse_known_args(arguments)[0].model
    if model is None:
        return False
    index = resolve_pipeline(model) / "model_index.json"
    try:
        return json.loads(index.read_text(encoding="utf-8")).get("_class_name") == TextToMotionPipeline.__name__
    except json.JSONDecodeError:
        return False  # who loads it will say so


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Draw motions: one for each prompt or action, or one after the other in a single motion (--long). "
        "Motion i starts from the noise of a generator seeded --seed + i.",
        epilog='example: python sample.py --model runs/motion --prompt "a person walks in a circle" --seconds 6 '
        "--out walk.bvh",
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("--model", required=True, help="run (its newest checkpoint), checkpoint or pipeline folder")
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="one text for each motion")
    what.add_argument("--class-labels", nargs="+", metavar="LABEL", help="actions by index or name, for such a model")
    what.add_argument("--seconds", nargs="+", type=float, help="length of all motions or of each (default: 6)")
    what.add_argument("--num-motions", type=int, help="how many of the one prompt or action")
    what.add_argument("--seed", type=int, default=0, help="seed of motion 0; motion i has seed + i (default: 0)")
    what.add_argument("--long", action="store_true", help="one motion that follows the prompts one after the other")
    what.add_argument("--transition-seconds", type=float, default=1.0, help="overlap of its segments (default: 1)")
    what.add_argument("--begin", type=Path, help="a .bvh, or joints as .npy, whose frames each motion begins with")
    what.add_argument("--begin-seconds", type=float, help="so much of the end of that file (default: 1)")
    what.add_argument("--end", type=Path, help="a file as for --begin, whose frames each motion ends with")
    what.add_argument("--end-seconds", type=float, help="so much of the beginning of that file (default: 1)")
    how = parser.add_argument_group("how to sample")
    how.add_argument("--num-inference-steps", type=int, default=50, help="steps of the scheduler (default: 50)")
    how.add_argument("--scheduler", choices=SCHEDULER_NAMES, help="another sampler than the model's own")
    how.add_argument("--guidance-scale", type=float, help="classifier-free guidance, 1 is none (default: 7.5, or 1)")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--out", required=True, type=Path, help=f"a file ({', '.join(ENDINGS)}), or a folder for several"
    )
    where.add_argument("--format", choices=[e[1:] for e in ENDINGS], default="bvh", help="of files in a folder (bvh)")
    where.add_argument("--overwrite", action="store_true", help="replace what is there")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", type=device_option, help="default: the accelerator, else the CPU")
    machine.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    machine.add_argument("--compile", action="store_true", help="compile the denoiser into one graph")
    args = parser.parse_args(arguments)
    for name in ("begin", "end"):
        if getattr(args, f"{name}_seconds") is not None and getattr(args, name) is None:
            parser.error(f"--{name}-seconds needs --{name}")
    if args.long and (args.begin is not None or args.end is not None or args.num_motions is not None):
        parser.error("--long makes one motion from its prompts; leave out --begin, --end and --num-motions")
    return args


def read_frames(path: Path, skeleton: Skeleton, seconds: float, *, first: bool = False) -> torch.Tensor:
    """Features (T, F), not normalised, of the last (or first) seconds of a .bvh file, or of joints (T, J, 3) as .npy.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that is shorter.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no motion at {path}")
    if path.suffix.lower() == ".bvh":
        joints = read_bvh(path.read_text(encoding="utf-8", errors="replace"), str(path)).recording().to_joints(skeleton)
    elif path.suffix.lower() == ".npy":
        joints = load_array(path, path).float()
    else:
        raise ValueError(f"{path}: frames are given as a .bvh file or joints as .npy")
    try:
        features = joints_to_clip_features(joints, skeleton)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    frames = round(seconds * skeleton.fps)
    if not 0 < frames <= len(features):
        raise ValueError(f"{path} has {len(features)} frames of features; {seconds:g} seconds are {frames}")
    return features[:frames] if first else features[-frames:]


def output_files(args: argparse.Namespace, count: int) -> list[Path]:
    """Files to write, whose folder is there.

    Raises:
        ValueError: one file for several motions, or a file of a kind that is not written.
        FileExistsError: a file is there already.
    """
    if args.out.suffix.lower() in ENDINGS:
        if count != 1:
            raise ValueError(
                f"--out {args.out} is one file and {count} motions are asked for; give a folder, or --long"
            )
        files = [args.out]
    elif args.out.suffix[1:].isalnum() and not args.out.suffix[1:].isdecimal() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: motions are written as {', '.join(sorted(ENDINGS))}, or into a folder")
    else:
        files = [args.out / f"{i:06d}.{args.format}" for i in range(count)]
    there = [path for path in files if path.exists()]
    if there and not args.overwrite:
        raise FileExistsError(f"{there[0]} exists; choose another --out or replace it with --overwrite")
    files[0].parent.mkdir(parents=True, exist_ok=True)
    return files


def main(arguments: Sequence[str]) -> None:
    """Load, draw, write files and what made them."""
    args = parse_args(arguments)
    folder = resolve_pipeline(args.model)
    pipe = load_pipeline(folder, dtype=DTYPES[args.dtype])
    device = args.device or (
        torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    )
    pipe.to(device)
    if args.scheduler:
        pipe.scheduler = swap_scheduler(pipe.scheduler, args.scheduler)
    if args.compile:
        # One clip is a handful of tokens: what takes time is launching kernels, so all of them are one CUDA graph.
        pipe.denoiser.compile(mode="reduce-overhead", fullgraph=True)
    if args.prompt and not pipe.denoiser.config.context_dim:
        names = pipe.config.class_names
        instead = f"name actions with --class-labels: {', '.join(names)}" if names else "leave out --prompt"
        raise ValueError(f"--prompt is given but the model of {folder} reads no text; {instead}")
    if args.class_labels and not pipe.denoiser.config.num_classes:
        reads = "reads text: give --prompt" if pipe.denoiser.config.context_dim else "has no actions"
        raise ValueError(f"--class-labels is given but the model of {folder} {reads}")
    prompts = args.prompt or [""]
    asked = {"class_labels": args.class_labels} if args.class_labels else {}
    if pipe.denoiser.config.context_dim:
        asked |= {"prompts" if args.long else "prompt": prompts}
    conditional = bool(asked)
    guidance = args.guidance_scale if args.guidance_scale is not None else 7.5 if conditional else 1.0
    call = {"num_inference_steps": args.num_inference_steps, "guidance_scale": guidance}
    seconds = args.seconds[0] if args.seconds and len(args.seconds) == 1 else args.seconds
    named = args.class_labels or prompts
    count = 1 if args.long else args.num_motions or len(named)
    files = output_files(args, count)
    start = time.perf_counter()
    if args.long:
        generator = torch.Generator().manual_seed(args.seed)
        call |= {"transition_seconds": args.transition_seconds}
        output = pipe.long(**asked, seconds=seconds, generator=generator, **call)
    else:
        generators = [torch.Generator().manual_seed(args.seed + i) for i in range(count)]
        known = given_frames(pipe, args, seconds)
        output = pipe(**asked, seconds=seconds, num_motions=args.num_motions, generator=generators, **known, **call)
    elapsed = time.perf_counter() - start
    titles = [" / ".join(named)] if args.long else [named[min(i, len(named) - 1)] for i in range(count)]
    for path, motion, title in zip(files, output.motions, titles):
        save_motion(path, motion, output.skeleton, title=title)
    record = {"command": list(sys.argv), "pipeline": str(folder), "asked": named, "versions": env.versions()}
    record |= {"seconds": [len(motion) / output.fps for motion in output.motions], "seed": args.seed, **call}
    (files[0].parent / f"{files[0].stem}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    made = sum(len(motion) for motion in output.motions) / output.fps
    print(f"{count} motion(s), {made:.1f} seconds of movement in {elapsed:.1f} s")
    for border in output.borders[0] if args.long else []:
        print(f"transition at {border / output.fps:.1f} s: {describe_transition(output.motions[0], border)}")
    print(f"files     {files[0]}" + (f" ... {files[-1].name}" if count > 1 else ""))


def given_frames(pipe: TextToMotionPipeline, args: argparse.Namespace, seconds: object) -> dict[str, torch.Tensor]:
    """Arguments of the pipeline for ``--begin`` and ``--end``: the given frames come first, and last."""
    if args.begin is None and args.end is None:
        return {}
    lengths = seconds if isinstance(seconds, list) else [PROMPT_SECONDS if seconds is None else seconds]
    if args.end is not None and len(set(lengths)) > 1:
        raise ValueError(f"--end needs motions of one length, not --seconds {' '.join(f'{x:g}' for x in lengths)}")
    skeleton, frames = pipe.skeleton, max(0, round(max(lengths) * pipe.skeleton.fps))
    known, given = torch.zeros(frames, skeleton.feature_dim), torch.zeros(frames, dtype=torch.bool)
    count = 0
    for path, length, last in ((args.begin, args.begin_seconds, False), (args.end, args.end_seconds, True)):
        if path is None:
            continue
        features = read_frames(path, skeleton, 1.0 if length is None else length, first=last)
        count += len(features)
        if count > frames:
            raise ValueError(f"{count} frames are given, more than the {frames} of the motion; raise --seconds")
        place = slice(frames - len(features), frames) if last else slice(len(features))
        known[place], given[place] = features, True
    return {"known_features": known, "known_frames": given}


def describe_transition(joints: torch.Tensor, border: int, half_width: int = 10) -> str:
    """The largest jerk around a border beside the median jerk of the motion."""
    curve = jerk(joints[None].float().cpu())[0]
    around = curve[max(border - half_width, 0) : border + half_width]
    return f"peak jerk {float(around.max()):.4f}, median of the motion {float(curve.median()):.4f} (per frame)"
