"""ZigMa's golden cases: network outputs and gradients, interpolant paths and losses, samplers."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.func import functional_call

from genssm import paths
from genssm.convert import PUBLISHED, load_published
from genssm.models import ZigMa
from genssm.schedulers import FlowODEScheduler, FlowSDEScheduler
from genssm.solvers import solve_ode
from genssm.training.objectives import FlowObjective
from tests.golden.checks import Check, compare, equal

Tensors = dict[str, torch.Tensor]


def under(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names start with ``prefix.``, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def given_arguments(info: Mapping[str, Any], inputs: Tensors) -> dict[str, Any]:
    """What a user of the converter would have to say, because the weights do not show it."""
    config, scan = info["config"], info["config"]["scan"]
    given = {"sample_size": config["input_size"], "norm_eps": config["norm_eps"], "num_paths": scan.get("num_paths")}
    if "video_frames" in config:
        given["num_frames"] = config["video_frames"]
    if "temporal_restore" in info:
        given["temporal_restore"] = info["temporal_restore"]
    if scan["family"] == "video_factorised":
        return {**given, "scan": "zigzag", "video_pattern": scan["pattern"]}
    if scan["family"] == "explicit":
        return {**given, "scan": inputs["scan_paths"].tolist()}
    return {**given, "scan": scan["family"]}


def network(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Convert the weights, check what was read off them, then outputs and every gradient in the file."""
    published, inputs, gradients = under("w", tensors), under("in", tensors), under("grad", tensors)
    model, report = load_published("zigma", published, given_arguments(info, inputs))
    yield equal("keys", str(report), "missing keys: none\nunexpected keys: none\nreshaped keys: none")
    yield from _read_off(info, model, published)

    sample, computed = _run(model, published, inputs, gradients)
    yield compare("out.sample", sample, tensors["out.sample"], info["tolerance"]["out"])
    nudged = None
    for key, expected in gradients.items():
        check = compare(f"grad.{key}", computed[key], expected, info["tolerance"]["grad"])
        if not check.passed:
            nudged = nudged or _run(model, published, inputs, gradients, last_bits=1)[1]
            slack = (nudged[key] - computed[key]).abs().max() / expected.abs().max()
            check = compare(f"grad.{key}", computed[key], expected, info["tolerance"]["grad"], slack=float(slack))
        yield check


def _run(
    model: ZigMa, published: Tensors, inputs: Tensors, gradients: Tensors, last_bits: int = 0
) -> tuple[torch.Tensor, Tensors]:
    """Output, and gradients of its mean square under the published names, through the converter's key table.

    With ``last_bits`` the float32 time is that many steps greater. This shows how far a gradient depends on the last
    bit of the sinusoidal frequencies, which is another on every machine's exponential (and so not in the file).
    """
    leaves = {key: value.clone().requires_grad_(f"w.{key}" in gradients) for key, value in published.items()}
    inputs = {
        key: value.clone().requires_grad_() if f"in.{key}" in gradients else value for key, value in inputs.items()
    }
    time = 1000 * inputs["t"]
    if last_bits:
        time = time + last_bits * (torch.nextafter(time, torch.full_like(time, torch.inf)) - time).detach()
    output = functional_call(
        model,
        PUBLISHED["zigma"].weights(leaves),
        (inputs["x"], 1000 - time.double(), inputs.get("y"), inputs.get("context")),
    ).sample
    sources = [inputs[key[3:]] if key.startswith("in.") else leaves[key[2:]] for key in gradients]
    return -output, dict(zip(gradients, torch.autograd.grad(output.square().mean(), sources)))


def _read_off(info: Mapping[str, Any], model: ZigMa, published: Tensors) -> Iterator[Check]:
    """The configuration that the converter inferred, against the one in the JSON."""
    config, ssm = info["config"], info["config"]["ssm"]
    rank = "auto" if isinstance(ssm["dt_rank"], str) else ssm["dt_rank"]
    expected = {
        "in_channels": config["in_channels"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["depth"],
        "patch_size": config["patch_size"],
        "pos_embed": config["pos_embed"],
        "num_classes": config.get("num_classes", 0),
        "context_dim": config.get("context_dim", 0),
        "temporal_pos_embed": config.get("temporal_pos_embed", False),
        "norm": config["norm"],
        **{name: ssm[name] for name in ("d_state", "d_conv", "expand")},
        "dt_rank": rank,
    }
    for key, value in expected.items():
        yield equal(f"config.{key}", model.config[key], value)
    if "parameters" in info:
        tables = published["pos_embed"].numel() if config["pos_embed"] == "sincos2d_fixed" else 0
        yield equal("parameters", sum(p.numel() for p in model.parameters()) + tables, info["parameters"])


def objective(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Path quantities, targets and losses. The file has data at t = 1, ours is s = 1 - t: derivatives change sign."""
    inputs = {key: value.double() for key, value in under("in", tensors).items()}
    clean, noise, output = inputs["data"], inputs["noise"], inputs["model_output"]
    s = 1 - inputs["t"]
    for path in paths.PATHS:
        c = paths.coefficients(path, s)
        x = paths.interpolate(path, clean, noise, s)
        computed = {
            "alpha": c.alpha,
            "sigma": c.sigma,
            "dalpha": -c.d_alpha,
            "dsigma": -c.d_sigma,
            "xt": x,
            "ut": -paths.velocity(path, clean, noise, s),
            "drift": paths.per_sample(paths.drift_coefficient(path, s), x) * x,
            "drift_var": paths.drift_variance(path, s),
            "score_from_velocity": paths.convert(path, -output, x, s, source="flow_prediction", target="score"),
            "loss_velocity": FlowObjective(path, "flow_prediction").loss_of(-output, clean, noise, s),
            "loss_noise": FlowObjective(path, "epsilon").loss_of(output, clean, noise, s),
            "loss_score": FlowObjective(path, "score").loss_of(output, clean, noise, s),
        }
        expected = under(f"out.{path}", tensors)
        yield equal(f"quantities of {path}", sorted(expected), sorted(computed))
        for key in sorted(set(expected) & set(computed)):
            yield compare(f"out.{path}.{key}", computed[key], expected[key], info["tolerance"])


def sampling(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Run each solver from the same noise with the converted network."""
    inputs = under("in", tensors)
    model, report = load_published("zigma", under("w", tensors), given_arguments(info, inputs))
    yield equal("keys complete", report.complete, True)
    for key in sorted(under("out", tensors)):
        expected, tolerance = tensors[f"out.{key}"], _tolerance(info["tolerance"], f"out.{key}")
        with torch.no_grad():
            yield compare(f"out.{key}", _sample(key, model, inputs), expected, tolerance)


def _tolerance(tolerances: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return tolerances.get(key) or next(value for pattern, value in tolerances.items() if fnmatch(key, pattern))


def _sample(solver: str, model: ZigMa, inputs: Tensors) -> torch.Tensor:
    """Sample with the solver that the file names."""
    name, _, rest = solver.partition("_")
    evenly = (1 - torch.linspace(0, 1, 10, dtype=torch.float64))[:-1].tolist()  # 9 steps
    if name.startswith("euler"):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=evenly)
    elif name.startswith("heun"):
        scheduler = FlowODEScheduler(solver="heun")
        scheduler.set_timesteps(sigmas=evenly)
    elif name == "sde":
        scheduler = FlowSDEScheduler(diffusion=rest.removeprefix("euler_"), last_step="mean", last_step_size=0.04)
        scheduler.set_timesteps(len(inputs["sde_noise"]) + 1)
    elif name == "dopri5":
        tolerances = {"rtol": 1e-6, "atol": 1e-7} if rest == "tight" else {"rtol": 1e-3, "atol": 1e-6}
        return _adaptive(model, inputs, **tolerances)
    else:
        raise ValueError(f"unknown solver {solver!r}")
    x = inputs["z"]
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = model(x, timestep, inputs["y"]).sample
        options = (
            {"variance_noise": inputs["sde_noise"][step]} if name == "sde" and step < len(inputs["sde_noise"]) else {}
        )
        x = scheduler.step(velocity, timestep, x, **options).prev_sample
    return x


def _adaptive(model: ZigMa, inputs: Tensors, rtol: float, atol: float) -> torch.Tensor:
    def velocity(x: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return model(x, 1000 * s, inputs["y"][rows]).sample

    return solve_ode(velocity, inputs["z"], rtol=rtol, atol=atol).sample
