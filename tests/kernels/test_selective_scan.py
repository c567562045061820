"""Selective scan: every backend against the reference and the identities of the recurrence."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genssm.kernels.selective_scan import chunked, selective_scan, selective_scan_step
from tests.kernels.problems import FAST, Case, check_parity, rms_error, run, scan_problem

EVERYTHING = "u delta A B C D z delta_bias"
fast = pytest.mark.parametrize(("backend", "device"), FAST)


@fast
@pytest.mark.parametrize("length", [1, 2, 63, 64, 257])
def test_parity_at_lengths(backend: str, device: str, length: int) -> None:
    check_parity(selective_scan, scan_problem, Case(length=length, channels=37, initial=True), backend, device)


@fast
@pytest.mark.parametrize("states", [1, 3, 16, 65, 256])
def test_parity_at_states(backend: str, device: str, states: int) -> None:
    case = Case(length=34, channels=21, states=states, directions=2, order="both", initial=True)
    check_parity(selective_scan, scan_problem, case, backend, device)


OPTIONS = {
    "no batch row": Case(batch=0, directions=2, order="both", initial=True),
    "bare": Case(without="D z delta_bias", softplus=False),
    "no gate": Case(without="z"),
    "bias without softplus": Case(softplus=False),
    "two directions, all shared": Case(directions=2, order="both"),
    "two directions, all their own": Case(directions=2, order="both", own=EVERYTHING, initial=True),
    "own inputs, no orders": Case(directions=3, own="u B", reduce="none"),
    "own parameters, no orders": Case(directions=2, own="A D", initial=True),
    "own step sizes and gates": Case(directions=3, own="delta z", order="random", length=40),
    "own input maps": Case(directions=2, own="B", order="random"),
    "own output maps": Case(directions=2, own="C", order="both", reduce="none"),
    "one order": Case(directions=1, order="random", initial=True, length=70),
    "groups": Case(channels=12, groups=3, initial=True),
    "groups in directions": Case(channels=12, groups=2, directions=2, own="B C", order="random"),
    "a group for every channel": Case(channels=6, groups=6),
    "lengths": Case(batch=4, lengths=(19, 1, 0, 7), initial=True),
    "lengths in both directions": Case(batch=3, lengths=(5, 19, 18), directions=2, order="both", own="A u"),
    "lengths along random orders": Case(
        batch=3, length=40, lengths=(33, 40, 1), directions=2, order="random", initial=True, reduce="none"
    ),
    "packed": Case(batch=1, length=80, cu_seqlens=(0, 3, 40, 80), initial=True),
    "packed, both directions, empty sequences": Case(
        batch=1,
        length=45,
        cu_seqlens=(0, 0, 3, 3, 38, 45, 45),
        directions=2,
        order="both",
        own=EVERYTHING,
        initial=True,
    ),
    "packed, own inputs": Case(batch=1, length=45, cu_seqlens=(0, 40, 45), directions=2, own="u", reduce="none"),
    "packed, one sequence": Case(batch=1, length=33, cu_seqlens=(0, 33), directions=2, order="both"),
    "more than one block of work": Case(batch=3, length=33, channels=520, states=64, directions=2, order="both"),
    "many rows": Case(batch=9, length=33, channels=130, states=70, initial=True),
}


@fast
@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
def test_parity_of_options(backend: str, device: str, case: Case) -> None:
    check_parity(selective_scan, scan_problem, case, backend, device)


@fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    case = Case(length=65, channels=30, directions=2, order="both", own="A", initial=True)
    check_parity(selective_scan, scan_problem, case, backend, device, dtype)


@fast
def test_parity_of_mixed_types(backend: str, device: str) -> None:
    dtypes = {"u": torch.bfloat16, "delta": torch.float32, "B": torch.float16, "C": torch.bfloat16, "z": torch.float32}
    check_parity(selective_scan, scan_problem, Case(length=33), backend, device, dtypes)


@fast
def test_any_strides(backend: str, device: str) -> None:
    problem = scan_problem(Case(directions=2, order="both")).to(device, torch.float32)
    expected = run(selective_scan, problem, backend)
    views = {}
    for name, x in problem.inputs.items():
        if name == "u":  # every second channel of a wider tensor
            x = torch.stack([x, x], dim=-1)[..., 0]
        elif name == "z":  # channels first in memory
            x = x.mT.contiguous().mT
        elif name in ("delta", "B", "C"):  # a slice of a projection
            x = torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
        elif name == "A":  # an expanded row
            x = x[:1].expand(x.shape)
        views[name] = x.detach().requires_grad_()
    problem.inputs["A"].data.copy_(views["A"])
    expected = run(selective_scan, problem, backend)
    problem.inputs = views
    found = run(selective_scan, problem, backend)
    for name, value in expected.items():
        if backend == "triton":  # other strides are another compiled kernel, which may fuse other products
            assert rms_error(found[name], value) < 1e-6
        else:
            assert torch.equal(found[name], value)


@fast
def test_gradients_lie_as_their_inputs(backend: str, device: str) -> None:
    """Directions that lie one after the other in u, delta, B and C do so in the gradients, with the same numbers."""
    problem = scan_problem(Case(directions=2, order="both", own="u delta A B C")).to(device, torch.float32)
    expected = run(selective_scan, problem, backend)
    names = ("u", "delta", "B", "C")
    for name in names:
        x = problem.inputs[name].detach()
        problem.inputs[name] = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = run(selective_scan, problem, backend)
    for name, value in expected.items():
        assert rms_error(found[name], value) < 1e-6, name  # other strides are another kernel of Triton's
    for name in names:
        assert expected["d" + name].is_contiguous() and not found["d" + name].is_contiguous()
        assert found["d" + name].stride() == problem.inputs[name].stride()


@fast
def test_shared_arguments_equal_repeated_ones(backend: str, device: str) -> None:
    problem = scan_problem(Case(directions=2, order="both")).to(device, torch.float32)
    expected = run(selective_scan, problem, backend)
    for name, x in problem.inputs.items():
        dim = 0 if name in ("A", "D", "delta_bias") else 1
        expanded = x.detach().unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:])
        problem.inputs[name] = expanded.requires_grad_()
    found = run(selective_scan, problem, backend)
    assert torch.equal(found["y"], expected["y"])
    for name in problem.inputs:
        dim = 0 if name in ("A", "D", "delta_bias") else 1
        assert rms_error(found[f"d{name}"].sum(dim), expected[f"d{name}"]) < 1e-6


# Identities


def _flip(problem, names=("u", "delta", "B", "C", "z")) -> dict[str, Tensor]:
    return {name: x.flip(1) if name in names else x for name, x in problem.inputs.items()}


@fast
def test_reverse_is_flip_scan_flip(backend: str, device: str) -> None:
    problem = scan_problem(Case(length=45, channels=20)).to(device, torch.float32)
    backwards = torch.arange(44, -1, -1, device=device)
    y, state = selective_scan(**problem.inputs, **problem.options, orders=backwards, backend=backend)
    flipped, expected = selective_scan(**_flip(problem), **problem.options, backend=backend)
    assert torch.equal(y, flipped.flip(1))
    assert torch.equal(state, expected)


@fast
def test_order_is_permute_scan_unpermute(backend: str, device: str) -> None:
    case = Case(length=45, channels=20, order="random")
    problem = scan_problem(case).to(device, torch.float32)
    found = run(selective_scan, problem, backend)
    order = problem.options.pop("orders")[0].long()
    tokens = ("u", "delta", "B", "C", "z")
    for name in tokens:
        problem.inputs[name] = problem.inputs[name].detach()[:, order].requires_grad_()
    g = torch.Generator().manual_seed(1)
    y, state = selective_scan(**problem.inputs, **problem.options, backend=backend)
    grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).bfloat16().to(x) for x in (y, state)]
    names = list(problem.inputs)
    expected = torch.autograd.grad([y, state], list(problem.inputs.values()), [grads[0][:, order], grads[1]])
    back = torch.argsort(order)
    assert torch.equal(found["y"], y[:, back])
    assert torch.equal(found["last_state"], state)
    for name, grad in zip(names, expected):
        assert torch.equal(found[f"d{name}"], grad[:, back] if name in tokens else grad)


@fast
@pytest.mark.parametrize("cut", [1, 30, 32, 69])
def test_scan_of_parts_continues_from_the_state(backend: str, device: str, cut: int) -> None:
    problem = scan_problem(Case(length=70, initial=True)).to(device, torch.float32)
    whole, last = selective_scan(**problem.inputs, **problem.options, backend=backend)
    state, parts = problem.inputs["initial_state"], []
    for piece in (slice(0, cut), slice(cut, 70)):
        inputs = {n: x[:, piece] if x.ndim == 3 else x for n, x in problem.inputs.items()}
        y, state = selective_scan(**{**inputs, "initial_state": state}, **problem.options, backend=backend)
        parts.append(y)
    assert rms_error(torch.cat(parts, dim=1), whole) < 1e-6
    assert rms_error(state, last) < 1e-6


@fast
def test_linear_in_u(backend: str, device: str) -> None:
    problem = scan_problem(Case(length=40)).to(device, torch.float32)
    other = torch.randn_like(problem.inputs["u"])

    def scan(u: Tensor) -> Tensor:
        return selective_scan(**{**problem.inputs, "u": u}, **problem.options, backend=backend)[0]

    u = problem.inputs["u"]
    assert rms_error(scan(2 * u - 3 * other), 2 * scan(u) - 3 * scan(other)) < 1e-5


@fast
def test_rows_do_not_depend_on_the_batch(backend: str, device: str) -> None:
    problem = scan_problem(Case(batch=7, length=33, channels=37, directions=2, order="both")).to(device, torch.float32)
    whole, states = selective_scan(**problem.inputs, **problem.options, backend=backend)
    for b in range(7):
        row = {n: x[b : b + 1] if x.ndim == 3 else x for n, x in problem.inputs.items()}
        y, state = selective_scan(**row, **problem.options, backend=backend)
        if (backend, device) == ("chunked", "cuda"):  # cuBLAS chooses by the number of matrices
            assert rms_error(y[0], whole[b]) < 1e-6
        else:
            assert torch.equal(y[0], whole[b])
        assert torch.equal(state[0], states[b])


@fast
@pytest.mark.parametrize("order", [None, "both", "random"])
def test_padding_changes_nothing(backend: str, device: str, order: str | None) -> None:
    """Not even NaN in the padding, in either direction; gradients there are zero."""
    lengths = (23, 40, 1)
    case = Case(batch=3, length=40, directions=2, order=order, own="A D", lengths=lengths, initial=True)
    problem = scan_problem(case).to(device, torch.float32)
    expected = run(selective_scan, problem, backend)
    tokens = ("u", "delta", "z", "B", "C")
    for name in tokens:
        for b, size in enumerate(lengths):
            problem.inputs[name].data[b, size:] = float("nan")
    found = run(selective_scan, problem, backend)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for b, size in enumerate(lengths):
        for name in ("y", *(f"d{name}" for name in tokens)):
            assert not found[name][b, size:].any(), name
    if order == "random":
        return
    for b, size in enumerate(lengths):  # the same sequence without padding
        row = {n: x[b : b + 1, :size] if n in tokens else x for n, x in problem.inputs.items()}
        row["initial_state"] = row["initial_state"][b : b + 1]
        options = {**problem.options, "lengths": None}
        if order == "both":
            steps = torch.arange(size, device=device)
            options["orders"] = torch.stack([steps, steps.flip(0)])
        y, state = selective_scan(**row, **options, backend=backend)
        assert rms_error(y[0], found["y"][b, :size]) < 1e-6
        assert rms_error(state[0], found["last_state"][b]) < 1e-6


@fast
def test_packed_sequences_equal_separate_ones(backend: str, device: str) -> None:
    borders = (0, 5, 5, 39, 40, 75)
    case = Case(batch=1, length=75, directions=2, order="both", cu_seqlens=borders, initial=True, own="A")
    problem = scan_problem(case).to(device, torch.float32)
    packed, states = selective_scan(**problem.inputs, **problem.options, backend=backend)
    assert torch.equal(states[1], problem.inputs["initial_state"][1])  # the empty sequence
    for s, (low, high) in enumerate(itertools.pairwise(borders)):
        if low == high:
            continue
        row = {n: x[:, low:high] if n in ("u", "delta", "z", "B", "C") else x for n, x in problem.inputs.items()}
        row["initial_state"] = row["initial_state"][s : s + 1]
        steps = torch.arange(high - low, device=device)
        options = {**problem.options, "cu_seqlens": None, "orders": torch.stack([steps, steps.flip(0)])}
        y, state = selective_scan(**row, **options, backend=backend)
        assert rms_error(packed[:, low:high], y) < 1e-6
        assert rms_error(states[s], state[0]) < 1e-6


@pytest.mark.parametrize(("backend", "device"), FAST[:2])
def test_same_result_on_any_number_of_threads(backend: str, device: str) -> None:
    problem = scan_problem(Case(batch=5, length=65, channels=75, states=16)).to(device, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(selective_scan(**problem.inputs, **problem.options, backend=backend)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# Numbers


@fast
def test_strong_decay_stays_finite(backend: str, device: str) -> None:
    problem = scan_problem(Case(length=70)).to(device, torch.float32)
    problem.inputs["delta"].data.mul_(30.0)  # both branches of softplus; summed decays far beyond float32's range
    problem.inputs["A"].data.mul_(16.0)
    expected = run(selective_scan, problem.to("cpu", torch.float64), "reference")
    found = run(selective_scan, problem, backend)
    for name in expected:
        assert rms_error(found[name], expected[name]) < 1e-5, name


@fast
def test_not_a_number_stays_in_its_channel(backend: str, device: str) -> None:
    problem = scan_problem(Case(length=40, channels=40)).to(device, torch.float32)
    problem.inputs["u"].data[1, 20, 33] = float("nan")
    y, _ = selective_scan(**problem.inputs, **problem.options, backend=backend)
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[1, 20:, 33] = True
    assert torch.equal(y.isnan(), bad)


def test_memory_does_not_hold_all_states() -> None:
    """No tensor of the chunked path comes near L x E x N elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return out

    length, channels, states = 2048, 64, 16
    u = torch.randn(1, 1, length, channels)
    A, B = -torch.rand(1, channels, states), torch.randn(1, 1, length, 1, states)
    args = (u, u.abs(), A, B, B, None, None, None, False, None, None, None, None, True)
    with Largest():
        out, _, saved = chunked.scan_forward(*args)
        chunked.scan_backward(torch.ones_like(out), None, saved, *args)
    assert largest <= length * channels * states / 16


# PyTorch's machinery


@fast
@pytest.mark.parametrize("outermost", [False, True])
def test_opcheck(backend: str, device: str, outermost: bool) -> None:
    K, E, N, L = 2, 4, 3, 5
    g = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g).to(device)

    orders = torch.stack([torch.arange(L), torch.arange(L).flip(0)]).int().to(device)
    tensors = [
        random(K, 2, L, E).transpose(0, 1) if outermost else random(2, 1, L, E),
        random(K, 2, L, E).transpose(0, 1) if outermost else random(2, K, L, E),
        -random(K, E, N).abs(),
        random(2, 1, L, 2, N),
        random(2, 1, L, 2, N),
    ]
    tensors += [random(1, E), random(2, 1, L, E), random(1, E)]
    initial = random(2, K, E, N)
    args = (*tensors, True, orders, initial, None, None, True)
    out, last, saved = torch.ops.genssm.selective_scan_fwd(*args, True, backend)
    torch.library.opcheck(
        torch.ops.genssm.selective_scan_bwd.default, (random(*out.shape), random(*last.shape), saved, *args, backend)
    )
    args = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    for return_last_state in (True, False):
        torch.library.opcheck(torch.ops.genssm.selective_scan_fwd.default, (*args, return_last_state, backend))


@fast
def test_without_the_last_state(backend: str, device: str) -> None:
    problem = scan_problem(Case(length=5, states=16, order="random")).to(device, torch.float32)
    problem.options["return_last_state"] = False
    expected, found = (selective_scan(**problem.inputs, **problem.options, backend=b) for b in ("reference", backend))
    inputs = list(problem.inputs.values())
    gradients = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    assert rms_error(found, expected) < 3e-6
    assert all(rms_error(a, b) < 3e-6 for a, b in zip(*gradients))


def test_compiles_with_inductor() -> None:
    problem = scan_problem(Case()).to("cpu", torch.float32)

    def loss(inputs: dict) -> Tensor:
        return selective_scan(**inputs, **problem.options)[0].square().sum()

    expected = torch.autograd.grad(loss(problem.inputs), list(problem.inputs.values()))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(problem.inputs), list(problem.inputs.values()))
    assert all(rms_error(a, b) < 1e-6 for a, b in zip(found, expected))


@fast
def test_under_autocast(backend: str, device: str) -> None:
    """The projections before the scan come out in bfloat16, parameters stay float32."""
    problem = scan_problem(Case(length=20)).to(device, torch.float32)
    projection = torch.nn.Linear(12, 12).to(device)
    with torch.autocast(device, torch.bfloat16):
        inputs = {**problem.inputs, "u": projection(problem.inputs["u"]), "z": projection(problem.inputs["z"])}
        y, state = selective_scan(**inputs, **problem.options, backend=backend)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    y.float().sum().backward()
    grads = [*(x.grad for x in problem.inputs.values()), projection.weight.grad]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in grads)


def test_counts_operations() -> None:
    problem = scan_problem(Case(directions=2, order="both")).to("cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        selective_scan(**problem.inputs, **problem.options)[0].sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    states = 2 * 2 * 19 * 12 * 4
    assert counts == {"genssm.selective_scan_fwd": 7 * states, "genssm.selective_scan_bwd": 20 * states}


# One token at a time


@pytest.mark.parametrize("case", [Case(initial=True), Case(groups=3, directions=2, own="A u B C", initial=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_scan(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    problem = scan_problem(case).to(device.type, dtype)
    expected, last = selective_scan(**problem.inputs, **problem.options, backend="reference")
    state = problem.inputs.pop("initial_state").detach().clone()
    for t in range(case.length):
        inputs = {}
        for name, x in problem.inputs.items():
            if name in ("A", "D", "delta_bias"):
                inputs[name] = x
            else:  # the token dimension follows the batch, or the directions where there are any
                inputs[name] = x.select(1 if x.ndim == 3 else 2, t)
        y = selective_scan_step(state, **inputs, delta_softplus=True)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected[:, t], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_step_refuses_wrong_shapes() -> None:
    state, u = torch.zeros(2, 1, 8, 4), torch.zeros(2, 8)
    A, B = torch.zeros(8, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"state is \(2, 8, 4\), expected"):
        selective_scan_step(state[:, 0], u, u, A, B, B)
    with pytest.raises(ValueError, match=r"B is \(2, 5\), expected \(2, 4\)"):
        selective_scan_step(state, u, u, A, torch.zeros(2, 5), B)
    with pytest.raises(ValueError, match="A has 2 directions but the state has 1"):
        selective_scan_step(state, u, u, torch.zeros(2, 8, 4), B, B)
    with pytest.raises(ValueError, match="D has 2 directions but the state has 1"):
        selective_scan_step(state, u, u, A, B, B, torch.zeros(2, 8))


# Errors


def _with(**changes: Tensor | object):
    problem = scan_problem(Case())
    return {**problem.inputs, **problem.options, **changes}


MISTAKES = {
    "u dimensions": ({"u": torch.zeros(19, 12)}, r"u is \(19, 12\)"),
    "u type": ({"u": torch.zeros(2, 19, 12, dtype=torch.int64)}, "expected floats"),
    "no tokens": ({"u": torch.zeros(2, 0, 12)}, "L >= 1"),
    "delta": ({"delta": torch.zeros(2, 18, 12)}, r"delta is \(2, 18, 12\), expected \(2, 19, 12\) or \(2, K, 19, 12\)"),
    "A": ({"A": torch.zeros(11, 4)}, r"A is \(11, 4\), expected \(12, 4\) or \(K, 12, 4\)"),
    "too many states": ({"A": torch.zeros(12, 257)}, "N from 1 to 256"),
    "B": ({"B": torch.zeros(2, 19, 5)}, r"B is \(2, 19, 5\), expected \(2, 19, 4\)"),
    "groups": ({"C": torch.zeros(2, 1, 19, 5, 4)}, "5 groups, which do not divide 12 channels"),
    "unequal groups": (
        {"B": torch.zeros(2, 1, 19, 2, 4), "C": torch.zeros(2, 1, 19, 3, 4)},
        "B has 2 groups and the other map 3",
    ),
    "D": ({"D": torch.zeros(13)}, r"D is \(13,\), expected \(12,\)"),
    "directions": ({"D": torch.zeros(3, 12), "A": torch.zeros(2, 12, 4)}, "A has 2 directions but D has 3"),
    "order length": ({"orders": torch.arange(18)}, r"orders are \(1, 18\), expected \(K, 19\)"),
    "order type": ({"orders": torch.zeros(19)}, "expected integers"),
    "order twice": ({"orders": torch.zeros(19, dtype=torch.int32)}, "not a permutation"),
    "order range": ({"orders": torch.arange(1, 20)}, r"orders hold 1\.\.19, expected rows 0\.\.18"),
    "state": ({"initial_state": torch.zeros(2, 12, 4)}, r"initial_state is \(2, 12, 4\), expected \(2, 1, 12, 4\)"),
    "lengths": ({"lengths": torch.tensor([3])}, r"lengths are \(1,\), expected \(2,\)"),
    "both": ({"lengths": torch.tensor([3, 3]), "cu_seqlens": torch.tensor([0, 19])}, "both given"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 19])}, "needs a batch of 1"),
    "reduce": ({"reduce": "mean"}, "expected 'sum' or 'none'"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**_with(**changes))
