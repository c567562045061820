"""Stored latents: every layout gives back the same latents; declarations are checked; the encoder."""

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.numpy import save_file

from genssm.config import DataConfig, LatentsConfig
from genssm.data import blocks, build_dataset
from genssm.data import encode as encoder
from genssm.data.blocks import fill_folder, verify
from genssm.data.encode import encode_dataset
from genssm.data.latents import check_vae, encode_images, load_vae
from genssm.data.layouts import LAYOUTS

ROOT = Path(__file__).resolve().parents[2]
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1])
SCALE = 0.18215


def latents() -> np.ndarray:
    """Eight latents as a model sees them."""
    return np.random.default_rng(0).standard_normal((8, 4, 6, 6)).astype(np.float32)


def moments(spread: float) -> np.ndarray:
    return np.concatenate([latents() / SCALE, np.full((8, 4, 6, 6), spread, np.float32)], 1)


def own(root: Path) -> None:
    np.save(root / "latents.npy", latents() / SCALE)
    np.save(root / "labels.npy", LABELS)
    meta = {"form": "sample", "scaled": False, "scale": SCALE, "shift": 0.0, "flip_rows": False}
    (root / "meta.json").write_text(json.dumps(meta))


def uvit(root: Path) -> None:
    for i, (z, label) in enumerate(zip(moments(-60.0), LABELS)):
        with (root / f"{i}.npy.npz").open("wb") as file:
            np.savez(file, z=z, label=label)


def pairs(root: Path) -> None:
    for kind in ("features", "labels"):
        (root / f"imagenet256_{kind}").mkdir()
    for i, (z, label) in enumerate(zip(latents(), LABELS)):
        np.save(root / "imagenet256_features" / f"{i:09d}.npy", z[None])
        np.save(root / "imagenet256_labels" / f"{i:09d}.npy", np.array([label]))


def memmap(root: Path) -> None:
    np.concatenate([latents(), latents()[..., ::-1]]).tofile(root / "imagenet256_feature_flip.dat")
    np.concatenate([LABELS, LABELS]).astype(np.int64).tofile(root / "imagenet256_label_flip.dat")


def shards(root: Path) -> None:
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for i in range(4 * shard, 4 * shard + 4):
                stream = io.BytesIO()
                np.save(stream, latents()[i] / np.float32(SCALE))
                fields = {"img_feature256.npy": stream.getvalue(), "cls_id.cls": str(LABELS[i]).encode()}
                for name, data in fields.items():
                    member = tarfile.TarInfo(f"{i:06d}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def edm_zip(root: Path) -> None:
    shift = np.array([5.81, 3.25, 0.12, -2.15], np.float32)[:, None, None]
    deviation = np.array([4.17, 4.62, 3.71, 3.28], np.float32)[:, None, None]
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(8)]
        for name, z in zip(names, latents()):
            stream = io.BytesIO()
            np.save(stream, np.concatenate([2 * z * deviation + shift, np.zeros_like(z)]))
            archive.writestr(name, stream.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [[n, int(v)] for n, v in zip(names, LABELS)]}))


def one_npz(root: Path) -> None:
    np.savez(root / "a.npz", latents=latents(), labels=LABELS)


def one_safetensors(root: Path) -> None:
    save_file({"latents": latents(), "labels": LABELS}, root / "a.safetensors")


def nested(root: Path) -> None:
    for i, (z, label) in enumerate(zip(latents(), LABELS)):
        (root / f"{i}").mkdir()
        np.save(root / f"{i}" / f"n{label}_{i}.npy", z)


CASES = {
    own: ("", {}), uvit: ("", {}), pairs: ("", {}), memmap: ("", {}), shards: ("", {}), edm_zip: ("a.zip", {}),
    one_npz: ("a.npz", {"form": "sample", "scaled": True}),
    one_safetensors: ("a.safetensors", {"form": "sample", "scaled": True}),
    nested: ("", {"form": "sample", "scaled": True}),
}  # fmt: skip


@pytest.mark.parametrize("make", CASES)
def test_layouts_agree(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    file, declared = CASES[make]
    dataset = build_dataset(name="latents", path=str(tmp_path / file), latents=LatentsConfig(**declared))
    assert len(dataset) == 8 and dataset.item_shape == (4, 6, 6) and dataset.num_classes == 3
    expected = torch.from_numpy(latents())
    for reader in (dataset, dataset.in_memory()):
        for i in range(8):
            for item in (reader[i], reader.item(i, 12)):
                torch.testing.assert_close(item["latents"], expected[i], rtol=0, atol=1e-5)
                assert item["class_labels"] == LABELS[i]


def test_all_layouts_are_tested() -> None:
    assert len(LAYOUTS) == len(CASES) - 1  # an archive is npz or safetensors


@pytest.mark.parametrize(("form", "spread"), [("mean_logvar", 2 * np.log(2.0)), ("mean_std", 2.0)])
def test_draws_from_moments(tmp_path: Path, form: str, spread: float) -> None:
    np.savez(tmp_path / "a.npz", latents=moments(spread), labels=LABELS)
    config = LatentsConfig(form=form, scaled=False, scale=[SCALE])
    dataset = build_dataset(name="latents", path=str(tmp_path / "a.npz"), latents=config)
    torch.testing.assert_close(dataset[3]["latents"], torch.from_numpy(latents()[3]), rtol=0, atol=1e-5)
    draws = torch.stack([dataset.item(3, k)["latents"] for k in range(400)]) - dataset[3]["latents"]
    assert abs(draws.std().item() - 2 * SCALE) < 0.01 and abs(draws.mean().item()) < 0.01
    assert torch.equal(dataset.item(3, 7)["latents"], dataset.item(3, 7)["latents"])


def test_mirrored_rows(tmp_path: Path) -> None:
    memmap(tmp_path)
    dataset = build_dataset(name="latents", path=str(tmp_path), flip=True)
    assert torch.equal(dataset.item(2, 1)["latents"], dataset.item(2, 2)["latents"].flip(-1))
    with pytest.raises(ValueError, match="encode with --flip"):
        build_dataset(name="latents", path=str(tmp_path), flip=True, latents=LatentsConfig(flip_rows=False))
    with pytest.raises(ValueError, match="flip_rows"):
        build_dataset(name="latents", path=str(tmp_path), latents=LatentsConfig(flip_rows=False))


def test_scale_and_shift_per_channel(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", latents=latents())
    config = LatentsConfig(form="sample", scaled=False, scale=[1, 2, 3, 4], shift=[0, 0, 0, 1])
    dataset = build_dataset(name="latents", path=str(tmp_path / "a.npz"), latents=config)
    expected = (latents()[1] - np.array([0, 0, 0, 1])[:, None, None]) * np.array([1, 2, 3, 4])[:, None, None]
    torch.testing.assert_close(dataset[1]["latents"].double(), torch.from_numpy(expected))
    assert "class_labels" not in dataset[1]


def test_wrong_declaration_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "a.npz", latents=latents() / SCALE)
    logging.getLogger("genssm").propagate = True
    build_dataset(name="latents", path=str(tmp_path / "a.npz"), latents=LatentsConfig(form="sample", scaled=True))
    assert "deviation of 5." in caplog.text
    caplog.clear()
    config = LatentsConfig(form="sample", scaled=False, scale=[SCALE])
    build_dataset(name="latents", path=str(tmp_path / "a.npz"), latents=config)
    assert not caplog.text


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ValueError, r"data\.latents\.form and data\.latents\.scaled"),
        ({"form": "sample", "scaled": False}, ValueError, r"data\.latents\.scale$"),
        ({"layout": "zip"}, ValueError, "expected auto, own"),
        ({"layout": "memmap"}, FileNotFoundError, "no latents of layout memmap"),
    ],
)
def test_errors(tmp_path: Path, config: dict, error: type[Exception], message: str) -> None:
    np.savez(tmp_path / "a.npz", latents=latents())
    with pytest.raises(error, match=message):
        build_dataset(name="latents", path=str(tmp_path / "a.npz"), latents=LatentsConfig(**config))


@pytest.mark.parametrize(
    "keys",
    [{"name": "latents", "path": ".", "resolution": 8}, {"name": "digits", "latents": LatentsConfig(form="sample")}],
)
def test_keys_of_the_other_kind_are_refused(keys: dict) -> None:
    with pytest.raises(ValueError, match="means nothing"):
        build_dataset(**keys)


def test_odd_moments(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", latents=latents()[:, :3])
    with pytest.raises(ValueError, match="two halves"):
        build_dataset(name="latents", path=str(tmp_path / "a.npz"), latents=LatentsConfig(form="mean_std", scaled=True))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4, latent_channels=4,
        scaling_factor=0.5, shift_factor=0.25,
    ).save_pretrained(folder)  # fmt: skip
    return folder


DIGITS = DataConfig(name="digits", split="test", resolution=8)


def test_encode_and_read_back(tmp_path: Path, vae_folder: Path) -> None:
    out = encode_dataset(
        DIGITS, str(vae_folder), tmp_path / "a", flip=True, dtype="float32", batch_size=100, quiet=True
    )
    dataset = build_dataset(name="latents", path=str(out), flip=True)
    images, vae = build_dataset(name="digits", split="test", channels=3), load_vae(vae_folder)
    assert len(dataset) == len(images) == 355 and dataset.class_names == images.class_names
    check_vae(dataset, vae)
    pixels = images[11]["pixel_values"][None]
    torch.testing.assert_close(dataset[11]["latents"], encode_images(vae, pixels)[0], rtol=0, atol=1e-5)
    mirrored = encode_images(vae, pixels.flip(-1), torch.zeros(1, *dataset.item_shape))[0]
    drawn = torch.stack([dataset.item(11, 2 * k + 1)["latents"] for k in range(200)])
    assert (drawn.mean(0) - mirrored).abs().max() < 5 * drawn.std(0).max() / 200**0.5
    assert dataset[11]["class_labels"] == images[11]["class_labels"]
    vae.register_to_config(scaling_factor=0.1)
    with pytest.raises(ValueError, match=r"VAE has 0\.1"):
        check_vae(dataset, vae)
    with pytest.raises(FileExistsError, match="--out"):
        encode_dataset(DIGITS, str(vae_folder), out)


def test_captions_travel_with_the_latents(tmp_path: Path, vae_folder: Path) -> None:
    """The mirrored copy of a picture is left alone where the caption drawn names a side."""
    texts = [["looks left", "a face"], ["a dot"]]
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(texts)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = DataConfig(name="image_folder", path=str(tmp_path), caption="text")
    out = encode_dataset(data, str(vae_folder), tmp_path / "out", form="sample", flip=True, quiet=True)
    stored = build_dataset(name="latents", path=str(out), flip=True)
    assert [stored[i]["text"] for i in (0, 1)] == ["looks left", "a dot"]
    seen = set()
    for key in range(64):
        item = stored.item(0, key)
        mirrored = key % 2 == 1 and item["text"] == "a face"
        expected = stored.store.read(2 if mirrored else 0).astype(np.float32)
        np.testing.assert_allclose(item["latents"], (expected - stored.shift) * stored.scale)
        seen.add((item["text"], mirrored))
    assert len(seen) == 3
    (out / "captions.json").write_text(json.dumps(texts[:1]))
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if key != "blocks"}))
    with pytest.raises(ValueError, match="2 latents but captions of 1"):
        build_dataset(name="latents", path=str(out))


def test_encoding_goes_on_where_it_was_stopped(
    tmp_path: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 100)
    whole = encode_dataset(DIGITS, str(vae_folder), tmp_path / "whole", form="sample", batch_size=50, quiet=True)
    encoded, real = [], encoder._encode

    def stops_at_200(vae: object, dataset: object, start: int, stop: int, *rest: object) -> np.ndarray:
        if start == 200 and 0 in encoded:
            raise KeyboardInterrupt
        encoded.append(start)
        return real(vae, dataset, start, stop, *rest)

    monkeypatch.setattr(encoder, "_encode", stops_at_200)
    options = {"form": "sample", "batch_size": 50, "quiet": True}
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(DIGITS, str(vae_folder), tmp_path / "part", **options)
    assert not (tmp_path / "part").exists()
    with pytest.raises(ValueError, match="other settings"):
        encode_dataset(DIGITS, str(vae_folder), tmp_path / "part", flip=True, **options)
    encoded.clear()
    part = encode_dataset(DIGITS, str(vae_folder), tmp_path / "part", **options)
    assert encoded[0] == 200
    assert np.array_equal(np.load(part / "latents.npy"), np.load(whole / "latents.npy"))
    assert not (tmp_path / "part.partial").exists()
    assert sorted(f.name for f in part.iterdir()) == ["labels.npy", "latents.npy", "meta.json"]
    assert verify(part) == 4


def test_damage_is_found(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((600, 3)).astype(np.float32)
    out = fill_folder(
        tmp_path / "a", "x.npy", {"kind": "test"}, lambda a, b: values[a:b], shape=(600, 3), dtype="f4",
        beside={"names.json": ["a", "b"], "labels.npy": np.arange(600)},
    )  # fmt: skip
    assert np.array_equal(np.load(out / "x.npy"), values) and verify(out) == 3
    assert json.loads((out / "names.json").read_text()) == ["a", "b"] and len(np.load(out / "labels.npy")) == 600
    stored = np.load(out / "x.npy", mmap_mode="r+")
    stored[300, 1] += 1
    stored.flush()
    with pytest.raises(ValueError, match=r"x\.npy is damaged in the rows 256\.\.511; encode it again"):
        verify(out)
    file = out / "x.npy"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"x\.npy cannot be read"):
        verify(out)
    with pytest.raises(FileNotFoundError, match=r"no meta\.json with checksums"):
        verify(tmp_path)
    (out / "names.json").write_text('["a", "c"]')
    with pytest.raises(ValueError, match=r"names\.json is damaged, .*; encode it again"):
        verify(out)
    (out / "names.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"names\.json is missing; encode it again"):
        verify(out)
    (out / "meta.json").write_bytes((out / "meta.json").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"meta\.json is damaged \("):
        verify(out)


@pytest.mark.parametrize("kind", ["latents", "codes"])
def test_damaged_folders_are_named_when_they_are_opened(kind: str, tmp_path: Path) -> None:
    """The array where it cannot be mapped, and every small file beside it; rows are the matter of ``verify``."""
    meta = {
        "latents": {"form": "sample", "scaled": True, "scale": 1.0, "shift": 0.0, "flip_rows": False},
        "codes": {"class_names": [], "grid": [2, 2], "num_codes": 9},
    }[kind]
    shape = {"latents": (6, 4, 2, 2), "codes": (6, 1, 4)}[kind]
    values = np.random.default_rng(0).integers(0, 9, shape)
    out = fill_folder(
        tmp_path / "a", f"{kind}.npy", meta, lambda a, b: values[a:b], shape=shape, dtype="i4",
        beside={"captions.json": [["a"]] * 6}, quiet=True,
    )  # fmt: skip
    assert len(build_dataset(name=kind, path=str(out))) == 6
    for name in (f"{kind}.npy", "meta.json", "captions.json"):
        whole = (out / name).read_bytes()
        for data in (whole[: len(whole) // 2], b"\x00junk", b"[1]"):
            (out / name).write_bytes(data)
            with pytest.raises(ValueError, match=rf"{name} (is damaged|cannot be read).*encode it again"):
                build_dataset(name=kind, path=str(out))
        (out / name).write_bytes(whole)
    (out / "captions.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"captions\.json is missing; encode it again"):
        build_dataset(name=kind, path=str(out))
    (out / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"meta\.json lacks .*encode it again"):
        build_dataset(name=kind, path=str(out))


def test_captions_of_another_shape_are_refused(tmp_path: Path) -> None:
    """In a folder without checksums, made by hand."""
    np.save(tmp_path / "codes.npy", np.zeros((2, 1, 4), np.int32))
    (tmp_path / "meta.json").write_text('{"class_names": [], "grid": [2, 2], "num_codes": 9}')
    for text, message in (("{}", "list, got a dict"), ("[1, 2]", "item 0: expected a caption"), ("[[], []]", "item 0")):
        (tmp_path / "captions.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            build_dataset(name="codes", path=str(tmp_path))


def test_folder_killed_at_its_very_end_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the notes of the blocks were taken away: the same command makes the folder, other data do not."""
    arguments = {"shape": (5, 2), "dtype": "f4", "quiet": True}
    values = np.arange(10.0).reshape(5, 2)

    def fill(labels: list[int], **more: int) -> Path:
        return fill_folder(
            tmp_path / "a", "x.npy", {}, lambda a, b: values[a:b], beside={"labels.json": labels}, **arguments, **more
        )

    with monkeypatch.context() as patch:
        patch.setattr(blocks.Path, "unlink", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fill([1, 2])
    assert not (tmp_path / "a.partial" / "blocks").exists()
    with pytest.raises(ValueError, match="begun with other settings or data"):
        fill([1, 3])
    assert verify(fill([1, 2])) == 1
    with pytest.raises(FileExistsError, match="choose another --out"):
        fill([1, 2])
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ValueError, match="--batch-size is 0"):
        fill([1, 2], batch_size=0)


@pytest.mark.slow
def test_processes_share_the_encoding(tmp_path: Path, vae_folder: Path) -> None:
    """Two processes, one of them killed on the way, then two again: the file of one process."""
    one = encode_dataset(DIGITS, str(vae_folder), tmp_path / "one", form="sample", batch_size=16, quiet=True)
    options = ["--vae", vae_folder, "--out", tmp_path / "many", "--form", "sample", "--batch-size", 16, "--quiet",
               "--device", "cpu", "name=digits", "split=test", "resolution=8"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}

    def launch(processes: int, *program: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return subprocess.run(
            [*command, *program, *map(str, options)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    killer = tmp_path / "killed.py"
    killer.write_text(
        "import os, signal, sys\nfrom genssm.data import encode\nreal = encode._encode\n"
        "def deadly(vae, dataset, start, *rest):\n"
        "    start >= 32 and os.environ['RANK'] == '0' and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(vae, dataset, start, *rest)\n"
        "encode._encode = deadly\nencode.main()\n"
    )
    assert launch(2, str(killer)).returncode != 0
    assert (tmp_path / "many.partial").is_dir() and not (tmp_path / "many").exists()
    done = launch(2, "-m", "genssm.data.encode")
    assert done.returncode == 0, done.stderr[-3000:]
    assert verify(tmp_path / "many") == 2
    stored = (np.load(folder / "latents.npy") for folder in (one, tmp_path / "many"))
    np.testing.assert_allclose(*stored, atol=1e-3)


def test_tiny_vae_has_no_moments(tmp_path: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "vae" / "vae")  # fmt: skip
    with pytest.raises(ValueError, match="--form sample"):
        encode_dataset(DIGITS, str(tmp_path / "vae"), tmp_path / "a", quiet=True)
    out = encode_dataset(DIGITS, str(tmp_path / "vae"), tmp_path / "a", form="sample", quiet=True)
    assert build_dataset(name="latents", path=str(out)).item_shape == (4, 4, 4)


def test_no_vae(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_vae(tmp_path)
