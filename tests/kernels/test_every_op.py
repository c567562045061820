"""What holds for every op alike: gradients, PyTorch's machinery around a call, messages that the ops share."""

import doctest
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.selective_scan import selective_scan
from genssm.kernels.ssd import chunked, ssd
from tests.kernels.problems import FAST, Case, Problem, conv_problem, rms_error, run, scan_problem, ssd_problem

OPS: dict[str, tuple[Callable, Callable]] = {
    "causal_conv1d": (causal_conv1d, conv_problem),
    "selective_scan": (selective_scan, scan_problem),
    "ssd": (ssd, ssd_problem),
}
each_op = pytest.mark.parametrize("name", OPS)
each_path = pytest.mark.parametrize(
    ("name", "backend", "device"),
    [
        pytest.param(name, *path.values, id=f"{name}-{path.id}", marks=path.marks)
        for name in OPS
        for path in FAST
        if (name, path.values[0]) != ("ssd", "compiled")
    ],
)
BOTH_WAYS = {"directions": 2, "order": "both"}
TINY = {"channels": 2, "states": 2, "taps": 3}
HEADS = {"channels": 4, "heads": 2, "states": 2}
SCAN, SSD = "u delta A B C D z delta_bias", "x dt A B C D z dt_bias"
GRADCHECKS = {
    "causal_conv1d": {
        "everything": Case(length=5, **TINY, **BOTH_WAYS, own="x weight bias", initial=True),
        "lengths": Case(length=5, **TINY, **BOTH_WAYS, lengths=(3, 5), initial=True),
        "packed": Case(batch=1, length=6, channels=2, **BOTH_WAYS, cu_seqlens=(0, 2, 6), initial=True),
        "plain": Case(length=4, channels=2, taps=8, without="bias", activation=None),
    },
    "selective_scan": {
        "everything": Case(length=5, **TINY, **BOTH_WAYS, own=SCAN, initial=True),
        "lengths": Case(length=5, **TINY, **BOTH_WAYS, lengths=(3, 5), initial=True),
        "packed": Case(batch=1, length=5, **TINY, **BOTH_WAYS, cu_seqlens=(0, 2, 5), initial=True),
        "groups": Case(length=4, channels=4, states=2, groups=2, without="z D", softplus=False, reduce="none"),
        "two chunks": Case(batch=1, length=34, channels=1, states=1, without="z D delta_bias", initial=True),
    },
    "ssd": {
        "everything": Case(length=5, **HEADS, **BOTH_WAYS, own=SSD, initial=True),
        "lengths": Case(length=5, **HEADS, **BOTH_WAYS, lengths=(3, 5), initial=True),
        "packed": Case(batch=1, length=5, **HEADS, **BOTH_WAYS, cu_seqlens=(0, 2, 5), initial=True),
        "groups": Case(length=4, **HEADS, groups=2, without="z D", softplus=False, reduce="none"),
        "two chunks": Case(
            batch=1, length=66, channels=1, heads=1, states=1, softplus=False, without="z D dt_bias", initial=True
        ),
    },
}


def make(name: str, case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    return OPS[name][1](case).to(device, dtype)


def function(name: str, problem: Problem, backend: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]:
    """An op as a function of its differentiable arguments alone, and these."""
    names, op = list(problem.inputs), OPS[name][0]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return op(**dict(zip(names, tensors)), **problem.options, backend=backend)

    return call, list(problem.inputs.values())


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{what}")
        for name, cases in GRADCHECKS.items()
        for what, case in cases.items()
    ],
)
def test_gradcheck(name: str, case: Case, backend: str) -> None:
    if backend == "reference" and case.length > chunked.STEPS:
        pytest.skip("the reference has no chunks")
    assert torch.autograd.gradcheck(*function(name, make(name, case, dtype=torch.float64), backend))


@each_op
def test_reference_differentiates_twice(name: str) -> None:
    problem = make(name, Case(batch=1, length=3, channels=1, heads=1, states=2, taps=2), dtype=torch.float64)
    call, tensors = function(name, problem, "reference")
    assert torch.autograd.gradgradcheck(lambda *x: call(*x)[0], tensors)


@each_path
def test_gradients_of_one_result_only(name: str, backend: str, device: str) -> None:
    problem = make(name, Case(initial=True, length=70), device)
    call, tensors = function(name, problem, backend)
    exact, reference = function(name, problem.to("cpu", torch.float64), "reference")
    for which in (0, 1):
        found = torch.autograd.grad(call(*tensors)[which].sum(), tensors, materialize_grads=True)
        expected = torch.autograd.grad(exact(*reference)[which].sum(), reference, materialize_grads=True)
        for argument, a, b in zip(problem.inputs, found, expected):
            assert rms_error(a, b) < 3e-6, argument


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_path
def test_batched_gradients_are_those_one_by_one(name: str, backend: str, device: str) -> None:
    problem = make(name, Case(**BOTH_WAYS, initial=True), device)
    call, tensors = function(name, problem, backend)
    result = call(*tensors)[0]
    batch = torch.randn(3, *result.shape, device=device)
    found = torch.autograd.grad(result, tensors, batch, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(result, tensors, g, retain_graph=True) for g in batch]
    for argument, a, b in zip(problem.inputs, found, zip(*one_by_one)):
        assert rms_error(a, torch.stack(b)) < 3e-6, argument


@each_path
def test_frozen_arguments_get_no_gradient_and_change_no_other(name: str, backend: str, device: str) -> None:
    problem = make(name, Case(**BOTH_WAYS, initial=True), device)
    call, tensors = function(name, problem, backend)
    expected = torch.autograd.grad(call(*tensors)[0].sum(), tensors, materialize_grads=True)
    for argument, tensor, gradient in zip(problem.inputs, tensors, expected):
        alone = [x.detach().requires_grad_(x is tensor) for x in tensors]
        call(*alone)[0].sum().backward()
        for x, own in zip(alone, tensors):
            assert (x.grad is None) == (own is not tensor), argument
            assert x.grad is None or torch.equal(x.grad, gradient), argument


@each_path
def test_same_bits_twice(name: str, backend: str, device: str) -> None:
    problem = make(name, Case(batch=3, length=130, channels=96, **BOTH_WAYS), device)
    first, second = (run(OPS[name][0], problem, backend) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@each_path
@pytest.mark.parametrize(
    "case",
    [Case(**BOTH_WAYS, lengths=(7, 19)), Case(batch=1, **BOTH_WAYS, cu_seqlens=(0, 5, 5, 19))],
    ids=["lengths", "packed"],
)
def test_orders_and_borders_of_any_strides(name: str, backend: str, device: str, case: Case) -> None:
    def spread(x: Tensor) -> Tensor:
        found = x.new_zeros(*x.shape[::-1], 2)[..., 0].permute(*reversed(range(x.ndim)))
        return found.copy_(x)

    problem = make(name, case, device)
    options = {key: x.int() if isinstance(x, Tensor) else x for key, x in problem.options.items()}
    apart = {key: spread(x) if isinstance(x, Tensor) else x for key, x in options.items()}
    first, second = (run(OPS[name][0], Problem(problem.inputs, given), backend) for given in (options, apart))
    assert all(torch.equal(first[key], second[key]) for key in first)


@each_path
def test_compiles_whole(name: str, backend: str, device: str) -> None:
    torch._dynamo.reset()  # what other ops compiled of the same function counts against a limit
    op = OPS[name][0]

    def loss(inputs: dict, options: dict) -> Tensor:
        y, state = op(**inputs, **options, backend=backend)
        return (y * y).sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (20, 70, 130):
        problem = make(name, Case(length=length, **BOTH_WAYS), device)
        tensors = list(problem.inputs.values())
        expected = torch.autograd.grad(loss(problem.inputs, problem.options), tensors)
        found = torch.autograd.grad(compiled(problem.inputs, problem.options), tensors)
        assert all(rms_error(a, b) < 1e-6 for a, b in zip(found, expected))


@each_path
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_exact(name: str, backend: str, device: str, reentrant: bool) -> None:
    call, tensors = function(name, make(name, Case(length=70), device), backend)

    def squares(*tensors: Tensor) -> Tensor:
        return call(*tensors)[0].square()

    expected = torch.autograd.grad(squares(*tensors).sum(), tensors)
    checkpoint(squares, *tensors, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(x.grad, gradient) for x, gradient in zip(tensors, expected))


@each_op
def test_packed_mistakes_are_named(name: str) -> None:
    op, inputs = OPS[name][0], make(name, Case(batch=1, length=6)).inputs
    for borders, message in (([0, 3, 5], "rising borders from 0 to 6"), ([0, 4, 2, 6], "rising borders")):
        with pytest.raises(ValueError, match=message):
            op(**inputs, cu_seqlens=torch.tensor(borders))
    order = torch.tensor([0, 3, 1, 2, 4, 5])
    with pytest.raises(ValueError, match="leaves a packed sequence and comes back"):
        op(**inputs, cu_seqlens=torch.tensor([0, 3, 6]), orders=order)


@each_op
def test_mixed_devices_are_named(name: str) -> None:
    inputs = make(name, Case()).inputs
    strange = list(inputs)[1]
    with pytest.raises(ValueError, match=f"{strange} is on meta, the first input on cpu"):
        OPS[name][0](**{**inputs, strange: inputs[strange].to("meta")})


@pytest.mark.parametrize("name", [*OPS, "add_norm", "gated_residual", "isolated_scans"])
def test_examples_of_docstrings(name: str) -> None:
    function = getattr(importlib.import_module(f"genssm.kernels.{name}"), name)
    (examples,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={"torch": torch, name: function})
    assert examples.examples and doctest.DocTestRunner().run(examples).failed == 0
