"""Draw images or clips from a run or a pipeline folder: ``python sample.py --model runs/digits --out images``.

Image i starts from the noise of a generator seeded ``--seed`` + i and gets the label number i of ``--class-labels``, or
the text number i of ``--prompt``, over and over. It does not depend on the batch size or on the number of processes, so
the same command under ``accelerate launch`` or ``torchrun`` writes the same files, faster; and a broken-off one goes on
where it stopped.

Models of human motion have options of their own (``python sample.py --model runs/motion --help``):
``python sample.py --model runs/motion --prompt "a person walks in a circle" --seconds 6 --out walk.bvh``.
"""

import argparse
import hashlib
import inspect
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from genssm import env, motion_samples
from genssm.data.video import FORMATS as VIDEO_FORMATS
from genssm.data.video import Clip, write_clip
from genssm.devices import device_option, means_cpu
from genssm.errors import cli
from genssm.kernels import dispatch
from genssm.metrics.generated import sampler_settings
from genssm.motion_samples import makes_motion
from genssm.pipelines.loading import load_pipeline
from genssm.schedulers import SCHEDULER_NAMES, swap_scheduler
from genssm.solvers import ADAPTIVE_METHODS, FIXED_METHODS
from genssm.training.checkpoint import resolve_pipeline
from genssm.training.samples import grid_columns, make_grid

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORD, PARTIAL = "samples.json", ".partial-"
CALL = ("height", "width", "num_inference_steps", "guidance_scale", "guidance_interval", "guidance_rescale",
        "guidance_power", "temperature", "top_k", "top_p")  # fmt: skip
# CALL: arguments of pipelines that are options of the same name; a pipeline gets those that it knows.


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to draw")
    what.add_argument("--model", required=True, help="run (its newest checkpoint), checkpoint or pipeline folder")
    what.add_argument("--class-labels", nargs="+", metavar="LABEL", help='indices or names, or "all" (the default)')
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts, for a model that reads text")
    what.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from; default: no text")
    what.add_argument("--num-images", type=positive, help="default: one for each label or text; 16 without")
    what.add_argument("--seed", type=int, default=0, help="seed of image 0; image i has seed + i (default: 0)")
    what.add_argument("--height", type=int, help="pixels; default: what the model was made for")
    what.add_argument("--width", type=int)
    how = parser.add_argument_group("how to sample")
    how.add_argument("--num-inference-steps", type=positive, default=50, help="steps of the scheduler (default: 50)")
    how.add_argument("--scheduler", choices=SCHEDULER_NAMES, help="another sampler than the model's own")
    how.add_argument("--ode-solver", choices=ADAPTIVE_METHODS + FIXED_METHODS, help="for flow models, e.g. dopri5")
    how.add_argument("--ode-rtol", type=float, default=1e-3, help="relative tolerance of --ode-solver (default: 1e-3)")
    how.add_argument("--ode-atol", type=float, default=1e-6, help="absolute tolerance of --ode-solver (default: 1e-6)")
    how.add_argument("--guidance-scale", type=float, default=1.0, help="classifier-free guidance; 1 is none (default)")
    how.add_argument("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"),
                     help="times with guidance, 0 data to 1 noise (default: 0 1)")  # fmt: skip
    how.add_argument("--guidance-rescale", type=float, default=0.0, help="0 to 1 (default: 0)")
    how.add_argument("--guidance-power", type=float, default=0.0, help="less near the data; DiMSUM: 4 (default: 0)")
    how.add_argument("--temperature", type=float, default=1.0, help="models of codes: 0 takes the best (default: 1)")
    how.add_argument("--top-k", type=int, default=0, help="models of codes: draw from the k best (default: 0, all)")
    how.add_argument(
        "--top-p", type=float, default=1.0, help="models of codes: draw from the nucleus (default: 1, all)"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--out", required=True, type=Path, help="folder for 000000.png, 000001.png, ... and " + RECORD)
    where.add_argument("--video-format", choices=VIDEO_FORMATS, default="gif", help="of clips (default: gif)")
    where.add_argument("--fps", type=float, default=8.0, help="frames per second of clips (default: 8)")
    where.add_argument("--grid", type=Path, help="also one picture of all images, small ones enlarged")
    where.add_argument("--upscale", type=positive, help="enlarge the images of --grid by this factor")
    where.add_argument("--overwrite", action="store_true", help="replace images that other settings have made")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch-size", type=positive, default=64, help="images at once in each process (default: 64)")
    machine.add_argument("--device", type=device_option, help="default: the accelerator, else the CPU")
    machine.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    machine.add_argument("--compile", action="store_true", help="compile the denoiser's repeated blocks")
    args = parser.parse_args(arguments)
    if args.fps <= 0:
        parser.error(f"argument --fps: {args.fps:g} frames per second; expected more than 0")
    if min(args.ode_rtol, args.ode_atol) <= 0:
        parser.error(f"tolerances are {args.ode_rtol:g} and {args.ode_atol:g}; expected more than 0")
    tolerances = [key for key in ("ode_rtol", "ode_atol") if getattr(args, key) != parser.get_default(key)]
    if tolerances and args.ode_solver not in ADAPTIVE_METHODS:
        parser.error(f"tolerances are for the adaptive ODE solvers: {', '.join(ADAPTIVE_METHODS)}")
    args.of_clips = [f"--{key.replace('_', '-')}" for key in ("video_format", "fps")
                     if getattr(args, key) != parser.get_default(key)]  # fmt: skip
    args.changed = [key for key in (*CALL, "scheduler", "ode_solver") if getattr(args, key) != parser.get_default(key)]
    return args


def load(folder: Path, args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    """The pipeline in a folder, on its device, with the sampler asked for."""
    pipe = load_pipeline(folder, dtype=DTYPES[args.dtype]).to(device)
    if not hasattr(pipe, "denoiser"):
        raise ValueError(f"the {type(pipe).__name__} in {folder} draws no images; give a run of a model that does")
    if not is_video(pipe) and args.of_clips:
        raise ValueError(f"{', '.join(args.of_clips)}: for clips, but the model in {folder} makes images; leave it out")
    idle = [key for key in args.changed if key not in known(pipe) and not (key == "scheduler" and has_scheduler(pipe))]
    if idle:
        options = ", ".join("--" + key.replace("_", "-") for key in idle)
        raise ValueError(f"{options}: no option of {type(pipe).__name__}, the pipeline in {folder}; leave it out")
    if args.scheduler:
        pipe.scheduler = swap_scheduler(pipe.scheduler, args.scheduler)
    if args.compile:
        pipe.denoiser.compile_repeated_blocks()
    return pipe


def known(pipe: DiffusionPipeline) -> set[str]:
    """Names of the arguments that a pipeline takes."""
    return set(inspect.signature(type(pipe).__call__).parameters)


def has_scheduler(pipe: DiffusionPipeline) -> bool:
    """Whether another sampler can be put in; a model that draws code by code has none."""
    return "scheduler" in pipe.components


def is_video(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline makes clips."""
    return bool(pipe.denoiser.config.get("num_frames"))


def choose_texts(pipe: DiffusionPipeline, args: argparse.Namespace) -> dict:
    """Texts to go through and to lead away from, as far as they are given; refuses what does not fit the model."""
    reads = bool(pipe.denoiser.config.get("context_dim"))
    if reads and "prompt" not in known(pipe):
        raise ValueError(
            f"this model reads text, but a {type(pipe).__name__} takes no prompt; save it in one that does"
        )
    if reads and (args.prompt is None or args.class_labels is not None):
        raise ValueError("this model reads text; give --prompt and no --class-labels")
    if not reads and (args.prompt is not None or args.negative_prompt is not None):
        raise ValueError("this model reads no text; leave --prompt and --negative-prompt out")
    if not reads:
        return {}
    negative = {} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}
    return {"prompt": args.prompt, **negative}


def choose_labels(pipe: DiffusionPipeline, given: list[str] | None) -> list[int] | None:
    """Indices of the classes to go through, None for a model without classes."""
    if pipe.denoiser.config.get("context_dim"):
        return None
    classes = pipe.denoiser.config.get("num_classes", 0)
    if given == ["all"] or (given is None and classes):
        given = list(range(classes))
    return pipe.resolve_labels(given, None)[0] if given else None


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of a pipeline's configurations and weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def describe(
    args: argparse.Namespace, folder: Path, pipe: DiffusionPipeline, labels: list[int] | None, texts: dict
) -> dict:
    """Everything that decides the images: two runs with equal settings on equal machines make equal files."""
    device = pipe.device
    return {
        "pipeline_sha256": fingerprint(folder),
        "seed": args.seed,
        "class_labels": labels,
        **texts,
        **({"video_format": args.video_format, "fps": args.fps} if is_video(pipe) else {}),
        "scheduler": sampler_settings(pipe),
        "ode_solver": args.ode_solver and {"method": args.ode_solver, "rtol": args.ode_rtol, "atol": args.ode_atol},
        **{key: getattr(args, key) for key in CALL if key in known(pipe)},
        "dtype": args.dtype,
        "compile": args.compile,
        "device": env.device_name(device) if device.type != "cpu" else "cpu",
        "backends": {op: dispatch.resolve(op, "auto", torch.empty(1, device=device)) for op in env.OPS},
    }


def made(out: Path) -> list[Path]:
    """The images and clips in ``out``."""
    files = [path for path in out.glob("[0-9]*.*") if path.suffix in (".png", *VIDEO_FORMATS.values())]
    return files + [path for path in out.glob("[0-9]" * 6) if path.is_dir()]


def check_folder(out: Path, settings: dict, overwrite: bool) -> bool:
    """Whether images that lie in ``out`` may stay; refuses those of other settings unless they may be replaced."""
    if overwrite or not out.exists():
        return False
    images = made(out)
    record = out / RECORD
    found = json.loads(record.read_text())["settings"] if record.is_file() else {}
    if not images or found == settings:
        return True
    differ = [key for key in settings if found.get(key) != settings[key]] if found else ["no " + RECORD]
    raise FileExistsError(
        f"{out} holds {len(images)} images of other settings ({', '.join(differ)}); "
        "choose another --out or replace them with --overwrite"
    )


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(PARTIAL + path.name)
    remove(partial)
    save(partial)
    partial.replace(path)


def remove(path: Path) -> None:
    """Delete a file, or the folder of a clip's frames."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def prepare(args: argparse.Namespace, record: dict, state: PartialState) -> list[Path]:
    """Make the output folder ready; returns the files to be made, the same in every process."""
    keep = check_folder(args.out, record["settings"], args.overwrite)
    state.wait_for_everyone()
    if state.is_main_process:
        args.out.mkdir(parents=True, exist_ok=True)
        for old in (*args.out.glob(PARTIAL + "*"), *([] if keep else made(args.out))):
            remove(old)
        write(args.out / RECORD, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    state.wait_for_everyone()
    suffix = VIDEO_FORMATS[args.video_format] if "video_format" in record["settings"] else ".png"
    files = [args.out / f"{i:06d}{suffix}" for i in range(record["num_images"])]
    missing = [path for path in files if not path.exists()]
    state.wait_for_everyone()
    return missing


def draw(pipe: DiffusionPipeline, files: list[Path], args: argparse.Namespace, settings: dict, quiet: bool) -> None:
    """Make the images with these file names, whose numbers are their places."""
    labels, prompts = settings["class_labels"], settings.get("prompt")
    call = {key: settings[key] for key in CALL if key in settings}
    if args.ode_solver:
        options = {} if args.ode_solver in FIXED_METHODS else {"rtol": args.ode_rtol, "atol": args.ode_atol}
        call |= {"ode_solver": args.ode_solver, "ode_options": options}
    if "negative_prompt" in settings:
        call |= {"negative_prompt": settings["negative_prompt"]}
    many = len(files) > args.batch_size  # then progress counts images, else steps
    pipe.set_progress_bar_config(disable=many or quiet)
    with tqdm(total=len(files), unit="image", disable=quiet or not many) as bar:
        for first in range(0, len(files), args.batch_size):
            batch = files[first : first + args.batch_size]
            places = [int(path.stem) for path in batch]
            call |= {"generator": [torch.Generator().manual_seed(args.seed + i) for i in places]}
            if prompts:
                call |= {"prompt": [prompts[i % len(prompts)] for i in places]}
            else:
                count = "num_videos" if is_video(pipe) else "num_images"
                call |= {"class_labels": [labels[i % len(labels)] for i in places] if labels else None}
                call |= {count: len(places)}
            if is_video(pipe):
                for path, frames in zip(batch, pipe(**call).frames):
                    write(path, lambda path, frames=frames: write_clip(frames, path, args.fps))
            else:
                for path, image in zip(batch, pipe(**call).images):
                    write(path, lambda path, image=image: image.save(path, format="PNG"))
            bar.update(len(batch))


def draw_grid(args: argparse.Namespace, count: int, classes: int, video: bool) -> Image.Image:
    """One picture of all images; of clips each frame, a clip in a row."""
    if not video:
        pictures = [Image.open(args.out / f"{i:06d}.png") for i in range(count)]
        return make_grid(pictures, grid_columns(count, classes), args.upscale)
    clips = [Clip(args.out / f"{i:06d}{VIDEO_FORMATS[args.video_format]}") for i in range(count)]
    return make_grid([frame for clip in clips for frame in clip], len(clips[0]), args.upscale)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, draw what is missing, write files and the grid."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if makes_motion(arguments):
        motion_samples.main(arguments)
        return
    args = parse_args(arguments)
    folder = resolve_pipeline(args.model)
    state = PartialState(cpu=means_cpu(args.device))
    device = torch.device(args.device) if args.device and state.num_processes == 1 else state.device
    pipe = load(folder, args, device)
    texts = choose_texts(pipe, args)
    labels = choose_labels(pipe, args.class_labels)
    record = {
        "settings": describe(args, folder, pipe, labels, texts),
        "num_images": args.num_images or len(labels or texts.get("prompt", ())) or 16,
        "model": str(args.model),
        "pipeline": str(folder),
        "command": ["sample.py", *arguments],
        "processes": state.num_processes,
        "versions": env.versions(),
    }

    missing = prepare(args, record, state)
    start = time.perf_counter()
    draw(pipe, missing[state.process_index :: state.num_processes], args, record["settings"], not state.is_main_process)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    if missing:
        seconds = time.perf_counter() - start
        print(f"{len(missing)} images in {seconds:.1f} s ({len(missing) / seconds:.2f} per second)")
    print(f"images    {args.out} ({record['num_images']} files, {len(missing)} new)")
    if args.grid:
        args.grid.parent.mkdir(parents=True, exist_ok=True)
        grid = draw_grid(args, record["num_images"], len(labels or ()), is_video(pipe))
        write(args.grid, lambda path: grid.save(path, format="PNG"))
        print(f"grid      {args.grid}")


if __name__ == "__main__":
    cli(main)
