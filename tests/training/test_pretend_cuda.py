"""The training loop on a GPU, by tensors that pretend (no GPU needed): the numbers are those of a CPU."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState

import train
from genssm.metrics.classifier import train_classifier
from genssm.metrics.sources import dataset_source
from genssm.training.guard import NonFiniteError
from genssm.training.logging import MetricsLog
from tests.pretend_cuda import CUDA, PASSING, WAITS, PretendCuda
from tests.training.conftest import ROOT, forget_processes, metrics

FEW = ("train.checkpointing_steps=2", "log.log_every=1", "log.sample_every=3", "log.num_inference_steps=3")
RUNS = {
    "zigma": (
        "train.gradient_accumulation_steps=2",
        "data.cache=none",
        "train.layer_shuffle=0.5",
        "train.lr_warmup_steps=0",
    ),
    "dim": ("train.gradient_checkpointing=true", "data.cache=device"),
    "dimsum": ("train.ema_decay=0",),
    "vq": (),
    "text": (),
}


def run(config: str, folder: Path, *options: str) -> list[dict]:
    """Two steps, and a third by the same command; what was logged, without rates."""
    for steps in (2, 3):
        forget_processes()
        path = ROOT / "configs" / "debug" / f"{config}.yaml"
        given = (f"train.output_dir={folder}", f"train.max_train_steps={steps}", "train.train_batch_size=8")
        train.main(["--config", str(path), "--quiet", *given, *FEW, *options])
    return [{key: value for key, value in line.items() if "per_second" not in key} for line in metrics(folder)]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[], PretendCuda]:
    """Lets accelerate take the GPU that is not there, and what asks its driver answer."""

    def enter() -> PretendCuda:
        forget_processes()  # a test before may have left them on the CPU
        monkeypatch.setattr(PartialState, "default_device", property(lambda self: CUDA))
        monkeypatch.setattr(train, "means_cpu", lambda: False)
        monkeypatch.setattr(train, "device_name", str)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
        return PretendCuda()

    monkeypatch.setenv("GENSSM_BACKEND", "chunked")
    yield enter
    forget_processes()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")
@pytest.mark.parametrize("config", RUNS)
def test_a_run_on_the_gpu(config: str, tmp_path: Path, pretend: Callable[[], PretendCuda]) -> None:
    """Loader, step, average, grid, checkpoint and resumption."""
    expected = run(config, tmp_path / "cpu", *RUNS[config])
    with pretend():
        found = run(config, tmp_path / "gpu", *RUNS[config])
    assert [line.pop("memory_gib") for line in found] == [1.0] * 3
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-3)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")
@pytest.mark.parametrize("config", ["zigma", "dim", "dimsum", "text", "motion_frames"])
def test_a_step_waits_once(
    config: str, tmp_path: Path, pretend: Callable[[], PretendCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the verdict on the gradient of the step before, while its own work is under way."""
    waits: list[list[str]] = []
    plain = MetricsLog.step
    monkeypatch.setattr(MetricsLog, "step", lambda self: (waits.append([*WAITS]), plain(self)))
    path = ROOT / "configs" / "debug" / f"{config}.yaml"
    options = ("train.max_train_steps=5", "train.train_batch_size=4", "log.log_every=100", "log.sample_every=0")
    with pretend():
        train.main(["--config", str(path), "--quiet", f"train.output_dir={tmp_path / 'run'}", *options])
    for before, after in ((waits[1], waits[2]), (waits[2], waits[3])):
        assert [wait for wait in after[len(before) :] if wait not in PASSING] == ["aten._local_scalar_dense.default"]


def test_a_classifier_on_the_gpu() -> None:
    """Trained there, its features collected there, from images on the CPU."""
    size = {"path": None, "resolution": None, "crop": None, "channels": None}
    source = dataset_source("digits", "test", Namespace(**size))
    options = {"num_classes": 10, "in_channels": 1, "epochs": 1, "width": 4, "feature_dim": 4}
    network, info = train_classifier(source, source, **options)
    with PretendCuda():
        moved, again = train_classifier(source, source, **options, device=CUDA)
        assert {parameter.device for parameter in moved.parameters()} == {CUDA}
        features = moved.features(torch.zeros(2, 3, *info.image_size, dtype=torch.uint8).to(CUDA)).cpu()
    assert again.test_accuracy == info.test_accuracy
    assert torch.allclose(features, network.features(torch.zeros(2, 3, *info.image_size)), atol=1e-3)


def test_numbers_that_break_on_the_gpu(tmp_path: Path, pretend: Callable[[], PretendCuda]) -> None:
    """The step is repeated there with a watch on every module."""
    with pretend(), pytest.raises(NonFiniteError, match="is not finite"):
        run("zigma", tmp_path / "run", "train.learning_rate=1e30", "train.lr_warmup_steps=0", "train.max_grad_norm=0")
