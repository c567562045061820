"""What a pipeline turns into arguments of the denoiser: classes by index or name, and texts."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from genssm.models import TextEncoder
from genssm.text import encode_texts

Label = int | str
Condition = dict[str, torch.Tensor]


class LabelConditions:
    """Classes by index or name; for pipelines with a ``denoiser`` and the configuration ``class_names``."""

    def resolve_labels(
        self, class_labels: Label | Sequence[Label] | torch.Tensor | None, num_images: int | None
    ) -> tuple[list[int] | None, int]:
        """Indices of the classes, one per image (None without labels), and the number of images.

        Args:
            class_labels, num_images: as given to the call.
        Raises:
            ValueError: an unknown class, labels for a denoiser without classes, or contradictory numbers.
        """
        classes = self.denoiser.config.get("num_classes", 0)
        null = getattr(self.denoiser, "null_class_label", None)
        if class_labels is None:
            if classes and null is None:
                raise ValueError(f"this denoiser knows {classes} classes and no null class; pass class_labels")
            return None, 1 if num_images is None else num_images
        if not classes:
            raise ValueError("this denoiser is unconditional; leave class_labels out and pass num_images")
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.flatten().tolist()
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        labels = [self._index(label, classes, null) for label in class_labels]
        if num_images is not None and len(labels) == 1:
            labels = labels * num_images
        if not labels or (num_images is not None and num_images != len(labels)):
            raise ValueError(
                f"{len(labels)} class_labels for num_images={num_images}; pass one label, or one per image"
            )
        return labels, len(labels)

    def _index(self, label: Label, classes: int, null: int | None) -> int:
        """Index of a class given by index or by name; names come first, so that "7" may be one."""
        names = self.config.class_names or []
        if isinstance(label, str):
            if label in names:
                return names.index(label)
            if not label.isdecimal():
                known = f"the names are {', '.join(names)}" if names else "the pipeline has no class_names"
                raise ValueError(f"there is no class named {label!r}; {known}")
            label = int(label)
        if not (0 <= label < classes or label == null):
            raise ValueError(f"class label {label} is not in 0..{classes - 1}, the classes of this denoiser")
        return label

    def _label_conditions(
        self, labels: list[int] | None, num_images: int, device: torch.device
    ) -> tuple[Condition, Condition]:
        """Arguments of the denoiser with the condition, and without it (empty where there is no guidance)."""
        null = getattr(self.denoiser, "null_class_label", None)
        if labels is None and null is None:
            if self._guidance.scale != 1:
                raise ValueError("guidance_scale needs classes, and this denoiser is unconditional; leave it at 1")
            return {}, {}
        null_labels = None if null is None else torch.full((num_images,), null, device=device)
        if labels is None:
            return {"class_labels": null_labels}, {}
        condition = {"class_labels": torch.tensor(labels, device=device)}
        if self._guidance.scale == 1:
            return condition, {}
        if null is None:
            raise ValueError("guidance_scale needs a null class, and this denoiser has none; leave it at 1")
        return condition, {"class_labels": null_labels}


class TextConditions:
    """Texts; for pipelines with a ``denoiser``, a ``text_encoder`` and a ``tokenizer``.

    The empty text is the null text: the denoiser's own where it has one, else the encoding of "".
    """

    model_cpu_offload_seq = "text_encoder->denoiser->vae"
    _optional_components: ClassVar[list[str]] = ["vae", "text_encoder", "tokenizer"]

    @property
    def _is_guided(self) -> bool:
        """Whether the call in progress uses guidance."""
        return self._guidance.scale != 1

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        # from_pipe compares exact types of diffusers' models; the classes of transformers are not imported for this.
        types = {"text_encoder": (TextEncoder, torch.nn.Module), "tokenizer": (object,)}
        return {**super()._get_signature_types(), **types}

    @torch.no_grad()
    def encode_prompt(
        self, texts: Sequence[str], device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the denoiser reads for texts, which may be kept and given as ``prompt_embeds``.

        Args:
            texts: B texts; "" is the null text.
            device: where to compute; None takes the pipeline's.

        Returns:
            States of the tokens (B, S, C) and their mask (B, S) bool, False everywhere in a row without text.

        Raises:
            ValueError: the pipeline has no text encoder or tokenizer.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder and tokenizer; pass prompt_embeds instead of prompt")
        device = torch.device(device or self._execution_device)
        # Sums on the CPU are grouped by the size of the batch: text by text, the result depends on the text alone.
        at_once = 1 if device.type == "cpu" else max(len(texts), 1)
        parts = [texts[i : i + at_once] for i in range(0, len(texts), at_once)]
        encoded = [encode_texts(self.tokenizer, self.text_encoder, part, device) for part in parts]
        states, mask = (torch.cat(part) for part in zip(*encoded))
        if self.config.get("read_padding"):
            mask = torch.ones_like(mask)
        if self.denoiser.has_null_text:
            mask[torch.tensor([not text.strip() for text in texts], device=device)] = False
        return states, mask

    def _count_prompts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        embeds: tuple[torch.Tensor | None, torch.Tensor | None],
        negative_embeds: tuple[torch.Tensor | None, torch.Tensor | None],
        per_prompt: int,
    ) -> int:
        """Number of samples of a call, whose texts fit each other."""
        if per_prompt < 1:
            raise ValueError(f"{per_prompt} samples of each prompt are asked for; expected at least 1")
        count = self._check_text(prompt, *embeds)
        if negative_prompt is None and negative_embeds[0] is None:
            if negative_embeds[1] is not None:
                raise ValueError("negative_prompt_attention_mask belongs to negative_prompt_embeds; pass both")
            if self._is_guided and not self.denoiser.has_null_text and self.text_encoder is None:
                raise ValueError(
                    "guidance needs a null text; this denoiser has none of its own and the pipeline no text encoder: "
                    "pass negative_prompt_embeds or leave guidance_scale at 1"
                )
        else:
            if not self._is_guided:
                raise ValueError("a negative prompt takes effect through guidance; set guidance_scale above 1")
            negatives = self._check_text(negative_prompt, *negative_embeds, "negative_prompt")
            if negatives not in (1, count):
                raise ValueError(f"{negatives} negative prompts for {count} prompts; pass one, or one per prompt")
        return count * per_prompt

    def _check_text(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        kind: str = "prompt",
    ) -> int:
        """Number of texts that a call gives, as texts or as embeddings."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(f"give either {kind} or {kind}_embeds; got {'both' if prompt is not None else 'neither'}")
        if prompt is None:
            width = self.denoiser.config.context_dim
            if prompt_embeds.dim() != 3 or prompt_embeds.shape[2] != width:
                shape = tuple(prompt_embeds.shape)
                raise ValueError(f"{kind}_embeds have the shape {shape}; expected (B, S, {width})")
            if prompt_attention_mask is not None and prompt_attention_mask.shape != prompt_embeds.shape[:2]:
                shape, expected = tuple(prompt_attention_mask.shape), tuple(prompt_embeds.shape[:2])
                raise ValueError(f"{kind}_attention_mask has the shape {shape}; expected {expected}")
            return len(prompt_embeds)
        if prompt_attention_mask is not None:
            raise ValueError(f"{kind}_attention_mask belongs to {kind}_embeds; leave it out with {kind}")
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{kind} is {prompt!r}; expected a text or a list of texts")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(f"this pipeline has no text encoder and tokenizer; pass {kind}_embeds instead of {kind}")
        return len(texts)

    def _text_conditions(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        embeds: tuple[torch.Tensor | None, torch.Tensor | None],
        negative_embeds: tuple[torch.Tensor | None, torch.Tensor | None],
        per_prompt: int,
        device: torch.device,
    ) -> tuple[Condition, Condition]:
        """Arguments of the denoiser with the condition, and without it (empty where there is no guidance)."""
        condition = self._encoded(prompt, *embeds, device)
        if not self._is_guided:
            return _repeated(condition, per_prompt), {}
        count, length = condition["encoder_attention_mask"].shape
        if negative_prompt is None and negative_embeds[0] is None:
            if self.denoiser.has_null_text:
                null = {key: torch.zeros_like(value) for key, value in condition.items()}
                return _repeated(condition, per_prompt), _repeated(null, per_prompt)
            negative_prompt = ""
        null = self._encoded(negative_prompt, *negative_embeds, device)
        length = max(length, null["encoder_attention_mask"].shape[1])
        condition, null = _padded(condition, length), _padded(null, length)
        if len(null["encoder_attention_mask"]) != count:
            null = _repeated(null, count)
        return _repeated(condition, per_prompt), _repeated(null, per_prompt)

    def _encoded(
        self,
        texts: str | Sequence[str] | None,
        states: torch.Tensor | None,
        mask: torch.Tensor | None,
        device: torch.device,
    ) -> Condition:
        """Arguments of the denoiser for texts or their embeddings."""
        if states is None:
            texts = [texts] if isinstance(texts, str) else texts
            states, mask = self.encode_prompt(texts, device)
        elif mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool)
        values = {"encoder_hidden_states": states.to(self.denoiser.dtype), "encoder_attention_mask": mask.bool()}
        return {key: value.to(device) for key, value in values.items()}


def _repeated(condition: Condition, times: int) -> Condition:
    """Each row so many times, one after the other."""
    return {key: value.repeat_interleave(times, dim=0) for key, value in condition.items()}


def _padded(condition: Condition, length: int) -> Condition:
    """The same text with tokens that do not count, up to ``length``."""
    missing = length - condition["encoder_attention_mask"].shape[1]
    return {
        key: torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], dim=1)
        for key, value in condition.items()
    }
