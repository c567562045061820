"""Samples against the true picture of their caption: ``python -m genssm.metrics.pairs --help``.

For data in which a caption has one right picture, such as drawings under their names, the squared error to it says more
than a distance between distributions: a held-out combination of known words is drawn right, or it is not.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from genssm import errors
from genssm.config import DataConfig, load_data_config
from genssm.data import ImageDataset, build_dataset
from genssm.devices import device_option
from genssm.metrics.generated import model_facts
from genssm.metrics.report import versions
from genssm.pipelines import TextToImagePipeline
from genssm.pipelines.loading import load_pipeline
from genssm.schedulers import SCHEDULER_NAMES, swap_scheduler
from genssm.training.checkpoint import resolve_pipeline
from genssm.training.samples import make_grid

FORMAT = "genssm-pairs-1"
EPILOG = """\
examples
  the two test splits of the emoji, on the data that the run was trained with:
    python -m genssm.metrics.pairs --model runs/emoji_64 --split test_tone test_gender --report pairs.json
  another folder, four samples of each caption, guidance, and a picture of the first 16 pairs:
    python -m genssm.metrics.pairs --model runs/emoji_64 --split test --samples 4 --guidance-scale 1.5 \\
      --picture pairs.png path=drawings
"""


def pair_errors(truth: torch.Tensor, samples: torch.Tensor) -> dict[str, float]:
    """Errors of samples against the true pictures.

    Args:
        truth: (N, C, H, W), in 0..1.
        samples: (N, K, C, H, W), K samples of each.

    Returns:
        ``mse``: mean squared error of a sample; ``mse_error``: its standard error over the pictures; ``psnr``: mean of
        -10 log10 of each picture's error, in dB; ``mse_of_mean``: squared error of the mean of the K samples.

    Raises:
        ValueError: shapes disagree.
    """
    if samples.dim() != 5 or samples.shape[0] != truth.shape[0] or samples.shape[2:] != truth.shape[1:]:
        raise ValueError(
            f"samples are {tuple(samples.shape)}; expected {len(truth)} times K times {tuple(truth.shape[1:])}"
        )
    truth, samples = truth.double(), samples.double()
    each = (samples - truth[:, None]).square().flatten(2).mean(dim=2).mean(dim=1)  # (N,)
    spread = each.std().item() / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return {
        "mse": each.mean().item(),
        "mse_error": spread,
        "psnr": (-10 * each.clamp(min=1e-12).log10()).mean().item(),
        "mse_of_mean": (samples.mean(dim=1) - truth).square().mean().item(),
    }


def draw_samples(
    pipe: DiffusionPipeline,
    captions: Sequence[str],
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    **call: Any,
) -> torch.Tensor:
    """Samples of captions: sample k of caption i starts from the noise of a generator seeded seed + count i + k.

    Args:
        pipe: a text-to-image pipeline.
        captions: N texts.
        count: K, samples of each.
        seed: of the first sample.
        batch_size: samples at once; the result does not depend on it.
        progress: show a bar.
        call: further arguments of the pipeline.

    Returns:
        (N, K, C, H, W), in 0..1, on the CPU.
    """
    places, parts = range(len(captions) * count), []
    with tqdm(total=len(places), unit="image", disable=not progress) as bar:
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            images = pipe(
                [captions[i // count] for i in batch],
                generator=[torch.Generator().manual_seed(seed + i) for i in batch],
                output_type="pt",
                **call,
            ).images
            parts.append(images.cpu())
            bar.update(len(batch))
    return torch.cat(parts).unflatten(0, (len(captions), count))


def true_pictures(dataset: ImageDataset) -> tuple[torch.Tensor, list[str]]:
    """All pictures of a data set (N, C, H, W), in 0..1, and the first caption of each.

    Raises:
        ValueError: the data are no captioned images.
    """
    if not isinstance(dataset, ImageDataset) or len(dataset.item_shape) != 3 or dataset.captions is None:
        raise ValueError("pairs are captions and images; name a data set of images and set caption=COLUMN")
    items = [dataset[i] for i in range(len(dataset))]
    return torch.stack([item["pixel_values"] / 2 + 0.5 for item in items]), [item["text"] for item in items]


def picture(truth: torch.Tensor, samples: torch.Tensor, columns: int = 16) -> Image.Image:
    """Rows of true pictures with the first sample of each below."""
    rows = []
    for start in range(0, len(truth), columns):
        rows += [truth[start : start + columns], samples[start : start + columns, 0]]
    if len(truth) > columns and len(truth) % columns:  # fill the last two rows
        missing = columns - len(truth) % columns
        rows[-2:] = [torch.cat([row, torch.ones(missing, *row.shape[1:])]) for row in rows[-2:]]
    pixels = (torch.cat(rows) * 255).round().to(torch.uint8)
    images = [Image.fromarray(p[0].numpy() if len(p) == 1 else p.permute(1, 2, 0).numpy()) for p in pixels]
    return make_grid(images, min(columns, len(truth)))


def data_of(model: str, overrides: Sequence[str]) -> DataConfig:
    """The data section of the run that ``model`` lies in, if there is one, with changes."""
    places = [Path(model), *Path(model).resolve().parents]
    config = next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)
    return load_data_config(config, overrides)


def parser() -> argparse.ArgumentParser:
    """Every option, with its meaning."""
    result = argparse.ArgumentParser(
        prog="python -m genssm.metrics.pairs",
        description="Mean squared error of samples to the true pictures of the captions of a split, pixels in 0..1.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run's data section")
    result.add_argument("--model", required=True, help="run (its newest checkpoint), checkpoint or pipeline folder")
    result.add_argument("--split", nargs="+", help="splits to measure; default: that of the data section")
    result.add_argument("--samples", type=int, default=1, help="samples of each caption (default: 1)")
    result.add_argument("--num-inference-steps", type=int, default=50, help="steps of the scheduler (default: 50)")
    result.add_argument("--guidance-scale", type=float, default=1.0, help="1 is none (default)")
    result.add_argument("--scheduler", choices=SCHEDULER_NAMES, help="another sampler than the model's own")
    result.add_argument("--seed", type=int, default=0, help="seed of the first sample (default: 0)")
    result.add_argument("--batch-size", type=int, default=64, help="samples at once (default: 64)")
    result.add_argument(
        "--device",
        type=device_option,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    result.add_argument("--report", type=Path, help="write the numbers and the whole protocol as JSON")
    result.add_argument("--picture", type=Path, help="write a picture of truth and sample, one pair above the other")
    result.add_argument("--pictured", type=int, default=64, help="pairs of each split in it (default: 64)")
    return result


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every split; the report."""
    for name in ("samples", "num_inference_steps", "batch_size", "pictured"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected at least 1")
    folder = resolve_pipeline(options.model)
    pipe = load_pipeline(folder)
    if not isinstance(pipe, TextToImagePipeline):
        raise ValueError(f"{folder} holds a {type(pipe).__name__}; pairs are measured of a TextToImagePipeline")
    if options.scheduler:
        pipe.scheduler = swap_scheduler(pipe.scheduler, options.scheduler)
    pipe = pipe.to(options.device)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    data = data_of(options.model, options.overrides)
    results, pictures = {}, []
    for split in options.split or [data.split]:
        truth, captions = true_pictures(build_dataset(data, split=split, cache="none"))
        samples = draw_samples(
            pipe, captions, options.samples, seed=options.seed, batch_size=options.batch_size, progress=True, **settings
        )
        results[split] = {"pictures": len(truth), **pair_errors(truth, samples)}
        pictures.append((truth[: options.pictured], samples[: options.pictured]))
    if options.picture:
        shown = picture(*(torch.cat(parts) for parts in zip(*pictures)))
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        shown.save(options.picture)
    return {
        "format": FORMAT,
        "results": results,
        "samples_per_caption": options.samples,
        "sampling": {**settings, "scheduler": json.loads(pipe.scheduler.to_json_string()), "seed": options.seed},
        "data": {"name": data.name, "path": data.path, "caption": data.caption, "resolution": data.resolution},
        "model": model_facts(folder),
        "device": str(options.device),
        "versions": versions(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    options = parser().parse_intermixed_args(arguments)
    report = evaluate(options)
    print(f"{'split':<16}{'pictures':>9}{'MSE':>11}{'+-':>9}{'PSNR dB':>9}{'MSE of mean':>13}")
    for split, row in report["results"].items():
        print(
            f"{split:<16}{row['pictures']:>9}{row['mse']:>11.5f}{row['mse_error']:>9.5f}{row['psnr']:>9.2f}"
            f"{row['mse_of_mean']:>13.5f}"
        )
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"report -> {options.report}")


if __name__ == "__main__":
    errors.cli(main)
