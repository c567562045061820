"""Causal convolution along orders: every backend against the reference and its identities."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genssm.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from tests.kernels.problems import FAST, Case, check_parity, conv_problem, rms_error, run

fast = pytest.mark.parametrize(("backend", "device"), FAST)


@fast
@pytest.mark.parametrize("taps", range(1, 9))
@pytest.mark.parametrize("length", [1, 2, 63, 257])
def test_parity_at_lengths_and_widths(backend: str, device: str, length: int, taps: int) -> None:
    case = Case(length=length, taps=taps, channels=37, initial=taps > 1)
    check_parity(causal_conv1d, conv_problem, case, backend, device)


OPTIONS = {
    "no batch row": Case(batch=0, directions=2, order="both", initial=True),
    "bare": Case(without="bias", activation=None),
    "no bias": Case(without="bias"),
    "two directions, all shared": Case(directions=2, order="both"),
    "two directions, all their own": Case(directions=2, order="both", own="x weight bias", initial=True),
    "own inputs, no orders": Case(directions=3, own="x"),
    "own weights, no orders": Case(directions=3, own="weight"),
    "own biases": Case(directions=2, own="bias", order="random"),
    "own states": Case(directions=2, initial=True),
    "one order": Case(directions=1, order="random", initial=True, taps=8),
    "lengths": Case(batch=4, lengths=(19, 1, 0, 7), initial=True),
    "lengths in both directions": Case(batch=3, lengths=(5, 19, 18), directions=2, order="both", own="weight"),
    "lengths along random orders": Case(batch=3, lengths=(5, 19, 18), directions=2, order="random", own="x"),
    "packed": Case(batch=1, length=40, cu_seqlens=(0, 3, 20, 40), initial=True),
    "packed, both directions, empty sequences": Case(
        batch=1,
        length=30,
        cu_seqlens=(0, 0, 2, 2, 18, 30, 30),
        directions=2,
        order="both",
        own="x weight bias",
        initial=True,
    ),
    "packed, short sequences": Case(batch=1, length=9, cu_seqlens=(0, 1, 3, 6, 9), taps=8, initial=True),
    "packed, one tap": Case(batch=1, length=9, cu_seqlens=(0, 4, 9), taps=1),
    "packed, shared": Case(batch=1, length=30, cu_seqlens=(0, 18, 30), directions=2, order="both"),
    "more than one block of work": Case(batch=5, length=90, channels=800, directions=2, order="both"),
}


@fast
@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
def test_parity_of_options(backend: str, device: str, case: Case) -> None:
    check_parity(causal_conv1d, conv_problem, case, backend, device)


@fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    case = Case(length=65, channels=30, directions=2, order="both", own="weight", initial=True)
    check_parity(causal_conv1d, conv_problem, case, backend, device, dtype)


@fast
def test_parity_of_mixed_types(backend: str, device: str) -> None:
    dtypes = {"x": torch.bfloat16, "weight": torch.float32, "bias": torch.float16}
    check_parity(causal_conv1d, conv_problem, Case(), backend, device, dtypes)


@fast
def test_equals_torch_convolution(backend: str, device: str) -> None:
    problem = conv_problem(Case(length=33, activation=None)).to(device, torch.float32)
    x, weight, bias = (problem.inputs[n] for n in ("x", "weight", "bias"))
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=12).mT
    assert rms_error(causal_conv1d(x, weight, bias, backend=backend), expected) < 1e-6


@fast
def test_any_strides(backend: str, device: str) -> None:
    problem = conv_problem(Case(directions=2, order="both")).to(device, torch.float32)
    expected = run(causal_conv1d, problem, backend)
    x, weight = problem.inputs["x"].detach(), problem.inputs["weight"].detach()
    for view in (x.mT.contiguous().mT, torch.cat([x, x], dim=-1)[..., 12:], torch.stack([x, x], dim=-1)[..., 1]):
        problem.inputs["x"] = view.requires_grad_()
        problem.inputs["weight"] = weight.t().contiguous().t().requires_grad_()
        found = run(causal_conv1d, problem, backend)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@fast
def test_directions_lie_one_after_the_other(backend: str, device: str) -> None:
    """In the result always, in the gradient where they do in x; the numbers are the same."""
    problem = conv_problem(Case(directions=2, order="both", own="x weight")).to(device, torch.float32)
    expected = run(causal_conv1d, problem, backend)
    x = problem.inputs["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    problem.inputs["x"] = x
    found = run(causal_conv1d, problem, backend)
    assert found["y"].transpose(0, 1).is_contiguous() and found["dx"].stride() == x.stride()
    assert expected["y"].stride() == found["y"].stride() and expected["dx"].is_contiguous()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_result_has_directions_where_an_argument_has() -> None:
    x, weight = torch.randn(2, 5, 4), torch.randn(4, 3)
    order = torch.arange(5)
    assert causal_conv1d(x, weight).shape == (2, 5, 4)
    assert causal_conv1d(x, weight, orders=order).shape == (2, 5, 4)
    assert causal_conv1d(x, weight, orders=order[None]).shape == (2, 1, 5, 4)
    assert causal_conv1d(x[:, None], weight).shape == (2, 1, 5, 4)
    assert causal_conv1d(x, weight.expand(3, 4, 3)).shape == (2, 3, 5, 4)


# Identities


@fast
def test_order_is_permute_convolve_unpermute(backend: str, device: str) -> None:
    problem = conv_problem(Case(length=45, channels=20, directions=3, order="random")).to(device, torch.float32)
    x, weight, bias = (problem.inputs[n] for n in ("x", "weight", "bias"))
    found = causal_conv1d(x, weight, bias, orders=problem.options["orders"], activation="silu", backend=backend)
    for k, order in enumerate(problem.options["orders"].long()):
        expected = causal_conv1d(x[:, order], weight, bias, activation="silu", backend=backend)
        assert torch.equal(found[:, k, order], expected)


@fast
@pytest.mark.parametrize("cut", [1, 2, 30])
def test_parts_continue_from_the_state(backend: str, device: str, cut: int) -> None:
    problem = conv_problem(Case(length=33, initial=True)).to(device, torch.float32)
    whole, last = causal_conv1d(**problem.inputs, **problem.options, backend=backend)
    x, state = problem.inputs.pop("x"), problem.inputs.pop("initial_state")
    parts = []
    for piece in (x[:, :cut], x[:, cut:]):
        y, state = causal_conv1d(piece, **problem.inputs, **problem.options, initial_state=state, backend=backend)
        parts.append(y)
    assert torch.equal(torch.cat(parts, dim=1), whole.squeeze(1))
    assert torch.equal(state, last)


@fast
def test_rows_do_not_depend_on_the_batch(backend: str, device: str) -> None:
    problem = conv_problem(Case(batch=7, length=33, channels=37, directions=2, order="both")).to(device, torch.float32)
    x = problem.inputs.pop("x")
    whole, states = causal_conv1d(x, **problem.inputs, **problem.options, backend=backend)
    for b in range(7):
        y, state = causal_conv1d(x[b : b + 1], **problem.inputs, **problem.options, backend=backend)
        assert torch.equal(y[0], whole[b])
        assert torch.equal(state[0], states[b])


@fast
@pytest.mark.parametrize("order", [None, "both", "random"])
def test_padding_changes_nothing(backend: str, device: str, order: str | None) -> None:
    """Not even NaN in the padding, in either direction; gradients there are zero."""
    lengths = (23, 40, 1)
    case = Case(batch=3, length=40, directions=2, order=order, own="weight", lengths=lengths)
    problem = conv_problem(case).to(device, torch.float32)
    expected = run(causal_conv1d, problem, backend)
    for b, size in enumerate(lengths):
        problem.inputs["x"].data[b, size:] = float("nan")
    found = run(causal_conv1d, problem, backend)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    steps = torch.arange(40, device=device)
    for b, size in enumerate(lengths):
        assert not found["y"][b, :, size:].any()
        assert not found["dx"][b, size:].any()
        if order == "random":
            continue
        orders = None if order is None else torch.stack([steps[:size], steps[:size].flip(0)])
        inputs = {**problem.inputs, "x": problem.inputs["x"][b : b + 1, :size]}
        y = causal_conv1d(**inputs, orders=orders, activation="silu", backend=backend)
        assert rms_error(y[0], found["y"][b, :, :size]) < 1e-6


@fast
def test_packed_sequences_equal_separate_ones(backend: str, device: str) -> None:
    borders = (0, 5, 5, 39, 40, 75)
    case = Case(batch=1, length=75, directions=2, order="both", cu_seqlens=borders, initial=True, own="weight")
    problem = conv_problem(case).to(device, torch.float32)
    packed, states = causal_conv1d(**problem.inputs, **problem.options, backend=backend)
    assert torch.equal(states[1], problem.inputs["initial_state"][1])  # the empty sequence
    for s, (low, high) in enumerate(itertools.pairwise(borders)):
        if low == high:
            continue
        steps = torch.arange(high - low, device=device)
        inputs = {**problem.inputs, "x": problem.inputs["x"][:, low:high]}
        inputs["initial_state"] = inputs["initial_state"][s : s + 1]
        options = {**problem.options, "cu_seqlens": None, "orders": torch.stack([steps, steps.flip(0)])}
        y, state = causal_conv1d(**inputs, **options, backend=backend)
        assert rms_error(packed[:, :, low:high], y) < 1e-6
        assert torch.equal(states[s], state[0])


# PyTorch's machinery


@fast
@pytest.mark.parametrize("outermost", [False, True])
def test_opcheck(backend: str, device: str, outermost: bool) -> None:
    K, E, W, L = 2, 4, 3, 5
    g = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g).to(device)

    orders = torch.stack([torch.arange(L), torch.arange(L).flip(0)]).int().to(device)
    args = (
        random(K, 2, L, E).transpose(0, 1) if outermost else random(2, 1, L, E),
        random(K, E, W),
        random(1, E),
        True,
        orders,
        random(2, K, E, W - 1),
        None,
        None,
        K,
        backend,
    )
    out, last = torch.ops.genssm.causal_conv1d_fwd(*args)
    grads = (random(*out.shape), random(*last.shape))
    torch.library.opcheck(torch.ops.genssm.causal_conv1d_bwd.default, (*grads, *args))
    args = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    torch.library.opcheck(torch.ops.genssm.causal_conv1d_fwd.default, args)


@fast
def test_under_autocast(backend: str, device: str) -> None:
    problem = conv_problem(Case(length=20)).to(device, torch.float32)
    projection = torch.nn.Linear(12, 12).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = causal_conv1d(**{**problem.inputs, "x": projection(problem.inputs["x"])}, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    grads = [problem.inputs["weight"].grad, projection.weight.grad]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in grads)


# One token at a time


@pytest.mark.parametrize("case", [Case(initial=True), Case(directions=2, own="x weight", initial=True), Case(taps=1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_convolution(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    problem = conv_problem(case).to(device.type, dtype)
    expected, last = causal_conv1d(**problem.inputs, **problem.options, backend="reference")
    x, weight, bias = (problem.inputs[n] for n in ("x", "weight", "bias"))
    state = problem.inputs.get("initial_state", torch.zeros(last.shape, device=device)).detach().clone()
    for t in range(case.length):
        y = causal_conv1d_step(state, x.select(x.ndim - 2, t), weight, bias, activation="silu")
        assert y.dtype == dtype
        wanted = expected.select(expected.ndim - 2, t).reshape(y.shape)
        torch.testing.assert_close(y, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert torch.equal(state, last)


def test_step_refuses_wrong_shapes() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8, 4)
    with pytest.raises(ValueError, match=r"state is \(2, 1, 8, 2\), expected \(Bt, K, E, 3\) for 4 taps"):
        causal_conv1d_step(torch.zeros(2, 1, 8, 2), x, weight)
    with pytest.raises(ValueError, match="x has 3 directions but the state has 1"):
        causal_conv1d_step(torch.zeros(2, 1, 8, 3), torch.zeros(2, 3, 8), weight)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        causal_conv1d_step(torch.zeros(2, 1, 8, 3), x, weight, activation="relu")


# Errors

MISTAKES = {
    "x dimensions": ({"x": torch.zeros(19, 12)}, r"x is \(19, 12\)"),
    "weight": ({"weight": torch.zeros(11, 4)}, r"weight is \(11, 4\), expected \(12, 4\) or \(K, 12, 4\)"),
    "too many taps": ({"weight": torch.zeros(12, 9)}, "W from 1 to 8"),
    "bias": ({"bias": torch.zeros(11)}, r"bias is \(11,\), expected \(12,\)"),
    "activation": ({"activation": "gelu"}, "expected None or 'silu'"),
    "directions": ({"x": torch.zeros(2, 3, 19, 12), "bias": torch.zeros(2, 12)}, "bias has 2 directions but x has 3"),
    "order": ({"orders": torch.zeros(19, dtype=torch.int64)}, "not a permutation"),
    "state": (
        {"initial_state": torch.zeros(2, 1, 12, 4)},
        r"initial_state is \(2, 1, 12, 4\), expected \(2, 1, 12, 3\)",
    ),
    "state dimensions": ({"initial_state": torch.zeros(12)}, r"initial_state is \(12,\), expected \(2, 1, 12, 3\)"),
    "lengths": ({"lengths": torch.tensor([3])}, r"lengths are \(1,\), expected \(2,\)"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 19])}, "needs a batch of 1"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(changes: dict, message: str) -> None:
    problem = conv_problem(Case())
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**problem.inputs, **problem.options, **changes})
