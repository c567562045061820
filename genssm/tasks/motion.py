"""Denoisers of human motion: in the latents of a motion VAE or on frames, with texts, actions or nothing."""

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from genssm.config import RunConfig, TextConfig
from genssm.devices import send
from genssm.models import MotionAlignment, TextEncoder
from genssm.models.motion_alignment import contrastive_loss
from genssm.pipelines import TextToMotionPipeline
from genssm.pipelines.motion_conditions import encode_motion_text, load_motion_text
from genssm.tasks.base import Card, Task, Tensors
from genssm.tasks.captioned import LEARNED, caption_tokenizer, check_text_options
from genssm.tasks.captioned_motion import CaptionedMotion
from genssm.tasks.motion_data import open_motion, row_of_frames, shown_clips, skeleton_config
from genssm.text import tokenize
from genssm.training.checkpoint import resolve_pipeline
from genssm.training.key_frames import key_frame_mask
from genssm.training.objectives import build_objective
from genssm.training.seeding import seed_globals
from genssm.training.start import saved_component, start_from
from genssm.values import check_arguments

logger = logging.getLogger("genssm")
CLIPS_ENCODED, NOISY = 32, 0.4


class MotionDenoising(Task):
    """Diffusion or flow matching of motion, on the objectives of :mod:`genssm.training.objectives`.

    Options of :class:`genssm.config.MotionConfig`: whole clips as latents of a trained VAE, or frames; a text encoder
    trained along or frozen; hidden key frames and a text-motion contrast in the spirit of KMM (arXiv:2411.06481).
    """

    unit = "clips"

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.options = config.motion
        self.dataset = open_motion(config)
        self.objective = build_objective(config.objective)
        self.vae = self._load_vae().to(device) if self.options.vae else None
        self.latent_noise = self._latent_noise() if self.options.vae else 0.0
        self.denoiser = self.build_model()
        self.reads_text = bool(self.denoiser.config.context_dim)
        self.learned = self.reads_text and config.text.encoder == LEARNED
        self.tokenizer, self.text_encoder = self._build_text()
        self.alignment = self._build_alignment()
        self._check()
        self.model = self.denoiser
        if self.learned:
            self.model = CaptionedMotion(self.denoiser, self.text_encoder, self.options.text_states, self.alignment)
        frames, dim = self.dataset.item_shape
        size = self.denoiser.config
        self.item_shape = (frames, dim) if self.vae is None else (size.latent_tokens, size.hidden_size)
        self.rows, self.tokens = self._tokenize() if self.reads_text else ({}, ())

    def _load_vae(self) -> nn.Module:
        """The frozen VAE; its statistics and skeleton become those of the data."""
        folder = resolve_pipeline(self.options.vae)
        pipeline = DiffusionPipeline.from_pretrained(folder)
        vae = getattr(pipeline, "vae", None)
        if vae is None or not hasattr(pipeline, "statistics"):
            raise ValueError(f"motion.vae={self.options.vae} is a {type(pipeline).__name__}; expected a motion VAE")
        if not pipeline.skeleton.makes_features_of(self.dataset.skeleton):
            raise ValueError(
                f"the VAE of {folder} makes motions of skeleton {pipeline.skeleton.name!r}, the data have "
                f"{self.dataset.skeleton.name!r}, or bones of other lengths; use a VAE trained on this kind of data"
            )
        if pipeline.skeleton.bone_lengths is not None:
            self.dataset.skeleton = pipeline.skeleton
        self.dataset.statistics = pipeline.statistics
        return vae.requires_grad_(False).eval()

    @torch.no_grad()
    def _latent_noise(self) -> float:
        """Share of noise in the latents, from some clips; most of them noise is worth a warning."""
        items = [self.dataset[i] for i in shown_clips(self.dataset, CLIPS_ENCODED)]
        motion = torch.stack([item["motion"] for item in items]).to(self.device)
        share = float(self.vae.encode(motion, [item["length"] for item in items]).noise_share())
        if share > NOISY:
            logger.warning(
                "%.0f %% of the latents of %s is noise of the VAE's posterior; texts and actions will hardly act. "
                "Train the VAE longer, with a higher train.learning_rate or with model.args.mlp_dist=true",
                100 * share, self.options.vae,
            )  # fmt: skip
        return share

    def _build_text(self) -> tuple[Any, nn.Module | None]:
        """Tokenizer and encoder of captions, or None twice."""
        text = self.config.text
        if not self.reads_text:
            if text != TextConfig():
                raise ValueError("the section text is for models that read text; set model.args.context_dim")
            return None, None
        check_text_options(text)
        if text.cache is not None:
            raise ValueError("text.cache is not read in training on motion; leave it out")
        if not self.learned:
            tokenizer, encoder = load_motion_text(text.encoder, text.max_length, self.options.text_states)
            return tokenizer, encoder.to(self.device)
        captions = [caption.text for clip in self.dataset.clips for caption in clip.captions]
        tokenizer, width = caption_tokenizer(self.config, captions), self.denoiser.config.context_dim
        seed_globals(self.config.train.seed, "init", "text")
        sizes = {"vocab_size": len(tokenizer), "max_length": tokenizer.model_max_length, "hidden_size": width}
        return tokenizer, TextEncoder(**check_arguments(TextEncoder, {**text.args, **sizes}, "text.args"))

    def _tokenize(self) -> tuple[dict[str, int], tuple[torch.Tensor, torch.Tensor]]:
        """Numbers of all captions, row 0 the empty one, with the rows of token numbers and masks, (N, S) each."""
        captions = ["", *sorted({caption.text for clip in self.dataset.clips for caption in clip.captions} - {""})]
        tokens = tokenize(self.tokenizer, captions)
        return {text: row for row, text in enumerate(captions)}, tuple(x.to(self.device) for x in tokens)

    def _build_alignment(self) -> MotionAlignment | None:
        if not self.options.contrastive_weight:
            return None
        if not self.learned:
            raise ValueError("motion.contrastive_weight trains a text encoder; set text.encoder=learned, or leave it 0")
        seed_globals(self.config.train.seed, "init", "alignment")
        return MotionAlignment(self.dataset.item_shape[1], self.denoiser.config.context_dim)

    def _check(self) -> None:
        """Refuse parts that do not go together."""
        size, options, dim = self.denoiser.config, self.options, self.dataset.item_shape[1]
        on_frames = bool(size.get("in_channels"))
        if self.vae is None and size.get("in_channels") != dim:
            has = f"in_channels is {size.in_channels}" if on_frames else "it denoises latents: set motion.vae"
            raise ValueError(f"a frame has {dim} features, but of the model {has}")
        if self.vae is not None:
            made = (self.vae.config.latent_tokens, self.vae.config.hidden_size)
            reads = None if on_frames else (size.latent_tokens, size.hidden_size)
            if made != reads:
                raise ValueError(
                    f"the VAE has latents of {made[0]} x {made[1]}, the denoiser reads {reads or 'frames'}"
                )
        if self.reads_text and not self.learned:
            ids, mask = (x.to(self.device) for x in tokenize(self.tokenizer, ["a"]))
            with torch.no_grad():
                found = encode_motion_text(self.text_encoder, ids, mask, options.text_states)[0].shape[2]
            if found != size.context_dim:
                raise ValueError(f"{self.config.text.encoder} has states of width {found}; set model.args.context_dim")
        if size.num_classes and size.num_classes != self.dataset.num_classes:
            raise ValueError(f"model.args.num_classes is {size.num_classes}, the data have {self.dataset.num_classes}")
        dropped = self.config.text.dropout_prob if self.reads_text else self.config.train.class_dropout_prob
        if self.config.train.class_dropout_prob and not size.num_classes:
            raise ValueError("train.class_dropout_prob drops classes and the model has none; texts: text.dropout_prob")
        if self.config.log.guidance_scale != 1 and not dropped:
            raise ValueError(
                f"log.guidance_scale={self.config.log.guidance_scale} needs a condition that training drops; set it to "
                "1, or text.dropout_prob (classes: train.class_dropout_prob) to 0.1"
            )
        if options.key_frame_ratio and (self.vae is not None or self.config.objective.prediction_type != "sample"):
            raise ValueError(
                "motion.key_frame_ratio hides frames that the model must find again: it needs a denoiser of frames and "
                "objective.prediction_type=sample"
            )
        if not 0 <= options.key_frame_ratio < 1 or not 0 <= options.key_frame_prob <= 1:
            raise ValueError("motion.key_frame_ratio and motion.key_frame_prob are parts of a whole; expected 0 to 1")

    def saved_average(self, pipeline: Path) -> nn.Module:
        denoiser = saved_component(type(self.denoiser), pipeline, "denoiser")
        if not self.learned:
            return denoiser
        text_encoder = saved_component(TextEncoder, pipeline, "text_encoder")
        alignment = None if self.alignment is None else saved_component(MotionAlignment, pipeline, "alignment")
        return CaptionedMotion(denoiser, text_encoder, self.options.text_states, alignment)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise of what a batch counts."""
        return self.item_shape

    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        shape = (count, *self.noise_shape)
        numbers = {
            "timesteps": self.objective.sample_timesteps(count, generator, self.device),
            "noise": torch.randn(shape, generator=generator, device=self.device),
        }
        if self.config.train.class_dropout_prob or self.config.text.dropout_prob:
            numbers["dropout"] = torch.rand(count, generator=generator, device=self.device)
        if self.vae is not None:
            numbers["vae_noise"] = torch.randn(shape, generator=generator, device=self.device)
        if self.options.key_frame_ratio:
            numbers["hide"] = torch.rand(count, generator=generator, device=self.device)
        return numbers

    def loss(self, model: nn.Module, batch: dict[str, Any], numbers: Tensors) -> torch.Tensor:
        clean, lengths, noise = batch["motion"], batch["length"], numbers["noise"]
        condition = self._condition(batch, numbers)
        scale, hidden = 1.0, None
        if self.vae is not None:
            with torch.no_grad():
                posterior = self.vae.encode(clean, lengths)
                clean = posterior.mean + posterior.std * numbers["vae_noise"]
        else:
            condition["lengths"] = lengths
            # Padding has no noise and no prediction, so no error; the mean is taken over what is left.
            noise = noise * (torch.arange(clean.shape[1], device=clean.device) < lengths[:, None])[..., None]
            scale = clean.shape[1] / lengths
            if self.options.key_frame_ratio:
                hidden = key_frame_mask(clean, lengths, self.options.key_frame_ratio, self.options.key_frame_bandwidth)
                hidden = hidden & (numbers["hide"] < self.options.key_frame_prob)[:, None]
        if self.alignment is not None:
            condition |= {"motion": batch["motion"], "motion_lengths": lengths}
        outputs = []

        def run(noisy: torch.Tensor, timesteps: torch.Tensor, **arguments: Any) -> Any:
            if hidden is not None:
                noisy = noisy.masked_fill(hidden[..., None], 0.0)
            outputs.append(model(noisy, timesteps, **arguments))
            return outputs[0]

        loss = scale * self.objective.loss(run, clean, noise=noise, timesteps=numbers["timesteps"], **condition)  # (B,)
        if self.alignment is not None:
            rows = self._rows(batch)
            same = rows[:, None] == rows[None]
            loss = loss + self.options.contrastive_weight * contrastive_loss(outputs[0].similarity, same)
        return loss

    def _condition(self, batch: dict[str, Any], numbers: Tensors) -> dict[str, torch.Tensor]:
        """Arguments of the model: texts or labels, some of them dropped."""
        if self.denoiser.config.num_classes:
            labels = batch["class_labels"]
            if "dropout" in numbers:
                dropped = numbers["dropout"] < self.config.train.class_dropout_prob
                labels = torch.where(dropped, self.denoiser.null_class_label, labels)
            return {"class_labels": labels}
        if not self.reads_text:
            return {}
        rows = self._rows(batch)
        if "dropout" in numbers:
            rows = rows.masked_fill(numbers["dropout"] < self.config.text.dropout_prob, 0)
        ids, mask = (x[rows] for x in self.tokens)  # (B, S) each
        if self.learned:
            return {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            states, mask = encode_motion_text(self.text_encoder, ids, mask, self.options.text_states)
        return {"encoder_hidden_states": states, **({} if mask is None else {"encoder_attention_mask": mask})}

    def _rows(self, batch: dict[str, Any]) -> torch.Tensor:
        """Numbers of the captions of a batch, (B,)."""
        return send(torch.tensor([self.rows[text] for text in batch["text"]]), self.device)

    def sketch(self, count: int) -> torch.Tensor:
        clean = torch.zeros(count, *self.item_shape)
        timesteps = torch.zeros(count, dtype=self.objective.sample_timesteps(1).dtype)
        condition: dict[str, torch.Tensor] = {}
        if self.denoiser.config.num_classes:
            condition["class_labels"] = torch.zeros(count, dtype=torch.long)
        elif self.learned:
            ids, mask = (x[:1].cpu().expand(count, -1) for x in self.tokens)
            condition = {"input_ids": ids, "attention_mask": mask}
        elif self.reads_text:
            length = 1 if self.options.text_states == "pooled" else self.tokens[0].shape[1]
            condition["encoder_hidden_states"] = torch.zeros(count, length, self.denoiser.config.context_dim)
        return self.objective.loss(self.model, clean, noise=clean, timesteps=timesteps, **condition)

    def describe(self) -> dict[str, str]:
        shape = " x ".join(map(str, self.item_shape))
        what = (
            f"latents of {shape}, {self.latent_noise:.0%} noise"
            if self.vae is not None
            else f"up to {self.item_shape[0]} frames of {self.item_shape[1]}"
        )
        reads = f"{len(self.rows) - 1:,} captions, encoder {self.config.text.encoder}" if self.reads_text else "no text"
        reads = f"{self.denoiser.config.num_classes} actions" if self.denoiser.config.num_classes else reads
        return {"input": f"{what}; {reads}", "data": f"{self.config.data.name}, {len(self.dataset):,} clips"}

    def build_pipeline(self) -> TextToMotionPipeline:
        statistics, named = self.dataset.statistics, self.denoiser.config.num_classes
        return TextToMotionPipeline(
            self.denoiser,
            self.objective.scheduler(),
            self.vae,
            self.text_encoder,
            self.tokenizer,
            self.alignment,
            mean=statistics.mean.tolist(),
            std=statistics.std.tolist(),
            skeleton=skeleton_config(self.dataset.skeleton),
            text_states=self.options.text_states,
            class_names=list(self.dataset.class_names) if named else None,
            max_frames=self.dataset.item_shape[0] if self.vae is not None else None,
        )

    def card(self) -> Card:
        given = '"a person walks forward", ' if self.tokenizer is not None else ""
        given = "class_labels=0, " if self.denoiser.config.num_classes else given
        return Card(
            tag="other",
            subject=f"A {self.config.model.name} denoiser of human motion",
            example=f"joints = pipe({given}seconds=4.0, guidance_scale={self.config.log.guidance_scale}).motions[0]",
            facts={
                "works on": "frames" if self.vae is None else "latents of the VAE saved here",
                "objective": f"{self.config.objective.name}, predicts {self.config.objective.prediction_type}",
                "scheduler saved here": type(self.objective.scheduler()).__name__,
            },
        )

    def draw(self, pipeline: TextToMotionPipeline, first: int, stride: int) -> dict[int, Image.Image]:
        """Each picture: frames of a motion of the length and with the caption or action of a clip."""
        log, pictures = self.config.log, {}
        call = {"num_inference_steps": log.num_inference_steps, "guidance_scale": log.guidance_scale}
        for place, index in list(enumerate(shown_clips(self.dataset, log.num_samples)))[first::stride]:
            item = self.dataset[index]
            asked, title = {}, item["text"]
            if self.denoiser.config.num_classes:
                asked, title = {"class_labels": [item["class_labels"]]}, self.dataset.class_names[item["class_labels"]]
            elif self.reads_text:
                title = log.prompts[place % len(log.prompts)] if log.prompts else title
                asked = {"prompt": title}
            generator = [torch.Generator().manual_seed(log.sample_seed + place)]
            made = pipeline(**asked, num_frames=item["length"], generator=generator, **call).motions[0].cpu()
            pictures[place] = row_of_frames([made], self.dataset.skeleton, [title])
        return pictures

    def columns(self, count: int) -> int:
        return 1

    def start_from(self, path: str | Path) -> None:
        start_from(self.denoiser, path)
        if self.learned:
            start_from(self.text_encoder, path, "text_encoder")
