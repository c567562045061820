"""Images drawn code by code: a model of codes (:class:`genssm.models.AiM`) and the tokenizer that shows them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor

from genssm.models.aim import AiM
from genssm.models.vq import VQTokenizer
from genssm.paths import check_choice
from genssm.pipelines.denoising import OUTPUT_TYPES, Generators
from genssm.pipelines.labels import Labels, resolve_labels
from genssm.pipelines.token_decoding import TokenDecoder, draw_uniform
from genssm.pipelines.token_sampling import TokenSampling

SCHEDULES = ("constant", "linear", "cosine")
Condition = dict[str, torch.Tensor]


def guidance_scales(
    scale: float | Sequence[float], schedule: str, num_tokens: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Guidance scale of each code, (T,), float32.

    Args:
        scale: of all codes, or of the last one where a schedule rises to it, or one for each code.
        schedule: "constant"; "linear" and "cosine" rise from 1 at the first code, 1 + (scale - 1) r, with
            r = i / (T - 1) or r = (1 - cos(pi i / (T - 1))) / 2.
        num_tokens: T.
        device: where the result goes.
    Raises:
        ValueError: an unknown schedule, or scales that are not one per code.
    """
    check_choice("guidance_schedule", schedule, SCHEDULES)
    if isinstance(scale, Sequence):
        if len(scale) != num_tokens or schedule != "constant":
            raise ValueError(
                f"{len(scale)} guidance scales with schedule {schedule!r}; a list takes one for each of the "
                f"{num_tokens} codes and no schedule"
            )
        return torch.tensor(scale, dtype=torch.float32, device=device)
    if schedule == "constant":
        return torch.full((num_tokens,), float(scale), device=device)
    rise = torch.linspace(0, 1, num_tokens, device=device)
    rise = (1 - torch.cos(math.pi * rise)) / 2 if schedule == "cosine" else rise
    return 1 + (scale - 1) * rise


class AutoregressiveImagePipeline(DiffusionPipeline):
    """Class- or text-conditional and unconditional images from a model that draws codes one after the other.

    An image depends on its generator and its condition, not on the batch it is made in. On CUDA the steps run as one
    captured graph, kept for the next call of the same kind; the plain loop gives the same codes.

    Args:
        model: draws the codes.
        vqvae: shows them.
        class_names: name of each class, so that labels can be given by name.
    """

    model_cpu_offload_seq = "model->vqvae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["codes"]

    def __init__(self, model: ModelMixin, vqvae: ModelMixin, class_names: list[str] | None = None) -> None:
        super().__init__()
        classes, vocabulary = model.config.num_classes, vqvae.config.num_vq_embeddings
        if class_names is not None and len(class_names) != classes:
            raise ValueError(f"{len(class_names)} class_names for a model of {classes} classes")
        if model.config.vocab_size != vocabulary:
            raise ValueError(f"the model draws {model.config.vocab_size} codes but the tokenizer knows {vocabulary}")
        self.register_modules(model=model, vqvae=vqvae)
        self.register_to_config(class_names=class_names)
        self._decoder: tuple[Any, TokenDecoder] | None = None
        self._interrupt = False

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        # from_pipe compares exact types: name the models for which ModelMixin stands in the signature.
        return {**super()._get_signature_types(), "model": (AiM,), "vqvae": (VQTokenizer,)}

    @property
    def denoiser(self) -> ModelMixin:
        """The model, under the name by which tools ask every pipeline for its network."""
        return self.model

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        return tuple(side * self.vqvae.scale_factor for side in self.model.grid)

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after that code."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        *,
        num_images: int | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float | Sequence[float] = 1.0,
        guidance_schedule: str = "constant",
        codes: torch.Tensor | None = None,
        generator: Generators = None,
        as_released: bool = False,
        cuda_graph: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Mapping[str, torch.Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: one label for all images or one for each, as index or name; None for a model without classes,
                or for the null class of one with classes.
            num_images: how many; by default as many as labels or texts, or 1.
            prompt_embeds: text tokens for a text-conditional model, (B, S, context_dim); None for the null text.
            prompt_attention_mask: (B, S), True (or 1) where a text token counts.
            temperature: divides the logits; 0 takes the best code.
            top_k: draw from the k best codes; 0 from all.
            top_p: then from the best codes that together have this probability; 1 from all.
            guidance_scale: weight of classifier-free guidance, null + scale (condition - null), on logits; 1 is none,
                at half the cost. A list has one for each code.
            guidance_schedule: "constant", or "linear" or "cosine": rising from 1 at the first code.
            codes: first codes of the images, (B, n), n < T, raster order: the rows of an image to be completed.
            generator: one for all images, or a list with one for each; with a list an image does not depend on the
                batch it is made in.
            as_released: sample as the released code does: the temperature is ignored, guidance computed at any scale,
                and both halves of the doubled batch are drawn with one generator.
            cuda_graph: replay the steps as a captured graph on CUDA; False runs the plain loop.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": the codes (B, T).
            return_dict: False returns a tuple.
            callback_on_step_end: called as ``callback(pipe, i, i, {"codes": ...})`` when code i is drawn; the codes
                (B, T) are those so far and zeros. :meth:`preview` shows them.
            callback_on_step_end_tensor_inputs: names handed to it.
        Returns:
            An output with ``images``.
        Raises:
            ValueError: contradictory or impossible arguments; raised before anything is computed.

        Example:
            >>> from genssm import AutoregressiveImagePipeline
            >>> pipe = AutoregressiveImagePipeline.from_pretrained("aim-b")
            >>> pipe([207, 360], guidance_scale=2.0, generator=[torch.Generator().manual_seed(i) for i in (0, 1)])
        """
        self._interrupt = False
        sampling = TokenSampling(1.0 if as_released else temperature, top_k, top_p)
        labels, num_images = self._resolve(class_labels, num_images, prompt_embeds)
        self._check_call(num_images, generator, output_type, callback_on_step_end_tensor_inputs, codes, as_released)
        device, tokens = self._execution_device, self.model.num_tokens
        scales = guidance_scales(guidance_scale, guidance_schedule, tokens, device)
        guided = as_released or bool((scales != 1).any())
        condition = self._condition(labels, prompt_embeds, prompt_attention_mask, num_images, guided, device)
        uniform = draw_uniform((num_images, tokens), None if as_released else generator, device)

        capture = cuda_graph and device.type == "cuda" and not as_released and not self._offloads
        decoder = self._decoder_for(num_images, guided, sampling, device, as_released, capture)
        codes = torch.zeros(num_images, 0, dtype=torch.int64) if codes is None else codes
        done = decoder.begin(condition, codes.to(device), uniform, scales, generator if as_released else None)
        with self.progress_bar(total=tokens) as bar:
            while True:
                bar.update(done - bar.n)
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, decoder.codes)
                    callback_on_step_end(self, done - 1, done - 1, given)
                if done == tokens or self._interrupt:
                    break
                decoder.step()
                done += 1

        images = self._decode(decoder.codes.clone(), done, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def preview(self, codes: torch.Tensor, done: int, output_type: str = "pil") -> Any:
        """Images of codes of which only the first ``done`` are drawn; the rest is grey.

        Args:
            codes: (B, T), as a callback gets them.
            done: how many there are: the callback's step + 1.
            output_type: as for the call.
        """
        return self._decode(codes, done, output_type)

    def resolve_labels(self, class_labels: Labels, num_images: int | None) -> tuple[list[int] | None, int]:
        """Indices of the classes, one per image, and the number of images; see :func:`resolve_labels`."""
        classes, null = self.model.config.num_classes, self.model.null_class_label
        return resolve_labels(class_labels, num_images, classes, null, self.config.class_names or ())

    def _resolve(
        self, class_labels: Labels, num_images: int | None, prompt_embeds: torch.Tensor | None
    ) -> tuple[list[int] | None, int]:
        """Labels and number of images, which texts may tell, too."""
        if prompt_embeds is None:
            return self.resolve_labels(class_labels, num_images)
        if not self.model.config.context_dim:
            raise ValueError("prompt_embeds are given but this model reads no text; leave them out")
        if num_images not in (None, len(prompt_embeds)):
            raise ValueError(f"{len(prompt_embeds)} prompt_embeds for num_images={num_images}; pass one per image")
        return self.resolve_labels(class_labels, len(prompt_embeds))

    def _check_call(
        self,
        num_images: int,
        generator: Generators,
        output_type: str,
        callback_inputs: Sequence[str],
        codes: torch.Tensor | None,
        as_released: bool,
    ) -> None:
        """Refuse, before anything is computed, what cannot work."""
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; expected at least 1")
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if isinstance(generator, Sequence) and as_released:
            raise ValueError("as_released draws all images with one generator; pass one, not a list")
        if isinstance(generator, Sequence) and len(generator) != num_images:
            raise ValueError(f"{len(generator)} generators for {num_images} images; pass one, or one per image")
        unknown = sorted(set(callback_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(f"a callback cannot be given {unknown}; it can be given {self._callback_tensor_inputs}")
        tokens, vocabulary = self.model.num_tokens, self.model.config.vocab_size
        if codes is not None:
            if codes.dim() != 2 or codes.shape[0] != num_images or codes.shape[1] >= tokens:
                raise ValueError(f"codes have shape {tuple(codes.shape)}; expected ({num_images}, n) with n < {tokens}")
            if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < vocabulary:
                raise ValueError(f"codes lie outside 0..{vocabulary - 1}, the codes of this model")

    def _condition(
        self,
        labels: list[int] | None,
        text: torch.Tensor | None,
        mask: torch.Tensor | None,
        num_images: int,
        guided: bool,
        device: torch.device,
    ) -> Condition:
        """Arguments of the model, (R, ...) each; under guidance the second half is without the condition."""
        condition: Condition = {}
        null = self.model.null_class_label
        if null is not None:
            own = torch.full((num_images,), null) if labels is None else torch.tensor(labels)
            halves = [own, torch.full((num_images,), null)] if guided else [own]
            condition["class_labels"] = torch.cat(halves).to(device)
        if self.model.config.context_dim:
            condition |= self._text(text, mask, num_images, guided, device)
        if guided and labels is None and text is None:
            raise ValueError("guidance_scale needs a class or a text, and none is given; leave it at 1")
        return condition

    def _text(
        self, text: torch.Tensor | None, mask: torch.Tensor | None, num_images: int, guided: bool, device: torch.device
    ) -> Condition:
        """The text's part of the condition; a text of no tokens is the null text."""
        if text is None:
            text = torch.zeros(num_images, 0, self.model.config.context_dim)
            mask = None
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
        if guided:
            text, mask = torch.cat([text, text]), torch.cat([mask, torch.zeros_like(mask)])
        return {"encoder_hidden_states": text.to(device), "encoder_attention_mask": mask.to(device)}

    @property
    def _offloads(self) -> bool:
        """Whether hooks move weights about, so that a captured graph would not find them."""
        return any(hasattr(module, "_hf_hook") for module in self.model.modules())

    def _decoder_for(
        self,
        num_images: int,
        guided: bool,
        sampling: TokenSampling,
        device: torch.device,
        as_released: bool,
        capture: bool,
    ) -> TokenDecoder:
        """A decoder; one with a captured graph is kept as long as calls of its kind come and the weights stay put."""
        if not capture:
            return TokenDecoder(self.model, num_images, guided, sampling, device, released_draws=as_released)
        places = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        key = (num_images, guided, sampling, self.model.dtype, places)
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = None  # frees the memory of the old one first
            self._decoder = key, TokenDecoder(self.model, num_images, guided, sampling, device, capture=True)
        return self._decoder[1]

    def _decode(self, codes: torch.Tensor, done: int, output_type: str) -> Any:
        """Codes (B, T), the first ``done`` of which count, to images; grey where there are none yet."""
        if output_type == "latent":
            return codes
        (rows, columns), factor = self.model.grid, self.vqvae.scale_factor
        present = (torch.arange(rows * columns, device=codes.device) < done).view(rows, columns)
        # Convolutions on the CPU round by batch size; one image at a time also bounds the memory.
        at_once = 1 if codes.device.type == "cpu" else len(codes)
        parts = [self.vqvae.decode_codes(part, (rows, columns), present).float() for part in codes.split(at_once)]
        images = torch.cat(parts)
        images = images * present.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        return VaeImageProcessor(vae_scale_factor=factor).postprocess(images, output_type)
