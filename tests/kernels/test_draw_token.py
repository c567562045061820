"""A token drawn from guided logits: PyTorch against the definition; Triton in its interpreter, compiled for devices
that are not here, and on a device that is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genssm.kernels.draw_token import draw_token
from genssm.kernels.draw_token.benchmark import check
from tests.kernels.test_triton_compile import TARGETS, Caught, compile_for

triton_missing = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def problem(images: int, vocabulary: int, guided: bool) -> tuple[torch.Tensor, ...]:
    """Logits, of which every third is impossible where there is no guidance, random numbers, and the scale."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn((1 + guided) * images, vocabulary, generator=generator)
    uniform = torch.rand(images, generator=generator)
    uniform[0], uniform[-1] = 0.0, 1 - 2**-24  # the ends of [0, 1)
    if not guided:
        logits[:, ::3] = -float("inf")
    return logits, uniform, torch.tensor([3.0]) if guided else None


@pytest.mark.parametrize("guided", [False, True])
def test_draws_by_the_cumulative_distribution(guided: bool) -> None:
    logits, uniform, scale = problem(50, 30, guided)
    drawn = draw_token(logits, uniform, scale, temperature=0.5)
    exact = logits.double()
    exact = exact[50:] + 3.0 * (exact[:50] - exact[50:]) if guided else exact
    until = (exact / 0.5).softmax(dim=-1).cumsum(dim=-1)
    for row, u, token in zip(until, uniform, drawn):
        assert row[token] > u - 1e-6
        assert token == 0 or row[token - 1] <= u + 1e-6
    if not guided:
        assert (drawn % 3 != 0).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"expected \(4, V\)"):
        draw_token(torch.zeros(2, 5), torch.zeros(2), torch.ones(1))
    with pytest.raises(ValueError, match=r"scale is \(2,\), expected \(1,\)"):
        draw_token(torch.zeros(4, 5), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="uniform is on meta"):
        draw_token(torch.zeros(2, 5), torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="backend='triton' is not possible"):
        draw_token(torch.zeros(2, 5), torch.zeros(2), backend="triton")


def compare_with_triton(device: str, dtype: torch.dtype) -> None:
    """The same tokens; nearly all, since sums in another order move the borders between tokens a little."""
    for vocabulary in (1, 20, 128, 1000, 16384):
        for guided in (False, True) if vocabulary > 1 else (True,):
            logits, uniform, scale = problem(64, vocabulary, guided)
            given = logits.to(device, dtype), uniform.to(device), None if scale is None else scale.to(device)
            found = draw_token(*given, temperature=0.8, backend="triton").cpu()
            expected = draw_token(given[0].cpu(), uniform, scale, temperature=0.8, backend="reference")
            assert found.dtype == torch.int64
            assert (found != expected).sum() <= 1, (vocabulary, guided)
            assert found.min() >= 0 and found.max() < vocabulary
            assert guided or (found % 3 != 0).all()


@triton_missing
def test_parity_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.kernels.test_draw_token"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@triton_missing
@pytest.mark.parametrize("target", [TARGETS[i] for i in (0, 3, 4, 7)], ids=lambda target: str(target[1]))
@pytest.mark.parametrize("vocabulary", [20, 16384])
def test_compiles(target: tuple, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from genssm.kernels.draw_token import triton_draw

    caught = Caught().of(monkeypatch, triton_draw.draw_kernel)
    logits, uniform, scale = problem(2, vocabulary, True)
    triton_draw.draw_triton(logits.bfloat16(), uniform, scale, 0.9)
    for kernel, arguments in caught:
        compile_for(kernel, arguments, target)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_on_the_device(dtype: torch.dtype) -> None:
    compare_with_triton("cuda", dtype)


@pytest.mark.gpu
def test_most_tokens_of_a_program() -> None:
    logits, uniform, scale = (x.cuda() for x in problem(3, 65536, True))
    found, expected = (draw_token(logits, uniform, scale, backend=b) for b in ("triton", "reference"))
    assert (found != expected).sum() <= 1


def test_benchmark_checks_first() -> None:
    check("reference", torch.device("cpu"))


if __name__ == "__main__":
    compare_with_triton("cpu", torch.float32)
