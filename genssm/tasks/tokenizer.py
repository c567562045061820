"""A VQ tokenizer of one's own: images to codes and back."""

import numpy as np
import torch
from accelerate.utils import gather, reduce
from PIL import Image
from torch import nn

from genssm.config import RunConfig
from genssm.data import ImageDataset, build_dataset
from genssm.pipelines import ReconstructionPipeline
from genssm.tasks.base import Card, Task, Tensors
from genssm.training.objectives import build_objective
from genssm.training.reconstruction import PatchDiscriminator, hinge_loss
from genssm.training.samples import grid_columns
from genssm.training.seeding import generator_for, seed_globals


class TokenizerTraining(Task):
    """Reconstruction with :class:`genssm.training.reconstruction.ReconstructionObjective`.

    With an adversarial loss the task owns a discriminator and its optimiser, which learn from the images of a step
    when the tokenizer has made it.
    """

    component = "vqvae"
    shardable = False  # the codebook is moved from outside, after the step
    recordable = False  # and from inside, with each batch

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.dataset = build_dataset(config.data)
        if not isinstance(self.dataset, ImageDataset) or config.data.vae:
            raise ValueError("a tokenizer learns from images; name a data set of images and leave data.vae out")
        if config.train.class_dropout_prob or config.log.guidance_scale != 1:
            raise ValueError("a tokenizer knows no classes; leave out train.class_dropout_prob and log.guidance_scale")
        if config.train.gradient_checkpointing:
            raise ValueError("a tokenizer has no blocks to recompute; set train.gradient_checkpointing=false")
        self.objective = build_objective(config.objective, ("reconstruction",))
        if self.objective.perceptual is not None:
            self.objective.perceptual.to(device)
        self.model = self.build_model()
        self._check_images()
        self.steps = 0
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # images, reconstructions, latents
        self.discriminator = None
        if self.objective.adversarial_weight:
            seed_globals(config.train.seed, "init", "discriminator")
            self.discriminator = PatchDiscriminator(self.model.config.in_channels).to(device).requires_grad_(False)
            self.optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=config.train.learning_rate, betas=(0.5, 0.9)
            )

    def _check_images(self) -> None:
        channels, factor = self.model.config.in_channels, self.model.scale_factor
        shape = self.dataset.item_shape
        if self.model.encoder is None:
            raise ValueError("model.args.has_encoder is false; a tokenizer that is trained needs its encoder")
        if shape[0] != channels:
            raise ValueError(
                f"the data have {shape[0]} channel(s) but model.args.in_channels is {channels}; change it, or set "
                "data.channels"
            )
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"images are {shape[1]}x{shape[2]} but the tokenizer shrinks them {factor} times; set data.resolution "
                "to a multiple of it, or model.args.channel_multipliers to fewer levels"
            )
        if self.objective.perceptual is not None and min(shape[1:]) < 16:
            raise ValueError(f"images are {shape[1]}x{shape[2]}; the perceptual distance needs at least 16x16")

    @property
    def _adversarial(self) -> bool:
        """Whether the discriminator counts in the step that is being made."""
        return self.discriminator is not None and self.steps >= self.objective.adversarial_start

    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        return {}

    def loss(self, model: nn.Module, batch: Tensors, numbers: Tensors) -> torch.Tensor:
        images = batch["pixel_values"]
        output = model(images)
        if self.discriminator is not None or self.objective.restart_every:
            self.seen.append((images, output.sample.detach().float(), output.latents.detach().float()))
        return self.objective.loss(images, output, self.discriminator if self._adversarial else None)  # (B,)

    def after_step(self, step: int) -> None:
        if self._adversarial:
            self._teach_discriminator()
        every = self.objective.restart_every
        if every and step % every == 0:
            # The same in every process: what is dead, and what replaces it.
            usage, latents = self.model.quantize.usage, torch.cat([latents for _, _, latents in self.seen])
            usage.copy_(reduce(usage, "mean"))
            latents = gather(latents)
            generator = generator_for(self.config.train.seed, "restart", step, device=latents.device)
            self.model.quantize.restart_dead_codes(latents, generator)
        self.seen.clear()
        self.steps = step

    def numbers_to_log(self) -> dict[str, float]:
        usage = self.model.quantize.usage_statistics()
        return {"codes_used": usage["used"], "code_perplexity": usage["perplexity"]}

    def _teach_discriminator(self) -> None:
        """One step of the discriminator on what the tokenizer has just seen, all processes together."""
        self.discriminator.requires_grad_(True)
        for images, reconstructed, _ in self.seen:
            (hinge_loss(self.discriminator(images), self.discriminator(reconstructed)) / len(self.seen)).backward()
        for parameter in self.discriminator.parameters():
            parameter.grad = reduce(parameter.grad, "mean")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.discriminator.requires_grad_(False)

    def sketch(self, count: int) -> torch.Tensor:
        images = torch.zeros(count, *self.dataset.item_shape)
        error = self.model(images).sample - images
        return error.square().flatten(1).mean(dim=1)

    def describe(self) -> dict[str, str]:
        _, height, width = shape = tuple(self.dataset.item_shape)
        factor, codes = self.model.scale_factor, self.model.config.num_vq_embeddings
        return {
            "input": f"{shape}, {height // factor} x {width // factor} codes of {codes:,}",
            "data": f"{self.config.data.name}, {len(self.dataset):,} items",
        }

    def build_pipeline(self) -> ReconstructionPipeline:
        return ReconstructionPipeline(self.model)

    def card(self) -> Card:
        usage = self.model.quantize.usage_statistics()
        return Card(
            tag="image-feature-extraction",
            subject="A VQ tokenizer of images",
            example="codes = pipe(image, output_type='latent').images\nagain = pipe(image).images[0]",
            facts={
                "objective": f"{self.objective.pixel_loss} of pixels"
                + (f", perceptual {self.objective.perceptual_weight}" if self.objective.perceptual else "")
                + (f", adversarial {self.objective.adversarial_weight}" if self.discriminator else ""),
                "codes in use": f"{usage['used']} of {self.model.config.num_vq_embeddings}, perplexity "
                f"{usage['perplexity']:.1f}",
            },
        )

    def draw(self, pipeline: ReconstructionPipeline, first: int, stride: int) -> dict[int, Image.Image]:
        """Images of the data set, evenly over it, each with its reconstruction below."""
        count = self.config.log.num_samples
        pictures = {}
        for place in range(first, count, stride):
            pixels = torch.from_numpy(self.dataset.pixels(place * len(self.dataset) // count))
            again = pipeline(pixels[None] / 255, output_type="pt").images[0].mul(255).round().to(torch.uint8)
            both = torch.cat([pixels, again.cpu()], dim=1)  # (C, 2 H, W)
            pictures[place] = Image.fromarray(np.ascontiguousarray(both.permute(1, 2, 0).numpy().squeeze()))
        return pictures

    def columns(self, count: int) -> int:
        return grid_columns(count, 0)

    def state_dict(self) -> dict[str, object]:
        if self.discriminator is None:
            return {}
        return {
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        if self.discriminator is None or "discriminator" not in state:
            super().load_state_dict(state)
            return
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["discriminator_optimizer"])
        self.steps = state["steps"]
