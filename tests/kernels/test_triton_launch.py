"""Repeated launches go straight to the binary that Triton chose, wherever Triton would choose it again."""

import ast
import importlib.util
import inspect
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import genssm
from genssm.kernels import triton_launch
from genssm.kernels.triton_launch import launch
from tests.kernels.test_triton_compile import compile_for

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no binaries"),
]


class Binary:
    """Stands for a compiled kernel; it keeps what it is run with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple] = []

    def run(self, *args) -> None:
        self.runs.append(args)


@pytest.fixture
def normal(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Launches of the convolution step that Triton itself made, each of which compiled a binary."""
    from triton import knobs

    from genssm.kernels.mamba2_step.triton_step import step_kernel

    def run(*args, grid, warmup, **arguments):
        made.append({"grid": grid, "binary": Binary(), **arguments})
        return made[-1]["binary"]

    made: list[dict] = []
    driver = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(triton_launch, "_triton", lambda device: SimpleNamespace(knobs=knobs, driver=driver))
    monkeypatch.setattr(triton_launch, "_launches", {})
    monkeypatch.setattr(step_kernel, "run", run)
    return made


TENSORS = ("projected", "windows", "turns", "state", "weight", "bias", "mapped", "a_log", "skip", "dt_bias", "y")


def arguments(**changes: Tensor | int | None) -> dict:
    tensors = {name: torch.zeros(64) for name in TENSORS} | {"turns": torch.zeros(64, dtype=torch.uint8)}
    numbers = {"p_b": 7, "y_b": 8, "per_group": 2, "width": 9, "states": 32}
    constants = {"INNER": 18, "MAPS": 32, "W": 4, "BLOCK_W": 4, "BLOCK_P": 16, "BLOCK_N": 32, "num_warps": 1}
    return {**tensors, **numbers, **constants, **changes}


def step(grid: tuple[int, ...] = (2, 5), **changes: Tensor | int | None) -> dict:
    """Launch the decoding step."""
    from genssm.kernels.mamba2_step.triton_step import step_kernel

    given = arguments(**changes)
    launch(step_kernel, grid, **given)
    return given


def test_the_second_launch_runs_the_binary_on_addresses_in_the_order_of_the_parameters(normal: list[dict]) -> None:
    first = step()
    second = step(grid=(9,))
    assert len(normal) == 1
    assert normal[0]["grid"] == (2, 5) and all(normal[0][name] is value for name, value in first.items())
    addresses = [second[name].data_ptr() for name in TENSORS]
    call = (9, 1, 1, "stream of 3", "function", "metadata", None, None, None, *addresses)
    call += (7, 8, 2, 9, 32, 18, 32, 4, 4, 16, 32)
    assert normal[0]["binary"].runs == [call]


@pytest.mark.parametrize(
    "change",
    [
        {"projected": torch.zeros(64, dtype=torch.bfloat16)},
        {"state": torch.zeros(65)[1:]},
        {"bias": None},
        {"mapped": None},
        {"width": 16},
        {"width": 2**40},
        {"p_b": 1},
        {"W": 3},
        {"num_warps": 8},
        {"num_stages": 1},
    ],
    ids=str,
)
def test_whatever_triton_may_look_at_leads_to_another_binary(normal: list[dict], change: dict) -> None:
    for _ in range(2):
        step()
        step(**change)
    assert len(normal) == (4 if "num_stages" in change else 2)  # options come and go in no kernel: nothing is kept
    assert sum(len(made["binary"].runs) for made in normal) == 4 - len(normal)


def test_watched_launches_are_triton_s(normal: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from genssm.kernels.mamba2_step.triton_step import step_kernel

    step()
    with monkeypatch.context() as patch:
        patch.setattr(step_kernel, "pre_run_hooks", [print])
        step()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(knobs.runtime, name), "calls", [print])
            step()
    assert len(normal) == 4
    step()
    assert len(normal) == 4 and len(normal[0]["binary"].runs) == 1


def test_launches_that_compile_nothing_are_not_kept(normal: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    from genssm.kernels.mamba2_step.triton_step import step_kernel

    calls: list[dict] = []
    monkeypatch.setattr(step_kernel, "run", lambda *args, **kwargs: calls.append(kwargs))
    for _ in range(3):
        step()
    assert len(calls) == 3


def test_memory_is_bounded(normal: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_MOST", 2)
    for width in (32, 33, 34, 34, 32):
        step(width=width)
    assert len(normal) == 4  # the third took the room of the first two
    (launches,) = triton_launch._launches.values()
    assert len(launches.binaries) == 2


def test_other_devices_and_versions_launch_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    decide = triton_launch._triton.__wrapped__
    assert decide("cpu") is None and decide("xpu") is None
    for version in ("3.5.1", "3.9.0", "4.0.0+git"):
        monkeypatch.setattr(triton, "__version__", version)
        assert decide("cuda") is None
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert decide("cuda") is None


def test_interpreted_kernels_launch_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tensors may lie on a GPU."""
    assert triton_launch.compiled_for_nvidia("cuda") == (torch.version.hip is None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_launch._triton.__wrapped__("cuda") is None
    assert not triton_launch.compiled_for_nvidia("cuda")


def test_registers_are_limited_where_triton_knows_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton_launch.register_limit(torch.device("cuda"), 160) == {"maxnreg": 160}
    assert triton_launch.register_limit(torch.device("xpu"), 160) == {}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert triton_launch.register_limit(torch.device("cuda"), 160) == {}


def test_triton_has_what_a_repeated_launch_takes() -> None:
    """The settings, the binary's parts and the launcher's parameters, of the Triton that is installed."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaLauncher

    from genssm.kernels.mamba2_step.triton_step import step_kernel

    binary = compile_for(step_kernel, arguments(), ("cuda", 90, 32))
    assert isinstance(type(binary).run, property) and binary.packed_metadata and hasattr(binary, "function")
    parameters = list(inspect.signature(CudaLauncher.__call__).parameters)
    assert parameters[1:6] == ["gridX", "gridY", "gridZ", "stream", "function"]
    assert not any(triton_launch._hooks(SimpleNamespace(knobs=knobs)))
    assert isinstance(knobs.runtime.debug, bool) and isinstance(knobs.compilation.instrumentation_mode, str)


def test_no_argument_is_an_option_of_a_launch() -> None:
    """Triton 3.6 refuses a kernel whose argument is called like one of its own."""
    taken = {"stream", "grid", "warmup", "device", "num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"}
    kernels = 0
    for path in sorted((Path(genssm.__file__).parent.parent / "kernels").glob("*/triton_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels += 1
                assert not taken & {argument.arg for argument in node.args.args}, (path.name, node.name)
    assert kernels > 20
