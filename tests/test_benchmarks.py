"""Benchmarks of whole models: each beside a transformer of its size, and mistakes said before anything is timed."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import decoding, models, motion_frames
from genssm.kernels import benchmarking
from tests.pretend_graphs import PretendGraph

SMALL = ["--device", "cpu", "--width", "32", "--layers", "3", "--tokens", "16"]


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward, done = torch.Tensor.backward, []
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *args: (done.append(self), backward(self, *args)))

    def counted(run: Callable[[], None], device: torch.device) -> float:
        """A millisecond, and one more for each backward pass of the call."""
        before = len(done)
        run()
        return 1.0 + len(done) - before

    monkeypatch.setattr(models, "milliseconds", counted)
    names = ["zigma:B/2", "dim:L-256"]
    models.main([*SMALL, "--models", *names, "--pixels", "64", "128", "--csv", str(tmp_path / "table.csv")])
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["pixels"], row["model"]) for row in table] == [
        (pixels, row) for pixels in ("64", "128") for name in names for row in (name, f"dit as {name}")
    ]
    assert [row["batch x tokens"] for row in table[::4]] == ["1 x 16", "1 x 64"]
    for row in table:
        assert float(row["forward ms"]) == 1 and float(row["fwd+bwd ms"]) == 2
        if row["model"].startswith("dit"):
            assert row["x fwd"] == row["x both"] == "1.00"


@pytest.mark.gpu
def test_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model in each mode, beside the transformer in the same one."""
    monkeypatch.setattr(benchmarking, "_SECONDS", 0.0)
    small = ["--device", "cuda", "--width", "32", "--layers", "3", "--tokens", "16", "--pixels", "64"]
    modes = ["eager", "captured"]
    models.main([*small, "--models", "zigma:B/2", "--modes", *modes, "--csv", str(tmp_path / "table.csv")])
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["model"], row["mode"]) for row in table] == [
        (name, mode) for name in ("zigma:B/2", "dit as zigma:B/2") for mode in modes
    ]
    assert [bool(row["training MiB"]) for row in table] == [True, False, True, False]
    assert [row["x both"] for row in table[2:]] == ["1.00", "1.00"]


def test_a_captured_pass_is_the_pass_itself(
    pretend_graphs: type[PretendGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passes are recorded once and replayed; their memory is not measured."""
    monkeypatch.setattr(benchmarking, "_SECONDS", 0.0)
    args = models.parse_arguments([*SMALL, "--pixels", "64"])
    model, _ = models.build("zigma:B/2", None, args, 8)
    found = models.measure(model, 1, 8, torch.device("cpu"), None, captured=True)
    assert found["forward"] > 0 and found["both"] > 0 and pretend_graphs.replays > 3
    assert found["forward_memory"] is found["both_memory"] is None


def test_out_of_memory(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that does not fit says so, and the next ones are measured."""
    monkeypatch.setattr(benchmarking, "_SECONDS", 0.0)
    backward = torch.Tensor.backward

    def small(loss: torch.Tensor) -> None:
        if not seen:
            seen.append(loss)
            raise torch.OutOfMemoryError("no memory")
        backward(loss)

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "backward", small)
    models.main([*SMALL, "--models", "zigma:B/2", "--pixels", "64"])
    out = capsys.readouterr().out
    assert "forward, out of memory with backward" in out and "| -" in out and "nan" not in out
    assert "dit as zigma:B/2, eager: " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "zigme:B/2"], "expected one of dim, dimsum, zigma"),
        (["--models", "zigma:B/3"], "no preset 'B/3'; it has S/1"),
        (["--pixels", "100"], "multiple of 8"),
        (["--modes", "eager", "captured"], "CUDA graphs, which cpu does not have"),
    ],
)
def test_mistakes(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.main([*SMALL, *options])


def test_long_motions(tmp_path: Path) -> None:
    """Two denoisers of one size, at each length."""
    small = ["--device", "cpu", "--width", "32", "--layers", "3", "--steps", "1"]
    motion_frames.main([*small, "--frames", "12", "30", "--csv", str(tmp_path / "frames.csv")])
    table = list(csv.DictReader((tmp_path / "frames.csv").open()))
    assert [(row["frames"], row["model"]) for row in table] == [
        (frames, model) for frames in ("12", "30") for model in ("motion_mamba_frames", "attention")
    ]
    for row in table:
        assert float(row["seconds"]) > 0 and row["parameters"] == table[0]["parameters"]
        assert row["model"] != "attention" or row["x attention"] == "1.00"
    with pytest.raises(ValueError, match="--frames must be 2"):
        motion_frames.main([*small, "--frames", "1"])


def test_decoding(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--layers", "1", "--tokens-side", "2"]
    decoding.main([*small, "--models", "B:1", "B:2", "--csv", str(tmp_path / "table.csv")])
    one, two = csv.DictReader((tmp_path / "table.csv").open())
    assert one["codes"] == two["codes"] == "4" and one["parameters"] == two["parameters"]
    for row, images in ((one, 1), (two, 2)):
        assert row["model"] == "AiM-B, plain loop" and row["images"] == str(images)
        assert float(row["images per second"]) == pytest.approx(images / float(row["seconds"]), rel=0.1)


@pytest.mark.parametrize("name", ["B", "B:0", "S:8", "B:x"])
def test_decoding_mistakes(name: str) -> None:
    with pytest.raises(ValueError, match="PRESET:IMAGES with a preset of B, L, XL, 1B"):
        decoding.main(["--device", "cpu", "--models", name])


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--profile"], "a captured graph, which cpu does not have"), (["--tokens-side", "0"], "must be 1 or more")],
)
def test_decoding_refuses(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoding.main(["--device", "cpu", *options])
