"""What a tokenizer learns: pixels, features and the verdict of a discriminator; the quantiser has its own losses."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from genssm.paths import check_choice
from genssm.training.perceptual import PerceptualDistance


class PatchDiscriminator(nn.Module):
    """Real or reconstructed, patch by patch (Isola et al. 2017, arXiv:1611.07004), with group norms.

    Args:
        in_channels: image channels.
        width: channels of the first layer.
        depth: layers between the first and the verdict; all but the last of them halve the size, as the first does.
    """

    def __init__(self, in_channels: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        widths = [width * min(2**level, 8) for level in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level, (narrow, wide) in enumerate(itertools.pairwise(widths), 1):
            stride = 2 if level < depth else 1
            layers += [nn.Conv2d(narrow, wide, 3, stride, padding=1), nn.GroupNorm(8, wide), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Verdicts (B, 1, h, w), positive for real, on ``images`` (B, C, H, W)."""
        return self.layers(images)


def hinge_loss(real: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """Loss of a discriminator's verdicts on real and on reconstructed images, scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + reconstructed).mean())


class ReconstructionObjective:
    """loss = pixels + w_p perceptual + w_a adversarial + codebook + commitment + entropy.

    Args:
        pixel_loss: "l1" or "l2", mean over pixels.
        perceptual_weight: w_p; needs ``perceptual_network``.
        perceptual_network, perceptual_heads: files, see :class:`genssm.training.perceptual.PerceptualDistance`.
        adversarial_weight: w_a.
        adversarial_start: step from which the discriminator learns and counts.
        restart_every: steps between restarts of dead codes; 0 never restarts.
    Raises:
        ValueError: an unknown pixel loss, a negative weight, or features without a network.
        FileNotFoundError: the network's file is not there.
    """

    def __init__(
        self,
        pixel_loss: str = "l2",
        perceptual_weight: float = 0.0,
        perceptual_network: str | None = None,
        perceptual_heads: str | None = None,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 0,
        restart_every: int = 0,
    ) -> None:
        check_choice("objective.pixel_loss", pixel_loss, ("l1", "l2"))
        numbers = {
            "perceptual_weight": perceptual_weight,
            "adversarial_weight": adversarial_weight,
            "adversarial_start": adversarial_start,
            "restart_every": restart_every,
        }
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(f"objective.{name} is {value}; expected at least 0")
        if bool(perceptual_weight) != bool(perceptual_network):
            raise ValueError(
                "objective.perceptual_weight and objective.perceptual_network belong together: set both, or neither"
            )
        self.pixel_loss, self.perceptual_weight = pixel_loss, perceptual_weight
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.restart_every = restart_every
        self.perceptual = PerceptualDistance(perceptual_network, perceptual_heads) if perceptual_network else None

    def loss(self, images: torch.Tensor, output: object, discriminator: nn.Module | None = None) -> torch.Tensor:
        """Loss of each image.

        Args:
            images: (B, C, H, W) in -1..1.
            output: :class:`genssm.models.vq.TokenizerOutput` in training mode.
            discriminator: judges the reconstructions; None for no verdict.
        Returns:
            (B,), float32.
        """
        sample, quantized = output.sample.float(), output.quantized
        error = sample - images
        loss = (error.abs() if self.pixel_loss == "l1" else error.square()).flatten(1).mean(dim=1)
        if self.perceptual is not None:
            loss = loss + self.perceptual_weight * self.perceptual(images, sample)
        if discriminator is not None:
            loss = loss - self.adversarial_weight * discriminator(sample).flatten(1).mean(dim=1)
        return loss + quantized.codebook_loss + quantized.commitment_loss + quantized.entropy_loss
