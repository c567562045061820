"""A tokenizer learned from the captions of a data set: byte-level BPE, small, complete, saved as one JSON file."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

PAD, START = 0, 1  # the tokens of the backend follow: no text can spell these two
SPECIAL = 2
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("tokenizers of captions need the package tokenizers; pip install genssm[text]") from None
    return tokenizers


class CaptionTokenizer:
    """Texts to token numbers: byte-level BPE (Sennrich et al. 2016) in lower case, no unknown words.

    Every text begins with a start token, so that the empty text has one token too. Words that are frequent among the
    captions become one token each; any other text is spelled with shorter pieces, down to bytes.

    Args:
        backend: a ``tokenizers.Tokenizer``; its token n is number n + 2, after padding (0) and start (1).
        model_max_length: tokens of a padded text, the start token among them; longer texts are cut.

    Raises:
        ValueError: ``model_max_length`` is below 1.
    """

    def __init__(self, backend: Any, model_max_length: int) -> None:
        if model_max_length < 1:
            raise ValueError(f"model_max_length is {model_max_length}; expected at least 1, the start token")
        self.backend, self.model_max_length = backend, model_max_length

    @classmethod
    def learn(cls, captions: Iterable[str], vocab_size: int = 4096, max_length: int = 32) -> "CaptionTokenizer":
        """Learn the tokens from captions; the same captions in the same order give the same tokens.

        Args:
            captions: the texts.
            vocab_size: most tokens to keep; at least 258, all bytes and two special ones.
            max_length: ``model_max_length`` of the result.

        Raises:
            ImportError: the package tokenizers is missing.
            ValueError: ``vocab_size`` leaves no room for all bytes.
        """
        if vocab_size < 258:
            raise ValueError(f"vocab_size is {vocab_size}; 256 bytes and two special tokens need at least 258")
        library = _tokenizers()
        backend = library.Tokenizer(library.models.BPE())
        rules = library.normalizers
        spaces, quotes = rules.Replace(library.Regex(r"\s+"), " "), rules.Replace("\u2019", "'")
        backend.normalizer = rules.Sequence([rules.NFKC(), rules.Lowercase(), quotes, spaces, rules.Strip()])
        backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - SPECIAL,
            min_frequency=2,
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(captions, trainer)
        return cls(backend, max_length)

    def __len__(self) -> int:
        return self.backend.get_vocab_size() + SPECIAL

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token numbers of texts, padded to ``model_max_length``.

        Args:
            texts: B texts.

        Returns:
            Numbers (B, S) int64 and a mask (B, S) bool, True where a token counts.
        """
        ids = torch.zeros(len(texts), self.model_max_length, dtype=torch.int64)
        mask = torch.zeros(len(texts), self.model_max_length, dtype=torch.bool)
        for row, encoding in enumerate(self.backend.encode_batch(list(texts))):
            tokens = [START, *(number + SPECIAL for number in encoding.ids)][: self.model_max_length]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token numbers, special ones left out."""
        return self.backend.decode([int(i) - SPECIAL for i in ids if i >= SPECIAL]).strip()

    def save_pretrained(self, save_directory: str | Path, **_: object) -> None:
        """Write the tokenizer into a folder; further arguments of diffusers' pipelines concern weights."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / _FILE))
        config = {"tokenizer_class": type(self).__name__, "model_max_length": self.model_max_length}
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: object) -> "CaptionTokenizer":
        """Read a saved tokenizer.

        Raises:
            FileNotFoundError: the folder holds none.
            ValueError: it is a tokenizer of another library.
            ImportError: the package tokenizers is missing.
        """
        folder = Path(folder)
        missing = [name for name in (_FILE, _CONFIG) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} holds no tokenizer: {' and '.join(missing)} missing")
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if config.get("tokenizer_class") != cls.__name__:
            raise ValueError(f"{folder} holds a {config.get('tokenizer_class')}; expected a {cls.__name__}")
        return cls(_tokenizers().Tokenizer.from_file(str(folder / _FILE)), config["model_max_length"])
