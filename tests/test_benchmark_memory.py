"""benchmarks/memory.py: every variant, what each saves, mistakes."""

from pathlib import Path

import pytest
import torch

from benchmarks import memory
from genssm.config import load_config
from genssm.tasks import build_task

DEBUG = Path(__file__).resolve().parent.parent / "configs" / "debug" / "zigma.yaml"


def table(capsys: pytest.CaptureFixture, *options: str) -> dict[tuple[str, str, str], list[float]]:
    memory.main(["--config", str(DEBUG), *options])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return {tuple(cells[:3]): [float(c.replace(",", "")) for c in cells[3:]] for cells in lines[2:]}


def test_every_variant(capsys: pytest.CaptureFixture) -> None:
    found = table(capsys, "model.args.num_layers=8", "--at-once", "4", "16")
    assert len(found) == 2 * 2 * 2
    weights, gradients, optimizer, ema, activations, total = found["float32", "no", "16"]
    assert weights == gradients == ema and optimizer == pytest.approx(2 * weights, abs=0.16)
    assert total == pytest.approx(5 * weights + activations, abs=0.3)
    assert activations == pytest.approx(4 * found["float32", "no", "4"][4], rel=0.1)
    assert found["float32", "yes", "16"][4] < 0.5 * activations
    assert found["bfloat16", "no", "16"][4] < activations
    assert found["bfloat16", "no", "16"][0] == weights  # master weights stay float32


def test_shards_divide_everything_but_activations(capsys: pytest.CaptureFixture) -> None:
    config = load_config(DEBUG)
    task = build_task(config, torch.device("cpu"))
    (one, *_), (four, *_) = (list(memory.rows(task, config, [2], shards)) for shards in (1, 4))
    assert four["activations"] == one["activations"]
    for part in memory.SHARDED:
        assert one[part] / 4 <= four[part] < one[part] / 4 + 1
    assert four["total"] == sum(four[part] for part in memory.PARTS[:-1])
    assert "sharded" not in capsys.readouterr().out


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="whole numbers from 1 on"):
        memory.main(["--config", str(DEBUG), "--shards", "0"])
    with pytest.raises(FileNotFoundError, match="configs/"):
        memory.main(["--config", "nowhere.yaml"])
