"""CUDA graphs: what a model launches, recorded once and replayed, where Python is slower than the GPU.

A graph repeats the same operations on the same memory, so it gives the same bits; whoever replays it must leave alone
what it was recorded with: weights in their places, shapes, and everything that Python decides on the way. Random
numbers go on from the generator of the device as they would without a graph.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

logger = logging.getLogger("genssm")

KIND = "cuda"  # of the devices that record graphs
WARM_UPS = 3
EAGER = WARM_UPS + 1  # evaluations of a kind before it is recorded, as many as that costs: short loops lose nothing
KEPT = 2  # kinds of evaluations: with guidance and without


def record(
    device: torch.device, warm_up: Callable[[], None], *calls: Callable[[], None], pool: Any = None
) -> list[torch.cuda.CUDAGraph]:
    """Record each call as a graph; all share their memory, so they must be replayed in the order given.

    Args:
        device: where they run.
        warm_up: run a few times before: it compiles kernels and lets libraries choose theirs.
        calls: what they compute lies where it is computed again by each replay; recording itself computes nothing.
        pool: memory of a graph recorded earlier that they share too, so that their results end with its next replay.
    """
    graphs: list[torch.cuda.CUDAGraph] = []
    with torch.cuda.device(device), torch.random.fork_rng([device]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                warm_up()
        torch.cuda.current_stream().wait_stream(side)
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            pool = graphs[0].pool() if graphs else pool
            # Other threads may go on: those that watch NCCL or pin batches would break a "global" capture.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                call()
            graphs.append(graph)
    return graphs


def weights_move(model: nn.Module) -> bool:
    """Whether hooks move or cast weights, or autocast copies them: a graph would not find them."""
    return torch.is_autocast_enabled(KIND) or any(_moves(vars(module)) for module in model.modules())


def _moves(attributes: Mapping[str, Any]) -> bool:
    """Whether a hook acts on a module with these attributes."""
    registry = attributes.get("_diffusers_hook")  # pipelines give some models an empty one
    return "_hf_hook" in attributes or (registry is not None and bool(registry.hooks))


def evaluates_alike(model: nn.Module) -> bool:
    """Whether each evaluation of a model is the same operations: no hooks, adapters or compiled parts act in it."""
    return not torch.is_autocast_enabled(KIND) and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._compiled_call_impl is not None
        or "_orig_mod" in module._modules  # torch.compile(module)
        or _moves(attributes := vars(module))
        or attributes.get("_hf_peft_config_loaded", False)
        for module in model.modules()
    )


def places(model: nn.Module) -> tuple[tuple[int, torch.dtype], ...]:
    """Where the weights and buffers of a model lie, and as what."""
    return tuple(
        (x.data_ptr(), x.dtype)
        for module in model.modules()
        for held in (module._parameters, module._buffers)
        for x in held.values()
        if x is not None
    )


def _kind(leaves: Sequence[Any], spec: TreeSpec) -> tuple | None:
    """What a graph is recorded for: shapes and types of tensors, the rest as it is; None for what it could not read."""
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    if any(x.device.type != KIND or x.requires_grad for x in tensors):
        return None
    return spec, tuple((x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in leaves)


class _Recorded:
    """A call with inputs of its own.

    Attributes:
        inputs: the arguments in a row; a replay reads its tensors.
        outputs: the results in a row.
    """

    def __init__(self, call: Callable[..., Any], leaves: Sequence[Any], spec: TreeSpec) -> None:
        self.inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        self.device = next(x.device for x in self.inputs if isinstance(x, torch.Tensor))
        self._call, self._arguments = call, tree_unflatten(self.inputs, spec)

    def run(self) -> None:
        """What is recorded."""
        args, kwargs = self._arguments
        self.outputs, self.spec = tree_flatten(self._call(*args, **kwargs))

    def read(self, leaves: Iterable[Any]) -> None:
        """Let the next replay compute with these arguments."""
        for own, given in zip(self.inputs, leaves):
            if isinstance(own, torch.Tensor):
                own.copy_(given)


class ForwardGraph(_Recorded):
    """A call without gradients, replayed.

    Args:
        call: called with tensors on one device, among others.
        leaves, spec: its arguments ``(args, kwargs)``, flattened.
    Raises:
        RuntimeError: it cannot be recorded.
    """

    def __init__(self, call: Callable[..., Any], leaves: Sequence[Any], spec: TreeSpec) -> None:
        super().__init__(call, leaves, spec)
        (self.graph,) = record(self.device, self.run, self.run)

    def __call__(self, leaves: Iterable[Any]) -> Any:
        """The results for these arguments, in memory of their own."""
        self.read(leaves)
        self.graph.replay()
        return tree_unflatten([x.clone() if isinstance(x, torch.Tensor) else x for x in self.outputs], self.spec)


class ForwardGraphs:
    """A call without gradients that is recorded when its kind comes again and again, and replayed from then on.

    The first evaluations of a kind (its shapes and types) run as they are, and so does what cannot be recorded.

    Args:
        call: the same operations for all arguments of a kind.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.seen: Counter[tuple] = Counter()
        self.graphs: dict[tuple, ForwardGraph | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the call."""
        leaves, spec = tree_flatten((args, kwargs))
        kind = _kind(leaves, spec)
        self.seen[kind] += 1
        if kind is None or self.seen[kind] <= EAGER:
            return self.call(*args, **kwargs)
        if kind not in self.graphs:
            if len(self.graphs) == KEPT:
                self.graphs.clear()
            self.graphs[kind] = self._record(leaves, spec)
        graph = self.graphs[kind]
        return self.call(*args, **kwargs) if graph is None else graph(leaves)

    def _record(self, leaves: Sequence[Any], spec: TreeSpec) -> ForwardGraph | None:
        try:
            return ForwardGraph(self.call, leaves, spec)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning("evaluating operation by operation: the model cannot be recorded as a graph (%s)", reason)
            return None


Kept = tuple[tuple, ForwardGraphs] | None  # with what they were recorded for


def graphs_for(
    model: nn.Module,
    call: Callable[..., Any],
    shape: Sequence[int],
    condition: Mapping[str, torch.Tensor],
    kept: Kept,
) -> Kept:
    """The graphs of an earlier call if this one is of their kind, else new ones; None if nothing may be recorded.

    Args:
        model: what is evaluated.
        call: evaluates it: the model, or a function of tensors around it.
        shape: of the samples.
        condition: further arguments.
        kept: of the earlier call.
    """
    if not evaluates_alike(model):
        return None
    inputs = tuple((name, x.shape, x.dtype) for name, x in condition.items())
    state = (model.training, torch.is_inference_mode_enabled(), places(model))
    key = (model, tuple(shape), inputs, state)
    return kept if kept is not None and kept[0] == key else (key, ForwardGraphs(call))


class TrainingGraph(_Recorded):
    """A call and its backward pass, replayed; the gradients arrive in ``parameters``, as after ``backward()``.

    One backward pass belongs to each call, before the next one: either graph writes where the other one left results.
    The gradients of earlier parts of a step are moved out of their way. Those of the results are read in the layout of
    the results; where they arrive in another one, a product may add in another order than without graphs.

    Args:
        call: called with tensors on one device that need no gradients, among others.
        parameters: leaves whose gradients are wanted.
        leaves, spec: its arguments ``(args, kwargs)``, flattened.
    Raises:
        RuntimeError: it cannot be recorded.
    """

    def __init__(
        self, call: Callable[..., Any], parameters: Iterable[nn.Parameter], leaves: Sequence[Any], spec: TreeSpec
    ) -> None:
        super().__init__(call, leaves, spec)
        self.parameters = [p for p in parameters if p.requires_grad]
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)  # makes autograd come by

        def both() -> None:
            self.run()
            self._run_backward()

        self.forward, self.backward = record(self.device, both, self.run, self._run_backward)
        self.differentiable = [isinstance(x, torch.Tensor) and x.requires_grad for x in self.outputs]
        # Without their history: it would hold nodes of the recording that other passes would find again.
        self.outputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in self.outputs]
        self.ends.clear()

    def run(self) -> None:
        """The forward pass."""
        super().run()
        self.ends = [x for x in self.outputs if isinstance(x, torch.Tensor) and x.requires_grad]
        self.given = [torch.empty_like(x) for x in self.ends]  # their gradients

    def _run_backward(self) -> None:
        found = torch.autograd.grad(self.ends, self.parameters, self.given, allow_unused=True)
        self.gradients = _apart(found, self.parameters, self.given)

    def __call__(self, leaves: Iterable[Any]) -> Any:
        """The results for these arguments; the next call overwrites them."""
        self._move_gradients()
        self.read(leaves)
        return tree_unflatten(list(_Replay.apply(self, self.anchor)), self.spec)

    def _move_gradients(self) -> None:
        """Give gradients that the last replay left, and nobody took away, memory of their own."""
        for parameter, gradient in zip(self.parameters, self.gradients):
            if parameter.grad is not None and parameter.grad is gradient:
                parameter.grad = gradient.clone()


class _Replay(torch.autograd.Function):
    """Both graphs of a :class:`TrainingGraph`, for autograd."""

    @staticmethod
    def forward(ctx: Any, recorded: TrainingGraph, anchor: torch.Tensor) -> tuple[Any, ...]:
        ctx.recorded = recorded
        recorded.forward.replay()
        outputs = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in recorded.outputs)
        plain = [x for x, d in zip(outputs, recorded.differentiable) if isinstance(x, torch.Tensor) and not d]
        ctx.mark_non_differentiable(*plain)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arrived: torch.Tensor) -> tuple[None, None]:
        recorded = ctx.recorded
        wanted = [gradient for gradient, d in zip(arrived, recorded.differentiable) if d]
        for own, gradient in zip(recorded.given, wanted):
            own.copy_(gradient)
        recorded.backward.replay()
        for parameter, gradient in zip(recorded.parameters, recorded.gradients):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:  # of earlier parts of a step
                parameter.grad.add_(gradient)
        return None, None


def _apart(
    found: Sequence[torch.Tensor | None], parameters: Sequence[nn.Parameter], given: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Gradients as autograd leaves them: laid out like their parameters, and no two in the same memory."""
    taken, result = {x.untyped_storage().data_ptr() for x in given}, []
    for gradient, parameter in zip(found, parameters):
        if gradient is not None:
            if gradient.stride() != parameter.stride() or gradient.untyped_storage().data_ptr() in taken:
                gradient = torch.empty_like(parameter).copy_(gradient)
            taken.add(gradient.untyped_storage().data_ptr())
        result.append(gradient)
    return result


class TrainingGraphs:
    """A call whose forward and backward pass are recorded at its first arguments and replayed from then on.

    Arguments of other shapes, and calls without gradients, run as they are.

    Args:
        call: the same operations for all arguments of the same shapes and types.
        parameters: leaves whose gradients are wanted.
    """

    def __init__(self, call: Callable[..., Any], parameters: Iterable[nn.Parameter]) -> None:
        self.call, self.parameters = call, list(parameters)
        self.kind: tuple | None = None
        self.graph: TrainingGraph | None = None
        self._told = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the call."""
        leaves, spec = tree_flatten((args, kwargs))
        kind = _kind(leaves, spec)
        if kind is None or not torch.is_grad_enabled():
            return self.call(*args, **kwargs)
        if self.graph is None:
            self.kind, self.graph = kind, TrainingGraph(self.call, self.parameters, leaves, spec)
        if kind == self.kind:
            return self.graph(leaves)
        if not self._told:
            logger.warning("a batch of another shape than the recorded one runs operation by operation, slowly")
            self._told = True
        return self.call(*args, **kwargs)
