"""What goes wrong around a run: each fault ends with one clear line, and no file that was whole is lost."""

import gzip
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from genssm.errors import cli
from genssm.training.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from genssm.training.guard import NonFiniteError
from genssm.training.logging import MetricsLog
from tests.training.conftest import (
    DEBUG,
    EMA_WEIGHTS,
    ROOT,
    SHORT,
    forget_processes,
    largest_difference,
    run_train,
    weights,
)

STEPS = 24
PLAIN = ("log.sample_every=0", "train.max_train_steps=3", "data.cache=none")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the log excepted, which also notes what failed."""
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != "log.txt")
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def refused(capsys: pytest.CaptureFixture, folder: Path, *overrides: str, config: Path = DEBUG) -> str:
    """The one line with which ``train.py`` ends, as a program would."""
    forget_processes()
    arguments = ["--config", str(config), *SHORT, *PLAIN, f"train.output_dir={folder}", *overrides, "--quiet"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli(lambda: train.main(arguments))
    text = capsys.readouterr().err
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1, text
    assert "Traceback" not in text
    return text[text.index("error: ") :]


# --- bad configurations

CONFIGS = {
    "empty file": ("", "must hold the sections"),
    "a list": ("- 1\n- 2\n", "must hold the sections"),
    "a text": ("zigma", "must hold the sections"),
    "not YAML": ("model: {name: zigma", "not valid YAML"),
    "tabs": ("model:\n\tname: zigma\n", "not valid YAML"),
    "key twice": ("model: {name: zigma, name: dim}\ndata: {name: digits}\n", "given twice"),
    "no model": ("data: {name: digits}\n", "model"),
    "no data": ("model: {name: zigma}\n", "data"),
    "python object": ("model: !!python/object:os.system {}\n", "not valid YAML"),
    "unknown section": ("model: {name: zigma}\ndata: {name: digits}\nmodle: {}\n", "modle: unknown key"),
    "section is a number": ("model: {name: zigma}\ndata: {name: digits}\ntrain: 3\n", "train must be a section"),
    "section is a list": ("model: {name: zigma}\ndata: [digits]\n", "data must be a section"),
    "number as name": ("model: {name: 7}\ndata: {name: digits}\n", "model.name"),
    "anchor to nothing": ("model: *none\n", "not valid YAML"),
}
OVERRIDES = {
    "train.learning_rate=-1": "learning_rate is -1",
    "train.learning_rate=.inf": "learning_rate is inf",
    "train.learning_rate=1e-4x": "expected a number",
    "train.weight_decay=-0.1": "weight_decay is -0.1",
    "train.max_grad_norm=.nan": "max_grad_norm is nan",
    "train.ema_decay=1.5": "less than 1",
    "train.class_dropout_prob=1": "less than 1",
    "train.train_batch_size=0": "more than 0",
    "train.train_batch_size=2.5": "whole number",
    "train.checkpointing_steps=0": "more than 0",
    "train.checkpoints_total_limit=-1": "at least 0",
    "train.gradient_accumulation_steps=3": "multiple of 3",
    "train.mixed_precision=fp16": "needs a GPU",
    "train.lr_scheduler=step": "constant, linear, cosine",
    "train.init_from=nowhere": "no pipeline folder",
    "train.resume_from_checkpoint=newest": "is no checkpoint",
    "log.num_samples=0": "more than 0",
    "log.report_to=mlflow": "none, tensorboard, wandb",
    "data.num_workers=-2": "at least 0",
    "data.name=imagenet": "is not a data set",
    "data.channels=4": "1, 3",
    "data.crop=squeeze": "adm",
    "data.resolution=-8": "resolution",
    "data.latents.form=sample": "means nothing",
    "data.split=valid": "train and test",
    "data.cache=disk": "none, ram, device",
    "model.name=unet": "expected one of",
    "model.args.patch_size=3": "patch",
    "model.args.hidden_size=0": "hidden_size",
    "model.args.num_layers=two": "whole number",
    "model.args.num_classes=11": "10 classes",
    "model.args={}": "in_channels",
    "objective.path=spiral": "linear, gvp, vp",
    "objective.prediction_type=v_prediction": "v_prediction",
    "objective.weighting=min_snr": "min_snr",
    "objective.time_epsilon=2": "time_epsilon",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_config_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, message = CONFIGS[name]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    forget_processes()
    with pytest.raises(SystemExit) as end:
        cli(lambda: train.main(["--config", str(file), "--quiet"]))
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and "Traceback" not in error
    assert [f.name for f in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("override", OVERRIDES)
def test_bad_values(override: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert OVERRIDES[override] in refused(capsys, tmp_path / "run", override)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- bad data


def picture(value: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, size, dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def images(root: Path, **replaced: bytes) -> tuple[str, ...]:
    """Ten classes of one picture each, some of them replaced."""
    for i in range(10):
        (root / str(i)).mkdir(parents=True)
        (root / str(i) / "a.png").write_bytes(replaced.get(f"p{i}", picture(i)))
    return ("data.name=image_folder", f"data.path={root}", "train.train_batch_size=10")


def listed(root: Path, text: str) -> tuple[str, ...]:
    images(root)
    (root / "metadata.jsonl").write_text(text)
    return ("data.name=image_folder", f"data.path={root}")


def image_npz(root: Path, data: bytes | None = None, **arrays: np.ndarray) -> tuple[str, ...]:
    root.mkdir()
    if data is None:
        np.savez(root / "a.npz", **arrays)
    else:
        (root / "a.npz").write_bytes(data)
    return ("data.name=npz", f"data.path={root / 'a.npz'}")


def fashion(root: Path, data: bytes, name: str = "train-images-idx3-ubyte") -> tuple[str, ...]:
    root.mkdir()
    labels = b"\0\0\x08\x01" + (2).to_bytes(4, "big") + b"\0\1"
    pixels = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 8, 8)) + bytes(128)
    for file, good in (("train-images-idx3-ubyte", pixels), ("train-labels-idx1-ubyte", labels)):
        (root / file).write_bytes(good)
    if name.endswith(".gz"):
        (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    (root / name).write_bytes(data)
    return ("data.name=fashion_mnist", f"data.path={root}", "data.resolution=null", "data.channels=null")


LATENTS = (
    "data.name=latents", "data.resolution=null", "data.channels=null", "model.args.sample_size=4",
    "model.args.in_channels=2", "model.args.patch_size=2", "train.train_batch_size=10",
)  # fmt: skip


def latents() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((10, 2, 4, 4), np.float32)


def stored(root: Path, make: Callable[[Path], Path | None], *more: str) -> tuple[str, ...]:
    root.mkdir()
    path = make(root) or root
    declared = ("data.latents.form=sample", "data.latents.scaled=true")
    return (*LATENTS, f"data.path={path}", *declared, *more)


def own(root: Path, *, cut: int = 0, meta: str | None = None, labels: int = 10) -> None:
    np.save(root / "latents.npy", latents())
    np.save(root / "labels.npy", np.arange(labels))
    declared = {"form": "sample", "scaled": True, "scale": 1.0, "shift": 0.0, "flip_rows": False}
    (root / "meta.json").write_text(json.dumps(declared) if meta is None else meta)
    if cut:
        os.truncate(root / "latents.npy", (root / "latents.npy").stat().st_size - cut)


def pairs(root: Path, *, broken: bytes) -> None:
    for folder in ("a_features", "a_labels"):
        (root / folder).mkdir()
    for i, z in enumerate(latents()):
        np.save(root / "a_features" / f"{i}.npy", z)
        np.save(root / "a_labels" / f"{i}.npy", np.array([i]))
    (root / "a_features" / "7.npy").write_bytes(broken)


def shard(root: Path, *, keep: float) -> Path:
    with tarfile.open(root / "0.tar", "w") as tar:
        for i, z in enumerate(latents()):
            stream = io.BytesIO()
            np.save(stream, z)
            for name, data in ((f"{i}.latent.npy", stream.getvalue()), (f"{i}.cls", str(i).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    os.truncate(root / "0.tar", int((root / "0.tar").stat().st_size * keep))
    return root / "0.tar"


def archive(root: Path, suffix: str, *, keep: float) -> Path:
    file = root / f"a{suffix}"
    if suffix == ".npz":
        np.savez(file, latents=latents(), labels=np.arange(10))
    elif suffix == ".zip":
        with zipfile.ZipFile(file, "w") as made:
            made.writestr("img-mean-std-0.npy", b"x" * 300)
    else:
        save_file({"latents": torch.from_numpy(latents()), "labels": torch.arange(10)}, file)
    os.truncate(file, int(file.stat().st_size * keep))
    return file


def memmap(root: Path) -> None:
    latents().tofile(root / "a_feature.dat")
    np.arange(9).tofile(root / "a_label.dat")


def not_finite(root: Path) -> Path:
    values = latents()
    values[4, 1, 2, 2] = np.nan
    np.savez(root / "a.npz", latents=values, labels=np.arange(10))
    return root / "a.npz"


GREY = np.zeros((10, 8, 8), np.uint8)
DATA: dict[str, tuple[Callable[[Path], tuple[str, ...]], str]] = {
    "cut-off PNG": (lambda p: images(p, p3=picture(3)[:70]), "3/a.png"),
    "empty PNG": (lambda p: images(p, p3=b""), "3/a.png"),
    "text called PNG": (lambda p: images(p, p3=b"hello"), "3/a.png"),
    "broken PNG chunk": (lambda p: images(p, p3=picture(3)[:40] + b"\0" * 40), "3/a.png"),
    "cut-off PNG in a worker": (lambda p: (*images(p, p3=picture(3)[:70]), "data.num_workers=1"), "3/a.png"),
    "first image cut off": (lambda p: images(p, p0=picture(0)[:70]), "0/a.png"),
    "image of another size": (lambda p: (*images(p, p3=picture(3, (9, 9))), "data.resolution=null"), "3/a.png"),
    "cached cut-off PNG": (lambda p: (*images(p, p3=picture(3)[:70]), "data.cache=ram"), "3/a.png"),
    "no such folder": (lambda p: ("data.name=image_folder", f"data.path={p}"), "does not exist"),
    "empty folder": (lambda p: p.mkdir() or ("data.name=image_folder", f"data.path={p}"), "no images"),
    "metadata no JSON": (lambda p: listed(p, '{"file_name": "0/a.png"}\n{"file'), "line 2"),
    "metadata a number": (lambda p: listed(p, "3\n"), "file_name"),
    "metadata without names": (lambda p: listed(p, '{"label": 3}\n'), "file_name"),
    "metadata of a missing file": (lambda p: listed(p, '{"file_name": "no.png"}\n'), "no.png"),
    "images of floats": (lambda p: image_npz(p, images=GREY.astype(float), labels=np.arange(10)), "uint8"),
    "npz without images": (lambda p: image_npz(p, pictures=GREY), "arr_0"),
    "fewer labels than images": (lambda p: image_npz(p, images=GREY, labels=np.arange(9)), "9 labels"),
    "npz that is none": (lambda p: image_npz(p, data=b"PK\3\4 broken"), "a.npz"),
    "npz of objects": (lambda p: image_npz(p, images=np.array([GREY, None], dtype=object)), "a.npz"),
    "classes missing": (lambda p: image_npz(p, images=GREY, labels=np.arange(10) % 3), "3 classes"),
    "idx of another magic": (lambda p: fashion(p, b"\1\2\3\4" + bytes(200)), "train-images"),
    "idx cut off": (lambda p: fashion(p, b"\0\0\x08\x03" + bytes(7)), "train-images"),
    "gzip cut off": (
        lambda p: fashion(p, gzip.compress(bytes(3000))[:20], "train-images-idx3-ubyte.gz"),
        "train-images",
    ),
    "own latents cut off": (lambda p: stored(p, lambda r: own(r, cut=100)), "layout own"),
    "own latents without meta": (lambda p: stored(p, lambda r: own(r, meta="{")), "layout own"),
    "own latents with a poor meta": (lambda p: stored(p, lambda r: own(r, meta="{}")), "layout own"),
    "labels of other latents": (lambda p: stored(p, lambda r: own(r, labels=7)), "7 labels"),
    "empty array among pairs": (lambda p: stored(p, lambda r: pairs(r, broken=b"")), "row 7"),
    "pickled array among pairs": (lambda p: stored(p, lambda r: pairs(r, broken=b"\x80\x04K\1.")), "row 7"),
    "tar cut in a member": (lambda p: stored(p, lambda r: shard(r, keep=0.45)), "tar"),
    "tar cut in the first header": (lambda p: stored(p, lambda r: shard(r, keep=0.005)), "tar"),
    "npz cut off": (lambda p: stored(p, lambda r: archive(r, ".npz", keep=0.5)), "layout archive"),
    "safetensors cut off": (lambda p: stored(p, lambda r: archive(r, ".safetensors", keep=0.5)), "layout archive"),
    "zip cut off": (lambda p: stored(p, lambda r: archive(r, ".zip", keep=0.5)), "layout edm_zip"),
    "zip of garbage": (lambda p: stored(p, lambda r: archive(r, ".zip", keep=1.0)), "row 0"),
    "memmap of another length": (lambda p: stored(p, memmap), "9 labels"),
    "latents of another layout": (lambda p: stored(p, own, "data.latents.layout=pairs"), "layout pairs"),
    "latents of no known layout": (lambda p: stored(p, own, "data.latents.layout=mine"), "expected auto"),
    "a batch with NaN": (lambda p: stored(p, not_finite), "the data are not finite: latents"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_bad_data(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, message = DATA[name]
    overrides = make(tmp_path / "data")
    before = contents(tmp_path / "data")
    assert message in refused(capsys, tmp_path / "run", *overrides)
    assert contents(tmp_path / "data") == before
    assert list_checkpoints(tmp_path / "run") == []


# --- bad checkpoints


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 10 and 13."""
    return run_train(tmp_path_factory.mktemp("pair") / "run", "train.max_train_steps=13")


NEWEST = "checkpoints/step_0000013"


def cut(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * keep))


def restate(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        torch.save(change(state), folder / "state.pt")

    return write


def reweigh(change: Callable[[dict[str, torch.Tensor]], dict]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    return write


def without(state: dict, name: str) -> dict:
    return {k: v for k, v in state.items() if k != name}


class Evil:
    """Would run a command when unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/genssm-was-here",)


def reconfigure(**changes: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "pipeline" / "denoiser" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return write


DAMAGED = "step_0000013: the run then goes on from step_0000010"
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut off": (cut("model.safetensors"), DAMAGED),
    "weights empty": (cut("model.safetensors", 0), DAMAGED),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), DAMAGED),
    "state cut off": (cut("state.pt"), DAMAGED),
    "state empty": (cut("state.pt", 0), DAMAGED),
    "state is a list": (restate(lambda s: [1, 2]), DAMAGED),
    "state without a format": (restate(lambda s: without(s, "format")), DAMAGED),
    "state without an optimiser": (restate(lambda s: without(s, "optimizer")), DAMAGED),
    "state of a later version": (restate(lambda s: s | {"format": 9}), "update genssm"),
    "state that runs code": (restate(lambda s: s | {"x": Evil()}), DAMAGED),
    "optimiser of another model": (
        restate(lambda s: s | {"optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict()}),
        "number of parameter groups",
    ),
    "weights of another shape": (
        reweigh(lambda w: w | {next(iter(w)): torch.zeros(2)}),
        "another model than the configuration",
    ),
    "a weight too few": (reweigh(lambda w: dict(list(w.items())[1:])), "another model than the configuration"),
    "a weight too many": (reweigh(lambda w: w | {"extra": torch.zeros(1)}), "another model than the configuration"),
    "average cut off": (cut(EMA_WEIGHTS), DAMAGED),
    "average missing": (lambda f: (f / EMA_WEIGHTS).unlink(), DAMAGED),
    "no pipeline": (lambda f: shutil.rmtree(f / "pipeline"), DAMAGED),
    "configuration no JSON": (cut("pipeline/denoiser/config.json"), DAMAGED),
    "another class": (reconfigure(_class_name="DiM"), "_class_name: 'DiM' -> 'ZigMa'"),
    "another scan": (reconfigure(num_layers=7), "num_layers: 7 -> "),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(name: str, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Said before anything is written; with the folder removed, the same command goes on from the older one."""
    make, message = CHECKPOINTS[name]
    run = tmp_path / "run"
    shutil.copytree(pair, run)
    make(run / NEWEST)
    before = contents(run)
    options = ("train.max_train_steps=13", "data.cache=ram", "train.max_train_steps=14")
    assert message in refused(capsys, run, *options)
    after = contents(run)
    assert {k: v for k, v in after.items() if k != "config.yaml"} == {
        k: v for k, v in before.items() if k != "config.yaml"
    }
    assert not Path("/tmp/genssm-was-here").exists()


def test_going_on_from_the_older_checkpoint(pair: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pair, run)
    shutil.rmtree(run / NEWEST)
    run_train(run)
    assert largest_difference(weights(straight, STEPS), weights(run, STEPS)) == 0


def test_folders_that_are_no_run_of_this_configuration(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = contents(pair)
    assert "train.seed: 0 -> 1" in refused(capsys, pair, "train.seed=1")
    assert "data.flip: False -> True" in refused(capsys, pair, "data.flip=true")
    assert "already holds step_0000013" in refused(capsys, pair, "train.resume_from_checkpoint=none")
    assert contents(pair) == before
    (tmp_path / "file").write_text("x")
    assert "file" in refused(capsys, tmp_path / "file" / "run")
    (tmp_path / "config.yaml").write_text("model: {")
    assert "not valid YAML" in refused(capsys, tmp_path)


def test_number_of_faults() -> None:
    assert len(CONFIGS) + len(OVERRIDES) + len(DATA) + len(CHECKPOINTS) >= 100


# --- a disk without room, a signal, a kill


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Files of this process may not grow beyond a number of bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 20_000, 280_000])
def test_full_disk(size: int, pair: Path, tmp_path: Path, small_disk: Callable, capsys: pytest.CaptureFixture) -> None:
    """Wherever it strikes, the checkpoints of before stay whole and the same command goes on when there is room."""
    run = tmp_path / "run"
    shutil.copytree(pair, run)
    before = contents(run / "checkpoints")
    small_disk(size)
    options = ("train.max_train_steps=16", "data.cache=ram", "log.log_every=100")
    try:
        error = refused(capsys, run, *options)
    finally:
        small_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert "cannot write" in error or "make room" in error
    if size >= 20_000:
        assert "step_0000013 is whole" in error
    assert contents(run / "checkpoints") == before
    run_train(run, *options)
    assert latest_checkpoint(run).name == "step_0000016"


def test_sigterm_ends_with_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the middle of a step: the step is finished and saved, the exit code is 0."""

    def step_and_signal(self: MetricsLog) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "step", step_and_signal)
    with pytest.raises(SystemExit) as end:
        cli(lambda: run_train(tmp_path / "run") and None)
    assert end.value.code == 0
    assert latest_checkpoint(tmp_path / "run").name == "step_0000001"


def test_nan_batch_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """The batch of step 5 holds a NaN: nothing of it reaches the weights, step 4 is whole."""
    values = np.random.default_rng(0).standard_normal((10, 2, 4, 4), np.float32)
    np.savez(tmp_path / "a.npz", latents=values, labels=np.arange(10))
    options = (*LATENTS, f"data.path={tmp_path / 'a.npz'}", "data.latents.form=sample", "data.latents.scaled=true")
    run = run_train(tmp_path / "run", *options, "train.max_train_steps=4")
    values[3] = np.nan
    np.savez(tmp_path / "a.npz", latents=values, labels=np.arange(10))
    before = contents(run / "checkpoints")
    with pytest.raises(NonFiniteError, match=r"step 5: .*the data are not finite: latents"):
        run_train(run, *options)
    assert contents(run / "checkpoints") == before


_KILLED_SAVES = """
import os, signal, sys
from pathlib import Path
import torch
from genssm.training import checkpoint as c

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree")
limit = seen = 0

def watch(event, arguments):
    global seen
    if limit and event in EVENTS:
        seen += 1
        if seen == limit:
            os.kill(os.getpid(), signal.SIGKILL)

def pipeline(folder):
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")

def save(run, step):
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, step)
    c.save_checkpoint(run, step, model, {"seed": 0}, pipeline)
    c.remove_old_checkpoints(run, 2)

def check(run):
    # As a resuming run does; then every folder with the name of a checkpoint must be whole.
    c.restore_replaced(run)
    found = c.list_checkpoints(run)
    for folder in found:
        model = torch.nn.Linear(3, 2)
        state = c.load_checkpoint(folder, model)
        assert state["step"] == c.step_of(folder) and float(model.weight[0, 0]) == c.step_of(folder)
        assert (folder / "pipeline/model_index.json").is_file()
    return [c.step_of(folder) for folder in found]

sys.addaudithook(watch)
root = Path(sys.argv[1])
torch.set_num_threads(1)
moments = 0
for step, allowed in ((30, ([10, 20], [10, 20, 30], [20, 30])), (20, ([10, 20],))):
    for moment in range(1, 1000):
        run = root / f"{step}_{moment}"
        for old in (10, 20):
            save(run, old)
        child = os.fork()
        if child == 0:
            limit, seen = moment, 0
            save(run, step)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert check(run) in allowed, (step, moment, check(run))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        moments += 1
        save(run, step)
        assert check(run) in allowed[-1:]
        assert not list((run / "checkpoints").glob(".*")), list((run / "checkpoints").glob(".*"))
print(moments)
"""


def test_kill_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """SIGKILL before every single operation on the file system: of a new checkpoint, and of one that is replaced."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_SAVES, str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 40


def test_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    """A run folder without a checkpoint is begun again by the same command."""
    run = run_train(tmp_path / "run", "train.max_train_steps=2")
    shutil.rmtree(run / "checkpoints" / "step_0000002")
    (run / ".partial-config.yaml").write_text("half")
    (run / "checkpoints" / ".partial-step_0000002").mkdir()
    run_train(run, "train.max_train_steps=2")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".partial-config.yaml").write_text("half")
    run_train(begun, "train.max_train_steps=2")
    assert load_checkpoint(latest_checkpoint(run), _model_of(run))["step"] == 2


def _model_of(run: Path) -> torch.nn.Module:
    from genssm.models import ZigMa

    return ZigMa.from_pretrained(latest_checkpoint(run) / "pipeline", subfolder="denoiser")
