"""What every denoiser must do, as checks that each model's tests call with their own small models and inputs."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

Inputs = Mapping[str, Any]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add small noise to every parameter, so that nothing starts at zero and every path contributes to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def with_text(inputs: Inputs, model: nn.Module) -> dict[str, Any]:
    """The inputs with text tokens of different lengths (at most 4) for a model that reads text."""
    if not model.config.context_dim:
        return dict(inputs)
    batch = len(inputs["hidden_states"])
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(batch, 4, model.config.context_dim, generator=generator)
    mask = torch.arange(4)[None] < 4 - torch.arange(batch)[:, None] % 3
    return {**inputs, "encoder_hidden_states": tokens, "encoder_attention_mask": mask}


def check_text(model: nn.Module, inputs: Inputs) -> None:
    """Tokens that do not count change nothing, a row without text is the null text, real text is read."""
    model = randomise(model).eval()
    without = {key: value for key, value in inputs.items() if not key.startswith("encoder")}
    tokens, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"].clone()
    with torch.no_grad():
        expected = model(**inputs).sample
        changed = torch.where(mask[..., None], tokens, 1e3)
        torch.testing.assert_close(model(**{**inputs, "encoder_hidden_states": changed}).sample, expected)
        short = {**rows(inputs, slice(1, 2)), "encoder_hidden_states": tokens[1:2, :3], "encoder_attention_mask": None}
        torch.testing.assert_close(model(**short).sample, expected[1:2], rtol=1e-5, atol=1e-5)
        null = model(**without).sample
        mask[1] = False
        mixed = model(**{**inputs, "encoder_attention_mask": mask}).sample
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], null[1], rtol=1e-5, atol=1e-5)
    assert model.has_null_text
    assert not torch.allclose(null, expected, atol=1e-4)


def rows(inputs: Inputs, index: slice) -> dict[str, Any]:
    """Some samples of a batch of inputs."""
    return {
        key: value[index] if isinstance(value, torch.Tensor) and value.dim() else value for key, value in inputs.items()
    }


def gradients(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor | None]:
    """Gradients of the mean square of the output, by parameter name."""
    model.zero_grad(set_to_none=True)
    model(**inputs).sample.square().mean().backward()
    # Copies: moving a model to another device takes the gradients of its parameters along.
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: None if grad is None else grad.clone() for name, grad in grads.items()}


def check_gradients_reach_everything(model: nn.Module, inputs: Inputs, unused: tuple[str, ...] = ()) -> None:
    """Every trainable parameter gets a finite gradient that is not all zero, except the ``unused`` ones."""
    for name, gradient in gradients(randomise(model), inputs).items():
        if name in unused:
            continue
        assert gradient is not None, f"{name} gets no gradient"
        assert gradient.isfinite().all(), f"{name} gets a gradient that is not finite"
        assert gradient.abs().max() > 0, f"{name} gets a zero gradient"


def check_save_load(model: nn.Module, inputs: Inputs, folder: Path) -> None:
    """A saved and loaded model has the same configuration and gives the same bits."""
    randomise(model).eval().save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    before, after = ({k: v for k, v in m.config.items() if not k.startswith("_")} for m in (model, loaded))
    assert after == before
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


def check_batch_independent(model: nn.Module, inputs: Inputs) -> None:
    """A batch gives what its samples give alone."""
    model = randomise(model).eval()
    with torch.no_grad():
        together = model(**inputs).sample
        alone = [model(**rows(inputs, slice(i, i + 1))).sample for i in range(len(together))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3), "the samples do not differ; the check shows nothing"


def check_null_class(model: nn.Module, inputs: Inputs) -> None:
    """Labels of None, the null label, and one batch with real and null labels agree; null differs from a class."""
    model = randomise(model).eval()
    labels = inputs["class_labels"]
    null = torch.full_like(labels, model.null_class_label)
    with torch.no_grad():
        without = model(**{**inputs, "class_labels": None}).sample
        with_null = model(**{**inputs, "class_labels": null}).sample
        real = model(**inputs).sample
        doubled = {key: torch.cat([value, value]) for key, value in inputs.items()}
        both = model(**{**doubled, "class_labels": torch.cat([labels, null])}).sample
    assert torch.equal(without, with_null)
    torch.testing.assert_close(both, torch.cat([real, without]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(real, without, atol=1e-4)


def check_bf16(model: nn.Module, inputs: Inputs, folder: Path) -> None:
    """Weights in bfloat16, and bfloat16 autocast over float32 weights: finite forward and backward, near float32."""
    randomise(model).eval().save_pretrained(folder)
    with torch.no_grad():
        exact = model(**inputs).sample
    low = type(model).from_pretrained(folder, torch_dtype=torch.bfloat16)
    kept = {name: p.dtype for name, p in low.named_parameters() if name.split(".")[-1] in model._keep_in_fp32_modules}
    assert kept and set(kept.values()) == {torch.float32}
    cast = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.dim() > 1 else v for k, v in inputs.items()}
    out = low(**cast).sample
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(**inputs).sample
    autocast.float().square().mean().backward()
    for got, trained in ((out, low), (autocast, model)):
        assert (got.float() - exact).norm() < 0.1 * exact.norm()
        assert all(p.grad.isfinite().all() for p in trained.parameters() if p.grad is not None)


def check_gradient_checkpointing(model: nn.Module, inputs: Inputs) -> None:
    """Recomputing the blocks in the backward pass gives the same gradients, dropout included."""
    model = randomise(model).train()
    results = []
    for recompute in (False, True):
        twin = copy.deepcopy(model)
        if recompute:
            twin.enable_gradient_checkpointing()
            assert twin.is_gradient_checkpointing
        torch.manual_seed(0)
        results.append(gradients(twin, inputs))
    for name, gradient in results[0].items():
        torch.testing.assert_close(
            results[1][name], gradient, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_compile(model: nn.Module, inputs: Inputs) -> None:
    """The whole model is one graph, forward and backward, and computes the same."""
    model = randomise(model).eval()
    expected = gradients(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample, rtol=1e-5, atol=1e-5)
    model.zero_grad(set_to_none=True)
    compiled(**inputs).sample.square().mean().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def check_lora(model: nn.Module, inputs: Inputs, folder: Path, targets: list[str]) -> None:
    """An adapter trains, saves, loads, and is switched off and on; the plain model is untouched beneath it."""
    from peft import LoraConfig

    model = randomise(model).eval()
    with torch.no_grad():
        plain = model(**inputs).sample
    twin = copy.deepcopy(model)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert {target for target in targets if any(f".{target}." in name for name in trained)} == set(targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        adapted = model(**inputs).sample
    assert not torch.allclose(adapted, plain, atol=1e-4)
    assert all(g is not None and g.abs().max() > 0 for g in gradients(model, inputs).values())
    model.save_lora_adapter(folder)
    twin.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    with torch.no_grad():
        torch.testing.assert_close(twin(**inputs).sample, adapted, rtol=0, atol=0)
        twin.disable_adapters()
        torch.testing.assert_close(twin(**inputs).sample, plain, rtol=0, atol=0)


def check_offloading(model: nn.Module, inputs: Inputs) -> None:
    """diffusers' group offloading and accelerate's sequential one reach every parameter: the same bits come out."""
    from accelerate import cpu_offload

    cpu = torch.device("cpu")
    model = randomise(model).eval()
    grouped, sequential = copy.deepcopy(model), copy.deepcopy(model)
    grouped.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    cpu_offload(sequential, execution_device=cpu)
    assert all(parameter.is_meta for parameter in sequential.parameters())
    with torch.no_grad():
        for offloaded in (grouped, sequential):
            assert torch.equal(offloaded(**inputs).sample, model(**inputs).sample)


def check_layerwise_casting(model: nn.Module, inputs: Inputs) -> None:
    """Matrices stored in 8 bits and computed in float32: norms, embeddings and states keep their precision."""
    model = randomise(model).eval()
    cast = copy.deepcopy(model)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name for name, parameter in cast.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert any("in_proj" in name for name in stored)
    assert not [name for name in stored if "norm" in name or "_embed" in name or name.split(".")[-1] in ("A_log", "D")]
    with torch.no_grad():
        exact, out = model(**inputs).sample, cast(**inputs).sample
    error = float((out - exact).norm() / exact.norm())
    assert 0 < error < 0.15
