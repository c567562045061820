"""A denoiser of motion with the text encoder that is trained along, as one module."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from genssm.layers import DenoiserOutput
from genssm.models import MotionAlignment, TextEncoder
from genssm.pipelines.motion_conditions import encode_motion_text


@dataclass
class CaptionedOutput(DenoiserOutput):
    """Prediction of a denoiser, and how well texts and motions of the batch fit.

    Args:
        similarity: (B, B), or None without an alignment.
    """

    similarity: torch.Tensor | None = None


class CaptionedMotion(nn.Module):
    """Tokens of captions in place of their states.

    Args:
        denoiser: reads ``encoder_hidden_states``.
        text_encoder: trained along.
        text_states: "pooled" or "tokens".
        alignment: compares texts and motions; None leaves that out.
    """

    def __init__(
        self, denoiser: nn.Module, text_encoder: TextEncoder, text_states: str, alignment: MotionAlignment | None
    ) -> None:
        super().__init__()
        self.denoiser, self.text_encoder, self.alignment = denoiser, text_encoder, alignment
        self.text_states = text_states

    @property
    def config(self) -> Any:
        """Of the denoiser."""
        return self.denoiser.config

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        motion: torch.Tensor | None = None,
        motion_lengths: torch.Tensor | None = None,
        **condition: Any,
    ) -> CaptionedOutput:
        """Predict, with token numbers and their mask (B, S) for texts, and clean motions to compare them with."""
        states, mask = encode_motion_text(self.text_encoder, input_ids, attention_mask, self.text_states)
        if mask is not None:
            condition["encoder_attention_mask"] = mask
        sample = self.denoiser(hidden_states, timestep, encoder_hidden_states=states, **condition).sample
        similarity = None
        if self.alignment is not None and motion is not None:
            pooled = states[:, 0] if self.text_states == "pooled" else self.text_encoder(input_ids, mask).pooler_output
            similarity = self.alignment.similarity(*self.alignment(pooled, motion, motion_lengths))
        return CaptionedOutput(sample=sample, similarity=similarity)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's blocks in the backward pass."""
        self.denoiser.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Undo :meth:`enable_gradient_checkpointing`."""
        self.denoiser.disable_gradient_checkpointing()

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile the blocks of both parts."""
        self.denoiser.compile_repeated_blocks(**options)
        self.text_encoder.compile_repeated_blocks(**options)
