"""Evaluate clips against real ones: ``python -m genssm.metrics.video --help``."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from genssm import errors
from genssm.config import DataConfig
from genssm.devices import device_option
from genssm.metrics import report as reports
from genssm.metrics.clip_features import ClipFeatures, build_clip_extractor
from genssm.metrics.clips import (
    Cut,
    DrawnClips,
    add_cut_options,
    data_config,
    dataset_clips,
    folder_clips,
    make_cut,
    recorded_clips,
)
from genssm.metrics.features import RESIZE_MODES
from genssm.metrics.fid import Evaluated, compare, is_model, join_processes, open_pipeline
from genssm.metrics.generated import (
    add_drawing_options,
    choose_labels,
    drawing_arguments,
    model_facts,
    refuse_drawing_options,
    sampling_protocol,
)
from genssm.metrics.sources import ImageSource, SubsetSource, add_data_options
from genssm.metrics.statistics import Statistics, collect, is_statistics, load_statistics, save_statistics

EPILOG = """\
features
  i3d[:FILE]        the Frechet video distance (FVD) of the field: i3d_torchscript.pt as published with StyleGAN-V
  videomae[:DIR]    the same in a VideoMAE saved by transformers, which looks more at motion (Ge et al. 2024)
  torchscript:FILE  a network of yours, called with uint8 (B, F, 3, H, W) and returning (B, C)
  module:function   the same in Python, found in the current folder too
  frames:NET        every frame as an image, frame-wise FID and KID: inception (--weights, --resize-mode), clip[:DIR],
                    dinov2[:DIR], classifier:FILE, torchscript:FILE or module:function, called with uint8 (B, 3, H, W)
Files without a name lie in genssm's cache. Temporal flickering (VBench) is told beside every distance.

examples
  2,048 clips of a run on every GPU against its training set, statistics kept for the next time:
    accelerate launch -m genssm.metrics.video --samples runs/ucf --num-samples 2048 --reference dataset:runs/ucf \\
      --save-stats ucf.npz --report fvd.json
  the clips that sample.py wrote, as frames, against those statistics:
    python sample.py --model runs/ucf --num-images 2048 --video-format frames --out clips
    python -m genssm.metrics.video --samples clips --reference ucf.npz
  two folders of MP4, GIF, .npy or frames, 16 frames of each, every second one, brought to 128 pixels:
    python -m genssm.metrics.video --samples ours --reference real --frame-stride 2 --resolution 128
  the same, frame by frame:
    python -m genssm.metrics.video --samples ours --reference real --features frames:inception
  two results side by side, refused unless their protocols agree in everything but the guidance:
    python -m genssm.metrics.video --compare a.json b.json --allow sampling.guidance_scale
"""


def parser() -> argparse.ArgumentParser:
    """Every option, with its meaning."""
    result = argparse.ArgumentParser(
        prog="python -m genssm.metrics.video",
        usage="%(prog)s --samples SOURCE --reference SOURCE [options]\n       %(prog)s --compare A.json B.json",
        description="Distance between generated and real clips, in a report that holds the whole protocol: which\n"
        "frames, resize, network and its hash, counts, sampling, seeds, versions.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = result.add_argument_group("what is compared")
    what.add_argument(
        "--samples",
        metavar="SOURCE",
        help="folder of clips (folders of frames, .npy, .gif, .mp4, ...), pipeline or run",
    )
    what.add_argument(
        "--num-samples", type=int, metavar="N", help="clips to draw from a pipeline; of files: a subset (default: all)"
    )
    what.add_argument(
        "--reference",
        metavar="SOURCE",
        help="real clips: folder, dataset:NAME[:SPLIT], dataset:RUN (the data of a run); or statistics: .npz with mu "
        "and sigma, of --save-stats",
    )
    what.add_argument("--floor", metavar="SOURCE", help="also the distance of other real clips to the reference")
    add_cut_options(result)
    how = result.add_argument_group("features")
    how.add_argument("--features", default="i3d", metavar="NET", help="see below (default: %(default)s)")
    how.add_argument("--resize-mode", choices=RESIZE_MODES, help="of clean-fid, for frames:inception (default: clean)")
    how.add_argument("--weights", metavar="FILE", help="Inception weights, for frames:inception (default: cached)")
    how.add_argument("--no-kid", action="store_true", help="leave out the kernel distance; memory stays constant")
    how.add_argument("--batch-size", type=int, default=8, help="clips at a time (default: %(default)s)")
    how.add_argument("--device", type=device_option, help="cpu, cuda, ... (default: cuda where there is one)")
    draw = add_drawing_options(result)
    draw.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts in turn, for a model that reads text")
    draw.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from; default: no text")
    add_data_options(result)
    reports.add_result_options(result)
    return result


def named_data(spec: str, options: argparse.Namespace) -> tuple[DataConfig, str] | None:
    """The data set and the split of ``dataset:NAME[:SPLIT]``, None of another text."""
    if not spec.startswith("dataset:"):
        return None
    name, _, split = spec.removeprefix("dataset:").partition(":")
    config = data_config(name)
    return config if options.path is None else replace(config, path=options.path), split or "train"


def open_source(spec: str, options: argparse.Namespace, cut: Cut) -> ImageSource:
    """Real clips from the text of ``--reference`` or ``--floor``."""
    named = named_data(spec, options)
    return folder_clips(spec, cut) if named is None else dataset_clips(*named, cut)


def reference_statistics(options: argparse.Namespace, extractor: ClipFeatures, cut: Cut) -> Statistics:
    """The statistics of ``--reference``, read or collected."""
    path = Path(options.reference)
    if path.suffix == ".npz" and path.is_file() and is_statistics(path):
        if options.save_stats:
            raise ValueError(f"{path} holds statistics already; --save-stats is for a --reference of clips")
        found = load_statistics(path)
        reports.check_same_protocol(found, extractor.protocol, {**cut.protocol(), "features_of": extractor.of})
        return found  # told before hours of drawing
    return _collect(open_source(options.reference, options, cut), extractor, options)


def sample_statistics(
    options: argparse.Namespace, extractor: ClipFeatures, cut: Cut, reference: Statistics
) -> Evaluated:
    """The statistics of ``--samples``, and how they were drawn and from which model where that is known."""
    path = Path(options.samples)
    if is_model(path):
        return _draw(path, options, extractor, cut, reference)
    refuse_drawing_options(options, path, "prompt", "negative_prompt")
    recorded = recorded_clips(path, cut, options.num_samples)
    source, sampling, model = recorded or (folder_clips(path, cut), None, None)
    if recorded is None and options.num_samples is not None:
        source = SubsetSource(source, options.num_samples)
    return _collect(source, extractor, options), sampling, model


def _draw(
    path: Path, options: argparse.Namespace, extractor: ClipFeatures, cut: Cut, reference: Statistics
) -> Evaluated:
    count, seed, labels = options.num_samples, options.seed or 0, options.labels or "balanced"
    if count is None:
        raise ValueError(f"{path} is a model; say how many clips to draw with --num-samples")
    pipeline, folder = open_pipeline(path, extractor.device, getattr(torch, options.dtype or "float32"))
    config = getattr(getattr(pipeline, "denoiser", None), "config", {})
    if not config.get("num_frames"):
        raise ValueError(f"{path} makes no clips; python -m genssm.metrics.fid measures images")
    reads = bool(config.get("context_dim"))
    if reads != (options.prompt is not None):
        raise ValueError(f"{path} reads {'text; give --prompt' if reads else 'no text; leave --prompt out'}")
    if not reads and options.negative_prompt is not None:
        raise ValueError(f"{path} reads no text; leave --negative-prompt out")
    if reads and options.labels is not None:
        raise ValueError(f"{path} reads text; leave --labels out")
    call, num_classes = drawing_arguments(pipeline, options), config.get("num_classes", 0)
    classes = choose_labels(labels, count, num_classes, reference.class_counts, seed) if num_classes else None
    source = DrawnClips(
        pipeline, str(path), count, cut, classes, seed, options.prompt, options.negative_prompt, **call
    )  # fmt: skip
    protocol = sampling_protocol(source, labels, folder)
    return _collect(source, extractor, options), protocol, model_facts(folder)


def evaluate(options: argparse.Namespace) -> dict[str, Any] | None:
    """Do what the command line asks; the report, or None where only statistics were asked for."""
    if options.reference is None or not (options.samples or options.save_stats):
        raise ValueError("give --samples and --reference, or --reference and --save-stats, or --compare; see --help")
    if options.with_features and not options.save_stats:
        raise ValueError("--with-features is about the file of --save-stats; name it")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; expected at least 1")
    named = named_data(options.reference, options)
    cut = make_cut(options, None if named is None else named[0])
    state, device = join_processes(options.device)
    with state.main_process_first():  # one of them fetches the weights
        extractor = build_clip_extractor(
            options.features, cut.num_frames, resize=options.resize_mode, weights=options.weights, device=device
        )
    reference = reference_statistics(options, extractor, cut)
    if options.save_stats and state.is_main_process:
        save_statistics(options.save_stats, reference, with_features=options.with_features)
        print(f"statistics of {reference.name}: {reference.count} {extractor.of} -> {options.save_stats}")
    if options.samples is None:
        return None
    samples, sampling, model = sample_statistics(options, extractor, cut, reference)
    floor = _floor(options, extractor, cut, samples)
    if not state.is_main_process:
        return None
    report = reports.build_report(
        samples, reference, sampling=sampling, model=model, floor=floor, with_kid=not options.no_kid
    )
    print(reports.table(report))
    print(reports.one_line(report))
    if options.report:
        reports.save_report(options.report, report)
        print(f"report -> {options.report}")
    return report


def _floor(options: argparse.Namespace, extractor: ClipFeatures, cut: Cut, samples: Statistics) -> Statistics | None:
    """Other real clips: as many as there are samples, or all if there are fewer."""
    if options.floor is None:
        return None
    source, count = open_source(options.floor, options, cut), samples.count // extractor.rows
    return _collect(SubsetSource(source, count) if len(source) > count else source, extractor, options)


def _collect(source: ImageSource, extractor: ClipFeatures, options: argparse.Namespace) -> Statistics:
    keep = not options.no_kid or options.with_features
    return collect(source, extractor, batch_size=options.batch_size, keep_features=keep, progress=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if options.compare:
        compare(options)
    else:
        evaluate(options)


if __name__ == "__main__":
    errors.cli(main)
