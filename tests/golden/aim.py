"""AiM's golden cases: sequence model, tokenizer, quantiser, token filters, label to image."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

from genssm.convert import PUBLISHED, load_published
from genssm.models import AiM
from genssm.models.vq import VectorQuantizer
from genssm.pipelines import AutoregressiveImagePipeline
from genssm.pipelines.token_sampling import TokenSampling, filter_logits
from tests.golden.checks import Check, compare, equal
from tests.golden.zigma import under

Tensors = dict[str, torch.Tensor]
Info = Mapping[str, Any]
NO_MISFIT = "missing keys: none\nunexpected keys: none\nreshaped keys: none"


def _gradient_tolerance(info: Info) -> dict[str, float]:
    return {"atol": info["tolerance_grad"]["relative_to_max"], "rtol": 0.0}


def given_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a user of the converter would have to say, because the weights do not show it."""
    ssm, tokens = config["ssm_options"], config["num_tokens"]
    given = {"norm_eps": config["norm_eps"]}
    if "ngroups" in ssm:
        given["ngroups"] = ssm["ngroups"]
    if config["mlp_hidden"] and not config["fused_add_norm"]:
        given["mlp_residual"] = "as_released_unfused"
    if math.isqrt(tokens) ** 2 != tokens:
        given["sample_size"] = [1, tokens]
    return given


def network(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Teacher-forced logits and gradients, cached decoding, its states, greedy codes; or label to image."""
    if "out.image" in tensors:
        yield from label_to_image(info, tensors)
        return
    published, inputs = under("w", tensors), under("in", tensors)
    codes, labels = inputs["codes"], inputs["labels"].flatten()
    given = given_arguments(info["config"])
    model, report = load_published("aim", published, {**given, "position_offset": 0})
    yield equal("keys", str(report), NO_MISFIT)
    yield from _read_off(info["config"], model)

    weights = {key: value.float().requires_grad_() for key, value in published.items()}
    logits = functional_call(model, PUBLISHED["aim"].weights(weights), (codes[:, :-1], labels)).logits
    entropy = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    computed = {"logits_train": logits, "cross_entropy": entropy}
    model, _ = load_published("aim", published, given)
    with torch.no_grad():
        computed |= _decode(model, codes, labels, info["cfg_scale"])
    for key, value in under("out", tensors).items():
        if key.startswith("greedy_tokens"):
            yield equal(f"out.{key}", computed[key].tolist(), value.tolist())
            continue
        got = computed[key][..., 1:] if key.startswith("cache.conv") else computed[key]
        value = value[..., 1:] if key.startswith("cache.conv") else value
        stepwise = "step_logits" in key or "greedy" in key
        yield compare(f"out.{key}", got, value, info["tolerance_decode" if stepwise else "tolerance"])
    for key, value in under("grad", tensors).items():
        loss = entropy if key.startswith("ce.") else logits.square().mean()
        source = weights[key.removeprefix("ce.").removeprefix("w.")]
        (got,) = torch.autograd.grad(loss, source, retain_graph=True)
        yield compare(f"grad.{key}", got, value, _gradient_tolerance(info))


def _read_off(config: Mapping[str, Any], model: AiM) -> Iterator[Check]:
    """The configuration that the converter inferred, against the one in the JSON."""
    ssm = config["ssm_options"]
    expected = {
        "hidden_size": config["d_model"],
        "num_layers": config["n_layer"],
        "vocab_size": config["vocab"],
        "num_classes": config["num_classes"],
        "mixer": {"Mamba1": "mamba", "Mamba2": "mamba2"}[ssm["layer"]],
        "num_groups": config["num_groups"] if config["adaln_group"] else 0,
        "mlp_hidden": 128 * math.ceil(config["mlp_hidden"] / 128),
        "norm": "rms" if config["rms_norm"] else "layer",
        "tie_embeddings": config["tied_embeddings"],
        **{name: ssm[name] for name in ("d_state", "d_conv", "expand", "headdim") if name in ssm},
    }
    for key, value in expected.items():
        yield equal(f"config.{key}", model.config[key], value)
    yield equal("num_tokens", model.num_tokens, config["num_tokens"])


def _decode(model: AiM, codes: torch.Tensor, labels: torch.Tensor, scale: float) -> Tensors:
    """Full logits with and without the condition, the same step by step under guidance, states, greedy codes."""
    null = torch.full_like(labels, model.null_class_label)
    both = torch.cat([labels, null])
    computed = {
        "logits_shifted_cond": model(codes[:, :-1], labels).logits,
        "logits_shifted_uncond": model(codes[:, :-1], null).logits,
    }
    cache = model.new_cache(len(both))
    steps = [model(class_labels=both, cache=cache).logits]
    steps += [model(codes[:, i : i + 1].repeat(2, 1), cache=cache).logits for i in range(codes.shape[1] - 1)]
    conditional, unconditional = torch.cat(steps, dim=1).chunk(2)
    computed["step_logits_guided"] = unconditional + (conditional - unconditional) * scale
    for layer, state in enumerate(cache.states):
        # Ours keeps the d_conv - 1 columns that a convolution still needs, the golden one column more.
        columns = F.pad(getattr(state, "window", state.conv)[:, 0], (1, 0))
        computed |= {f"cache.conv.{layer}": columns, f"cache.ssm.{layer}": state.ssm[:, 0].clone()}
    cache.begin()
    logits, drawn = model(class_labels=both, cache=cache).logits, []
    while True:
        conditional, unconditional = logits[:, -1].chunk(2)
        guided = unconditional + (conditional - unconditional) * 4
        drawn.append(guided.argmax(dim=-1))
        if len(drawn) == codes.shape[1]:
            break
        logits = model(drawn[-1].repeat(2)[:, None], cache=cache).logits
    return computed | {"greedy_tokens_scale4": torch.stack(drawn, dim=1), "greedy_last_logits_scale4": guided}


def label_to_image(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Tokenizer and sequence model out of one file, and the pipeline on them."""
    config, published = info["config"], under("w", tensors)
    model, report = load_published("aim", published, given_arguments(config))
    yield equal("keys", str(report), NO_MISFIT)
    yield from _read_off(config, model)
    about = config["tokenizer"]
    shown = {"base_channels": about["base_channels"], "norm_num_groups": about.get("groups", 32)}
    tokenizer, report = load_published("vq", published, shown)
    yield equal("keys of the tokenizer", str(report), NO_MISFIT)
    pipe = AutoregressiveImagePipeline(model, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    labels = tensors["in.labels"].flatten()
    call = {"temperature": 0, "guidance_scale": config["cfg_scale"]}
    codes = pipe(labels, **call, output_type="latent").images
    yield equal("out.tokens", codes.tolist(), tensors["out.tokens"].tolist())
    with torch.no_grad():
        yield compare("out.image", tokenizer.decode_codes(codes), tensors["out.image"], info["tolerance"])
    images = pipe(labels, **call, output_type="pt").images
    expected = (tensors["out.image"] / 2 + 0.5).clamp(0, 1)
    yield compare("out.image of the pipeline", images, expected, info["tolerance"])


def tokenizer(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Convert the weights; encode, quantise and decode; gradients."""
    config, published, inputs = info["config"], under("w", tensors), under("in", tensors)
    given = {"norm_num_groups": config["groups"], "normalize_codes": config["l2_normalised_codebook"]}
    if not config["has_encoder"]:
        given["base_channels"] = config["base_channels"]
    model, report = load_published("vq", published, given)
    yield equal("keys", str(report), NO_MISFIT)
    expected = {
        "base_channels": config["base_channels"],
        "channel_multipliers": config["channel_multipliers"],
        "layers_per_block": config["res_blocks_per_level"],
        "latent_channels": config["z_channels"],
        "num_vq_embeddings": config["codebook_size"],
        "vq_embed_dim": config["codebook_dim"],
        "has_encoder": config["has_encoder"],
    }
    for key, value in expected.items():
        yield equal(f"config.{key}", model.config[key], value)

    weights = {key: value.float().requires_grad_() for key, value in published.items()}
    ours = PUBLISHED["vq"].weights(weights)
    grid = (config["latent_size"], config["latent_size"])

    def call(function: Callable, *arguments: Any) -> Any:
        return functional_call(_Call(model, function), {f"model.{k}": v for k, v in ours.items()}, arguments)

    computed = {
        "codebook_entry": call(lambda m, codes: m.quantize.lookup(codes, grid), inputs["codes"]),
        "image": call(lambda m, codes: m.decode_codes(codes, grid), inputs["codes"]),
    }
    if config["has_encoder"]:
        images = inputs["x"].requires_grad_()
        computed["encoder"] = call(lambda m, x: m.encoder(x), images)
        computed["pre_quant"] = call(lambda m, x: m.encode(x), images)
        computed["reconstruction"], quantized, _ = call(lambda m, x: m(x, return_dict=False), images)
        computed["quantized"], computed["indices"] = quantized.latents, quantized.codes
    for key, value in under("out", tensors).items():
        if key == "indices":
            yield equal("out.indices", computed[key].flatten().tolist(), value.flatten().tolist())
        else:
            yield compare(f"out.{key}", computed[key], value, info["tolerance"])
    for key, value in under("grad", tensors).items():
        if key == "in.x":
            loss, source = computed["reconstruction"].square().mean(), images
        else:
            loss, source = computed["image"].square().mean(), weights[key.removeprefix("w.")]
        (got,) = torch.autograd.grad(loss, source, retain_graph=True)
        yield compare(f"grad.{key}", got, value, _gradient_tolerance(info))


class _Call(torch.nn.Module):
    """Calls a function of a model, so that ``functional_call`` can put other weights into the model."""

    def __init__(self, model: torch.nn.Module, function: Callable) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *arguments: Any) -> Any:
        return self.function(self.model, *arguments)


def quantizer(info: Info, tensors: Tensors) -> Iterator[Check]:
    """The quantiser in training: output, codes, its three losses and their gradients, straight-through gradient."""
    config, purpose = info["config"], info["purpose"]
    model = VectorQuantizer(
        config["codebook_size"],
        config["codebook_dim"],
        normalize=config.get("l2_normalised_codebook", True),
        commitment_weight=_stated(r"commit weight (\d[\d.]*\d)", purpose, 0.25),
        entropy_weight=_stated(r"weight (\d[\d.]*\d) here", purpose, 0.0),
        entropy_temperature=_stated(r"temperature (\d[\d.]*\d)", purpose, 0.01),
    ).train()
    model.embedding.weight.data.copy_(tensors["w.embedding.weight"])
    z = tensors["in.z"].requires_grad_()
    result = model(z)
    computed = {
        "z_q": result.latents,
        "vq_loss": result.codebook_loss,
        "commit_loss": result.commitment_loss,
        "entropy_loss": result.entropy_loss,
    }
    for key, value in under("out", tensors).items():
        if key == "indices":
            yield equal("out.indices", result.codes.flatten().tolist(), value.flatten().tolist())
        else:
            yield compare(f"out.{key}", computed[key], value, info["tolerance"])
    loss = result.codebook_loss + result.commitment_loss + result.entropy_loss
    passed_on = (result.latents * torch.linspace(-1, 1, z.numel()).view_as(z)).sum()
    sources = {
        "in.z": (loss, z),
        "in.z.straight_through": (passed_on, z),
        "w.embedding.weight": (loss, model.embedding.weight),
    }
    for key, value in under("grad", tensors).items():
        (got,) = torch.autograd.grad(*sources[key], retain_graph=True)
        yield compare(f"grad.{key}", got, value, _gradient_tolerance(info))


def _stated(pattern: str, text: str, usual: float) -> float:
    """A number that a case's description states in words."""
    found = re.search(pattern, text)
    return float(found[1]) if found else usual


def token_filters(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Which tokens the filters keep, and the distribution that is drawn from."""
    for key, value in under("out", tensors).items():
        k, p = re.search(r"\.k(\d+)\.p([\d.]+\d)", key).groups()
        temperature = re.search(r"temperature([\d.]+?)\.k", key)
        logits = tensors["in.logits_ties" if ".ties." in key else "in.logits"]
        sampling = TokenSampling(float(temperature[1]) if temperature else 1.0, int(k), float(p))
        if key.startswith("kept"):
            kept = filter_logits(logits, sampling.top_k, sampling.top_p).isfinite()
            yield equal(f"out.{key}", kept.int().tolist(), value.tolist())
        else:
            yield compare(f"out.{key}", sampling.probabilities(logits), value, info["tolerance"])


PARTS: dict[str, Callable[[Info, Tensors], Iterator[Check]]] = {
    "tokenizer": tokenizer,
    "quantizer": quantizer,
    "token filters": token_filters,
}


def kind_of_part(keys: Iterable[str]) -> str | None:
    """Kind of a case that names no model, from the names of its tensors."""
    marks = {"w.decoder.conv_in.weight": "tokenizer", "in.z": "quantizer", "in.logits": "token filters"}
    keys = set(keys)
    return next((kind for mark, kind in marks.items() if mark in keys), None)
