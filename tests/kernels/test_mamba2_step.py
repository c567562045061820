"""One decoding step of a Mamba-2 mixer: PyTorch against the operators over whole sequences; Triton in its interpreter,
compiled for devices that are not here, and on a device that is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.mamba2_step import fill_windows, mamba2_step, read_windows
from genssm.kernels.mamba2_step.benchmark import check
from genssm.kernels.ssd import ssd
from tests.kernels.problems import rms_error
from tests.kernels.test_triton_compile import TARGETS, Caught, compile_for

triton_missing = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
# batch, heads, channels of a head, states, groups, taps
SIZES = [(2, 4, 8, 16, 1, 4), (1, 6, 5, 3, 2, 2), (3, 2, 40, 20, 1, 1), (2, 2, 70, 130, 2, 8)]


def problem(sizes: tuple, dtype: torch.dtype = torch.float64, bias: bool = True, length: int = 4) -> dict:
    """Arguments of a step, with ``projected`` (Bt, L, ...) for L tokens."""
    batch, heads, width, states, groups, taps = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inner, channels = heads * width, heads * width + 2 * groups * states
    return {
        "projected": random(batch, length, inner + channels + heads),
        "conv_windows": random(batch, 2, channels, taps),
        "conv_turns": torch.ones(batch, inner, dtype=torch.uint8),
        "ssm_state": random(batch, 1, heads, width, states),
        "conv_weight": random(channels, taps),
        "conv_bias": random(channels) if bias else None,
        "A_log": random(heads),
        "D": random(heads),
        "dt_bias": random(heads) - 2,
        "ngroups": groups,
    }


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_steps_equal_the_sequence(sizes: tuple, bias: bool) -> None:
    given = problem(sizes, bias=bias)
    _, heads, width, states, groups, _ = sizes
    inner, maps = heads * width, groups * states
    projected, ssm = given.pop("projected"), given["ssm_state"].clone()
    windows, turns = given["conv_windows"], given["conv_turns"]
    conv = read_windows(windows, turns)
    z, mapped, dt = projected.split([inner, inner + 2 * maps, heads], dim=-1)
    mapped, conv_last = causal_conv1d(
        mapped, given["conv_weight"], given["conv_bias"], activation="silu", initial_state=conv, return_last_state=True
    )
    x, B, C = mapped.split([inner, maps, maps], dim=-1)
    per_head, per_group = (heads, width), (groups, states)
    expected, ssm_last = ssd(
        x.unflatten(-1, per_head), dt, -given["A_log"].exp(), B.unflatten(-1, per_group), C.unflatten(-1, per_group),
        given["D"], z.unflatten(-1, per_head), dt_bias=given["dt_bias"], dt_softplus=True, initial_state=ssm,
        return_last_state=True, backend="reference",
    )  # fmt: skip
    steps = [mamba2_step(projected[:, t].contiguous(), **given) for t in range(projected.shape[1])]
    torch.testing.assert_close(torch.stack(steps, dim=1), expected.flatten(-2))
    torch.testing.assert_close(given["ssm_state"], ssm_last)
    torch.testing.assert_close(read_windows(windows, turns), conv_last)
    assert (turns == 1).all()  # after an even number of steps
    fill_windows(windows, turns, conv)
    assert torch.equal(read_windows(windows, turns), conv)


def test_errors() -> None:
    given = problem(SIZES[0])
    given["projected"] = given["projected"][:, 0]
    with pytest.raises(ValueError, match=r"D is \(3,\), expected \(4,\)"):
        mamba2_step(**{**given, "D": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"conv_bias is \(7,\), expected"):
        mamba2_step(**{**given, "conv_bias": torch.zeros(7)})
    with pytest.raises(ValueError, match=r"conv_windows is \(2, 2, 64, 5\), expected \(2, 2, 64, 4\)"):
        mamba2_step(**{**given, "conv_windows": torch.zeros(2, 2, 64, 5)})
    with pytest.raises(ValueError, match=r"conv_turns are torch.int64, expected torch.uint8"):
        mamba2_step(**{**given, "conv_turns": given["conv_turns"].long()})
    with pytest.raises(ValueError, match="D is on meta"):
        mamba2_step(**{**given, "D": torch.zeros(4, device="meta")})
    with pytest.raises(ValueError, match="ngroups=3 dividing 4"):
        mamba2_step(**{**given, "ngroups": 3})
    with pytest.raises(ValueError, match="backend='triton' is not possible"):
        mamba2_step(**given, backend="triton")


HALVES = {torch.float16: 1e-3, torch.bfloat16: 6e-3}  # twice what they round by


@pytest.mark.parametrize("kept", HALVES, ids=str)
def test_a_narrow_state_is_rounded_when_kept(kept: torch.dtype) -> None:
    """The output comes from the state before that."""
    given = problem(SIZES[0])
    given["projected"] = given["projected"][:, 0]
    copies = {key: given[key].clone() for key in ("conv_windows", "conv_turns")}
    narrow = {**given, **copies, "ssm_state": given["ssm_state"].to(kept)}
    given["ssm_state"] = narrow["ssm_state"].double()
    torch.testing.assert_close(mamba2_step(**narrow), mamba2_step(**given))
    assert torch.equal(narrow["ssm_state"], given["ssm_state"].to(kept))


def saturation(device: str, backend: str) -> None:
    """In float16 a state that grows beyond the range stops at its end."""
    given = problem(SIZES[0], torch.float32, length=1)
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    given["projected"], given["ssm_state"] = 300 * given["projected"][:, 0], given["ssm_state"].half()
    mamba2_step(**given, backend=backend)
    largest = given["ssm_state"].abs().max().item()
    assert largest == 65504, largest


def test_saturation() -> None:
    saturation("cpu", "reference")


def moved(given: dict, device: str, dtype: torch.dtype) -> dict:
    """Arguments on a device; floats in a type."""
    changed = {}
    for key, value in given.items():
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        changed[key] = value.to(device, dtype) if floats else value
        if isinstance(value, torch.Tensor):
            changed[key] = changed[key].to(device, copy=True)
    return changed


def compare_with_triton(device: str, dtype: torch.dtype) -> None:
    """Outputs and all states after three steps, for every size, in one launch each and in two."""
    from genssm.kernels.mamba2_step import triton_step

    compare_sizes(device, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_step, "_FEW_HEADS", 0)
        compare_sizes(device, dtype)


def compare_sizes(device: str, dtype: torch.dtype) -> None:
    saturation(device, "triton")
    for sizes in SIZES:
        for bias in (True, False)[: 1 + (sizes == SIZES[0])]:
            for kept, bound in {torch.float32: 1e-5, **HALVES}.items():
                low = moved(problem(sizes, bias=bias), device, torch.float32)
                for key in ("projected", "conv_windows", "conv_weight", "conv_bias"):
                    low[key] = None if low[key] is None else low[key].to(dtype)
                low["ssm_state"] = low["ssm_state"].to(kept)
                exact = moved(low, "cpu", torch.float64)
                tokens, exact_tokens = low.pop("projected"), exact.pop("projected")
                # Relative RMS: where terms cancel, single values in half precision are far off.
                rounding = 1e-5 if dtype == torch.float32 else 1e-2
                for t in range(3):
                    found = mamba2_step(tokens[:, t], **low, backend="triton")
                    expected = mamba2_step(exact_tokens[:, t], **exact)
                    assert found.dtype == dtype and low["ssm_state"].dtype == kept
                    assert rms_error(found, expected) < max(rounding, t * bound)
                    assert rms_error(low["ssm_state"], exact["ssm_state"]) < max(rounding, (t + 1) * bound)
                    assert torch.equal(low["conv_turns"].cpu(), exact["conv_turns"])
                    windows = [read_windows(x["conv_windows"], x["conv_turns"]).double().cpu() for x in (low, exact)]
                    assert torch.equal(*windows)  # they hold inputs, which nothing rounds


@triton_missing
def test_parity_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.kernels.test_mamba2_step"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@triton_missing
@pytest.mark.parametrize("target", [TARGETS[i] for i in (0, 3, 4, 7)], ids=lambda target: str(target[1]))
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("launches", [1, 2])
def test_compiles(
    launches: int, target: tuple, dtype: torch.dtype, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genssm.kernels.mamba2_step import triton_step

    caught = Caught().of(monkeypatch, triton_step.conv_kernel, triton_step.step_kernel)
    monkeypatch.setattr(triton_step, "_FEW_HEADS", {1: 8, 2: 7}[launches])  # two rows of four heads
    given = problem((2, 4, 64, 128, 1, 4), torch.float32)
    projected, given["conv_windows"] = given.pop("projected")[:, 0].to(dtype), given["conv_windows"].to(dtype)
    given["ssm_state"] = given["ssm_state"].to(kept)
    triton_step.step_triton(projected, *given.values())
    assert len(caught) == launches
    for kernel, arguments in caught:
        compile_for(kernel, arguments, target)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parity_on_the_device(dtype: torch.dtype) -> None:
    compare_with_triton("cuda", dtype)


def test_benchmark_checks_first() -> None:
    check("reference", torch.device("cpu"), torch.float32)


if __name__ == "__main__":
    compare_with_triton("cpu", torch.float32)
