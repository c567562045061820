"""AiM: counts, causality, positions, conditions, cached decoding, initialisation, gradients, saving, published keys."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from genssm.convert import load_published
from genssm.layers import parameter_groups
from genssm.models import AIM_PRESETS, AiM
from genssm.models.aim import AiMBlock
from tests.models.common import randomise

SMALL = {
    "sample_size": [3, 4], "vocab_size": 20, "num_classes": 5, "hidden_size": 32, "num_layers": 3, "d_state": 8,
    "headdim": 16,
}  # fmt: skip
VARIANTS = [
    {},
    {"num_groups": 2},
    {"num_groups": 1, "mlp_hidden": 100},
    {"mixer": "mamba", "headdim": None, "norm": "layer", "dt_rank": 3},
    {"ngroups": 2, "tie_embeddings": False, "position_offset": 0},
    {"mlp_hidden": 128, "mlp_residual": "as_released_unfused"},
    {"context_dim": 6, "context_length": 4},
]


def make_model(**changes: Any) -> AiM:
    torch.manual_seed(0)
    return randomise(AiM(**{**SMALL, **changes})).eval()


def inputs_of(model: AiM, batch: int = 2, length: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "codes": torch.randint(20, (batch, length), generator=generator),
        "class_labels": torch.randint(5, (batch,), generator=generator),
    }
    if model.config.context_dim:
        inputs["encoder_hidden_states"] = torch.randn(batch, 3, 6, generator=generator)
    return inputs


@pytest.mark.parametrize(
    ("name", "count"), [("B", 147_622_080), ("L", 349_760_000), ("XL", 763_291_392), ("1B", 1_335_944_192)]
)
def test_parameters_of_the_published_sizes(name: str, count: int) -> None:
    with torch.device("meta"):
        model = AiM(**AIM_PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_one_code_at_a_time_equals_the_whole(changes: dict, device: torch.device) -> None:
    """With the codes before them read in one go or not at all."""
    model = make_model(**changes).to(device)
    inputs = {key: value.to(device) for key, value in inputs_of(model).items()}
    codes = inputs.pop("codes")
    with torch.no_grad():
        whole = model(codes, **inputs).logits
        assert whole.shape == (2, 12, 20)
        cache = model.new_cache(2)
        for given in (0, 5):
            cache.begin()
            parts = [model(codes[:, :given], **inputs, cache=cache).logits]
            parts += [model(codes[:, i : i + 1], cache=cache).logits for i in range(given, 11)]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
            assert int(cache.position) == 11


@pytest.mark.parametrize("changes", [{}, {"mixer": "mamba", "headdim": None}], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_type_of_the_states(changes: dict, weights: torch.dtype, asked: torch.dtype | None) -> None:
    model = make_model(**changes).to(weights)
    inputs = inputs_of(model)
    codes = inputs.pop("codes")
    cache = model.new_cache(2, state_dtype=asked)
    expected = asked or (torch.float32 if weights == torch.float32 else torch.float16)
    with torch.no_grad():
        whole = model(codes, **inputs).logits
        parts = [model(codes[:, :3], **inputs, cache=cache).logits]
        parts += [model(codes[:, i : i + 1], cache=cache).logits for i in range(3, 11)]
    convolved = torch.float32 if "mixer" in changes else weights
    assert all(state.ssm.dtype == expected and state.conv.dtype == convolved for state in cache.states)
    error = ((torch.cat(parts, dim=1) - whole).norm() / whole.norm()).item()
    bounds = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
    assert error < (bounds[expected] if weights == torch.float32 else 5e-2)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_later_codes_change_nothing_before(changes: dict) -> None:
    model = make_model(**changes)
    inputs = inputs_of(model)
    changed = inputs["codes"].clone()
    changed[:, 6] = (changed[:, 6] + 1) % 20
    with torch.no_grad():
        before, after = model(**inputs).logits, model(**{**inputs, "codes": changed}).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_position_offset_picks_the_rows() -> None:
    inputs = None
    for offset in (0, 1):
        model = make_model(position_offset=offset)
        inputs = inputs or inputs_of(model)
        model(**inputs).logits.sum().backward()
        used = model.positions.grad.abs().amax(dim=1) > 0
        assert used.tolist() == [offset <= row < 11 + offset for row in range(13)]


def test_conditions() -> None:
    model = make_model()
    inputs = inputs_of(model)
    null = torch.full((2,), model.null_class_label)
    with torch.no_grad():
        real = model(**inputs).logits
        without = model(**{**inputs, "class_labels": None}).logits
        assert torch.equal(without, model(**{**inputs, "class_labels": null}).logits)
        assert not torch.allclose(real, without, atol=1e-3)
        assert torch.equal(model.train()(**inputs).logits, real)  # no dropout of labels inside the model


def test_text_is_a_prefix_of_fixed_length() -> None:
    """Padding by the caller changes nothing, null text is text without tokens, every token counts."""
    model = make_model(context_dim=6, context_length=4, num_classes=0)
    inputs = inputs_of(model)
    del inputs["class_labels"]
    text = inputs["encoder_hidden_states"]
    padded = torch.cat([text, torch.randn(2, 1, 6)], dim=1)
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    with torch.no_grad():
        real = model(**inputs).logits
        masked = model(inputs["codes"], encoder_hidden_states=padded, encoder_attention_mask=mask).logits
        none = model(inputs["codes"]).logits
        empty = model(inputs["codes"], encoder_hidden_states=text, encoder_attention_mask=torch.zeros(2, 3)).logits
        changed = text.clone()
        changed[0, 0] += 1
        other = model(inputs["codes"], encoder_hidden_states=changed).logits
    assert torch.equal(masked, real)
    assert torch.equal(none, empty)
    assert not torch.allclose(none, real, atol=1e-3)
    assert torch.equal(other[1], real[1]) and not torch.allclose(other[0], real[0], atol=1e-4)


def stream_after(block: AiMBlock, x: torch.Tensor, vectors: tuple) -> torch.Tensor:
    """The stream with what the block adds to it."""
    x, (update, gate) = block(x, vectors)
    return x + gate * update


def test_released_unfused_mlp() -> None:
    """It adds to the normalised stream and reads what the mixer has added."""
    model = make_model(mlp_hidden=128, mlp_residual="as_released_unfused", num_layers=1)
    block, x = model.blocks[0], torch.randn(2, 3, 32)
    vectors = block.vectors(torch.randn(2, 32), None)
    with torch.no_grad():
        shift, shift_mlp, scale, scale_mlp, gate, gate_mlp = vectors
        added = gate * block.mixer(block.norm(x) * (1 + scale) + shift)
        expected = block.norm_mlp(x + added) + gate_mlp * block.mlp(added * (1 + scale_mlp) + shift_mlp)
        torch.testing.assert_close(stream_after(block, x, vectors), expected)
        block.mlp_residual = "stream"
        normed = block.norm_mlp(x + added)
        expected = x + added + gate_mlp * block.mlp(normed * (1 + scale_mlp) + shift_mlp)
        torch.testing.assert_close(stream_after(block, x, vectors), expected)


def test_unconditional() -> None:
    model = make_model(num_classes=0)
    assert model.null_class_label is None
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 5, 20)
    with pytest.raises(ValueError, match="no classes"):
        model(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0]))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_gradients_reach_everything(changes: dict) -> None:
    model = make_model(**changes).train()
    model(**inputs_of(model)).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = make_model(num_groups=2).train()
    twin = copy.deepcopy(model)
    twin.enable_gradient_checkpointing()
    for each in (model, twin):
        each(**inputs_of(each)).logits.square().mean().backward()
    for (name, one), two in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(one.grad, two.grad), name


def test_initialisation() -> None:
    """Per-layer gates are closed at the start, so that the layers do nothing; grouped ones are not."""
    torch.manual_seed(0)
    closed, grouped = AiM(**SMALL), AiM(**SMALL, num_groups=2)
    codes = torch.randint(20, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = closed(codes).logits
        closed.blocks[0].mixer.out_proj.weight.add_(1)
        assert torch.equal(closed(codes).logits, before)
        before = grouped(codes).logits
        grouped.blocks[0].mixer.out_proj.weight.add_(1)
        assert not torch.allclose(grouped(codes).logits, before)
    assert float(closed.code_embed.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert closed.blocks[0].modulation.linear.weight.abs().max() == 0


def test_weight_decay_decays_matrices_only() -> None:
    model = make_model(num_groups=2, tie_embeddings=False)
    decayed = {id(p) for p in parameter_groups(model, 0.05)[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert {"blocks.0.mixer.in_proj.weight", "group_modulation.linear.weight", "proj_out.weight"} <= names
    kept = ("A_log", "D", "dt_bias", "bias", "table", "positions", "code_embed.weight", "norm.weight")
    assert not [name for name in names if name.endswith(kept)]


def test_save_and_load(tmp_path: Path) -> None:
    model = make_model(num_groups=2)
    model.save_pretrained(tmp_path)
    loaded = AiM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs_of(model)).logits, model(**inputs_of(model)).logits)
    low = AiM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert low.blocks[0].mixer.A_log.dtype == torch.float32 and low.dtype == torch.bfloat16
    with torch.no_grad():
        exact, out = model(**inputs_of(model)).logits, low(**inputs_of(model)).logits
    assert (out.float() - exact).norm() < 0.1 * exact.norm()


def test_lora_and_compile(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = make_model(mixer="mamba", headdim=None, d_state=4)
    inputs = inputs_of(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, plain, rtol=1e-5, atol=1e-5)
    model.add_adapter(LoraConfig(r=2, target_modules=["in_proj", "out_proj"]))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain)


def published(model: AiM) -> dict[str, torch.Tensor]:
    """The weights of a small model under the names of a released file."""
    back = {
        "code_embed.": "backbone.embeddings.word_embeddings.",
        "positions": "backbone.embeddings.position_embeddings.weight",
        "label_embed.table.": "backbone.cls_embed.embedding_table.",
        "group_modulation.linear.": "backbone.adaln_group.1.",
        "norm_out.": "backbone.norm_f.",
        "norm_final.": "backbone.final_layer.norm_final.",
        "modulation_out.linear.": "backbone.final_layer.adaLN_modulation.1.",
        "proj_out.": "lm_head.",
        "blocks.": "backbone.layers.",
    }
    weights = {}
    for key, value in model.state_dict().items():
        start = next(ours for ours in back if key.startswith(ours))
        key = back[start] + key.removeprefix(start)
        if start == "blocks.":
            key = key.replace(".table", ".scale_shift_table").replace(".modulation.linear.", ".adaLN_modulation.1.")
            key = key.replace(".norm_mlp.", ".norm2.").replace(".mlp.proj_in.", ".mlp.fc1.")
            key = key.replace(".mlp.proj_out.", ".mlp.fc2.")
            key = key.replace(".mixer.dt_bias", ".mixer.dt_proj.bias") if model.config.mixer == "mamba" else key
        weights[f"mamba.{key}"] = value
    return weights


@pytest.mark.parametrize("changes", VARIANTS[:6], ids=str)
def test_published_keys_round_trip(changes: dict) -> None:
    model = make_model(**changes)
    given = {key: model.config[key] for key in ("sample_size", "position_offset", "mlp_residual")}
    if model.config.ngroups:
        given["ngroups"] = model.config.ngroups
    weights = published(model)
    converted, report = load_published("aim", weights, given)
    assert report.complete, str(report)
    for key, value in model.state_dict().items():
        assert torch.equal(converted.state_dict()[key], value), key
    if model.config.tie_embeddings:
        weights["mamba.lm_head.weight"] = weights["mamba.backbone.embeddings.word_embeddings.weight"].clone()
        assert load_published("aim", weights, given)[1].complete


def test_errors() -> None:
    model = make_model()
    codes = torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"codes have shape \(1, 12\); expected \(1, L\) with L < 12"):
        model(codes)
    with pytest.raises(ValueError, match="reads no text"):
        model(codes[:, :3], encoder_hidden_states=torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="neither codes, class_labels"):
        model()
    with pytest.raises(ValueError, match="mixer is 'mamba3'"):
        make_model(mixer="mamba3")
    with pytest.raises(ValueError, match="norm is 'batch'"):
        make_model(norm="batch")
    with pytest.raises(ValueError, match="position_offset is 2"):
        make_model(position_offset=2)
    weights = published(make_model())
    with pytest.raises(ValueError, match="12 codes are no square"):
        load_published("aim", weights)


@pytest.mark.parametrize(
    "changes", [{}, {"num_groups": 2, "mlp_hidden": 100}, {"mixer": "mamba", "headdim": None}], ids=str
)
def test_compiled_blocks_decode_the_same(changes: dict) -> None:
    """Each block is one graph, its state updated inside."""
    model = make_model(**changes)
    inputs = inputs_of(model)
    codes, results = inputs.pop("codes"), []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        cache = model.new_cache(2)
        with torch.no_grad():
            logits = [model(**inputs, cache=cache).logits]
            logits += [model(codes[:, i : i + 1], cache=cache).logits for i in range(5)]
        results.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
