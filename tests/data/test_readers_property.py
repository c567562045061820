"""Readers of damaged files: whatever is cut off or overwritten, the answer is the stored data or a clear error."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from genssm.config import LatentsConfig
from genssm.data import build_dataset
from genssm.errors import USER_ERRORS
from tests.data.test_images import LABELS, idx_bytes, pictures

LATENTS = np.random.default_rng(0).standard_normal((8, 2, 3, 3)).astype(np.float32)
DECLARED = LatentsConfig(form="sample", scaled=True)


def idx(root: Path) -> dict:
    for name, array in (("images-idx3", pictures(1)), ("labels-idx1", LABELS)):
        (root / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array), mtime=0))
    return {"name": "fashion_mnist", "path": str(root), "file": root / "train-images-idx3-ubyte.gz"}


def image_archive(root: Path) -> dict:
    np.savez(root / "a.npz", images=pictures(1), labels=LABELS)
    return {"name": "npz", "path": str(root / "a.npz"), "file": root / "a.npz"}


def image_folder(root: Path) -> dict:
    for i, image in enumerate(pictures(1)):
        Image.fromarray(image).save(root / f"{i}.png")
    return {"name": "image_folder", "path": str(root), "file": root / "3.png"}


def metadata(root: Path) -> dict:
    made = image_folder(root)
    rows = [{"file_name": f"{i}.png", "label": int(label)} for i, label in enumerate(LABELS)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made | {"file": root / "metadata.jsonl"}


def array_file(root: Path) -> dict:
    np.save(root / "latents.npy", LATENTS)
    np.save(root / "labels.npy", LABELS)
    meta = {"form": "sample", "scaled": True, "scale": 1.0, "shift": 0.0, "flip_rows": False}
    (root / "meta.json").write_text(json.dumps(meta))
    return {"name": "latents", "path": str(root), "file": root / "latents.npy"}


def array_meta(root: Path) -> dict:
    return array_file(root) | {"file": root / "meta.json"}


def tensors(root: Path) -> dict:
    save_file({"latents": LATENTS, "labels": LABELS}, root / "a.safetensors")
    return {"name": "latents", "path": str(root / "a.safetensors"), "file": root / "a.safetensors", "latents": DECLARED}


def latent_archive(root: Path) -> dict:
    np.savez(root / "a.npz", latents=LATENTS, labels=LABELS)
    return {"name": "latents", "path": str(root / "a.npz"), "file": root / "a.npz", "latents": DECLARED}


def shard(root: Path) -> dict:
    with tarfile.open(root / "0.tar", "w") as tar:
        for i, z in enumerate(LATENTS):
            stream = io.BytesIO()
            np.save(stream, z)
            member = tarfile.TarInfo(f"{i}.latent.npy")
            member.size = len(stream.getvalue())
            tar.addfile(member, io.BytesIO(stream.getvalue()))
    return {"name": "latents", "path": str(root / "0.tar"), "file": root / "0.tar", "latents": DECLARED}


READERS = [idx, image_archive, image_folder, metadata, array_file, array_meta, tensors, latent_archive, shard]


def read(keys: dict) -> None:
    """Every item of the data set; a user's error at the most."""
    try:
        dataset = build_dataset(**{k: v for k, v in keys.items() if k != "file"})
        for i in range(len(dataset)):
            assert torch.is_tensor(dataset.item(i, 1)[dataset.tensor_name])
    except USER_ERRORS as error:
        assert str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", READERS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_damage(
    make: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    keys = make(root)
    whole = keys["file"].read_bytes()
    where = data.draw(st.integers(0, len(whole) - 1))
    noise = data.draw(st.binary(max_size=12))
    damaged = whole[:where] + noise + (whole[where + len(noise) :] if data.draw(st.booleans()) else b"")
    keys["file"].write_bytes(damaged)
    read(keys)
