"""Objectives of codes and of tokenizers: what they compare, masks, features, verdicts, settings."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genssm.config import ObjectiveConfig
from genssm.layers import TokenOutput
from genssm.training.objectives import build_objective
from genssm.training.perceptual import PerceptualDistance
from genssm.training.reconstruction import PatchDiscriminator, ReconstructionObjective, hinge_loss
from genssm.training.token_objectives import MaskedTokenObjective, NextTokenObjective
from tests.models.test_vq import make_tokenizer


class Shifted(nn.Module):
    """Predicts that the next code is the last one plus one, with confidence 5."""

    def forward(self, codes: torch.Tensor) -> TokenOutput:
        start = torch.zeros(len(codes), 1, dtype=torch.int64)
        return TokenOutput(logits=5.0 * F.one_hot((torch.cat([start, codes], dim=1) + 1) % 10, 10))


def test_next_token_compares_each_code_with_the_one_predicted_from_before() -> None:
    rising = torch.arange(1, 9)[None]
    sure = math.log(1 + 9 * math.exp(-5))
    loss = NextTokenObjective().loss(Shifted(), torch.cat([rising, rising.flip(1)]))
    assert loss.shape == (2,)
    assert float(loss[0]) == pytest.approx(sure, rel=1e-5)
    assert float(loss[1]) == pytest.approx(sure + 5, rel=1e-5)
    smoothed = NextTokenObjective(label_smoothing=0.1).loss(Shifted(), rising)
    assert float(smoothed) == pytest.approx(sure + 0.1 * 5 * 0.9, rel=1e-5)


def test_masks_follow_the_schedule() -> None:
    times = torch.tensor([0.0, 0.5, 0.999999])
    order = torch.rand(3, 100, generator=torch.Generator().manual_seed(0))
    for schedule, expected in (("cosine", [100, 71, 1]), ("linear", [100, 50, 1])):
        mask = MaskedTokenObjective(schedule).mask(times, order)
        assert mask.sum(dim=1).tolist() == expected
    assert order[1][mask[1]].max() < order[1][~mask[1]].min()


def test_masked_token_counts_masked_codes_only() -> None:
    codes = torch.arange(6)[None]
    mask = torch.tensor([[True, False, False, True, False, False]])
    seen = []

    class Guess(nn.Module):
        def forward(self, codes: torch.Tensor) -> TokenOutput:
            seen.append(codes)
            return TokenOutput(logits=torch.zeros(1, 6, 6).index_fill(1, torch.tensor([1, 2]), 99.0))

    loss = MaskedTokenObjective().loss(Guess(), codes, mask, 6)
    assert seen[0].tolist() == [[6, 1, 2, 6, 4, 5]]
    assert float(loss) == pytest.approx(math.log(6), rel=1e-6)


def test_build_objective_knows_which_settings_mean_something() -> None:
    assert isinstance(build_objective(ObjectiveConfig(name="next_token"), ("next_token",)), NextTokenObjective)
    objective = build_objective(ObjectiveConfig(name="masked_token", mask_schedule="linear"), ("masked_token",))
    assert objective.mask_schedule == "linear"
    with pytest.raises(ValueError, match=r"objective.name is 'flow'; expected one of next_token"):
        build_objective(ObjectiveConfig(), ("next_token",))
    with pytest.raises(ValueError, match=r"expected one of flow, diffusion"):
        build_objective(ObjectiveConfig(name="next_token"))
    with pytest.raises(ValueError, match=r"objective.mask_schedule is 'linear', but objective 'next_token'"):
        build_objective(ObjectiveConfig(name="next_token", mask_schedule="linear"), ("next_token",))
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0"):
        NextTokenObjective(1.0)


def vgg_weights() -> dict[str, torch.Tensor]:
    """Weights of VGG-16's shapes, as torchvision's file holds them."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in vgg16(weights=None, init_weights=False).state_dict().items()}
    kept = {k: s for k, s in shapes.items() if k.startswith("features.")}
    return {k: torch.randn(s) * (2 / s[1:].numel()) ** 0.5 if len(s) > 1 else torch.zeros(s) for k, s in kept.items()}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(vgg_weights(), path)
    return path


def test_perceptual_distance(network: Path, tmp_path: Path) -> None:
    distance = PerceptualDistance(network)
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    value = distance(images, noisy)
    assert value.shape == (2,) and (value > 0).all()
    torch.testing.assert_close(distance(noisy, images), value)
    torch.testing.assert_close(distance(images[1:], noisy[1:]), value[1:])
    assert distance(images, images).abs().max() == 0
    value.sum().backward()
    assert noisy.grad.abs().max() > 0 and not any(p.requires_grad for p in distance.parameters())
    heads = {f"lin{i}.model.1.weight": torch.zeros(1, w, 1, 1) for i, w in enumerate((64, 128, 256, 512, 512))}
    torch.save(heads, tmp_path / "lpips.pth")
    assert PerceptualDistance(network, tmp_path / "lpips.pth")(images, noisy).abs().max() == 0
    with pytest.raises(ValueError, match=r"lin0\.model\.1\.weight of 64"):
        PerceptualDistance(network, network)
    with pytest.raises(ValueError, match="does not hold torchvision's VGG-16"):
        PerceptualDistance(tmp_path / "lpips.pth")
    with pytest.raises(FileNotFoundError, match="perceptual_network="):
        PerceptualDistance(tmp_path / "none.pth")


def test_reconstruction_adds_up() -> None:
    model = make_tokenizer().train()
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    output = model(images)
    quantiser = output.quantized.codebook_loss + output.quantized.commitment_loss
    for kind, norm in (("l1", 1), ("l2", 2)):
        expected = (output.sample - images).abs().pow(norm).mean(dim=(1, 2, 3)) + quantiser
        torch.testing.assert_close(ReconstructionObjective(kind).loss(images, output), expected)
    discriminator = PatchDiscriminator(1)
    judged = ReconstructionObjective(adversarial_weight=0.5).loss(images, output, discriminator)
    plain = ReconstructionObjective().loss(images, output)
    torch.testing.assert_close(judged, plain - 0.5 * discriminator(output.sample).mean(dim=(1, 2, 3)))


def test_hinge_loss() -> None:
    sure = torch.full((2, 1, 3, 3), 2.0)
    assert hinge_loss(sure, -sure) == 0
    assert hinge_loss(-sure, sure) == 3


def test_reconstruction_settings() -> None:
    with pytest.raises(ValueError, match="belong together"):
        ReconstructionObjective(perceptual_weight=1.0)
    with pytest.raises(ValueError, match=r"objective\.restart_every is -1"):
        ReconstructionObjective(restart_every=-1)
    with pytest.raises(ValueError, match="pixel_loss"):
        ReconstructionObjective("l3")
