"""Texts and motions in one space, trained by contrast (the alignment of KMM, arXiv:2411.06481, in spirit)."""

# B batch, T frames, F features of a frame, C width of a text, D embed_dim

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from genssm.layers.sequences import as_lengths, valid_frames


class MotionAlignment(ModelMixin, ConfigMixin):
    """Embeddings of texts and of motions whose products tell how well they fit.

        similarity_ij = exp(log_scale) t_i . m_j,     |t_i| = |m_j| = 1

    The paper is silent on the motion's side; here it is two strided convolutions and a mean over time.

    Args:
        in_channels: features F of a frame.
        context_dim: width C of a pooled text.
        embed_dim: width D of the common space.
    """

    @register_to_config
    def __init__(self, in_channels: int = 263, context_dim: int = 768, embed_dim: int = 128) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(in_channels, embed_dim, 5, stride=2, padding=2)
        self.conv_out = nn.Conv1d(embed_dim, embed_dim, 5, stride=2, padding=2)
        self.motion_proj = nn.Linear(embed_dim, embed_dim)
        self.text_proj = nn.Linear(context_dim, embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(
        self, text: torch.Tensor, motion: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed.

        Args:
            text: pooled texts, (B, C).
            motion: normalised features, (B', T, F).
            lengths: valid frames, (B',); None means all T.
        Returns:
            Embeddings of length one, (B, D) and (B', D).
        """
        lengths = as_lengths(lengths, motion)
        x = motion * valid_frames(lengths, motion.shape[1])[..., None]
        x = F.gelu(self.conv_in(x.transpose(1, 2)))
        x = F.gelu(self.conv_out(x)).transpose(1, 2)  # (B', T / 4, D)
        mask = valid_frames((lengths + 3) // 4, x.shape[1])[..., None]
        mean = (x * mask).sum(1) / mask.sum(1)
        return F.normalize(self.text_proj(text), dim=-1), F.normalize(self.motion_proj(mean), dim=-1)

    def similarity(self, text: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
        """Products of embeddings (B, D) and (B', D) in units of the learned temperature, (B, B')."""
        return self.log_scale.exp() * text @ motion.transpose(0, 1)


def contrastive_loss(similarity: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """CE(similarity, y) + CE(similarity^T, y) for each pair.

    Args:
        similarity: (B, B); row i is text i, column j motion j.
        same: (B, B) bool, True where text i is also right for motion j; these share the probability.
    Returns:
        (B,).
    """
    target = same.to(similarity.dtype)
    target = target / target.sum(-1, keepdim=True)  # symmetric, since "same" is an equivalence
    rows = -(target * similarity.log_softmax(-1)).sum(-1)
    columns = -(target * similarity.log_softmax(0)).sum(0)
    return rows + columns
