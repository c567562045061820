"""Training under captions, whatever is drawn: a text encoder that is trained along, frozen, or run once beforehand."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from genssm.config import RunConfig, TextConfig
from genssm.data.text_states import TextStates
from genssm.devices import send
from genssm.models import CaptionTokenizer, TextEncoder
from genssm.tasks.base import Tensors
from genssm.text import encode_texts, load_frozen_encoder
from genssm.training.checkpoint import latest_checkpoint, resolve_pipeline
from genssm.training.samples import grid_columns
from genssm.training.start import saved_component, start_from
from genssm.values import check_arguments

LEARNED = "learned"
DEFAULT_LENGTH = 32


def caption_tokenizer(config: RunConfig, captions: Iterable[str]) -> CaptionTokenizer:
    """The tokenizer of the run that goes on, or of the one that this run starts from, or a new one of ``captions``.

    The weights of a text encoder mean something with their own tokenizer alone.
    """
    train, text = config.train, config.text
    newest = latest_checkpoint(train.output_dir)
    source = newest / "pipeline" if newest else resolve_pipeline(train.init_from) if train.init_from else None
    if source is not None and (source / "tokenizer").is_dir():
        return CaptionTokenizer.from_pretrained(source / "tokenizer")
    length = DEFAULT_LENGTH if text.max_length is None else text.max_length
    return CaptionTokenizer.learn(captions, text.vocab_size, length)


class TextDenoiser(nn.Module):
    """A denoiser and the text encoder that is trained with it, as one module for the optimiser and the average.

    Args:
        denoiser: reads text tokens; a model of codes does, too.
        text_encoder: makes them.
    """

    def __init__(self, denoiser: nn.Module, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder

    @property
    def config(self) -> Any:
        """The denoiser's configuration."""
        return self.denoiser.config

    def forward(
        self,
        *inputs: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        present: torch.Tensor,
        **condition: torch.Tensor,
    ) -> Any:
        """Predict; the output is the denoiser's.

        Args:
            inputs, condition: as for the denoiser.
            input_ids, attention_mask: token numbers (B, S) and which of them count.
            present: (B,) bool, False where the null text takes the place of the caption.
        """
        states = self.text_encoder(input_ids, attention_mask).last_hidden_state  # (B, S, C)
        text = {"encoder_hidden_states": states, "encoder_attention_mask": attention_mask & present[:, None]}
        return self.denoiser(*inputs, **text, **condition)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's blocks in the backward pass."""
        self.denoiser.enable_gradient_checkpointing()

    def disable_gradient_checkpointing(self) -> None:
        """Keep what the denoiser's blocks compute."""
        self.denoiser.disable_gradient_checkpointing()

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile the blocks of both."""
        self.denoiser.compile_repeated_blocks(**options)
        self.text_encoder.compile_repeated_blocks(**options)


class Captioned:
    """What captions change in a task; a share of them is replaced by the null text.

    Mixed into a task with a ``denoiser`` (a model of codes counts as one), ``conditions`` and ``empty_conditions``.
    """

    measurable = False
    reads_text = True

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        check_text_options(config.text)
        super().__init__(config, device)
        captions = sorted({text for texts in self.dataset.captions for text in texts})
        self.row = {text: i for i, text in enumerate(captions)}
        owns_null = self.denoiser.has_null_text  # which then stands for an empty caption
        self.written = torch.tensor([bool(text.strip()) or not owns_null for text in captions], device=device)  # (N,)
        self.states = None
        if self.learned:
            self.tokens = tuple(x.to(device) for x in self.tokenizer(captions))  # (N, S) each
        elif config.text.cache is not None:
            self.states = TextStates(config.text.cache)
            self.states.check(captions, self.denoiser.config.context_dim)
        if not self.learned:
            self.text_encoder.to(device)
        if self.states is not None:
            self.states.check_encoder(self.tokenizer, self.text_encoder, device)

    @property
    def learned(self) -> bool:
        """Whether the text encoder is trained along."""
        return self.config.text.encoder == LEARNED

    @property
    def denoiser(self) -> nn.Module:
        return self.model.denoiser if self.learned else self.model

    def build_model(self) -> nn.Module:
        denoiser, text = super().build_model(), self.config.text
        width = denoiser.config.context_dim
        if self.dataset.captions is None:
            when = " when they are encoded" if self.config.data.name in ("codes", "latents") else ""
            raise ValueError(
                f"the model reads text (context_dim {width}) but the data have none; set data.caption{when}"
            )
        if denoiser.config.num_classes:
            raise ValueError("a model of captions is drawn without classes; set model.args.num_classes=0")
        if not self.learned:
            self.tokenizer, self.text_encoder = load_frozen_encoder(text.encoder, text.max_length)
            found = self.text_encoder.config.hidden_size
            if found != width:
                raise ValueError(f"{text.encoder} has states of width {found}; set model.args.context_dim to it")
            return denoiser
        self.tokenizer = caption_tokenizer(self.config, (text for texts in self.dataset.captions for text in texts))
        sizes = {"vocab_size": len(self.tokenizer), "max_length": self.tokenizer.model_max_length, "hidden_size": width}
        arguments = check_arguments(TextEncoder, {**text.args, **sizes}, "text.args")
        self.text_encoder = TextEncoder(**arguments)
        return TextDenoiser(denoiser, self.text_encoder)

    def start_from(self, path: str | Path) -> None:
        start_from(self.denoiser, path, self.component)
        if self.learned:
            start_from(self.text_encoder, path, "text_encoder")

    def saved_average(self, pipeline: Path) -> nn.Module:
        denoiser = saved_component(type(self.denoiser), pipeline, self.component)
        if not self.learned:
            return denoiser
        return TextDenoiser(denoiser, saved_component(TextEncoder, pipeline, "text_encoder"))

    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        numbers = super().random_numbers(count, generator)
        if self.config.text.dropout_prob:
            numbers["text_dropout"] = torch.rand(count, generator=generator, device=self.device)
        return numbers

    def conditions(self, batch: dict[str, Any], numbers: Tensors) -> Tensors:
        """Labels, and the captions as far as the model reads them, (B, ...) each."""
        rows = send(torch.tensor([self.row[text] for text in batch["text"]]), self.device)
        present = self.written[rows]  # (B,)
        if "text_dropout" in numbers:
            present = present & (numbers["text_dropout"] >= self.config.text.dropout_prob)
        condition = super().conditions(batch, numbers)
        if self.learned:
            ids, mask = (tokens[rows] for tokens in self.tokens)
            return {**condition, "input_ids": ids, "attention_mask": mask, "present": present}
        if self.states is not None:
            states, mask = (x.to(self.device) for x in self.states(batch["text"]))
        else:
            with torch.no_grad():
                states, mask = encode_texts(self.tokenizer, self.text_encoder, batch["text"], self.device)
        return {**condition, "encoder_hidden_states": states, "encoder_attention_mask": mask & present[:, None]}

    def empty_conditions(self, count: int) -> Tensors:
        length, width = self.tokenizer.model_max_length, self.denoiser.config.context_dim
        condition, mask = super().empty_conditions(count), torch.ones(count, length, dtype=torch.bool)
        if self.learned:
            ids, present = torch.zeros(count, length, dtype=torch.long), torch.ones(count, dtype=torch.bool)
            return {**condition, "input_ids": ids, "attention_mask": mask, "present": present}
        states = torch.zeros(count, length, width)
        return {**condition, "encoder_hidden_states": states, "encoder_attention_mask": mask}

    def describe(self) -> dict[str, str]:
        captions, kind = len(self.row), self.config.text.encoder
        text = f"{captions:,} captions, up to {self.tokenizer.model_max_length} tokens, encoder {kind}"
        return {**super().describe(), "text": text}

    def prompts(self) -> Sequence[str]:
        """Texts of the grid: those of the configuration, or captions from all over the data."""
        count = self.config.log.num_samples
        if self.config.log.prompts:
            return self.config.log.prompts
        items = len(self.dataset.captions)
        return [self.dataset.captions[i * items // count][0] for i in range(min(count, items))]

    def draw_prompts(
        self, pipeline: DiffusionPipeline, first: int, stride: int, **call: object
    ) -> dict[int, Image.Image]:
        """As :meth:`Task.draw`, with further arguments of the pipeline."""
        log, prompts, pictures = self.config.log, self.prompts(), {}
        mine = list(range(first, log.num_samples, stride))
        for start in range(0, len(mine), 64):
            places = mine[start : start + 64]
            output = pipeline(
                prompt=[prompts[i % len(prompts)] for i in places],
                generator=[torch.Generator().manual_seed(log.sample_seed + i) for i in places],
                guidance_scale=log.guidance_scale,
                **call,
            )
            pictures |= dict(zip(places, output.images))
        return pictures

    def columns(self, count: int) -> int:
        return grid_columns(count, 0)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"tokenizer": self.tokenizer.backend.to_str()} if self.learned else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.learned and state.pop("tokenizer", None) != self.tokenizer.backend.to_str():
            raise ValueError("the checkpoint was trained with another tokenizer than the one in the run folder")
        super().load_state_dict(state)


def check_text_options(text: TextConfig) -> None:
    """Refuse options of the text encoder that mean nothing together."""
    if not 0 <= text.dropout_prob <= 1:
        raise ValueError(f"text.dropout_prob is {text.dropout_prob}; expected 0 to 1")
    if text.encoder == LEARNED:
        fixed = sorted({"vocab_size", "max_length", "hidden_size"} & set(text.args))
        if fixed:
            raise ValueError(
                f"text.args.{fixed[0]} follows from text.vocab_size, text.max_length, model.args.context_dim"
            )
        if text.cache is not None:
            raise ValueError("text.cache keeps what a frozen encoder says; leave it out with text.encoder=learned")
    elif text.args or text.vocab_size != TextConfig().vocab_size:
        raise ValueError(f"text.args and text.vocab_size shape a learned encoder; {text.encoder} has its own")
