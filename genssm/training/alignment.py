"""Representation alignment (REPA, Yu et al., 2024): hidden states learn to say what a vision encoder sees.

    loss = denoising loss + weight mean_l (1 - cos(projector(h_l), encoder(image)_l))

over the tokens l, h after one of the first blocks, the encoder frozen, the projector trained beside the model and
thrown away afterwards. The encoder reads the clean image at the size that gives it one patch for each token.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genssm.config import AlignConfig

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which DINOv2 saw


class VisionEncoder(nn.Module):
    """A frozen DINOv2 in a folder saved by transformers.

    Args:
        folder: with ``config.json`` and weights.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: transformers is not installed.
        ValueError: another kind of network.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        if not Path(folder, "config.json").is_file():
            raise FileNotFoundError(
                f"align.encoder={folder}: no config.json there; expected a DINOv2 as transformers saves it, such as "
                "the files of facebook/dinov2-base"
            )
        try:
            from transformers import AutoConfig, Dinov2Model
        except ImportError:
            raise ImportError("align.encoder needs transformers; pip install genssm[text]") from None
        found = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if found != "dinov2":
            raise ValueError(f"align.encoder={folder} holds a {found} network; expected a dinov2")
        self.network = Dinov2Model.from_pretrained(folder, local_files_only=True).requires_grad_(False).eval()
        self.width = self.network.config.hidden_size
        for name, value in (("mean", _MEAN), ("deviation", _DEVIATION)):
            self.register_buffer(name, torch.tensor(value).reshape(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Features of patches.

        Args:
            pixels: (B, 1 or 3, H, W) in -1..1.
            grid: tokens in a column and in a row.

        Returns:
            (B, L, F), L = product of ``grid``, row by row.
        """
        size = [side * self.network.config.patch_size for side in grid]
        x = F.interpolate((pixels.float() + 1) / 2, size, mode="bicubic", antialias=True).clamp(0, 1)
        x = (x.expand(-1, 3, -1, -1) - self.mean) / self.deviation  # (B, 3, h, w)
        return self.network(x).last_hidden_state[:, 1:]  # without the class token


class AlignedModel(nn.Module):
    """A model with a projector on the output of one of its blocks, called as the model is.

    With ``alignment_target`` (B, L, F) among the arguments, ``alignment`` afterwards holds each sample's loss, (B,).

    Args:
        model: what is trained.
        denoiser: the model or its part whose ``blocks`` give (B, L, D), or such a tensor and a residual stream.
        layer: number of the block, from 1.
        width: F, of the encoder.
        hidden: width of the projector.
    """

    def __init__(self, model: nn.Module, denoiser: nn.Module, layer: int, width: int, hidden: int) -> None:
        super().__init__()
        if not 1 <= layer <= len(denoiser.blocks):
            raise ValueError(f"align.layer is {layer}; the model has the blocks 1..{len(denoiser.blocks)}")
        self.model, self.alignment, self._seen, self._watching = model, None, None, False
        self.projector = nn.Sequential(
            nn.Linear(denoiser.config.hidden_size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, width),
        )  # fmt: skip
        denoiser.blocks[layer - 1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, arguments: tuple, output: Any) -> None:
        if not self._watching:  # the model draws samples
            return
        if isinstance(output, tuple):  # the block's output is yet to be added to the stream
            output = sum(part for part in output if part is not None)
        self._seen = output

    def forward(self, *arguments: Any, alignment_target: torch.Tensor | None = None, **keys: Any) -> Any:
        """As the model's; see the class for ``alignment_target``."""
        self._watching = alignment_target is not None
        output = self.model(*arguments, **keys)
        self._watching, self.alignment = False, None
        if alignment_target is not None:
            if self._seen.shape[1] != alignment_target.shape[1]:
                raise ValueError(
                    f"the model has {self._seen.shape[1]} tokens for {alignment_target.shape[1]} patches; alignment "
                    "needs one token for each patch: leave align.encoder out"
                )
            projected = self.projector(self._seen.to(self.projector[0].weight.dtype)).float()  # (B, L, F)
            self.alignment = (1 - F.cosine_similarity(projected, alignment_target.float(), dim=-1)).mean(1)
        self._seen = None
        return output


def build_alignment(config: AlignConfig, model: nn.Module, denoiser: nn.Module) -> tuple[VisionEncoder, AlignedModel]:
    """The encoder and the model with its projector; by default a third of the way through its blocks.

    Raises:
        FileNotFoundError, ImportError: as :class:`VisionEncoder`.
        ValueError: numbers out of range.
    """
    if config.weight <= 0 or config.projector_width < 1:
        raise ValueError(
            f"align.weight is {config.weight}, align.projector_width {config.projector_width}; expected more than 0"
        )
    encoder = VisionEncoder(config.encoder)
    layer = max(len(denoiser.blocks) // 3, 1) if config.layer is None else config.layer
    return encoder, AlignedModel(model, denoiser, layer, encoder.width, config.projector_width)
