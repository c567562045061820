"""The Mamba-2 scan: every backend against the reference and the identities of the recurrence."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genssm.kernels.ssd import chunked, ssd, ssd_step
from tests.kernels.problems import FAST, Case, check_parity, rms_error, run, ssd_problem

EVERYTHING = "x dt A B C D z dt_bias"
TOKENS = ("x", "dt", "B", "C", "z")
PATHS = [path for path in FAST if path.values[0] != "compiled"]
fast = pytest.mark.parametrize(("backend", "device"), PATHS)


@fast
@pytest.mark.parametrize("length", [1, 2, 63, 64, 257])
def test_parity_at_lengths(backend: str, device: str, length: int) -> None:
    check_parity(ssd, ssd_problem, Case(length=length, channels=33, initial=True), backend, device)


@fast
@pytest.mark.parametrize("states", [1, 3, 16, 65, 256])
def test_parity_at_states(backend: str, device: str, states: int) -> None:
    case = Case(length=70, channels=21, states=states, directions=2, order="both", initial=True)
    check_parity(ssd, ssd_problem, case, backend, device)


@fast
@pytest.mark.parametrize("width", [1, 7, 64, 65, 256])
def test_parity_at_widths(backend: str, device: str, width: int) -> None:
    case = Case(length=70, channels=2 * width, heads=2, states=5, directions=2, order="both", initial=True)
    check_parity(ssd, ssd_problem, case, backend, device)


def _products(backend: str, dtype: torch.dtype) -> float:
    """Error of the products of matrices in Triton, which takes bfloat16 or TF32 where the inputs hold no more."""
    return 0.0 if backend != "triton" else 1e-2 if dtype == torch.bfloat16 else 2e-3


OPTIONS = {
    "no batch row": Case(batch=0, directions=2, order="both", initial=True),
    "bare": Case(without="D z dt_bias", softplus=False),
    "no gate": Case(without="z"),
    "bias without softplus": Case(softplus=False),
    "one head": Case(heads=1, length=70),
    "two directions, all shared": Case(directions=2, order="both"),
    "two directions, all their own": Case(directions=2, order="both", own=EVERYTHING, initial=True, length=70),
    "own inputs, no orders": Case(directions=3, own="x B", reduce="none"),
    "own parameters, no orders": Case(directions=2, own="A D", initial=True),
    "own step sizes and gates": Case(directions=3, own="dt z", order="random", length=70),
    "own input maps": Case(directions=2, own="B", order="random"),
    "own output maps": Case(directions=2, own="C", order="both", reduce="none"),
    "one order": Case(directions=1, order="random", initial=True, length=130),
    "groups": Case(channels=24, heads=6, groups=3, initial=True),
    "groups in directions": Case(channels=24, heads=6, groups=2, directions=2, own="B C", order="random", length=70),
    "a group for every head": Case(channels=12, heads=6, groups=6),
    "lengths": Case(batch=4, length=80, lengths=(80, 1, 0, 66), initial=True),
    "lengths in both directions": Case(batch=3, lengths=(5, 19, 18), directions=2, order="both", own="A x"),
    "lengths along random orders": Case(
        batch=3, length=80, lengths=(33, 80, 1), directions=2, order="random", initial=True, reduce="none"
    ),
    "packed": Case(batch=1, length=140, cu_seqlens=(0, 3, 70, 140), initial=True),
    "packed, both directions, empty sequences": Case(
        batch=1,
        length=85,
        cu_seqlens=(0, 0, 3, 3, 78, 85, 85),
        directions=2,
        order="both",
        own=EVERYTHING,
        initial=True,
    ),
    "packed, own inputs": Case(batch=1, length=75, cu_seqlens=(0, 70, 75), directions=2, own="x", reduce="none"),
    "packed, one sequence": Case(batch=1, length=65, cu_seqlens=(0, 65), directions=2, order="both"),
    "more than one block of work": Case(batch=3, length=70, channels=600, heads=60, directions=2, order="both"),
    "many rows": Case(batch=9, length=66, channels=96, heads=24, initial=True),
}


@fast
@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
def test_parity_of_options(backend: str, device: str, case: Case) -> None:
    check_parity(ssd, ssd_problem, case, backend, device)


@fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    case = Case(length=65, channels=30, directions=2, order="both", own="A", initial=True)
    check_parity(ssd, ssd_problem, case, backend, device, dtype, least=_products(backend, dtype))


@fast
def test_parity_of_mixed_types(backend: str, device: str) -> None:
    dtypes = {"x": torch.bfloat16, "dt": torch.float32, "B": torch.float16, "C": torch.bfloat16, "z": torch.float32}
    check_parity(ssd, ssd_problem, Case(length=70), backend, device, dtypes, least=_products(backend, torch.float16))


@fast
def test_any_strides(backend: str, device: str) -> None:
    problem = ssd_problem(Case(directions=2, order="both")).to(device, torch.float32)
    problem.inputs["A"].data.copy_(problem.inputs["A"][:1].detach().clone())
    expected = run(ssd, problem, backend)
    views = {}
    for name, x in problem.inputs.items():
        if name == "x":  # every second channel of a wider tensor
            x = torch.stack([x, x], dim=-1)[..., 0]
        elif name == "z":  # heads first in memory
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif name in ("dt", "B", "C"):  # a slice of a projection
            x = torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
        elif name == "A":
            x = x[:1].expand(x.shape)
        views[name] = x.detach().requires_grad_()
    problem.inputs = views
    found = run(ssd, problem, backend)
    for name, value in expected.items():
        if backend == "triton":  # other strides are another compiled kernel, which may fuse other products
            assert rms_error(found[name], value) < 1e-6
        else:
            assert torch.equal(found[name], value)


@fast
def test_shared_arguments_equal_repeated_ones(backend: str, device: str) -> None:
    problem = ssd_problem(Case(directions=2, order="both")).to(device, torch.float32)
    expected = run(ssd, problem, backend)
    for name, x in problem.inputs.items():
        dim = 1 if name in TOKENS else 0
        expanded = x.detach().unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:])
        problem.inputs[name] = expanded.requires_grad_()
    found = run(ssd, problem, backend)
    assert torch.equal(found["y"], expected["y"])
    for name in problem.inputs:
        dim = 1 if name in TOKENS else 0
        assert rms_error(found[f"d{name}"].sum(dim), expected[f"d{name}"]) < 1e-6


# Identities


@fast
def test_reverse_is_flip_scan_flip(backend: str, device: str) -> None:
    problem = ssd_problem(Case(length=75, channels=21)).to(device, torch.float32)
    backwards = torch.arange(74, -1, -1, device=device)
    y, state = ssd(**problem.inputs, **problem.options, orders=backwards, backend=backend)
    inputs = {name: x.flip(1) if name in TOKENS else x for name, x in problem.inputs.items()}
    flipped, expected = ssd(**inputs, **problem.options, backend=backend)
    assert torch.equal(y, flipped.flip(1))
    assert torch.equal(state, expected)


@fast
def test_order_is_permute_scan_unpermute(backend: str, device: str) -> None:
    problem = ssd_problem(Case(length=75, channels=21, order="random")).to(device, torch.float32)
    found = run(ssd, problem, backend)
    order = problem.options.pop("orders")[0].long()
    for name in TOKENS:
        problem.inputs[name] = problem.inputs[name].detach()[:, order].requires_grad_()
    g = torch.Generator().manual_seed(1)
    y, state = ssd(**problem.inputs, **problem.options, backend=backend)
    grads = [torch.randn(x.shape, generator=g, dtype=torch.float64).bfloat16().to(x) for x in (y, state)]
    names = list(problem.inputs)
    expected = torch.autograd.grad([y, state], list(problem.inputs.values()), [grads[0][:, order], grads[1]])
    back = torch.argsort(order)
    assert torch.equal(found["y"], y[:, back])
    assert torch.equal(found["last_state"], state)
    for name, grad in zip(names, expected):
        assert torch.equal(found[f"d{name}"], grad[:, back] if name in TOKENS else grad)


@fast
@pytest.mark.parametrize("cut", [1, 30, 64, 129])
def test_scan_of_parts_continues_from_the_state(backend: str, device: str, cut: int) -> None:
    problem = ssd_problem(Case(length=130, initial=True)).to(device, torch.float32)
    whole, last = ssd(**problem.inputs, **problem.options, backend=backend)
    state, parts = problem.inputs["initial_state"], []
    for piece in (slice(0, cut), slice(cut, 130)):
        inputs = {n: x[:, piece] if n in TOKENS else x for n, x in problem.inputs.items()}
        y, state = ssd(**{**inputs, "initial_state": state}, **problem.options, backend=backend)
        parts.append(y)
    assert rms_error(torch.cat(parts, dim=1), whole) < 1e-6
    assert rms_error(state, last) < 1e-6


@fast
def test_linear_in_x(backend: str, device: str) -> None:
    problem = ssd_problem(Case(length=70)).to(device, torch.float32)
    other = torch.randn_like(problem.inputs["x"])

    def scan(x: Tensor) -> Tensor:
        return ssd(**{**problem.inputs, "x": x}, **problem.options, backend=backend)[0]

    x = problem.inputs["x"]
    assert rms_error(scan(2 * x - 3 * other), 2 * scan(x) - 3 * scan(other)) < 1e-5


@fast
def test_rows_do_not_depend_on_the_batch(backend: str, device: str) -> None:
    case = Case(batch=7, length=66, channels=66, heads=6, groups=2, states=17, directions=2, order="both")
    problem = ssd_problem(case).to(device, torch.float32)
    whole, states = ssd(**problem.inputs, **problem.options, backend=backend)
    for b in range(7):
        row = {n: x[b : b + 1] if n in TOKENS else x for n, x in problem.inputs.items()}
        y, state = ssd(**row, **problem.options, backend=backend)
        if (backend, device) == ("chunked", "cuda"):  # cuBLAS chooses by the number of matrices
            assert rms_error(y[0], whole[b]) < 1e-6
            assert rms_error(state[0], states[b]) < 1e-6
        else:
            assert torch.equal(y[0], whole[b])
            assert torch.equal(state[0], states[b])


@fast
@pytest.mark.parametrize("order", [None, "both", "random"])
def test_padding_changes_nothing(backend: str, device: str, order: str | None) -> None:
    """Not even NaN in the padding, in either direction; gradients there are zero."""
    lengths = (66, 80, 1)
    case = Case(batch=3, length=80, directions=2, order=order, own="A D", lengths=lengths, initial=True)
    problem = ssd_problem(case).to(device, torch.float32)
    expected = run(ssd, problem, backend)
    for name in TOKENS:
        for b, size in enumerate(lengths):
            problem.inputs[name].data[b, size:] = float("nan")
    found = run(ssd, problem, backend)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for b, size in enumerate(lengths):
        for name in ("y", *(f"d{name}" for name in TOKENS)):
            assert not found[name][b, size:].any(), name
    if order == "random":
        return
    for b, size in enumerate(lengths):  # the same sequence without padding
        row = {n: x[b : b + 1, :size] if n in TOKENS else x for n, x in problem.inputs.items()}
        row["initial_state"] = row["initial_state"][b : b + 1]
        options = {**problem.options, "lengths": None}
        if order == "both":
            steps = torch.arange(size, device=device)
            options["orders"] = torch.stack([steps, steps.flip(0)])
        y, state = ssd(**row, **options, backend=backend)
        assert rms_error(y[0], found["y"][b, :size]) < 1e-6
        assert rms_error(state[0], found["last_state"][b]) < 1e-6


@fast
def test_packed_sequences_equal_separate_ones(backend: str, device: str) -> None:
    borders = (0, 5, 5, 79, 80, 155)
    case = Case(batch=1, length=155, directions=2, order="both", cu_seqlens=borders, initial=True, own="A")
    problem = ssd_problem(case).to(device, torch.float32)
    packed, states = ssd(**problem.inputs, **problem.options, backend=backend)
    assert torch.equal(states[1], problem.inputs["initial_state"][1])  # the empty sequence
    for s, (low, high) in enumerate(itertools.pairwise(borders)):
        if low == high:
            continue
        row = {n: x[:, low:high] if n in TOKENS else x for n, x in problem.inputs.items()}
        row["initial_state"] = row["initial_state"][s : s + 1]
        steps = torch.arange(high - low, device=device)
        options = {**problem.options, "cu_seqlens": None, "orders": torch.stack([steps, steps.flip(0)])}
        y, state = ssd(**row, **options, backend=backend)
        assert rms_error(packed[:, low:high], y) < 1e-6
        assert rms_error(states[s], state[0]) < 1e-6


def test_same_result_on_any_number_of_threads() -> None:
    problem = ssd_problem(Case(batch=5, length=130, channels=75, states=16)).to("cpu", torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ssd(**problem.inputs, **problem.options, backend="chunked")[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# Numbers


@fast
@pytest.mark.parametrize("without", ["", "dt_bias"])
def test_strong_decay_stays_exact(backend: str, device: str, without: str) -> None:
    """Summed decays far beyond float32's range, and ordinary steps between steps that wipe the state out."""
    problem = ssd_problem(Case(length=140, without=without)).to(device, torch.float32)
    problem.inputs["dt"].data.mul_(30.0)  # both branches of softplus
    problem.inputs["A"].data.mul_(16.0)
    expected = run(ssd, problem.to("cpu", torch.float64), "reference")
    found = run(ssd, problem, backend)
    for name in expected:
        assert rms_error(found[name], expected[name]) < 1e-5, name


@fast
def test_not_a_number_stays_in_its_channel_and_chunk(backend: str, device: str) -> None:
    problem = ssd_problem(Case(length=200, channels=39)).to(device, torch.float32)
    problem.inputs["x"].data[1, 150, 2, 3] = float("nan")
    y, _ = ssd(**problem.inputs, **problem.options, backend=backend)
    allowed = torch.zeros_like(y, dtype=torch.bool)
    allowed[1, 128:, 2, 3] = True
    assert y[1, 150:, 2, 3].isnan().all()
    assert not (y.isnan() & ~allowed).any()


def test_memory_does_not_hold_all_states() -> None:
    """No tensor of the chunked path comes near L x H x P x N elements."""
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

    length, heads, width, states = 2048, 4, 16, 64
    x, dt = torch.randn(1, 1, length, heads, width), torch.rand(1, 1, length, heads)
    A, B = -torch.rand(1, heads), torch.randn(1, 1, length, 1, states)
    args = (x, dt, A, B, B, None, None, None, False, None, None, None, None, True)
    with Largest():
        out, _, saved = chunked.ssd_forward(*args)
        chunked.ssd_backward(torch.ones_like(out), None, saved, *args)
    assert largest <= length * heads * width * states / 32


# PyTorch's machinery


@fast
def test_opcheck(backend: str, device: str) -> None:
    K, L, H, P, G, N = 2, 5, 4, 3, 2, 3
    g = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g).to(device)

    orders = torch.stack([torch.arange(L), torch.arange(L).flip(0)]).int().to(device)
    tensors = [random(2, 1, L, H, P), random(2, K, L, H), -random(K, H).abs()]
    tensors += [random(2, 1, L, G, N), random(2, K, L, G, N), random(1, H), random(2, 1, L, H, P), random(1, H)]
    args = (*tensors, True, orders, random(2, K, H, P, N), None, None, True, backend)
    out, last, saved = torch.ops.genssm.ssd_fwd(*args)
    torch.library.opcheck(torch.ops.genssm.ssd_bwd.default, (random(*out.shape), random(*last.shape), saved, *args))
    args = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    torch.library.opcheck(torch.ops.genssm.ssd_fwd.default, args)


@fast
def test_under_autocast(backend: str, device: str) -> None:
    """The projections before the scan come out in bfloat16, parameters stay float32."""
    problem = ssd_problem(Case(length=20)).to(device, torch.float32)
    projection = torch.nn.Linear(4, 4).to(device)
    with torch.autocast(device, torch.bfloat16):
        inputs = {**problem.inputs, "x": projection(problem.inputs["x"]), "z": projection(problem.inputs["z"])}
        y, state = ssd(**inputs, **problem.options, backend=backend)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    y.float().sum().backward()
    grads = [*(x.grad for x in problem.inputs.values()), projection.weight.grad]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in grads)


def test_counts_operations() -> None:
    problem = ssd_problem(Case(directions=2, order="both")).to("cpu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        ssd(**problem.inputs, **problem.options)[0].sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    states = 2 * 2 * 19 * 12 * 4
    assert counts == {"genssm.ssd_fwd": 5 * states, "genssm.ssd_bwd": 13 * states}


# One token at a time


@pytest.mark.parametrize(
    "case", [Case(initial=True), Case(heads=6, groups=3, directions=2, own="A x B C", initial=True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_scan(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    problem = ssd_problem(case).to(device.type, dtype)
    expected, last = ssd(**problem.inputs, **problem.options, backend="reference")
    state = problem.inputs.pop("initial_state").detach().clone()
    own = case.own.split()
    for t in range(case.length):
        at = {n: x.select(2 if n in own else 1, t) if n in TOKENS else x for n, x in problem.inputs.items()}
        y = ssd_step(state, **at, dt_softplus=True)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected[:, t], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_step_refuses_wrong_shapes() -> None:
    state, x, dt = torch.zeros(2, 1, 8, 3, 4), torch.zeros(2, 8, 3), torch.zeros(2, 8)
    A, B = torch.zeros(8), torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match=r"state is \(2, 8, 3, 4\), expected"):
        ssd_step(state[:, 0], x, dt, A, B, B)
    with pytest.raises(ValueError, match=r"B is \(2, 1, 5\), expected \(2, G, 4\)"):
        ssd_step(state, x, dt, A, torch.zeros(2, 1, 5), B)
    with pytest.raises(ValueError, match="A has 2 directions but the state has 1"):
        ssd_step(state, x, dt, torch.zeros(2, 8), B, B)
    with pytest.raises(ValueError, match="D has 2 directions but the state has 1"):
        ssd_step(state, x, dt, A, B, B, torch.zeros(2, 8))


# Errors

MISTAKES = {
    "x dimensions": ({"x": torch.zeros(19, 3, 4)}, r"x is \(19, 3, 4\)"),
    "x type": ({"x": torch.zeros(2, 19, 3, 4, dtype=torch.int64)}, "expected floats"),
    "no tokens": ({"x": torch.zeros(2, 0, 3, 4)}, "L and H from 1"),
    "too wide": ({"x": torch.zeros(2, 19, 3, 257)}, "P from 1 to 256"),
    "dt": ({"dt": torch.zeros(2, 18, 3)}, r"dt is \(2, 18, 3\), expected \(2, 19, 3\) or \(2, K, 19, 3\)"),
    "A": ({"A": torch.zeros(4)}, r"A is \(4,\), expected \(3,\) or \(K, 3\)"),
    "too many states": ({"B": torch.zeros(2, 19, 1, 257)}, "N from 1 to 256"),
    "B": ({"B": torch.zeros(2, 18, 1, 4)}, r"B is \(2, 18, 1, 4\), expected \(2, 19, G, N\)"),
    "no groups": ({"C": torch.zeros(2, 19, 4)}, r"C is \(2, 19, 4\), expected \(2, 19, G, N\)"),
    "groups": ({"C": torch.zeros(2, 19, 2, 4)}, "2 groups, which do not divide 3 heads"),
    "unequal maps": ({"C": torch.zeros(2, 19, 3, 4)}, r"groups and states \(1, 4\) and \(3, 4\)"),
    "D": ({"D": torch.zeros(13)}, r"D is \(13,\), expected \(3,\)"),
    "directions": ({"D": torch.zeros(3, 3), "A": torch.zeros(2, 3)}, "A has 2 directions but D has 3"),
    "order length": ({"orders": torch.arange(18)}, r"orders are \(1, 18\), expected \(K, 19\)"),
    "order twice": ({"orders": torch.zeros(19, dtype=torch.int32)}, "not a permutation"),
    "state": ({"initial_state": torch.zeros(2, 3, 4, 4)}, r"initial_state is \(2, 3, 4, 4\), expected \(2, 1, 3, 4, 4"),
    "lengths": ({"lengths": torch.tensor([3])}, r"lengths are \(1,\), expected \(2,\)"),
    "both": ({"lengths": torch.tensor([3, 3]), "cu_seqlens": torch.tensor([0, 19])}, "both given"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 19])}, "needs a batch of 1"),
    "reduce": ({"reduce": "mean"}, "expected 'sum' or 'none'"),
    "no C": ({"backend": "compiled"}, "ssd has no compiled backend, only reference, chunked and triton; use backend="),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(changes: dict, message: str) -> None:
    problem = ssd_problem(Case())
    with pytest.raises(ValueError, match=message):
        ssd(**{**problem.inputs, **problem.options, **changes})
