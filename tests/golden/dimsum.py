"""DiMSUM's golden cases: networks, their parts, wavelets, interpolant paths, samplers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torchdiffeq import odeint

from genssm import paths
from genssm.convert import PUBLISHED, load_published
from genssm.layers import Mamba, sincos_2d, sinusoidal_features
from genssm.layers.positions import rotary_table
from genssm.layers.transformer import AttentionBlock, CrossFusion
from genssm.layers.wavelets import BlockCosine, WaveletPacking, cell_major_order, from_cells, haar_matrix, to_cells
from genssm.models import DiMSUM
from genssm.models.dimsum import Branch
from genssm.pipelines.denoising import Guidance
from genssm.scan_orders import dimsum_frequency, dimsum_spatial, inverse
from genssm.schedulers import FlowODEScheduler, FlowSDEScheduler
from genssm.solvers import solve_ode, solve_sde
from genssm.training.objectives import FlowObjective
from tests.golden.checks import Check, compare, equal

Tensors = dict[str, torch.Tensor]
Info = Mapping[str, Any]

FAMILIES = {"sweep": "sweep", "zigma": "zigzag", "jpeg": "jpeg"}


def under(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names start with ``prefix.``, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def _tolerances(info: Info) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Tolerance of outputs and of gradients; the latter are divided by their largest entry before comparison."""
    return info["tolerance"], {"atol": info.get("tolerance_grad", {}).get("relative_to_max"), "rtol": 0.0}


def given_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a user of the converter would have to say, because the weights do not show it."""
    given = {"serpentine": config["serpentine"]}
    if config["shared_attention_every"] > 0:
        given["attention_every"] = config["shared_attention_every"]
    if config["scan"] not in ("none", "v2"):
        family, count = config["scan"].split("_")
        given |= {"scan": FAMILIES[family], "num_paths": int(count)}
    if config["block_type"] == "window":
        given["block_type"] = "window"
    if config["position_encoding"] == "rope":
        given["pos_embed"] = "rotary"
    return given


def network(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Convert the weights, check what was read off them, then outputs, guidance and every gradient in the file."""
    if "points_and_model_calls" in info:
        yield from sampling(info, tensors)
        return
    config, published, inputs = info["config"], under("w", tensors), under("in", tensors)
    tolerance, tolerance_grad = _tolerances(info)
    model, report = load_published("dimsum", published, given_arguments(config))
    yield equal("keys complete", report.complete, True)
    yield equal("dead keys", bool(report.dead), config["mixer_has_cond_proj"] or config["position_encoding"] == "rope")
    yield from _read_off(info, model)

    weights = {key: value.float().requires_grad_() for key, value in published.items() if value.is_floating_point()}
    inputs = {key: value.requires_grad_() if value.is_floating_point() else value for key, value in inputs.items()}
    ours = PUBLISHED["dimsum"].weights(weights)
    ours = {key: value for key, value in ours.items() if key not in report.dead}

    def predict(labels: torch.Tensor | None) -> torch.Tensor:
        """The published output, with data at t = 1; additional channels have no direction in time."""
        sample = functional_call(model, ours, (inputs["x"], 1000 * (1 - inputs["t"].double()), labels)).sample
        return torch.cat([-sample[:, : config["in_channels"]], sample[:, config["in_channels"] :]], dim=1)

    output = predict(inputs.get("y"))
    yield compare("out.pred", output, tensors["out.pred"], tolerance)
    gradients = under("grad", tensors)
    sources = [inputs[key[3:]] if key.startswith("in.") else weights[key[2:]] for key in gradients]
    computed = torch.autograd.grad(output.square().mean(), sources, retain_graph=True)
    for (key, expected), got in zip(gradients.items(), computed):
        yield compare(f"grad.{key}", got, expected, tolerance_grad)

    guided = {key: value for key, value in tensors.items() if "cfg" in key}
    if guided:
        null = predict(torch.full_like(inputs["y"], model.null_class_label))
        for key, expected in guided.items():
            yield compare(key, _guide(key, output, null, inputs["t"]).repeat(2, 1, 1, 1), expected, tolerance)


def _guide(key: str, conditional: torch.Tensor, null: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The guided output that a key such as "out.cfg_1.4" or "out.adaptive_cfg_3.8_pow4" names."""
    scale, _, power = key.partition("cfg_")[2].partition("_pow")
    return Guidance(float(scale), power=float(power or 0)).combine(conditional, null, (1 - t).tolist())


def _read_off(info: Info, model: DiMSUM) -> Iterator[Check]:
    """The configuration that the converter inferred, against the one in the JSON."""
    config = info["config"]
    depth = 3 * config["depth"] if config["block_type"] == "raw" else config["depth"]
    expected = {
        "sample_size": config["latent_size"],
        "in_channels": config["in_channels"],
        "hidden_size": config["hidden_size"],
        "num_layers": info.get("built_blocks", depth),
        "patch_size": config["patch_size"],
        "num_classes": config["num_classes"] if config["label_dropout"] > 0 else 0,
        "block_type": config["block_type"],
        "attention_every": max(config["shared_attention_every"], 0),
        "learn_sigma": config["learn_sigma"],
        "final_norm": config["final_norm"],
        "norm": "rms" if config["rms_norm"] else "layer",
        **(config["ssm_options"] or {}),
    }
    if config["block_type"] != "raw":
        expected["gated_mlp"] = config["gated_mlp"]
    if config["shared_attention_every"] > 0:
        expected["shared_attention"] = not config["independent_attention"]
    for key, value in expected.items():
        yield equal(f"config.{key}", model.config[key], value)
    if "built_attention_blocks" in info:
        yield equal("attention blocks", len(model.attention_blocks), info["built_attention_blocks"])


def sampling(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Run each solver that a key names from the same noise, with the converted network."""
    model, report = load_published("dimsum", under("w", tensors), given_arguments(info["config"]))
    yield equal("keys complete", report.complete, True)
    for key, (points, calls) in info["points_and_model_calls"].items():
        adaptive = "dopri5" in key
        tolerance = info["tolerance"] if adaptive else info["tolerance_fixed_step"]
        velocity = _Velocity(model, tensors["in.y"], info["cfg_scale"] if key.endswith("cfg") else 1.0)
        with torch.no_grad():
            if key.startswith("sde"):
                result = _stochastic(key, velocity, tensors["in.z"], tensors[f"in.noise.{key}"])
            else:
                result = _ode(key, velocity, tensors["in.z"], points)
            if adaptive:
                yield equal(f"calls of {key}", velocity.calls, calls)
            if key.endswith("cfg"):
                result = _with_step_of(velocity, tensors["in.z"], tensors[f"out.{key}"][: len(result)])
                result = result.repeat(2, 1, 1, 1)
            yield compare(f"out.{key}", result, tensors[f"out.{key}"], tolerance)
            if f"out.{key}.all_points" in tensors:
                between = _dormand_prince(velocity, tensors["in.z"], points)
                yield compare(f"out.{key}.all_points", between, tensors[f"out.{key}.all_points"], tolerance)


class _Velocity:
    """Velocity of the samples of given labels at time s, guided if asked for."""

    def __init__(self, model: DiMSUM, labels: torch.Tensor, scale: float) -> None:
        self.model, self.labels, self.guidance, self.calls = model, labels, Guidance(scale), 0

    def __call__(self, x: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        conditional = self.model(x, 1000 * s, self.labels[rows]).sample
        if self.guidance.scale == 1:
            return conditional
        return self.guidance.combine(conditional, self.model(x, 1000 * s).sample, s.tolist())


def _ode(key: str, velocity: _Velocity, x: torch.Tensor, points: int) -> torch.Tensor:
    solver = key.split(".")[1]
    if solver == "dopri5":
        return solve_ode(velocity, x, rtol=1e-3, atol=1e-6, error_norm="batch").sample
    if solver == "rk4":
        return solve_ode(velocity, x, method="rk4", steps=points - 1).sample
    scheduler = FlowODEScheduler(path="gvp", solver=solver.removesuffix("2"))
    scheduler.set_timesteps(points - 1)
    for timestep in scheduler.timesteps:
        rows = torch.arange(len(x))
        x = scheduler.step(velocity(x, timestep / 1000, rows), timestep, x).prev_sample
    return x


def _dormand_prince(velocity: _Velocity, x: torch.Tensor, points: int, **options: float) -> torch.Tensor:
    """The solution of :func:`solve_ode` at evenly spaced times, (points, B, ...), interpolated between its steps."""
    times = torch.linspace(1, 0, points, dtype=torch.float64)
    rows = torch.arange(len(x))

    def slope(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return velocity(x, s.to(x.dtype).expand(len(x)), rows)

    return odeint(slope, x, times, rtol=1e-3, atol=1e-6, method="dopri5", options=options)


def _with_step_of(velocity: _Velocity, x: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The adaptive solution whose second step is as long as in the file.

    The first error estimate of the guided case, about 1e-8 of the sample, lies below the resolution of float32: how far
    the second step grew from the first is rounding noise of the reference. So that one number is fitted, in float64
    (where the estimate would allow a longer step) through the solver's bound on growth; everything else has to agree.
    """
    velocity.model.double()
    x, expected = x.double(), expected.double()

    low, high = 8.5, 8.8
    start = _dormand_prince(velocity, x, 2, ifactor=low)[-1]
    change = _dormand_prince(velocity, x, 2, ifactor=high)[-1] - start
    fitted = low + (high - low) * float(((expected - start) * change).sum() / change.square().sum())
    result = _dormand_prince(velocity, x, 2, ifactor=fitted)[-1]
    velocity.model.float()
    return result


def _stochastic(key: str, velocity: _Velocity, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """n + 1 points for n draws; the last step has the size 1 / (n + 1)."""
    _, solver, form, last = key.split(".")
    options = {"path": "gvp", "diffusion": form, "last_step": last.lower(), "last_step_size": 1 / (len(noise) + 1)}
    if solver == "Heun":
        return solve_sde(velocity, x, points=len(noise) + 1, noise=list(noise), **options)
    scheduler = FlowSDEScheduler(**options)
    scheduler.set_timesteps(len(noise) + 1)
    rows = torch.arange(len(x))
    for step, timestep in enumerate(scheduler.timesteps):
        draw = {"variance_noise": noise[step]} if step < len(noise) else {}
        x = scheduler.step(velocity(x, timestep / 1000, rows), timestep, x, **draw).prev_sample
    return x


def _part(
    info: Info, tensors: Tensors, module: nn.Module, place: str, run: Callable[[nn.Module, Tensors], torch.Tensor]
) -> Iterator[Check]:
    """Check a part of the network: output and gradients of ``run(module, inputs)``.

    Args:
        module: ours, with any weights.
        place: "published prefix -> ours": where the part sits in a network, whose converter translates its weights.
    """
    theirs, ours = place.split(" -> ")
    tolerance, tolerance_grad = _tolerances(info)
    published = {key: value for key, value in under("w", tensors).items() if value.is_floating_point()}
    leaves = {key: value.float().requires_grad_() for key, value in published.items()}
    inputs = {key: value.requires_grad_() for key, value in under("in", tensors).items()}
    converted = PUBLISHED["dimsum"].weights({theirs + key: value for key, value in leaves.items()})
    weights = {key.removeprefix(ours): value for key, value in converted.items() if "cond_proj" not in key}
    yield equal("keys", sorted(weights), sorted(module.state_dict()))

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = module

        def forward(self) -> torch.Tensor:
            return run(self.part, inputs)

    output = functional_call(Bound(), {f"part.{key}": value for key, value in weights.items()}, ())
    yield compare("out.y", output, tensors["out.y"], tolerance)
    gradients = under("grad", tensors)
    sources = [inputs[key[3:]] if key.startswith("in.") else leaves[key[2:]] for key in gradients]
    for (key, expected), got in zip(gradients.items(), torch.autograd.grad(output.square().mean(), sources)):
        yield compare(f"grad.{key}", got, expected, tolerance_grad)


def mixer(info: Info, tensors: Tensors) -> Iterator[Check]:
    """The mixer alone: one direction, two, or along a path."""
    config = info["config"]
    module = Mamba(config["d_model"], bidirectional=config.get("scan_type") == "v2")
    order = None
    if "w.zigzag_paths" in tensors:
        order = tensors["w.zigzag_paths"][0]
        yield equal("inverse", torch.equal(inverse(order), tensors["w.zigzag_paths_reverse"][0]), True)
    place = "blocks.0.mixer. -> blocks.0.mixer."
    yield from _part(info, tensors, module, place, lambda part, inputs: part(inputs["x"], order))


def wavelet_branch(info: Info, tensors: Tensors) -> Iterator[Check]:
    """The frequency branch: packing, windows or lines, mixer, unpacking."""
    config = info["config"]
    grid, levels = (config["grid"], config["grid"]), config["levels"]
    transform = WaveletPacking(levels)
    if config["windowed"]:
        order = dimsum_frequency(*grid, int(config["column_first"]), config["serpentine"], levels)
    else:
        order = dimsum_spatial(*grid, 2 * int(config["column_first"]), config["serpentine"])
    order = cell_major_order(order, grid, transform.side)
    branch = Branch(config["dim"], config["cond_dim"], cond_proj=False, mixer={"expand": 2})

    def run(part: nn.Module, inputs: Tensors) -> torch.Tensor:
        return transform(part(transform(inputs["x"], grid), nn.functional.silu(inputs["c"]), order), grid, inverse=True)

    yield from _part(info, tensors, branch, "blocks.0.freq_mamba. -> blocks.0.frequency.", run)
    yield equal("residual", torch.equal(tensors["out.residual"], tensors["in.x"]), True)


def fusion(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Cross-attention fusion of the branches."""
    config = info["config"]
    module = CrossFusion(config["dim"], config["heads"], config["swap_k"])
    place = "blocks.0.proj. -> blocks.0.fusion."
    yield from _part(info, tensors, module, place, lambda part, inputs: part(inputs["spatial"], inputs["freq"]))


def attention_block(info: Info, tensors: Tensors) -> Iterator[Check]:
    """The shared attention block."""
    config = info["config"]
    module = AttentionBlock(config["dim"], config["heads"], config["gated_mlp"])
    place = "attn_block. -> attention_blocks.0."
    yield from _part(info, tensors, module, place, lambda part, inputs: part(inputs["x"], inputs["c"]))


def block_cosine(info: Info, tensors: Tensors) -> Iterator[Check]:
    """The block DCT: coefficients, token grid, inverse; and the released filters are the ones that we compute."""
    config, tolerance = info["config"], info["tolerance"]
    channels, size, side = config["channels"], config["size"], config["block"]
    transform, tokens = BlockCosine(side), tensors["in.x"].flatten(2).transpose(1, 2)
    packed = transform(tokens, (size, size))  # cell-major
    cells = packed.unflatten(1, (-1, side * side))  # (B, n, 16, C)
    coefficients = cells.permute(0, 3, 2, 1).flatten(1, 2).unflatten(2, (size // side, size // side))
    yield compare("out.coeff", coefficients, tensors["out.coeff"], tolerance)
    yield compare("out.packed", from_cells(cells, (size, size), side), tensors["out.packed"], tolerance)
    restored = transform(packed, (size, size), inverse=True).transpose(1, 2).unflatten(2, (size, size))
    yield compare("out.recon", restored, tensors["out.recon"], tolerance)
    filters = transform.matrix.repeat(channels, 1).reshape(-1, 1, side, side)
    yield compare("out.filters", filters, tensors["w.dct_conv.weight"], tolerance)


def wavelet(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Haar analysis and synthesis of images with their gradients, packing, unpacking and its layout."""
    tolerance, tolerance_grad = _tolerances(info)
    for key, value in under("in", tensors).items():
        kind, name = key.split(".", 1)
        if kind == "tokens":
            yield from _packing(name, value, tensors, tolerance)
            continue
        x = value.requires_grad_()
        y = _analysis(x) if kind == "dwt" else _synthesis(x)
        weights = torch.linspace(0.5, 1.5, y.shape[1])[:, None, None] if kind == "dwt" else 1.0
        yield compare(f"out.{key}", y, tensors[f"out.{key}"], tolerance)
        (got,) = torch.autograd.grad((weights * y.square()).mean(), x)
        yield compare(f"grad.in.{key}", got, tensors[f"grad.in.{key}"], tolerance_grad)


def _analysis(x: torch.Tensor) -> torch.Tensor:
    """(B, C, N, N) to (B, 4 C, N/2, N/2), subbands LL, LH, HL, HH one after the other."""
    side = x.shape[-1]
    bands = haar_matrix(1) @ to_cells(x.flatten(2).transpose(1, 2), (side, side), 2)  # (B, n, 4, C)
    return bands.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (side // 2, side // 2))


def _synthesis(bands: torch.Tensor) -> torch.Tensor:
    """Undo :func:`_analysis`."""
    side = 2 * bands.shape[-1]
    cells = haar_matrix(1).T @ bands.flatten(2).unflatten(1, (4, -1)).permute(0, 3, 1, 2)
    return from_cells(cells, (side, side), 2).transpose(1, 2).unflatten(2, (side, side))


def _packing(name: str, tokens: torch.Tensor, tensors: Tensors, tolerance: Mapping[str, Any]) -> Iterator[Check]:
    side, levels = int(name.split(".")[1][1:]), int(name[-1])
    transform, grid = WaveletPacking(levels), (side, side)
    packed = transform(tokens, grid)
    raster = _raster(packed, grid, transform.side)
    yield compare(f"out.packed.{name}", raster, tensors[f"out.packed.{name}"], tolerance)
    yield compare(
        f"out.unpacked.{name}", transform(packed, grid, inverse=True), tensors[f"out.unpacked.{name}"], tolerance
    )
    # tokens whose coefficients are their own indices into (subband, channel, y, x)
    area, cells = transform.side**2, (side // transform.side) ** 2
    numbers = torch.arange(area * tokens.shape[2] * cells).float().reshape(1, area, tokens.shape[2], cells)
    own = transform.side * haar_matrix(levels).T @ numbers.permute(0, 3, 1, 2)
    layout = _raster(transform(from_cells(own, grid, transform.side), grid), grid, transform.side)[0]
    yield equal(f"out.layout.{name}", torch.equal(layout.round().int(), tensors[f"out.layout.{name}"]), True)


def _raster(packed: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    return from_cells(packed.unflatten(1, (-1, side * side)), grid, side)


def embeddings(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Time features and position tables."""
    t, tolerance = tensors["in.t"], info["tolerance"]
    for key, expected in under("out", tensors).items():
        kind, *sizes = key.split(".")
        if kind.startswith("freq"):
            # An odd width ends on a zero in the released code. A frequency is good to half a unit in the last place,
            # 2^-25 relative, in either implementation; beyond the times of this model (0..1) that outgrows the stated
            # tolerance, multiplied by the time.
            width = expected.shape[1]
            features = nn.functional.pad(sinusoidal_features(t, width - width % 2), (0, width % 2))
            allowed = {"atol": (t * 2**-24).clamp(min=tolerance["atol"])[:, None], "rtol": tolerance["rtol"]}
            yield compare(f"out.{key}", features, expected, allowed)
            continue
        width, side = map(int, sizes)
        if kind == "pos_embed":
            table = sincos_2d(width, side, side)
        else:
            table = rotary_table(width, side, side)[int(kind == "rotary_sin")].repeat_interleave(2, dim=1)
        yield compare(f"out.{key}", table, expected, tolerance)


def objective(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Path quantities, targets and losses. The file has data at t = 1, ours is s = 1 - t: derivatives change sign."""
    inputs = {key: value.double() for key, value in under("in", tensors).items()}
    clean, noise, output = inputs["data"], inputs["noise"], inputs["model_output"]
    s = 1 - inputs["t"]
    for path in paths.PATHS:
        c, x = paths.coefficients(path, s), paths.interpolate(path, clean, noise, s)
        kinds = {"score_from_velocity": -output, "noise_from_velocity": -output, "velocity_from_score": output}
        computed = {
            "alpha": c.alpha,
            "sigma": c.sigma,
            "d_alpha": -c.d_alpha,
            "d_sigma": -c.d_sigma,
            "xt": x,
            "ut": -paths.velocity(path, clean, noise, s),
            "drift": paths.per_sample(paths.drift_coefficient(path, s), x) * x,
            "drift_var": paths.drift_variance(path, s),
            "loss.velocity": FlowObjective(path, "flow_prediction").loss_of(-output, clean, noise, s),
        }
        names = {"velocity": "flow_prediction", "noise": "epsilon", "score": "score"}
        for name, prediction in kinds.items():
            target, source = name.split("_from_")
            value = paths.convert(path, prediction, x, s, source=names[source], target=names[target])
            computed[name] = -value if target == "velocity" else value
        for target in ("noise", "score"):
            for weighting in ("none", "velocity", "likelihood"):
                loss = FlowObjective(path, names[target], weighting=weighting).loss_of(output, clean, noise, s)
                computed[f"loss.{target}.{weighting}"] = loss
        for form in paths.DIFFUSIONS:
            computed[f"diffusion.{'SBDM' if form == 'sbdm' else form}"] = paths.diffusion(path, form, s)
        released = next(key.split(".")[1] for key in tensors if key.lower().startswith(f"out.{path}."))
        expected = under(f"out.{released}", tensors)
        yield equal(f"quantities of {path}", sorted(expected), sorted(computed))
        for key in sorted(set(expected) & set(computed)):
            one = expected[key].shape != computed[key].shape and expected[key].numel() == 1
            value = expected[key].expand_as(computed[key]) if one else expected[key]
            yield compare(f"out.{path}.{key}", computed[key], value, info["tolerance"])


# Cases whose JSON names no model: what is in their configuration or among their tensors -> kind.
MARKS: dict[str, str] = {
    "swap_k": "fusion",
    "levels": "wavelet branch",
    "gated_mlp": "attention block",
    "block": "block cosine",
    "seq_len": "mixer",
    "out.freq_256": "embeddings",
    "in.model_output": "objective",
    "in.dwt.C3.N4": "wavelet",
}
PARTS: dict[str, Callable[[Info, Tensors], Iterator[Check]]] = {
    "fusion": fusion,
    "wavelet branch": wavelet_branch,
    "attention block": attention_block,
    "block cosine": block_cosine,
    "mixer": mixer,
    "embeddings": embeddings,
    "objective": objective,
    "wavelet": wavelet,
}


def kind_of_part(info: Info, keys: Iterable[str]) -> str | None:
    """Kind of a case that names no model, from its configuration and the names of its tensors."""
    present = {*info.get("config", ()), *keys}
    return next((kind for mark, kind in MARKS.items() if mark in present), None)
