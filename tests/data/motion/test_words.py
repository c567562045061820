"""Captions for the evaluator: rule-based tags, padding, word vectors and their files."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from genssm.data.motion.words import CLASSES, WordVectors, pad_tokens, tagged_words


def test_words_are_tagged_by_rules() -> None:
    found = tagged_words("A man is walking forward, then jumps over two chairs and slowly turned left. He runs!")
    assert " ".join(found) == (
        "a/DET man/NOUN is/AUX walk/VERB forward/ADV then/ADV jump/VERB over/ADP two/NUM chair/NOUN and/OTHER "
        "slowly/ADV turn/VERB left/ADV he/PRON run/VERB"
    )
    assert tagged_words("sitting, stopped; dances: stood up") == [
        "sit/VERB",
        "stop/VERB",
        "dance/VERB",
        "stand/VERB",
        "up/ADP",
    ]


def test_padding() -> None:
    padded, length = pad_tokens(["a/DET"] * 30)
    assert len(padded) == length == 22 and padded[0] == "sos/OTHER" and padded[-1] == "eos/OTHER"
    padded, length = pad_tokens(["a/DET"], 3)
    assert padded == ["sos/OTHER", "a/DET", "eos/OTHER", "unk/OTHER", "unk/OTHER"] and length == 3


def test_classes() -> None:
    vectors = WordVectors({"unk": np.zeros(2, np.float32), "walk": np.ones(2, np.float32)}.get, 2)
    found = vectors(["walk/NOUN", "unheard/VERB", "walk/STRANGE"])
    names = [CLASSES[row.argmax()] for row in found.classes]
    assert names[1:4] == ["Act_VIP", "OTHER", "Act_VIP"] and found.length == 5
    assert found.words[1].tolist() == [1, 1] and found.words[2].tolist() == [0, 0]
    with pytest.raises(ValueError, match="unk"):
        WordVectors({}.get, 2)


def test_hashed_vectors_are_fixed() -> None:
    a, b = WordVectors.hashed(300)(["walk/VERB", "run/VERB"]), WordVectors.hashed(300)(["run/VERB"])
    assert np.array_equal(a.words[2], b.words[1]) and not np.array_equal(a.words[1], a.words[2])
    assert 0.8 < a.words[1].std() < 1.2


def test_files(tmp_path: Path) -> None:
    words = ["unk", "walk"]
    np.save(tmp_path / "our_vab_data.npy", np.arange(6.0).reshape(2, 3))
    for name, content in (("words", words), ("idx", {word: i for i, word in enumerate(words)})):
        (tmp_path / f"our_vab_{name}.pkl").write_bytes(pickle.dumps(content))
    assert WordVectors.load(tmp_path)(["walk/VERB"]).words[1].tolist() == [3, 4, 5]
    (tmp_path / "our_vab_idx.pkl").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(ValueError, match="expected plain words"):
        WordVectors.load(tmp_path)
    (tmp_path / "our_vab_words.pkl").unlink()
    with pytest.raises(FileNotFoundError, match=r"our_vab_words\.pkl"):
        WordVectors.load(tmp_path)
