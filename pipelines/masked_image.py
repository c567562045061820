"""Images from a model that guesses masked codes (:class:`genssm.models.MaskMamba`), all codes at once, step by step."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import AmusedScheduler, ImagePipelineOutput, ModelMixin

from genssm.graphs import Kept, graphs_for
from genssm.kernels.draw_token import invert_cdf
from genssm.pipelines.code_images import CodePipeline, Condition, Labels, Texts, guidance_scales
from genssm.pipelines.denoising import BatchInvariant, Generators
from genssm.pipelines.token_decoding import draw_uniform
from genssm.pipelines.token_sampling import TokenSampling, filter_logits


class MaskedImagePipeline(CodePipeline):
    """Class- or text-conditional and unconditional images by unmasking codes, the surest first.

    Steps are those of diffusers' ``AmusedScheduler``, with random numbers of each image's own, so that an image depends
    on its generator and its condition, not on the batch it is made in.

    Args:
        model: guesses the codes.
        vqvae: shows them.
        scheduler: says how many codes stay masked after each step, and which.
        class_names: name of each class, so that labels can be given by name.
        text_encoder: of a model that reads text, a :class:`genssm.models.TextEncoder` or an encoder of transformers;
            None if every call gives embeddings.
        tokenizer: the tokenizer that belongs to it.
    """

    _graphs: Kept = None

    def __init__(
        self,
        model: ModelMixin,
        vqvae: ModelMixin,
        scheduler: AmusedScheduler,
        class_names: list[str] | None = None,
        text_encoder: torch.nn.Module | None = None,
        tokenizer: object | None = None,
    ) -> None:
        super().__init__()
        if scheduler.config.mask_token_id != model.mask_code:
            raise ValueError(
                f"the scheduler masks with {scheduler.config.mask_token_id} but the model with {model.mask_code}"
            )
        self._register(model, vqvae, class_names, text_encoder, tokenizer, scheduler=scheduler)

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
        num_inference_steps: int = 12,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        choice_temperature: tuple[float, float] = (2.0, 0.0),
        guidance_scale: float | Sequence[float] = 1.0,
        guidance_schedule: str = "constant",
        codes: torch.Tensor | None = None,
        generator: Generators = None,
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
            prompt: for a text-conditional model: one text for all images or one for each; None or "" is the null text.
            negative_prompt: what guidance leads away from, one for all or one for each prompt; the null text by
                default. Without guidance it has no effect and is refused.
            prompt_embeds, negative_prompt_embeds: instead of the texts, what :meth:`encode_prompt` makes of them,
                (B, S, context_dim).
            prompt_attention_mask, negative_prompt_attention_mask: their masks, (B, S); None: every token counts.
            num_inference_steps: steps from all masked to none.
            temperature: divides the logits; not 0, since a step draws.
            top_k: draw from the k best codes; 0 from all.
            top_p: then from the best codes that together have this probability; 1 from all.
            choice_temperature: noise in the choice of what stays unmasked, at the first and at the last step.
            guidance_scale: weight of classifier-free guidance, null + scale (condition - null), on logits; 1 is none,
                at half the cost. A list has one for each step.
            guidance_schedule: "constant", or "linear" or "cosine": rising from 1 at the first step.
            codes: (B, T), ``model.mask_code`` where the model is to fill in; the others stay. None masks all.
            generator: one for all images, or a list with one for each; with a list an image does not depend on the
                batch it is made in.
            cuda_graph: on CUDA, replay evaluations that come again and again as a recorded graph, kept for the next
                call of the same sizes; False evaluates operation by operation, and frees it. The numbers are the same.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": the codes (B, T).
            return_dict: False returns a tuple.
            callback_on_step_end: called as ``callback(pipe, i, timestep, {"codes": ...})`` after each step; masked
                codes are ``model.mask_code``. :meth:`preview` shows them.
            callback_on_step_end_tensor_inputs: names handed to it.
        Returns:
            An output with ``images``.
        Raises:
            ValueError: contradictory or impossible arguments; raised before anything is computed.
        """
        self._interrupt = False
        sampling = TokenSampling(temperature, top_k, top_p)
        if temperature == 0 or num_inference_steps < 1:
            raise ValueError(
                f"temperature is {temperature} and num_inference_steps {num_inference_steps}; expected more than 0 "
                "and at least 1"
            )
        scales = guidance_scales(guidance_scale, guidance_schedule, num_inference_steps)
        self._guided = guided = bool((scales != 1).any())
        texts = Texts(
            prompt, negative_prompt,
            (prompt_embeds, prompt_attention_mask), (negative_prompt_embeds, negative_prompt_attention_mask),
        )  # fmt: skip
        labels, num_images = self._resolve(class_labels, num_images, texts)
        self._check_call(num_images, generator, output_type, callback_on_step_end_tensor_inputs)
        device, mask_code = self._execution_device, self.model.mask_code
        condition = self._condition(labels, texts, num_images, device)
        codes = self._start(codes, num_images).to(device)  # (B, T)
        shares = (codes == mask_code).float().mean(dim=1)
        kept, self._graphs = self._graphs, None
        if cuda_graph:
            self._graphs = graphs_for(self.model, self.model, codes.shape, condition, kept)

        # On the CPU, and all random numbers at once: no step waits for the GPU.
        self.scheduler.set_timesteps(num_inference_steps, choice_temperature)
        uniform = draw_uniform((num_images, 2 * num_inference_steps * codes.shape[1]), generator, device)
        uniform = uniform.view(num_images, num_inference_steps, 2, -1)
        with self.progress_bar(total=num_inference_steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                logits = self._predict(codes, condition, float(scales[i]), guided)  # (B, T, V)
                logits = filter_logits(logits / sampling.temperature, top_k, top_p)
                codes = self._step(logits, i, codes, shares, uniform[:, i])
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, codes)
                    codes = (callback_on_step_end(self, i, t, given) or {}).get("codes", codes)
                bar.update()
                if self._interrupt:
                    break

        images = self.preview(codes, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def preview(self, codes: torch.Tensor, output_type: str = "pil") -> object:
        """Images of codes (B, T), grey where they are still masked; ``output_type`` as for the call."""
        return self._decode(codes, codes != self.model.mask_code, output_type)

    def _start(self, codes: torch.Tensor | None, num_images: int) -> torch.Tensor:
        """Codes (B, T) that the steps begin with."""
        shape, mask_code = (num_images, self.model.num_tokens), self.model.mask_code
        if codes is None:
            return torch.full(shape, mask_code)
        if codes.shape != shape or not 0 <= int(codes.min()) <= int(codes.max()) <= mask_code:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; expected {shape}, codes of the model or {mask_code} where "
                "they are masked"
            )
        return codes

    def _predict(self, codes: torch.Tensor, condition: Condition, scale: float, guided: bool) -> torch.Tensor:
        """Guided logits (B, T, V), float32."""
        evaluate = self.model if self._graphs is None else self._graphs[1]
        with BatchInvariant() if codes.device.type == "cpu" else contextlib.nullcontext():
            logits = evaluate(codes.repeat(2, 1) if guided else codes, **condition).logits.float()
        if not guided:
            return logits
        conditional, null = logits.chunk(2)
        return null + scale * (conditional - null)

    def _step(
        self, logits: torch.Tensor, step: int, codes: torch.Tensor, shares: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """``AmusedScheduler.step`` for all images at once, each with its own random numbers and share of masked codes.

        The scheduler's own takes one generator and one share for a whole batch; called image by image it launches
        some twenty operations for each. ``uniform`` (B, 2, T) draws the codes and chooses what stays unmasked.
        """
        config, steps, tokens = self.scheduler.config, len(self.scheduler.timesteps), codes.shape[1]
        masked = codes == config.mask_token_id  # (B, T)
        probabilities = logits.softmax(dim=-1)
        drawn = invert_cdf(probabilities.flatten(0, 1), uniform[:, 0].flatten()).view_as(codes)
        chosen = torch.where(masked, drawn, codes)
        if step == steps - 1:
            return chosen
        ratio = torch.tensor((step + 1) / steps)
        left = torch.cos(ratio * math.pi / 2) if config.masking_schedule == "cosine" else 1 - ratio
        count = masked.sum(dim=1)
        # As many as the schedule says, at least one, but fewer than before; an image without masked codes stays so.
        again = torch.minimum((tokens * (shares * left)).floor(), count - 1).clamp(min=1).where(count > 0, 0)
        sure = probabilities.gather(-1, drawn[..., None])[..., 0].clamp(min=1e-20).log()
        noise = -torch.log((-torch.log(uniform[:, 1].clamp(min=1e-20))).clamp(min=1e-20))  # Gumbel
        sure = (sure + self.scheduler.temperatures[step] * noise).masked_fill(~masked, math.inf)
        rank = sure.argsort(dim=1, stable=True).argsort(dim=1)
        return chosen.masked_fill(rank < again[:, None], config.mask_token_id)
