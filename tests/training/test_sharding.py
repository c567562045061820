"""Sharded training: the numbers and the checkpoints of one process, in either direction."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

import train
from genssm.config import load_config
from genssm.training.ema import EMA
from genssm.training.sharding import load_whole_state, local, put, wants_sharding, whole, whole_state
from tests.training.conftest import EMA_WEIGHTS, ROOT, largest_difference, metrics, run_train, weights

STEPS = 24
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what accelerate launch makes of configs/accelerate/fsdp2


def run_sharded(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    variables = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | FSDP | environment
    return subprocess.run(
        [*launch, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=200
    )


@pytest.mark.slow
def test_two_sharded_processes_equal_one(
    straight: Path, tmp_path: Path, features: Path, command: Callable[[Path], list[str]]
) -> None:
    """Steps 1-13 on two sharded processes, 14-18 on a plain one, 19-24 sharded again: the weights of one process."""
    run = tmp_path / "run"
    options = ["log.num_samples=5", "log.num_inference_steps=3"]
    more = [*options, "train.gradient_accumulation_steps=2", "log.sample_every=13"]
    measure = [f"evaluate.features=classifier:{features}", "evaluate.every=13", "evaluate.num_samples=9",
               "evaluate.num_inference_steps=3", "evaluate.batch_size=4"]  # fmt: skip  # two calls and one
    done = run_sharded([*command(run), *more, *measure, "train.max_train_steps=13"], GENSSM_CACHE=str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "returned a view" not in done.stderr
    picture = run / "samples" / "step_0000013.png"
    assert Image.open(picture).size[0] > 100
    assert json.loads((run / "best.json").read_text())["checkpoint"] == "step_0000013"
    plain = torch.load(run / "checkpoints/step_0000013/state.pt", weights_only=True)["optimizer"]
    assert all(type(v) is torch.Tensor for state in plain["state"].values() for v in state.values())
    run_train(run, *options, "train.max_train_steps=18")
    done = run_sharded([*command(run), *options, "train.gradient_checkpointing=true"])
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("model.safetensors", EMA_WEIGHTS):
        assert largest_difference(weights(straight, STEPS, part), weights(run, STEPS, part)) < 1e-5
    assert metrics(run)[-1]["loss"] == pytest.approx(metrics(straight)[-1]["loss"], rel=1e-4)
    assert metrics(run)[-1]["grad_norm"] == pytest.approx(metrics(straight)[-1]["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_bf16_and_a_text_encoder(tmp_path: Path) -> None:
    """Two trained modules sharded together, bf16: the losses of one process to its rounding, float32 weights."""
    pytest.importorskip("tokenizers")
    text = ["--quiet", "--config", str(ROOT / "configs" / "debug" / "text.yaml")]
    short = ["train.max_train_steps=6", "train.checkpointing_steps=6", "log.log_every=3", "log.sample_every=6"]
    options = [*short, "train.mixed_precision=bf16", "log.num_inference_steps=2", "log.num_samples=3"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_sharded([*text, *options, f"train.output_dir={two}"])
    assert done.returncode == 0, done.stderr[-3000:]
    run_train(one, *options, flags=tuple(text))
    assert weights(one, 6).keys() == weights(two, 6).keys()
    assert all(value.dtype == torch.float32 for value in weights(two, 6).values())
    assert metrics(two)[-1]["loss"] == pytest.approx(metrics(one)[-1]["loss"], rel=0.02)
    exact = run_train(tmp_path / "exact", *short, "log.sample_every=0", flags=tuple(text))
    assert metrics(two)[-1]["loss"] != metrics(exact)[-1]["loss"]


def test_the_wish_is_taken_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not wants_sharding()
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    assert wants_sharding()
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version is 1"):
        wants_sharding()


def test_one_process_has_nothing_to_share(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    run = run_train(tmp_path / "run")
    assert largest_difference(weights(straight, STEPS), weights(run, STEPS)) == 0


def test_what_cannot_be_shared() -> None:
    """A tokenizer's codebook is moved from outside of the module, which a sharded copy would not notice."""
    config = load_config(ROOT / "configs" / "debug" / "vq.yaml")
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r"model\.name=vq cannot be sharded; launch it with configs/accelerate/ddp"):
        train.prepare(train.build(config, accelerator), sharded=True)


def test_shipped_launch_configurations() -> None:
    """accelerate reads them and launches what they say."""
    ddp, fsdp = (load_config_from_file(str(ROOT / f"configs/accelerate/{name}.yaml")) for name in ("ddp", "fsdp2"))
    assert (ddp.distributed_type, fsdp.distributed_type) == ("MULTI_GPU", "FSDP")
    assert fsdp.fsdp_config["fsdp_version"] == 2
    assert not ddp.use_cpu and not fsdp.use_cpu


def test_plain_tensors_pass_through() -> None:
    module = torch.nn.Linear(2, 3)
    assert local(module.weight) is module.weight and whole(module.weight) is module.weight
    put(module.weight, torch.ones(3, 2))
    assert (module.weight == 1).all()
    optimizer, other = (torch.optim.AdamW(module.parameters(), lr=lr) for lr in (0.1, 0.2))
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    load_whole_state(other, whole_state(optimizer))
    assert torch.equal(other.state[module.weight]["exp_avg"], optimizer.state[module.weight]["exp_avg"])
    assert other.param_groups[0]["lr"] == 0.1
    average = EMA(module, 0.5)
    average.update(1)
    assert torch.equal(average.average[0], module.weight)
