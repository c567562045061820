"""A linear map of few rows: Triton in its interpreter, compiled for devices that are not here, and on a device
that is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from genssm.kernels.row_linear import row_linear
from genssm.kernels.row_linear.benchmark import check
from tests.kernels.problems import rms_error
from tests.kernels.test_triton_compile import TARGETS, Caught, compile_for

triton_missing = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# rows, channels in, channels out
SIZES = [(1, 5, 3), (3, 300, 70), (16, 768, 100), (33, 129, 17), (20, 1536, 40)]


def problem(rows: int, channels_in: int, channels_out: int, dtype: torch.dtype, device: str = "cpu") -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, channels_in), (channels_out, channels_in), (channels_out,))
    return tuple(torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)


def test_is_a_linear_map() -> None:
    x, weight, bias = problem(3, 20, 10, torch.float64)
    assert torch.equal(row_linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(row_linear(x, weight, backend="chunked"), F.linear(x, weight))


def test_errors() -> None:
    x, weight, bias = problem(3, 20, 10, torch.float32)
    with pytest.raises(ValueError, match=r"x is \(3, 19\) and weight \(10, 20\)"):
        row_linear(x[:, 1:], weight)
    with pytest.raises(ValueError, match=r"bias is \(9,\), expected \(10,\)"):
        row_linear(x, weight, bias[1:])
    with pytest.raises(ValueError, match="backend='triton' is not possible"):
        row_linear(x, weight, backend="triton")


def compare_with_triton(device: str, dtype: torch.dtype) -> None:
    """Against float64, with and without bias, rows in one piece and rows of a wider tensor."""
    for sizes in SIZES:
        x, weight, bias = problem(*sizes, dtype, device)
        if device != "cpu":
            torch.accelerator.synchronize()  # the weights may be read ahead of the launch before
        for b in (bias, None):
            expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
            for rows in (x, torch.cat([x, x], dim=1)[:, : x.shape[1]]):
                found = row_linear(rows, weight, b, backend="triton")
                assert found.dtype == dtype
                assert rms_error(found, expected.cpu()) < (1e-5 if dtype == torch.float32 else 1e-2), sizes


@triton_missing
def test_parity_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.kernels.test_row_linear"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@triton_missing
@pytest.mark.parametrize("target", [TARGETS[i] for i in (0, 3, 4, 7)], ids=lambda target: str(target[1]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles(target: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from genssm.kernels.row_linear import triton_linear

    caught = Caught().of(monkeypatch, triton_linear.row_linear_kernel)
    triton_linear.row_linear_triton(*problem(16, 1536, 768, dtype))
    for kernel, arguments in caught:
        compile_for(kernel, arguments, target)


@triton_missing
@pytest.mark.parametrize("sizes", [(16, 768, 3352), (16, 1536, 768), (16, 1536, 6680), (16, 3072, 1536)], ids=str)
def test_reads_weights_ahead(sizes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes of AiM-B and XL, on a device whose kernels overlap: the first loads stand before the wait, nothing
    spills, and two programs share a multiprocessor where there are more than one for each."""
    from genssm.kernels.row_linear import triton_linear
    from tests.kernels import test_triton_compile

    for name, value in (("overlaps", True), ("shared_memory", 227 * 1024), ("processors", 132)):
        monkeypatch.setattr(triton_linear, name, lambda device, value=value: value)
    early = {"OVERLAP": True, "launch_pdl": True}
    monkeypatch.setattr(triton_linear, "overlap", lambda device: early)
    monkeypatch.setattr(test_triton_compile, "SHARED_LIMIT", 113 * 1024)
    caught = Caught().of(monkeypatch, triton_linear.row_linear_kernel)
    triton_linear.row_linear_triton(*problem(*sizes, torch.bfloat16))
    for kernel, arguments in caught:
        compiled = compile_for(kernel, arguments, ("cuda", 90, 32))
        before, _, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
        assert before.count("ld.global") >= 8
        assert "ld.global" in after
        found = test_triton_compile.resources(compiled)
        assert found["REG"] <= 128 and found["STACK"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_on_the_device(dtype: torch.dtype) -> None:
    compare_with_triton("cuda", dtype)


def test_benchmark_checks_first() -> None:
    check("reference", torch.device("cpu"), torch.float32)


if __name__ == "__main__":
    compare_with_triton("cpu", torch.float32)
