"""Reports: what a number is called, what it is compared with, what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from genssm.metrics.features import FeatureProtocol
from genssm.metrics.report import build_report, compare_reports, load_report, one_line, save_report, table
from genssm.metrics.statistics import Statistics

INCEPTION = FeatureProtocol("inception-2015-12-05.pt pool_3", "f5" * 32, "clean 299", True, "clean-fid 0.1.35")
CLASSIFIER = FeatureProtocol("the digits train classifier", "ab" * 32, "none", False, "genssm")
SAMPLING = {
    "scheduler": {"class": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
    "num_inference_steps": 50,
    "guidance_scale": 1.5,
    "weights": "EMA 0.999",
    "labels": "0..9 in turn",
    "seeds": "0..49999",
    "dtype": "float32",
}


def statistics(name: str, shift: float = 0.0, count: int = 50_000, protocol: FeatureProtocol = INCEPTION) -> Statistics:
    features = np.random.default_rng(len(name)).standard_normal((40, 3)).astype(np.float32) + shift
    return Statistics(
        name=name,
        mu=features.mean(0).astype(np.float64),
        sigma=np.cov(features.T),
        count=count,
        sha256=name[0] * 64,
        image_size="32x32",
        file_format="png",
        protocol=protocol,
        features=features,
    )


def report(guidance: float = 1.5, protocol: FeatureProtocol = INCEPTION, **changes) -> dict:
    samples = replace(statistics("samples", 1.0, protocol=protocol), **changes)
    sampling = {**copy.deepcopy(SAMPLING), "guidance_scale": guidance}
    return build_report(samples, statistics("reference", protocol=protocol), sampling=sampling)


def test_the_line_holds_the_whole_protocol() -> None:
    result = report()
    line = one_line(result)
    expected = [
        f"FID: {result['value']:.4f}", "KID", "50000 samples 32x32 png", "FlowMatchEulerDiscreteScheduler",
        "num_inference_steps 50", "guidance_scale 1.5", "weights EMA 0.999", "seeds 0..49999", "labels 0..9 in turn",
        "dtype float32", "reference: 50000 images, sha256 rrrrrrrr", "inception-2015-12-05.pt pool_3, sha256 f5f5f5f5",
        "resize clean 299", "clean-fid 0.1.35", "genssm 0.", "torch 2.", "diffusers 0.", "numpy", "python 3.",
    ]  # fmt: skip
    assert [part for part in expected if part not in line] == []
    assert "\n" not in line


def test_never_fid_without_its_protocol() -> None:
    """Other features: the name says so, and neither FID nor KID is used for them."""
    result = report(protocol=CLASSIFIER)
    name = "Frechet distance in the features of the digits train classifier (abababab), not FID"
    assert result["metric"] == name
    for text in (one_line(result), table(result)):
        assert name in text
        assert "FID" not in text.replace(name, "")
        assert "KID" not in text
    assert "kernel distance" in one_line(result)


def test_landmarks_and_label_agreement_stand_beside_the_value() -> None:
    samples = replace(statistics("samples", 1.0), agreement=0.93)
    result = build_report(
        samples,
        statistics("reference"),
        sampling=None,
        floor=statistics("floor", 0.1, 1000),
        noise=statistics("noise", 9.0),
        real_accuracy=0.98,
    )
    assert result["floor"]["value"] < result["value"] < result["noise_ceiling"]["value"]
    lines = table(result).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["floor:", "samples", "ceiling:", "label"]
    assert "(1000)" in lines[1]
    assert "93.00% (real test images: 98.00%)" in lines[4]
    assert "sampling unstated" in one_line(result)


def test_value_is_the_distance() -> None:
    """The same set has distance zero, and a shifted copy the squared length of the shift."""
    one = statistics("same")
    assert build_report(one, one, sampling=None)["value"] == pytest.approx(0, abs=1e-12)
    moved = replace(one, mu=one.mu + np.array([3.0, 0, 4]))
    assert build_report(moved, one, sampling=None)["value"] == pytest.approx(25)


def test_few_images_warn(caplog: pytest.LogCaptureFixture) -> None:
    report()
    assert caplog.text == ""
    report(count=9_999)
    assert "9999 samples: below 10000" in caplog.text


def test_lossy_files_warn(caplog: pytest.LogCaptureFixture) -> None:
    report(file_format="npz")
    assert caplog.text == ""
    report(file_format="jpg+png")
    assert "samples are jpg+png files: lossy compression" in caplog.text


def test_kernel_distance_needs_features() -> None:
    samples, reference = statistics("samples"), statistics("reference")
    assert build_report(samples, reference, sampling=None)["kid"]["subset_size"] == 40
    assert build_report(samples, reference, sampling=None, with_kid=False)["kid"] is None
    assert build_report(samples, replace(reference, features=None), sampling=None)["kid"] is None


def test_other_features_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    samples = statistics("samples")
    for change, message in (
        ({"resize": "legacy_pytorch 299"}, "made with resize legacy_pytorch 299, the samples with clean 299"),
        ({"weights_sha256": "00"}, "made with weights_sha256 00"),
    ):
        other = statistics("reference", protocol=replace(INCEPTION, **change))
        with pytest.raises(ValueError, match=message):
            build_report(samples, other, sampling=None)
    short = replace(statistics("reference"), mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"statistics of 2 features, .* gives 3"):
        build_report(samples, short, sampling=None)
    foreign = replace(statistics("reference"), protocol=None, count=None)
    result = build_report(samples, foreign, sampling=None)
    assert "does not say which network and resize made it" in caplog.text
    assert "an unstated number of images" in one_line(result)


def test_reports_of_one_protocol_are_compared() -> None:
    """Versions, file names and the model itself may differ: that is what a comparison is for."""
    first, second = report(), copy.deepcopy(report(mu=np.ones(3)))
    second["versions"]["torch"] = "9.9"
    second["subject"] = {"samples": "elsewhere", "sha256": "x", "model": {"pipeline": "p"}}
    second["protocol"]["reference"]["name"] = "the same images in another folder"
    comparison = compare_reports(first, second)
    assert (comparison.first, comparison.second, comparison.allowed) == (first["value"], second["value"], {})
    assert comparison.metric == "FID"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples.count", 10_000),
        ("samples.file_format", "jpg"),
        ("reference.sha256", "0" * 64),
        ("reference.count", 5),
        ("features.resize", "legacy_tensorflow 299"),
        ("features.weights_sha256", "1" * 64),
        ("sampling.guidance_scale", 4.0),
        ("sampling.num_inference_steps", 20),
        ("sampling.weights", "as trained"),
        ("sampling.seeds", "7..50006"),
        ("sampling.labels", "3 only"),
        ("sampling.scheduler.class", "DDIMScheduler"),
        ("sampling", None),
    ],
)
def test_other_protocols_are_refused(field: str, value: object, tmp_path: Path) -> None:
    """The refusal names the field and both values; a field that is studied can be allowed by name."""
    first, second = report(), report()
    place = second["protocol"]
    *parents, last = field.split(".")
    for parent in parents:
        place = place[parent]
    old, place[last] = place[last], value
    with pytest.raises(ValueError, match="follow different protocols and cannot be compared") as caught:
        compare_reports(first, second)
    if field != "sampling":
        assert f"  {field}: {old!r} and {value!r}" in str(caught.value)
        assert str(caught.value).count("\n") == 1
    assert compare_reports(first, second, [field]).allowed
    assert compare_reports(first, second, [field.split(".")[0]]).allowed
    with pytest.raises(ValueError, match="different protocols"):
        compare_reports(first, second, ["samples.image_size", "sampling.guidance"])


def test_files(tmp_path: Path) -> None:
    result = report()
    save_report(tmp_path / "new" / "report.json", result)
    assert load_report(tmp_path / "new" / "report.json") == result
    with pytest.raises(FileNotFoundError, match="--report FILE writes one"):
        load_report(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(json.dumps({"fid": 3}))
    with pytest.raises(ValueError, match=r"is no report of genssm\.metrics\.fid"):
        load_report(tmp_path / "other.json")
    (tmp_path / "text.json").write_text("FID 3")
    with pytest.raises(ValueError, match="is no JSON"):
        load_report(tmp_path / "text.json")
