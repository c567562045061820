"""DiM's golden cases: network outputs and gradients, the single-step solver, training-free upsampling, the schedule."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.func import functional_call

from genssm.convert import PUBLISHED, load_published
from genssm.layers import DenoiserOutput
from genssm.models import DiM
from genssm.pipelines import ClassConditionalImagePipeline, DiMUpsamplingPipeline
from genssm.pipelines.upsampling import matched_time
from genssm.single_step_solver import ContinuousDPMSolverScheduler, SingleStepSolverOutput
from genssm.training.objectives import DiffusionObjective
from tests.golden.checks import Check, compare, equal
from tests.golden.zigma import under

Tensors = dict[str, torch.Tensor]
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def given_arguments(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a user of the converter would have to say, because the weights do not show it."""
    config = info["config"]
    patch, grids = config["patch_size"], config.get("token_grids")
    given = {"num_scan_patterns": config["num_scan_patterns"], "edge_dilation": config["conv_dilation"]}
    if config["pad_layout"] is not None:
        given["pad_layout"] = config["pad_layout"]
    if grids is not None and grids[0][0] != grids[0][1]:
        given["sample_size"] = [side * patch for side in grids[0]]
    return given


def network(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Convert the weights, check what was read off them, then outputs and every gradient in the file."""
    published, inputs, gradients = under("w", tensors), under("in", tensors), under("grad", tensors)
    model, report = load_published("dim", published, given_arguments(info))
    yield equal("keys", str(report), "missing keys: none\nunexpected keys: none\nreshaped keys: none")
    yield from _read_off(info, model)
    tune = info["config"].get("skip_tune")
    if tune is not None:
        yield equal("skip tuning of the first skip block", tune["bottom"], 1.0)
        model.enable_skip_tuning(tune["top"], "as_released" if tune["as_released"] else "time")

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
    model: DiM, published: Tensors, inputs: Tensors, gradients: Tensors, last_bits: int = 0
) -> tuple[torch.Tensor, Tensors]:
    """Output, and gradients of its mean square under the published names, through the converter's key table.

    ``last_bits`` as in :func:`tests.golden.zigma.network`: that many steps of the float32 time are added, which shows
    how far a gradient depends on the last bit of the sinusoidal frequencies.
    """
    leaves = {key: value.clone().requires_grad_(f"w.{key}" in gradients) for key, value in published.items()}
    inputs = {
        key: value.clone().requires_grad_() if f"in.{key}" in gradients else value for key, value in inputs.items()
    }
    time = inputs["t"]
    if last_bits:
        time = time + last_bits * (torch.nextafter(time, torch.full_like(time, torch.inf)) - time).detach()
    output = functional_call(
        model, PUBLISHED["dim"].weights(leaves), (inputs["x"], time.double() - 1, inputs.get("y"))
    ).sample
    sources = [inputs[key[3:]] if key.startswith("in.") else leaves[key[2:]] for key in gradients]
    return output, dict(zip(gradients, torch.autograd.grad(output.square().mean(), sources)))


def _read_off(info: Mapping[str, Any], model: DiM) -> Iterator[Check]:
    """The configuration that the converter inferred, against the one in the JSON."""
    config, ssm = info["config"], info["config"]["ssm"]
    classes = config["num_classes"]
    expected = {
        "in_channels": config["in_channels"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["depth"],
        "patch_size": config["patch_size"],
        "num_classes": classes or 0,
        "null_condition": classes is not None,
        "learn_sigma": config["out_channels"] != config["in_channels"],
        "skip_fusion": config["skip_fusion"] if config["long_skips"] else "none",
        "num_pad_tokens": config["pad_len"],
        "num_prefix_tokens": config["pad_len"] if config["prefix_pad_tokens"] else 0,
        "edge_convs": config["edge_convs"],
        "time_token_mlp": config["time_token_mlp"],
        "duplicate_condition_tokens": config["duplicate_condition_tokens"],
        "final_conv": config["final_conv"],
        "time_convention": "one_based",
        **{name: ssm[name] for name in ("d_state", "d_conv", "expand")},
        "dt_rank": "auto" if isinstance(ssm["dt_rank"], str) else ssm["dt_rank"],
    }
    for key, value in expected.items():
        yield equal(f"config.{key}", model.config[key], value)
    yield equal("first skip block", model.first_skip - config["depth"] // 2, config["first_skip_block"])
    if "parameters" in info:
        yield equal("parameters", sum(p.numel() for p in model.parameters()), info["parameters"])


def _pipeline(info: Mapping[str, Any], tensors: Tensors, **solver: Any) -> tuple[DiMUpsamplingPipeline, Check]:
    model, report = load_published("dim", under("w", tensors), given_arguments(info))
    pipe = DiMUpsamplingPipeline(model, ContinuousDPMSolverScheduler(**SCHEDULE, **solver))
    pipe.set_progress_bar_config(disable=True)
    return pipe, equal("keys complete", report.complete, True)


def sampling(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Sample with the pipeline, guided, in both forms of the solver."""
    forms = {"x0form": "dpmsolver++", "epsform": "dpmsolver"}
    for key in sorted(under("out", tensors)):
        form, _, evaluations = key.partition(".nfe")
        pipe, complete = _pipeline(info, tensors, algorithm_type=forms[form])
        yield complete
        sample = ClassConditionalImagePipeline(pipe.denoiser, pipe.scheduler)
        sample.set_progress_bar_config(disable=True)
        images = sample(
            tensors["in.y"],
            latents=tensors["in.z"],
            num_inference_steps=int(evaluations),
            guidance_scale=1 + info["guidance_scale"],
            output_type="latent",
        ).images
        yield compare(f"out.{key}", images, tensors[f"out.{key}"], info["tolerance"]["out"])


def upsample_guidance(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """The matched times, the corrected prediction at each time, and a whole sample of the upsampling pipeline."""
    pipe, complete = _pipeline(info, tensors, algorithm_type="dpmsolver")
    yield complete
    abar, tolerances, levels = pipe.scheduler.alphas_cumprod, info["tolerance"], 1000 * tensors["in.t"]
    tau = [matched_time(abar, int(n), info["factor"]).clamp(max=n / 1000).expand(len(tensors["in.y"])) for n in levels]
    yield compare("out.tau", torch.stack(tau), tensors["out.tau"], tolerances["out.tau"])

    tune = info["config"]["skip_tune"]
    call = {
        "factor": info["factor"],
        "height": info["config"]["latent_size"],
        "width": info["config"]["latent_size"],
        "guidance_scale": 1 + info["guidance_scale"],
        "upsample_scale": info["theta"],
        "upsample_from": info["T"] - info["eta"],
        "skip_tuning": "as_released" if tune["as_released"] else "time",
        "skip_tuning_top": tune["top"],
        "latents": tensors["in.x"],
        "output_type": "latent",
    }
    for n, expected in zip(levels, tensors["out.eps"]):
        # One evaluation of a whole call: the scheduler's grid is put at the wanted time, the prediction taken as is.
        got = _prediction_of_call(pipe, n, tensors["in.y"], call)
        yield compare(f"out.eps at level {float(n):g}", got, expected, tolerances["out.eps"])
    images = pipe(tensors["in.y"], num_inference_steps=7, **call).images
    yield compare("out.sample_nfe7", images, tensors["out.sample_nfe7"], tolerances["out.sample_nfe7"])


def _prediction_of_call(pipe: DiMUpsamplingPipeline, level: torch.Tensor, labels: torch.Tensor, call: dict) -> Any:
    """The noise prediction that a call of the pipeline makes from its latents at a noise level."""
    kept = pipe.scheduler
    pipe.scheduler = _OneEvaluation(level - 1, kept)
    try:
        return pipe(labels, num_inference_steps=1, **call).images
    finally:
        pipe.scheduler = kept


class _OneEvaluation(ContinuousDPMSolverScheduler):
    """A grid of one time, whose step returns the prediction itself."""

    def __init__(self, timestep: torch.Tensor, like: ContinuousDPMSolverScheduler) -> None:
        super().__init__(**{k: v for k, v in like.config.items() if not k.startswith("_")})
        self._timestep = timestep

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.timesteps = self._timestep.reshape(1).to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def step(self, model_output: torch.Tensor, *_: Any, **__: Any) -> SingleStepSolverOutput:
        return SingleStepSolverOutput(model_output)


def objective(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Schedule, noised latents, loss, the solver's continuous times, and the resizing of positions."""
    inputs, expected, tolerance = under("in", tensors), under("out", tensors), info["tolerance"]
    scheduler = ContinuousDPMSolverScheduler(**SCHEDULE)
    objective = DiffusionObjective(scheduler=SCHEDULE)
    timesteps = inputs["n"] - 1
    seen = []

    def network(noisy: torch.Tensor, t: torch.Tensor) -> DenoiserOutput:
        seen.append((noisy, t))
        return DenoiserOutput(inputs["pred"])

    loss = objective.loss(network, inputs["x0"], noise=inputs["eps"], timesteps=timesteps)
    noisy, t = seen[0]
    yield equal("timesteps of the network", t.tolist(), timesteps.tolist())
    schedule, times = scheduler.schedule, inputs["tq"].double().numpy()
    half_log_snr = expected["lambda"].double().numpy()
    positions = DiM(**_TABLE, sample_size=4), DiM(**_TABLE, sample_size=6, pad_layout="row_major_cycle")
    with torch.no_grad():
        positions[0].positions.copy_(inputs["pos_table"])
    positions[1].load_resized(positions[0])
    computed = {
        "betas": scheduler.betas,
        "cum_alphas": torch.cat([torch.ones(1), scheduler.alphas_cumprod]),
        "xn": noisy,
        "loss": loss,
        "log_alpha": torch.from_numpy(schedule.log_alpha(times)),
        "lambda": torch.from_numpy(schedule.half_log_snr(times)),
        "inverse_lambda": torch.from_numpy(schedule.time_at(half_log_snr)),
        "pos_table_resized": positions[1].positions,
    }
    yield equal("quantities", sorted(expected), sorted(computed))
    for key in sorted(set(expected) & set(computed)):
        yield compare(f"out.{key}", computed[key], expected[key], tolerance)
    continuous = scheduler.add_noise(inputs["x0"], inputs["eps"], timesteps)
    yield compare("out.xn of the solver", continuous, expected["xn"], tolerance)


# A model whose position table is that of the file: two condition tokens, 4x4 patches, width 6.
_TABLE = {"patch_size": 1, "hidden_size": 6, "num_layers": 1, "num_classes": 2}
