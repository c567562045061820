"""Images drawn code by code: a model of codes (:class:`genssm.models.AiM`) and the tokenizer that shows them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin

from genssm.graphs import places, weights_move
from genssm.pipelines.code_images import CodePipeline, Labels, Texts, guidance_scales
from genssm.pipelines.denoising import Generators
from genssm.pipelines.token_decoding import TokenDecoder, draw_uniform
from genssm.pipelines.token_sampling import TokenSampling

STATE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class AutoregressiveImagePipeline(CodePipeline):
    """Class- or text-conditional and unconditional images from a model that draws codes one after the other.

    An image depends on its generator and its condition, not on the batch it is made in. On CUDA the steps run as one
    captured graph, kept for the next call of the same kind; the plain loop gives the same codes. Compiled blocks
    (``pipe.model.compile_repeated_blocks()`` before the first call) go into the graph with fewer launches.

    Args:
        model: draws the codes.
        vqvae: shows them.
        class_names: name of each class, so that labels can be given by name.
        text_encoder: of a model that reads text, a :class:`genssm.models.TextEncoder` or an encoder of transformers;
            None if every call gives embeddings.
        tokenizer: the tokenizer that belongs to it.
    """

    def __init__(
        self,
        model: ModelMixin,
        vqvae: ModelMixin,
        class_names: list[str] | None = None,
        text_encoder: torch.nn.Module | None = None,
        tokenizer: object | None = None,
    ) -> None:
        super().__init__()
        self._register(model, vqvae, class_names, text_encoder, tokenizer)
        self._decoder: tuple[Any, TokenDecoder] | None = None

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        *,
        num_images: int | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float | Sequence[float] = 1.0,
        guidance_schedule: str = "constant",
        codes: torch.Tensor | None = None,
        generator: Generators = None,
        as_released: bool = False,
        cuda_graph: bool = True,
        state_dtype: torch.dtype | None = None,
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
            prompt: for a text-conditional model: one text for all images or one for each; None or "" is the null text.
            negative_prompt: what guidance leads away from, one for all or one for each prompt; the null text by
                default. Without guidance it has no effect and is refused.
            prompt_embeds, negative_prompt_embeds: instead of the texts, what :meth:`encode_prompt` makes of them,
                (B, S, context_dim).
            prompt_attention_mask, negative_prompt_attention_mask: their masks, (B, S); None: every token counts.
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
            state_dtype: what the scans' states are kept in between codes, float32, float16 or bfloat16; None means
                float16 for weights in half precision, float32 for others. The time of large batches is that of moving
                the states.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": the codes (B, T).
            return_dict: False returns a tuple.
            callback_on_step_end: called as ``callback(pipe, i, i, {"codes": ...})`` when code i is drawn; the codes
                (B, T) are those so far and zeros. :meth:`preview` shows them. They are read only.
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
        device, tokens = self._execution_device, self.model.num_tokens
        scales = guidance_scales(guidance_scale, guidance_schedule, tokens, device)
        self._guided = guided = as_released or bool((scales != 1).any())
        texts = Texts(
            prompt, negative_prompt,
            (prompt_embeds, prompt_attention_mask), (negative_prompt_embeds, negative_prompt_attention_mask),
        )  # fmt: skip
        labels, num_images = self._resolve(class_labels, num_images, texts)
        self._check_call(num_images, generator, output_type, callback_on_step_end_tensor_inputs)
        self._check_given(codes, num_images)
        if state_dtype not in (None, *STATE_DTYPES):
            raise ValueError(f"state_dtype is {state_dtype}; expected {', '.join(map(str, STATE_DTYPES))} or None")
        if as_released and isinstance(generator, Sequence):
            raise ValueError("as_released draws all images with one generator; pass one, not a list")
        condition = self._condition(labels, texts, num_images, device)
        uniform = draw_uniform((num_images, tokens), None if as_released else generator, device)

        capture = cuda_graph and device.type == "cuda" and not as_released and not weights_move(self.model)
        decoder = self._decoder_for(num_images, guided, sampling, device, as_released, capture, state_dtype)
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

        images = self.preview(decoder.codes.clone(), done, output_type)
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
        present = torch.arange(codes.shape[1], device=codes.device) < done
        return self._decode(codes, present.expand_as(codes), output_type)

    @property
    def kept_decoder(self) -> TokenDecoder | None:
        """The decoder with a captured graph that is kept for the next call, if there is one."""
        return self._decoder and self._decoder[1]

    def _check_given(self, codes: torch.Tensor | None, num_images: int) -> None:
        """Refuse codes that do not begin an image of this model."""
        tokens, vocabulary = self.model.num_tokens, self.model.config.vocab_size
        if codes is not None:
            if codes.dim() != 2 or codes.shape[0] != num_images or codes.shape[1] >= tokens:
                raise ValueError(f"codes have shape {tuple(codes.shape)}; expected ({num_images}, n) with n < {tokens}")
            if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < vocabulary:
                raise ValueError(f"codes lie outside 0..{vocabulary - 1}, the codes of this model")

    def _decoder_for(
        self,
        num_images: int,
        guided: bool,
        sampling: TokenSampling,
        device: torch.device,
        as_released: bool,
        capture: bool,
        state_dtype: torch.dtype | None,
    ) -> TokenDecoder:
        """A decoder; one with a captured graph is kept as long as calls of its kind come and the weights stay put."""
        kind = (num_images, guided, sampling, device)
        if not capture:
            return TokenDecoder(self.model, *kind, released_draws=as_released, state_dtype=state_dtype)
        key = (*kind, state_dtype, self.model.dtype, places(self.model))
        if self._decoder is None or self._decoder[0] != key:
            self._decoder = None  # frees the memory of the old one first
            self._decoder = key, TokenDecoder(self.model, *kind, capture=True, state_dtype=state_dtype)
        return self._decoder[1]
