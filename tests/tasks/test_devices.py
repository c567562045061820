"""The loss of every kind of training on an accelerator that is not there; see :mod:`tests.fake_device`."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from genssm.config import load_config
from genssm.tasks import build_task
from genssm.tasks.motion import MotionDenoising
from genssm.training.layer_shuffle import shuffle_layers
from tests.fake_device import CUDA, fake_device, place
from tests.tasks.conftest import ROOT, run_train

ONE_STEP = ("train.max_train_steps=1", "train.checkpointing_steps=1", "log.sample_every=0")
# Debug configuration, the one whose first checkpoint it needs and the key for that, other overrides.
CASES = {
    "zigma": ("zigma", None, ("train.class_dropout_prob=0.1", "train.layer_shuffle=0.99")),
    "dim": ("dim", None, ()),
    "dimsum": ("dimsum", None, ("train.gradient_checkpointing=true",)),
    "text": ("text", None, ()),
    "video": ("video", None, ()),
    "vq": ("vq", None, ("objective.adversarial_weight=0.1", "objective.restart_every=1")),
    "aim": ("aim", ("vq", "data.vae"), ()),
    "aim_text": ("aim_text", ("vq", "data.vae"), ()),
    "maskmamba": ("maskmamba", ("vq", "data.vae"), ()),
    "motion_vae": ("motion_vae", None, ()),
    "motion_frames": ("motion_frames", None, ("motion.key_frame_ratio=0.2", "objective.prediction_type=sample")),
    "motion_mamba": ("motion_mamba", ("motion_vae", "motion.vae"), ("motion.contrastive_weight=0.5",)),
}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one step of what other runs need."""
    folder = tmp_path_factory.mktemp("first_stage")
    return {name: run_train(name, folder / name, *ONE_STEP) for name in ("vq", "motion_vae")}


@pytest.mark.parametrize("case", CASES)
def test_a_loss_touches_one_device(
    case: str, first_stage: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, needs, overrides = CASES[case]
    given = (f"train.output_dir={tmp_path / 'run'}", *overrides)
    if needs is not None:
        given = (*given, f"{needs[1]}={first_stage[needs[0]]}")
    config = load_config(ROOT / "configs" / "debug" / f"{name}.yaml", given)
    # The host is told that number once, when training begins.
    monkeypatch.setattr(MotionDenoising, "_latent_noise", lambda self: 0.0)
    with fake_device(monkeypatch):
        task = build_task(config, CUDA)
        task.learner.to(CUDA).train()
        if config.train.layer_shuffle:
            shuffle_layers(task.model, config.train.layer_shuffle)
        if config.train.gradient_checkpointing:
            task.model.enable_gradient_checkpointing()
        numbers = task.random_numbers(4, None)  # a generator of the device needs its driver
        assert {x.device for x in numbers.values()} <= {CUDA}
        batch = place(default_collate([task.dataset.item(i, i) for i in range(4)]), CUDA)
        loss = task.loss(task.learner, batch, numbers)
    assert loss.shape == (4,) and loss.device == CUDA and loss.dtype == torch.float32
