"""Texts to what denoisers read: one call for the small encoder of this library and for frozen ones of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genssm.models import CaptionTokenizer

UNBOUNDED = 100_000  # transformers writes 1e30 where a tokenizer has no limit


def tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers (B, S) int64 and mask (B, S) bool, padded to the tokenizer's length; longer texts are cut.

    Args:
        tokenizer: a :class:`genssm.models.CaptionTokenizer` or a tokenizer of transformers.
        texts: B texts.

    Raises:
        ValueError: the tokenizer does not say how many tokens a text may have.
    """
    if isinstance(tokenizer, CaptionTokenizer):
        return tokenizer(texts)
    length = tokenizer.model_max_length
    if length > UNBOUNDED:
        raise ValueError(f"{type(tokenizer).__name__} has no model_max_length; set it, e.g. to 77")
    batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"].bool()


def encode_texts(
    tokenizer: Any, encoder: nn.Module, texts: Sequence[str], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of the tokens of texts.

    Args:
        tokenizer: see :func:`tokenize`.
        encoder: a :class:`genssm.models.TextEncoder`, or an encoder of transformers (CLIP, T5, ...).
        texts: B texts.
        device: where the encoder computes.

    Returns:
        ``encoder_hidden_states`` (B, S, C), dtype of the encoder, and ``encoder_attention_mask`` (B, S) bool.
    """
    ids, mask = tokenize(tokenizer, texts)
    ids, mask = ids.to(device), mask.to(device)
    return encoder(ids, attention_mask=mask).last_hidden_state, mask


def load_frozen_encoder(path: str, max_length: int | None = None) -> tuple[Any, nn.Module]:
    """Tokenizer and text encoder of transformers (CLIP, T5, BERT, ...), frozen.

    Args:
        path: a folder with both, a pipeline folder of diffusers (``tokenizer/``, ``text_encoder/``), or the name of a
            model on the Hub.
        max_length: tokens of a padded text; None takes the tokenizer's own.

    Returns:
        The tokenizer and the encoder in evaluation mode, float32.

    Raises:
        ImportError: the package transformers is missing.
        FileNotFoundError: nothing there; the message names what is missing.
        ValueError: no length is known.
    """
    try:
        from transformers import AutoModelForTextEncoding, AutoTokenizer
    except ImportError:
        raise ImportError("frozen text encoders need the package transformers; pip install genssm[text]") from None
    folder = Path(path)
    parts = {"tokenizer": folder, "text_encoder": folder}
    if (folder / "text_encoder").is_dir():
        parts = {name: folder / name for name in parts}
    if folder.is_dir():
        _check_folder(parts)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(parts["tokenizer"]))
        encoder = AutoModelForTextEncoding.from_pretrained(str(parts["text_encoder"]), dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no text encoder {path!r}: it is neither a folder with config.json, weights and tokenizer files, nor a "
            f"model that can be fetched from the Hub ({reason}); put the files into a folder and name that"
        ) from None
    if max_length is not None:
        tokenizer.model_max_length = max_length
    if tokenizer.model_max_length > UNBOUNDED:
        raise ValueError(f"the tokenizer of {path} names no greatest length; set text.max_length, e.g. to 77")
    return tokenizer, encoder.requires_grad_(False).eval()


def _check_folder(parts: dict[str, Path]) -> None:
    """Name the files that a folder lacks before transformers asks the Hub for them."""
    wanted = {
        "text_encoder": (("config.json",), ("*.safetensors", "*.bin")),
        "tokenizer": (("tokenizer.json", "vocab.json", "spiece.model", "vocab.txt", "tokenizer_config.json"),),
    }
    for name, groups in wanted.items():
        for group in groups:
            if not any(list(parts[name].glob(pattern)) for pattern in group):
                raise FileNotFoundError(f"{parts[name]} is no {name.replace('_', ' ')}: {' or '.join(group)} missing")
