"""Motion VAEs: clips to a few latents and back."""

from typing import Any

import torch
from PIL import Image
from torch import nn

from genssm.config import RunConfig
from genssm.models.motion_vae import motion_vae_losses
from genssm.motion import features_to_joints
from genssm.pipelines import MotionReconstructionPipeline
from genssm.tasks.base import Card, Task, Tensors
from genssm.tasks.motion_data import open_motion, row_of_frames, shown_clips, skeleton_config


class MotionReconstruction(Task):
    """The losses of MLD's VAE: features, joints, and the KL divergence of the latents."""

    component = "vae"
    unit = "clips"

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.dataset = open_motion(config)
        self.model = self.build_model()
        self.measured: Tensors = {}
        frames, dim = self.dataset.item_shape
        if self.model.config.in_channels != dim:
            raise ValueError(
                f"a frame has {dim} features but model.args.in_channels is {self.model.config.in_channels}; change it"
            )
        longest = self.model.config.num_positions - 2 * self.model.config.latent_tokens
        if frames > longest:
            raise ValueError(f"motion.max_frames is {frames}, the model has positions for {longest}; lower it")

    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        shape = (count, self.model.config.latent_tokens, self.model.config.hidden_size)
        return {"noise": torch.randn(shape, generator=generator, device=self.device)}

    def loss(self, model: nn.Module, batch: dict[str, Any], numbers: Tensors) -> torch.Tensor:
        motion, options = batch["motion"], self.config.motion
        output = model(motion, batch["length"], numbers["noise"])
        mask = None
        if not options.loss_on_padding:
            mask = torch.arange(motion.shape[1], device=motion.device) < batch["length"][:, None]
        losses = motion_vae_losses(
            motion, output, self._joints, kl_weight=options.kl_weight, joints_weight=options.joints_weight, mask=mask
        )
        self.measured = {name: losses[name].detach().mean() for name in ("feature", "joints", "kl")}
        self.measured["latent_noise"] = output.posterior.noise_share().detach()
        return losses["total"]  # (B,)

    def numbers_to_log(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.measured.items()}

    def _joints(self, features: torch.Tensor) -> torch.Tensor:
        """Normalised features (B, T, F) to joints (B, T, J, 3) in metres."""
        skeleton = self.dataset.skeleton
        return skeleton.metres * features_to_joints(self.dataset.statistics.denormalise(features), skeleton)

    def sketch(self, count: int) -> torch.Tensor:
        motion = torch.zeros(count, *self.dataset.item_shape)
        noise = torch.zeros(count, self.model.config.latent_tokens, self.model.config.hidden_size)
        return motion_vae_losses(motion, self.model(motion, None, noise), self._joints)["total"]

    def describe(self) -> dict[str, str]:
        frames, dim = self.dataset.item_shape
        return {
            "input": f"up to {frames} frames of {dim} features, {self.model.config.latent_tokens} latent tokens",
            "data": f"{self.config.data.name}, {len(self.dataset):,} clips",
        }

    def build_pipeline(self) -> MotionReconstructionPipeline:
        statistics = self.dataset.statistics
        return MotionReconstructionPipeline(
            self.model, statistics.mean.tolist(), statistics.std.tolist(), skeleton_config(self.dataset.skeleton),
            self.dataset.item_shape[0],
        )  # fmt: skip

    def card(self) -> Card:
        return Card(
            tag="other",
            subject="A variational autoencoder of human motion",
            example="joints = pipe([features]).motions[0]  # features (T, F), not normalised",
            facts={"latents": f"{self.model.config.latent_tokens} x {self.model.config.hidden_size}"},
        )

    def draw(self, pipeline: MotionReconstructionPipeline, first: int, stride: int) -> dict[int, Image.Image]:
        """Each picture: a clip of the data set above what the VAE makes of it."""
        pictures = {}
        for place, index in list(enumerate(shown_clips(self.dataset, self.config.log.num_samples)))[first::stride]:
            drawn = self.dataset.draw(index, None)
            made = pipeline([drawn.features]).motions[0].cpu()
            clips = [features_to_joints(drawn.features, self.dataset.skeleton), made]
            pictures[place] = row_of_frames(clips, self.dataset.skeleton, [drawn.caption.text, "reconstructed"])
        return pictures

    def columns(self, count: int) -> int:
        return 1
