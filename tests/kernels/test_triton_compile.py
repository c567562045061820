"""The Triton kernels compile for NVIDIA and AMD devices that are not here, within 64 KB of shared memory and registers.

The host side runs as it would on the device; its launches are caught and compiled instead.
"""

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

TARGETS = [("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)]
TARGETS += [("hip", "gfx90a", 64), ("hip", "gfx942", 64), ("hip", "gfx1100", 32)]
SHARED_LIMIT = 64 * 1024
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
TYPES |= {torch.uint8: "u8"}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled"),
]


class Caught(list):
    """Launches, (kernel, arguments by name), in their order."""

    def of(self, patch: pytest.MonkeyPatch, *kernels) -> "Caught":
        for kernel in kernels:
            patch.setattr(kernel, "run", self._catch(kernel))
        return self

    def _catch(self, kernel) -> Callable:
        def run(*args, grid, warmup, **kwargs) -> None:
            assert all(size > 0 for size in grid)
            self.append((kernel, {**dict(zip(kernel.arg_names, args)), **kwargs}))

        return run


def compile_for(kernel, arguments: dict, target: tuple):
    """What Triton makes of a launch on another device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        known = parameter.is_constexpr or value is None
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif known or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in arguments.items() if name not in signature}
    if type(kernel).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    assert compiled.metadata.shared <= SHARED_LIMIT
    return compiled


def resources(compiled) -> dict[str, int]:
    """Registers and bytes of stack (spills) of a lane."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton brings no cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}


def scan_launches(
    states: int,
    directions: int = 1,
    channels: int = 64,
    length: int = 70,
    dtype: torch.dtype = torch.bfloat16,
    without: str = "",
    initial: bool = False,
    lengths: bool = False,
    packed: bool = False,
    **choices: int | None,
) -> Caught:
    """Launches of a forward and a backward pass."""
    from genssm.kernels import triton_sums
    from genssm.kernels.selective_scan import triton_backward, triton_forward, triton_scan

    batch = 1 if packed else 2
    u, delta, z = (torch.zeros(batch, 1, length, channels, dtype=dtype) for _ in range(3))
    b, c = (torch.zeros(batch, 1, length, 1, states, dtype=dtype) for _ in range(2))
    parameters = {name: torch.zeros(1, channels) for name in ("D", "z", "delta_bias")}
    parameters["z"] = z
    skip, gate, bias = (None if name in without.split() else x for name, x in parameters.items())
    orders = torch.arange(length, dtype=torch.int32).expand(directions, length).contiguous()
    cu_seqlens = torch.tensor([0, 10, length], dtype=torch.int32) if packed else None
    start = torch.zeros(2, directions, channels, states) if initial else None
    valid = torch.full((batch,), length, dtype=torch.int32) if lengths else None
    given = (u, delta, torch.zeros(1, channels, states), b, c, skip, gate, bias, "softplus" not in without.split())
    given = (*given, None if "orders" in without.split() else orders, start, valid, cu_seqlens, True)
    with pytest.MonkeyPatch.context() as patch:
        caught = Caught().of(patch, triton_forward.scan_forward_kernel, triton_forward.chain_kernel)
        caught.of(patch, triton_backward.scan_adjoint_kernel, triton_backward.scan_backward_kernel)
        caught.of(patch, triton_sums.sum_maps_kernel, triton_sums.sum_parameters_kernel)
        out, last, saved = triton_scan.scan_forward(*given, **choices)
        found = triton_scan.scan_backward(out, last if initial else None, saved, *given, **choices)
    storages = [x.untyped_storage().data_ptr() for x in found if x is not None]
    assert len(set(storages)) == len(storages)  # a compiler refuses results of an operator that share memory
    return caught


def ssd_launches(
    states: int,
    width: int = 64,
    length: int = 130,
    dtype: torch.dtype = torch.bfloat16,
    without: str = "",
    lengths: bool = False,
    packed: bool = False,
    **choices: int | None,
) -> Caught:
    """Launches of a forward and a backward pass along two orders, from initial states."""
    from genssm.kernels.ssd import triton_backward, triton_forward, triton_ssd

    batch, heads, directions = 1 if packed else 2, 2, 2
    x, z = (torch.zeros(batch, 1, length, heads, width, dtype=dtype) for _ in range(2))
    b, c = (torch.zeros(batch, 1, length, 1, states, dtype=dtype) for _ in range(2))
    parameters = {name: torch.zeros(1, heads) for name in ("D", "z", "dt_bias")}
    parameters["z"] = z
    skip, gate, bias = (None if name in without.split() else t for name, t in parameters.items())
    orders = torch.arange(length, dtype=torch.int32).expand(directions, length).contiguous()
    cu_seqlens = torch.tensor([0, 10, length], dtype=torch.int32) if packed else None
    start = None if "initial" in without.split() else torch.zeros(2, directions, heads, width, states)
    valid = torch.full((batch,), length, dtype=torch.int32) if lengths else None
    given = (x, torch.zeros(batch, 1, length, heads, dtype=dtype), torch.zeros(1, heads), b, c, skip, gate, bias)
    given = (*given, "softplus" not in without.split(), None if "orders" in without.split() else orders)
    given = (*given, start, valid, cu_seqlens, "orders" not in without.split())
    with pytest.MonkeyPatch.context() as patch:
        caught = Caught().of(patch, triton_forward.ssd_forward_kernel, triton_forward.ssd_local_kernel)
        caught.of(patch, triton_forward.ssd_chain_kernel, triton_backward.ssd_adjoint_kernel)
        caught.of(patch, triton_backward.ssd_tokens_kernel, triton_backward.ssd_maps_kernel)
        out, last, saved = triton_ssd.ssd_forward(*given, **choices)
        triton_ssd.ssd_backward(out, last if start is not None else None, saved, *given, **choices)
    return caught


def conv_launches(
    taps: int,
    channels: int = 128,
    packed: bool = False,
    initial: bool = False,
    lengths: bool = False,
    directions: int = 2,
) -> Caught:
    """Launches of a forward and a backward pass."""
    from genssm.kernels import triton_sums
    from genssm.kernels.causal_conv1d import triton_conv

    x = torch.zeros(1, 1, 40, channels, dtype=torch.bfloat16)
    orders = torch.arange(40, dtype=torch.int32).expand(directions, 40).contiguous()
    cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32) if packed else None
    start = torch.zeros(2 if packed else 1, directions, channels, taps - 1) if initial else None
    valid = torch.full((1,), 40, dtype=torch.int32) if lengths else None
    given = (x, torch.zeros(1, channels, taps), torch.zeros(1, channels), True, orders, start, valid, cu_seqlens)
    given = (*given, directions)
    with pytest.MonkeyPatch.context() as patch:
        caught = Caught().of(patch, triton_conv.conv_forward_kernel, triton_conv.conv_backward_kernel)
        caught.of(patch, triton_sums.sum_parameters_kernel)
        out, last = triton_conv.conv_forward(*given)
        triton_conv.conv_backward(out, last if initial else None, *given)
    return caught


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
def test_compiles_for_every_target(target: tuple) -> None:
    launches = scan_launches(states=4, unroll=1, segments=2) + conv_launches(taps=4)
    each = {kernel.__name__: (kernel, arguments) for kernel, arguments in launches}
    assert len(each) == 8
    for kernel, arguments in each.values():
        compile_for(kernel, arguments, target)


OPTIONS = {
    "bare": {"states": 2, "without": "D z delta_bias softplus orders", "dtype": torch.float32},
    "packed": {"states": 2, "packed": True, "directions": 2},
    "packed from states": {"states": 2, "packed": True, "initial": True},
    "lengths from states": {"states": 2, "lengths": True, "initial": True, "segments": 2, "dtype": torch.float16},
    "directions in turn": {"states": 2, "directions": 2, "segments": 1},
    "narrow tile": {"states": 16, "directions": 2},
    "ragged sizes": {"states": 3, "channels": 21},
    "one state": {"states": 1},
    "65 states": {"states": 65},
    "256 states": {"states": 256},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_compile(options: dict) -> None:
    for kernel, arguments in scan_launches(**options, unroll=1):
        compile_for(kernel, arguments, ("cuda", 90, 32))


@pytest.mark.parametrize(
    ("works", "directions", "summed", "narrow"),
    [
        (64, 1, False, False),
        (43, 1, False, True),  # 8 programs of 64 channels per multiprocessor: 1056
        (11, 1, False, True),  # 4 of 32: 528
        (10, 1, False, False),  # time is split
        (10, 2, True, True),  # directions apart
        (22, 2, True, True),  # in turn
        (44, 2, True, False),
    ],
)
def test_smaller_programs_where_they_are_few(
    works: int, directions: int, summed: bool, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genssm.kernels.selective_scan import triton_scan

    monkeypatch.setattr(triton_scan, "processors", lambda device: 132)
    sizes = triton_scan._forward_sizes(works, 1536, 16, directions, summed, torch.device("cpu"))
    assert sizes == ((32, 2) if narrow else (None, None))
    assert triton_scan._forward_sizes(works, 1536, 1, directions, summed, torch.device("cpu")) == (None, None)


@pytest.mark.parametrize("name", ["packed", "directions in turn", "65 states", "bare"])
@pytest.mark.parametrize("arch", [80, 90])
def test_prefetching_compiles(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from genssm.kernels.selective_scan import triton_scan

    monkeypatch.setattr(triton_scan, "compiled_for_nvidia", lambda device: True)
    monkeypatch.setattr(triton_scan, "_shared_memory", lambda index: SHARED_LIMIT)
    for kernel, arguments in scan_launches(**OPTIONS[name], unroll=1):
        assembly = compile_for(kernel, arguments, ("cuda", arch, 32)).asm["ptx"]
        assert ("prefetch.global.L1" in assembly) == (
            kernel.__name__ in ("scan_forward_kernel", "scan_backward_kernel")
        )


@pytest.mark.parametrize(("packed", "taps"), [(False, 1), (True, 5), (False, 3)])
def test_convolution_options_compile(packed: bool, taps: int) -> None:
    for kernel, arguments in conv_launches(taps, channels=100, packed=packed, initial=True, lengths=not packed):
        compile_for(kernel, arguments, ("cuda", 90, 32))


def test_registers_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes of the models: no spills in either tile of the scan's forward (one slot of stack in Triton 3.8), few
    in its backward and in the convolution's; with what NVIDIA's devices prefetch."""
    from genssm.kernels.selective_scan import triton_scan

    monkeypatch.setattr(triton_scan, "compiled_for_nvidia", lambda device: True)
    monkeypatch.setattr(triton_scan, "_shared_memory", lambda index: SHARED_LIMIT)
    launches = scan_launches(states=16, channels=1536, length=8)
    launches += conv_launches(4, channels=1536) + conv_launches(4, channels=1536, directions=1)
    monkeypatch.setattr(triton_scan, "_FORWARD_FULL", 10**6)
    launches += [launch for launch in scan_launches(states=16, channels=1536, length=8) if launch[1].get("NL") == 2]
    for kernel, arguments in launches:
        found = resources(compile_for(kernel, arguments, ("cuda", 90, 32)))
        registers, stack = {"scan_backward_kernel": (168, 512), "conv_backward_kernel": (128, 64)}.get(
            kernel.__name__, (160, 8)
        )
        assert found["REG"] <= registers, (kernel.__name__, found)
        assert found["STACK"] <= stack, (kernel.__name__, found)
    assert {arguments.get("NL") for _, arguments in launches} == {None, 1, 2, 4}


SHARED = {
    "of a model": ({"states": 16, "channels": 1536, "segments": 2}, 90),
    "directions in turn": ({"states": 16, "directions": 2, "segments": 1}, 90),
    "packed from states": ({"states": 9, "channels": 40, "packed": True, "initial": True}, 90),
    "bare": ({"states": 16, "without": "D z delta_bias softplus orders", "dtype": torch.float32}, 90),
    "lengths": ({"states": 13, "channels": 200, "lengths": True, "dtype": torch.float16}, 100),
}


@pytest.mark.parametrize(("options", "arch"), SHARED.values(), ids=SHARED.keys())
def test_backward_in_shared_memory(options: dict, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six programs run at once on a multiprocessor; no scratch tiles in memory."""
    from genssm.kernels.selective_scan import triton_scan

    if triton_scan._shared_kernel() is None:
        pytest.skip("no kernel for this version of triton")
    monkeypatch.setattr(triton_scan, "compiled_for_nvidia", lambda device: True)
    monkeypatch.setattr(triton_scan, "_shared_memory", lambda index: triton_scan._SHARED_BYTES)
    Caught().of(monkeypatch, triton_scan._forward_kernel())
    caught = Caught().of(monkeypatch, triton_scan._shared_kernel())
    others = scan_launches(**options)
    assert not any("scratch" in arguments for _, arguments in others)
    in_turn = options.get("directions", 1)  # each direction a launch
    assert [arguments["first_direction"] for _, arguments in caught] == list(range(in_turn))
    kernel, arguments = caught[0]
    compiled = compile_for(kernel, arguments, ("cuda", arch, 32))
    assert 6 * (compiled.metadata.shared + 1024) <= triton_scan._SHARED_BYTES
    found = resources(compiled)
    assert found["REG"] <= 168 and found["STACK"] <= 512, found


@pytest.mark.parametrize(("options", "arch"), SHARED.values(), ids=SHARED.keys())
def test_forward_in_shared_memory(options: dict, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four programs run at once on a multiprocessor; few spills, none to speak of inside the loop."""
    from genssm.kernels.selective_scan import triton_scan

    if triton_scan._forward_kernel() is None:
        pytest.skip("no kernel for this version of triton")
    monkeypatch.setattr(triton_scan, "compiled_for_nvidia", lambda device: True)
    monkeypatch.setattr(triton_scan, "_shared_memory", lambda index: triton_scan._FORWARD_SHARED_BYTES)
    monkeypatch.setattr(triton_scan, "_FORWARD_LONG", 0)
    caught = Caught().of(monkeypatch, triton_scan._forward_kernel())
    others = scan_launches(**options)
    assert "scan_forward_kernel" not in {kernel.__name__ for kernel, _ in others}
    local, in_turn = options.get("segments") == 2, options.get("directions", 1)  # each direction a launch
    assert [arguments["OUTPUT"] for _, arguments in caught] == [False] * local + [True] * in_turn
    if local:  # no launch of its own for the copy of A, nor for the states between segments
        assert caught[1][1]["a"] is caught[0][1]["turned"]
        assert caught[0][1]["a"].shape[-2:] == (options["channels"], options["states"])
    for kernel, arguments in caught:
        compiled = compile_for(kernel, arguments, ("cuda", arch, 32))
        assert 4 * (compiled.metadata.shared + 1024) <= triton_scan._FORWARD_SHARED_BYTES
        found = resources(compiled)
        assert found["REG"] <= 128 and found["STACK"] <= 256, found


@pytest.mark.parametrize(("states", "parts"), [(17, 2), (48, 3), (256, 16)])
@pytest.mark.parametrize("directions", [1, 2])
def test_many_states_go_backward_in_parts(
    states: int, parts: int, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As directions of the kernel for 9 to 16 states, from what the plain forward keeps."""
    from genssm.kernels.selective_scan import triton_scan

    if triton_scan._shared_kernel() is None:
        pytest.skip("no kernel for this version of triton")
    monkeypatch.setattr(triton_scan, "compiled_for_nvidia", lambda device: True)
    monkeypatch.setattr(triton_scan, "_shared_memory", lambda index: triton_scan._SHARED_BYTES)
    caught = Caught().of(monkeypatch, triton_scan._shared_kernel())
    others = scan_launches(states=states, directions=directions, initial=True, segments=1)
    names = [kernel.__name__ for kernel, _ in others]
    sums = ["sum_maps_kernel"] * parts + ["sum_parameters_kernel"]  # the parts share the slots of the maps
    assert names == ["scan_forward_kernel", *sums * directions]
    assert [arguments["first_direction"] for _, arguments in caught] == [*range(parts)] * directions
    assert {arguments["directions"] for _, arguments in caught} == {parts}
    assert {arguments["STATES"] for _, arguments in caught} == {-(-states // parts)}
    compile_for(*caught[0], ("cuda", 90, 32))


@pytest.mark.parametrize(
    ("batch", "length", "sequences", "shared"),
    [
        (44, 255, None, False),  # 8 programs of 64 channels per multiprocessor: 1056
        (44, 256, None, True),
        (43, 4, None, True),
        (1, 44 * 255, 44, False),  # packed
        (1, 44 * 256, 44, True),
    ],
)
def test_few_tokens_of_many_sequences_take_the_plain_forward(
    batch: int, length: int, sequences: int | None, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genssm.kernels.selective_scan import triton_scan

    launched = []
    monkeypatch.setattr(triton_scan, "processors", lambda device: 132)
    monkeypatch.setattr(triton_scan, "_forward_shares", lambda *given: True)
    monkeypatch.setattr(triton_scan, "_forward_kernel", lambda: "shared")
    monkeypatch.setattr(triton_scan, "launch", lambda kernel, grid, **arguments: launched.append(kernel))
    u, maps = torch.empty(batch, 1, length, 1536), torch.empty(batch, 1, length, 1, 16)
    borders = None if sequences is None else torch.arange(sequences + 1, dtype=torch.int32) * (length // sequences)
    given = (u, u, torch.zeros(1, 1536, 16), maps, maps, None, None, None, True, None, None, None, borders, True)
    triton_scan.scan_forward(*given)
    assert (launched == ["shared"]) == shared


def test_alignment_of_orders_makes_no_binary() -> None:
    from genssm.kernels.causal_conv1d import triton_walks
    from genssm.kernels.isolated_scans import triton_kernels
    from genssm.kernels.selective_scan import triton_backward, triton_forward, triton_scan
    from genssm.kernels.ssd import triton_backward as ssd_backward
    from genssm.kernels.ssd import triton_forward as ssd_forward
    from genssm.kernels.triton_launch import TABLES

    modules = (triton_walks, triton_kernels, triton_backward, triton_forward, ssd_backward, ssd_forward)
    kernels = [x for module in modules for name, x in vars(module).items() if name.endswith("_kernel")]
    kernels += [kernel for kernel in (triton_scan._shared_kernel(), triton_scan._forward_kernel()) if kernel]
    tables = [p for kernel in kernels for p in kernel.params if p.name in TABLES]
    assert len(tables) > 20
    assert all(parameter.do_not_specialize_on_alignment for parameter in tables)


@pytest.mark.parametrize("states", [8, 16, 17])
@pytest.mark.parametrize("kilobytes", [64, 100, 164, 228])  # of a multiprocessor
@pytest.mark.parametrize("known", [True, False])
def test_where_passes_are_in_shared_memory(
    states: int, kilobytes: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genssm.kernels.selective_scan import triton_scan

    monkeypatch.setattr(triton_scan, "compiled_for_nvidia", lambda device: True)
    monkeypatch.setattr(triton_scan, "_shared_memory", lambda index: kilobytes * 1024)
    monkeypatch.setattr(triton_scan, "known_triton", lambda: known)
    triton_scan._forward_kernel.cache_clear()
    triton_scan._shared_kernel.cache_clear()
    token = torch.zeros(1, 1, 4, 32)
    maps = torch.zeros(1, 1, 4, 1, states)
    forward = triton_scan._forward_shares(token, token, maps, maps, None, token)
    backward = triton_scan._shared_fits(token, token, maps, maps, None, token)
    triton_scan._forward_kernel.cache_clear()
    triton_scan._shared_kernel.cache_clear()
    assert forward == (known and states == 16 and kilobytes >= 164)
    assert backward == (known and states > 8 and kilobytes == 228)


@pytest.mark.parametrize("target", [TARGETS[i] for i in (0, 3, 4, 5, 7)], ids=lambda target: str(target[1]))
def test_ssd_compiles_for_targets(target: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """With short chunks, which take a fraction of the time."""
    from genssm.kernels.ssd import triton_ssd

    monkeypatch.setattr(triton_ssd, "chunk_steps", lambda states, half: 16)
    each = {kernel.__name__: (kernel, arguments) for kernel, arguments in ssd_launches(16, width=16, segments=2)}
    assert len(each) == 6
    for kernel, arguments in each.values():
        compile_for(kernel, arguments, target)


SSD_OPTIONS = {
    "bare": {"without": "D z dt_bias softplus orders initial", "dtype": torch.float32},
    "packed": {"packed": True, "width": 21},
    "lengths": {"lengths": True, "dtype": torch.float16, "segments": 2},
}


@pytest.mark.parametrize("options", SSD_OPTIONS.values(), ids=SSD_OPTIONS.keys())
def test_ssd_options_compile(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from genssm.kernels.ssd import triton_ssd

    monkeypatch.setattr(triton_ssd, "chunk_steps", lambda states, half: 16)
    for kernel, arguments in ssd_launches(3, **{"width": 16, **options}):
        compile_for(kernel, arguments, ("cuda", 90, 32))


@pytest.mark.parametrize(("states", "dtype"), [(128, torch.bfloat16), (256, torch.float32), (128, torch.float16)])
def test_ssd_fits(states: int, dtype: torch.dtype) -> None:
    """At the size of the models, at the largest and in float16: shared memory (by `compile_for`) and few spills."""
    import triton

    # Before 3.8 the gradients of tokens at 128 states, in the wide blocks that their products need, spill a sixth more.
    older = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    for kernel, arguments in ssd_launches(states, length=70, dtype=dtype):
        found = resources(compile_for(kernel, arguments, ("cuda", 90, 32)))
        most = 1280 if older and kernel.__name__ == "ssd_tokens_kernel" else 1024
        assert found["STACK"] <= most, (kernel.__name__, found)


@pytest.mark.parametrize(
    ("states", "dtype"),
    [(16, torch.bfloat16), (64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float16)],
)
def test_ssd_multiplies_nothing_narrow_by_warp_groups(states: int, dtype: torch.dtype) -> None:
    """Such products are wrong on Hopper, or read outside of their memory."""
    for kernel, arguments in ssd_launches(states, length=70, dtype=dtype):
        found = compile_for(kernel, arguments, ("cuda", 90, 32)).asm["ttgir"]
        columns = [int(n) for n in re.findall(r"warp_group_dot .*-> tensor<\d+x(\d+)xf32", found)]
        assert len(columns) == found.count("warp_group_dot ") and all(n >= 64 for n in columns), kernel.__name__
