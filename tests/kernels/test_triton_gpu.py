"""The Triton kernels on a device, beyond what the tests of the ops already ask of every backend."""

import os
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import pytest
import torch

from genssm.kernels import ahead
from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.selective_scan import selective_scan
from genssm.kernels.ssd import ssd
from genssm.kernels.triton_launch import processors
from tests.kernels.problems import Case, check_parity, conv_problem, rms_error, run, scan_problem, ssd_problem

pytestmark = pytest.mark.gpu
HALF = dict.fromkeys(("u", "delta", "z", "B", "C", "x", "dt"), torch.bfloat16)
HALF_PRODUCTS = 1.5e-2  # of the matrix products of ssd in bfloat16


@pytest.mark.parametrize("states", [1, 2, 5, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtypes", [torch.float32, HALF], ids=["float32", "bfloat16"])
def test_states(states: int, dtypes) -> None:
    case = Case(length=67, channels=101, states=states, directions=2, order="random", initial=True)
    check_parity(selective_scan, scan_problem, case, "triton", "cuda", dtypes)


@pytest.mark.parametrize("length", [1, 3, 31, 32, 33, 129, 1000, 4096])
@pytest.mark.parametrize("directions", [1, 2])
def test_lengths(length: int, directions: int) -> None:
    case = Case(batch=1, length=length, channels=33, directions=directions, order="random", initial=True)
    check_parity(selective_scan, scan_problem, case, "triton", "cuda")


@pytest.mark.parametrize("channels", [1, 7, 32, 96, 384])
def test_channels(channels: int) -> None:
    check_parity(selective_scan, scan_problem, Case(length=70, channels=channels, states=16), "triton", "cuda", HALF)


@pytest.mark.parametrize("own", ["", "delta A", "u z"])
def test_directions_in_turn(own: str) -> None:
    """Enough programs for one to take all directions."""
    case = Case(batch=130, length=9, channels=800, directions=3, order="random", own=own)
    check_parity(selective_scan, scan_problem, case, "triton", "cuda")


@pytest.mark.parametrize("directions", [1, 2])
def test_smaller_programs(directions: int) -> None:
    """Too few programs of 64 channels, enough of 32."""
    batch = -(-6 * processors(torch.device("cuda")) // (1536 // 32))
    case = Case(batch=batch, length=40, channels=1536, states=16, directions=directions, order="random", initial=True)
    check_parity(selective_scan, scan_problem, case, "triton", "cuda", HALF)


def test_blocks_in_turn() -> None:
    """Many states: several blocks of channels share the memory for dB and dC."""
    check_parity(selective_scan, scan_problem, Case(length=40, channels=256, states=64), "triton", "cuda")


@pytest.mark.parametrize("states", [17, 48, 100])
@pytest.mark.parametrize("own", ["", "D", "u delta A"])
def test_many_states_in_parts(states: int, own: str) -> None:
    case = Case(length=70, channels=101, states=states, directions=2, order="random", own=own, initial=True)
    check_parity(selective_scan, scan_problem, case, "triton", "cuda")


@pytest.mark.parametrize("length", [1, 4, 31, 33, 64, 100])
def test_few_tokens_of_many_sequences(length: int) -> None:
    """Enough sequences for the plain forward to fill the device."""
    batch = -(-8 * processors(torch.device("cuda")) // (1536 // 64))
    case = Case(batch=batch, length=length, channels=1536, states=16, order="random", initial=length % 2 == 0)
    check_parity(selective_scan, scan_problem, case, "triton", "cuda", HALF)


@pytest.mark.parametrize("segments", [2, 3, 7])
@pytest.mark.parametrize("order", [None, "random"])
@pytest.mark.parametrize("directions", [1, 2])
def test_segments(segments: int, order: str | None, directions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plans(monkeypatch, segments)
    case = Case(length=300, channels=70, states=16, directions=directions, order=order, own="u", initial=True)
    check_parity(selective_scan, scan_problem, case, "triton", "cuda")
    assert all(plan.segments > 1 for plan in found)


def plans(patch: pytest.MonkeyPatch, segments: int | None) -> list:
    """How passes are split from now on, with so many segments."""
    from genssm.kernels.selective_scan import triton_scan

    found = []
    for name in ("_forward_split", "_split"):
        split = getattr(triton_scan, name)

        def pieces(*given, split: Callable = split, place: int = list(signature(split).parameters).index("segments")):
            found.append(split(*given[:place], segments, *given[place + 1 :]))
            return found[-1]

        patch.setattr(triton_scan, name, pieces)
    return found


@pytest.mark.parametrize("directions", [2, 3])
@pytest.mark.parametrize("order", [None, "random"])
@pytest.mark.parametrize("states", [3, 16])
def test_segments_of_directions_in_turn(
    states: int, order: str | None, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is too large for directions side by side and small enough for the segments of one of them."""
    from genssm.kernels.selective_scan import triton_scan

    sizes = {"_BACKWARD_ENOUGH": 7, "_BACKWARD_ALONE": 7, "_SEGMENT_CHUNKS": 1, "processors": lambda device: 1}
    for name, value in sizes.items():
        monkeypatch.setattr(triton_scan, name, value)
    found = plans(monkeypatch, None)
    case = Case(
        batch=1, length=300, channels=8, states=states, directions=directions, order=order, own="u", initial=True
    )
    check_parity(selective_scan, scan_problem, case, "triton", "cuda")
    assert found[-1].segments > 1
    assert found[-1].direction_programs == 1


@pytest.mark.parametrize("states", [1, 5, 16, 64, 128, 256])
@pytest.mark.parametrize("dtypes", [torch.float32, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [16, 33, 64])
def test_ssd_sizes(states: int, dtypes, width: int) -> None:
    case = Case(length=131, channels=3 * width, states=states, directions=2, order="random", initial=True)
    least = 0.0 if dtypes is torch.float32 else HALF_PRODUCTS
    check_parity(ssd, ssd_problem, case, "triton", "cuda", dtypes, least)


@pytest.mark.parametrize("length", [1, 31, 64, 65, 1000, 4096])
@pytest.mark.parametrize("directions", [1, 2])
def test_ssd_lengths(length: int, directions: int) -> None:
    case = Case(batch=1, length=length, channels=33, directions=directions, order="random", initial=True)
    check_parity(ssd, ssd_problem, case, "triton", "cuda")


@pytest.mark.parametrize("segments", [2, 3, 7])
@pytest.mark.parametrize("slots", [1, 2])
def test_ssd_segments_and_slots(segments: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from genssm.kernels.ssd import triton_ssd

    split = triton_ssd._split
    monkeypatch.setattr(triton_ssd, "_split", lambda *given: split(*given[:3], segments, given[4]))
    monkeypatch.setattr(triton_ssd, "_slots", lambda *given: slots)
    case = Case(length=600, channels=96, heads=4, groups=2, states=16, directions=2, order="random", initial=True)
    check_parity(ssd, ssd_problem, case, "triton", "cuda")


@pytest.mark.parametrize(
    ("op", "make"), [(selective_scan, scan_problem), (ssd, ssd_problem), (causal_conv1d, conv_problem)]
)
def test_same_bits_twice(op, make) -> None:
    case = Case(batch=3, length=2000, channels=300, directions=2, order="random", own="u x", initial=True)
    problem = make(case).to("cuda", HALF)
    first, second = (run(op, problem, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_agrees_with_the_pytorch_path_at_model_size() -> None:
    case = Case(batch=2, length=1024, channels=1536, states=16, directions=2, order="random", own="delta A")
    problem = scan_problem(case).to("cuda", torch.float32)
    expected, found = (run(selective_scan, problem, backend) for backend in ("chunked", "triton"))
    for name in expected:
        assert rms_error(found[name], expected[name]) < 1e-5, name


def test_ssd_agrees_with_the_pytorch_path_at_model_size() -> None:
    case = Case(batch=2, length=1024, channels=1536, heads=24, states=128, directions=2, order="random", own="dt A")
    problem = ssd_problem(case).to("cuda", torch.float32)
    expected, found = (run(ssd, problem, backend) for backend in ("chunked", "triton"))
    for name in expected:
        assert rms_error(found[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("states", [16, 64, 128])
def test_ssd_in_bfloat16_at_model_size(states: int) -> None:
    """Many programs one after the other on each multiprocessor, along the rows as they lie."""
    case = Case(batch=8, length=1024, channels=1536, heads=24, states=states)
    problem = ssd_problem(case).to("cuda", HALF)
    expected, found = (run(ssd, problem, backend) for backend in ("chunked", "triton"))
    for name in expected:
        assert rms_error(found[name], expected[name]) < HALF_PRODUCTS, name


def test_nothing_is_compiled_again_for_other_lengths_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genssm.kernels.causal_conv1d import triton_conv
    from genssm.kernels.selective_scan import triton_scan
    from genssm.kernels.ssd import triton_ssd

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def scan(batch: int, length: int) -> None:
        def tokens(*sizes: int) -> torch.Tensor:
            return torch.randn(batch, 1, length, *sizes, device="cuda", dtype=torch.bfloat16)

        order = torch.randperm(length, device="cuda").int()[None]
        a, d = -torch.rand(1, 48, 4, device="cuda"), torch.rand(1, 48, device="cuda")
        given = (tokens(48), tokens(48), a, tokens(1, 4), tokens(1, 4), d, tokens(48), d, True, order, None, None, None)
        out, _, saved = triton_scan.scan_forward(*given, True, segments=1)
        triton_scan.scan_backward(out, None, saved, *given, True, segments=1)
        a, d_head, b = -torch.rand(1, 3, device="cuda"), torch.rand(1, 3, device="cuda"), tokens(1, 16)
        given = (tokens(3, 16), tokens(3), a, b, b, d_head, tokens(3, 16), d_head, True, order, None, None, None, True)
        out, _, saved = triton_ssd.ssd_forward(*given, segments=1)
        triton_ssd.ssd_backward(out, None, saved, *given, segments=1)
        x, weight = tokens(48), torch.rand(1, 48, 4, device="cuda")
        y, _ = triton_conv.conv_forward(x, weight, d, True, order, None, None, None, 1)
        triton_conv.conv_backward(y, None, x, weight, d, True, order, None, None, None, 1)

    def compiled() -> set[str]:
        return {path.parent.name for path in tmp_path.rglob("*.cubin")} | {
            path.parent.name for path in tmp_path.rglob("*.hsaco")
        }

    scan(4, 48)
    before = compiled()
    for batch, length in ((1, 1), (1, 48), (4, 1), (3, 5), (16, 64), (5, 333)):
        scan(batch, length)
    assert compiled() == before


FIRST_STEP = """
import threading
import torch
from triton import knobs
from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.selective_scan import selective_scan

found = []
knobs.compilation.listener = lambda *, src, **more: found.append((src.name, threading.current_thread().name))
u, delta, z = (torch.randn(2, 300, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
B, C = (torch.randn(2, 300, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
A, D = (torch.rand(96, 16, device="cuda") - 2).requires_grad_(), torch.ones(96, device="cuda", requires_grad=True)
taps = torch.randn(96, 4, device="cuda", requires_grad=True)
y = selective_scan(causal_conv1d(u, taps, activation="silu"), delta, A, B, C, D, z, delta_softplus=True)
for thread in threading.enumerate():
    if thread.name.startswith("ahead of"):
        thread.join()
before = len(found)
y.backward(torch.ones_like(y))
torch.cuda.synchronize()
assert all(x.grad.isfinite().all() for x in (u, delta, z, A, B, C, D, taps))
print(before, len(found), *(name for name, thread in found if thread.startswith("ahead of")))
"""


@pytest.mark.skipif(not ahead._PARSES_IN_THREADS, reason="nothing is compiled ahead on this Python")
@pytest.mark.skipif(torch.version.hip is not None, reason="nothing is compiled ahead for this device")
def test_the_first_backward_compiles_nothing(tmp_path: Path) -> None:
    """The forward's threads have done it, with an empty cache."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", FIRST_STEP], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, after, *names = run.stdout.split()
    assert before == after
    assert {"conv_backward_kernel", "sum_parameters_kernel", "sum_maps_kernel"} <= set(names), names


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_launches_on_the_device_of_its_inputs() -> None:
    with torch.cuda.device(0):
        case = Case(length=40, initial=True)
        check_parity(selective_scan, scan_problem, case, "triton", "cuda:1")
        check_parity(ssd, ssd_problem, case, "triton", "cuda:1")
        check_parity(causal_conv1d, conv_problem, case, "triton", "cuda:1")
        assert torch.cuda.current_device() == 0
