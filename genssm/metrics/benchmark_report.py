"""What a benchmark leaves: numbers, a page with the whole protocol, pictures of samples and of the sweep."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from genssm.metrics import report as reports
from genssm.metrics.features import FeatureExtractor
from genssm.metrics.generated import RECORD
from genssm.metrics.weights import short_hash
from genssm.training.samples import grid_columns, make_grid

SHOWN = 64  # images in the figure
_HIDDEN = ("title", "network")


def protocol_of(extractor: FeatureExtractor) -> dict[str, Any]:
    """A network's protocol as it stands in a report."""
    return asdict(extractor.protocol)


def rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The results as text: title, value with its spread, key of the network."""
    found = []
    for entry in report["metrics"].values():
        numbers = {key: value for key, value in entry.items() if key not in _HIDDEN}
        spread = numbers.pop("standard_error", numbers.pop("deviation", None))
        if numbers.pop("splits", 2) < 2:
            spread = None
        text = ", ".join(f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}" for value in numbers.values())
        found.append((entry["title"], text if spread is None else f"{text} ± {spread:.2g}", entry["network"]))
    if report["label_agreement"]:
        agreement = report["label_agreement"]
        real = agreement["on_real_images"]
        beside = "" if real is None else f" (real test images {real:.2%})"
        found.append(("Label agreement", f"{agreement['value']:.2%}{beside}", "main"))
    return found


def table(report: Mapping[str, Any]) -> str:
    """The results one below the other, for a terminal."""
    lines = rows(report)
    width = max(len(title) for title, _, _ in lines)
    head = f"{report['protocol']['samples']['count']} samples of {report['subject']['model']['pipeline']}"
    return "\n".join([head, *(f"  {title:<{width}}  {value}" for title, value, _ in lines)])


def markdown(report: Mapping[str, Any], *, sweep_figure: bool) -> str:
    """The whole report for people."""
    protocol, model = report["protocol"], report["subject"]["model"]
    samples, reference, sampling = protocol["samples"], protocol["reference"], protocol["sampling"]
    lines = [f"# {samples['count']} samples of {model['pipeline']}", "", "| measure | value | network |"]
    lines += ["| --- | --- | --- |", *(f"| {title} | {value} | {network} |" for title, value, network in rows(report))]
    if report["floor"]:
        floor = report["floor"]
        lines += [
            "",
            f"Floor, the same Frechet distance of {floor['count']} other real images ({floor['name']}): "
            f"{floor['value']:.4f}.",
        ]
    lines += ["", "![samples](samples.png)", "", "## Protocol", "", "| | |", "| --- | --- |"]
    facts = {
        "samples": f"{samples['count']}, {samples['image_size']}, {samples['file_format']}, content sha256 "
        f"{report['subject']['sha256']}",
        "pipeline": f"{model['pipeline']}, sha256 {model['sha256']}",
        "reference": f"{report['reference']}; {reference['count']} images, {reference['image_size']}, content sha256 "
        f"{reference['sha256']}",
        **{key: _text(value) for key, value in sampling.items()},
        **{f"network {key}": _network(value) for key, value in report["networks"].items()},
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    if report.get("sweep"):
        lines += ["", "## Sweep", "", *_sweep_table(report["sweep"])]
        if sweep_figure:
            lines += ["", "![sweep](sweep.png)"]
    return "\n".join(lines) + "\n"


def write(out: Path, report: Mapping[str, Any], count: int) -> None:
    """Write ``report.json``, ``report.md``, ``samples.png`` and, of a sweep, ``sweep.png`` into ``out``."""
    reports.save_report(out / "report.json", report)
    record = json.loads((out / "images" / RECORD).read_text(encoding="utf-8"))
    classes = len(record["settings"]["class_labels"] or ())
    places = range(min(count, SHOWN // classes * classes if 1 < classes <= SHOWN else SHOWN))
    shown = [Image.open(out / "images" / f"{index:06d}.png") for index in places]
    make_grid(shown, grid_columns(len(shown), classes)).save(out / "samples.png")
    drawn = bool(report["sweep"]) and importlib.util.find_spec("matplotlib") is not None
    if drawn:
        plot_sweep(report["sweep"], out / "sweep.png")
    (out / "report.md").write_text(markdown(report, sweep_figure=drawn), encoding="utf-8")


def plot_sweep(points: Sequence[Mapping[str, Any]], file: Path) -> None:
    """One panel for each measure: over the first numeric setting, a line for each combination of the others.

    Args:
        points: ``settings``, and ``metrics`` as in a report.
        file: picture to write.
    """
    from matplotlib.figure import Figure

    panels = [
        (name, key)
        for name, entry in points[0]["metrics"].items()
        for key in entry
        if key not in (*_HIDDEN, "standard_error", "deviation", "splits")
    ]
    settings = [point["settings"] for point in points]
    axis = next((key for key in settings[0] if all(isinstance(s[key], int | float) for s in settings)), None)
    columns = min(3, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows_of_panels), layout="constrained")
    axes = figure.subplots(rows_of_panels, columns, squeeze=False)
    for place, (name, key) in zip(axes.flat, panels):
        for label, group in _lines(points, axis):
            x = [point["settings"][axis] if axis else _name(point["settings"]) for point in group]
            place.plot(x, [point["metrics"][name][key] for point in group], marker="o", label=label or None)
        title = points[0]["metrics"][name]["title"].split(" in the features")[0]
        place.set(title=title if key == "value" else key, xlabel=axis or "")
        place.grid(alpha=0.3)
    if len(_lines(points, axis)) > 1:
        axes.flat[0].legend(fontsize="small")
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    figure.savefig(file, dpi=120)


def _lines(points: Sequence[Mapping[str, Any]], axis: str | None) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Points that differ along the axis alone, sorted along it, by the name of what they share."""

    def shared(point: Mapping[str, Any]) -> str:
        return _name({k: v for k, v in point["settings"].items() if k != axis}) if axis else ""

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(shared(point), []).append(point)
    return [(name, sorted(g, key=lambda p: p["settings"][axis]) if axis else g) for name, g in groups.items()]


def _name(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _sweep_table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = list(points[0]["settings"])
    titles = [entry["title"].split(" in the features")[0] for entry in points[0]["metrics"].values()]
    lines = [f"| {' | '.join([*keys, 'samples', *titles])} |", "|" + " --- |" * (len(keys) + 1 + len(titles))]
    for point in points:
        values = [text for _, text, _ in rows({"metrics": point["metrics"], "label_agreement": None})]
        cells = [*(str(point["settings"][key]) for key in keys), str(point["count"]), *values]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _network(protocol: Mapping[str, Any]) -> str:
    digest = short_hash(protocol["weights_sha256"])
    return f"{protocol['name']}, sha256 {digest}, resize {protocol['resize']}, {protocol['library']}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return str(value)
