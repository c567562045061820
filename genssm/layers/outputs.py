"""What models return."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput


@dataclass
class DenoiserOutput(BaseOutput):
    """Prediction of a denoiser.

    Args:
        sample: shape and dtype of the denoiser's ``hidden_states``; what it predicts (noise, velocity, data) is the
            business of the objective and of the scheduler's configuration.
    """

    sample: torch.Tensor


@dataclass
class TokenOutput(BaseOutput):
    """Prediction of a model of codes.

    Args:
        logits: unnormalised log-probabilities of each code of the vocabulary, (B, L, V).
    """

    logits: torch.Tensor
