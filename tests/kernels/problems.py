"""Problems for the ops' tests: random arguments with every option, runs of a backend, and how far two runs differ."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from genssm.kernels import native

_NO_COMPILER = pytest.mark.skipif(native.why_not() is not None, reason="no C compiler")
# (backend, device): every fast path that this machine can run
FAST = [
    pytest.param("chunked", "cpu", id="chunked"),
    pytest.param("compiled", "cpu", id="compiled", marks=_NO_COMPILER),
    pytest.param("chunked", "cuda", id="chunked-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]
# Relative RMS. Arithmetic is float32; half types round results and gradients by half a last place at most: once, or
# on a GPU once for each direction that adds to them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Case:
    """Sizes and options of a problem. ``own`` names the arguments that have their own values in each direction."""

    batch: int = 2
    length: int = 19
    channels: int = 12
    heads: int = 3
    states: int = 4
    taps: int = 4
    directions: int = 1
    groups: int = 1
    own: str = ""
    order: str | None = None
    without: str = ""
    softplus: bool = True
    activation: str | None = "silu"
    initial: bool = False
    lengths: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    reduce: str = "sum"

    @property
    def sequences(self) -> int:
        return self.batch if self.cu_seqlens is None else len(self.cu_seqlens) - 1


@dataclass
class Problem:
    """Differentiable arguments by name, and the others."""

    inputs: dict[str, Tensor]
    options: dict = field(default_factory=dict)

    def to(self, device: str, dtypes: dict[str, torch.dtype] | torch.dtype) -> "Problem":
        """The same values elsewhere; parameters and states keep float32 next to half types."""
        inputs = {}
        for name, x in self.inputs.items():
            dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(name, torch.float32)
            if name in ("A", "D", "delta_bias", "dt_bias", "initial_state") and dtype != torch.float64:
                dtype = torch.float32
            inputs[name] = x.detach().to(device, dtype).requires_grad_()
        return Problem(inputs, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()})

    def rounded(self, dtypes: dict[str, torch.dtype] | torch.dtype) -> "Problem":
        """Float64 values that the given types can hold."""
        return self.to("cpu", dtypes).to("cpu", torch.float64)


def _options(case: Case, generator: torch.Generator) -> dict:
    options: dict = {"return_last_state": True}
    steps = torch.arange(case.length)
    if case.order == "both":
        options["orders"] = torch.stack([steps if k % 2 == 0 else steps.flip(0) for k in range(case.directions)]).int()
    elif case.order == "random":
        options["orders"] = torch.stack(
            [torch.randperm(case.length, generator=generator) for _ in range(case.directions)]
        )
    if case.lengths is not None:
        options["lengths"] = torch.tensor(case.lengths)
    if case.cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    return options


def scan_problem(case: Case, seed: int = 0) -> Problem:
    """Float64 arguments of `selective_scan`."""
    g = torch.Generator().manual_seed(seed)
    own = case.own.split()

    def tokens(name: str) -> Tensor:
        directions = (case.directions,) if name in own else ()
        return torch.randn(case.batch, *directions, case.length, case.channels, generator=g, dtype=torch.float64)

    def maps(name: str) -> Tensor:
        directions = (case.directions,) if name in own else (1,) if case.groups > 1 else ()
        groups = (case.groups,) if case.groups > 1 else ()
        sizes = (case.batch, *directions, case.length, *groups, case.states)
        return torch.randn(sizes, generator=g, dtype=torch.float64)

    def parameter(name: str, *sizes: int) -> Tensor:
        directions = (case.directions,) if name in own else ()
        return torch.randn(*directions, *sizes, generator=g, dtype=torch.float64)

    inputs = {"u": tokens("u"), "delta": tokens("delta"), "z": tokens("z"), "B": maps("B"), "C": maps("C")}
    if not case.softplus:
        inputs["delta"] = inputs["delta"].abs()
    inputs["A"] = -parameter("A", case.channels, case.states).abs() - 0.1
    inputs["D"] = parameter("D", case.channels)
    inputs["delta_bias"] = parameter("delta_bias", case.channels) - 1
    if not case.softplus:
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    if case.initial:
        inputs["initial_state"] = torch.randn(
            case.sequences, case.directions, case.channels, case.states, generator=g, dtype=torch.float64
        )
    options = {"delta_softplus": case.softplus, "reduce": case.reduce, **_options(case, g)}
    return Problem({k: v for k, v in inputs.items() if k not in case.without.split()}, options)


def ssd_problem(case: Case, seed: int = 0) -> Problem:
    """Float64 arguments of `ssd`; ``channels`` of a case are those of all heads."""
    g = torch.Generator().manual_seed(seed)
    own = dict.fromkeys(case.own.split(), (case.directions,))
    width = case.channels // case.heads

    def tokens(name: str, *sizes: int) -> Tensor:
        return torch.randn(case.batch, *own.get(name, ()), case.length, *sizes, generator=g, dtype=torch.float64)

    def parameter(name: str) -> Tensor:
        return torch.randn(*own.get(name, ()), case.heads, generator=g, dtype=torch.float64)

    inputs = {name: tokens(name, case.heads, width) for name in ("x", "z")}
    inputs["dt"] = tokens("dt", case.heads)
    inputs.update({name: tokens(name, case.groups, case.states) for name in ("B", "C")})
    inputs["A"] = -parameter("A").abs() - 0.1
    inputs["D"] = parameter("D")
    inputs["dt_bias"] = parameter("dt_bias") - 1
    if not case.softplus:
        inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs(), inputs["dt_bias"].abs()
    if case.initial:
        sizes = (case.sequences, case.directions, case.heads, width, case.states)
        inputs["initial_state"] = torch.randn(sizes, generator=g, dtype=torch.float64)
    options = {"dt_softplus": case.softplus, "reduce": case.reduce, **_options(case, g)}
    return Problem({k: v for k, v in inputs.items() if k not in case.without.split()}, options)


def conv_problem(case: Case, seed: int = 0) -> Problem:
    """Float64 arguments of `causal_conv1d`."""
    g = torch.Generator().manual_seed(seed)
    own = dict.fromkeys(case.own.split(), (case.directions,))

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float64)

    inputs = {
        "x": random(case.batch, *own.get("x", ()), case.length, case.channels),
        "weight": random(*own.get("weight", ()), case.channels, case.taps),
        "bias": random(*own.get("bias", ()), case.channels),
    }
    if case.initial:
        inputs["initial_state"] = random(case.sequences, case.directions, case.channels, case.taps - 1)
    options = {"activation": case.activation, **_options(case, g)}
    return Problem({k: v for k, v in inputs.items() if k not in case.without.split()}, options)


def run(op: Callable, problem: Problem, backend: str) -> dict[str, Tensor]:
    """Result, last state and the gradients of all inputs, for fixed random gradients (of any type) of the first two."""
    y, state = op(**problem.inputs, **problem.options, backend=backend)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).bfloat16().to(x) for x in (y, state)]
    names = list(problem.inputs)
    found = torch.autograd.grad([y, state], [problem.inputs[n] for n in names], grads, materialize_grads=True)
    return {"y": y.detach(), "last_state": state.detach(), **{f"d{n}": x for n, x in zip(names, found)}}


def rms_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def check_parity(
    op: Callable, make: Callable, case: Case, backend: str, device: str, dtypes=torch.float32, least: float = 0.0
) -> None:
    """A backend against the reference in float64 on the same (rounded) arguments; no bound is below ``least``."""
    problem = make(case)
    expected = run(op, problem.rounded(dtypes), "reference")
    placed = problem.to(device, dtypes)
    with poisoned():
        found = run(op, placed, backend)
    for name, value in expected.items():
        given = found[name]
        error = rms_error(given, value)
        assert error < max(least, TOLERANCE[given.dtype]), f"{name}: relative RMS error {error:.1e} for {case}"
        if name.startswith("d"):
            assert given.dtype == placed.inputs[name[1:]].dtype
            assert given.shape == placed.inputs[name[1:]].shape


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN instead of, mostly, zeros: a result that nobody wrote shows."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


def _poisoning(allocate: Callable) -> Callable:
    def wrapped(*args, **kwargs) -> Tensor:
        x = allocate(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() and not x.is_meta else x

    return wrapped
