"""The report of an evaluation: a number with everything that it depends on, and what may be compared with what."""

import argparse
import json
import logging
import platform
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import genssm
from genssm.metrics.features import FeatureProtocol
from genssm.metrics.frechet import Gaussian, KernelDistance, kid
from genssm.metrics.statistics import Statistics
from genssm.metrics.weights import short_hash

logger = logging.getLogger("genssm")
FORMAT = "genssm-report-1"
FEW = {"images": 10_000, "frames": 10_000, "clips": 2_048}  # the field's usual least counts
LOSSY = {"jpg", "jpeg", "webp", "gif", "mp4", "avi", "mov", "mkv", "webm"}
# Told for the reader; the hashes beside them decide.
_NAMES = ("reference.name", "features.name", "features.library")


@dataclass(frozen=True)
class Landmark:
    """A distance to the same reference that helps to read the result: real images, or noise."""

    name: str
    count: int
    sha256: str
    value: float


@dataclass(frozen=True)
class Comparison:
    """Two values of one metric, and the protocol fields in which they were allowed to differ."""

    metric: str
    first: float
    second: float
    allowed: dict[str, tuple[Any, Any]]


def metric_name(protocol: FeatureProtocol, of: str = "images") -> str:
    """``FID`` for the network and resize of the FID protocol, otherwise a name that cannot be taken for it.

    Args:
        protocol: the feature network.
        of: what its features are of: "images", "clips", or the "frames" of clips.
    """
    where = f"in the features of {protocol.name} ({short_hash(protocol.weights_sha256)})"
    if of == "clips":
        return f"Frechet video distance {where}"
    name = "FID" if protocol.is_fid else f"Frechet distance {where}, not FID"
    return name if of == "images" else f"Frame-wise {name}"


def check_same_features(samples: Statistics, reference: Statistics) -> None:
    """Raise a ValueError unless both statistics come from the same network and resize, as far as they say.

    Raises:
        ValueError: lengths differ, or the protocols that both state, or how clips were cut.
    """
    if reference.mu.shape != samples.mu.shape:
        raise ValueError(
            f"{reference.name} holds statistics of {len(reference.mu)} features, "
            f"{samples.protocol.name} gives {len(samples.mu)}; use the statistics of the same network"
        )
    if reference.protocol is None:
        logger.warning(
            "%s does not say which network and resize made it; taken as %s", reference.name, samples.protocol.name
        )
        return
    check_same_protocol(reference, samples.protocol, samples.clips)


def check_same_protocol(reference: Statistics, protocol: FeatureProtocol, clips: Mapping[str, Any] | None) -> None:
    """Raise a ValueError if statistics say that they are of another network or resize, or of clips cut otherwise."""
    if reference.protocol is None:
        return
    for field in ("weights_sha256", "resize"):
        ours, theirs = getattr(protocol, field), getattr(reference.protocol, field)
        if ours != theirs:
            raise ValueError(f"{reference.name} was made with {field} {theirs}, the samples with {ours}")
    if clips != reference.clips:
        theirs, ours = _clips_text(reference.clips), _clips_text(clips)
        raise ValueError(f"{reference.name} was made of {theirs}, the samples are {ours}")


def build_report(
    samples: Statistics,
    reference: Statistics,
    *,
    sampling: Mapping[str, Any] | None,
    model: Mapping[str, Any] | None = None,
    floor: Statistics | None = None,
    noise: Statistics | None = None,
    with_kid: bool = True,
    real_accuracy: float | None = None,
) -> dict[str, Any]:
    """Compute the distances and gather the protocol.

    Args:
        samples: statistics of the generated images.
        reference: statistics of the real images.
        sampling: scheduler, steps, guidance, weights, seeds, labels; None when the maker of the files is not known.
        model: what was evaluated (path, hash); part of the report but not of the protocol.
        floor: real images that are not the reference; their distance is what perfect samples would get.
        noise: images without content; their distance is what worthless samples get.
        with_kid: also the kernel distance, where the features of both sets are at hand.
        real_accuracy: accuracy of the feature classifier on real images, the ceiling of the label agreement.
    Returns:
        A mapping ready for JSON.
    Raises:
        ValueError: the statistics come from different networks.
    """
    check_same_features(samples, reference)
    real, unit = gaussian_of(reference), _unit(samples.clips)
    report: dict[str, Any] = {
        "format": FORMAT,
        "metric": metric_name(samples.protocol, unit),
        "value": gaussian_of(samples).distance(real),
        "kid": _kid(samples, reference) if with_kid else None,
        "floor": _landmark(floor, real),
        "noise_ceiling": _landmark(noise, real),
        "label_agreement": None,
        "protocol": {
            "samples": {key: getattr(samples, key) for key in ("count", "image_size", "file_format")},
            "reference": {key: getattr(reference, key) for key in ("name", "count", "sha256", "image_size")},
            "features": asdict(samples.protocol),
            "sampling": None if sampling is None else dict(sampling),
        },
        "subject": {"samples": samples.name, "sha256": samples.sha256, "model": model},
        "versions": versions(),
    }
    if samples.clips is not None:
        report["protocol"]["clips"] = samples.clips
        report["flicker"] = {"samples": samples.flicker, "reference": reference.flicker}
    if samples.agreement is not None:
        report["label_agreement"] = {"value": samples.agreement, "on_real_images": real_accuracy}
    few = [
        f"{statistics.count} {which}"
        for which, statistics in (("samples", samples), (f"reference {unit}", reference))
        if statistics.count is not None and statistics.count < FEW[unit]
    ]
    if set((samples.file_format or "").split("+")) & LOSSY:
        logger.warning(
            "samples are %s files: lossy compression changes the distance, save 8-bit PNG", samples.file_format
        )
    if few:
        few_text = " and ".join(few)
        logger.warning(
            "%s: below %d the distance is too high by an amount that depends on the counts", few_text, FEW[unit]
        )
    return report


def one_line(report: Mapping[str, Any]) -> str:
    """The result with its whole protocol on one line."""
    protocol = report["protocol"]
    samples, reference, features = protocol["samples"], protocol["reference"], protocol["features"]
    parts = [f"{report['metric']}: {report['value']:.4f}"]
    if report["kid"]:
        name = "KID" if features["is_fid"] else "kernel distance"
        parts.append(name + " {value:.6f} +- {standard_error:.6f}".format(**report["kid"]))
    unit = _unit(protocol.get("clips"))
    sampled = "samples" if unit == "images" else unit
    parts.append(
        f"{samples['count']} {sampled} {samples['image_size']} {samples['file_format']} of "
        f"{report['subject']['samples']}"
    )
    if "clips" in protocol:
        parts.append(_clips_text(protocol["clips"]))
    parts.append(_sampling_text(protocol["sampling"]))
    count = "an unstated number of" if reference["count"] is None else reference["count"]
    parts.append(f"against {reference['name']}: {count} {unit}, sha256 {short_hash(reference['sha256'])}")
    digest = short_hash(features["weights_sha256"])
    parts.append(f"features {features['name']}, sha256 {digest}, resize {features['resize']}, {features['library']}")
    parts.append(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    return " | ".join(parts)


def table(report: Mapping[str, Any]) -> str:
    """The distances one below the other: real images, the samples, noise; then flickering and label agreement."""
    samples = report["protocol"]["samples"]
    rows = [(f"samples ({samples['count']})", report["value"])]
    if report["floor"]:
        rows.insert(0, (f"floor: {report['floor']['name']} ({report['floor']['count']})", report["floor"]["value"]))
    if report["noise_ceiling"]:
        ceiling = report["noise_ceiling"]
        rows.append((f"ceiling: {ceiling['name']} ({ceiling['count']})", ceiling["value"]))
    lines = [f"{report['metric']}, to {report['protocol']['reference']['name']}"]
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:<{width}}  {value:12.4f}" for name, value in rows]
    if report.get("flicker"):
        said = [
            f"{'not known' if flicker is None else format(flicker['value'], '.4f')} ({which})"
            for which, flicker in report["flicker"].items()
        ]
        lines.append(f"  temporal flickering, 1 for still clips: {', '.join(said)}")
    if report["label_agreement"]:
        agreement = report["label_agreement"]
        real = agreement["on_real_images"]
        beside = "" if real is None else f" (real test images: {real:.2%})"
        lines.append(f"  label agreement {agreement['value']:.2%}{beside}")
    return "\n".join(lines)


def save_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def load_report(path: str | Path) -> dict[str, Any]:
    """Read a report.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no report of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no report {path}; --report FILE writes one")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no text, or no JSON
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path} is no report of genssm.metrics.fid or genssm.metrics.video ({FORMAT})")
    return report


def compare_reports(first: Mapping[str, Any], second: Mapping[str, Any], allow: Collection[str] = ()) -> Comparison:
    """Put two results side by side if they follow one protocol.

    The protocol is: counts, size and format of the samples, how clips were cut, hash and count of the reference, hash
    and resize of the features, and the sampling (scheduler, steps, guidance, weights, seeds, labels, texts). Versions
    are told, not compared.

    Args:
        first, second: reports of :func:`build_report`.
        allow: fields that may differ because they are what is studied, such as ``sampling.guidance_scale``; a name
            covers everything below it.
    Raises:
        ValueError: other fields differ; the message names each with both values.
    """
    ours, theirs = dict(_flat(first["protocol"])), dict(_flat(second["protocol"]))
    differing = {
        field: (ours.get(field), theirs.get(field))
        for field in sorted(ours.keys() | theirs.keys())
        if field not in _NAMES and ours.get(field) != theirs.get(field)
    }
    allowed = {
        field: values
        for field, values in differing.items()
        if any(field == name or field.startswith(name + ".") for name in allow)
    }
    refused = {field: values for field, values in differing.items() if field not in allowed}
    if refused:
        lines = "\n".join(f"  {field}: {a!r} and {b!r}" for field, (a, b) in refused.items())
        raise ValueError(f"the reports follow different protocols and cannot be compared; they differ in\n{lines}")
    return Comparison(first["metric"], first["value"], second["value"], allowed)


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    import diffusers
    import numpy
    import torch

    return {
        "genssm": genssm.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def gaussian_of(statistics: Statistics) -> Gaussian:
    """The Gaussian of statistics, from few features or from their moments, whichever is sooner."""
    features = statistics.features
    if features is not None and len(features) <= features.shape[1]:
        return Gaussian.of_features(features)  # the same Gaussian, much sooner
    return Gaussian.of_moments(statistics.mu, statistics.sigma)


def _landmark(statistics: Statistics | None, reference: Gaussian) -> dict[str, Any] | None:
    if statistics is None:
        return None
    value = gaussian_of(statistics).distance(reference)
    return asdict(Landmark(statistics.name, statistics.count, statistics.sha256, value))


def _kid(samples: Statistics, reference: Statistics) -> dict[str, Any] | None:
    if samples.features is None or reference.features is None:
        return None
    distance: KernelDistance = kid(samples.features, reference.features)
    return asdict(distance)


def _unit(clips: Mapping[str, Any] | None) -> str:
    return "images" if clips is None else clips["features_of"]


def _clips_text(clips: Mapping[str, Any] | None) -> str:
    if clips is None:
        return "images"
    text = "clips of {num_frames} frames, stride {frame_stride}, cut {cut}, frames {frames}".format(**clips)
    return text if clips["features_of"] == "clips" else f"single frames of {text}"


def _sampling_text(sampling: Mapping[str, Any] | None) -> str:
    if sampling is None:
        return "sampling unstated"
    rest = [f"{key} {value}" for key, value in sampling.items() if key != "scheduler" and value is not None]
    return ", ".join([sampling["scheduler"]["class"], *rest])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is written, and those that compare two reports instead."""
    out = parser.add_argument_group("results")
    out.add_argument("--report", type=Path, metavar="OUT.json", help="write the report")
    out.add_argument("--save-stats", type=Path, metavar="FILE.npz", help="write the statistics of the reference")
    out.add_argument("--with-features", action="store_true", help="... with every feature, for the kernel distance")
    out.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="compare two reports and do nothing else")
    out.add_argument(
        "--allow", action="append", default=[], metavar="FIELD", help="protocol field that may differ in --compare"
    )
