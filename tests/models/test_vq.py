"""The VQ tokenizer: counts, shapes, quantiser losses and gradients, usage, dead codes, saving, published keys."""

from pathlib import Path

import pytest
import torch

from genssm.convert import load_published
from genssm.models import VQTokenizer
from genssm.models.vq import VectorQuantizer, convert_vq_state_dict, vq_config_from_published

SMALL = {
    "in_channels": 1, "base_channels": 8, "channel_multipliers": [1, 2], "layers_per_block": 1, "latent_channels": 8,
    "num_vq_embeddings": 32, "vq_embed_dim": 4, "norm_num_groups": 4,
}  # fmt: skip


def make_tokenizer(**changes: object) -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(**{**SMALL, **changes}).eval()


def test_parameters_of_the_published_size() -> None:
    with torch.device("meta"):
        model = VQTokenizer()
    assert sum(p.numel() for p in model.parameters()) == 71_883_403
    assert model.scale_factor == 16


def test_shapes_and_paths_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = make_tokenizer().to(device)
    images = torch.rand(2, 1, 8, 12, device=device) * 2 - 1
    with torch.no_grad():
        output = model(images)
        codes = model.tokenize(images)
        assert output.sample.shape == images.shape
        assert codes.shape == (2, 24) and codes.dtype == torch.int64
        assert torch.equal(codes, output.quantized.codes)
        assert output.quantized.codebook_loss is None
        torch.testing.assert_close(model.decode_codes(codes, (4, 6)), output.sample, rtol=1e-4, atol=1e-5)


def test_codes_are_the_nearest_vectors() -> None:
    quantizer = VectorQuantizer(32, 4)
    z = torch.randn(2, 4, 3, 5)
    codes = quantizer(z).codes
    rows = torch.nn.functional.normalize(z.permute(0, 2, 3, 1).reshape(-1, 4), dim=1)
    expected = torch.cdist(rows.double(), quantizer.codebook().double()).argmin(dim=1)
    assert torch.equal(codes.flatten(), expected)


def test_plain_space_keeps_lengths() -> None:
    quantizer = VectorQuantizer(8, 2, normalize=False)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(3 * torch.randn(8, 2))
    result = quantizer(5 * torch.randn(1, 2, 2, 2))
    assert torch.equal(
        quantizer.lookup(result.codes, (2, 2)), quantizer.embedding.weight[result.codes[0]].T.view(1, 2, 2, 2)
    )


def test_gradient_passes_straight_through() -> None:
    quantizer = VectorQuantizer(16, 4, normalize=False)
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    weight = torch.randn(1, 4, 2, 2)
    (quantizer(z).latents * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)


def test_losses_reach_codebook_and_encoder() -> None:
    model = make_tokenizer(entropy_weight=0.1).train()
    quantized = model(torch.rand(2, 1, 8, 8)).quantized
    quantized.codebook_loss.backward(retain_graph=True)
    assert model.quantize.embedding.weight.grad.abs().max() > 0
    assert model.quant_conv.weight.grad is None
    (quantized.commitment_loss + quantized.entropy_loss).backward()
    assert model.quant_conv.weight.grad.abs().max() > 0


def test_entropy_loss_prefers_sure_and_even_use() -> None:
    quantizer = VectorQuantizer(4, 2, entropy_weight=1.0).train()
    angles = torch.tensor([0.0, 1.57, 3.14, 4.71])
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.stack([angles.cos(), angles.sin()], dim=1))
    even = torch.stack([angles.cos(), angles.sin()]).view(1, 2, 2, 2)
    one = even[:, :, :1, :1].expand(1, 2, 2, 2)
    assert quantizer(even).entropy_loss < quantizer(one).entropy_loss - 1


def test_usage_and_dead_codes() -> None:
    quantizer = VectorQuantizer(16, 4, usage_decay=0.5).train()
    z = torch.randn(1, 4, 1, 1).expand(1, 4, 2, 2)
    for _ in range(20):
        codes = quantizer(z).codes
    assert quantizer.usage_statistics()["used"] == 1
    assert quantizer.usage_statistics()["perplexity"] == pytest.approx(1, abs=1e-2)
    before = quantizer.embedding.weight.clone()
    data = torch.randn(4, 4, 3, 3)
    assert quantizer.restart_dead_codes(data, torch.Generator().manual_seed(0)) == 15
    moved = (quantizer.embedding.weight != before).any(dim=1)
    assert moved.sum() == 15 and not moved[codes[0, 0]]
    rows = torch.nn.functional.normalize(data.movedim(1, -1).reshape(-1, 4), dim=1)
    assert torch.cdist(quantizer.embedding.weight[moved], rows).min(dim=1).values.max() < 1e-3
    assert quantizer.restart_dead_codes(data) == 0


def test_usage_is_not_touched_in_evaluation() -> None:
    model = make_tokenizer()
    before = model.quantize.usage.clone()
    model(torch.rand(1, 1, 8, 8))
    assert torch.equal(model.quantize.usage, before)


def test_save_and_load(tmp_path: Path) -> None:
    model = make_tokenizer()
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(VQTokenizer.from_pretrained(tmp_path)(images).sample, model(images).sample)


def test_half_precision_weights(tmp_path: Path) -> None:
    model = make_tokenizer()
    codes = torch.randint(32, (1, 16))
    with torch.no_grad():
        exact = model.decode_codes(codes)
        low = model.to(torch.bfloat16).decode_codes(codes)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() < 0.1 * exact.norm()


def published(model: VQTokenizer) -> dict[str, torch.Tensor]:
    """The weights of a small model under the published names, by the tokenizer's own construction rules."""
    names = {
        ".levels.": ".conv_blocks.", ".residual.": ".res.", ".attention.": ".attn.", ".middle.": ".mid.",
        ".norm_1": ".norm1", ".norm_2": ".norm2", ".conv_1": ".conv1", ".conv_2": ".conv2",
        ".shortcut.": ".nin_shortcut.", ".to_q": ".q", ".to_k": ".k", ".to_v": ".v", ".to_out.": ".proj_out.",
    }  # fmt: skip
    weights = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        key = key.replace(".resize.", ".downsample." if key.startswith("encoder.") else ".upsample.")
        weights[key] = value
    weights["quantize.codebook_used"] = weights.pop("quantize.usage").new_zeros(65536)
    return weights


@pytest.mark.parametrize("has_encoder", [True, False])
def test_published_keys_round_trip(has_encoder: bool) -> None:
    model = make_tokenizer(has_encoder=has_encoder, channel_multipliers=[1, 1, 2])
    weights = published(model)
    converted, report = load_published("vq", weights, {"norm_num_groups": 4})
    assert report.complete, str(report)
    assert converted.config.channel_multipliers == [1, 1, 2] and converted.config.has_encoder == has_encoder
    for key, value in model.state_dict().items():
        assert torch.equal(converted.state_dict()[key], value), key
    beside = {f"vqvae.{key}": value for key, value in weights.items()} | {"mamba.lm_head.weight": torch.zeros(1)}
    assert convert_vq_state_dict(beside).keys() == convert_vq_state_dict(weights).keys()


def test_errors() -> None:
    with pytest.raises(ValueError, match="8 channels cannot be divided into norm_num_groups=3"):
        make_tokenizer(norm_num_groups=3)
    with pytest.raises(ValueError, match=r"multiples of 2"):
        make_tokenizer().encode(torch.zeros(1, 1, 7, 8))
    with pytest.raises(ValueError, match="decoder only"):
        make_tokenizer(has_encoder=False)(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"codes have shape \(1, 10\)"):
        make_tokenizer().decode_codes(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match="not a VQ tokenizer"):
        vq_config_from_published({"weight": torch.zeros(1)}, {})
