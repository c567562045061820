"""How denoisers read text: the states of its tokens, which of them count, and what stands for no text."""

import torch


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


def with_null_text(
    tokens: torch.Tensor | None, mask: torch.Tensor | None, null: torch.Tensor, batch: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put the null text where there is none.

    A row of the batch whose mask is False everywhere has no text, nor has any row when ``tokens`` is None.

    Args:
        tokens: (B, S, C), or None.
        mask: (B, S) bool, or None.
        null: the null token, (C,). Repeating it changes nothing, so it fills a row of any length.
        batch: B.

    Returns:
        Tokens (B, S, C) and a mask with at least one True in every row, or None.
    """
    if tokens is None:
        return null.expand(batch, 1, -1), None
    tokens = tokens.to(null.dtype)
    if mask is None:
        return tokens, None
    empty = ~mask.any(dim=1, keepdim=True)  # (B, 1)
    return torch.where(empty[..., None], null, tokens), mask | empty
