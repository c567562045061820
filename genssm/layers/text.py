"""How denoisers read text: the states of its tokens, which of them count, and what stands for no text."""

import torch
from torch import nn


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of the tokens (B, S, D) where ``mask`` (B, S) is True, (B, D); zero for a row without any."""
    if mask is None:
        return tokens.mean(dim=1)
    weight = mask[..., None].to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def check_text(
    tokens: torch.Tensor | None, mask: torch.Tensor | None, batch: int, context_dim: int
) -> torch.Tensor | None:
    """The mask as bool, of text that fits a denoiser.

    Args:
        tokens: ``encoder_hidden_states``, (B, S, context_dim), or None.
        mask: ``encoder_attention_mask``, (B, S), or None.
        batch: B.
        context_dim: width that the denoiser reads; 0 if it reads no text.

    Raises:
        ValueError: text for a denoiser without, a mask without text, or shapes that do not fit.
    """
    if tokens is None:
        if mask is not None:
            raise ValueError("encoder_attention_mask is given without encoder_hidden_states; pass both or neither")
        return None
    if not context_dim:
        raise ValueError("encoder_hidden_states are given but this model reads no text (context_dim is 0)")
    if tokens.dim() != 3 or tokens.shape[0] != batch or tokens.shape[2] != context_dim:
        expected = f"({batch}, S, {context_dim})"
        raise ValueError(f"encoder_hidden_states has shape {tuple(tokens.shape)}; expected {expected}")
    if mask is not None and mask.shape != tokens.shape[:2]:
        expected = tuple(tokens.shape[:2])
        raise ValueError(f"encoder_attention_mask has shape {tuple(mask.shape)}; expected {expected}")
    return None if mask is None else mask.bool()


def read_text(
    tokens: torch.Tensor | None,
    mask: torch.Tensor | None,
    batch: int,
    embed: nn.Linear | None,
    null: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Text tokens in the width of a denoiser, with the null text put in where there is none.

    A row of the batch whose mask is False everywhere has no text, nor has any row when ``tokens`` is None.

    Args:
        tokens: ``encoder_hidden_states``, (B, S, C), or None.
        mask: ``encoder_attention_mask``, (B, S), or None: every token counts.
        batch: B.
        embed: maps C to the denoiser's width D; None for a denoiser without text.
        null: the null token, (C,), which fills a row of any length, because repeating it changes nothing; None for a
            denoiser that was trained without.

    Returns:
        Tokens (B, S, D) and a mask (B, S) bool or None; with ``null``, at least one token counts in every row. None
        twice for a denoiser without text.

    Raises:
        ValueError: see :func:`check_text`; or no text for a denoiser without a null text.
    """
    mask = check_text(tokens, mask, batch, 0 if embed is None else embed.in_features)
    if embed is None:
        return None, None
    if tokens is None:
        if null is None:
            raise ValueError("encoder_hidden_states is None but this model has no null text; pass text tokens")
        return embed(null.expand(batch, 1, -1)), None
    tokens = tokens.to(embed.weight.dtype)
    if mask is not None and null is not None:
        empty = ~mask.any(dim=1, keepdim=True)  # (B, 1)
        tokens, mask = torch.where(empty[..., None], null, tokens), mask | empty
    return embed(tokens), mask
