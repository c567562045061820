"""Captions as the evaluator reads them: tagged words, their vectors and their classes.

A caption of a data set comes with its words tagged ("walk/VERB"); :func:`tagged_words` tags any other one by rules.
Source of classes, lists and padding: Guo et al. 2022. Only evaluation needs this; models read the plain caption.
"""

import hashlib
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
MAX_WORDS = 20
CLASSES = (
    *("VERB", "NOUN", "DET", "ADP", "NUM", "AUX", "PRON", "ADJ", "ADV", "Loc_VIP", "Body_VIP", "Obj_VIP"),
    *("Act_VIP", "Desc_VIP", "OTHER"),
)
# Words that have a class of their own, whatever their tag; looked up in this order.
VIP = {
    "Loc_VIP": "left right clockwise counterclockwise anticlockwise forward back backward up down straight curve",
    "Body_VIP": "arm chin foot feet face hand mouth leg waist eye knee shoulder thigh",
    "Obj_VIP": "stair dumbbell chair window floor car ball handrail baseball basketball",
    "Act_VIP": "walk run swing pick bring kick put squat throw hop dance jump turn stumble stop sit lift lower raise "
    "wash stand kneel stroll rub bend balance flap jog shuffle lean rotate spin spread climb",
    "Desc_VIP": "slowly carefully fast careful slow quickly happy angry sad happily angrily sadly",
}
_VIP_CLASS = {word: name for name, words in reversed(VIP.items()) for word in words.split()}
_TAGS = {
    "DET": "a an the this that these those his her its their my your each every some any another both all no",
    "ADP": "in on at to from of with by for into onto over under around across through towards toward along behind "
    "beside above below between against off out up down as like near past",
    "AUX": "is are was were be been being am do does did have has had can could will would should may might must",
    "PRON": "he she it they him them himself herself itself themselves who which what someone something one i you we",
    "NUM": "two three four five six seven eight nine ten once twice",
    "OTHER": "and or but while when before after if so not",
    "ADV": "again twice ahead away backwards forwards sideways upright then there together",
}
_TAG_OF = {word: tag for tag, words in reversed(_TAGS.items()) for word in words.split()}
_IRREGULAR_STEMS = {
    "run": "ran",
    "sit": "sat",
    "stand": "stood",
    "throw": "threw thrown",
    "swing": "swung",
    "bend": "bent",
    "bring": "brought",
    "kneel": "knelt",
    "spin": "spun",
    "lean": "leant",
    "fall": "fell",
    "take": "took",
    "go": "went",
    "lie": "lying",
    "foot": "feet",
    "man": "men",
    "woman": "women",
    "during": "during",
    "always": "always",
    "left": "left",
}
_IRREGULAR = {word: stem for stem, words in _IRREGULAR_STEMS.items() for word in words.split()}


class CaptionVectors(NamedTuple):
    """A caption for the evaluator, W places: 22, two more than the words kept.

    Attributes:
        words: (W, dim) float32.
        classes: one-hot rows over :data:`CLASSES`, (W, 15) float32.
        length: words with the start and end mark.
    """

    words: NDArray[np.float32]
    classes: NDArray[np.float32]
    length: int


class WordVectors:
    """Vectors of words and one-hot rows of their classes.

    Args:
        lookup: vector of a word, or None where it has none.
        dim: length of a vector.
        max_words: words kept of a caption.
    """

    def __init__(self, lookup: Callable[[str], Vector | None], dim: int, max_words: int = MAX_WORDS) -> None:
        self.lookup, self.dim, self.max_words = lookup, dim, max_words
        unknown = lookup("unk")
        if unknown is None:
            raise ValueError("the word vectors have none for 'unk', which stands for every unknown word")
        self._unknown = unknown

    @classmethod
    def load(cls, folder: str | Path) -> "WordVectors":
        """GloVe vectors as published with the evaluator: ``our_vab_{data.npy,words.pkl,idx.pkl}`` in ``folder``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a pickle holds more than plain words and numbers.
        """
        paths = [Path(folder) / f"our_vab_{name}" for name in ("data.npy", "words.pkl", "idx.pkl")]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"no word vectors: {path} is missing")
        vectors = np.load(paths[0]).astype(np.float32)
        words, rows = _plain_pickle(paths[1]), _plain_pickle(paths[2])
        known = {word: vectors[rows[word]] for word in words}
        return cls(known.get, vectors.shape[1])

    @classmethod
    def hashed(cls, dim: int = 300) -> "WordVectors":
        """A fixed random vector of unit variance for every word there can be, from the word's SHA-256.

        For an evaluator of one's own where no GloVe file is at hand: words are told apart, nothing else is known.
        """
        return cls(lambda word: _hashed_vector(word, dim), dim)

    def __call__(self, tokens: Sequence[str]) -> CaptionVectors:
        """Vectors of "word/TAG" tokens, cut to ``max_words``, between a start and an end mark, padded to W."""
        padded, length = pad_tokens(tokens, self.max_words)
        words = np.empty((len(padded), self.dim), np.float32)
        classes = np.zeros((len(padded), len(CLASSES)), np.float32)
        for i, token in enumerate(padded):
            words[i], name = self._describe(token)
            classes[i, CLASSES.index(name)] = 1
        return CaptionVectors(words, classes, length)

    def _describe(self, token: str) -> tuple[Vector, str]:
        word, _, tag = token.rpartition("/")
        vector = self.lookup(word)
        if vector is None:
            return self._unknown, "OTHER"
        name = _VIP_CLASS.get(word, tag)
        return vector, name if name in CLASSES else "OTHER"


def pad_tokens(tokens: Sequence[str], max_words: int = MAX_WORDS) -> tuple[list[str], int]:
    """At most ``max_words`` tokens between ``sos`` and ``eos``, filled up with ``unk``; their number before that."""
    kept = ["sos/OTHER", *tokens[:max_words], "eos/OTHER"]
    return kept + ["unk/OTHER"] * (max_words + 2 - len(kept)), len(kept)


def tagged_words(caption: str) -> list[str]:
    """ "a person walks" -> ["a/DET", "person/NOUN", "walk/VERB"], by word lists and endings.

    The tagger behind the published texts is a statistical one; this one needs no download and gets the classes that
    matter (movements, directions, parts of the body) from the same lists.
    """
    words = re.findall(r"[a-z]+", caption.lower().replace("-", ""))
    return [f"{lemma}/{tag}" for lemma, tag in map(_lemma_and_tag, words)]


def _lemma_and_tag(word: str) -> tuple[str, str]:
    if word in _TAG_OF:
        return word, _TAG_OF[word]
    lemma = _lemma(word)
    if lemma in VIP["Act_VIP"].split() or (lemma != word and word.endswith(("ing", "ed"))):
        return lemma, "VERB"
    if word.endswith("ly") or word in VIP["Loc_VIP"].split():
        return word, "ADV"
    return lemma, "NOUN"


def _lemma(word: str) -> str:
    """The word without a regular ending; of several possible stems the one that has a class of its own."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending in ("ing", "ed", "es", "s"):
        stem = word.removesuffix(ending)
        if stem == word or len(stem) < 2 or word.endswith("ss"):
            continue
        stems = [stem, stem + "e", stem[:-1] if stem[-1:] == stem[-2:-1] else stem]
        known = next((candidate for candidate in stems if candidate in _VIP_CLASS), None)
        if known:
            return known
        if ending != "es":
            return stem
    return word


def _hashed_vector(word: str, dim: int) -> Vector:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> object:
        raise ValueError(f"the pickle names {module}.{name}; expected plain words and numbers")


def _plain_pickle(path: Path) -> object:
    with path.open("rb") as file:
        return _PlainUnpickler(file).load()
