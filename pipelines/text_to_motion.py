"""Human motion from texts or action labels, with parts of it given: single clips, or one prompt after the other."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput

from genssm.models import CaptionTokenizer
from genssm.motion import FeatureStatistics, Skeleton, features_to_joints
from genssm.paths import check_choice
from genssm.pipelines.conditions import Condition, Label
from genssm.pipelines.denoising import DenoisingPipeline, Generators, Guidance, draw_noise, set_times
from genssm.pipelines.motion_conditions import TEXT_STATES, MotionConditions
from genssm.pipelines.motion_editing import CleanView, hold_frames, hold_latents, join_segments, segment_windows

OUTPUTS = ("joints", "features", "latent")
PROMPT_SECONDS = 6.0

Seconds = float | Sequence[float] | None


@dataclass
class MotionPipelineOutput(BaseOutput):
    """Motions, each of its own length.

    Args:
        motions: joints (T, J, 3), features (T, F) that are not normalised, or latents, one tensor for each motion.
        skeleton: of the joints.
        borders: frames at which the next prompt begins, for each motion; empty for one prompt.
    """

    motions: list[torch.Tensor]
    skeleton: Skeleton
    borders: list[list[int]]

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.skeleton.fps


class TextToMotionPipeline(MotionConditions, DenoisingPipeline):
    """Motions from a denoiser of a motion VAE's latents, or of frames themselves.

    A motion depends on its generator, its length and its condition only. The saved folder is complete: it holds the
    statistics of the features, the skeleton and the text encoder.

    Args:
        denoiser: of latents (:class:`genssm.models.MotionMamba`, :class:`genssm.models.MLD`), or, without ``vae``, of
            normalised features (:class:`genssm.models.MotionMambaFrames`, MLD's form without VAE).
        scheduler: sampler.
        vae: decodes latents to normalised features; None for a denoiser of frames.
        text_encoder: a :class:`genssm.models.TextEncoder`, or CLIP's (or another) text encoder of transformers.
        tokenizer: the one that belongs to it.
        alignment: :class:`genssm.models.MotionAlignment`, tells how well texts and motions fit (:meth:`similarity`).
        mean, std: statistics of the features, F numbers each.
        skeleton: name of a published skeleton or ``Skeleton.to_config()``.
        text_states: what of a text the denoiser reads: "pooled", one token (CLIP's projected embedding where the
            encoder has one), or "tokens".
        class_names: name of each action, so that labels can be given by name.
        max_frames: longest clip that the model was trained on; longer ones are refused, unless None.
    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        text_encoder: ModelMixin | None = None,
        tokenizer: CaptionTokenizer | None = None,
        alignment: ModelMixin | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        skeleton: str | dict[str, Any] = "t2m",
        text_states: str = "pooled",
        class_names: list[str] | None = None,
        max_frames: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("text_states", text_states, TEXT_STATES)
        if mean is None or std is None:
            raise ValueError("mean and std of the features are missing; a pipeline cannot make motions without them")
        if text_states == "tokens" and "encoder_attention_mask" not in inspect.signature(denoiser.forward).parameters:
            raise ValueError(f"a {type(denoiser).__name__} reads one token per text; text_states must be 'pooled'")
        body = Skeleton.from_config(skeleton)
        width = (vae or denoiser).config.in_channels
        if not len(mean) == len(std) == body.feature_dim == width:
            raise ValueError(
                f"the model makes {width} features, mean has {len(mean)} and std {len(std)} numbers, and skeleton "
                f"{body.name!r} {body.feature_dim} features; give parts of one representation"
            )
        self.register_modules(
            denoiser=denoiser, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
            alignment=alignment,
        )  # fmt: skip
        self.register_to_config(
            mean=list(mean), std=list(std), skeleton=skeleton, text_states=text_states, class_names=class_names,
            max_frames=max_frames,
        )  # fmt: skip
        self._guidance, self._num_timesteps, self._interrupt = Guidance(), 0, False

    @property
    def skeleton(self) -> Skeleton:
        """Of the motions."""
        return Skeleton.from_config(self.config.skeleton)

    @property
    def statistics(self) -> FeatureStatistics:
        """Of the features."""
        return FeatureStatistics(torch.tensor(self.config.mean), torch.tensor(self.config.std))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: Label | Sequence[Label] | None = None,
        seconds: Seconds = None,
        num_frames: int | Sequence[int] | None = None,
        num_motions: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        null_prompt_embeds: torch.Tensor | None = None,
        known_features: torch.Tensor | None = None,
        known_frames: torch.Tensor | None = None,
        cuda_graph: bool = True,
        output_type: str = "joints",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Mapping[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MotionPipelineOutput | tuple:
        """Generate motions.

        Args:
            prompt: one text for all motions, or one for each; "" is no text.
            class_labels: actions by index or name, for a denoiser of classes.
            seconds: length of all motions or of each; 6 by default.
            num_frames: the same in frames, instead of ``seconds``.
            num_motions: how many of the one prompt, label or embedding.
            num_inference_steps: steps of the scheduler.
            guidance_scale: weight of classifier-free guidance, null + scale (text - null); 1 is none.
            guidance_interval, guidance_rescale: see :class:`genssm.pipelines.denoising.Guidance`.
            generator: one for all motions, or a list with one for each; with a list a motion does not depend on the
                batch it is made in. Frames of several lengths under a scheduler that draws noise at every step are the
                exception: the noise is drawn for the longest.
            latents: initial noise instead of drawing it: (B, n, D) with a VAE, else (B, T, F).
            prompt_embeds: text tokens (B, S, C) in place of ``prompt``.
            null_prompt_embeds: tokens (1, S, C) of the empty text, needed with ``prompt_embeds`` for guidance.
            known_features: features that are given, not normalised, (B, T, F) or (T, F): a beginning to complete, an
                end, poses in between. A denoiser of frames holds them exactly; with a VAE the latents are pulled
                towards them at each step, and the given frames are put in at the end.
            known_frames: where they are given, (B, T) or (T,) bool. Features are relative to the root, so that they
                give poses and velocities, not places.
            cuda_graph: on CUDA, replay evaluations that come again and again as a recorded graph, kept for the next
                call of the same sizes; False evaluates operation by operation, and frees it. The numbers are the same.
            output_type: "joints" (T, J, 3) in the skeleton's unit, "features" (T, F), not normalised, or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": ...})`` after each step; what
                it returns under "latents" takes their place.
            callback_on_step_end_tensor_inputs: names handed to it.
        Returns:
            :class:`MotionPipelineOutput`.
        Raises:
            ValueError: contradictory or impossible arguments; raised before anything is computed.

        Example:
            >>> from genssm import TextToMotionPipeline
            >>> pipe = TextToMotionPipeline.from_pretrained("runs/motion_mamba/checkpoints/step_0100000/pipeline")
            >>> joints = pipe("a person walks in a circle", seconds=6.0).motions[0]  # (120, 22, 3)
        """
        self._guidance = Guidance(guidance_scale, tuple(guidance_interval), guidance_rescale)
        self._interrupt, self._cuda_graph = False, cuda_graph
        if num_motions is None and prompt is None and class_labels is None and prompt_embeds is None:
            each = num_frames if seconds is None else seconds
            num_motions = len(each) if isinstance(each, Sequence) else None
        texts, labels, count = self._resolve(prompt, class_labels, prompt_embeds, num_motions)
        lengths = self._lengths(seconds, num_frames, count)
        self._check_motion_call(count, num_inference_steps, generator, output_type, callback_on_step_end_tensor_inputs)
        known, mask = self._known(known_features, known_frames, count, lengths)
        device = self._execution_device
        condition, null = self._conditions(texts, labels, prompt_embeds, null_prompt_embeds, count, device)
        noise = self._noise(lengths, generator, latents, device)
        x = self._denoise_motions(
            noise, lengths, condition, null, num_inference_steps, generator, known, mask,
            callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        motions = self._finish(x, lengths, known, mask, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (motions,)
        return MotionPipelineOutput(motions=motions, skeleton=self.skeleton, borders=[[] for _ in motions])

    @torch.no_grad()
    def long(
        self,
        prompts: Sequence[str] | None = None,
        *,
        class_labels: Sequence[Label] | None = None,
        seconds: Seconds = None,
        transition_seconds: float = 1.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator: torch.Generator | None = None,
        cuda_graph: bool = True,
        output_type: str = "joints",
    ) -> MotionPipelineOutput:
        """Generate one motion that follows one prompt after the other.

        Each prompt has a segment, made half a transition longer at its inner ends, so that neighbours overlap. A
        denoiser of frames makes all segments at once and joins their predictions in the overlaps at every step. With a
        VAE each segment is made with the end of the one before given, and the overlap is blended.

        Args:
            prompts: a text for each segment.
            class_labels: or an action for each segment.
            seconds: length of all segments or of each; 6 by default.
            transition_seconds: length of an overlap; shorter than every segment.
            num_inference_steps, guidance_scale: as in the call.
            generator: source of the noise.
            cuda_graph: as in the call.
            output_type: "joints" or "features".
        Returns:
            :class:`MotionPipelineOutput` with one motion and its ``borders``.
        Raises:
            ValueError: contradictory or impossible arguments; raised before anything is computed.
        """
        check_choice("output_type", output_type, OUTPUTS[:2])
        self._guidance, self._interrupt, self._cuda_graph = Guidance(guidance_scale), False, cuda_graph
        texts, labels, count = self._resolve(prompts, class_labels, None, None)
        overlap = 2 * round(transition_seconds * self.skeleton.fps / 2)
        windows = segment_windows(self._lengths(seconds, None, count, bounded=False), overlap)
        self._check_frames([end - start for start, end in windows])
        self._check_motion_call(1, num_inference_steps, generator, output_type, ())
        device = self._execution_device
        condition, null = self._conditions(texts, labels, None, None, count, device)
        arguments = (condition, null, num_inference_steps, generator)
        if self.vae is None:
            features = self._windows_of_frames(windows, overlap, *arguments)
        else:
            features = self._windows_of_latents(windows, overlap, *arguments)
        features = self.statistics.denormalise(features)
        motion = features_to_joints(features, self.skeleton) if output_type == "joints" else features
        self.maybe_free_model_hooks()
        borders = [start + overlap // 2 for start, _ in windows[1:]]
        return MotionPipelineOutput(motions=[motion], skeleton=self.skeleton, borders=[borders])

    def _lengths(
        self, seconds: Seconds, num_frames: int | Sequence[int] | None, count: int, bounded: bool = True
    ) -> list[int]:
        """Frames of each motion."""
        if seconds is not None and num_frames is not None:
            raise ValueError("seconds and num_frames are both given; give one")
        if num_frames is None:
            seconds = PROMPT_SECONDS if seconds is None else seconds
            durations = [seconds] if isinstance(seconds, (int, float)) else list(seconds)
            frames = [round(duration * self.skeleton.fps) for duration in durations]
        else:
            frames = [num_frames] if isinstance(num_frames, int) else list(num_frames)
        frames = frames * count if len(frames) == 1 else frames
        if len(frames) != count:
            raise ValueError(f"{len(frames)} lengths for {count} motions; pass one, or one per motion")
        if bounded:
            self._check_frames(frames)
        return frames

    def _check_frames(self, frames: Sequence[int]) -> None:
        longest = self.config.max_frames
        if self.vae is not None:
            room = self.vae.config.num_positions - self.vae.config.latent_tokens
            longest = room if longest is None else min(longest, room)
        if min(frames) < 1 or (longest is not None and max(frames) > longest):
            fps = self.skeleton.fps
            bound = "any number" if longest is None else f"{longest} ({longest / fps:.1f} seconds)"
            asked = max(frames) if min(frames) > 0 else min(frames)
            longer = "; for more, make one prompt follow the other: pipe.long, sample.py --long" if asked > 0 else ""
            raise ValueError(
                f"a motion of {asked} frames ({fps:g} a second) is asked for; this pipeline makes 1 to {bound}, in "
                f"pipe.long with the transitions counted{longer}"
            )

    def _check_motion_call(
        self, count: int, steps: int, generator: Generators, output_type: str, callback_inputs: Sequence[str]
    ) -> None:
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; expected at least 1")
        check_choice("output_type", output_type, OUTPUTS)
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} motions; pass one, or one per motion")
        unknown = sorted(set(callback_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(f"a callback cannot be given {unknown}; it can be given {self._callback_tensor_inputs}")

    def _noise(
        self, lengths: list[int], generator: Generators, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """Standard normal numbers for each motion: (B, n, D) with a VAE, else (B, T, F) with zeros after its length."""
        count, longest = len(lengths), max(lengths)
        config = self.denoiser.config
        shape = (longest, config.in_channels) if self.vae is None else (config.latent_tokens, config.hidden_size)
        if latents is not None:
            if latents.shape != (count, *shape):
                raise ValueError(f"latents have the shape {tuple(latents.shape)}; expected {(count, *shape)}")
            return latents.to(device, torch.float32)
        if self.vae is not None:
            return draw_noise((count, *shape), generator, device)
        rows = []
        for i, length in enumerate(lengths):  # each motion has the noise of its own length, whatever the batch
            source = generator[i] if isinstance(generator, Sequence) else generator
            noise = draw_noise((1, length, shape[1]), source, device)
            rows.append(torch.nn.functional.pad(noise, (0, 0, 0, longest - length)))
        return torch.cat(rows)

    def _denoise_motions(
        self,
        noise: torch.Tensor,
        lengths: list[int],
        condition: Condition,
        null: Condition,
        steps: int,
        generator: Generators,
        known: torch.Tensor | None,
        mask: torch.Tensor | None,
        callback: Callable[..., Mapping[str, torch.Tensor]] | None = None,
        callback_inputs: Sequence[str] = ("latents",),
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The loop: from noise to clean latents (B, n, D) or normalised features (B, T, F), float32.

        ``predict(x, time)`` replaces the denoiser's guided prediction.
        """
        device = noise.device
        timesteps, times = set_times(self.scheduler, steps)
        latents = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self._num_timesteps = len(timesteps)
        arguments = self._step_arguments(generator)
        if self.vae is None and predict is None:
            counts = {"lengths": torch.tensor(lengths, device=device)}
            condition, null = condition | counts, null | counts if null else null
        self._begin_evaluations(noise.shape, condition)
        clean = CleanView(self.scheduler)
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, (t, time) in enumerate(zip(timesteps, times)):
                x = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    x = self.scheduler.scale_model_input(latents, t)
                prediction = self._predict(x, time, condition, null) if predict is None else predict(x, time)
                if mask is not None and self.vae is None:
                    prediction = hold_frames(clean, prediction, x, time, known, mask)
                elif mask is not None:
                    prediction = hold_latents(clean, prediction, x, time, known, mask, self._decode_each, lengths)
                latents = self.scheduler.step(prediction, t, latents, **arguments).prev_sample
                if callback is not None:
                    given = dict.fromkeys(callback_inputs, latents)
                    latents = (callback(self, i, t, given) or {}).get("latents", latents)
                bar.update()
                if self._interrupt:
                    break
        return latents

    def _predict(self, x: torch.Tensor, times: torch.Tensor, condition: Condition, null: Condition) -> torch.Tensor:
        """The guided prediction; on a CPU frames are denoised motion by motion, each at its own length.

        Matrix products and scans group their sums by the length of the padded batch: this way a motion has the same
        bits in every batch.
        """
        if "lengths" not in condition or x.device.type != "cpu":
            return super()._predict(x, times, condition, null)
        result = torch.zeros_like(x)
        for i, length in enumerate(condition["lengths"].tolist()):
            own = [{key: value[i : i + 1] for key, value in part.items()} for part in (condition, null)]
            result[i, :length] = super()._predict(x[i : i + 1, :length], times, *own)[0]
        return result

    def _decode_each(self, latents: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Normalised features (B, T, F), zeros after each length; on a CPU motion by motion, see :meth:`_predict`."""
        latents = latents.to(self.vae.dtype)
        if latents.device.type != "cpu":
            return self.vae.decode(latents, lengths).float()
        rows = [self.vae.decode(latents[i : i + 1], [length])[0].float() for i, length in enumerate(lengths)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _known(
        self, features: torch.Tensor | None, frames: torch.Tensor | None, count: int, lengths: list[int]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Given features, normalised, (B, T, F), and where they are given, (B, T) bool."""
        if features is None and frames is None:
            return None, None
        if features is None or frames is None:
            raise ValueError("known_features and known_frames belong together; pass both")
        features = features[None] if features.dim() == 2 else features
        frames = (frames[None] if frames.dim() == 1 else frames).bool()
        expected = (max(lengths), self.skeleton.feature_dim)
        if features.shape[1:] != expected or frames.shape != features.shape[:2] or len(features) not in (1, count):
            raise ValueError(
                f"known_features are {tuple(features.shape)} and known_frames {tuple(frames.shape)}; expected "
                f"(1 or {count}, {expected[0]}, {expected[1]}) and the same without features"
            )
        if bool(features[frames].isnan().any()):
            raise ValueError("known_features hold NaN in frames that known_frames says are given")
        device = self._execution_device
        known = torch.where(frames[..., None], self.statistics.normalise(features.float()), 0.0)
        valid = torch.arange(expected[0])[None] < torch.tensor(lengths)[:, None]
        mask = frames.cpu().expand(count, -1) & valid
        return known.expand(count, -1, -1).to(device), mask.to(device)

    def _finish(
        self,
        x: torch.Tensor,
        lengths: list[int],
        known: torch.Tensor | None,
        mask: torch.Tensor | None,
        output_type: str,
    ) -> list[torch.Tensor]:
        """Clean latents or features as what was asked for, each motion at its own length."""
        if output_type == "latent":
            return list(x) if self.vae is not None else [row[:length] for row, length in zip(x, lengths)]
        features = x if self.vae is None else self._decode_each(x, lengths)
        if mask is not None:
            features = torch.where(mask[..., None], known, features)
        features = self.statistics.denormalise(features)
        motions = [row[:length] for row, length in zip(features, lengths)]
        if output_type == "features":
            return motions
        return [features_to_joints(motion, self.skeleton) for motion in motions]

    def _windows_of_frames(
        self,
        windows: list[tuple[int, int]],
        overlap: int,
        condition: Condition,
        null: Condition,
        steps: int,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Normalised features (T, F) of a long motion whose windows are denoised together."""
        total, sizes = windows[-1][1], [end - start for start, end in windows]
        noise = self._noise([total], generator, None, self._execution_device)
        counts = {"lengths": torch.tensor(sizes, device=noise.device)}
        condition, null = condition | counts, null | counts if null else null

        def predict(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            parts = torch.nn.utils.rnn.pad_sequence([x[0, start:end] for start, end in windows], batch_first=True)
            predicted = self._predict(parts, time, condition, null)
            return join_segments([row[:size] for row, size in zip(predicted, sizes)], overlap)[None]

        return self._denoise_motions(noise, [total], {}, {}, steps, generator, None, None, predict=predict)[0]

    def _windows_of_latents(
        self,
        windows: list[tuple[int, int]],
        overlap: int,
        condition: Condition,
        null: Condition,
        steps: int,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Normalised features (T, F) of a long motion made segment by segment."""
        segments: list[torch.Tensor] = []
        for i, (start, end) in enumerate(windows):
            own = [{key: value[i : i + 1] for key, value in part.items()} for part in (condition, null)]
            length, known, mask = end - start, None, None
            noise = self._noise([length], generator, None, self._execution_device)
            if segments and overlap:
                known = noise.new_zeros(1, length, self.skeleton.feature_dim)
                known[0, :overlap] = segments[-1][-overlap:]
                mask = torch.arange(length, device=noise.device)[None] < overlap
            x = self._denoise_motions(noise, [length], *own, steps, generator, known, mask)
            segments.append(self._decode_each(x, [length])[0])
        return join_segments(segments, overlap)
