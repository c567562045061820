"""The parts of the loop by themselves: checkpoints, seeds, average, guard, memory, grids, logs."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from genssm.training.checkpoint import (
    atomic_folder,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_old_checkpoints,
    resolve_pipeline,
    save_checkpoint,
)  # fmt: skip
from genssm.training.ema import EMA
from genssm.training.guard import explain_nonfinite
from genssm.training.logging import MetricsLog, start_logging
from genssm.training.memory import saved_for_backward
from genssm.training.samples import draw_images, grid_columns, grid_labels, make_grid
from genssm.training.seeding import derive, generator_for, hash_integers, permutation, seed_globals

# --- seeds


def test_derived_seeds_are_fixed_and_distinct() -> None:
    assert derive(0, "noise", 1) == 6545564728581758268
    many = {derive(seed, purpose, i) for seed in range(5) for purpose in ("noise", "data") for i in range(100)}
    assert len(many) == 1000 and all(0 <= value < 2**63 for value in many)
    assert derive(1, 23) != derive(12, 3)


def test_hash_is_uniform_and_order_is_a_permutation() -> None:
    values = hash_integers(np.arange(40_000), seed=3)
    counts = np.bincount((values >> np.uint64(60)).astype(int), minlength=16)
    assert len(set(values.tolist())) == 40_000 and np.abs(counts - 2500).max() < 250
    assert sorted(permutation(101, 5).tolist()) == list(range(101))
    low = (values & np.uint64(1)).mean()
    assert abs(low - 0.5) < 0.01


def test_global_generators_restart() -> None:
    def draw() -> tuple:
        return torch.rand(1).item(), np.random.rand(), os.urandom(0)  # noqa: NPY002

    seed_globals(1, "dropout", 2)
    first = draw()
    draw()
    seed_globals(1, "dropout", 2)
    assert draw() == first
    noise = torch.randn(3, generator=generator_for(1, "noise", 2))
    assert torch.equal(noise, torch.randn(3, generator=generator_for(1, "noise", 2)))


# --- checkpoints


def save(run: Path, step: int, model: nn.Module) -> Path:
    def pipeline(folder: Path) -> None:
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")

    return save_checkpoint(run, step, model, {"seed": 1, "list": [torch.ones(2)]}, pipeline)


def test_checkpoints_are_found_by_number(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no run with a complete checkpoint"):
        resolve_pipeline(tmp_path)
    for step in (5, 20_000_000, 100):
        save(tmp_path, step, nn.Linear(2, 2))
    (tmp_path / "checkpoints" / ".partial-step_0000200").mkdir()
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step_0000005", "step_0000100", "step_20000000"]
    newest = tmp_path / "checkpoints" / "step_20000000"
    for path in (tmp_path, newest, newest / "pipeline"):
        assert resolve_pipeline(path) == newest / "pipeline"
    remove_old_checkpoints(tmp_path, 2)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step_0000100", "step_20000000"]
    assert not (tmp_path / "checkpoints" / ".partial-step_0000200").exists()
    remove_old_checkpoints(tmp_path, 0)
    assert len(list_checkpoints(tmp_path)) == 2


def test_weights_and_state_come_back(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    state = load_checkpoint(save(tmp_path, 7, model), other)
    assert torch.equal(model.weight, other.weight)
    assert state["step"] == 7 and torch.equal(state["list"][0], torch.ones(2))
    with pytest.raises(ValueError, match="another model"):
        load_checkpoint(latest_checkpoint(tmp_path), nn.Linear(3, 3))
    with pytest.raises(FileNotFoundError, match=r"state\.pt"):
        load_checkpoint(tmp_path, other)
    state_file = latest_checkpoint(tmp_path) / "state.pt"
    torch.save(torch.load(state_file, weights_only=True) | {"format": 99}, state_file)
    with pytest.raises(ValueError, match="update genssm"):
        load_checkpoint(latest_checkpoint(tmp_path), other)


def test_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save(tmp_path, 1, model)
    before = (tmp_path / "checkpoints" / "step_0000001" / "model.safetensors").read_bytes()

    def full_disk(folder: Path) -> None:
        raise OSError("no space left on device")

    for step in (1, 2):
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, step, nn.Linear(2, 2), {}, full_disk)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]
    assert (tmp_path / "checkpoints" / "step_0000001" / "model.safetensors").read_bytes() == before


def test_killed_write_is_invisible(tmp_path: Path) -> None:
    """A process that dies in the middle of writing leaves nothing that looks like a checkpoint."""
    script = (
        "import os, sys, signal; from pathlib import Path; from genssm.training.checkpoint import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]) / 'step_0000003') as folder:\n"
        "    (folder / 'state.pt').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "checkpoints")], timeout=120)
    assert done.returncode == -9
    assert list_checkpoints(tmp_path) == [] and len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_replaced_folder_is_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / text).write_text(text)
    assert [f.name for f in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "sub" / "new").is_file()
    assert not (tmp_path / "a" / "sub" / "old").exists()


# --- average


def test_ema_follows_its_formula_and_diffusers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema, reference = EMA(model, 0.9), EMAModel(model.parameters(), decay=0.9, use_ema_warmup=False)
    for step in range(1, 41):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ema.update(step)
        reference.step(model.parameters())
    assert ema.decay_at(1) == 2 / 11 and ema.decay_at(1000) == 0.9
    trained = [p.detach().clone() for p in model.parameters()]
    with ema.applied():
        # diffusers counts its steps from zero: its first average forgets the start completely.
        for parameter, expected in zip(model.parameters(), reference.shadow_params):
            assert (parameter - expected).abs().max() < 0.2
        averaged = [p.detach().clone() for p in model.parameters()]
    assert all(torch.equal(p, t) for p, t in zip(model.parameters(), trained))
    assert not torch.equal(averaged[0], trained[0])

    manual, value = 0.0, 0.0
    single = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(single.weight)
    ema = EMA(single, 0.5)
    for step in (1, 2, 3):
        value += 1.0
        nn.init.constant_(single.weight, value)
        ema.update(step)
        manual = ema.decay_at(step) * manual + (1 - ema.decay_at(step)) * value
    assert ema.average[0].item() == pytest.approx(manual, rel=1e-6)
    with pytest.raises(ValueError, match="between 0 and 1"):
        EMA(single, 1.0)


def test_ema_takes_only_its_own_shapes() -> None:
    with pytest.raises(ValueError, match="expected"):
        EMA(nn.Linear(2, 2), 0.9).load(nn.Linear(2, 3))


# --- guard


class Log(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x - x.detach())  # zero, with an infinite slope


def explained(model: nn.Module, x: torch.Tensor) -> str | None:
    return explain_nonfinite(model, {"x": x}, lambda: model(x).sum())


def test_guard_names_where_it_began() -> None:
    x = torch.ones(2, 3)
    linear = nn.Linear(3, 3)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    good = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    assert explained(good, x) is None
    assert all(p.grad is None for p in good.parameters()) and not good._forward_hooks
    assert explained(good, x / 0) == "the data are not finite: x"
    forward = explained(nn.Sequential(linear, Log(), nn.Tanh(), Log()), x)
    assert forward == "the output of 1 (Log) is not finite, although its inputs are finite"
    backward = explained(nn.Sequential(linear, nn.Tanh(), Root()), x)
    assert backward == "the gradient arriving at the output of 1 (Tanh) is not finite"
    loss = explain_nonfinite(good, {"x": x}, lambda: good(x).sum() / 0)
    assert loss == "the loss is not finite although the model's output is"
    with torch.no_grad():
        good[0].weight[0, 0] = torch.nan
    assert explained(good, x) == "the parameter 0.weight is already not finite"


# --- memory


def test_saved_bytes_of_a_known_network() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    # The input of the first layer, the output of tanh (also the input of the second layer); no weights.
    assert saved_for_backward(lambda: model(torch.zeros(32, 8)).sum()) == 4 * 32 * (8 + 16)
    assert saved_for_backward(lambda: model(torch.zeros(64, 8)).sum()) == 4 * 64 * (8 + 16)


# --- grids


def test_grid() -> None:
    assert grid_labels(5, 3) == [0, 1, 2, 0, 1] and grid_labels(5, 0) is None
    assert (grid_columns(20, 10), grid_columns(16, 10), grid_columns(9, 0), grid_columns(8, 1000)) == (10, 4, 3, 3)
    images = [Image.new("L", (8, 8), 25 * i) for i in range(5)]
    grid = make_grid(images, 3)
    assert grid.size == (3 * 66 + 2, 2 * 66 + 2)
    pixels = np.asarray(grid)
    assert pixels[30, 30] == 0 and pixels[30, 100] == 25 and pixels[100, 100] == 100
    assert pixels[0, 0] == 255 and pixels[100, 170] == 255
    large = make_grid([Image.new("RGB", (100, 50))] * 2, 2)
    assert large.size == (206, 54)


def test_images_of_a_grid_do_not_depend_on_who_draws_them() -> None:
    class Noise:
        def __call__(self, classes: list | None, num_images: int, generator: list, output_type: str) -> object:
            assert len(classes) == num_images and output_type == "pil"
            values = [torch.randint(200, (1,), generator=g).item() + c for g, c in zip(generator, classes)]
            return type("Output", (), {"images": [Image.new("L", (2, 2), v) for v in values]})

    whole = draw_images(Noise(), 7, 3, seed=5)
    parts = draw_images(Noise(), 7, 3, seed=5, first=0, stride=2, at_once=2) | draw_images(
        Noise(), 7, 3, seed=5, first=1, stride=2
    )
    assert {i: image.getpixel((0, 0)) for i, image in whole.items()} == {i: parts[i].getpixel((0, 0)) for i in range(7)}


# --- logs


def test_metrics_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, 100, quiet=True)
    for step in (10, 20, 30):
        log.write(step, loss=1 / step)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    log = MetricsLog(tmp_path, 20, 100, quiet=True)
    log.write(25, loss=0.123456789)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 25] and lines[-1]["loss"] == 0.123457


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    """A file of JSON lines stays one, whatever a step in float16 brought."""
    log = MetricsLog(tmp_path, 0, 100, quiet=True)
    log.write(10, loss=0.5, grad_norm=math.inf)
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 10, "loss": 0.5, "grad_norm": None}


def test_terminal_and_log_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    logger = logging.getLogger("genssm")
    for quiet in (False, True):
        start_logging(tmp_path, quiet=quiet)
        logger.info("hello %s", quiet)
        logger.warning("beware")
    shown = capsys.readouterr().err
    assert "hello False" in shown and "hello True" not in shown and shown.count("beware") == 2
    assert (tmp_path / "log.txt").read_text().count("hello") == 2
    log = MetricsLog(tmp_path, 0, 10)
    log.write(5, loss=0.5)
    log.close()
    assert "loss 0.5" in (tmp_path / "log.txt").read_text()  # no bar where there is no terminal, lines instead
