"""Golden cases of the motion networks: MLD's VAE and denoiser, guided sampling, Motion Mamba, KMM's key frames."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.func import functional_call

from genssm.convert import PUBLISHED, load_published
from genssm.models.motion_vae import MotionVAEOutput, motion_vae_losses
from genssm.motion import FeatureStatistics, features_to_joints, skeleton_of_features
from genssm.training.key_frames import key_frame_scores
from tests.golden.checks import Check, compare, equal

Tensors = dict[str, torch.Tensor]
NETWORK = {"rtol": 1e-5, "atol": 2e-5}
GRADIENT = {"rtol": 0.0, "atol": 1e-4}  # of the largest value of each gradient
SAMPLING = {"rtol": 1e-4, "atol": 1e-4}
KEY_FRAMES = {"rtol": 1e-6, "atol": 1e-6}


def under(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names start with ``prefix.``, without it."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}


def _load(name: str, tensors: Tensors, given: Mapping[str, Any]) -> tuple[nn.Module, Check]:
    """Convert the weights; the model, and the check that every key fits."""
    model, report = load_published(name, under("w", tensors), given)
    return model, equal("keys", [*report.missing, *report.unexpected, *report.reshaped], [])


def _time_convention(info: Mapping[str, Any]) -> dict[str, Any]:
    return {"sine_first": not info["flip_sin_to_cos"], "time_shift": float(info["freq_shift"])}


def _gradients(name: str, model: nn.Module, tensors: Tensors, scalar: Callable[..., torch.Tensor]) -> Iterator[Check]:
    """Gradients of ``scalar(run, inputs)`` by the published weights and the inputs, against the file.

    ``run`` calls ``model`` with the published weights, converted.
    """
    wanted = under("grad", tensors)
    leaves = {key: value.clone().requires_grad_() for key, value in under("w", tensors).items()}
    inputs = {
        key: value.clone().requires_grad_() if f"in.{key}" in wanted else value
        for key, value in under("in", tensors).items()
    }
    known = set(model.state_dict())
    weights = {key: value for key, value in PUBLISHED[name].weights(leaves).items() if key in known}
    result = scalar(lambda *args: functional_call(model, weights, args), inputs)
    sources = [inputs[key[3:]] if key.startswith("in.") else leaves[key[2:]] for key in wanted]
    computed = torch.autograd.grad(result, sources, allow_unused=True, materialize_grads=True)
    for (key, expected), got in zip(wanted.items(), computed):
        yield compare(f"grad.{key}", got[: len(expected)] if key.endswith(".pe") else got, expected, GRADIENT)


def vae(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Encode, decode, joints, losses and the gradients of their sum."""
    lengths = info["lengths"]
    given = {key: info[key] for key in ("num_heads", "activation")} | {"pre_norm": info["normalize_before"]}
    model, check = _load("motion_vae", tensors, given)
    yield check
    tokens, width = info["latent_dim"]
    config = {"in_channels": info["nfeats"], "latent_tokens": tokens, "hidden_size": width}
    config |= {key: info[key] for key in ("num_layers", "ff_size", "arch", "mlp_dist")}
    config["pos_embed"] = "sinusoidal" if info["pe_type"] == "actor" else "learned"
    yield equal("config", {key: model.config[key] for key in config}, config)

    statistics = FeatureStatistics(tensors["in.mean"], tensors["in.std"])
    skeleton = skeleton_of_features(info["nfeats"])

    def joints(features: torch.Tensor) -> torch.Tensor:
        return features_to_joints(statistics.denormalise(features), skeleton)

    def total(run: Callable[..., MotionVAEOutput], inputs: Tensors) -> torch.Tensor:
        output = run(inputs["features"], lengths, inputs["eps"].transpose(0, 1))
        return motion_vae_losses(inputs["features"], output, joints)["total"].mean()

    inputs = under("in", tensors)
    with torch.no_grad():
        output = model(inputs["features"], lengths, inputs["eps"].transpose(0, 1))
        losses = motion_vae_losses(inputs["features"], output, joints)
        results = {
            "mu": output.posterior.mean.transpose(0, 1), "std": output.posterior.std.transpose(0, 1),
            "z": output.latents.transpose(0, 1), "recon": output.sample,
            "recon_from_mu": model.decode(output.posterior.mean, lengths),
            "joints_recon": joints(output.sample), "joints_ref": joints(inputs["features"]),
            **{f"loss_{key}": value.mean()[None] for key, value in losses.items()},
        }  # fmt: skip
    for key, expected in under("out", tensors).items():
        scale = max(1.0, float(expected.abs().max()))  # KIT's unit is a millimetre
        yield compare(f"out.{key}", results[key], expected, {**NETWORK, "atol": scale * NETWORK["atol"]})
    yield from _gradients("motion_vae", model, tensors, total)


def denoiser(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """MLD's denoiser: output and gradients."""
    given = {key: info[key] for key in ("num_heads", "activation") if key in info} | _time_convention(info)
    given["pre_norm"] = info.get("normalize_before", False)
    if info["vae_type"] != "no":
        given["latent_tokens"] = info["latent_dim"][0]
    model, check = _load("mld", tensors, given)
    yield check
    arch = "decoder" if info["arch"] == "trans_dec" else "skip_encoder" if info["skip_connect"] else "encoder"
    yield equal("arch", model.config.arch, arch)
    yield equal("num_layers", model.config.num_layers, info["num_layers"])

    def weighted(run: Callable[..., Any], inputs: Tensors) -> torch.Tensor:
        return (_predict(run, info, inputs) * inputs["grad_out"]).sum()

    with torch.no_grad():
        yield compare("out.sample", _predict(model, info, under("in", tensors)), tensors["out.sample"], NETWORK)
    yield from _gradients("mld", model, tensors, weighted)


def _predict(run: Callable[..., Any], info: Mapping[str, Any], inputs: Tensors) -> torch.Tensor:
    return run(inputs["sample"], inputs["timestep"], inputs["text"], None, None, info["lengths"]).sample


def sampling(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """A guided DDIM trajectory with the converted denoiser, and the noise schedule."""
    given = {"num_heads": info["num_heads"], "latent_tokens": info["latent_dim"][0]}
    model, check = _load("mld", tensors, given)
    yield check
    scheduler = DDIMScheduler(**info["scheduler"])
    scheduler.set_timesteps(info["steps"])
    yield compare("out.timesteps", scheduler.timesteps, tensors["out.timesteps"], SAMPLING)
    abar = scheduler.alphas_cumprod[[0, 1, 500, 999]]
    yield compare("out.alphas_cumprod", abar, tensors["out.alphas_cumprod"], SAMPLING)
    noisy = scheduler.add_noise(tensors["in.latents"], tensors["in.noise"], tensors["in.t_train"])
    yield compare("out.noisy", noisy, tensors["out.noisy"], SAMPLING)
    x, trajectory = tensors["in.latents"], []
    with torch.no_grad():
        for t in scheduler.timesteps:
            null, conditional = model(torch.cat([x, x]), t, tensors["in.text_uncond_then_cond"]).sample.chunk(2)
            guided = null + info["guidance_scale"] * (conditional - null)
            x = scheduler.step(guided, t, x, eta=info["eta"]).prev_sample
            trajectory.append(x)
    yield compare("out.trajectory", torch.stack(trajectory), tensors["out.trajectory"], SAMPLING)
    yield compare("out.latents_token_first", x.transpose(0, 1), tensors["out.latents_token_first"], SAMPLING)


def motion_mamba(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Motion Mamba: the parts of its first block, its output and gradients."""
    given = {"num_heads": info["num_heads"], "condition_first": info["condition_first"], **_time_convention(info)}
    given |= {
        "block_residual": info["residual"],
        **{key: info[key] for key in ("bi_scan", "activation") if key in info},
    }
    model, check = _load("motion_mamba", tensors, given)
    yield check
    yield equal("num_layers", model.config.num_layers, 2 * info["N"] + 1)
    yield equal("scans", [block.htm.scans.scans for block in model.input_blocks], info["scan_counts_down"])
    inputs, block = under("in", tensors), model.input_blocks[0]
    with torch.no_grad():
        htm = block.htm(inputs["block_x"])
        results = {
            "block0_htm": htm, "block0_bsm_of_htm": block.bsm(htm), "block0": block(inputs["block_x"]),
            "sample": model(inputs["sample"], inputs["timestep"], inputs["text"]).sample,
        }  # fmt: skip
    for key, expected in under("out", tensors).items():
        yield compare(f"out.{key}", results[key], expected, NETWORK)

    def weighted(run: Callable[..., Any], given_inputs: Tensors) -> torch.Tensor:
        sample = run(given_inputs["sample"], given_inputs["timestep"], given_inputs["text"]).sample
        return (sample * given_inputs["grad_out"]).sum()

    yield from _gradients("motion_mamba", model, tensors, weighted)


def key_frames(info: Mapping[str, Any], tensors: Tensors) -> Iterator[Check]:
    """Density, distance and score of the frames of a clip, in float64, and the frames by falling score."""
    density, distance, score = key_frame_scores(tensors["in.tokens"].double())
    results = {"density": density, "distance": distance, "gamma": score}
    for key, value in results.items():
        yield compare(f"out.{key}", value, tensors[f"out.{key}"], KEY_FRAMES)
    rank = score.argsort(dim=-1, descending=True, stable=True)
    yield equal("out.rank", rank.tolist(), tensors["out.rank"].tolist())


KINDS = {
    "mld_vae": vae,
    "mld_denoiser": denoiser,
    "guided_ddim_sampling": sampling,
    "motion_mamba_denoiser": motion_mamba,
    "kmm_keyframe_score": key_frames,
}
