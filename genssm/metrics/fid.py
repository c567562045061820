"""Evaluate samples against real images: ``python -m genssm.metrics.fid --help``."""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from genssm import errors
from genssm.devices import device_option, means_cpu
from genssm.metrics import report as reports
from genssm.metrics.features import RESIZE_MODES, ClassifierFeatures, FeatureExtractor, build_extractor
from genssm.metrics.generated import (
    PipelineSource,
    add_drawing_options,
    choose_labels,
    drawing_arguments,
    model_facts,
    recorded_samples,
    refuse_drawing_options,
    sampling_protocol,
)
from genssm.metrics.sources import (
    ImageSource,
    NoiseSource,
    SubsetSource,
    add_data_options,
    dataset_source,
    file_source,
)
from genssm.metrics.statistics import Statistics, collect, is_statistics, load_statistics, save_statistics

EPILOG = """\
examples
  samples in a folder against a folder, FID by clean-fid's protocol:
    python -m genssm.metrics.fid --samples out/ --reference real/ --report fid.json
  50,000 samples of a run against its training set, on every GPU, statistics kept for the next time:
    accelerate launch -m genssm.metrics.fid --samples runs/cifar10 --num-samples 50000 --guidance-scale 1.5 \\
      --reference dataset:runs/cifar10 --save-stats cifar10.npz --report fid.json
  small grey images, where Inception means little: features of a classifier, with landmarks:
    python -m genssm.metrics.classifier --data digits --out digits.safetensors
    python -m genssm.metrics.fid --samples runs/demo --num-samples 1000 --reference dataset:digits \\
      --features classifier:digits.safetensors --floor --noise-ceiling
  two results side by side, refused unless their protocols agree in everything but the guidance:
    python -m genssm.metrics.fid --compare a.json b.json --allow sampling.guidance_scale
"""

Evaluated = tuple[Statistics, dict[str, Any] | None, dict[str, Any] | None]


def parser() -> argparse.ArgumentParser:
    """Every option, with its meaning."""
    result = argparse.ArgumentParser(
        prog="python -m genssm.metrics.fid",
        usage="%(prog)s --samples SOURCE --reference SOURCE [options]\n       %(prog)s --compare A.json B.json",
        description="Distance between samples and real images, in a report that holds the whole protocol. It is\n"
        "called FID only in the Inception features of the FID protocol; with other features its name says so.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = result.add_argument_group("what is compared")
    what.add_argument("--samples", metavar="SOURCE", help="folder of images, .npz, pipeline folder or run folder")
    what.add_argument(
        "--num-samples", type=int, metavar="N", help="images to draw from a pipeline; of files: a subset (default: all)"
    )
    what.add_argument(
        "--reference",
        metavar="SOURCE",
        help="real images: folder, .npz, dataset:NAME[:SPLIT], dataset:RUN (the data of a run); or statistics: "
        ".npz with mu and sigma, of --save-stats, pytorch-fid, clean-fid or ADM",
    )
    what.add_argument(
        "--floor",
        nargs="?",
        const="other",
        metavar="SOURCE",
        help="also the distance of other real images to the reference; without SOURCE the other split of the data set",
    )
    what.add_argument("--noise-ceiling", action="store_true", help="also the distance of uniform noise")
    how = result.add_argument_group("features")
    how.add_argument(
        "--features",
        default="inception",
        metavar="NET",
        help="inception, classifier:FILE (genssm.metrics.classifier), torchscript:FILE, or module:function, called "
        "with uint8 (B, 3, H, W) and returning (B, F) (default: %(default)s)",
    )
    how.add_argument("--resize-mode", choices=RESIZE_MODES, help="of clean-fid, for inception (default: clean)")
    how.add_argument("--weights", metavar="FILE", help="Inception weights (default: cached, else fetched)")
    how.add_argument("--no-kid", action="store_true", help="leave out the kernel distance; memory stays constant")
    how.add_argument("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    how.add_argument("--device", type=device_option, help="cpu, cuda, ... (default: cuda where there is one)")
    draw = add_drawing_options(result)
    draw.add_argument("--temperature", type=float, metavar="T", help="of models of codes; also the next two")
    draw.add_argument("--top-k", type=int, metavar="K")
    draw.add_argument("--top-p", type=float, metavar="P")
    add_data_options(result)
    reports.add_result_options(result)
    return result


def open_source(spec: str, options: argparse.Namespace) -> ImageSource:
    """Real images from the text of ``--reference`` or ``--floor``."""
    if spec.startswith("dataset:"):
        name, _, split = spec.removeprefix("dataset:").partition(":")
        return dataset_source(name, split or "train", options)
    return file_source(spec)


def reference_statistics(options: argparse.Namespace, extractor: FeatureExtractor) -> Statistics:
    """The statistics of ``--reference``, read or collected."""
    path = Path(options.reference)
    if path.suffix == ".npz" and path.is_file() and is_statistics(path):
        if options.save_stats:
            raise ValueError(f"{path} holds statistics already; --save-stats is for a --reference of images")
        return load_statistics(path)
    return _collect(open_source(options.reference, options), extractor, options)


def sample_statistics(options: argparse.Namespace, extractor: FeatureExtractor, reference: Statistics) -> Evaluated:
    """The statistics of ``--samples``, and how they were drawn and from which model where that is known."""
    path = Path(options.samples)
    if is_model(path):
        return _draw(path, options, extractor, reference)
    refuse_drawing_options(options, path)
    recorded = recorded_samples(path, options.num_samples)
    source, sampling, model = recorded or (file_source(path), None, None)
    if recorded is None and options.num_samples is not None:
        source = SubsetSource(source, options.num_samples)
    return _collect(source, extractor, options), sampling, model


def _draw(path: Path, options: argparse.Namespace, extractor: FeatureExtractor, reference: Statistics) -> Evaluated:
    count, seed, labels = options.num_samples, options.seed or 0, options.labels or "balanced"
    if count is None:
        raise ValueError(f"{path} is a model; say how many images to draw with --num-samples")
    pipeline, folder = load_pipeline(path, extractor.device, getattr(torch, options.dtype or "float32"))
    call = drawing_arguments(pipeline, options)
    num_classes = pipeline.denoiser.config.get("num_classes", 0)
    classes = choose_labels(labels, count, num_classes, reference.class_counts, seed) if num_classes else None
    source = PipelineSource(pipeline, str(path), count, classes, seed, **call)
    protocol = sampling_protocol(source, labels, folder)
    return _collect(source, extractor, options), protocol, model_facts(folder)


def is_model(path: Path) -> bool:
    """Whether a folder holds a pipeline, or a run, rather than samples."""
    return any((path / name).exists() for name in ("model_index.json", "pipeline", "checkpoints"))


def open_pipeline(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Path]:
    """The pipeline of a folder or of a run's newest complete checkpoint, and the folder it is in."""
    from genssm.pipelines import loading
    from genssm.training.checkpoint import resolve_pipeline

    folder = resolve_pipeline(path)
    return loading.load_pipeline(folder, dtype=dtype).to(device), folder


def load_pipeline(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Path]:
    """As :func:`open_pipeline`, of images of classes or of nothing."""
    pipe, folder = open_pipeline(path, device, dtype)
    if not hasattr(pipe, "denoiser"):
        raise ValueError(f"the {type(pipe).__name__} in {folder} draws no images; give a run of a model that does")
    if pipe.denoiser.config.get("context_dim") or pipe.denoiser.config.get("num_frames"):
        raise ValueError(
            f"{path} makes images of texts, or clips; draw images with sample.py and give its folder as --samples, "
            "measure captions with python -m genssm.metrics.pairs, clips with python -m genssm.metrics.video"
        )
    return pipe, folder


def floor_statistics(options: argparse.Namespace, extractor: FeatureExtractor, count: int) -> Statistics | None:
    """Other real images: as many as there are samples, or all if there are fewer."""
    if options.floor is None:
        return None
    spec = options.floor
    if spec == "other":
        if not options.reference.startswith("dataset:"):
            raise ValueError("--floor needs real images that are not the reference; name them: --floor SOURCE")
        name, _, split = options.reference.removeprefix("dataset:").partition(":")
        spec = f"dataset:{name}:{'train' if split == 'test' else 'test'}"
    source = open_source(spec, options)
    if len(source) > count:
        source = SubsetSource(source, count)
    return _collect(source, extractor, options)


def noise_statistics(
    options: argparse.Namespace, extractor: FeatureExtractor, samples: Statistics
) -> Statistics | None:
    """Uniform noise of the size and number of the samples; grey for a classifier of grey images."""
    if not options.noise_ceiling:
        return None
    if samples.image_size == "mixed":
        raise ValueError("--noise-ceiling: the samples have several sizes; noise needs one")
    height, width = map(int, samples.image_size.split("x"))
    grey = isinstance(extractor, ClassifierFeatures) and extractor.info.in_channels == 1
    return _collect(NoiseSource(samples.count, (height, width), grey=grey), extractor, options)


def evaluate(options: argparse.Namespace) -> dict[str, Any] | None:
    """Do what the command line asks; the report, or None where only statistics were asked for."""
    if options.reference is None or not (options.samples or options.save_stats):
        raise ValueError("give --samples and --reference, or --reference and --save-stats, or --compare; see --help")
    if options.with_features and not options.save_stats:
        raise ValueError("--with-features is about the file of --save-stats; name it")
    state, device = join_processes(options.device)
    with state.main_process_first():  # one of them fetches the weights
        extractor = build_extractor(
            options.features, resize=options.resize_mode, weights=options.weights, device=device
        )
    reference = reference_statistics(options, extractor)
    if options.save_stats and state.is_main_process:
        save_statistics(options.save_stats, reference, with_features=options.with_features)
        print(f"statistics of {reference.name}: {reference.count} images -> {options.save_stats}")
    if options.samples is None:
        return None
    samples, sampling, model = sample_statistics(options, extractor, reference)
    floor = floor_statistics(options, extractor, samples.count)
    noise = noise_statistics(options, extractor, samples)
    if not state.is_main_process:
        return None
    report = reports.build_report(
        samples,
        reference,
        sampling=sampling,
        model=model,
        floor=floor,
        noise=noise,
        with_kid=not options.no_kid,
        real_accuracy=extractor.info.test_accuracy if isinstance(extractor, ClassifierFeatures) else None,
    )
    print(reports.table(report))
    print(reports.one_line(report))
    if options.report:
        reports.save_report(options.report, report)
        print(f"report -> {options.report}")
    return report


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    options = parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if options.compare:
        compare(options)
    else:
        evaluate(options)


def compare(options: argparse.Namespace) -> None:
    """Print the results of the two reports of ``--compare``, refused unless they follow one protocol."""
    first, second = (reports.load_report(path) for path in options.compare)
    comparison = reports.compare_reports(first, second, options.allow)
    print(comparison.metric)
    for path, value in zip(options.compare, (comparison.first, comparison.second)):
        print(f"  {path}: {value:.4f}")
    for field, (ours, theirs) in comparison.allowed.items():
        print(f"  they differ in {field}: {ours} and {theirs}")


def _collect(source: ImageSource, extractor: FeatureExtractor, options: argparse.Namespace) -> Statistics:
    keep = not options.no_kid or options.with_features
    return collect(source, extractor, batch_size=options.batch_size, keep_features=keep, progress=True)


def join_processes(device: str | None) -> tuple[PartialState, str | torch.device]:
    """The processes of the command, and where this one computes: ``device``, if there is only one."""
    state = PartialState(cpu=means_cpu(device))
    return state, device if device and state.num_processes == 1 else state.device


if __name__ == "__main__":
    errors.cli(main)
