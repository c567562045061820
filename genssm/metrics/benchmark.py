"""Benchmark a model: draw, extract features once, measure, report. ``python benchmarks/fid.py --help``.

The images are drawn by ``sample.py``, so image i depends on its seed alone: a broken-off benchmark goes on where it
stopped, any number of processes and any batch size give the same images, and exactly N of them.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from genssm.devices import device_option, means_cpu
from genssm.metrics import benchmark_report as writing
from genssm.metrics import report as reports
from genssm.metrics.distances import cmmd, inception_score, precision_recall
from genssm.metrics.features import (
    RESIZE_MODES,
    ClassifierFeatures,
    FeatureExtractor,
    InceptionFeatures,
    build_extractor,
)
from genssm.metrics.frechet import Float64, Gaussian, kid
from genssm.metrics.generated import recorded_samples
from genssm.metrics.networks import AdmFeatures, VisionFeatures
from genssm.metrics.reference import Reference
from genssm.metrics.sources import ImageSource, SubsetSource, add_data_options
from genssm.metrics.statistics import Statistics, collect
from genssm.schedulers import SCHEDULER_NAMES
from genssm.solvers import ADAPTIVE_METHODS, FIXED_METHODS
from genssm.training.checkpoint import resolve_pipeline

logger = logging.getLogger("genssm")
EPILOG = """\
Options of sample.py that say how to draw (--num-inference-steps, --guidance-scale, --scheduler, --ode-solver, --seed,
--class-labels, --dtype, ...) are passed on to it. The same command goes on with a benchmark that was broken off.

examples
  50,000 images of a run on every GPU against its training set:
    accelerate launch benchmarks/fid.py --model runs/cifar10 --num-samples 50000 --reference dataset:runs/cifar10 \\
      --out benchmark/cifar10 --guidance-scale 1.5
  against a reference batch of the ADM evaluator:
    accelerate launch benchmarks/fid.py --model runs/imagenet --num-samples 50000 --out benchmark/imagenet \\
      --reference VIRTUAL_imagenet256_labeled.npz --metrics fid_adm sfid is precision_recall
  small grey images in the features of a classifier, over guidance and steps:
    python benchmarks/fid.py --model runs/fashion --num-samples 5000 --reference dataset:runs/fashion --floor \\
      --features classifier:fashion.safetensors --out benchmark/fashion \\
      --sweep guidance_scale=1,1.5,2,3 num_inference_steps=10,25,50
"""
# option of sample.py -> how to read a value of a sweep
SWEPT: dict[str, Callable[[str], Any]] = {
    "guidance_scale": float, "num_inference_steps": int, "scheduler": str, "ode_solver": str, "guidance_power": float,
    "guidance_rescale": float,
}  # fmt: skip
CHOICES = {"scheduler": SCHEDULER_NAMES, "ode_solver": ADAPTIVE_METHODS + FIXED_METHODS}
DEFAULT = "default"  # in a sweep: leave the option out


class Context(NamedTuple):
    """What a metric is computed from: both sets in the features of one network, and where to compute."""

    samples: Statistics
    reference: Statistics | None  # computed from real images
    given: Statistics | None  # read from a file, where that is of this network
    spatial: tuple[Float64, Float64] | None  # as well, for sFID
    extractor: FeatureExtractor
    device: torch.device


@dataclass(frozen=True)
class Metric:
    """A measure: its name in tables, its network, whether lower is better, whether it needs features of real images."""

    title: str
    network: str
    compute: Callable[[Context], dict[str, float]]
    needs_images: bool = True


def part_of(statistics: Statistics, extractor: FeatureExtractor, name: str) -> torch.Tensor:
    """The features of one part of a network's vectors, (n, F); all of them where a network has no parts."""
    parts = getattr(extractor, "parts", None)
    return torch.from_numpy(statistics.features[:, parts[name]] if parts else statistics.features)


def _frechet(c: Context) -> dict[str, float]:
    ours = replace(c.samples, features=c.samples.features[:, c.extractor.gaussian])
    theirs = c.given or replace(c.reference, features=c.reference.features[:, c.extractor.gaussian])
    reports.check_same_features(ours, theirs)
    return {"value": reports.gaussian_of(ours).distance(reports.gaussian_of(theirs))}


def _frechet_of_images(c: Context) -> dict[str, float]:
    return {"value": reports.gaussian_of(c.samples).distance(reports.gaussian_of(c.reference))}


def _spatial(c: Context) -> dict[str, float]:
    ours = part_of(c.samples, c.extractor, "spatial")
    if c.spatial is not None:
        theirs = Gaussian.of_moments(*c.spatial)
    else:
        theirs = Gaussian.of_features(part_of(c.reference, c.extractor, "spatial"))
    return {"value": Gaussian.of_features(ours).distance(theirs)}


def _kernel(c: Context) -> dict[str, float]:
    found = kid(c.samples.features, c.reference.features)
    return {"value": found.value, "standard_error": found.standard_error}


def _inception_score(c: Context) -> dict[str, float]:
    logits = part_of(c.samples, c.extractor, "logits")
    if isinstance(c.extractor, ClassifierFeatures):
        logits = c.extractor.scores(logits)
    found = inception_score(logits)
    return {"value": found.value, "deviation": found.deviation, "splits": found.splits}


def _precision_recall(c: Context) -> dict[str, float]:
    found = precision_recall(
        part_of(c.samples, c.extractor, "pool"), part_of(c.reference, c.extractor, "pool"), device=c.device
    )
    return {"precision": found.precision, "recall": found.recall}


def _cmmd(c: Context) -> dict[str, float]:
    return {"value": cmmd(c.samples.features, c.reference.features, device=c.device)}


METRICS = {
    "fid": Metric("FID (clean)", "main", _frechet, needs_images=False),
    "kid": Metric("KID", "main", _kernel),
    "fid_tf": Metric("FID (legacy TensorFlow resize)", "tensorflow", _frechet, needs_images=False),
    "fid_adm": Metric("FID (ADM evaluator's resize)", "adm", _frechet, needs_images=False),
    "is": Metric("Inception score", "adm", _inception_score, needs_images=False),
    "sfid": Metric("sFID", "adm", _spatial, needs_images=False),
    "precision_recall": Metric("Precision, recall", "adm", _precision_recall),
    "fd_dinov2": Metric("Frechet distance, DINOv2", "dinov2", _frechet_of_images),
    "cmmd": Metric("CMMD", "clip", _cmmd),
}
INCEPTION_METRICS = ("fid", "kid", "fid_tf", "is", "sfid", "precision_recall")
OWN_FEATURES = ("fid", "kid", "is", "precision_recall")  # those that also make sense in other features than Inception's


def parser() -> argparse.ArgumentParser:
    """Every option of the benchmark itself."""
    result = argparse.ArgumentParser(
        prog="benchmarks/fid.py",
        description="Draw N images of a model, measure them against real ones in every usual way, and write a report "
        "with the whole protocol.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = result.add_argument_group("what is measured")
    what.add_argument("--model", required=True, help="run (its newest checkpoint), checkpoint or pipeline folder")
    what.add_argument("--num-samples", required=True, type=int, metavar="N", help="images to draw")
    what.add_argument(
        "--reference", required=True, metavar="SOURCE",
        help="real images: folder, .npz (arr_0), dataset:NAME[:SPLIT], dataset:RUN; or .npz with mu and sigma; or an "
        "ADM reference batch, which holds both",
    )  # fmt: skip
    what.add_argument(
        "--floor", nargs="?", const="other", metavar="SOURCE",
        help="also measure other real images; without SOURCE the other split of the data set",
    )  # fmt: skip
    what.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of images and report")
    how = result.add_argument_group("measures")
    how.add_argument(
        "--metrics", nargs="+", choices=METRICS, metavar="NAME",
        help=f"of {', '.join(METRICS)} (default: {' '.join(INCEPTION_METRICS)}; with other features "
        f"{' '.join(OWN_FEATURES[:2])} precision_recall, and is with a classifier)",
    )  # fmt: skip
    how.add_argument(
        "--features", default="inception", metavar="NET",
        help="network of fid and kid: inception, classifier:FILE, torchscript:FILE or module:function; with another "
        "than inception also that of is and precision_recall (default: %(default)s)",
    )  # fmt: skip
    how.add_argument("--resize-mode", choices=RESIZE_MODES, help="of clean-fid, for inception (default: clean)")
    how.add_argument("--weights", metavar="FILE", help="clean-fid's Inception weights (default: cached, else fetched)")
    how.add_argument("--adm-weights", metavar="FILE", help="torch-fidelity's Inception weights (default: the same way)")
    how.add_argument("--dinov2", metavar="DIR", help="DINOv2 saved by transformers (default: in genssm's cache)")
    how.add_argument("--clip", metavar="DIR", help="CLIP saved by transformers (default: in genssm's cache)")
    how.add_argument("--cache", type=Path, metavar="DIR", help="statistics of references (default: in genssm's cache)")
    how.add_argument("--feature-batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    how.add_argument("--device", type=device_option, help="cpu, cuda, ... (default: the accelerator, else the CPU)")
    sweep = result.add_argument_group("sweep")
    sweep.add_argument(
        "--sweep", nargs="+", default=[], metavar="KEY=A,B,...",
        help=f"measure every combination of these settings: {', '.join(SWEPT)}; {DEFAULT} is the model's own",
    )  # fmt: skip
    sweep.add_argument("--sweep-samples", type=int, metavar="N", help="images of each (default: --num-samples)")
    add_data_options(result)
    return result


def read_sweep(texts: Sequence[str]) -> list[dict[str, Any]]:
    """The combinations of ``key=a,b`` texts, the last key varying fastest; none without texts.

    Raises:
        ValueError: an unknown key, a value of the wrong kind, or one that sample.py would refuse after hours.
    """
    keys: dict[str, list[Any]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key not in SWEPT or not values:
            raise ValueError(f"--sweep {text!r}: expected KEY=A,B,... with a key of {', '.join(SWEPT)}")
        try:
            keys[key] = [value if value == DEFAULT else SWEPT[key](value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--sweep {text!r}: {key} takes {SWEPT[key].__name__} numbers") from None
        given = [value for value in keys[key] if value != DEFAULT]
        if key == "num_inference_steps" and min(given, default=1) < 1:
            raise ValueError(f"--sweep {text!r}: {key} is at least 1")
        wrong = [value for value in given if key in CHOICES and value not in CHOICES[key]]
        if wrong:
            raise ValueError(f"--sweep {text!r}: {key} {wrong[0]!r} is unknown; there are {', '.join(CHOICES[key])}")
    return [dict(zip(keys, values)) for values in itertools.product(*keys.values())] if keys else []


def refuse_clips(model: str) -> None:
    """Raise a ValueError if a model makes clips."""
    folder = resolve_pipeline(model)
    config = folder / "denoiser" / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("num_frames"):
        raise ValueError(f"{folder} makes clips; measure them with python -m genssm.metrics.video")


class Networks:
    """The feature networks of a benchmark, each loaded when first needed, by one process after the other."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self._loaded: dict[str, FeatureExtractor] = {}

    def __getitem__(self, name: str) -> FeatureExtractor:
        if name not in self._loaded:
            with PartialState().main_process_first():  # one of them fetches the weights
                self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> FeatureExtractor:
        options, device = self.options, self.device
        if name == "main":
            return build_extractor(options.features, resize=options.resize_mode, weights=options.weights, device=device)
        if name == "tensorflow":
            return InceptionFeatures("legacy_tensorflow", options.weights, device)
        if name == "adm":
            return AdmFeatures(options.adm_weights, device)
        return VisionFeatures(name, getattr(options, name), device)


class Benchmark:
    """One benchmark: its options, reference and networks, ready to measure any set of images."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.networks = Networks(options, device)
        self.own = options.features != "inception"
        self.metrics = self._choose_metrics()
        self.reference = Reference(options.reference, options, options.cache)
        self.floor = self._open_floor()
        if self.reference.images is None:
            lacking = [name for name in self.metrics if METRICS[name].needs_images]
            if lacking:
                raise ValueError(
                    f"{options.reference} holds statistics but no images, which {', '.join(lacking)} need; leave them "
                    "out with --metrics, or give the images"
                )

    def _choose_metrics(self) -> list[str]:
        chosen = self.options.metrics
        classifier = self.options.features.startswith("classifier:")
        if chosen is None:
            chosen = INCEPTION_METRICS if not self.own else [m for m in OWN_FEATURES if m != "is" or classifier]
        if self.own and "is" in chosen and not classifier:
            raise ValueError(f"is needs class scores, and --features {self.options.features} gives none")
        return list(dict.fromkeys(["fid", *chosen]))  # the report is built around the first

    def network_of(self, metric: str) -> str:
        """Which network a metric is computed in."""
        return "main" if self.own and metric in OWN_FEATURES else METRICS[metric].network

    def measure(self, source: ImageSource, *, with_floor: bool, **about: Any) -> dict[str, Any] | None:
        """The report on a set of images; None in all processes but the first.

        Every process takes its share of the images; a network sees each of them once.

        Args:
            source: the images.
            with_floor: also the floor.
            about: ``sampling`` and ``model`` of :func:`genssm.metrics.report.build_report`.
        """
        report: dict[str, Any] | None = None
        for network in dict.fromkeys(map(self.network_of, self.metrics)):
            extractor = self.networks[network]
            names = [m for m in self.metrics if self.network_of(m) == network]
            given, spatial = self._given_in(network)
            computed = [
                name for name in names
                if METRICS[name].needs_images or (name != "is" and (spatial if name == "sfid" else given) is None)
            ]  # fmt: skip
            reference = None
            if computed:
                reference = self.reference.statistics(extractor, self.options.feature_batch_size)
            samples = collect(source, extractor, batch_size=self.options.feature_batch_size, progress=True)
            floor = None
            if network == "main" and with_floor and self.floor is not None:
                floor = collect(self.floor, extractor, batch_size=self.options.feature_batch_size, progress=True)
            if not PartialState().is_main_process:
                continue
            context = Context(samples, reference, given, spatial, extractor, self.device)
            if report is None:
                report = self._begin(context, floor, about)
            for name in names:
                report["metrics"][name] = {"title": self._title(name, samples), "network": network}
                report["metrics"][name] |= METRICS[name].compute(context)
            report["networks"][network] = writing.protocol_of(extractor)
        return report

    def measured(
        self, file: Path, sampling: dict[str, Any], model: dict[str, Any], with_floor: bool
    ) -> dict[str, Any] | None:
        """The report that an earlier command wrote of the same images, reference, networks and metrics, or None."""
        if not file.is_file():
            return None
        report = reports.load_report(file)
        networks = {name: writing.protocol_of(self.networks[name]) for name in map(self.network_of, self.metrics)}
        same = (
            report["protocol"]["sampling"] == sampling
            and report["subject"]["model"] == model
            and report.get("reference") == self.reference.describe()
            and report.get("networks") == networks
            and list(report.get("metrics", ())) == self._order()
            and with_floor == (report["floor"] is not None)
        )
        return report if same else None

    def _order(self) -> list[str]:
        """The metrics as a report lists them: those of one network together."""
        networks = list(dict.fromkeys(map(self.network_of, self.metrics)))
        return sorted(self.metrics, key=lambda name: networks.index(self.network_of(name)))

    def _title(self, name: str, samples: Statistics) -> str:
        """A title that cannot be taken for a published measure where the network is another one."""
        title = METRICS[name].title
        if samples.protocol.is_fid or self.network_of(name) in ("dinov2", "clip"):
            return title
        name = title.split(" (")[0].replace("sFID", "Spatial Frechet distance").replace("FID", "Frechet distance")
        return f"{name.replace('KID', 'Kernel distance')} in the features of {samples.protocol.name}"

    def _given_in(self, network: str) -> tuple[Statistics | None, tuple[Float64, Float64] | None]:
        """Statistics of the reference's file that are of a network: of TensorFlow's Inception where it has images too.

        A file of statistics alone is taken for the main network unless it says otherwise.
        """
        is_tensorflow = network in ("tensorflow", "adm") or (network == "main" and self.reference.images is None)
        return (self.reference.file, self.reference.spatial) if is_tensorflow else (None, None)

    def _open_floor(self) -> ImageSource | None:
        """Other real images: at most as many as there are samples."""
        spec = self.options.floor
        if spec == "other":
            if not self.options.reference.startswith("dataset:"):
                raise ValueError("--floor needs real images that are not the reference; name them: --floor SOURCE")
            name, _, split = self.options.reference.removeprefix("dataset:").partition(":")
            spec = f"dataset:{name}:{'train' if split == 'test' else 'test'}"
        images = None if spec is None else Reference(spec, self.options, self.options.cache).images
        if images is not None and len(images) > self.options.num_samples:
            images = SubsetSource(images, self.options.num_samples)
        return images

    def _begin(self, c: Context, floor: Statistics | None, about: dict[str, Any]) -> dict[str, Any]:
        report = reports.build_report(
            c.samples,
            c.given or c.reference,
            sampling=about["sampling"],
            model=about["model"],
            floor=floor,
            with_kid=c.reference is not None,
            real_accuracy=c.extractor.info.test_accuracy if isinstance(c.extractor, ClassifierFeatures) else None,
        )
        return report | {"reference": self.reference.describe(), "metrics": {}, "networks": {}}


def _arguments(settings: dict[str, Any]) -> list[str]:
    """Options of sample.py."""
    given = {key: value for key, value in settings.items() if value != DEFAULT}
    return [text for key, value in given.items() for text in (f"--{key.replace('_', '-')}", str(value))]


def _slug(settings: dict[str, Any]) -> str:
    return "-".join(f"{key}_{value}" for key, value in settings.items())


def run(
    benchmark: Benchmark,
    draw: Callable[[list[str]], None],
    out: Path,
    count: int,
    sampling: list[str],
    *,
    with_floor: bool = False,
) -> dict[str, Any] | None:
    """Draw ``count`` images into ``out/images`` (those that are missing), measure them, write ``out/report.json``."""
    state, options = PartialState(), benchmark.options
    device = ["--device", options.device] if options.device else []
    draw(["--model", options.model, "--out", str(out / "images"), "--num-images", str(count), *device, *sampling])
    state.wait_for_everyone()
    source, protocol, model = recorded_samples(out / "images", count)
    found = benchmark.measured(out / "report.json", protocol, model, with_floor) if state.is_main_process else None
    if broadcast_object_list([found is not None])[0]:  # the processes must not part
        return found
    report = benchmark.measure(source, with_floor=with_floor, sampling=protocol, model=model)
    if report is not None:
        reports.save_report(out / "report.json", report)
    return report


def sweep(benchmark: Benchmark, draw: Callable[[list[str]], None], sampling: list[str]) -> list[dict[str, Any]]:
    """Measure every combination; what an earlier command has measured is read."""
    options, points = benchmark.options, read_sweep(benchmark.options.sweep)
    found = []
    for settings in points:
        out = options.out / "sweep" / _slug(settings)
        count = options.sweep_samples or options.num_samples
        report = run(benchmark, draw, out, count, [*sampling, *_arguments(settings)])
        if report is not None:
            found.append({"settings": settings, "count": count, "metrics": report["metrics"]})
    return found


def main(draw: Callable[[list[str]], None], arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Args:
        draw: ``sample.main``, which makes the images.
        arguments: in place of the command line.
    """
    options, sampling = parser().parse_known_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if options.num_samples < 2 or (options.sweep_samples or 2) < 2:
        raise ValueError(f"--num-samples is {options.num_samples}; distances need at least 2 images")
    taken = {"--model", "--out", "--num-images", "--overwrite", "--grid"} & {text.split("=")[0] for text in sampling}
    if taken:
        raise ValueError(f"{', '.join(sorted(taken))}: the benchmark sets these of sample.py itself")
    if options.feature_batch_size < 1:
        raise ValueError(f"--feature-batch-size is {options.feature_batch_size}; expected at least 1")
    read_sweep(options.sweep)
    refuse_clips(options.model)
    state = PartialState(cpu=means_cpu(options.device))
    device = torch.device(options.device) if options.device and state.num_processes == 1 else state.device
    benchmark = Benchmark(options, device)
    for name in dict.fromkeys(map(benchmark.network_of, benchmark.metrics)):
        _ = benchmark.networks[name]  # a missing file is said before hours of drawing
    report = run(benchmark, draw, options.out, options.num_samples, sampling, with_floor=benchmark.floor is not None)
    points = sweep(benchmark, draw, sampling)
    if report is None:
        return
    report["sweep"] = points
    writing.write(options.out, report, options.num_samples)
    print(writing.table(report))
    print(f"report    {options.out / 'report.md'}, report.json, samples.png" + (", sweep.png" if points else ""))
