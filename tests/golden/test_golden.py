"""The golden cases under pytest, and the runner itself."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden import HANDLERS, find_cases, run_case
from tests.golden.__main__ import main
from tests.golden.checks import compare

FOLDER = Path(os.environ.get("GENSSM_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
MODELS = [model for model in HANDLERS if model is not None]
FOLDERS = [*MODELS, "motion"]  # the cases of motion name no model
CASES = [case for name in FOLDERS if (FOLDER / name).is_dir() for case in find_cases(FOLDER / name)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path.stem)
def test_case(case) -> None:
    checks = run_case(case)
    assert any(check.name.startswith("out.") for check in checks)
    assert not [check for check in checks if not check.passed]


def test_golden_tensors_are_there(golden_dir: Path) -> None:
    assert {case.model for case in CASES} >= set(MODELS)


def copy_case(golden_dir: Path, folder: Path, change: dict[str, torch.Tensor] | None = None, **info: object) -> None:
    """A golden case under a name that says nothing, with some tensors and some of its JSON changed."""
    source = golden_dir / "zigma" / "zigma_uncond_zigzag8_oddgrid.safetensors"
    described = json.loads(source.with_suffix(".json").read_text())
    del described["sha256"]
    described.update(info)
    save_file({**load_file(source), **(change or {})}, folder / "a.safetensors")
    (folder / "a.json").write_text(json.dumps(described))


def test_runner_passes_under_any_name(golden_dir: Path, tmp_path: Path, capsys) -> None:
    copy_case(golden_dir, tmp_path)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "pass  a [zigma, network]" in printed
    assert "output error" in printed and "gradient error" in printed and "1 of 1 cases pass" in printed


def test_runner_misses_a_wrong_output(golden_dir: Path, tmp_path: Path, capsys) -> None:
    tensors = load_file(golden_dir / "zigma" / "zigma_uncond_zigzag8_oddgrid.safetensors")
    copy_case(golden_dir, tmp_path, {"out.sample": tensors["out.sample"] * 1.001})
    assert main([str(tmp_path)]) == 1
    assert "out.sample: error" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["grad.in.x", "grad.w.blocks.1.mixer.in_proj.weight"])
def test_runner_misses_a_wrong_gradient(golden_dir: Path, tmp_path: Path, capsys, key: str) -> None:
    tensors = load_file(golden_dir / "zigma" / "zigma_uncond_zigzag8_oddgrid.safetensors")
    copy_case(golden_dir, tmp_path, {key: tensors[key] * 1.001})
    assert main([str(tmp_path)]) == 1
    assert f"      {key}: " in capsys.readouterr().out


@pytest.mark.parametrize("info", [{"model": "unheard"}, {"kind": "unheard"}, {"model": None}])
def test_runner_misses_what_it_does_not_know(golden_dir: Path, tmp_path: Path, capsys, info: dict) -> None:
    copy_case(golden_dir, tmp_path, **info)
    assert main([str(tmp_path)]) == 1
    assert "no handler for" in capsys.readouterr().out


def test_runner_misses_weights_that_do_not_fit(golden_dir: Path, tmp_path: Path, capsys) -> None:
    copy_case(golden_dir, tmp_path, {"w.surplus": torch.zeros(1)})
    assert main([str(tmp_path)]) == 1
    assert "unexpected keys: 1" in capsys.readouterr().out


def test_runner_notices_a_damaged_file(golden_dir: Path, tmp_path: Path, capsys) -> None:
    copy_case(golden_dir, tmp_path, sha256="0" * 64)
    assert main([str(tmp_path)]) == 1
    assert "SHA-256" in capsys.readouterr().out


def test_runner_misses_a_wrong_scan_order(golden_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(golden_dir / "zigma" / "scan_orders_zigma.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    assert main([str(tmp_path)]) == 0
    save_file({**tensors, "zigzag.n4": tensors["zigzag.n4"].flip(0)}, tmp_path / "b.safetensors")
    assert main([str(tmp_path)]) == 1


def test_compare() -> None:
    tolerance = {"rtol": 0.0, "atol": 0.1}
    expected = torch.tensor([0.0, 10.0])
    assert compare("out.x", expected + 0.05, expected, tolerance).used == pytest.approx(0.5, rel=1e-4)
    assert compare("grad.x", expected + 0.5, expected, tolerance).used == pytest.approx(0.5, rel=1e-4)
    assert not compare("out.x", expected + 0.2, expected, tolerance).passed
    assert not compare("out.x", expected * torch.nan, expected, tolerance).passed
    assert not compare("out.x", expected[:1], expected, tolerance).passed
    loose = compare("out.x", expected + 0.2, expected, tolerance, slack=0.15)
    assert loose.passed and "2.00 x tolerance" in loose.note
