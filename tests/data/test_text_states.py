"""Caches of encoded captions: checksums, a command that goes on, several processes, captions of any length."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genssm.config import DataConfig
from genssm.data import blocks, text_states
from genssm.data.text_states import TextStates, encode_captions
from genssm.text import encode_texts, load_frozen_encoder
from tests.training.test_text import save_frozen

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
DIGITS = DataConfig(name="digits", caption="class")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_frozen(tmp_path_factory.mktemp("encoder") / "t5")


@pytest.fixture(scope="module")
def cache(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode_captions(DIGITS, encoder, tmp_path_factory.mktemp("cache") / "c", dtype="float32", quiet=True)


def test_states_are_those_of_the_encoder(encoder: str, cache: Path) -> None:
    """Up to the last token of each caption, which the mask says; nothing is stored beyond the longest one."""
    tokenizer, model = load_frozen_encoder(encoder)
    texts = ["3", "", "7"]
    with torch.no_grad():
        states, mask = encode_texts(tokenizer, model, texts, "cpu")
    found, kept = TextStates(cache)(texts)
    tokens = found.shape[1]
    assert tokens == int(json.loads((cache / "meta.json").read_text())["shape"][0]) <= mask.shape[1]
    assert torch.equal(kept, mask[:, :tokens]) and not mask[:, tokens:].any()
    torch.testing.assert_close(found[kept], states[:, :tokens][kept])
    assert not found[~kept].any()


@pytest.mark.parametrize("name", ["states.npy", "lengths.npy", "captions.json", "meta.json"])
@pytest.mark.parametrize("damage", ["changed", "cut off"])
def test_damaged_files_are_named(name: str, damage: str, cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cache, tmp_path / "c")
    data = bytearray((folder / name).read_bytes())
    if damage == "changed":
        data[-5 if name != "meta.json" else 0] ^= 1
    (folder / name).write_bytes(data if damage == "changed" else data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name} .*(damaged|cannot be read).*; encode it again"):
        TextStates(folder)


def test_another_encoder_is_refused(encoder: str, cache: Path) -> None:
    states = TextStates(cache)
    tokenizer, model = load_frozen_encoder(encoder)
    states.check_encoder(tokenizer, model, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    with pytest.raises(ValueError, match=r"was made with another encoder \(.*t5\) than text\.encoder"):
        states.check_encoder(tokenizer, model, "cpu")
    with pytest.raises(ValueError, match="holds texts of up to 6 tokens, the run's have 4"):
        states.check_encoder(*load_frozen_encoder(encoder, 4), "cpu")


def test_folder_without_checksums_is_refused(cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cache, tmp_path / "c")
    (folder / "meta.json").write_text('{"format_version": 1}')
    with pytest.raises(FileNotFoundError, match=r"no meta\.json with checksums; .* encode it again"):
        TextStates(folder)


def test_encoding_goes_on_where_it_was_stopped(
    encoder: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    real, encoded = text_states.encode_texts, []

    def stops(tokenizer: object, model: object, texts: list[str], device: str) -> tuple:
        if len(encoded) == 3:  # the width, and two blocks
            raise KeyboardInterrupt
        encoded.append(list(texts))
        return real(tokenizer, model, texts, device)

    options = {"dtype": "float32", "quiet": True, "batch_size": 4}
    monkeypatch.setattr(text_states, "encode_texts", stops)
    with pytest.raises(KeyboardInterrupt):
        encode_captions(DIGITS, encoder, tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()
    encoded.clear()
    whole = encode_captions(DIGITS, encoder, tmp_path / "c", **options)
    assert encoded[1:] == [["7", "8", "9"]]  # of eleven captions, the empty one first
    assert np.array_equal(np.load(whole / "states.npy"), np.load(cache / "states.npy"))
    assert not (tmp_path / "c.partial").exists()
    with pytest.raises(FileExistsError, match="choose another --out"):
        encode_captions(DIGITS, encoder, tmp_path / "c", **options)


@pytest.mark.slow
def test_two_processes_equal_one(encoder: str, cache: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("from genssm.data import blocks, text_states\nblocks.BLOCK = 4\ntext_states.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program),
               "--encoder", encoder, "--out", str(tmp_path / "c"), "--dtype", "float32", "--device", "cpu", "--quiet",
               "name=digits", "caption=class"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("captions of digits in") == 1
    assert len(TextStates(tmp_path / "c").row) == 11
    np.testing.assert_allclose(
        np.load(tmp_path / "c" / "states.npy"), np.load(cache / "states.npy"), rtol=1e-5, atol=1e-5
    )
