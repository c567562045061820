"""What a motion pipeline turns into arguments of its denoiser: texts, pooled or token by token, or actions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from genssm.layers import masked_mean
from genssm.models import MotionAlignment, MotionVAE, TextEncoder
from genssm.pipelines.conditions import Condition, Label, LabelConditions
from genssm.text import load_frozen_encoder, tokenize

TEXT_STATES = ("pooled", "tokens")


class MotionConditions(LabelConditions):
    """Texts or actions; for pipelines with ``denoiser``, ``text_encoder``, ``tokenizer``, ``alignment``.

    The empty text, encoded, is the null text.
    """

    model_cpu_offload_seq = "text_encoder->denoiser->vae"
    _optional_components: ClassVar[list[str]] = ["vae", "text_encoder", "tokenizer", "alignment"]

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        # from_pipe compares exact types of diffusers' models; the classes of transformers are not imported for this.
        types = {
            "vae": (MotionVAE,),
            "alignment": (MotionAlignment,),
            "text_encoder": (TextEncoder, torch.nn.Module),
            "tokenizer": (object,),
        }
        return {**super()._get_signature_types(), **types}

    @torch.no_grad()
    def encode_prompt(
        self, texts: Sequence[str], device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the denoiser reads for texts.

        Args:
            texts: B texts; "" is the null text.
            device: where to compute; None takes the pipeline's.
        Returns:
            Tokens (B, S, C), S = 1 for pooled states, and their mask (B, S) bool, None for pooled states.
        Raises:
            ValueError: the pipeline has no text encoder or tokenizer.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder and tokenizer; pass prompt_embeds instead of prompt")
        device = device or self._execution_device
        # Sums on the CPU are grouped by the size of the batch: text by text, the result depends on the text alone.
        at_once = 1 if device.type == "cpu" else max(len(texts), 1)
        states, masks = [], []
        for i in range(0, len(texts), at_once):
            ids, mask = tokenize(self.tokenizer, texts[i : i + at_once])
            state, mask = encode_motion_text(
                self.text_encoder, ids.to(device), mask.to(device), self.config.text_states
            )
            states.append(state)
            masks.append(mask)
        return torch.cat(states), None if masks[0] is None else torch.cat(masks)

    @torch.no_grad()
    def similarity(self, texts: Sequence[str], motions: Sequence[torch.Tensor]) -> torch.Tensor:
        """How well texts and motions fit, by the alignment that was trained along.

        Args:
            texts: B texts.
            motions: features, not normalised, (T_i, F) each.
        Returns:
            Cosines (B, number of motions), float32.
        Raises:
            ValueError: the pipeline has no alignment.
        """
        if self.alignment is None:
            raise ValueError("this pipeline has no alignment; train it with motion.contrastive_weight above 0")
        device = self._execution_device
        ids, mask = (x.to(device) for x in tokenize(self.tokenizer, texts))
        pooled, _ = encode_motion_text(self.text_encoder, ids, mask, "pooled")
        embeddings = []
        for motion in motions:
            features = self.statistics.normalise(motion.to(device, torch.float32))[None]
            text, embedding = self.alignment(pooled[:, 0], features)
            embeddings.append(embedding)
        return text @ torch.cat(embeddings).transpose(0, 1)

    def _resolve(
        self,
        prompt: str | Sequence[str] | None,
        class_labels: Label | Sequence[Label] | None,
        embeds: torch.Tensor | None,
        num_motions: int | None,
    ) -> tuple[list[str] | None, list[int] | None, int]:
        """Texts, labels and the number of motions; checks that the denoiser reads what is given."""
        given = [name for name, value in (("prompt", prompt), ("prompt_embeds", embeds)) if value is not None]
        reads_text = bool(self.denoiser.config.context_dim)
        if reads_text and class_labels is not None:
            raise ValueError("this denoiser reads text and knows no classes; leave class_labels out")
        if reads_text and len(given) != 1:
            raise ValueError(f"this denoiser reads text: give prompt or prompt_embeds; got {given or 'neither'}")
        if not reads_text:
            if given:
                raise ValueError(f"{given[0]} is given but this denoiser reads no text; pass class_labels or nothing")
            labels, count = self.resolve_labels(class_labels, num_motions)
            return None, labels, count
        texts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
        count = len(embeds) if texts is None else len(texts)
        if count == 1 and num_motions is not None:
            count, texts = num_motions, None if texts is None else texts * num_motions
        if count < 1 or num_motions not in (None, count):
            raise ValueError(f"{count} prompts for num_motions={num_motions}; pass one prompt, or one per motion")
        return texts, None, count

    def _conditions(
        self,
        texts: list[str] | None,
        labels: list[int] | None,
        embeds: torch.Tensor | None,
        null_embeds: torch.Tensor | None,
        count: int,
        device: torch.device,
    ) -> tuple[Condition, Condition]:
        """Arguments of the denoiser with the condition, and without it (empty where there is no guidance)."""
        if texts is None and embeds is None:
            return self._label_conditions(labels, count, device)
        guided = self._guidance.scale != 1
        if texts is not None:
            states, mask = self.encode_prompt([*texts, *([""] if guided else [])], device)
            null_states, states = states[count:], states[:count]
        elif guided and null_embeds is None:
            raise ValueError("guidance with prompt_embeds needs null_prompt_embeds, the tokens of the empty text")
        else:
            states, null_states, mask = embeds.to(device), null_embeds, None
            states = states.expand(count, -1, -1)
        condition = {"encoder_hidden_states": states.to(self.denoiser.dtype)}
        null = {"encoder_hidden_states": null_states.to(states).expand(count, -1, -1)} if guided else {}
        if mask is not None:
            condition["encoder_attention_mask"] = mask[:count]
            if guided:
                null["encoder_attention_mask"] = mask[count:].expand(count, -1)
        return condition, null


def encode_motion_text(
    encoder: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, text_states: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a denoiser of motions reads for tokens of texts.

    Args:
        encoder: a :class:`genssm.models.TextEncoder` or a text encoder of transformers.
        ids: token numbers, (B, S) int64.
        mask: (B, S) bool, True where a token counts.
        text_states: "pooled" or "tokens".
    Returns:
        Tokens (B, S, C) and the mask; for "pooled" (B, 1, C) and None: the projected embedding of an encoder that has
        one (CLIP with projection), else its pooled state, else the mean of its tokens.
    """
    output = encoder(ids, attention_mask=mask)
    if text_states == "tokens":
        return output.last_hidden_state, mask
    for name in ("text_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)[:, None], None
    return masked_mean(output.last_hidden_state, mask)[:, None], None


def load_motion_text(path: str, max_length: int | None, text_states: str) -> tuple[Any, torch.nn.Module]:
    """A frozen text encoder of transformers for motion: of CLIP with its projection where pooled texts are read.

    Args:
        path, max_length: see :func:`genssm.text.load_frozen_encoder`.
        text_states: "pooled" or "tokens".
    Returns:
        The tokenizer and the encoder in evaluation mode, float32.
    Raises:
        ImportError, FileNotFoundError, ValueError: as :func:`genssm.text.load_frozen_encoder`.
    """
    tokenizer, encoder = load_frozen_encoder(path, max_length)
    if text_states == "tokens" or type(encoder).__name__ != "CLIPTextModel":
        return tokenizer, encoder
    from transformers import CLIPTextModelWithProjection

    place = Path(path) / "text_encoder" if (Path(path) / "text_encoder").is_dir() else path
    projecting, found = CLIPTextModelWithProjection.from_pretrained(
        str(place), output_loading_info=True, dtype=torch.float32
    )
    if any("text_projection" in key for key in found["missing_keys"]):
        return tokenizer, encoder  # a text model that was saved alone has no projection
    return tokenizer, projecting.requires_grad_(False).eval()
