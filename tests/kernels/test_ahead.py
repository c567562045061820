"""A first forward pass compiles what the backward pass will launch, exactly that, and disturbs nobody.

The tensors of these tests are on the CPU and pass for those of a GPU; launches are caught, with what Triton's own code
makes of their arguments to find a binary.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from genssm.kernels import ahead, dispatch, triton_launch
from genssm.kernels.add_norm import add_norm
from genssm.kernels.ahead import Ahead
from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.custom_op import CustomOp
from genssm.kernels.gated_residual import gated_residual
from genssm.kernels.selective_scan import selective_scan
from genssm.kernels.ssd import ssd
from tests.kernels.problems import Case, conv_problem, scan_problem, ssd_problem
from tests.kernels.test_triton_compile import Caught, compile_for, scan_launches

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no binaries"),
]
ROOT = Path(__file__).resolve().parent.parent.parent
WAIT = 30  # seconds, where something hangs
HALF = dict.fromkeys(("u", "delta", "z", "B", "C", "x", "dt"), torch.bfloat16)


class Gpu:
    """Keeps what Triton is asked for, as (kernel, key of its binary).

    Attributes:
        warm, launched: what was compiled only, and what was launched.
        loaded: binaries that were loaded after they had been compiled.
        failed: errors of the threads.
        at_work: set while a thread compiles; it goes on when ``go_on`` is set.
    """

    def __init__(self) -> None:
        self.warm: list[tuple[str, str]] = []
        self.launched: list[tuple[str, str]] = []
        self.loaded: list[tuple] = []
        self.failed: list[Exception] = []
        self.at_work, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def catch(self, kernel) -> Callable:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import compute_cache_key, create_function_from_signature

        backend = make_backend(GPUTarget("cuda", 90, 32))
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def run(*args, grid, warmup, **arguments):
            _, specialization, options = bind(*args, **arguments, debug=False, instrumentation_mode="")
            found = kernel.fn.__name__, compute_cache_key({}, specialization, options)
            (self.warm if warmup else self.launched).append(found)
            if not warmup:
                return None
            self.at_work.set()
            assert self.go_on.wait(WAIT)
            return Loaded(self.loaded)

        return run

    def settle(self) -> None:
        """Wait for the threads."""
        for thread in threads():
            thread.join(WAIT)
            assert not thread.is_alive()
        assert not self.failed, self.failed


class Loaded:
    """Stands for a compiled kernel, which is loaded when it is given a grid."""

    def __init__(self, grids: list[tuple]) -> None:
        self.grids = grids

    def __getitem__(self, grid: tuple) -> None:
        self.grids.append(grid)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead of")]


def kernels() -> Iterator:
    for path in sorted((ROOT / "kernels").rglob("triton_*.py")):
        module = importlib.import_module(".".join(("genssm", *path.relative_to(ROOT).with_suffix("").parts)))
        yield from (x for name, x in vars(module).items() if name.endswith("_kernel") and hasattr(x, "warmup"))


def ops() -> Iterator[CustomOp]:
    for name in ("add_norm", "causal_conv1d", "gated_residual", "selective_scan", "ssd"):
        module = importlib.import_module(f"genssm.kernels.{name}.op")
        yield from (x for x in vars(module).values() if isinstance(x, CustomOp) and x.ahead is not None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The CPU as a large GPU, before any backward pass."""
    from triton import knobs

    from genssm.kernels.selective_scan import triton_scan

    caught = Gpu()
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    monkeypatch.setattr(triton_launch, "_triton", lambda device: SimpleNamespace(knobs=knobs, driver=driver))
    monkeypatch.setattr(triton_launch, "_launches", {})
    monkeypatch.setattr(ahead, "_PARSES_IN_THREADS", True)
    monkeypatch.setattr(triton_launch, "_processor_count", lambda kind, index: 132)
    monkeypatch.setattr(dispatch, "_resolve", lambda *_: "triton")
    monkeypatch.setattr(triton_scan, "compiled_for_nvidia", lambda device: True)
    monkeypatch.setattr(triton_scan, "_shared_memory", lambda index: 228 * 1024)
    for kernel in {id(kernel): kernel for kernel in kernels()}.values():
        monkeypatch.setattr(kernel, "run", caught.catch(kernel))
    for op in ops():
        monkeypatch.setattr(op, "differentiable", None)
        op.register_autograd(op.ahead.backward, op.ahead.setup_context, op.ahead.differentiated)
    original = Ahead._compile

    def compile(self, *call) -> None:
        try:
            original(self, *call)
        except Exception as error:
            caught.failed.append(error)
            raise

    monkeypatch.setattr(Ahead, "_compile", compile)
    with FakeTensorMode():  # PyTorch without a GPU makes a stand-in for its guard that dies with the first thread
        pass
    yield caught
    caught.go_on.set()
    for thread in threads():
        thread.join(WAIT)


def unaligned(x: Tensor) -> Tensor:
    """The same, not at a multiple of 16 bytes."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x.detach()).requires_grad_(x.requires_grad)


def problem(op: Callable, make: Callable, dtypes: dict | torch.dtype, **case) -> tuple[Callable, dict[str, Tensor]]:
    made = make(Case(**case)).to("cpu", dtypes)
    return (lambda **inputs: op(**inputs, **made.options)[0]), made.inputs


def rows(op: Callable, **sizes: tuple[int, ...]) -> tuple[Callable, dict[str, Tensor]]:
    """A kernel on rows and its arguments; vectors that are not of half a type."""
    inputs = {
        name: torch.randn(size, dtype=torch.bfloat16 if name in ("x", "hidden_states", "stream") else torch.float32)
        for name, size in sizes.items()
    }
    return op, {name: x.requires_grad_(name != "factor") for name, x in inputs.items()}


TOKENS, SAMPLE = (2, 16, 64), (2, 1, 64)
WIDE = {"length": 70, "channels": 64, "states": 16}
TWO = {"directions": 2, "order": "both"}
SSD = {"length": 70, "channels": 32, "heads": 2, "states": 16}
CASES = {
    "scan": lambda: problem(selective_scan, scan_problem, HALF, **WIDE),
    "scan, bare": lambda: problem(
        selective_scan, scan_problem, torch.float32, **WIDE, without="D z delta_bias", softplus=False
    ),
    "scan, two directions": lambda: problem(selective_scan, scan_problem, HALF, **WIDE, **TWO),
    "scan, own tokens": lambda: problem(selective_scan, scan_problem, HALF, **WIDE, **TWO, own="u z A D"),
    "scan, directions in turn": lambda: problem(selective_scan, scan_problem, HALF, **TWO, length=4, batch=900),
    "scan, packed from states": lambda: problem(
        selective_scan, scan_problem, HALF, **WIDE, **TWO, batch=1, cu_seqlens=(0, 10, 70), initial=True
    ),
    "scan, lengths": lambda: problem(selective_scan, scan_problem, torch.float32, **WIDE, lengths=(3, 70)),
    "scan, one state": lambda: problem(selective_scan, scan_problem, HALF, length=70, states=1),
    "scan, 48 states": lambda: problem(selective_scan, scan_problem, HALF, length=70, channels=64, states=48, **TWO),
    "scan, segments": lambda: problem(selective_scan, scan_problem, HALF, length=999, batch=1, states=4),
    "convolution": lambda: problem(causal_conv1d, conv_problem, HALF, channels=64, **TWO),
    "convolution, one direction": lambda: problem(causal_conv1d, conv_problem, HALF, channels=64, own="x"),
    "convolution, packed": lambda: problem(
        causal_conv1d, conv_problem, HALF, batch=1, cu_seqlens=(0, 5, 19), without="bias", initial=True, **TWO
    ),
    "ssd": lambda: problem(ssd, ssd_problem, HALF, **SSD),
    "ssd, two directions": lambda: problem(ssd, ssd_problem, HALF, **SSD, **TWO, initial=True),
    "ssd, segments": lambda: problem(ssd, ssd_problem, HALF, batch=1, **{**SSD, "length": 999}),
    "add_norm": lambda: rows(
        lambda **x: sum(add_norm(**x)), hidden_states=TOKENS, x=TOKENS, gate=SAMPLE, weight=(64,), shift=SAMPLE,
        scale=SAMPLE,
    ),
    "add_norm, normed": lambda: rows(
        lambda **x: sum(add_norm(**x, return_normed=True)), hidden_states=TOKENS, shift=TOKENS, scale=TOKENS
    ),
    "add_norm, added normed": lambda: rows(
        lambda **x: sum(add_norm(**x, add_normed=True)), hidden_states=TOKENS, weight=(64,), factor=(2, 1, 1)
    ),
    "add_norm, plain": lambda: rows(lambda **x: add_norm(**x)[1], hidden_states=TOKENS, weight=(64,)),
    "gated_residual": lambda: rows(gated_residual, stream=TOKENS, x=TOKENS, gate=SAMPLE),
    "gated_residual, skip": lambda: rows(
        gated_residual, stream=TOKENS, x=TOKENS, gate=TOKENS, skip=TOKENS, factor=(2, 1, 1)
    ),
}  # fmt: skip


def forward(call: Callable, inputs: dict[str, Tensor | None]) -> Callable[[], None]:
    """Call an op; what is returned runs its backward pass."""
    result = call(**inputs)
    wanted = [x for x in inputs.values() if x is not None and x.requires_grad]
    return lambda: torch.autograd.grad(result, wanted, torch.randn_like(result))


@pytest.mark.parametrize("place", [lambda x: x, unaligned], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_compiled_ahead_is_what_the_backward_pass_launches(gpu: Gpu, name: str, place: Callable) -> None:
    call, inputs = CASES[name]()
    backward = forward(call, {key: place(x) for key, x in inputs.items()})
    gpu.settle()
    assert gpu.warm and len(gpu.loaded) == len(gpu.warm)
    gpu.launched.clear()
    backward()
    assert gpu.launched == gpu.warm


def test_alignment_is_part_of_it(gpu: Gpu) -> None:
    """Or the test before would show little."""
    call, inputs = CASES["scan"]()
    keys = []
    for given in (inputs, {key: unaligned(x) for key, x in inputs.items()}):
        forward(call, given)
        gpu.settle()
        keys.append(list(gpu.warm))
        gpu.warm.clear()
    assert [kernel for kernel, _ in keys[0]] == [kernel for kernel, _ in keys[1]] and keys[0] != keys[1]


def test_cases_reach_every_kernel_of_a_backward_pass(gpu: Gpu) -> None:
    for make in CASES.values():
        forward(*make())
        gpu.settle()
    found = {kernel for kernel, _ in gpu.warm}
    assert found == {
        "scan_backward_shared_kernel", "scan_backward_kernel", "scan_adjoint_kernel", "chain_kernel",
        "conv_backward_kernel", "norm_backward_kernel", "residual_backward_kernel", "ssd_adjoint_kernel",
        "ssd_chain_kernel", "ssd_tokens_kernel", "ssd_maps_kernel", "sum_maps_kernel", "sum_parameters_kernel",
    }  # fmt: skip


def test_on_a_gpu_that_is_not_here(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads compute with tensors that say they are on the GPU, and are told of no other device."""
    devices, original = [], triton_launch._compile

    def compile(kernel, grid, arguments) -> None:
        devices.append({x.device for x in arguments.values() if isinstance(x, Tensor)})
        original(kernel, grid, arguments)

    monkeypatch.setattr(triton_launch, "_compile", compile)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext(devices.append({x.device})))
    monkeypatch.setattr(Ahead, "_work", lambda *call: calls.append(call))
    calls: list[tuple] = []
    for name in ("scan, two directions", "convolution, packed", "ssd", "add_norm", "gated_residual, skip"):
        forward(*CASES[name]())
    cuda = torch.device("cuda", 0)
    with triton_launch.only_compiling():
        for ahead, inputs, needed in calls:
            ahead._compile(tuple(x._replace(device=cuda) if hasattr(x, "past") else x for x in inputs), needed)
    assert len(calls) == 5 and len(gpu.warm) >= 5
    assert devices.count({cuda}) == len(devices) > len(calls)


def test_calls_alike_are_compiled_once(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(Ahead, "_work", lambda ahead, *call: calls.append(call))
    call, inputs = CASES["scan"]()
    for _ in range(24):
        forward(call, inputs)
    assert len(calls) == 1
    changes = [
        ("u", unaligned(inputs["u"])),
        ("u", inputs["u"].float()),
        ("delta_bias", inputs["delta_bias"].detach()),  # needs no gradient
        ("z", inputs["z"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()),
        ("D", None),
    ]
    for count, (name, value) in enumerate(changes, start=2):
        for _ in range(2):
            forward(call, {**inputs, name: value})
        assert len(calls) == count, name


def test_kinds_of_calls_are_limited(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(Ahead, "_work", lambda ahead, *call: calls.append(call))
    for length in range(1, 50):
        forward(*problem(causal_conv1d, conv_problem, HALF, length=length))
    assert len(calls) == 32


def test_the_first_backward_pass_ends_it(gpu: Gpu) -> None:
    call, inputs = CASES["scan"]()
    forward(call, inputs)()
    gpu.settle()
    gpu.warm.clear()
    forward(call, {**inputs, "D": None})()
    forward(*CASES["convolution"]())  # another op
    gpu.settle()
    assert {kernel for kernel, _ in gpu.warm} == {"conv_backward_kernel", "sum_parameters_kernel"}


def test_nothing_is_compiled_where_nothing_follows(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    call, inputs = CASES["convolution"]()
    with torch.no_grad():
        call(**inputs)
    call(**{name: x.detach() for name, x in inputs.items()})
    for backend in ("chunked", "compiled"):
        monkeypatch.setattr(dispatch, "_resolve", lambda *_, backend=backend: backend)
        with contextlib.suppress(ValueError):  # no C compiler
            forward(*CASES["convolution"]())
    monkeypatch.setattr(dispatch, "_resolve", lambda *_: "triton")
    triton = triton_launch._triton
    monkeypatch.setattr(triton_launch, "_triton", lambda device: None)  # AMD's, Intel's, an unknown Triton
    forward(call, inputs)
    monkeypatch.setattr(triton_launch, "_triton", triton)
    monkeypatch.setattr(ahead, "_PARSES_IN_THREADS", False)
    forward(call, inputs)
    assert not threads() and not gpu.warm


def test_launches_wait_for_the_thread_that_compiles_their_kernel(gpu: Gpu) -> None:
    gpu.go_on.clear()
    backward = forward(*CASES["convolution"]())
    assert gpu.at_work.wait(WAIT)
    other = threading.Thread(target=backward)
    other.start()
    with torch.no_grad():
        CASES["gated_residual"]()[0](**CASES["gated_residual"]()[1])  # another kernel is launched at once
    assert gpu.launched[-1][0] == "residual_forward_kernel"
    other.join(0.2)
    assert other.is_alive() and "conv_backward_kernel" not in dict(gpu.launched)
    gpu.go_on.set()
    other.join(WAIT)
    gpu.settle()
    assert gpu.launched[-len(gpu.warm) :] == gpu.warm


def test_what_a_thread_cannot_do_changes_nothing(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from genssm.kernels.causal_conv1d.triton_walks import conv_backward_kernel

    def fail(*args, warmup, **arguments) -> None:
        if warmup:
            raise RuntimeError("no compiler")
        launched.append(arguments)

    launched: list[dict] = []
    uncaught: list = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    monkeypatch.setattr(conv_backward_kernel, "run", fail)
    backward = forward(*CASES["convolution"]())
    for thread in threads():
        thread.join(WAIT)
    assert [str(error) for error in gpu.failed] == ["no compiler"]
    assert not uncaught and not triton_launch._compiling
    backward()
    assert launched and capfd.readouterr() == ("", "")


def test_watched_launches_are_left_alone(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a profiler is told of launches, Triton makes them, and does not wait for a thread."""
    from triton import knobs

    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    backward = forward(*CASES["convolution"]())
    gpu.settle()
    assert not gpu.warm
    backward()
    assert gpu.launched


def test_threads_keep_no_tensor(gpu: Gpu) -> None:
    gpu.go_on.clear()
    call, inputs = CASES["scan"]()
    memory = [weakref.ref(x) for x in inputs.values()]
    forward(call, inputs)
    assert gpu.at_work.wait(WAIT)
    del call, inputs
    gc.collect()
    assert threads() and not any(x() is not None for x in memory)


class Numbers(torch.utils.data.Dataset):
    """What processes of a data loader compute."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((3,), i).cumsum(0)


@pytest.mark.filterwarnings("ignore:This process")
def test_a_process_forked_meanwhile_works(gpu: Gpu) -> None:
    gpu.go_on.clear()
    forward(*CASES["scan"]())
    assert gpu.at_work.wait(WAIT)
    loader = torch.utils.data.DataLoader(Numbers(), num_workers=2, multiprocessing_context="fork", timeout=WAIT)
    assert [int(batch.sum()) for batch in loader] == [0, 6, 12, 18]
    assert threads()


EXIT = """
import time
from types import SimpleNamespace
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from genssm.kernels import ahead, triton_launch
from genssm.kernels.custom_op import custom_op

with FakeTensorMode():  # as in the fixture
    pass
triton_launch._triton = lambda device: SimpleNamespace()
ahead._PARSES_IN_THREADS = True
op = custom_op("genssm_test::slow", schema="(Tensor x, int i) -> Tensor")(lambda x, i: 2 * x)
began = []
op.register_autograd(lambda ctx, g: (began.append(g), time.sleep(1), print("ended")), lambda *_: None)
op.register_fake(lambda x, i: torch.empty_like(x))
for i in range(12):
    op(torch.ones(3, requires_grad=True), i)
while len(began) < 4:
    time.sleep(0.01)
print("exit")
"""


def test_a_process_ends_with_the_threads_at_work_and_no_other() -> None:
    """And in silence."""
    found = subprocess.run(
        [sys.executable, "-c", EXIT], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    assert found.returncode == 0 and found.stderr == ""
    assert found.stdout.startswith("exit") and found.stdout.count("ended") == 4


@pytest.mark.slow
@pytest.mark.skipif(not ahead._PARSES_IN_THREADS, reason="this Python does not parse in several threads")
def test_triton_compiles_in_threads_what_it_compiles_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bit by bit, the kernels of both passes at once."""
    from genssm.kernels.selective_scan import triton_scan

    if triton_scan._shared_kernel() is None:
        pytest.skip("no kernel for this version of triton")
    monkeypatch.setattr(triton_scan, "compiled_for_nvidia", lambda device: True)
    monkeypatch.setattr(triton_scan, "_shared_memory", lambda index: 228 * 1024)
    monkeypatch.setattr(triton_scan, "_FORWARD_LONG", 0)
    caught = Caught()
    with monkeypatch.context() as patch:
        caught.of(patch, triton_scan._forward_kernel(), triton_scan._shared_kernel())
        scan_launches(states=16, channels=64, segments=1)
    assert [kernel.fn.__name__ for kernel, _ in caught] == ["scan_forward_shared_kernel", "scan_backward_shared_kernel"]

    def compile_all(folder: str, run: Callable) -> list[bytes]:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder))
        return list(run(lambda launch: compile_for(*launch, ("cuda", 90, 32)).asm["cubin"], caught))

    with ThreadPoolExecutor(2) as pool:
        together = compile_all("together", pool.map)
    assert together == compile_all("alone", map)
    assert len({path.name for path in tmp_path.rglob("*.cubin")}) == 2
