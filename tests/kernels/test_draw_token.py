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


def problem(images: int, vocabulary: int, guided: bool) -> dict[str, torch.Tensor | None]:
    """Arguments for the second of three tokens; every third is impossible where there is no guidance."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn((1 + guided) * images, vocabulary, generator=generator)
    uniform = torch.rand(images, 3, generator=generator)
    uniform[0], uniform[-1] = 0.0, 1 - 2**-24  # the ends of [0, 1)
    if not guided:
        logits[:, ::3] = -float("inf")
    return {
        "logits": logits,
        "uniform": uniform,
        "scales": torch.tensor([1.0, 3.0, 9.0]) if guided else None,
        "position": torch.tensor([1]),
        "codes": torch.full((images, 3), -1),
        "previous": torch.full(((1 + guided) * images, 1), -1),
    }


def moved(given: dict[str, torch.Tensor | None], device: str) -> dict[str, torch.Tensor | None]:
    """Copies on a device."""
    return {key: None if x is None else x.to(device, copy=True) for key, x in given.items()}


def drawn(given: dict[str, torch.Tensor | None], **options: str | float) -> torch.Tensor:
    """What is drawn, from where it was put."""
    assert draw_token(**given, **options) is None
    codes = given["codes"].cpu()
    assert (codes[:, [0, 2]] == -1).all()
    images = len(codes)
    assert all(torch.equal(part[:, 0], codes[:, 1]) for part in given["previous"].cpu().split(images))
    return codes[:, 1]


@pytest.mark.parametrize("guided", [False, True])
def test_draws_by_the_cumulative_distribution(guided: bool) -> None:
    given = problem(50, 30, guided)
    tokens, exact = drawn(given, temperature=0.5), given["logits"].double()
    exact = exact[50:] + 3.0 * (exact[:50] - exact[50:]) if guided else exact
    until = (exact / 0.5).softmax(dim=-1).cumsum(dim=-1)
    for row, u, token in zip(until, given["uniform"][:, 1], tokens):
        assert row[token] > u - 1e-6
        assert token == 0 or row[token - 1] <= u + 1e-6
    if not guided:
        assert (tokens % 3 != 0).all()


def test_errors() -> None:
    given = problem(4, 5, True)
    for key, wrong, message in (
        ("logits", torch.zeros(4, 5), r"logits are \(4, 5\), expected \(8, V\)"),
        ("uniform", torch.zeros(4), r"uniform is \(4,\), expected \(4, 3\)"),
        ("scales", torch.ones(2), r"scales is \(2,\), expected \(3,\)"),
        ("position", torch.tensor(1), r"position is \(\), expected \(1,\)"),
        ("previous", torch.zeros(6, 1), r"previous is \(6, 1\), expected \(R, 1\), R a multiple of 4"),
        ("uniform", torch.zeros(4, 3, device="meta"), "uniform is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_token(**{**given, key: wrong})
    with pytest.raises(ValueError, match="backend='triton' is not possible"):
        draw_token(**given, backend="triton")


def compare_with_triton(device: str, dtype: torch.dtype) -> None:
    """The same tokens; nearly all, since sums in another order move the borders between tokens a little."""
    for vocabulary in (1, 20, 128, 1000, 16384):
        for guided in (False, True) if vocabulary > 1 else (True,):
            given = problem(64, vocabulary, guided)
            given["logits"] = given["logits"].to(dtype)
            found = drawn(moved(given, device), temperature=0.8, backend="triton")
            expected = drawn(given, temperature=0.8, backend="reference")
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
    given = problem(2, vocabulary, True)
    given["logits"] = given["logits"].bfloat16()
    triton_draw.draw_triton(*given.values(), 0.9)
    for kernel, arguments in caught:
        compile_for(kernel, arguments, target)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_on_the_device(dtype: torch.dtype) -> None:
    compare_with_triton("cuda", dtype)


@pytest.mark.gpu
def test_most_tokens_of_a_program() -> None:
    given = problem(3, 65536, True)
    found, expected = (drawn(moved(given, "cuda"), backend=b) for b in ("triton", "reference"))
    assert (found != expected).sum() <= 1


def test_benchmark_checks_first() -> None:
    check("reference", torch.device("cpu"))


if __name__ == "__main__":
    compare_with_triton("cpu", torch.float32)
