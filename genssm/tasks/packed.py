"""Training on rows of packed samples: images of different sizes, and motions of different lengths, without padding.

A batch counts rows. Every sample counts alike: the loss is the mean over the samples of a step of what each would have
by itself. A row has random numbers for as many tokens as it can hold; a sample takes those of its own places, so that
they depend on the seed and the step alone.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from genssm.config import RunConfig
from genssm.data import VariableImages, build_variable_images
from genssm.data.loading import RowStream
from genssm.data.packing import PackedRows
from genssm.layers import DenoiserOutput
from genssm.tasks.base import Tensors
from genssm.tasks.images import ImageDenoising
from genssm.tasks.motion import MotionDenoising
from genssm.tasks.text import TextDenoising

PROBE = 64  # side of the picture that shows how a VAE shrinks


class _Packed:
    """What rows change in a task.

    Attributes:
        capacity: tokens of a row.
        packed_rows: the stream of rows.
    """

    unit = "rows"
    capacity: int
    packed_rows: PackedRows

    def pack(self, sizes: Sequence[int], too_large: Callable[[int], str]) -> None:
        """Prepare the rows of items of these sizes.

        Args:
            sizes: tokens of each item.
            too_large: the message for an item, by its number, that no row can hold.

        Raises:
            ValueError: there is such an item.
        """
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[largest] > self.capacity:
            raise ValueError(too_large(largest))
        train = self.config.train
        self.packed_rows = PackedRows(self.dataset, sizes, self.capacity, train.seed, train.train_batch_size)

    def feed(self) -> PackedRows:
        return self.packed_rows

    def stream(self) -> RowStream:
        return RowStream(self.config.train.seed)

    def items_per_epoch(self) -> int:
        return len(self.packed_rows.epoch(0))

    def describe(self) -> dict[str, str]:
        rows = self.items_per_epoch()
        full = sum(self.packed_rows.sizes) / (rows * self.capacity)
        packed = f"rows of {self.capacity}, {rows:,} in the first epoch, {full:.0%} full"
        return {**super().describe(), "packed": packed}

    def random_numbers(self, count: int, generator: torch.Generator) -> Tensors:
        """For each row, (count, capacity, ...): one set of numbers for each token that it can hold."""
        numbers = super().random_numbers(count * self.capacity, generator)
        return {name: x.unflatten(0, (count, self.capacity)) for name, x in numbers.items()}


def own_numbers(numbers: Tensors, rows: Sequence[int], sizes: Sequence[int], each: Sequence[str]) -> dict[str, Any]:
    """The numbers of each of S samples.

    Args:
        numbers: (R, capacity, ...).
        rows: the row of each sample, samples of a row one after the other.
        sizes: places that each sample takes in its row.
        each: names of numbers that a sample has for each of its places; of the others it has those of the first.

    Returns:
        (S, ...) tensors, and lists of (size, ...) tensors for the names in ``each``.
    """
    used: Counter[int] = Counter()
    begins = []
    for row, size in zip(rows, sizes):
        begins.append(used[row])
        used[row] += size
    taken: dict[str, Any] = {name: x[list(rows), begins] for name, x in numbers.items() if name not in each}
    for name in set(each) & set(numbers):
        taken[name] = [numbers[name][row, begin : begin + size] for row, begin, size in zip(rows, begins, sizes)]
    return taken


class _PackedImages(_Packed):
    """Images of different sizes in a task of images."""

    dataset: VariableImages

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.capacity = config.data.pack_tokens
        super().__init__(config, device)
        dataset, patch, multiple = self.dataset, self.denoiser.config.patch_size, config.data.multiple
        unit = patch * self.pixels_per_side
        if multiple % unit:
            raise ValueError(f"data.multiple is {multiple}; a token is {unit} pixels wide, make it a multiple of that")
        sizes = [(multiple // unit) ** 2 * tokens for tokens in dataset.tokens]

        def too_large(index: int) -> str:
            width, height = dataset.sizes[index]
            return (
                f"image {dataset.source.names(index)} becomes {width}x{height} pixels, {sizes[index]} tokens, more "
                f"than data.pack_tokens={self.capacity}; raise that, or set data.resolution to reduce large images"
            )

        self.pack(sizes, too_large)

    def open_dataset(self) -> VariableImages:
        return build_variable_images(self.config.data)

    def shape_of_items(self) -> tuple[int, ...]:
        """That of the model's native size; an item may have any."""
        shape: tuple[int, ...] = (self.dataset.item_shape[0], PROBE, PROBE)
        if self.encodes:
            shape = tuple(self.encode(torch.zeros(1, *shape, device=self.device)).shape[1:])
        self.pixels_per_side = PROBE // shape[-1]  # of a latent
        size = self.denoiser.config.sample_size
        return (shape[0], *((size, size) if isinstance(size, int) else size))

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The numbers of a token."""
        patch = self.denoiser.config.patch_size
        return (self.item_shape[0], patch, patch)

    def loss(self, model: nn.Module, batch: dict[str, Any], numbers: Tensors) -> torch.Tensor:
        images, rows = batch[self.dataset.tensor_name], batch["row"]
        unit = self.denoiser.config.patch_size * self.pixels_per_side
        sizes = [math.prod(image.shape[1:]) // unit**2 for image in images]
        own = own_numbers(numbers, rows, sizes, each=("noise", "vae_noise"))
        if self.encodes:
            images = [self._encode_one(image, noise) for image, noise in zip(images, own["vae_noise"])]
        # The objective sees vectors with zeros behind them: no noise and no prediction, so no error there.
        clean = pad_sequence([image.flatten() for image in images], batch_first=True)  # (S, n)
        noise = pad_sequence([noise.flatten() for noise in own["noise"]], batch_first=True)  # (S, n)

        def run(noisy: torch.Tensor, timesteps: torch.Tensor, **condition: torch.Tensor) -> DenoiserOutput:
            packed = [row[: image.numel()].view_as(image) for row, image in zip(noisy, images)]
            sample = model(packed, timesteps, **condition).sample
            return DenoiserOutput(sample=pad_sequence([image.flatten() for image in sample], batch_first=True))

        condition = self.conditions(batch, own)
        loss = self.objective.loss(run, clean, noise=noise, timesteps=own["timesteps"], **condition)  # (S,)
        counts = torch.tensor([image.numel() for image in images], device=loss.device)
        return loss * (clean.shape[1] / counts) * batch["scale"]

    def _encode_one(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        height, width = (side // self.pixels_per_side for side in image.shape[1:])
        return self.encode(image[None], noise.reshape(1, -1, height, width))[0]

    def sketch(self, count: int) -> torch.Tensor:
        """Of as many images of the native size as have the tokens of ``count`` rows."""
        tokens = math.prod(side // self.denoiser.config.patch_size for side in self.item_shape[1:])
        return super().sketch(math.ceil(count * self.capacity / tokens))

    def describe(self) -> dict[str, str]:
        sizes = Counter(self.dataset.sizes)
        common = ", ".join(f"{width}x{height} ({count:,})" for (width, height), count in sizes.most_common(3))
        return {**super().describe(), "sizes": f"{len(sizes):,} of width x height, most often {common}"}

    def draw(self, pipeline: Any, first: int, stride: int) -> dict[int, Image.Image]:
        """Each picture has the size of an image, from all over the data."""
        pictures, count, items = {}, self.config.log.num_samples, len(self.dataset)
        for place in range(first, count, stride):
            width, height = self.dataset.sizes[place * items // count]
            pictures |= super().draw(pipeline, place, count, height=height, width=width)
        return pictures

    def arrange(self, pictures: Sequence[Image.Image]) -> Image.Image:
        width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
        framed = []
        for picture in pictures:
            frame = Image.new(picture.mode, (width, height), "white")
            frame.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
            framed.append(frame)
        return super().arrange(framed)


class PackedImageDenoising(_PackedImages, ImageDenoising):
    """Flow matching or diffusion of images of different sizes, packed."""


class PackedTextDenoising(_PackedImages, TextDenoising):
    """Flow matching or diffusion of images of different sizes under captions, packed."""


class PackedMotionDenoising(_Packed, MotionDenoising):
    """Diffusion or flow matching of motion on frames, whole clips packed."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.capacity = config.motion.pack_frames
        super().__init__(config, device)
        unit, longest = self.dataset.lengths.unit_length, self.dataset.lengths.max_frames
        sizes = [min(len(clip.features) // unit * unit, longest) for clip in self.dataset.clips]
        self.pack(
            sizes,
            lambda index: (
                f"clip {self.dataset.clips[index].name} has {sizes[index]} frames, more than "
                f"motion.pack_frames={self.capacity}; raise that, or lower motion.max_frames"
            ),
        )

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The numbers of a frame."""
        return self.item_shape[1:]

    def loss(self, model: nn.Module, batch: dict[str, Any], numbers: Tensors) -> torch.Tensor:
        sizes = batch["length"].tolist()
        own = own_numbers(numbers, batch["row"], sizes, each=("noise",))
        longest = max(sizes)
        padded = {**batch, "motion": torch.stack(batch["motion"])[:, :longest]}
        own["noise"] = pad_sequence(own["noise"], batch_first=True)  # (S, longest, F)

        def run(noisy: torch.Tensor, timesteps: torch.Tensor, lengths: torch.Tensor, **condition: Any) -> Any:
            output = model([clip[:size] for clip, size in zip(noisy, sizes)], timesteps, **condition)
            output.sample = pad_sequence(output.sample, batch_first=True)
            return output

        return super().loss(run, padded, own) * batch["scale"]

    def sketch(self, count: int) -> torch.Tensor:
        """Of as many of the longest clips as have the frames of ``count`` rows."""
        return super().sketch(math.ceil(count * self.capacity / self.item_shape[0]))
