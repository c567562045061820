"""The Triton kernels in Triton's interpreter, on the CPU: every option and gradient against the reference.

The interpreter must be chosen before a kernel is defined, and other tests of the same process need the compiler. So
each test here runs its cases in a process of its own, which is this file run as a module.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import numpy
import pytest
import torch

from genssm.kernels.triton_launch import known_triton
from tests.kernels import gluon_on_cpu
from tests.kernels.problems import Case, check_parity, conv_problem, scan_problem, ssd_problem

EVERYTHING = "u delta A B C D z delta_bias"
ALL_OF_SSD = "x dt A B C D z dt_bias"
CASES: dict[str, dict[str, Case]] = {
    "scan options": {
        "bare, one token": Case(batch=1, length=1, channels=4, without="D z delta_bias", softplus=False),
        "all": Case(length=5, channels=5, states=3, initial=True),
        "bias without softplus": Case(batch=1, length=3, channels=3, states=2, softplus=False, order="random"),
        "all their own": Case(batch=1, length=6, directions=2, order="random", own=EVERYTHING, reduce="none"),
        "groups": Case(batch=1, length=4, channels=12, groups=3, directions=2, own="B C", order="both"),
        "own inputs, no orders": Case(batch=1, length=3, directions=2, own="u", initial=True),
        "lengths": Case(batch=3, length=6, directions=2, order="random", lengths=(4, 6, 0), initial=True),
    },
    "scan sizes": {
        "one state": Case(batch=1, length=6, channels=3, states=1),
        "sixteen states": Case(batch=1, length=6, channels=37, states=16, initial=True),
        "65 states": Case(batch=1, length=3, channels=5, states=65),
        "256 states": Case(batch=1, length=3, channels=5, states=256, initial=True),
        "over a checkpoint": Case(batch=1, length=37, channels=4, order="random"),
    },
    "scan paths": {
        "packed": Case(
            batch=1, length=38, cu_seqlens=(0, 2, 2, 34, 38), directions=2, order="both", initial=True, own="A"
        ),
        "segments": Case(batch=1, length=70, channels=4, states=3, directions=2, order="random", initial=True),
        "segments of one direction": Case(length=70, channels=4, states=3, order="random"),
        "segments in turn": Case(batch=1, length=134, channels=4, states=3, directions=2, order="random", own="u"),
        "in turn": Case(batch=1, length=6, directions=3, order="random", initial=True),
        "wide tile": Case(batch=1, length=5, channels=64, states=16, initial=True),
        "narrow tile": Case(length=5, channels=64, states=16, directions=2, order="random", initial=True),
        "long trips": Case(batch=1, length=37, channels=4, states=2, order="random", lengths=(35,)),
        "blocks in turn": Case(batch=1, length=3, channels=70, states=2),
        "long offsets": Case(batch=1, length=5, directions=2, order="random", initial=True),
    },
    "scan in shared memory": {
        "bare": Case(batch=1, length=5, channels=32, states=9, without="D z delta_bias", softplus=False),
        "all": Case(batch=1, length=70, channels=40, states=16, order="random", initial=True),
        "all their own": Case(
            batch=1, length=6, channels=8, states=16, directions=2, order="random", own=EVERYTHING, reduce="none"
        ),
        "groups": Case(batch=1, length=4, channels=96, groups=2, states=13, directions=2, own="B C", order="both"),
        "lengths": Case(
            batch=3, length=6, channels=8, states=16, directions=2, order="random", lengths=(4, 6, 0), initial=True
        ),
        "packed": Case(
            batch=1,
            length=38,
            channels=8,
            states=16,
            cu_seqlens=(0, 2, 2, 34, 38),
            directions=2,
            order="both",
            initial=True,
            own="A",
        ),
        "segments": Case(batch=1, length=134, channels=8, states=16, directions=2, order="random", initial=True),
        "segments of one direction": Case(length=70, channels=8, states=16, order="random"),
        "segments in turn": Case(
            batch=1, length=134, channels=8, states=16, directions=2, order="random", own="u", initial=True
        ),
        "in turn": Case(batch=1, length=6, channels=8, states=16, directions=3, order="random", initial=True),
        "blocks": Case(batch=1, length=3, channels=140, states=16),
        "17 states": Case(length=70, channels=5, states=17, order="random", initial=True),
        "64 states": Case(batch=1, length=3, channels=5, states=64, without="D z delta_bias", softplus=False),
        "33 states of directions": Case(
            batch=3,
            length=34,
            channels=12,
            groups=2,
            states=33,
            directions=2,
            own="u B A",
            order="random",
            lengths=(4, 34, 0),
            initial=True,
        ),
        "32 states of shared inputs": Case(length=3, channels=5, states=32, directions=2, own="D", order="both"),
        "32 states apart": Case(batch=1, length=3, channels=5, states=32, directions=2, own=EVERYTHING, reduce="none"),
        "18 states packed": Case(
            batch=1,
            length=38,
            channels=5,
            states=18,
            cu_seqlens=(0, 2, 2, 32, 38),
            directions=2,
            order="both",
            initial=True,
            own="delta",
        ),
    },
    "ssd options": {
        "bare, one token": Case(batch=1, length=1, channels=6, without="D z dt_bias", softplus=False),
        "all": Case(length=5, channels=15, states=3, initial=True),
        "bias without softplus": Case(batch=1, length=3, softplus=False, order="random"),
        "all their own": Case(batch=1, length=6, directions=2, order="random", own=ALL_OF_SSD, reduce="none"),
        "groups": Case(batch=1, length=4, channels=24, heads=6, groups=3, directions=2, own="B C", order="both"),
        "own inputs, no orders": Case(batch=1, length=3, directions=2, own="x", initial=True),
        "lengths": Case(batch=3, length=6, directions=2, order="random", lengths=(4, 6, 0), initial=True),
    },
    "ssd sizes": {
        "wide heads": Case(batch=1, length=9, channels=210, states=17),
        "256 states": Case(batch=1, length=20, channels=20, heads=2, states=256, initial=True),
        "several chunks": Case(batch=1, length=140, channels=6, heads=2, initial=True, directions=2, order="random"),
    },
    "ssd paths": {
        "packed": Case(
            batch=1,
            length=85,
            channels=4,
            heads=2,
            cu_seqlens=(0, 0, 3, 64, 78, 85),
            directions=2,
            order="both",
            initial=True,
            own="A x",
        ),
        "ssd segments": Case(length=257, channels=4, heads=1, order="random", lengths=(200, 257), initial=True),
        "ssd slots": Case(batch=1, length=66, channels=20, heads=10, groups=2),
        "ssd long offsets": Case(batch=1, length=5, directions=2, order="random", initial=True),
    },
    "convolution": {
        "bare, one token": Case(batch=1, length=1, channels=3, without="bias", activation=None),
        "all": Case(length=11, channels=5, directions=2, order="random", initial=True),
        "one tap": Case(length=5, channels=3, taps=1),
        "eight taps": Case(length=5, channels=3, taps=8, initial=True, order="random"),
        "all their own": Case(directions=2, order="random", own="x weight bias", initial=True),
        "shared": Case(batch=1, length=17, channels=130, directions=2, order="both"),
        "lengths": Case(batch=3, length=12, lengths=(7, 12, 0), directions=2, order="random", initial=True),
        "packed": Case(batch=1, length=21, cu_seqlens=(0, 1, 1, 3, 21), directions=2, order="both", initial=True),
        "stretches": Case(batch=1, length=77, channels=3, directions=2, order="random", initial=True),
        "lengths over stretches": Case(length=70, lengths=(66, 33), channels=3, directions=2, order="random"),
        "packed over stretches": Case(
            batch=1, length=75, cu_seqlens=(0, 31, 33, 64, 75), channels=3, directions=2, order="both", initial=True
        ),
    },
    "sums": {
        "several blocks": Case(batch=3, length=41, channels=40, groups=2, states=5, directions=2, own="A D B"),
        "all shared": Case(batch=1, length=5, channels=3, states=16, directions=3),
        "all their own": Case(batch=2, length=3, channels=33, states=17, directions=2, own="A B C D delta_bias"),
    },
}


def cannot_interpret() -> str | None:
    """Why loops of kernels cannot be interpreted here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    numbers = [tuple(int(n) for n in version.split(".")[:2]) for version in (triton.__version__, numpy.__version__)]
    if numbers[0] < (3, 7) and numbers[1] >= (2, 4):
        return f"the interpreter of triton {triton.__version__} cannot run loops with numpy {numpy.__version__}"
    return None


@pytest.mark.skipif(cannot_interpret() is not None, reason=str(cannot_interpret()))
@pytest.mark.parametrize("group", CASES)
def test_parity_in_the_interpreter(group: str) -> None:
    if group == "scan in shared memory" and not known_triton():
        pytest.skip("this version of triton has another Gluon")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    environment.pop("GENSSM_BACKEND", None)
    command = [sys.executable, "-m", "tests.kernels.test_triton_interpreter", group]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert list(outcome) == list(CASES[group])
    failed = "\n".join(f"{name}: {message}" for name, message in outcome.items() if message)
    assert not failed, failed


def _force(name: str, patch: pytest.MonkeyPatch) -> None:
    """Take the path that a case is about, whatever its size."""
    from genssm.kernels import triton_sums
    from genssm.kernels.selective_scan import triton_scan
    from genssm.kernels.ssd import triton_ssd

    if name.startswith("segments"):
        patch.setattr(triton_scan, "_FORWARD_ENOUGH", 10**6)
        patch.setattr(triton_scan, "_FORWARD_RESIDENT", 10**6)
        patch.setattr(triton_scan, "_SHARING_ENOUGH", 10**6)
        patch.setattr(triton_scan, "_SHARING_RESIDENT", 10**6)
        patch.setattr(triton_scan, "_BACKWARD_ENOUGH", 10**6)
        patch.setattr(triton_scan, "_SEGMENT_CHUNKS", 1)
        patch.setattr(triton_scan, "_SHORTEST_CHUNKS", 1)
    if name == "segments in turn":  # too few programs side by side, enough in the five chunks of a direction
        patch.setattr(triton_scan, "_BACKWARD_ENOUGH", 5)
        patch.setattr(triton_scan, "_BACKWARD_ALONE", 5)
    if name == "in turn":
        patch.setattr(triton_scan, "_FORWARD_ENOUGH", 0)
        patch.setattr(triton_scan, "_SHARING_ENOUGH", 0)
        patch.setattr(triton_scan, "_BACKWARD_ENOUGH", 0)
    if name == "long trips":
        patch.setattr(triton_scan, "scan_forward", functools.partial(triton_scan.scan_forward, unroll=8))
        patch.setattr(triton_scan, "scan_backward", functools.partial(triton_scan.scan_backward, unroll=8))
    if name == "blocks in turn":
        patch.setattr(triton_scan, "_PARTIAL_BYTES", 0)
    if name == "long offsets":
        patch.setattr(triton_scan, "wide", lambda *tensors: True)
        patch.setattr(triton_sums, "_MANY_PAIRS", 0)
    if name in ("ssd segments", "ssd slots"):
        patch.setattr(triton_ssd, "_ENOUGH", 10**6)
        patch.setattr(triton_ssd, "_WANTED", 16)
    if name == "ssd long offsets":
        patch.setattr(triton_ssd, "wide", lambda *tensors: True)


def check_sums(case: Case) -> None:
    """The sums of slots, more than are read together, against PyTorch's."""
    from genssm.kernels import triton_sums

    batch, directions, length, groups = case.batch, case.directions, case.length, case.groups
    states, channels = case.states, case.channels
    generator = torch.Generator().manual_seed(0)
    own = {name: directions if name in case.own.split() else 1 for name in ("A", "D", "delta_bias", "B", "C")}
    slots = torch.randn(11, batch, 1, length, groups, states, 2, generator=generator)
    maps = [torch.zeros(batch, own[name], length, groups, states, dtype=torch.float16) for name in ("B", "C")]
    found = [triton_sums.map_gradient(x, directions) for x in maps]
    for k in range(directions):
        triton_sums.sum_maps(slots + k, k, *found)
    for x, grad, expected in zip(maps, found, slots.sum(0).unbind(-1)):
        expected = torch.cat([expected + 11 * k for k in range(directions)], 1)
        assert grad.dtype == (x.dtype if x.shape[1] == directions else torch.float32)
        torch.testing.assert_close(grad, expected.to(grad.dtype), rtol=1e-3, atol=1e-4)

    parts = torch.randn(70, directions, states + 2, channels, generator=generator)
    vectors = parts[:, :, states], parts[:, :, states + 1].contiguous()
    like = [torch.zeros(own["A"], channels, states), *(torch.zeros(own[x], channels) for x in ("D", "delta_bias"))]
    for without in (False, True):
        given = (None, vectors[1]) if without else vectors
        present = (like[0], None if without else like[1], like[2])
        grads = triton_sums.sum_parameters(parts[:, :, :states], given, present)
        expected = (parts[:, :, :states].transpose(-1, -2), *given)
        for x, grad, slots in zip(like, grads, expected):
            if slots is None:
                assert grad is None
                continue
            total = slots.sum(0) if x.shape[0] == directions else slots.sum((0, 1))[None]
            torch.testing.assert_close(grad, total, rtol=1e-4, atol=1e-4)


def _outcome(name: str, case: Case, group: str) -> str:
    from genssm.kernels.causal_conv1d import causal_conv1d
    from genssm.kernels.selective_scan import selective_scan
    from genssm.kernels.ssd import ssd

    ops = {"scan": (selective_scan, scan_problem), "ssd": (ssd, ssd_problem)}
    op, make = ops.get(group.split()[0], (causal_conv1d, conv_problem))
    small = {"length": min(case.length, 3), "channels": 6 if op is ssd else 4} if name == "all" else None
    try:
        with pytest.MonkeyPatch.context() as patch:
            _force(name, patch)
            if group == "scan in shared memory":
                gluon_on_cpu.use_for_the_scan(patch)
            if group == "sums":
                check_sums(case)
                return ""
            check_parity(op, make, case, "triton", "cpu")
            if small:  # float16 rounds as it should there; bfloat16 does not
                check_parity(op, make, dataclasses.replace(case, **small), "triton", "cpu", torch.float16)
    except Exception:
        return traceback.format_exc(limit=-4)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = CASES[sys.argv[1]]
    print(json.dumps({name: _outcome(name, case, sys.argv[1]) for name, case in cases.items()}))
