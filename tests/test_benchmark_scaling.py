"""benchmarks/scaling.py: the table of real runs, how busy a GPU is said to be, a run that fails, mistakes."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import scaling

DEBUG = ["--config", "configs/debug/zigma.yaml"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes of a machine with one GPU")
def test_two_processes_do_twice_the_work(tmp_path: Path) -> None:
    options = ["--steps", "10", "--per-process", "8", "--out", str(tmp_path / "runs"), "--csv", str(tmp_path / "t.csv")]
    scaling.main([*DEBUG, *options])
    with (tmp_path / "t.csv").open() as file:
        one, two = csv.DictReader(file)
    assert (one["processes"], one["items a step"], one["times"]) == ("1", "8", "1.00")
    assert (two["processes"], two["items a step"]) == ("2", "16")
    assert float(two["times"]) == pytest.approx(
        float(two["items/s"].replace(",", "")) / float(one["items/s"].replace(",", "")), abs=0.02
    )
    for processes in (1, 2):  # one training of both, not two side by side
        lines = scaling.logged(tmp_path / "runs" / str(processes))
        assert [line["step"] for line in lines] == list(range(1, 11))


def test_lines_that_are_being_written_do_not_count(tmp_path: Path) -> None:
    assert scaling.logged(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert scaling.logged(tmp_path) == [{"step": 1}, {"step": 2}]


def test_items_have_many_names() -> None:
    assert scaling.per_second({"step": 1, "loss": 0.5, "clips_per_second": 7.0, "memory_gib": 1.0}) == 7.0


def test_busy_as_the_tool_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '97\\n41\\n5\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert scaling.busy_now(2) == [97.0, 41.0]
    tool.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert scaling.busy_now(1) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scaling.busy_now(1) == []


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="something else than a run"):
        scaling.main([*DEBUG, "--processes", "1", "--steps", "10", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "15"], "multiples of 10"),
        (["--processes", "0"], "whole numbers from 1 on"),
        (["train.learning_rat=1"], "learning_rat"),
    ],
)
def test_mistakes(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaling.main([*DEBUG, *options])
