"""What a tokenizer makes of images: encoded to codes and shown again."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from genssm.models.vq import VQTokenizer
from genssm.paths import check_choice
from genssm.pipelines.denoising import OUTPUT_TYPES


class ReconstructionPipeline(DiffusionPipeline):
    """Images to codes and back; the form in which a trained tokenizer is saved.

    Args:
        vqvae: the tokenizer.
    """

    model_cpu_offload_seq = "vqvae"

    def __init__(self, vqvae: ModelMixin) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae)

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        # from_pipe compares exact types: name the model for which ModelMixin stands in the signature.
        return {**super()._get_signature_types(), "vqvae": (VQTokenizer,)}

    @torch.no_grad()
    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | torch.Tensor,
        *,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Encode and decode.

        Args:
            images: PIL images of one size, or (B, C, H, W) in [0, 1]; sides that are multiples of the scale factor.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent": the codes (B, T).
            return_dict: False returns a tuple.
        Returns:
            An output with ``images``.
        Raises:
            ValueError: the images do not fit the tokenizer.

        Example:
            >>> from genssm import ReconstructionPipeline
            >>> pipe = ReconstructionPipeline.from_pretrained("runs/tokenizer/checkpoints/step_0001000/pipeline")
            >>> codes = pipe(image, output_type="latent").images
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        grey = self.vqvae.config.in_channels == 1
        processor = VaeImageProcessor(vae_scale_factor=1, do_convert_rgb=not grey, do_convert_grayscale=grey)
        x = processor.preprocess(images).to(self._execution_device)  # (B, C, H, W) in -1..1
        # Convolutions on the CPU round by batch size; one image at a time also bounds the memory.
        parts = [self.vqvae(part) for part in x.split(1 if x.device.type == "cpu" else len(x))]
        if output_type == "latent":
            result: Any = torch.cat([part.quantized.codes for part in parts])
        else:
            result = processor.postprocess(torch.cat([part.sample.float() for part in parts]), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)
