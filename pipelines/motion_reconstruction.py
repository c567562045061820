"""Motions through a motion VAE and back: what is saved of its training, and how well it reconstructs."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from genssm.motion import FeatureStatistics, Skeleton, features_to_joints
from genssm.paths import check_choice
from genssm.pipelines.text_to_motion import OUTPUTS, MotionPipelineOutput


class MotionReconstructionPipeline(DiffusionPipeline):
    """A motion VAE with the statistics and the skeleton of its features.

    Args:
        vae: :class:`genssm.models.MotionVAE`.
        mean, std: statistics of the features, F numbers each.
        skeleton: name of a published skeleton or ``Skeleton.to_config()``.
        max_frames: longest clip that it was trained on.
    """

    model_cpu_offload_seq = "vae"

    def __init__(
        self,
        vae: ModelMixin,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        skeleton: str | dict[str, Any] = "t2m",
        max_frames: int | None = None,
    ) -> None:
        super().__init__()
        if mean is None or std is None or not len(mean) == len(std) == vae.config.in_channels:
            raise ValueError(f"mean and std need {vae.config.in_channels} numbers each, the features of the VAE")
        self.register_modules(vae=vae)
        self.register_to_config(mean=list(mean), std=list(std), skeleton=skeleton, max_frames=max_frames)

    @property
    def skeleton(self) -> Skeleton:
        """Of the motions."""
        return Skeleton.from_config(self.config.skeleton)

    @property
    def statistics(self) -> FeatureStatistics:
        """Of the features."""
        return FeatureStatistics(torch.tensor(self.config.mean), torch.tensor(self.config.std))

    @torch.no_grad()
    def __call__(self, motions: Sequence[torch.Tensor], *, output_type: str = "joints") -> MotionPipelineOutput:
        """Encode each motion to the mean of its latents, and decode that.

        Args:
            motions: features, not normalised, (T_i, F) each.
            output_type: "joints" (T, J, 3), "features" (T, F), not normalised, or "latent" (n, D).
        Returns:
            :class:`genssm.pipelines.text_to_motion.MotionPipelineOutput`.
        Raises:
            ValueError: no motions, or features of another length.

        Example:
            >>> pipe = MotionReconstructionPipeline.from_pretrained("runs/motion_vae/checkpoints/step_0100000/pipeline")
            >>> joints = pipe([features]).motions[0]
        """
        check_choice("output_type", output_type, OUTPUTS)
        if not motions:
            raise ValueError("motions is empty; pass at least one")
        results = []
        for motion in motions:  # one by one: no padding, and a result does not depend on the others
            x = self.statistics.normalise(motion.to(self._execution_device, torch.float32))[None]
            latents = self.vae.encode(x).mean
            if output_type == "latent":
                results.append(latents[0])
                continue
            features = self.statistics.denormalise(self.vae.decode(latents, [x.shape[1]])[0].float())
            results.append(features if output_type == "features" else features_to_joints(features, self.skeleton))
        self.maybe_free_model_hooks()
        return MotionPipelineOutput(motions=results, skeleton=self.skeleton, borders=[[] for _ in results])
