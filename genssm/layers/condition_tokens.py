"""Time and text (or class) as tokens of a sequence model's width."""

import torch
import torch.nn.functional as F
from torch import nn

from genssm.layers.embeddings import LabelEmbedding, TimestepEmbedding

# B batch, S text tokens, D hidden_size


class ConditionTokens(nn.Module):
    """[time, text] or [time, class] as tokens (MLD, arXiv:2212.04048).

    The time's sinusoids have the width of the text and pass two linear layers; text of another width than D passes a
    ReLU and a linear layer, text of width D stays as it is.

    Args:
        hidden_size: width D.
        context_dim: width of the text tokens; 0 without text.
        num_classes: classes, one more is the null class; 0 without.
        sine_first, time_shift: convention of the sinusoids, see :func:`genssm.layers.sinusoidal_features`.
    Raises:
        ValueError: both text and classes.
    """

    def __init__(
        self,
        hidden_size: int,
        context_dim: int = 768,
        num_classes: int = 0,
        sine_first: bool = False,
        time_shift: float = 0.0,
    ) -> None:
        super().__init__()
        if context_dim and num_classes:
            raise ValueError(f"context_dim is {context_dim} and num_classes {num_classes}; give one, the other 0")
        self.context_dim = context_dim
        self.time_embed = TimestepEmbedding(
            hidden_size, context_dim or hidden_size, sine_first=sine_first, shift=time_shift
        )
        self.context_embed = nn.Linear(context_dim, hidden_size) if context_dim not in (0, hidden_size) else None
        self.label_embed = LabelEmbedding(num_classes, hidden_size) if num_classes else None

    @property
    def null_label(self) -> int | None:
        """Label of the null class; None without classes."""
        return None if self.label_embed is None else self.label_embed.null_label

    def forward(
        self,
        timestep: torch.Tensor | float,
        context: torch.Tensor | None,
        labels: torch.Tensor | None,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """Embed.

        Args:
            timestep: (B,) or one number, 0..1000, fractions allowed.
            context: text tokens, (B, S, context_dim).
            labels: (B,) int64; None means the null class.
            like: tensor that shows B and the device.
        Returns:
            (B, 1 + S, D), time first; (B, 2, D) with classes and (B, 1, D) without any condition.
        Raises:
            ValueError: shapes do not fit, text is missing, or a condition is given that the model does not read.
        """
        batch, width = len(like), self.context_dim
        t = torch.as_tensor(timestep, device=like.device)
        if t.numel() not in (1, batch):
            raise ValueError(f"timestep has shape {tuple(t.shape)}; expected one number or ({batch},), one per sample")
        tokens = [self.time_embed(t.reshape(-1).expand(batch))[:, None]]
        if context is None and width:
            raise ValueError(f"encoder_hidden_states are missing; this model reads text tokens (B, S, {width})")
        if context is not None and not width:
            raise ValueError("encoder_hidden_states are given but this model reads no text (context_dim is 0)")
        if labels is not None and self.label_embed is None:
            raise ValueError("class_labels are given but this model has no classes (num_classes is 0); leave them out")
        if context is not None:
            if context.dim() != 3 or context.shape[0] != batch or context.shape[2] != width:
                expected = f"({batch}, S, {width})"
                raise ValueError(f"encoder_hidden_states has shape {tuple(context.shape)}; expected {expected}")
            context = context.to(tokens[0].dtype)
            tokens.append(context if self.context_embed is None else self.context_embed(F.relu(context)))
        if self.label_embed is not None:
            tokens.append(self.label_embed(labels, batch)[:, None])
        return torch.cat(tokens, dim=1)
