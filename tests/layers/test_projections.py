"""Products around the scan: the numbers of the modules, no pass over all tokens beside them, and who gets which."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.layers import Mamba, projections
from genssm.layers.projections import bare, halves, steps_and_maps

B, L, E, R, N = 3, 41, 24, 5, 4
SIZES = (R, N, N)
LAYOUTS = {  # number of weights and of directions; directions may lie in the batch, or there is none
    "two directions": (2, 2, True),
    "two directions within the batch": (2, 2, False),
    "three orders": (1, 3, True),
    "one direction": (1, 1, True),
    "plain": (1, 0, True),
}
PASSES = ("copy_", "clone", "cat", "stack", "zero_", "fill_", "add", "add_", "sum", "contiguous")


def modules(sets: int) -> tuple[list[nn.Linear], list[nn.Linear]]:
    torch.manual_seed(0)
    return [nn.Linear(E, sum(SIZES), bias=False) for _ in range(sets)], [
        nn.Linear(R, E, bias=False) for _ in range(sets)
    ]


def tokens(directions: int, outermost: bool, width: int = E) -> torch.Tensor:
    if not directions:
        return torch.randn(B, L, width)
    if outermost:
        return torch.randn(directions, B, L, width).transpose(0, 1)
    return torch.randn(B, directions, L, width)


def watched(module: nn.Module) -> None:
    """A hook that does nothing."""
    module.register_forward_hook(lambda *_: None)


def graph_nodes(y: torch.Tensor) -> set[str]:
    """Names of the nodes of autograd's graph of ``y``."""
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        names.add(type(node).__name__)
        todo += [following for following, _ in node.next_functions if following is not None]
    return names


def big_passes(call: Callable[[], object], least: int) -> list[tuple[str, list]]:
    """Operations of ``call`` that pass over tensors of ``least`` numbers and are no products."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        call()
    passes = []
    for event in found.events():
        sizes = [torch.Size(shape).numel() for shape in event.input_shapes if shape]
        if event.name.removeprefix("aten::") in PASSES and max(sizes, default=0) >= least:
            passes.append((event.name, event.input_shapes))
    return passes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_same_as_modules(layout: str, autocast: bool) -> None:
    sets, *shape = LAYOUTS[layout]
    x_projs, dt_projs = modules(sets)
    x = tokens(*shape).requires_grad_()
    weights = [module.weight for module in (*x_projs, *dt_projs)]
    grads, results = None, []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            u, *rest = steps_and_maps(x, x_projs, dt_projs, SIZES)
            assert u.data_ptr() == x.data_ptr() or autocast
        if grads is None:
            grads = [torch.randn_like(t) for t in (u, *rest)]
        out = torch.autograd.grad((u, *rest), (x, *weights), [g.clone() for g in grads], materialize_grads=True)
        results.append((rest, out))
        assert bare(x, *x_projs, *dt_projs) == (len(results) == 1)
        watched(x_projs[-1])
    (first, first_grads), (second, second_grads) = results
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    for a, b in zip(first_grads, second_grads):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-5, atol=3e-2 if autocast else 1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "within" not in name])
def test_no_pass_over_all_tokens(layout: str) -> None:
    sets, *shape = LAYOUTS[layout]
    x_projs, dt_projs = modules(sets)
    x = tokens(*shape).requires_grad_()
    weights = [module.weight for module in (*x_projs, *dt_projs)]
    found = steps_and_maps(x, x_projs, dt_projs, SIZES)
    assert not big_passes(lambda: steps_and_maps(x, x_projs, dt_projs, SIZES), x.numel() // 2)
    grads = [tokens(*shape, width=t.shape[-1]) for t in found]
    gradients = []
    assert not big_passes(lambda: gradients.extend(torch.autograd.grad(found, (x, *weights), grads)), x.numel() // 2)
    assert gradients[0].data_ptr() == grads[0].data_ptr(), "added in place"
    assert gradients[0].stride() == x.stride()


def test_convolution_hands_over_whole_matrices() -> None:
    """Directions outermost in memory, and so is the gradient, which the convolution takes as it is."""
    mixer = Mamba(12, bidirectional=True)
    orders = torch.stack([torch.randperm(L) for _ in range(2)]).int()
    x = causal_conv1d(torch.randn(B, L, E, requires_grad=True), *mixer.taps(), orders=orders)
    assert x.shape == (B, 2, L, E) and x.transpose(0, 1).is_contiguous()
    _, delta, maps, _ = mixer._project_steps(x)
    assert delta.stride() == x.stride()
    assert maps.transpose(0, 1)[0].flatten(0, 1).stride() == (mixer.dt_rank + 2 * mixer.d_state, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(48, 16, 16), (7, 16, 16), (4, 2, 2), (4, 5, 3)])
def test_columns_are_copied(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Whether they consist of whole words or not."""
    joined = torch.zeros(3, 5, sum(sizes), dtype=dtype)
    parts = [torch.randn(3, 5, size).to(dtype) for size in sizes]
    for column, part in zip(joined.split(sizes, dim=-1), parts):
        projections._copy(column, part)
    assert torch.equal(joined, torch.cat(parts, dim=-1))


@pytest.mark.parametrize("autocast", [False, True])
def test_halves(autocast: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 2 * E, bias=False), torch.randn(B, L, 12, requires_grad=True)
    results = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = halves(linear, x)
            # joining gradients would be a pass of its own
            assert type(found[0].grad_fn).__name__ == ("SplitBackward0" if results else "_HalvesBackward")
        loss = sum((i + 1) * y.float().square().sum() for i, y in enumerate(found))
        results.append((*found, *torch.autograd.grad(loss, (x, linear.weight))))
        watched(linear)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-5, atol=3e-2 if autocast else 1e-5)


def test_gradients_of_weights_under_autocast(device: torch.device) -> None:
    """In the type of the weights, as sums of products of what autocast rounded; a GPU does not round them again."""
    torch.manual_seed(0)
    rows, mixer = torch.randn(2, 64, 16, device=device).bfloat16(), Mamba(16, dt_rank=8).to(device)
    widened = device.type == "cuda" and projections._WIDENS
    e, r, n = 32, 8, 16
    given = [torch.randn(2, 64, width, device=device).bfloat16() for width in (e, e, e, e, n, n)]
    u = torch.randn(2, 64, e, device=device).bfloat16().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        dweight = torch.autograd.grad(halves(mixer.in_proj, rows), mixer.in_proj.weight, given[:2])[0]
        found = steps_and_maps(u, [mixer.x_proj], [mixer.dt_proj], (r, n, n))
        weights = (mixer.x_proj.weight, mixer.dt_proj.weight)
        of_x, of_dt = torch.autograd.grad(found, weights, [x.clone() for x in given[2:]])
        ddt = given[3] @ mixer.dt_proj.weight
        dt = u @ mixer.x_proj.weight[:r].t()
    for got, grad, x in (
        (dweight, torch.cat(given[:2], -1), rows),
        (of_x, torch.cat([ddt, *given[4:]], -1), u.detach()),
        (of_dt, given[3], dt.detach()),
    ):
        expected = grad.flatten(0, 1).float().t() @ x.flatten(0, 1).float()
        assert got.dtype == torch.float32
        error = (got - expected).norm() / expected.norm()
        assert error < (1e-4 if widened else 5e-3)
        assert torch.equal(got, got.bfloat16().float()) == (not widened)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_batched_gradients_are_those_one_by_one(bidirectional: bool) -> None:
    torch.manual_seed(0)
    mixer, h = Mamba(8, bidirectional=bidirectional, d_state=3).double(), torch.randn(2, 6, 8).double()
    y, parameters = mixer(h), list(mixer.parameters())
    assert {"_HalvesBackward", "_StepsAndMapsBackward"} <= graph_nodes(y)
    grads = torch.randn(3, *y.shape, dtype=y.dtype)
    found = torch.autograd.grad(y, parameters, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, parameters, g, retain_graph=True) for g in grads]
    for a, b in zip(found, zip(*one_by_one)):
        torch.testing.assert_close(a, torch.stack(b))


def test_frozen_parts_get_no_gradient() -> None:
    (x_proj,), (dt_proj,) = modules(1)
    x_proj.requires_grad_(False)
    for needed in (False, True):
        x = tokens(0, True).requires_grad_(needed)
        u, delta, *maps = steps_and_maps(x, [x_proj], [dt_proj], SIZES)
        (u.sum() + delta.square().sum() + sum(m.sum() for m in maps)).backward()
        assert x_proj.weight.grad is None and dt_proj.weight.grad.any() and (x.grad is not None) == needed


def test_what_looks_on_sees_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    x_projs, dt_projs = modules(2)
    x = tokens(2, True)
    assert bare(x, *x_projs, *dt_projs)
    with FlopCounterMode(display=False) as counter:
        assert not bare(x, *x_projs)
        steps_and_maps(x, x_projs, dt_projs, SIZES)
    assert counter.get_total_flops() == 2 * 2 * B * L * (E * sum(SIZES) + R * E)
    monkeypatch.setenv("GENSSM_BACKEND", "reference")  # can be differentiated twice
    assert not bare(x, *x_projs)
    monkeypatch.delenv("GENSSM_BACKEND")
    assert not bare(x, nn.Linear(3, 3)) and not bare(x, nn.Identity())
    wrapped = nn.Linear(3, 3, bias=False)
    wrapped.forward = wrapped.forward  # as offloading does
    assert not bare(x, wrapped)
    assert not bare(x, nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_directions_compile_whole(backend: str) -> None:
    """Layouts of results and gradients are those that the rules of the operators promise: inductor asserts strides."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer, h = Mamba(8, bidirectional=True, d_state=3), torch.randn(2, 6, 8, requires_grad=True)
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    tensors = (h, *mixer.parameters())
    expected, found = (torch.autograd.grad(call(h).square().sum(), tensors) for call in (mixer, compiled))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_of_the_mixer_whatever_looks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for bidirectional in (False, True):
        torch.manual_seed(0)
        mixer, h = Mamba(8, bidirectional=bidirectional, d_state=3).double(), torch.randn(2, 6, 8).double()
        found = torch.autograd.grad(mixer(h).square().sum(), list(mixer.parameters()))
        with monkeypatch.context() as patch:
            patch.setattr(projections, "bare", lambda *_: False)
            expected = torch.autograd.grad(mixer(h).square().sum(), list(mixer.parameters()))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
