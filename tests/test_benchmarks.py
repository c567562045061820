"""Benchmarks of whole models: each beside a transformer of its size, and mistakes said before anything is timed."""

import csv
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import decoding, everything, floor, models, motion_frames
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


def test_equal_parameters() -> None:
    """The transformer with as many layers as bring it nearest, whatever the model's own depth."""
    args = models.parse_arguments(["--device", "cpu", "--width", "64", "--layers", "9", "--pixels", "64", "--equal"])
    for name in ("zigma:B/2", "dimsum:L/2"):
        own, size = models.make(models.Case(64, name, "model", "eager"), args)
        beside, _ = models.make(models.Case(64, name, "dit", "eager"), args)
        equal, found = models.make(models.Case(64, name, "equal", "eager"), args)
        parameters = models.count(own)
        away = abs(models.count(equal) - parameters)
        for layers in (found.layers - 1, found.layers + 1):
            other, _ = models.build("dit", replace(size, layers=layers), args, 8)
            assert away <= abs(models.count(other) - parameters)
        assert found.width == size.width and beside.config.num_layers == size.layers == 9 != found.layers


def test_who_wins_from_where() -> None:
    """The smallest size from which on a model is ahead without interruption; what ran out of memory is behind."""
    figures = {  # pixels: the model's time, the transformer's; memory of training, the same
        64: (1.0, 2.0, 1.0, 2.0), 128: (3.0, 2.0, 1.0, 2.0), 256: (3.0, 4.0, 1.0, 1.0), 512: (3.0, math.nan, 1.0, 1.0),
    }  # fmt: skip
    rows = []
    for pixels, (own, other, memory, other_memory) in figures.items():
        for which, ms, peak in (("model", own, memory), ("dit", other, other_memory)):
            case = models.Case(pixels, "zigma:B/2", which, "eager")
            rows.append(models.Row(case, 1, 16, 10, ms, 1.0, None, peak))
    (line,) = models.winners(rows)
    wins = dict(zip(models.WINS, line))
    assert (wins["model wins"], wins["against"], wins["mode"]) == ("zigma:B/2", "dit as zigma:B/2", "eager")
    assert (wins["forward"], wins["fwd+bwd"]) == ("from 256 on", "not at 512")
    assert (wins["forward memory"], wins["training memory"]) == ("", "not at 512")
    assert set(next(models.winners([replace(row, problem="broken") for row in rows]))[3:]) == {""}


@pytest.mark.slow
def test_processes(tmp_path: Path) -> None:
    """Rows measured side by side come into the same table, in its order."""
    options = ["--models", "zigma:B/2", "--pixels", "64", "--processes", "2"]
    assert models.main([*SMALL, *options, "--csv", str(tmp_path / "table.csv")]) == 0
    own, other = csv.DictReader((tmp_path / "table.csv").open())
    assert (own["model"], other["model"]) == ("zigma:B/2", "dit as zigma:B/2")
    assert float(own["fwd+bwd ms"]) > 0 and float(other["fwd+bwd ms"]) > 0


def test_a_row_that_fails(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why, the others are measured, and the exit code tells."""
    monkeypatch.setattr(benchmarking, "_SECONDS", 0.0)

    def compiled(model: torch.nn.Module) -> None:
        if isinstance(model, models.MODELS["zigma"]):
            model.forward = broken

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such code\nand more")

    monkeypatch.setattr(models, "_compile", compiled)
    assert models.main([*SMALL, "--models", "zigma:B/2", "--pixels", "64", "--modes", "eager", "compiled"]) == 1
    out = capsys.readouterr().out
    assert "zigma:B/2, compiled: RuntimeError: no such code (" in out and "nan" not in out
    assert re.search(r"dit as zigma:B/2, compiled: [0-9.]+ ms forward", out)


@pytest.mark.parametrize("name", ["dim:L-256", "zigma:sweep2_b1_pe2"])
def test_floor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product and scan of a pass is counted, and timed once for each kind."""
    timed = []
    monkeypatch.setattr(floor, "captured_microseconds", lambda call, device: timed.append(call()) or 500.0)
    monkeypatch.setattr(floor, "measure", lambda *args: {"forward": 30.0, "both": 100.0})
    options = ["--models", name, "--pixels", "64", "--each", "--csv", str(tmp_path / "table.csv")]
    floor.main([*SMALL, *options])
    forward, both = csv.DictReader((tmp_path / "table.csv").open())
    assert int(forward["scans"]) == 3 and int(both["scans"]) == 6  # a scan of each layer, there and back
    assert int(both["products"]) > 2 * int(forward["products"]) >= 2 * 3 * 4
    for row in (forward, both):
        calls = {what: int(row[what]) for what in ("products", "scans")}
        assert all(float(row[f"{what} ms"]) == calls[what] / 2 for what in calls)
        assert float(row["floor ms"]) == sum(calls.values()) / 2 and row["limit ms"] == ""
        assert float(row["x floor"]) == pytest.approx(float(row["measured ms"]) / float(row["floor ms"]), abs=0.01)
    assert len(timed) < int(both["products"])  # layers are alike


def test_floor_counts_operations() -> None:
    """Two for each multiplication of a product; an exponential for each state that a direction's step updates."""
    device = torch.device("cpu")
    args = floor.parse_arguments([*SMALL, "--pixels", "64"])
    model, size = models.make(models.Case(64, "zigma:sweep2_b1_pe2", "model", "eager"), args)
    found = floor.operations_of(model, 2, size.side, device, None)
    inner, tokens = 64, 64
    scans = [o for o in found if o.scan]
    assert {o.work for o in scans} == {2 * 2 * tokens * inner * 16}
    assert {o.name.split()[0] for o in scans} == {"selective_scan_fwd", "selective_scan_bwd"}
    projections = [o for o in found if o.work == 2 * (2 * tokens) * 32 * (2 * inner)]  # in_proj of a block
    assert sum(o.calls["forward"] for o in projections) == 3 and sum(o.calls["both"] for o in projections) == 9
    assert all(o.milliseconds > 0 for o in found)


def test_limits() -> None:
    product = floor.Operation("mm", False, 3000, {"forward": 2, "both": 6}, 1.0)
    scan = floor.Operation("scan", True, 400, {"forward": 1, "both": 2}, 2.0)
    forward, both = floor.lines([product, scan], {"forward": 6.0, "both": 20.0}, (1000.0, 100.0))
    assert dict(zip(floor.HEAD[3:], forward)) == {
        "pass": "forward", "products": "2", "scans": "1", "products ms": "2.00", "scans ms": "2.00",
        "floor ms": "4.00", "measured ms": "6.00", "x floor": "1.50", "limit ms": "10.00",
    }  # fmt: skip
    assert both[0] == "forward + backward" and both[-2:] == ("2.00", "26.00")


def test_everything(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU runs one command at a time; what fails is said, and the last one sees all GPUs."""
    (tmp_path / "says.py").write_text("import os, sys; print('on', os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:])")
    monkeypatch.setattr(everything, "ROOT", tmp_path)
    monkeypatch.setattr(everything, "visible", lambda: ["4", "7"])
    jobs = [everything.Job(name, "says a") for name in "abc"]
    jobs += [everything.Job("broken", "nothing_there"), everything.Job("last", "says", together=True)]
    monkeypatch.setattr(everything, "JOBS", jobs)
    assert everything.main(["--out", str(tmp_path / "logs")]) == 1
    logs = {job.name: (tmp_path / "logs" / f"{job.name}.log").read_text() for job in jobs}
    assert {logs[name] for name in "abc"} <= {"on 4 a\n", "on 7 a\n"}
    assert logs["last"] == "on 4,7 --processes 2\n" and "No module named" in logs["broken"]
    out = capsys.readouterr().out
    assert "on 4,7 --processes 2" in out and re.search(r"\| broken +\| \d+ +\| failed \(1\)", out)
    assert len(re.findall(r"\| done", out)) == 4
    assert everything.main(["--out", str(tmp_path / "logs"), "--only", "a"]) == 0


@pytest.mark.parametrize("job", everything.JOBS, ids=lambda job: job.name)
@pytest.mark.parametrize("gpus", [0, 4])
def test_commands_of_everything(job: everything.Job, gpus: int) -> None:
    """Their options are known and their models and shapes exist."""
    command = job.command(gpus)
    if not command:
        return
    module, options = command[2], command[3:]
    if module == "benchmarks.decoding":
        assert decoding.parse_arguments(options).models
    elif module == "benchmarks.models":
        models.check(models.parse_arguments(options))
    elif module == "benchmarks.floor":
        models.check(floor.parse_arguments(options))
    else:
        asked = benchmarking.parser("", (), "")
        for name in ("--directions", "--orders"):  # of the scan
            asked.add_argument(name, nargs="+")
        asked.parse_args(options)
        assert (everything.ROOT / Path(*module.removeprefix("genssm.").split(".")).with_suffix(".py")).exists()


def test_everything_is_what_make_runs() -> None:
    command = "python -m benchmarks.everything"
    assert command in (everything.ROOT / "Makefile").read_text()
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:], "--list"], cwd=everything.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "genssm.kernels.selective_scan.benchmark" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "0"], "expected 1 or more"),
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
