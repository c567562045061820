"""Codes: encoded once, read back in both layouts, views; the tokenizer is found in folders, pipelines and runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from genssm.config import DataConfig
from genssm.data import blocks, build_dataset, cache_dataset
from genssm.data.codes import load_tokenizer
from genssm.data.encode_codes import encode_codes
from genssm.pipelines import ReconstructionPipeline
from tests.models.test_vq import make_tokenizer

DIGITS = DataConfig(name="digits", resolution=8, channels=1, split="test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


def test_codes_are_those_of_the_tokenizer(tokenizer: Path, tmp_path: Path) -> None:
    out = encode_codes(DIGITS, str(tokenizer), tmp_path / "codes", flip=True, quiet=True)
    images, model = build_dataset(DIGITS), load_tokenizer(tokenizer)
    plain = build_dataset(name="codes", path=str(out))
    flipped = build_dataset(name="codes", path=str(out), flip=True)
    assert len(plain) == len(images) and plain.num_classes == 10 and plain.class_names == images.class_names
    assert plain.grid == (4, 4) and plain.item_shape == (16,) and plain.num_codes == 32
    for index in (0, 100):
        pixels = images[index]["pixel_values"][None]
        with torch.no_grad():
            views = [model.tokenize(pixels)[0], model.tokenize(pixels.flip(-1))[0]]
        assert torch.equal(plain[index]["codes"], views[0]) and plain[index]["codes"].dtype == torch.int64
        assert torch.equal(plain.item(index, 7)["codes"], views[0])
        for key in (6, 7):
            assert torch.equal(flipped.item(index, key)["codes"], views[key % 2])
        assert plain[index]["class_labels"] == images[index]["class_labels"]
    indices, keys = np.array([3, 100, 3]), np.array([2**63 + 1, 6, 5], np.uint64)
    for dataset in (plain, flipped):
        kept = cache_dataset(dataset, "ram", "cpu").batch(indices, keys)
        items = [dataset.item(int(i), int(key)) for i, key in zip(indices, keys)]
        assert torch.equal(kept["codes"], torch.stack([item["codes"] for item in items]))
        assert kept["class_labels"].tolist() == [item["class_labels"] for item in items]


def test_captions_are_kept(tokenizer: Path, tmp_path: Path) -> None:
    """Beside the codes; a caption that names a side keeps its image from being mirrored, in memory or not."""
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    for i, text in enumerate((["left hand", "hand"], ["star"], ["facing right"])):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    data = DataConfig(name="image_folder", path=str(tmp_path), caption="text", label="none", resolution=8)
    out = encode_codes(data, str(tokenizer), tmp_path / "codes", flip=True, quiet=True)
    dataset, plain = (build_dataset(name="codes", path=str(out), flip=flip) for flip in (True, False))
    assert dataset.captions == (("left hand", "hand"), ("star",), ("facing right",))
    assert plain[0]["text"] == "left hand" and "class_labels" not in plain[0]
    mirrored, texts = set(), set()
    for index, key in [(i, k) for i in range(3) for k in range(40)]:
        item = dataset.item(index, key)
        view = int(torch.equal(item["codes"], torch.from_numpy(dataset.store.read(index)[1].astype(np.int64))))
        assert view == (key % 2 if item["text"] in ("hand", "star") else 0)
        mirrored |= {item["text"]} if view else set()
        texts.add(item["text"])
    assert mirrored == {"hand", "star"} and len(texts) == 4
    indices, keys = np.repeat(np.arange(3), 40), np.tile(np.arange(40, dtype=np.uint64), 3)
    kept = cache_dataset(dataset, "ram", "cpu").batch(indices, keys)
    items = [dataset.item(int(i), int(key)) for i, key in zip(indices, keys)]
    assert kept["text"] == [item["text"] for item in items]
    assert torch.equal(kept["codes"], torch.stack([item["codes"] for item in items]))
    (out / "captions.json").write_text('[["a"]]')
    with pytest.raises(ValueError, match=r"captions\.json is damaged, or was changed"):
        build_dataset(name="codes", path=str(out))
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if key != "blocks"}))
    with pytest.raises(ValueError, match="3 rows of codes but captions of 1"):
        build_dataset(name="codes", path=str(out))


def test_a_stopped_command_goes_on(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode_codes(DIGITS, str(tokenizer), tmp_path / "whole", quiet=True)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    calls = []

    def break_off(path: Path, value: object) -> None:
        calls.append(path)
        write(path, value)
        if len(calls) == 3:
            raise KeyboardInterrupt

    write = blocks.write_json
    monkeypatch.setattr(blocks, "write_json", break_off)
    with pytest.raises(KeyboardInterrupt):
        encode_codes(DIGITS, str(tokenizer), tmp_path / "part", quiet=True)
    again = encode_codes(DIGITS, str(tokenizer), tmp_path / "part", quiet=True)
    np.testing.assert_array_equal(np.load(again / "codes.npy"), np.load(whole / "codes.npy"))
    assert blocks.verify(again) == 4
    with pytest.raises(FileExistsError):
        encode_codes(DIGITS, str(tokenizer), tmp_path / "part", quiet=True)


def test_published_layout(tmp_path: Path) -> None:
    """``*_codes/<i>.npy`` of shape (1, A, T); with ten crops the second five are mirrored."""
    for kind in ("codes", "labels"):
        (tmp_path / f"imagenet256_{kind}").mkdir()
    for i in range(12):
        codes = 1000 * i + np.arange(10)[None, :, None] + np.zeros((1, 10, 9), np.int64)
        np.save(tmp_path / "imagenet256_codes" / f"{i}.npy", codes)
        np.save(tmp_path / "imagenet256_labels" / f"{i}.npy", np.array([i % 3]))
    plain = build_dataset(name="codes", path=str(tmp_path))
    mirrored = build_dataset(name="codes", path=str(tmp_path), flip=True)
    assert len(plain) == 12 and plain.num_classes == 3 and plain.grid == (3, 3) and plain.num_codes is None
    assert plain[11]["codes"].tolist() == [11000] * 9  # in the order of numbers, not of names
    assert {int(plain.item(0, key)["codes"][0]) for key in range(50)} == set(range(5))
    assert {int(mirrored.item(0, key)["codes"][0]) for key in range(50)} == set(range(10))


def test_a_tokenizer_is_found_where_it_is(tokenizer: Path, tmp_path: Path) -> None:
    ReconstructionPipeline(make_tokenizer()).save_pretrained(tmp_path / "checkpoints" / "step_0000005" / "pipeline")
    for path in (tokenizer, tmp_path, tmp_path / "checkpoints" / "step_0000005"):
        assert not load_tokenizer(path).training
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "nowhere")
    (tokenizer.parent / "other").mkdir(exist_ok=True)
    (tokenizer.parent / "other" / "config.json").write_text('{"_class_name": "AiM"}')
    with pytest.raises(ValueError, match="holds a AiM; expected a VQTokenizer"):
        load_tokenizer(tokenizer.parent / "other")


def test_errors(tokenizer: Path, tmp_path: Path) -> None:
    out = encode_codes(DIGITS, str(tokenizer), tmp_path / "codes", quiet=True)
    with pytest.raises(ValueError, match="needs mirrored views"):
        build_dataset(name="codes", path=str(out), flip=True)
    with pytest.raises(ValueError, match=r"data.resolution means nothing to data.name=codes"):
        build_dataset(name="codes", path=str(out), resolution=8)
    with pytest.raises(FileNotFoundError, match="encode_codes makes them"):
        build_dataset(name="codes", path=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="holds no codes"):
        build_dataset(name="codes", path=str(tokenizer))
    with pytest.raises(ValueError, match="holds no images"):
        encode_codes(DataConfig(name="codes", path=str(out)), str(tokenizer), tmp_path / "x", quiet=True)
