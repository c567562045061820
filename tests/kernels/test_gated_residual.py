"""A block's residual update: PyTorch against its parts; Triton in its interpreter, compiled for devices that are not
here, and on a device that is."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genssm.kernels.gated_residual import gated_residual
from genssm.kernels.gated_residual.benchmark import check_backends
from tests.kernels.problems import TOLERANCE, Problem, poisoned, rms_error
from tests.kernels.test_triton_compile import TARGETS, Caught, compile_for, resources
from tests.kernels.test_triton_interpreter import cannot_interpret

triton_missing = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROUNDINGS = 3  # of half types, one after the other


@dataclass(frozen=True)
class Case:
    """Sizes and options of a problem; gate and factor are of a "sample", of a "token", or "shared" by all.

    ``low`` names what has a half type beside float32.
    """

    shape: tuple[int, int, int] = (2, 5, 37)
    gate: str = "sample"
    skip: bool = True
    factor: str | None = "sample"
    low: tuple[str, ...] = ("x", "gate")


CASES = {
    "everything": Case(),
    "no skip": Case(skip=False),
    "no factor": Case(factor=None),
    "gate alone": Case(skip=False, factor=None),
    "of tokens": Case(gate="token", factor="token"),
    "shared": Case(gate="shared", factor="shared"),
    "half": Case(low=("stream", "x", "gate", "skip", "factor")),
    "half stream": Case(low=("stream",)),
    "half skip": Case(low=("skip", "factor", "x")),
    "one token": Case(shape=(3, 1, 8)),
    "one token of a row": Case(shape=(1, 7, 9), gate="token", factor="token"),
    "one channel": Case(shape=(2, 3, 1)),
    "nothing": Case(shape=(0, 3, 8)),
    "no tokens": Case(shape=(2, 0, 8)),
}
SOME = ("everything", "no skip", "gate alone", "of tokens", "half", "half stream", "half skip")


def problem(case: Case, device: str, dtype: torch.dtype) -> Problem:
    """Arguments, all of which a half type can hold."""
    g = torch.Generator().manual_seed(0)

    def random(name: str, *sizes: int) -> Tensor:
        values = torch.randn(sizes, generator=g).bfloat16().half()
        return values.to(device, dtype if name in case.low or dtype == torch.float64 else torch.float32)

    def vector(name: str, kind: str, channels: int) -> Tensor:
        batch, length, _ = case.shape
        return random(name, *{"sample": (batch, 1), "token": (batch, length), "shared": (1, 1)}[kind], channels)

    inputs = {"stream": random("stream", *case.shape), "x": random("x", *case.shape)}
    inputs["gate"] = vector("gate", case.gate, case.shape[2])
    if case.skip:
        inputs["skip"] = random("skip", *case.shape)
    options = {"factor": vector("factor", case.factor, 1)} if case.factor else {}
    return Problem({name: t.requires_grad_() for name, t in inputs.items()}, options)


def run(given: Problem, backend: str) -> dict[str, Tensor]:
    """The result and the gradients of all inputs, for a fixed random gradient that any type can hold."""
    out = gated_residual(**given.inputs, **given.options, backend=backend)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=g).bfloat16().to(out)
    found = torch.autograd.grad(out, list(given.inputs.values()), grad)
    return {"out": out.detach(), **{f"d{name}": d for name, d in zip(given.inputs, found)}}


def check_parity(case: Case, device: str, dtype: torch.dtype) -> None:
    """Triton against the reference: bit by bit forward, in float64 on the same arguments backward."""
    given = problem(case, device, dtype)
    expected, composed = run(problem(case, "cpu", torch.float64), "reference"), run(given, "reference")
    with poisoned():
        found = run(given, "triton")
    assert torch.equal(found["out"], composed["out"])
    for name, value in expected.items():
        assert found[name].dtype == composed[name].dtype and found[name].shape == value.shape, name
        bound = TOLERANCE[dtype] * (1 if dtype == torch.float32 else ROUNDINGS)
        error = rms_error(found[name], value)
        assert error < bound, f"{name}: relative RMS error {error:.1e} for {case}"


# PyTorch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [CASES[name] for name in SOME], ids=SOME)
def test_is_the_composition(case: Case, dtype: torch.dtype) -> None:
    given = problem(case, "cpu", dtype)
    stream, x, gate, skip = (given.inputs.get(name) for name in ("stream", "x", "gate", "skip"))
    u = gate * x if skip is None else skip + gate * x
    expected = stream + u * given.options["factor"] if case.factor else stream + u
    found = gated_residual(**given.inputs, **given.options)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("case", [CASES[name] for name in SOME[:4]], ids=SOME[:4])
def test_gradcheck(case: Case) -> None:
    small = problem(replace(case, shape=(2, 3, 4)), "cpu", torch.float64)
    names = list(small.inputs)

    def call(*tensors: Tensor) -> Tensor:
        return gated_residual(**dict(zip(names, tensors)), **small.options)

    assert torch.autograd.gradcheck(call, list(small.inputs.values()))
    assert torch.autograd.gradgradcheck(call, list(small.inputs.values()))


MISTAKES = {
    "stream": ({"stream": torch.zeros(3, 4)}, r"stream is \(3, 4\) torch.float32, expected floats"),
    "integers": ({"stream": torch.zeros(2, 3, 4, dtype=torch.int64)}, r"stream is \(2, 3, 4\) torch.int64"),
    "x": ({"x": torch.zeros(2, 1, 4)}, r"x is \(2, 1, 4\), expected \(2, 3, 4\) as stream"),
    "skip": ({"skip": torch.zeros(2, 3, 5)}, r"skip is \(2, 3, 5\), expected \(2, 3, 4\)"),
    "gate": ({"gate": torch.zeros(2, 2, 4)}, r"gate is \(2, 2, 4\) beside stream \(2, 3, 4\), expected \(B, 1, D\)"),
    "factor": ({"factor": torch.zeros(2)}, r"factor is \(2,\) beside stream \(2, 3, 4\), expected \(B, 1, 1\)"),
    "learnt factor": ({"factor": torch.zeros(2, 1, 1, requires_grad=True)}, "factor requires a gradient"),
    "device": ({"gate": torch.zeros(2, 1, 4, device="meta")}, "gate is on meta"),
    "triton": ({"backend": "triton"}, "backend='triton' is not possible"),
}


@pytest.mark.parametrize("change", MISTAKES.values(), ids=MISTAKES.keys())
def test_errors(change: tuple[dict, str]) -> None:
    given, message = change
    usual = {"stream": torch.zeros(2, 3, 4), "x": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 1, 4)}
    with pytest.raises(ValueError, match=message):
        gated_residual(**{**usual, **given})


def test_benchmark_checks_first() -> None:
    check_backends(["reference"], torch.device("cpu"), torch.float32)


# Triton: each of these runs in the interpreter, in a process of its own, and on a device


def parity(device: str) -> None:
    for case in CASES.values():
        check_parity(case, device, torch.float32)
    for name in SOME:
        check_parity(CASES[name], device, torch.float16)  # the interpreter does not round to bfloat16 as devices do


def strides(device: str) -> None:
    """Any are taken, with the same bits."""
    given = problem(CASES["everything"], device, torch.float32)
    expected = run(given, "triton")
    for change in (
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], dim=-1)[..., t.shape[-1] :],
        lambda t: torch.cat([t, t], dim=0)[t.shape[0] :],
        lambda t: torch.stack([t, t], dim=-1)[..., 1],
    ):
        inputs = {name: change(t.detach()).requires_grad_() for name, t in given.inputs.items()}
        found = run(Problem(inputs, {"factor": change(given.options["factor"])}), "triton")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def rows_and_runs(device: str) -> None:
    """A row's bits do not depend on the batch; sums over rows are the same at every run."""
    given = problem(replace(CASES["everything"], shape=(4, 9, 40)), device, torch.float32)
    first, second = (run(given, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for b in range(4):
        one = {name: t[b : b + 1] for name, t in {**given.inputs, **given.options}.items()}
        assert torch.equal(gated_residual(**one, backend="triton")[0], first["out"][b])


def opcheck(device: str) -> None:
    for name in ("everything", "no skip", "gate alone", "of tokens", "half skip"):
        given = problem(CASES[name], device, torch.float16)
        stream, x, gate, skip = (given.inputs.get(key) for key in ("stream", "x", "gate", "skip"))
        factor = given.options.get("factor")
        torch.library.opcheck(torch.ops.genssm.gated_residual_fwd.default, (stream, x, gate, skip, factor))
        skipped = None if skip is None or factor is None else skip.dtype
        tensors = (stream.detach(), x.detach(), gate.detach(), factor)
        torch.library.opcheck(torch.ops.genssm.gated_residual_bwd.default, (*tensors, skipped))


def machinery(device: str) -> None:
    """Compiled whole, checkpointed, under autocast."""

    def loss(given: Problem) -> Tensor:
        return gated_residual(**given.inputs, **given.options, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (3, 6):
        given = problem(replace(CASES["everything"], shape=(2, length, 12)), device, torch.float32)
        tensors = list(given.inputs.values())
        expected = torch.autograd.grad(loss(given), tensors)
        found = torch.autograd.grad(compiled(given), tensors)
        assert all(rms_error(a, b) < 1e-6 for a, b in zip(found, expected))
    checkpoint(loss, given, use_reentrant=False).backward()
    assert all(torch.equal(t.grad, grad) for t, grad in zip(tensors, expected))

    projection = torch.nn.Linear(12, 12).to(device)
    inputs = given.inputs
    with torch.autocast(device, torch.bfloat16):
        out = gated_residual(inputs["stream"], projection(inputs["x"]), inputs["gate"], backend="triton")
    assert out.dtype == torch.float32
    out.sum().backward()
    assert projection.weight.grad.any() and projection.weight.grad.isfinite().all()


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check for check in (parity, strides, rows_and_runs, opcheck, machinery)
}


@pytest.mark.skipif(cannot_interpret() is not None, reason=str(cannot_interpret()))
def test_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    environment.pop("GENSSM_BACKEND", None)
    command = [sys.executable, "-m", "tests.kernels.test_gated_residual"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_on_the_device(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [384, 768, 1000, 1152, 4096])
@pytest.mark.parametrize("name", SOME)
def test_model_sizes_on_the_device(name: str, channels: int) -> None:
    check_parity(replace(CASES[name], shape=(3, 300, channels)), "cuda", torch.bfloat16)


def launches(
    shape: tuple[int, int, int], case: Case = CASES["everything"], dtype: torch.dtype = torch.bfloat16
) -> Caught:
    """Of a forward and a backward pass of a case."""
    from genssm.kernels.gated_residual import triton_residual

    given = problem(replace(case, shape=shape), "cpu", dtype)
    stream, x, gate, skip = (given.inputs.get(name) for name in ("stream", "x", "gate", "skip"))
    factor = given.options.get("factor")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        kernels = (triton_residual.residual_forward_kernel, triton_residual.residual_backward_kernel)
        caught = Caught().of(patch, *kernels)
        out = triton_residual.residual_forward(stream, x, gate, skip, factor)
        triton_residual.residual_backward(out, x, gate, factor, skip.dtype if case.skip and case.factor else None)
    assert [kernel for kernel, _ in caught] == [*kernels]
    return caught


@triton_missing
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_compiles_for_every_target(target: tuple) -> None:
    for kernel, arguments in launches((2, 3, 768)):
        compile_for(kernel, arguments, target)


@triton_missing
@pytest.mark.parametrize("name", ["gate alone", "of tokens", "shared", "half", "half skip"])
def test_options_compile(name: str) -> None:
    for kernel, arguments in launches((2, 3, 100), CASES[name], torch.float16):
        compile_for(kernel, arguments, ("cuda", 90, 32))


@triton_missing
@pytest.mark.parametrize("channels", [768, 2304, 4096, 16384])
def test_registers_suffice(channels: int) -> None:
    """No spills; loads and stores of 16 bytes."""
    for kernel, arguments in launches((2, 3, channels)):
        compiled = compile_for(kernel, arguments, ("cuda", 90, 32))
        assert resources(compiled)["STACK"] == 0
        wide = ("ld.global.v4", "cp.async.cg.shared.global")  # the latter where rows are fetched ahead
        assert any(load in compiled.asm["ptx"] for load in wide) and "st.global.v4" in compiled.asm["ptx"]


@triton_missing
def test_products_are_rounded_before_sums() -> None:
    """No multiply-add, which would skip a rounding that the PyTorch path makes."""
    (forward, arguments), _ = launches((2, 3, 768), dtype=torch.float32)
    ptx = compile_for(forward, arguments, ("cuda", 90, 32)).asm["ptx"]
    assert "fma" not in ptx and "mul.rn.f32" in ptx and "add.rn.f32" in ptx


@triton_missing
def test_nothing_is_compiled_anew_for_other_lengths_and_batches() -> None:
    """Equal constants, and no argument whose value the compiler looks at."""

    def keys(batch: int, length: int) -> list[dict]:
        found = []
        for kernel, arguments in launches((batch, length, 24)):
            looked_at = {p.name for p in kernel.params if p.is_constexpr or not p.do_not_specialize}
            found.append({k: v for k, v in arguments.items() if k in looked_at and not isinstance(v, Tensor)})
        return found

    assert keys(1, 1) == keys(1, 7) == keys(4, 1) == keys(3, 5) == keys(16, 64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in CHECKS.values():
        each("cpu")
