"""What pipelines of codes share: a model of codes beside its tokenizer, conditions, checks, showing codes."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor

from genssm.models import AiM, MaskMamba, VQTokenizer
from genssm.paths import check_choice
from genssm.pipelines.conditions import Condition, Label, LabelConditions, TextConditions
from genssm.pipelines.denoising import OUTPUT_TYPES, Generators

SCHEDULES = ("constant", "linear", "cosine")
Labels = Label | Sequence[Label] | torch.Tensor | None


def guidance_scales(
    scale: float | Sequence[float], schedule: str, steps: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Guidance scale of each step (of a model that draws code by code: of each code), (N,), float32.

    Args:
        scale: of all steps, or of the last one where a schedule rises to it, or one for each step.
        schedule: "constant"; "linear" and "cosine" rise from 1 at the first step, 1 + (scale - 1) r, with
            r = i / (N - 1) or r = (1 - cos(pi i / (N - 1))) / 2.
        steps: N.
        device: where the result goes.
    Raises:
        ValueError: an unknown schedule, or scales that are not one per step.
    """
    check_choice("guidance_schedule", schedule, SCHEDULES)
    if isinstance(scale, Sequence):
        if len(scale) != steps or schedule != "constant":
            raise ValueError(
                f"{len(scale)} guidance scales with schedule {schedule!r}; a list takes one for each of the "
                f"{steps} steps and no schedule"
            )
        return torch.tensor(scale, dtype=torch.float32, device=device)
    if schedule == "constant":
        return torch.full((steps,), float(scale), device=device)
    rise = torch.linspace(0, 1, steps, device=device)
    rise = (1 - torch.cos(math.pi * rise)) / 2 if schedule == "cosine" else rise
    return 1 + (scale - 1) * rise


class Texts(NamedTuple):
    """The texts of a call, or what an encoder has made of them with its mask, beside what guidance leads away from."""

    prompt: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    embeds: tuple[torch.Tensor | None, torch.Tensor | None]
    negative_embeds: tuple[torch.Tensor | None, torch.Tensor | None]

    @property
    def given(self) -> bool:
        """Whether there is a text."""
        return self.prompt is not None or self.embeds[0] is not None


class CodePipeline(LabelConditions, TextConditions, DiffusionPipeline):
    """Shared parts of the pipelines of codes; a subclass shows the loop that draws them."""

    model_cpu_offload_seq = "text_encoder->model->vqvae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["codes"]

    def _register(
        self,
        model: ModelMixin,
        vqvae: ModelMixin,
        class_names: list[str] | None,
        text_encoder: torch.nn.Module | None,
        tokenizer: object | None,
        **components: SchedulerMixin,
    ) -> None:
        """Keep the components, checked against each other."""
        classes, vocabulary = model.config.num_classes, vqvae.config.num_vq_embeddings
        if class_names is not None and len(class_names) != classes:
            raise ValueError(f"{len(class_names)} class_names for a model of {classes} classes")
        if model.config.vocab_size != vocabulary:
            raise ValueError(f"the model draws {model.config.vocab_size} codes but the tokenizer knows {vocabulary}")
        if text_encoder is not None and not model.config.context_dim:
            raise ValueError("a text_encoder is given but this model reads no text (context_dim is 0)")
        self.register_modules(model=model, vqvae=vqvae, text_encoder=text_encoder, tokenizer=tokenizer, **components)
        self.register_to_config(class_names=class_names)
        self._guided, self._interrupt = False, False

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        # from_pipe compares exact types: name the models for which ModelMixin stands in the signature.
        return {**super()._get_signature_types(), "model": (AiM, MaskMamba), "vqvae": (VQTokenizer,)}

    @property
    def denoiser(self) -> ModelMixin:
        """The model, under the name by which tools ask every pipeline for its network."""
        return self.model

    @property
    def _is_guided(self) -> bool:
        return self._guided

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        return tuple(side * self.vqvae.scale_factor for side in self.model.grid)

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after that step."""
        return self._interrupt

    def _resolve(self, class_labels: Labels, num_images: int | None, texts: Texts) -> tuple[list[int] | None, int]:
        """Labels and number of images, which texts may tell, too: one for each image, or one for all."""
        if not texts.given:
            if texts.negative_prompt is not None or texts.negative_embeds[0] is not None:
                raise ValueError('a negative prompt needs a prompt; give one, "" for no text')
            return self.resolve_labels(class_labels, num_images)
        if not self.model.config.context_dim:
            kind = "prompt_embeds" if texts.prompt is None else "prompt"
            raise ValueError(f"{kind} given but this model reads no text (context_dim is 0); leave it out")
        count = self._count_prompts(*texts, 1)
        if num_images is not None and count not in (1, num_images):
            raise ValueError(f"{count} prompts for num_images={num_images}; pass one prompt, or one per image")
        return self.resolve_labels(class_labels, count if num_images is None else num_images)

    def _check_call(
        self,
        num_images: int,
        generator: Generators,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> None:
        """Refuse, before anything is computed, what cannot work."""
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; expected at least 1")
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if isinstance(generator, Sequence) and len(generator) != num_images:
            raise ValueError(f"{len(generator)} generators for {num_images} images; pass one, or one per image")
        unknown = sorted(set(callback_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(f"a callback cannot be given {unknown}; it can be given {self._callback_tensor_inputs}")

    def _condition(self, labels: list[int] | None, texts: Texts, num_images: int, device: torch.device) -> Condition:
        """Arguments of the model, (R, ...) each; under guidance the second half is without the condition."""
        if self._guided and labels is None and not texts.given:
            raise ValueError("guidance_scale needs a class or a text, and none is given; leave it at 1")
        condition: Condition = {}
        null = self.model.null_class_label
        if null is not None:
            own = torch.full((num_images,), null) if labels is None else torch.tensor(labels)
            halves = [own, torch.full((num_images,), null)] if self._guided else [own]
            condition["class_labels"] = torch.cat(halves).to(device)
        if self.model.config.context_dim:
            condition |= self._text(texts, num_images, device)
        return condition

    def _text(self, texts: Texts, num_images: int, device: torch.device) -> Condition:
        """The texts' part of the condition; a text of no tokens is the null text."""
        if not texts.given:
            rows = 2 * num_images if self._guided else num_images
            states = torch.zeros(rows, 0, self.model.config.context_dim, dtype=self.model.dtype, device=device)
            mask = torch.zeros(rows, 0, dtype=torch.bool, device=device)
            return {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        count = self._count_prompts(*texts, 1)
        given, null = self._text_conditions(*texts, num_images // count, device)
        return {key: torch.cat([value, null[key]]) if null else value for key, value in given.items()}

    def _decode(self, codes: torch.Tensor, present: torch.Tensor, output_type: str) -> Any:
        """Codes (B, T), where ``present``, (B, T), to images; grey elsewhere."""
        if output_type == "latent":
            return codes
        grid, factor = self.model.grid, self.vqvae.scale_factor
        present = present.unflatten(1, grid)[:, None]  # (B, 1, h, w)
        # Convolutions on the CPU round by batch size; one image at a time also bounds the memory.
        at_once = 1 if codes.device.type == "cpu" else len(codes)
        parts = zip(codes.split(at_once), present.split(at_once))
        images = torch.cat([self.vqvae.decode_codes(part, grid, mask).float() for part, mask in parts])
        images = images * present.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        return VaeImageProcessor(vae_scale_factor=factor).postprocess(images, output_type)
