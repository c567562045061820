"""benchmarks/soak.py: runs that need each other, the table, a run that fails, mistakes."""

from pathlib import Path

import pytest

from benchmarks import soak


def cells(path: Path) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in (path / "soak.md").read_text().splitlines()[4:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.slow
def test_losses_of_runs_that_need_each_other(tmp_path: Path) -> None:
    """The tokenizer comes first though it was not asked for; the same command once more trains nothing."""
    options = ["--out", str(tmp_path), "--steps", "4", "--parts", "2", "--mixed-precision", "no", "--at-once", "2"]
    assert soak.main([*options, "--models", "aim"]) == 0
    found = cells(tmp_path)
    assert list(found) == ["vq", "aim"]
    for first, second, ended in found.values():
        assert float(first) > 0 and float(second) > 0 and ended == "as planned"
    written = (tmp_path / "aim" / "metrics.jsonl").stat().st_mtime_ns
    assert soak.main([*options, "--models", "aim"]) == 0
    assert cells(tmp_path) == found
    assert (tmp_path / "aim" / "metrics.jsonl").stat().st_mtime_ns == written


def test_a_run_that_fails_takes_those_that_need_it_along(tmp_path: Path) -> None:
    (tmp_path / "vq").mkdir()
    (tmp_path / "vq" / "thesis.tex").write_text("years of work")
    assert soak.main(["--out", str(tmp_path), "--steps", "2", "--parts", "1", "--models", "aim"]) == 1
    found = cells(tmp_path)
    assert found["vq"][0] == found["aim"][0] == ""
    assert "something else than a run" in found["vq"][1] and found["aim"][1] == "vq failed"


def test_default_models_need_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    planned: list[soak.Soak] = []
    monkeypatch.setattr(soak, "run_all", lambda soaks, at_once: planned.extend(soaks) or iter(()))
    soak.main(["--out", str(tmp_path)])
    names = {run.name for run in planned}
    assert {"zigma", "aim", "vq"} <= names and "packed" not in names  # whose pictures are the user's


def test_what_can_be_recorded_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there is a CUDA device; never the tokenizer, whose model changes from inside, nor rows of many shapes."""
    planned: list[soak.Soak] = []
    monkeypatch.setattr(soak, "run_all", lambda soaks, at_once: planned.extend(soaks) or iter(()))
    for there in (False, True):
        monkeypatch.setattr(soak.torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(soak, "device_name", lambda device: "")
        soak.main(["--out", str(tmp_path), "--models", "zigma", "aim", "packed"])
    recorded = [run.name for run in planned if "train.cuda_graph=true" in run.overrides]
    assert recorded == ["zigma", "aim"] and [run.name for run in planned[4:]] == ["vq", "zigma", "aim", "packed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--models", "zigme"], "zigme: unknown; expected some of aim"), (["--steps", "15"], "steps in equal parts")],
)
def test_mistakes(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        soak.main(["--out", str(tmp_path), *options])
