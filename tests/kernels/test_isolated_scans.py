"""Isolated scans: composed against one by one; the fused path in the interpreter, compiled for devices that are not
here, and on a device that is; when which of them runs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genssm.kernels import dispatch
from genssm.kernels.isolated_scans import isolated_scans, op
from genssm.kernels.isolated_scans.benchmark import check
from genssm.kernels.isolated_scans.reference import scans_reference
from tests.kernels.problems import rms_error
from tests.kernels.test_triton_compile import TARGETS, Caught, compile_for

triton_missing = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# batch, tokens, channels, scans, states, rank of the step, taps; with more than 16 tokens time is split.
SIZES = [(2, 4, 32, 9, 16, 2, 4), (2, 40, 20, 2, 16, 1, 4), (1, 70, 12, 1, 5, 3, 2), (2, 33, 10, 3, 24, 17, 4),
         (1, 3, 4, 1, 4, 1, 1), (1, 17, 4, 16, 1, 1, 4)]  # fmt: skip


def problem(sizes: tuple, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
    """Arguments; every second problem has a gate and a bias, and orders where it has several scans."""
    batch, length, channels, scans, states, rank, taps = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, z = random(batch, length, 2 * channels).chunk(2, dim=-1)
    whole = SIZES.index(sizes) % 2 == 0 if sizes in SIZES else True
    orders = torch.stack([torch.randperm(length, generator=generator) for _ in range(scans)]).int()
    return {
        "x": x,
        "z": z if whole else None,
        "conv_weight": random(scans, channels, taps),
        "conv_bias": random(scans, channels) if whole else None,
        "x_proj": random(scans, rank + 2 * states, channels) / channels**0.5,
        "dt_proj": random(scans, channels, rank),
        "dt_bias": random(scans, channels) - 2,
        "A_log": random(scans, channels, states),
        "D": random(scans, channels),
        "orders": orders if scans in (1, 2, 3) else None,
    }


def half(given: dict, dtype: torch.dtype, device: str = "cpu") -> dict:
    """The same with the products in ``dtype`` and the parameters of the scans in float32."""
    types = dict.fromkeys(given, dtype) | dict.fromkeys(("dt_bias", "A_log", "D"), torch.float32) | {"orders": None}
    return {key: None if x is None else x.to(device, types[key]) for key, x in given.items()}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_scans_are_isolated(sizes: tuple, backend: str) -> None:
    """The sum of scans that are made one by one."""
    given = problem(sizes)
    y = isolated_scans(**given, backend=backend)
    parts = 0
    for k in range(sizes[3]):
        own = {key: x[k : k + 1] if key not in ("x", "z") and x is not None else x for key, x in given.items()}
        parts = parts + isolated_scans(**own, backend=backend)
    torch.testing.assert_close(y, parts)
    each = isolated_scans(**given, backend=backend, reduce="none")
    torch.testing.assert_close(each.sum(1), y)


def test_gradients_and_padding() -> None:
    given = problem(SIZES[1])
    leaves = {key: x.requires_grad_() for key, x in given.items() if x is not None and key not in ("x", "orders")}
    lengths = torch.tensor([40, 13])
    y = isolated_scans(**given, lengths=lengths)
    assert bool((y[1, 13:] == 0).all())
    assert all(bool(g.abs().sum() > 0) for g in torch.autograd.grad(y.square().sum(), list(leaves.values())))


def test_errors() -> None:
    given = problem(SIZES[0])
    for name, shape in (("D", (3,)), ("x_proj", (9, 34, 31)), ("dt_bias", (9, 31)), ("z", (2, 4, 31))):
        with pytest.raises(ValueError, match=rf"{name} is \({shape[0]}"):
            isolated_scans(**{**given, name: torch.zeros(shape)})
    with pytest.raises(ValueError, match="D is on meta"):
        isolated_scans(**{**given, "D": torch.zeros(9, 32, device="meta")})
    with pytest.raises(ValueError, match="A_log"):
        isolated_scans(**{**given, "A_log": torch.zeros(32, 16)})
    with pytest.raises(ValueError, match="backend='triton' is not possible"):
        isolated_scans(**given, backend="triton")


def test_when_the_fused_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens without gradients, in one type, all of them visited."""
    fused = []
    monkeypatch.setattr(dispatch, "_resolve", lambda *_: "triton")
    monkeypatch.setattr(op, "_processors", lambda *_: 4)
    monkeypatch.setattr(op, "fused", lambda x, *_: fused.append(x.shape) or x)
    monkeypatch.setattr("genssm.kernels.isolated_scans.scans_reference", lambda x, *_, **__: x)
    given = half(problem(SIZES[0]), torch.bfloat16)
    isolated_scans(**given)
    assert len(fused) == 1
    large = torch.zeros(3, *given["x"].shape[1:], dtype=torch.bfloat16)  # 3 samples of 8 programs, 16 at most
    assert op.fits(given["x"], (), 9, 16, 256) and not op.fits(given["x"], (), 9, 16, 257)  # times 32 channels
    for changes in (
        {"lengths": torch.tensor([4, 3])},
        {"reduce": "none"},
        {"x_proj": given["x_proj"].float()},
        {"A_log": given["A_log"].clone().requires_grad_()},
        {"x": large, "z": None},
    ):
        isolated_scans(**{**given, **changes})
    assert len(fused) == 1
    with torch.no_grad():
        isolated_scans(**{**given, "A_log": given["A_log"].clone().requires_grad_()})
    assert len(fused) == 2


@torch.no_grad()
def compare_with_triton(device: str, dtype: torch.dtype) -> None:
    """Every size against float64, and again: the same bits."""
    for sizes in SIZES:
        low = half(problem(sizes), dtype, device)
        exact = {key: x.double().cpu() if key != "orders" and x is not None else x for key, x in low.items()}
        exact["orders"] = None if low["orders"] is None else low["orders"].cpu()
        found = op.fused(*low.values())
        assert found.dtype == dtype and torch.equal(found, op.fused(*low.values()))
        assert rms_error(found, scans_reference(**exact)) < (3e-6 if dtype == torch.float32 else 2e-2), sizes


@triton_missing
def test_parity_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.kernels.test_isolated_scans"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def launches(sizes: tuple, dtype: torch.dtype, **choices: int) -> Caught:
    from genssm.kernels.isolated_scans import triton_kernels, triton_scans

    with pytest.MonkeyPatch.context() as patch:
        caught = Caught().of(patch, triton_kernels.project_kernel, triton_kernels.walk_kernel)
        triton_scans.scans_triton(*half(problem(sizes), dtype).values(), **choices)
    return caught


@triton_missing
@pytest.mark.parametrize("target", [TARGETS[i] for i in (0, 3, 4, 7)], ids=lambda target: str(target[1]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 4, 256, 9, 16, 16, 4), (2, 256, 256, 2, 16, 1, 4)], ids=str)
def test_compiles(target: tuple, dtype: torch.dtype, sizes: tuple) -> None:
    caught = launches(sizes, dtype)
    assert len(caught) == 2
    for kernel, arguments in caught:
        compile_for(kernel, arguments, target)


@triton_missing
def test_batch_and_length_are_not_in_the_binaries() -> None:
    def keys(sizes: tuple) -> list[dict]:
        return [
            {p.name: given[p.name] for p in kernel.params
             if not (p.do_not_specialize or isinstance(given[p.name], torch.Tensor))}
            for kernel, given in launches(sizes, torch.bfloat16)
        ]  # fmt: skip

    assert keys((2, 40, 32, 2, 16, 1, 4)) == keys((3, 255, 32, 2, 16, 1, 4)) == keys((1, 17, 32, 2, 16, 1, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parity_on_the_device(dtype: torch.dtype) -> None:
    compare_with_triton("cuda", dtype)


@pytest.mark.gpu
def test_compiled_with_the_fused_path() -> None:
    """torch.compile takes the op whole."""
    given = half(problem(SIZES[0]), torch.float32, "cuda")
    with torch.no_grad():
        compiled = torch.compile(isolated_scans, fullgraph=True)
        torch.testing.assert_close(compiled(**given), isolated_scans(**given))


def test_benchmark_checks_first() -> None:
    check("chunked", torch.device("cpu"), torch.float32)


if __name__ == "__main__":
    compare_with_triton("cpu", torch.float32)
