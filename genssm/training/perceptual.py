"""Distance of images in the features of VGG-16 (LPIPS, Zhang et al. 2018, arXiv:1801.03924)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TAPS = (3, 8, 15, 22, 29)  # of torchvision's list of layers: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
WIDTHS = (64, 128, 256, 512, 512)
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet in -1..1


class PerceptualDistance(nn.Module):
    """d(a, b) = sum over layers of the mean over positions of w_l . (f_l(a) - f_l(b))^2, f_l of unit length.

    Args:
        network: file of torchvision's VGG-16 weights (``vgg16-*.pth``), read with weights_only.
        heads: file of the weights w_l of LPIPS for VGG (``lin0.model.1.weight``, ...); None takes the mean over
            channels.
    Raises:
        FileNotFoundError: no such file.
        ValueError: a file holds other weights.
    """

    def __init__(self, network: str | Path, heads: str | Path | None = None) -> None:
        super().__init__()
        from torchvision.models import vgg16

        weights = _read(network, "objective.perceptual_network")
        model = vgg16(weights=None, init_weights=False).features
        part = {key.removeprefix("features."): value for key, value in weights.items() if key.startswith("features.")}
        try:
            model.load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(f"{network} does not hold torchvision's VGG-16: {str(error).splitlines()[-1]}") from None
        self.layers = nn.ModuleList(nn.ReLU() if isinstance(m, nn.ReLU) else m for m in model[: TAPS[-1] + 1])
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1))
        self.heads = nn.ParameterList(torch.full((width,), 1 / width) for width in WIDTHS)
        if heads is not None:
            self._load_heads(heads)
        self.requires_grad_(False).eval()

    def _load_heads(self, path: str | Path) -> None:
        weights = _read(path, "objective.perceptual_heads")
        for i, head in enumerate(self.heads):
            value = weights.get(f"lin{i}.model.1.weight")
            if value is None or value.numel() != head.numel():
                raise ValueError(f"{path} does not hold LPIPS weights for VGG: lin{i}.model.1.weight of {len(head)}")
            head.data.copy_(value.flatten())

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features of unit length of the five layers, for ``images`` (B, 1 or 3, H, W) in -1..1, H and W from 16."""
        x = (images.expand(-1, 3, -1, -1) - self.mean) / self.deviation
        taken = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in TAPS:
                taken.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return taken

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Distance (B,), float32, of images (B, 1 or 3, H, W) in -1..1."""
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self.features(images.float()), self.features(others.float()), self.heads)
            return sum(F.conv2d((a - b).square(), head.view(1, -1, 1, 1)).mean(dim=(1, 2, 3)) for a, b, head in pairs)


def _read(path: str | Path, key: str) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key}={path}: no such file; the weights are never fetched, put them there")
    return torch.load(path, map_location="cpu", weights_only=True)
