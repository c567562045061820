"""The evaluator of text-to-motion: three networks that put a motion and its caption near each other.

Published numbers are distances in the features of one published file (Guo et al. 2022, ``text_mot_match``);
:func:`load_published` reads it where a user has it. Without it :mod:`genssm.metrics.motion_evaluator_training` trains
one of these networks on the user's own data, and results are then called "not comparable".
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from genssm.motion import FeatureStatistics

METADATA_KEY = "genssm_motion_evaluator"  # one key, because safetensors writes several in random order
CONTACTS = 4  # last columns of the features, which the evaluator does not see
UNIT_LENGTH = 4  # frames of one movement token
SLOPE = 0.2
PARTS = ("movement_encoder", "motion_encoder", "text_encoder")

# B clips, T frames, W words, M = T / 4 movement tokens


class MovementEncoder(nn.Module):
    """Two convolutions that turn each 4 frames into a token."""

    def __init__(self, in_channels: int, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv1d(in_channels, hidden_size, 4, stride=2, padding=1),
            nn.Dropout(0.2),
            nn.LeakyReLU(SLOPE),
            nn.Conv1d(hidden_size, out_channels, 4, stride=2, padding=1),
            nn.Dropout(0.2),
            nn.LeakyReLU(SLOPE),
        )
        self.out_net = nn.Linear(out_channels, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Features without contacts (B, T, dim - 4) -> tokens (B, M, out_channels)."""
        return self.out_net(self.main(features.transpose(1, 2)).transpose(1, 2))


class SequenceEncoder(nn.Module):
    """A recurrent network in both directions from a learned start; its two last states become the embedding."""

    def __init__(self, in_channels: int, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.input_emb = nn.Linear(in_channels, hidden_size)
        self.hidden = nn.Parameter(torch.randn(2, 1, hidden_size))
        self.gru = nn.GRU(hidden_size, hidden_size, batch_first=True, bidirectional=True)
        self.output_net = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.LeakyReLU(SLOPE),
            nn.Linear(hidden_size, out_channels),
        )

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens (B, L, in_channels), lengths (B,) in tokens -> (B, out_channels)."""
        packed = pack_padded_sequence(
            self.input_emb(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )  # sorts by itself, answers in the order of the batch
        _, last = self.gru(packed, self.hidden.expand(-1, len(tokens), -1).contiguous())  # (2, B, hidden_size)
        return self.output_net(torch.cat([last[0], last[1]], -1))


class TextEncoder(SequenceEncoder):
    """A sequence of word vectors to which a projection of the words' classes is added."""

    def __init__(self, word_dim: int, num_classes: int, hidden_size: int, out_channels: int) -> None:
        super().__init__(word_dim, hidden_size, out_channels)
        self.pos_emb = nn.Linear(num_classes, word_dim)

    def forward(self, words: Tensor, classes: Tensor, lengths: Tensor) -> Tensor:
        """Word vectors (B, W, word_dim), one-hot classes (B, W, num_classes), lengths (B,) -> (B, out_channels)."""
        return super().forward(words + self.pos_emb(classes), lengths)


@dataclass(frozen=True)
class EvaluatorSizes:
    """Widths of the networks; the defaults are the published ones for HumanML3D."""

    feature_dim: int = 263
    movement_hidden: int = 512
    movement_dim: int = 512
    motion_hidden: int = 1024
    text_hidden: int = 512
    word_dim: int = 300
    num_classes: int = 15
    embedding_dim: int = 512

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> "EvaluatorSizes":
        """Widths read off weights under the published names."""
        movement, motion, text = PARTS
        return cls(
            feature_dim=weights[f"{movement}.main.0.weight"].shape[1] + CONTACTS,
            movement_hidden=weights[f"{movement}.main.0.weight"].shape[0],
            movement_dim=weights[f"{movement}.out_net.weight"].shape[0],
            motion_hidden=weights[f"{motion}.input_emb.weight"].shape[0],
            text_hidden=weights[f"{text}.input_emb.weight"].shape[0],
            word_dim=weights[f"{text}.pos_emb.weight"].shape[0],
            num_classes=weights[f"{text}.pos_emb.weight"].shape[1],
            embedding_dim=weights[f"{motion}.output_net.3.weight"].shape[0],
        )


class MotionEvaluator(nn.Module):
    """Embeddings of motions and captions.

    Args:
        sizes: widths.
        statistics: of the evaluator's own space; features reach :meth:`embed_motions` *not* normalised, so that the
            model's statistics and the evaluator's cannot be mixed up. None stands for mean 0 and deviation 1.
    """

    def __init__(self, sizes: EvaluatorSizes | None = None, statistics: FeatureStatistics | None = None) -> None:
        super().__init__()
        self.sizes = sizes = sizes or EvaluatorSizes()
        dim = sizes.feature_dim
        self.statistics = statistics or FeatureStatistics(torch.zeros(dim), torch.ones(dim))
        if len(self.statistics.mean) != dim:
            raise ValueError(f"the evaluator reads {dim} features, its statistics have {len(self.statistics.mean)}")
        self.movement_encoder = MovementEncoder(dim - CONTACTS, sizes.movement_hidden, sizes.movement_dim)
        self.motion_encoder = SequenceEncoder(sizes.movement_dim, sizes.motion_hidden, sizes.embedding_dim)
        self.text_encoder = TextEncoder(sizes.word_dim, sizes.num_classes, sizes.text_hidden, sizes.embedding_dim)

    def embed_motions(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings (B, embedding_dim) of motions.

        Args:
            features: (B, T, feature_dim), not normalised, T a multiple of 4; what stands after a length is ignored.
            lengths: valid frames, (B,), at least 4; the rest of a division by 4 is not seen.
        Raises:
            ValueError: shapes or lengths do not fit.
        """
        if features.ndim != 3 or features.shape[-1] != self.sizes.feature_dim or features.shape[1] % UNIT_LENGTH:
            raise ValueError(
                f"features are {tuple(features.shape)}; the evaluator expects (B, T, {self.sizes.feature_dim}), T a "
                f"multiple of {UNIT_LENGTH}"
            )
        if int(lengths.min()) < UNIT_LENGTH or int(lengths.max()) > features.shape[1]:
            raise ValueError(f"lengths are {int(lengths.min())}..{int(lengths.max())}; expected 4..{features.shape[1]}")
        x = self.statistics.normalise(features)
        inside = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
        x = torch.where(inside[..., None], x, 0.0)  # padding is 0 in the evaluator's own space
        return self.embed_normalised(x, lengths)

    def embed_normalised(self, features: Tensor, lengths: Tensor) -> Tensor:
        """:meth:`embed_motions` of features already in the evaluator's space, padded by the caller."""
        return self.motion_encoder(self.movement_encoder(features[..., :-CONTACTS]), lengths // UNIT_LENGTH)

    def embed_texts(self, words: Tensor, classes: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings (B, embedding_dim) of captions, see :class:`genssm.data.motion.words.CaptionVectors`."""
        return self.text_encoder(words, classes, lengths)


@dataclass(frozen=True)
class EvaluatorInfo:
    """Where an evaluator comes from.

    Attributes:
        name: how reports call it.
        published: whether it is the published file, in whose features published numbers are.
        word_vectors: "glove" or "hashed".
        data_set: what it was trained on.
        seed, epochs: of the training; 0 for the published file.
        top1: R-precision of the test clips at k = 1 after the training.
    """

    name: str
    published: bool
    word_vectors: str
    data_set: str
    seed: int = 0
    epochs: int = 0
    top1: float | None = None


_META = {"t2m": "Comp_v6_KLD01", "kit": "Comp_v6_KLD005"}
_PREFIXES = ("checkpoints", "", "deps/t2m", "deps", "t2m")


def published_paths(roots: Sequence[str | Path], name: str) -> list[tuple[Path, Path]]:
    """Places where the published weights and their statistics may be, (weights, folder of mean.npy and std.npy).

    Layouts of text-to-motion (``checkpoints/t2m``), MLD (``deps/t2m/t2m``) and MDM (``t2m`` at the root).
    """
    if name not in _META:
        raise ValueError(f"no published evaluator is called {name!r}; there are {', '.join(_META)}")
    places = [Path(root) / prefix / name for root in roots for prefix in _PREFIXES]
    return [(place / "text_mot_match/model/finest.tar", place / _META[name] / "meta") for place in places]


def load_published(roots: Sequence[str | Path], name: str = "t2m") -> tuple[MotionEvaluator, EvaluatorInfo]:
    """The published evaluator of HumanML3D ("t2m") or KIT-ML ("kit"), in evaluation mode.

    ``finest.tar`` is a torch file in spite of its name and is read with weights only. The statistics are those that
    belong to the evaluator: they differ from the data set's by a factor of 25 in some columns.

    Raises:
        FileNotFoundError: nothing in any layout below the roots; the message lists the first place of each root.
        ValueError: the file holds something else.
    """
    tried = published_paths(roots, name)
    for weights, meta in tried:
        if weights.is_file():
            statistics = FeatureStatistics.load(meta / "mean.npy", meta / "std.npy")
            content = torch.load(weights, map_location="cpu", weights_only=True)
            missing = [part for part in PARTS if part not in content]
            if missing:
                raise ValueError(f"{weights} has no {', '.join(missing)}; it holds {', '.join(sorted(content))}")
            state = {f"{part}.{key}": value for part in PARTS for key, value in content[part].items()}
            return evaluator_of_weights(state, statistics), EvaluatorInfo(f"published {name}", True, "glove", name)
    places = ", ".join(str(weights) for weights, _ in tried[:: len(_PREFIXES)])
    raise FileNotFoundError(f"no published evaluator; looked for {places} and the layouts of MLD and MDM")


def evaluator_of_weights(state: Mapping[str, Tensor], statistics: FeatureStatistics | None = None) -> MotionEvaluator:
    """An evaluator with weights under the published names, in evaluation mode; its widths are read off them."""
    evaluator = MotionEvaluator(EvaluatorSizes.of_weights(state), statistics)
    evaluator.load_state_dict(dict(state))
    return evaluator.eval()


def save_evaluator(path: str | Path, evaluator: MotionEvaluator, info: EvaluatorInfo) -> None:
    """Write weights, statistics and ``info`` to a safetensors file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in evaluator.state_dict().items()}
    state |= {"statistics.mean": evaluator.statistics.mean, "statistics.std": evaluator.statistics.std}
    save_file(state, str(path), metadata={METADATA_KEY: json.dumps(asdict(info), sort_keys=True)})


def load_evaluator(path: str | Path) -> tuple[MotionEvaluator, EvaluatorInfo]:
    """Read what :func:`save_evaluator` wrote; in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no evaluator of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no motion evaluator at {path}; train one: python -m genssm.metrics.motion_evaluator_training --out {path}"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{path} is no motion evaluator of genssm")
    values = json.loads(text)
    info = EvaluatorInfo(**{field.name: values[field.name] for field in fields(EvaluatorInfo)})
    state = load_file(str(path))
    statistics = FeatureStatistics(state.pop("statistics.mean"), state.pop("statistics.std"))
    return evaluator_of_weights(state, statistics), info
