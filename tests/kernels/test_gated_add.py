"""The gated update of a stream: PyTorch against its steps; Triton in its interpreter, compiled for devices that are not
here, and on a device that is."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genssm.kernels.add_norm import gated_add
from tests.kernels.problems import TOLERANCE, poisoned, rms_error
from tests.kernels.test_add_norm import triton_missing
from tests.kernels.test_triton_compile import TARGETS, Caught, compile_for, resources
from tests.kernels.test_triton_interpreter import cannot_interpret

# Sizes; whose the gate is; whose the factor is; whether there is a skip.
CASES: dict[str, tuple[tuple[int, int, int], str, str | None, bool]] = {
    "everything": ((2, 5, 37), "sample", "sample", True),
    "packed": ((1, 7, 24), "token", "token", True),
    "of tokens": ((2, 5, 16), "token", "sample", False),
    "shared": ((3, 4, 9), "shared", "shared", True),
    "shared rows": ((3, 4, 9), "row", None, True),
    "gate alone": ((2, 6, 40), "sample", None, False),
    "one token": ((3, 1, 8), "sample", "sample", True),
    "one channel": ((2, 3, 1), "sample", None, True),
    "nothing": ((0, 3, 8), "sample", "sample", True),
}


def problem(name: str, device: str = "cpu", dtype: torch.dtype = torch.float64, size: int | None = None) -> dict:
    """Arguments; stream and skip are float32 beside half types."""
    (batch, length, channels), gate, factor, skip = CASES[name]
    channels, g = size or channels, torch.Generator().manual_seed(0)
    of = {"sample": (batch, 1), "token": (batch, length), "shared": (1, 1), "row": (1, length)}
    wide = torch.promote_types(dtype, torch.float32)

    def random(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(sizes, generator=g, dtype=torch.float64)
        return x.to(torch.bfloat16).to(device, dtype).requires_grad_()  # any type holds it

    given = {"stream": random(batch, length, channels, dtype=wide), "x": random(batch, length, channels)}
    given["gate"] = random(*of[gate], channels)
    if skip:
        given["skip"] = random(batch, length, channels, dtype=wide)
    if factor:
        given["factor"] = random(*of[factor], 1, dtype=torch.float32).detach()
    return given


def run(given: dict, backend: str) -> dict[str, Tensor]:
    """The result and the gradients, for a fixed random gradient of the result."""
    out = gated_add(**given, backend=backend)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=g, dtype=torch.float64).bfloat16().to(out)
    names = [name for name in given if name != "factor"]
    found = torch.autograd.grad(out, [given[name] for name in names], grad)
    return {"out": out.detach()} | {f"d{name}": x for name, x in zip(names, found)}


def check_parity(name: str, device: str, dtype: torch.dtype, size: int | None = None) -> None:
    given = problem(name, device, dtype, size)
    exact = {key: x.detach().cpu().double().requires_grad_(key != "factor") for key, x in given.items()}
    expected, types = run(exact, "reference"), run(given, "reference")
    with poisoned():
        found = run(given, "triton")
    for key, value in expected.items():
        assert found[key].dtype == types[key].dtype, key
        assert rms_error(found[key], value) < TOLERANCE[dtype], (name, key)


@pytest.mark.parametrize("name", CASES)
def test_is_the_composition(name: str) -> None:
    given = problem(name)
    stream, x, gate = (given[key] for key in ("stream", "x", "gate"))
    expected = stream + given.get("factor", 1.0) * (given.get("skip", 0.0) + gate * x)
    torch.testing.assert_close(gated_add(**given), expected)


@pytest.mark.parametrize("name", ["everything", "of tokens", "shared rows"])
def test_gradcheck(name: str) -> None:
    given = problem(name, size=2)
    factor, names = given.pop("factor", None), list(given)

    def call(*tensors: Tensor) -> Tensor:
        return gated_add(**dict(zip(names, tensors)), factor=factor)

    assert torch.autograd.gradcheck(call, list(given.values()))
    assert torch.autograd.gradgradcheck(call, list(given.values()))


def test_result_is_wide_beside_half_types() -> None:
    given = problem("everything", dtype=torch.bfloat16)
    assert gated_add(**given).dtype == torch.float32
    assert gated_add(given["x"], given["x"], given["gate"]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stream": torch.zeros(3, 4)}, r"stream is \(3, 4\) torch.float32, expected floats"),
        ({"x": torch.zeros(2, 1, 4)}, r"x is \(2, 1, 4\) beside a stream \(2, 3, 4\)"),
        ({"gate": torch.zeros(2, 2, 4)}, r"gate is \(2, 2, 4\)"),
        ({"factor": torch.zeros(2, 1, 4)}, r"factor is \(2, 1, 4\)"),
        ({"skip": torch.zeros(2, 3, 1)}, r"skip is \(2, 3, 1\)"),
        ({"gate": torch.zeros(2, 1, 4, device="meta")}, "gate is on meta"),
        ({"backend": "triton"}, "backend='triton' is not possible"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    given = {"stream": torch.zeros(2, 3, 4), "x": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 1, 4)}
    with pytest.raises(ValueError, match=message):
        gated_add(**{**given, **change})


# Triton: each of these runs in the interpreter, in a process of its own, and on a device


def parity(device: str) -> None:
    for name in CASES:
        for dtype in (torch.float32, torch.float16):
            check_parity(name, device, dtype)


def strides(device: str) -> None:
    """Any are taken, with the same bits."""
    given = problem("everything", device, torch.float32)
    expected = run(given, "triton")
    for change in (
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], dim=-1)[..., t.shape[-1] :],
        lambda t: torch.stack([t, t], dim=-1)[..., 1],
    ):
        other = {key: change(t.detach()).requires_grad_(key != "factor") for key, t in given.items()}
        found = run(other, "triton")
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def opcheck(device: str) -> None:
    for name in ("everything", "gate alone", "packed"):
        given = problem(name, device, torch.float16)
        x, gate, skip, factor = (given.get(key) for key in ("x", "gate", "skip", "factor"))
        torch.library.opcheck(torch.ops.genssm.gated_add_fwd.default, (given["stream"], x, gate, skip, factor))
        grad, dtype = torch.randn_like(given["stream"]), torch.float32 if skip is not None else None
        given = (grad.detach(), x.detach(), gate.detach(), factor, dtype)
        torch.library.opcheck(torch.ops.genssm.gated_add_bwd.default, given)


def machinery(device: str) -> None:
    """Compiled whole; a row's bits do not depend on the batch, and two runs give the same."""

    def loss(given: dict) -> Tensor:
        return gated_add(**given, backend="triton").square().sum()

    given = problem("everything", device, torch.float32)
    tensors = [t for t in given.values() if t.requires_grad]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = torch.autograd.grad(loss(given), tensors)
    for again in (compiled, loss):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again(given), tensors), expected))
    one = {key: t[1:] for key, t in given.items()}
    assert torch.equal(gated_add(**one, backend="triton")[0], gated_add(**given, backend="triton")[1])


CHECKS: dict[str, Callable[[str], None]] = {c.__name__: c for c in (parity, strides, opcheck, machinery)}


@pytest.mark.skipif(cannot_interpret() is not None, reason=str(cannot_interpret()))
def test_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    environment.pop("GENSSM_BACKEND", None)
    command = [sys.executable, "-m", "tests.kernels.test_gated_add"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_on_the_device(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [768, 1000, 2304])
def test_model_sizes_on_the_device(channels: int) -> None:
    for name in CASES:
        check_parity(name, "cuda", torch.bfloat16, channels)


def launches(batch: int, length: int, channels: int) -> Caught:
    """Of a forward and a backward pass in bfloat16 beside a float32 stream."""
    from genssm.kernels.add_norm import triton_norm

    stream, x = (torch.zeros(batch, length, channels, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    gate, factor = torch.zeros(batch, 1, channels, dtype=torch.bfloat16), torch.zeros(batch, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        caught = Caught().of(patch, triton_norm.gated_forward_kernel, triton_norm.gated_backward_kernel)
        triton_norm.gated_forward(stream, x, gate, stream, factor)
        triton_norm.gated_backward(stream, x, gate, factor, torch.float32)
    assert len(caught) == 2
    return caught


@triton_missing
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_compiles_for_every_target(target: tuple) -> None:
    for kernel, arguments in launches(2, 3, 768):
        compile_for(kernel, arguments, target)


@triton_missing
@pytest.mark.parametrize("channels", [768, 2304, 4096])
def test_registers_suffice(channels: int) -> None:
    """No spills; loads and stores of 16 bytes."""
    for kernel, arguments in launches(2, 3, channels):
        compiled = compile_for(kernel, arguments, ("cuda", 90, 32))
        assert resources(compiled)["STACK"] == 0
        assert "ld.global.v4" in compiled.asm["ptx"] and "st.global.v4" in compiled.asm["ptx"]


@triton_missing
def test_nothing_is_compiled_anew_for_other_lengths_and_batches() -> None:
    def keys(batch: int, length: int) -> list[dict]:
        found = []
        for kernel, arguments in launches(batch, length, 24):
            looked_at = {p.name for p in kernel.params if p.is_constexpr or not p.do_not_specialize}
            found.append({k: v for k, v in arguments.items() if k in looked_at and not isinstance(v, Tensor)})
        return found

    assert keys(1, 2) == keys(1, 7) == keys(3, 5) == keys(16, 64)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in CHECKS.values():
        each("cpu")
