"""The loop that draws an image code by code: static buffers, one step, replayed as a captured graph on CUDA."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ModelMixin

from genssm.graphs import record
from genssm.kernels.draw_token import put_token
from genssm.pipelines.denoising import BatchInvariant, Generators
from genssm.pipelines.token_sampling import TokenSampling, guide

logger = logging.getLogger("genssm")

# B images, T codes of an image, V vocabulary, R rows of the model's batch: B, or 2 B under guidance


def draw_uniform(shape: tuple[int, int], generator: Generators, device: torch.device) -> torch.Tensor:
    """Random numbers in [0, 1), float32, (B, T), drawn image by image on the generator's device and moved."""
    many = isinstance(generator, Sequence)
    rows = []
    for i in range(shape[0]):
        source = generator[i] if many else generator
        place = device if source is None else source.device
        rows.append(torch.rand(shape[1], generator=source, device=place, dtype=torch.float32))
    if len({row.device for row in rows}) > 1:
        rows = [row.to(device) for row in rows]
    return torch.stack(rows).to(device)  # one copy for all images


def _form(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}


class TokenDecoder:
    """Draws the codes of B images with a model that has ``new_cache`` (:class:`genssm.models.AiM`).

    Everything a step reads and writes lies in buffers made once, and nothing in a step depends on values: the plain
    loop and the replayed graph run the same operations and give the same codes. So does the start of an image that no
    codes are given for; on the host it is as many launches as a step, so that it has a graph of its own.

    Args:
        model: the model of codes.
        num_images: B.
        guided: rows B .. 2B-1 of the model's batch are those without the condition.
        sampling: how a code is drawn.
        device: where the model runs.
        released_draws: draw as the released code does: from both halves of the doubled batch with one generator, the
            second half thrown away. Not under a graph.
        capture: run start and steps as captured CUDA graphs.
        state_dtype: of the states that the model keeps; None leaves it to ``new_cache``.
    """

    def __init__(
        self,
        model: ModelMixin,
        num_images: int,
        guided: bool,
        sampling: TokenSampling,
        device: torch.device,
        *,
        released_draws: bool = False,
        capture: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        tokens = model.num_tokens
        self.model, self.num_images, self.guided, self.sampling = model, num_images, guided, sampling
        self.released_draws = released_draws
        self.generator: torch.Generator | None = None
        self.cache = model.new_cache(self.rows, device, state_dtype)
        self.codes = torch.zeros(num_images, tokens, dtype=torch.int64, device=device)
        self.previous = torch.zeros(self.rows, 1, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(num_images, tokens, device=device)
        self.scales = torch.ones(tokens, device=device)
        self.graph = self._capture(self._advance) if capture else None
        self._start_graph: torch.cuda.CUDAGraph | None = None
        self._start_inputs: dict[str, torch.Tensor] | None = None  # what it reads

    @property
    def rows(self) -> int:
        """R."""
        return self.num_images * (2 if self.guided else 1)

    def begin(
        self,
        condition: dict[str, torch.Tensor],
        given: torch.Tensor,
        uniform: torch.Tensor,
        scales: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> int:
        """Read the condition and the codes that are given, and draw the first code after them.

        Args:
            condition: arguments of the model, (R, ...) each.
            given: first codes of the images, (B, n), 0 <= n < T.
            uniform: random numbers in [0, 1), (B, T).
            scales: guidance scale of each code, (T,).
            generator: of ``released_draws``.

        Returns:
            How many codes there are now.
        """
        self.generator = generator
        self.uniform.copy_(uniform)
        self.scales.copy_(scales)
        if self.graph is None or given.shape[1]:  # with codes it would keep the memory of a long sequence
            with self._invariant():
                self._start(given, condition)
        else:
            self._replay_start(condition)
        return given.shape[1] + 1

    def step(self) -> None:
        """Draw the next code of each image."""
        if self.graph is not None:
            self.graph.replay()
        else:
            with self._invariant():
                self._advance()

    def rewind(self) -> None:
        """Let the next step be the first again, whatever it then draws: for measurements."""
        self.cache.position.zero_()

    def _invariant(self) -> contextlib.AbstractContextManager:
        return BatchInvariant() if self.codes.device.type == "cpu" else contextlib.nullcontext()

    def _start(self, given: torch.Tensor, condition: dict[str, torch.Tensor]) -> None:
        """Read the condition and what is given, and draw the code after it."""
        self.cache.begin()
        self.codes.zero_()
        self.codes[:, : given.shape[1]] = given
        codes = given.repeat(self.rows // self.num_images, 1)
        self._draw(self.model(codes, **condition, cache=self.cache).logits[:, -1])

    def _replay_start(self, condition: dict[str, torch.Tensor]) -> None:
        """Start without codes by a graph, captured anew where the condition has another form than before."""
        if self._start_inputs is None or _form(condition) != _form(self._start_inputs):
            self._start_graph = None  # frees its memory first
            self._start_inputs = inputs = {name: x.clone() for name, x in condition.items()}
            none = self.codes[:, :0]
            self._start_graph = self._capture(lambda: self._start(none, inputs), pool=self.graph.pool())
        if self._start_graph is None:
            self._start(self.codes[:, :0], condition)
            return
        for name, x in condition.items():
            self._start_inputs[name].copy_(x)
        self._start_graph.replay()

    def _advance(self) -> None:
        self._draw(self.model(self.previous, cache=self.cache).logits[:, -1])

    def _draw(self, logits: torch.Tensor) -> None:
        """Draw the code after those that the model has read, from ``logits`` (R, V), and put it where it reads it."""
        scales, position = self.scales if self.guided else None, self.cache.position
        if not self.released_draws:
            self.sampling.draw(logits, self.uniform, scales, position, self.codes, self.previous)
            return
        logits = logits.float() if scales is None else guide(logits.float(), scales.index_select(0, position))
        both = self.sampling.probabilities(logits).repeat(2, 1)
        both = both if self.generator is None else both.to(self.generator.device)
        drawn = torch.multinomial(both, 1, generator=self.generator)
        put_token(drawn[: self.num_images, 0].to(self.codes.device), position, self.codes, self.previous)

    def _capture(self, call: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph | None:
        """Record what ``call`` does; None, with a warning, where it cannot be recorded.

        What it computes while it is recorded is overwritten by :meth:`begin`. Graphs that are replayed one after the
        other share a ``pool`` of memory.
        """
        self.cache.begun = True

        def first() -> None:
            self.rewind()
            call()

        try:
            (graph,) = record(self.codes.device, first, call, pool=pool)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning("decoding step by step, slowly: the step cannot be captured as a graph (%s)", reason)
            return None
        return graph
