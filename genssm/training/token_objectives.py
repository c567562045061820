"""What models of codes learn: the next code, or the codes that are masked."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from genssm.paths import check_choice

# B images, T codes, V vocabulary

SCHEDULES = ("cosine", "linear")


def _cross_entropy(logits: torch.Tensor, codes: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Of each code, (B, T), float32, for ``logits`` (B, T, V)."""
    return F.cross_entropy(
        logits.float().transpose(1, 2), codes, reduction="none", label_smoothing=label_smoothing
    )  # (B, T)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"objective.label_smoothing is {label_smoothing}; expected at least 0 and less than 1")


class NextTokenObjective:
    """loss = - mean_i log p(code_i | condition, codes before i), over all codes of an image.

    Args:
        label_smoothing: share of the target spread evenly over all codes.
    Raises:
        ValueError: a share outside [0, 1).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        _check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def loss(self, model: nn.Module, codes: torch.Tensor, **condition: object) -> torch.Tensor:
        """Loss of each image.

        Args:
            model: called as ``model(codes[:, :-1], **condition).logits``.
            codes: (B, T), int64.
            condition: further arguments of the model.
        Returns:
            (B,), float32.
        """
        logits = model(codes[:, :-1], **condition).logits  # (B, T, V)
        return _cross_entropy(logits, codes, self.label_smoothing).mean(dim=1)


class MaskedTokenObjective:
    """loss = - mean over masked i of log p(code_i | condition, codes that are not masked) (MaskGIT, arXiv:2202.04200).

    The share of masked codes is cos(pi t / 2), or 1 - t, for t uniform in [0, 1): at least one code, at most all.

    Args:
        mask_schedule: "cosine" or "linear".
        label_smoothing: share of the target spread evenly over all codes.
    Raises:
        ValueError: an unknown schedule or a share outside [0, 1).
    """

    def __init__(self, mask_schedule: str = "cosine", label_smoothing: float = 0.0) -> None:
        check_choice("objective.mask_schedule", mask_schedule, SCHEDULES)
        _check_smoothing(label_smoothing)
        self.mask_schedule, self.label_smoothing = mask_schedule, label_smoothing

    def mask(self, times: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Which codes are masked, (B, T) bool.

        Args:
            times: (B,), in [0, 1).
            order: random numbers (B, T); the codes with the smallest are masked.
        """
        share = torch.cos(0.5 * math.pi * times) if self.mask_schedule == "cosine" else 1 - times
        count = (share * order.shape[1]).ceil().clamp(min=1)
        rank = order.argsort(dim=1).argsort(dim=1)
        return rank < count[:, None]

    def loss(
        self, model: nn.Module, codes: torch.Tensor, mask: torch.Tensor, mask_code: int, **condition: object
    ) -> torch.Tensor:
        """Loss of each image.

        Args:
            model: called as ``model(codes with mask_code where masked, **condition).logits``.
            codes: (B, T), int64.
            mask: (B, T) bool, True where the model must guess.
            mask_code: what stands for a masked code.
            condition: further arguments of the model.
        Returns:
            (B,), float32.
        """
        logits = model(torch.where(mask, mask_code, codes), **condition).logits  # (B, T, V)
        error = _cross_entropy(logits, codes, self.label_smoothing)
        return (error * mask).sum(dim=1) / mask.sum(dim=1)
