"""Golden cases of the Mamba-2 mixer, and of scans and convolutions over packed sequences."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from genssm.kernels.causal_conv1d import causal_conv1d
from genssm.kernels.selective_scan import selective_scan
from genssm.layers import Mamba2
from tests.golden.checks import Check, compare, equal
from tests.golden.zigma import Tensors, under


def mixer(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Output, gradients, the state after a prefill and after all tokens, and token by token the same output."""
    options = dict(info["config"])
    module = Mamba2(options.pop("d_model"), **options)
    keys = module.load_state_dict({key: value.float() for key, value in under("w", tensors).items()}, strict=False)
    yield equal("keys", (keys.missing_keys, keys.unexpected_keys), ([], []))
    gradients, tolerance = under("grad", tensors), info["tolerance"]
    u = tensors["in.u"].clone().requires_grad_()
    y = module(u)
    yield compare("out.y", y, tensors["out.y"], tolerance)
    sources = [u if key == "in.u" else module.get_parameter(key[2:]) for key in gradients]
    allowed = {"atol": info["tolerance_grad"]["relative_to_max"], "rtol": 0.0}
    for (key, expected), got in zip(gradients.items(), torch.autograd.grad(y.square().mean(), sources)):
        yield compare(f"grad.{key}", got, expected, allowed)

    state, cut = module.allocate_state(len(u)), info["prefill_len"]
    outputs = [module(u[:, :cut], state=state)]
    yield from _state("prefill", state, tensors, tolerance)
    outputs += [module.step(token, state)[:, None] for token in u[:, cut:].unbind(1)]
    yield from _state("final", state, tensors, tolerance)
    yield compare("out.y token by token", torch.cat(outputs, dim=1), tensors["out.y"], tolerance)


def _state(when: str, state: Any, tensors: Tensors, tolerance: Mapping[str, Any]) -> Iterator[Check]:
    """The file keeps as many tokens as the convolution has taps; the oldest is never read again, and not kept by us."""
    yield compare(f"out.{when} ssm", state.ssm[:, 0], tensors[f"out.{when}_ssm_state"], tolerance)
    yield compare(f"out.{when} conv", state.window[:, 0], tensors[f"out.{when}_conv_state"][..., 1:], tolerance)


def packed(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Scan in both directions and convolution of packed sequences, by every CPU backend; channels first in the file."""
    inputs, tolerance = under("in", tensors), info["tolerance"]
    borders = inputs.pop("cu_seqlens")
    backwards = torch.arange(inputs["u"].shape[-1] - 1, -1, -1)
    for backend in ("chunked", "reference"):
        leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
        u, delta, B, C = (leaves[key].mT for key in ("u", "delta", "B", "C"))  # (1, L, E) and (1, L, N)
        scanned = {
            name: selective_scan(
                u, delta, leaves["A"], B, C, leaves["D"], orders=order, cu_seqlens=borders, backend=backend
            )
            for name, order in (("forward", None), ("reverse", backwards))
        }
        for name, y in scanned.items():
            yield compare(f"out.{name} ({backend})", y.mT, tensors[f"out.{name}"], tolerance)
        loss = sum(y.square().mean() for y in scanned.values())
        for (key, _), got in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values()))):
            if f"grad.in.{key}" in tensors:
                yield compare(f"grad.in.{key} ({backend})", got, tensors[f"grad.in.{key}"], tolerance)
        if "conv.out" in tensors:
            x, weight, bias = (tensors[f"conv.in.{name}"] for name in ("x", "weight", "bias"))
            out = causal_conv1d(x.mT, weight, bias, cu_seqlens=borders, backend=backend)
            yield compare(f"out.conv ({backend})", out.mT, tensors["conv.out"], tolerance)


PARTS: dict[str, Callable[[Mapping[str, Any], Tensors], Iterator[Check]]] = {
    "mamba2 mixer": mixer,
    "packed scan": packed,
}


def kind_of_part(keys: Iterable[str]) -> str | None:
    """Kind of a case that names no model, from the names of its tensors."""
    keys = set(keys)
    if "in.cu_seqlens" in keys:
        return "packed scan"
    if {"in.u", "w.in_proj.weight", "w.A_log", "w.dt_bias"} <= keys and "w.x_proj.weight" not in keys:
        return "mamba2 mixer"
    return None
