"""A `CustomOp` is called as it is in eager mode, and is a torch custom op to whoever looks at operations."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.custom_op import CustomOp, custom_op

_numbers = itertools.count()


class Names(TorchDispatchMode):
    """Keeps the names of the operations that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cube(monkeypatch: pytest.MonkeyPatch) -> CustomOp:
    """a x^3 and its double, with ``calls`` that went past the op."""
    number = next(_numbers)

    @custom_op(f"genssm_test::cube{number}", schema="(Tensor x, Tensor? y, float a) -> (Tensor, Tensor)")
    def forward(x, y, a):
        return a * x**3, 2 * a * x**3

    @custom_op(f"genssm_test::cube_bwd{number}", schema="(Tensor g, Tensor x, float a) -> Tensor")
    def gradient(g, x, a):
        return 3 * a * g * x**2

    def setup_context(ctx, inputs, output) -> None:
        x, _, ctx.a = inputs
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)

    def backward(ctx, first: Tensor | None, second: Tensor | None) -> tuple:
        seen.append((first is None, second is None, ctx.needs_input_grad[:2]))
        g = sum(g * k for g, k in ((first, 1), (second, 2)) if g is not None)
        return gradient(g, *ctx.saved_tensors, ctx.a), None, None

    seen: list[tuple] = []
    forward.register_fake(lambda x, y, a: (torch.empty_like(x), torch.empty_like(x)))
    gradient.register_fake(lambda g, x, a: torch.empty_like(x))
    forward.register_autograd(backward, setup_context)
    calls: list[str] = []
    for op in (forward, gradient):
        original = op.op
        monkeypatch.setattr(
            op, "op", lambda *args, op=op, original=original: (calls.append(op.name), original(*args))[1]
        )
    forward.asked, forward.seen = calls, seen
    return forward


def test_eager_calls_pass_the_op_by(cube: CustomOp) -> None:
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        y, _ = cube(x, None, 2.0)
    assert torch.equal(y, 2 * x.detach() ** 3) and not y.requires_grad
    for leaf in (x, torch.nn.Parameter(x.detach().clone())):
        y, _ = cube(leaf, None, 2.0)
        (gradient,) = torch.autograd.grad(y.sum(), leaf)
        assert torch.equal(gradient, 6 * x.detach() ** 2) and not gradient.requires_grad
    assert not cube(x.detach(), None, 2.0)[0].requires_grad
    with torch.inference_mode():
        assert cube(x, None, 1.0)[0].is_inference()
    assert cube.asked == []


def test_backward_is_told_what_the_op_s_is_told(cube: CustomOp) -> None:
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    for call in (cube, cube.op):
        cube.seen.clear()
        first, second = call(x, y, 2.0)
        first.sum().backward(retain_graph=True)
        second.sum().backward()
        assert cube.seen == [(False, True, (True, False)), (True, False, (True, False))]


def test_saved_tensors_meet_hooks_and_changes_are_noticed(cube: CustomOp) -> None:
    x = torch.randn(3, requires_grad=True)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t)[1], lambda t: t):
        cube(x, None, 1.0)
    assert len(packed) == 1 and packed[0] is x
    changed = x.clone()
    y, _ = cube(changed, None, 1.0)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("way", ["eager", "op"])
def test_second_derivatives_are_refused(cube: CustomOp, way: str) -> None:
    x = torch.randn(3, requires_grad=True)
    y, _ = (cube if way == "eager" else cube.op)(x, None, 1.0)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def _traced(call: Callable, x: Tensor) -> None:
    torch.jit.trace(lambda x: call(x)[0], x, check_trace=False)


def _dual(call: Callable, x: Tensor) -> None:
    with forward_ad.dual_level():
        call(x)


def _moded(mode: Callable) -> Callable:
    def watch(call: Callable, x: Tensor) -> None:
        with mode():
            call(x)

    return watch


WATCHERS: dict[str, Callable[[Callable, Tensor], object]] = {
    "dispatch mode": _moded(Names),
    "function mode": _moded(Function),
    "default device": _moded(lambda: torch.device("cpu")),
    "transform": lambda call, x: torch.func.functionalize(call)(x),
    "trace": _traced,
    "forward-mode derivatives": _dual,
    "subclass": lambda call, x: call(x.as_subclass(Subclass)),
    "meta": lambda call, x: call(x.to("meta")),
    "negative bit": lambda call, x: call(torch._neg_view(x)),
    "zero tensor": lambda call, x: call(torch._efficientzerotensor(3)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WATCHERS)
def test_whoever_looks_sees_the_op(cube: CustomOp, name: str) -> None:
    WATCHERS[name](lambda x: cube(x, None, 1.0), torch.randn(3))
    assert cube.asked and set(cube.asked) == {cube.name}


def test_a_negated_view_is_negated(cube: CustomOp) -> None:
    x = torch.randn(3)
    assert torch.equal(cube(torch._neg_view(x), None, 1.0)[0], -(x**3))


def test_counters_see_the_backward_too(cube: CustomOp) -> None:
    x = torch.randn(3, requires_grad=True)
    with Names() as names:
        cube(x, None, 1.0)[0].sum().backward()
    assert [name for name in names.seen if "cube" in name] == [f"genssm_test::{op}" for op in cube.asked]
    assert len(cube.asked) == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients_see_the_op(cube: CustomOp) -> None:
    x = torch.randn(3, requires_grad=True)
    y, _ = cube(x, None, 2.0)
    (found,) = torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(found, torch.diag(6 * x.detach() ** 2))
    assert len(cube.asked) == 1


def test_the_compiler_takes_the_op_whole() -> None:
    def compile_whole(module: torch.fx.GraphModule, inputs: list) -> Callable:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    targets: list[str] = []
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    found = torch.compile(causal_conv1d, fullgraph=True, backend=compile_whole)(x, weight)
    assert torch.equal(found, causal_conv1d(x, weight))
    assert "genssm.causal_conv1d_fwd.default" in targets


def test_changed_arguments_are_marked_as_changed() -> None:
    @custom_op(
        f"genssm_test::fill{next(_numbers)}", schema="(Tensor x, Tensor(a!) state) -> Tensor", mutates=("state",)
    )
    def fill(x, state):
        state.data.copy_(x)
        return x + 1

    x, state = torch.randn(3), torch.zeros(3)
    for count in (1, 2):
        fill(x, state)
        assert torch.equal(state, x) and state._version == count
    with torch.inference_mode():
        fill(x, torch.zeros(3))
    kept = torch.zeros(3)
    product = torch.randn(3, requires_grad=True) * kept
    fill(x, kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
