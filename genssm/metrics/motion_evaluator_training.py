"""Train an evaluator of one's own: ``python -m genssm.metrics.motion_evaluator_training --help``.

First an autoencoder of short windows gives the movement encoder; then, with that frozen, the other two networks learn
to put a motion near its caption and a margin away from another one (Guo et al. 2022). Distances in the features of
such an evaluator compare models with each other, never with published tables.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from genssm.data.motion import Lengths, MotionDataset, build_motion_dataset
from genssm.data.motion.words import WordVectors
from genssm.devices import device_option
from genssm.errors import cli
from genssm.metrics.motion_clips import Clips, draw_clips, embed_captions, embed_motions, stack_captions
from genssm.metrics.motion_distances import GROUP_SIZE, retrieval
from genssm.metrics.motion_evaluator import (
    CONTACTS,
    SLOPE,
    EvaluatorInfo,
    EvaluatorSizes,
    MotionEvaluator,
    save_evaluator,
)
from genssm.training.seeding import derive, generator_for

WINDOW = 24  # frames
FEATURE_BIAS = 5.0
SPARSITY, SMOOTHNESS = 1e-3, 1e-3


class MovementDecoder(nn.Module):
    """Mirror image of the movement encoder: tokens (B, M, channels) to features without contacts (B, 4 M, dim - 4)."""

    def __init__(self, in_channels: int, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose1d(in_channels, hidden_size, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.ConvTranspose1d(hidden_size, out_channels, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
        )
        self.out_net = nn.Linear(out_channels, out_channels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out_net(self.main(tokens.transpose(1, 2)).transpose(1, 2))


def autoencoder_loss(encoder: nn.Module, decoder: nn.Module, windows: Tensor) -> Tensor:
    """|x - decoded|_1 + 1e-3 |tokens|_1 + 1e-3 |differences of tokens|_1, means, for windows (B, 24, dim - 4)."""
    tokens = encoder(windows)
    smooth = (tokens[:, 1:] - tokens[:, :-1]).abs().mean()
    return F.l1_loss(decoder(tokens), windows) + SPARSITY * tokens.abs().mean() + SMOOTHNESS * smooth


def contrastive_loss(texts: Tensor, motions: Tensor, others: Tensor, different: Tensor, margin: float) -> Tensor:
    """mean |t_i - m_i|^2 + mean max(0, margin - |t_i - m_other(i)|)^2.

    Args:
        texts, motions: embeddings of pairs, (B, d).
        others: for each row the row of another motion, (B,).
        different: rows whose other motion has another caption, (B,) bool; only these are pushed apart.
        margin: distance to be kept.
    """
    near = (texts - motions).square().sum(-1).mean()
    gap = F.relu(margin - (texts - motions[others]).norm(dim=-1)).square()
    return near + (gap * different).sum() / different.sum().clamp(min=1)


def train_evaluator(
    train: MotionDataset,
    test: MotionDataset,
    vectors: WordVectors,
    *,
    sizes: EvaluatorSizes | None = None,
    autoencoder_epochs: int = 50,
    epochs: int = 300,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    margin: float = 10.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[MotionEvaluator, float]:
    """Train on one part of a data set; measured on another.

    Args:
        train, test: the parts, with the same skeleton.
        vectors: of the words.
        sizes: widths; None takes the published ones for these features and vectors.
        autoencoder_epochs, epochs: passes over the clips of either stage.
        batch_size: pairs of a step, at least 2.
        learning_rate: of Adam in both stages.
        margin: of the contrastive loss.
        seed: of weights, order and crops.
        device: where to train.
        progress: show bars.
    Returns:
        The evaluator in evaluation mode on the CPU, and the R-precision (k = 1) of the test part in groups of 32; fewer
        clips than that are drawn several times.
    """
    if len(train) < 2 or batch_size < 2:
        raise ValueError(f"{len(train)} clips in batches of {batch_size}; pairs to push apart need 2 at least")
    device = torch.device(device)
    statistics = train.statistics.with_feature_bias(FEATURE_BIAS, train.skeleton)
    sizes = replace(sizes or EvaluatorSizes(), feature_dim=train.skeleton.feature_dim, word_dim=vectors.dim)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "init"))  # of weights and dropout
        evaluator = MotionEvaluator(sizes, statistics).to(device).train()
        decoder = MovementDecoder(sizes.movement_dim, sizes.movement_hidden, sizes.feature_dim - CONTACTS).to(device)
        _fit_autoencoder(evaluator, decoder, train, autoencoder_epochs, batch_size, learning_rate, seed, progress)
        evaluator.movement_encoder.requires_grad_(False).eval()
        _fit_pairs(evaluator, train, vectors, epochs, batch_size, learning_rate, margin, seed, progress)
    evaluator.eval()
    clips = draw_clips(test, seed, 0, windows=-(-GROUP_SIZE // len(test)))
    texts = embed_captions(evaluator, clips.captions, vectors, device)
    motions = embed_motions(evaluator, clips.features, test.lengths.max_frames, device)
    return evaluator.cpu(), retrieval(texts, motions).r_precision[0]


def _fit_autoencoder(
    evaluator: MotionEvaluator,
    decoder: nn.Module,
    train: MotionDataset,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> None:
    device = next(decoder.parameters()).device
    encoder = evaluator.movement_encoder
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=learning_rate)
    draw = np.random.default_rng(derive(seed, "windows"))
    long = [clip.features for clip in train.clips if len(clip.features) >= WINDOW]
    bar = tqdm(range(epochs), desc="movements", unit="epoch", disable=not progress)
    for _ in bar:
        for rows in np.array_split(draw.permutation(len(long)), -(-len(long) // batch_size)):
            starts = [int(draw.integers(len(long[i]) - WINDOW + 1)) for i in rows]
            windows = torch.stack([long[i][start : start + WINDOW] for i, start in zip(rows, starts)]).to(device)
            windows = evaluator.statistics.normalise(windows)[..., :-CONTACTS]
            loss = autoencoder_loss(encoder, decoder, windows)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")


def _fit_pairs(
    evaluator: MotionEvaluator,
    train: MotionDataset,
    vectors: WordVectors,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    margin: float,
    seed: int,
    progress: bool,
) -> None:
    learned = [*evaluator.motion_encoder.parameters(), *evaluator.text_encoder.parameters()]
    optimiser = torch.optim.Adam(learned, lr=learning_rate)
    shifts = generator_for(seed, "shifts")
    bar = tqdm(range(epochs), desc="pairs", unit="epoch", disable=not progress)
    for epoch in bar:
        clips = draw_clips(train, derive(seed, "pairs"), epoch)
        for start in range(0, len(clips.captions) - 1, batch_size):
            batch = clips.take(range(start, min(start + batch_size, len(clips.captions))))
            if len(batch.captions) < 2:
                continue
            loss = _pair_loss(evaluator, batch, vectors, train.lengths.max_frames, margin, shifts)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 0.5)
            optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def _pair_loss(
    evaluator: MotionEvaluator, clips: Clips, vectors: WordVectors, frames: int, margin: float, shifts: torch.Generator
) -> Tensor:
    device = evaluator.motion_encoder.hidden.device
    words, classes, lengths = stack_captions(clips.captions, vectors)
    padded = torch.zeros(len(words), frames, evaluator.sizes.feature_dim)
    for i, features in enumerate(clips.features):
        padded[i, : len(features)] = features
    texts = evaluator.embed_texts(words.to(device), classes.to(device), lengths)
    motions = evaluator.embed_motions(padded.to(device), torch.tensor(clips.lengths))
    count = len(words)
    shift = int(torch.randint(1, count, (), generator=shifts))  # never 0, which would push a pair apart
    others = [(i + shift) % count for i in range(count)]
    different = [clips.captions[i].text != clips.captions[other].text for i, other in enumerate(others)]
    return contrastive_loss(
        texts, motions, torch.tensor(others, device=device), torch.tensor(different, device=device), margin
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m genssm.metrics.motion_evaluator_training",
        description="Train an evaluator of motions and captions on a data set of one's own. With it "
        "python -m genssm.metrics.motion compares models with each other; its numbers are not those of published "
        "tables.",
        epilog="example: python -m genssm.metrics.motion_evaluator_training --data data/cmu --out own.safetensors",
    )
    parser.add_argument("--data", required=True, help="folder of the data set (HumanML3D's layout, or recordings)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors", help="file to write")
    parser.add_argument("--split", default="train", help="part to train on (default: %(default)s)")
    parser.add_argument("--test-split", default="test", help="part to measure on (default: %(default)s)")
    parser.add_argument("--glove", help="folder of GloVe vectors (our_vab_*); default: a fixed random vector per word")
    parser.add_argument("--autoencoder-epochs", type=int, default=50, help="passes, first stage (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=300, help="passes, second stage (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=512, help="of the networks; published: 512 (default)")
    parser.add_argument("--max-frames", type=int, default=196, help="longest clip or window (default: %(default)s)")
    parser.add_argument("--min-frames", type=int, default=40, help="shortest clip (default: %(default)s)")
    parser.add_argument("--longer", choices=["leave_out", "window"], default="window", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and crops (default: %(default)s)")
    parser.add_argument("--device", type=device_option, help="cpu, cuda, ...; default: cuda where there is one")
    args = parser.parse_args(arguments)
    lengths = Lengths(min_frames=args.min_frames, max_frames=args.max_frames, longer=args.longer)
    train = build_motion_dataset(args.data, args.split, lengths=lengths)
    test = build_motion_dataset(args.data, args.test_split, lengths=lengths, statistics=train.statistics)
    vectors = WordVectors.load(args.glove) if args.glove else WordVectors.hashed()
    width = args.width
    evaluator, top1 = train_evaluator(
        train,
        test,
        vectors,
        sizes=EvaluatorSizes(
            movement_hidden=width, movement_dim=width, motion_hidden=2 * width, text_hidden=width, embedding_dim=width
        ),
        autoencoder_epochs=args.autoencoder_epochs,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        progress=True,
    )
    info = EvaluatorInfo(
        name=args.out.stem,
        published=False,
        word_vectors="glove" if args.glove else "hashed",
        data_set=str(args.data),
        seed=args.seed,
        epochs=args.epochs,
        top1=top1,
    )
    save_evaluator(args.out, evaluator, info)
    print(f"evaluator of {len(train)} clips: R-precision {top1:.3f} at k=1 on {len(test)} test clips -> {args.out}")


if __name__ == "__main__":
    cli(main)
