"""torch-fidelity's Inception, DINOv2 and CLIP from local files with stand-in weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.metrics.distances import inception_score, precision_recall
from genssm.metrics.frechet import frechet_distance_from_features
from genssm.metrics.networks import CLIP, IMAGENET, AdmFeatures, VisionFeatures

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 20, 24), dtype=np.uint8))


def test_adm_features_are_torch_fidelitys(fidelity_file: Path, tmp_path: Path) -> None:
    """The same images through torch-fidelity's own command: the same FID, inception score and precision."""
    import torch_fidelity

    folders = []
    for name, start in (("samples", 0), ("real", 3)):
        (tmp_path / name).mkdir()
        for i in range(start, start + 4):
            Image.fromarray(IMAGES[i % 6].permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i}.png")
        folders.append(str(tmp_path / name))
    theirs = torch_fidelity.calculate_metrics(
        input1=folders[0], input2=folders[1], cuda=False, fid=True, isc=True, isc_splits=1, prc=True,
        prc_neighborhood=2, feature_extractor="inception-v3-compat", cache=False, verbose=False,
        feature_extractor_weights_path=str(fidelity_file), samples_shuffle=False,
    )  # fmt: skip
    extractor = AdmFeatures(fidelity_file)
    x, y = extractor(IMAGES[:4]), extractor(IMAGES[[3, 4, 5, 0]])
    pool, logits = extractor.parts["pool"], extractor.parts["logits"]
    fid = frechet_distance_from_features(x[:, pool], y[:, pool])
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)  # their statistics are float32
    assert inception_score(x[:, logits]).value == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    found = precision_recall(x[:, pool], y[:, pool], neighbours=2)
    assert (found.precision, found.recall) == (theirs["precision"], theirs["recall"])
    assert extractor.protocol.library.startswith("torch-fidelity 0.")
    assert not extractor.protocol.is_fid
    spatial = x[:, extractor.parts["spatial"]]
    assert spatial.shape == (4, 2023)
    assert (spatial >= 0).all()  # after a rectifier
    assert x.shape[1] == extractor.parts["spatial"].stop


def test_wrong_inception_file(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not hold the Inception weights of torch-fidelity"):
        AdmFeatures(tmp_path / "w.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.pth is no file of tensors"):
        AdmFeatures(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match=r"weights-inception-2015-12-05-6726825d\.pth, 95628359 bytes"):
        AdmFeatures(tmp_path / "none.pth")


def test_dinov2(dinov2_folder: Path) -> None:
    """The class token after the last norm, of images resized by Pillow and normalised with ImageNet's colours."""
    from transformers import Dinov2Model

    extractor = VisionFeatures("dinov2", dinov2_folder)
    features = extractor(IMAGES)
    resized = [
        np.stack([np.asarray(Image.fromarray(c.numpy().astype(np.float32)).resize((224, 224), 3)) for c in image])
        for image in IMAGES
    ]
    mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in IMAGENET)
    x = (torch.from_numpy(np.stack(resized)).clip(0, 255) / 255 - mean) / deviation
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2_folder)(x).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert extractor.protocol.resize == "Pillow bicubic 224"
    torch.testing.assert_close(extractor(IMAGES[2:3]), features[2:3], rtol=1e-4, atol=1e-5)


def test_clip(clip_folder: Path) -> None:
    extractor = VisionFeatures("clip", clip_folder)
    features = extractor(IMAGES)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    assert features.shape == (6, 8)
    assert extractor.size == 28 and extractor.mean.flatten().tolist() == pytest.approx(CLIP[0])


def test_missing_folders_name_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dinov2_folder: Path) -> None:
    monkeypatch.setenv("GENSSM_CACHE", str(tmp_path))
    for kind, source in (("dinov2", "facebook/dinov2-large"), ("clip", "openai/clip-vit-large-patch14-336")):
        with pytest.raises(FileNotFoundError) as caught:
            VisionFeatures(kind)
        for part in (source, str(tmp_path / source.split("/")[1]), f"--{kind}", "config.json"):
            assert part in str(caught.value)
    with pytest.raises(ValueError, match="holds a dinov2 network"):
        VisionFeatures("clip", dinov2_folder)
