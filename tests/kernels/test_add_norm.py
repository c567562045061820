"""Residual update, norm and modulation: PyTorch against its parts; Triton in its interpreter, compiled for devices that
are not here, and on a device that is."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genssm.kernels.add_norm import add_norm, benchmark
from genssm.kernels.add_norm.benchmark import check_backends
from tests.kernels.problems import TOLERANCE, Problem, poisoned, rms_error
from tests.kernels.test_triton_compile import TARGETS, Caught, compile_for, resources
from tests.kernels.test_triton_interpreter import cannot_interpret

triton_missing = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
LOW = ("x", "gate", "weight", "bias", "shift", "scale")  # the stream keeps float32 beside half types
ROUNDINGS = 4  # of half types, one after the other


@dataclass(frozen=True)
class Case:
    """Sizes and options of a problem; gate, modulation and factor are of a "sample", a "token", "shared", or None."""

    shape: tuple[int, ...] = (2, 5, 37)
    norm: str = "rms"
    x: bool = True
    gate: str | None = "sample"
    modulation: str | None = "sample"
    affine: bool = True
    normed: bool = True
    half_stream: bool = False
    dtype: torch.dtype | None = None
    add_normed: bool = False
    factor: str | None = None


CASES = {
    "everything, rms": Case(),
    "everything, layer": Case(norm="layer"),
    "of tokens": Case(gate="token", modulation="token", norm="layer"),
    "shared": Case(gate="shared", modulation="shared"),
    "mixed": Case(gate="token", modulation="sample", normed=False),
    "no update": Case(x=False, gate=None),
    "no gate": Case(gate=None),
    "update and norm": Case(gate=None, modulation=None),
    "norm alone": Case(x=False, gate=None, modulation=None),
    "gate without modulation": Case(modulation=None, norm="layer"),
    "no weight": Case(affine=False),
    "no weight, layer": Case(norm="layer", affine=False, x=False, gate=None, normed=False),
    "half stream": Case(half_stream=True),
    "given type": Case(dtype=torch.float16),
    "one token": Case(shape=(3, 1, 8)),
    "one token of tokens": Case(shape=(2, 1, 9), gate="token", modulation="token"),
    "one channel": Case(shape=(2, 3, 1)),
    "rows": Case(shape=(7, 24), gate=None, modulation=None),
    "a grid": Case(shape=(2, 3, 2, 20), gate=None, modulation=None, norm="layer"),
    "nothing": Case(shape=(0, 3, 8)),
    "add normed": Case(x=False, gate=None, normed=False, add_normed=True, factor="sample"),
    "add normed, layer": Case(x=False, gate=None, add_normed=True, factor="token", norm="layer", modulation="token"),
    "add normed, half stream": Case(x=False, gate=None, add_normed=True, factor="shared", half_stream=True),
    "add normed, rows": Case(shape=(7, 24), x=False, gate=None, modulation=None, add_normed=True),
}
SOME = ("everything, rms", "everything, layer", "of tokens", "no gate", "half stream", "given type", "add normed")


def problem(case: Case, seed: int = 0) -> Problem:
    """Float64 arguments."""
    g = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float64)

    def vector(kind: str, channels: int = case.shape[-1]) -> Tensor:
        batch, length, _ = case.shape
        return random(*{"sample": (batch, 1), "token": (batch, length), "shared": (1, 1)}[kind], channels)

    inputs = {"hidden_states": 2 * random(*case.shape) + 0.5}
    if case.x:
        inputs["x"] = random(*case.shape)
    if case.gate:
        inputs["gate"] = vector(case.gate)
    if case.affine:
        inputs["weight"] = 1 + random(case.shape[-1]) / 4
        if case.norm == "layer":
            inputs["bias"] = random(case.shape[-1])
    if case.modulation:
        inputs |= {"shift": vector(case.modulation), "scale": vector(case.modulation)}
    options = {"norm": case.norm, "return_normed": case.normed, "dtype": case.dtype, "eps": 1e-3}
    if case.add_normed:  # float16 does not raise the type of anything it meets here
        options |= {"add_normed": True, "factor": vector(case.factor, 1).half() if case.factor else None}
    return Problem(inputs, options)


def placed(case: Case, device: str, dtype: torch.dtype) -> Problem:
    names = (*LOW, "hidden_states") if case.half_stream else LOW
    return problem(case).to(device, dict.fromkeys(names, dtype))


def run(given: Problem, backend: str) -> dict[str, Tensor]:
    """The results and the gradients of all inputs, for fixed random gradients (that any type can hold) of the first."""
    results = add_norm(**given.inputs, **given.options, backend=backend)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=g, dtype=torch.float64).bfloat16().to(t) for t in results]
    found = torch.autograd.grad(results, list(given.inputs.values()), grads, allow_unused=True)
    assert not any(grad is None for grad in found)
    found = {f"d{name}": grad for name, grad in zip(given.inputs, found)}
    return {name: t.detach() for name, t in zip("hyn", results)} | found


def check_parity(case: Case, device: str, dtype: torch.dtype) -> None:
    """Triton against the reference in float64 on the same (rounded) arguments, and in types against the reference."""
    given = placed(case, device, dtype)
    exact = given.to("cpu", torch.float64)
    exact.options = {**exact.options, "dtype": None}
    expected, composed = run(exact, "reference"), run(given, "reference")
    with poisoned():
        found = run(given, "triton")
    for name, value in expected.items():
        assert found[name].dtype == composed[name].dtype, name
        low = dtype if dtype != torch.float32 else case.dtype or dtype
        bound = TOLERANCE[low] * (1 if low == torch.float32 else ROUNDINGS)
        error = rms_error(found[name], value)
        assert error < bound, f"{name}: relative RMS error {error:.1e} for {case}"
    if not case.add_normed:
        assert torch.equal(found["h"], composed["h"])  # no statistics in it: rounded step by step as PyTorch does
    for name in set(found) & set("hyn"):
        if found[name].dtype != torch.float32 and found[name].numel():
            assert (found[name] == composed[name]).double().mean() > 0.98, name


# PyTorch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", [CASES[name] for name in SOME[:4]], ids=SOME[:4])
def test_is_the_composition(case: Case, dtype: torch.dtype) -> None:
    """Bit by bit, with the gradients: the steps of a block one after the other."""
    given = placed(case, "cpu", dtype)
    if dtype == torch.float64:
        given = given.to("cpu", dtype)
    h, x, weight, bias, shift, scale, gate = (
        given.inputs.get(name) for name in ("hidden_states", "x", "weight", "bias", "shift", "scale", "gate")
    )
    new_h = h + x if gate is None else h + gate * x
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if case.norm == "rms":
        n = F.rms_norm(new_h.to(wide), weight.shape, weight.to(wide), 1e-3).to(weight.dtype)
    else:
        n = F.layer_norm(new_h.to(wide), weight.shape, weight.to(wide), bias.to(wide), 1e-3).to(weight.dtype)
    expected = (new_h, n * (1 + scale) + shift, n)
    found = add_norm(**given.inputs, **given.options)
    grads = [torch.randn_like(t) for t in expected]
    tensors = list(given.inputs.values())
    pairs = [*zip(found, expected)]
    pairs += zip(torch.autograd.grad(found, tensors, grads), torch.autograd.grad(expected, tensors, grads))
    for one, other in pairs:
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_adds_what_it_normed() -> None:
    given = placed(CASES["add normed"], "cpu", torch.float32)
    h, y = add_norm(**given.inputs, **given.options)
    plain = {name: value for name, value in given.options.items() if name not in ("add_normed", "factor")}
    same, expected, n = add_norm(**given.inputs, **{**plain, "return_normed": True})
    assert torch.equal(y, expected) and torch.equal(h, same + given.options["factor"] * n)


def test_returns_what_was_asked_for() -> None:
    h = torch.randn(2, 3, 4)
    same, y = add_norm(h)
    assert same is h and torch.equal(y, F.rms_norm(h, (4,), eps=1e-5))
    assert len(add_norm(h, h, return_normed=True)) == 3
    assert add_norm(h, dtype=torch.bfloat16)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("case", [CASES[name] for name in SOME[:4]], ids=SOME[:4])
def test_gradcheck(case: Case) -> None:
    small = problem(Case(**{**case.__dict__, "shape": (2, 3, 4)})).to("cpu", torch.float64)
    names = list(small.inputs)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return add_norm(**dict(zip(names, tensors)), **small.options)

    assert torch.autograd.gradcheck(call, list(small.inputs.values()))
    assert torch.autograd.gradgradcheck(call, list(small.inputs.values()))


MISTAKES = {
    "norm": ({"norm": "batch"}, "norm is 'batch', expected 'rms' or 'layer'"),
    "integers": (
        {"hidden_states": torch.zeros(2, 3, 4, dtype=torch.int64)},
        r"hidden_states are \(2, 3, 4\) torch.int",
    ),
    "bias": ({"bias": torch.zeros(4)}, "bias belongs to a layer norm"),
    "gate": ({"gate": torch.zeros(2, 1, 4)}, "gate is given without x"),
    "shift alone": ({"shift": torch.zeros(2, 1, 4)}, "shift and scale go together"),
    "x": ({"x": torch.zeros(2, 1, 4)}, r"x is \(2, 1, 4\), expected \(2, 3, 4\)"),
    "weight": ({"weight": torch.zeros(3)}, r"weight is \(3,\), expected \(4,\)"),
    "vectors": ({"shift": torch.zeros(2, 4), "scale": torch.zeros(2, 4)}, r"shift is \(2, 4\) beside hidden_states"),
    "tokens": ({"x": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 2, 4)}, r"gate is \(2, 2, 4\)"),
    "device": ({"weight": torch.zeros(4, device="meta")}, "weight is on meta"),
    "added twice": ({"x": torch.zeros(2, 3, 4), "add_normed": True}, "leave x out"),
    "factor alone": ({"factor": torch.zeros(2, 1, 1)}, "factor is given without add_normed"),
    "factor": ({"factor": torch.zeros(2, 1, 4), "add_normed": True}, r"factor is \(2, 1, 4\) beside hidden_states"),
    "triton": ({"backend": "triton"}, "backend='triton' is not possible"),
}


@pytest.mark.parametrize("change", MISTAKES.values(), ids=MISTAKES.keys())
def test_errors(change: tuple[dict, str]) -> None:
    given, message = change
    with pytest.raises(ValueError, match=message):
        add_norm(**{"hidden_states": torch.zeros(2, 3, 4), **given})


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
    given = placed(Case(), device, torch.float32)
    expected = run(given, "triton")
    for change in (
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], dim=-1)[..., t.shape[-1] :],
        lambda t: torch.cat([t, t], dim=0)[t.shape[0] :],
        lambda t: torch.stack([t, t], dim=-1)[..., 1],
    ):
        other = Problem({k: change(t.detach()).requires_grad_() for k, t in given.inputs.items() if t.ndim == 3})
        found = run(Problem({**given.inputs, **other.inputs}, given.options), "triton")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def rows_and_runs(device: str) -> None:
    """A row's bits do not depend on the batch; sums over rows are the same at every run."""
    given = placed(Case(shape=(4, 9, 40)), device, torch.float32)
    first, second = (run(given, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for b in range(4):
        one = {k: t[b : b + 1] if t.ndim == 3 else t for k, t in given.inputs.items()}
        for name, t in zip("hyn", add_norm(**one, **given.options, backend="triton")):
            assert torch.equal(t[0], first[name][b])


def opcheck(device: str) -> None:
    for name in ("everything, layer", "of tokens", "no gate", "norm alone", "add normed"):
        case = CASES[name]
        problem = placed(case, device, torch.float16)
        given = [problem.inputs.get(key) for key in ("hidden_states", *LOW)]
        given.append(problem.options.get("factor"))
        options = (case.add_normed, case.norm == "layer", 1e-3, None, case.normed)
        torch.library.opcheck(torch.ops.genssm.add_norm_fwd.default, (*given, *options))
        given = [None if t is None else t.detach() for t in given]
        h, y, n = torch.ops.genssm.add_norm_fwd(*given, *options)
        grads = (h if case.x or case.add_normed else None, y, n if case.normed else None)
        tensors = (*given[:1], given[1] if case.gate else None, *given[2:])
        added = torch.float16 if case.x else None
        torch.library.opcheck(torch.ops.genssm.add_norm_bwd.default, (*grads, *tensors, *options[:3], added))


def machinery(device: str) -> None:
    """Compiled whole, checkpointed, under autocast, with results that nobody differentiates."""

    def loss(inputs: dict) -> Tensor:
        return sum(t.square().sum() for t in add_norm(**inputs, return_normed=True, backend="triton"))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (3, 6):
        inputs = placed(Case(shape=(2, length, 12)), device, torch.float32).inputs
        tensors = list(inputs.values())
        expected = torch.autograd.grad(loss(inputs), tensors)
        found = torch.autograd.grad(compiled(inputs), tensors)
        assert all(rms_error(a, b) < 1e-6 for a, b in zip(found, expected))
    checkpoint(loss, inputs, use_reentrant=False).backward()
    assert all(torch.equal(t.grad, grad) for t, grad in zip(tensors, expected))

    projection = torch.nn.Linear(12, 12).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = add_norm(inputs["hidden_states"], projection(inputs["x"]), inputs["gate"], backend="triton")[1]
    assert y.dtype == torch.float32
    y.sum().backward()
    assert projection.weight.grad.any() and projection.weight.grad.isfinite().all()

    for used in range(3):
        results = add_norm(**inputs, return_normed=True, backend="triton")
        found = torch.autograd.grad(results[used].sum(), tensors, materialize_grads=True, allow_unused=True)
        results = add_norm(**inputs, return_normed=True, backend="reference")
        expected = torch.autograd.grad(results[used].sum(), tensors, materialize_grads=True, allow_unused=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check for check in (parity, strides, rows_and_runs, opcheck, machinery)
}


@pytest.mark.skipif(cannot_interpret() is not None, reason=str(cannot_interpret()))
def test_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    environment.pop("GENSSM_BACKEND", None)
    command = [sys.executable, "-m", "tests.kernels.test_add_norm"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_on_the_device(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [768, 1000, 1152, 2304, 4096])
@pytest.mark.parametrize("name", SOME)
def test_model_sizes_on_the_device(name: str, channels: int) -> None:
    check_parity(Case(**{**CASES[name].__dict__, "shape": (3, 300, channels)}), "cuda", torch.bfloat16)


def launches(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, **options) -> Caught:
    """Of a forward and a backward pass of a case."""
    from genssm.kernels.add_norm import triton_norm

    case = Case(shape=shape, **options)
    given = placed(case, "cpu", dtype)
    inputs = {name: t.detach() for name, t in given.inputs.items()}
    tensors = [*(inputs.get(name) for name in ("hidden_states", *LOW)), given.options.get("factor")]
    with pytest.MonkeyPatch.context() as patch:
        caught = Caught().of(patch, triton_norm.norm_forward_kernel, triton_norm.norm_backward_kernel)
        options = (case.add_normed, case.norm == "layer", 1e-5)
        h, y, n = triton_norm.norm_forward(*tensors, *options, case.dtype, case.normed)
        dh = h if case.x or case.add_normed else None
        h, *rest = tensors if not case.x else (h, tensors[1] if case.gate else None, *tensors[2:])
        triton_norm.norm_backward(dh, y, n if case.normed else None, h, *rest, *options, dtype if case.x else None)
    assert [kernel.__name__ for kernel, _ in caught] == ["norm_forward_kernel", "norm_backward_kernel"]
    return caught


@triton_missing
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_compiles_for_every_target(target: tuple) -> None:
    for kernel, arguments in launches((2, 3, 768), norm="layer"):
        compile_for(kernel, arguments, target)


@triton_missing
@pytest.mark.parametrize(
    "name", ["of tokens", "update and norm", "norm alone", "no weight, layer", "half stream", "add normed"]
)
def test_options_compile(name: str) -> None:
    options = {**CASES[name].__dict__, "shape": (2, 3, 100), "dtype": torch.float16}
    for kernel, arguments in launches(**options):
        compile_for(kernel, arguments, ("cuda", 90, 32))


@triton_missing
@pytest.mark.parametrize("channels", [768, 2304, 4096])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_registers_suffice(channels: int, norm: str) -> None:
    """No spills; loads and stores of 16 bytes."""
    for kernel, arguments in launches((2, 3, channels), norm=norm):
        compiled = compile_for(kernel, arguments, ("cuda", 90, 32))
        assert resources(compiled)["STACK"] == 0
        wide = ("ld.global.v4", "cp.async.cg.shared.global")  # the latter where rows are fetched ahead
        assert any(load in compiled.asm["ptx"] for load in wide) and "st.global.v4" in compiled.asm["ptx"]


@triton_missing
def test_products_are_rounded_before_sums() -> None:
    """No multiply-add behind the norm, which would skip a rounding that the PyTorch path makes."""
    (forward, arguments), _ = launches((2, 3, 768), modulation=None, affine=False, dtype=torch.float32)
    ptx = compile_for(forward, arguments, ("cuda", 90, 32)).asm["ptx"]
    assert "fma" not in ptx and "mul.rn.f32" in ptx and "add.rn.f32" in ptx


@triton_missing
def test_nothing_is_compiled_anew_for_other_lengths_and_batches() -> None:
    """Equal constants, and no argument whose value the compiler looks at."""

    def keys(batch: int, length: int) -> list[dict]:
        found = []
        for kernel, arguments in launches((batch, length, 24)):
            looked_at = {p.name for p in kernel.params if p.is_constexpr or not p.do_not_specialize}
            numbers = {k: v for k, v in arguments.items() if k in looked_at and not isinstance(v, Tensor)}
            found.append(numbers)
        return found

    assert keys(1, 1) == keys(1, 7) == keys(4, 1) == keys(3, 5) == keys(16, 64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in CHECKS.values():
        each("cpu")


def test_the_benchmark_compiles_the_same_operation() -> None:
    inputs = benchmark.arguments((2, 5, 16), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(benchmark.composed(inputs), add_norm(**inputs))
