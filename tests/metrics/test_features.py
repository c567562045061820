"""Feature networks: equal to clean-fid on the same files, the offline error, users' networks."""

import dataclasses
import hashlib
import io
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssm.metrics import weights
from genssm.metrics.classifier import SmallClassifier, load_classifier
from genssm.metrics.features import ClassifierFeatures, InceptionFeatures, build_extractor

pytest.importorskip("cleanfid")
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 20, 24), dtype=np.uint8))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights anywhere: our cache is an empty folder, clean-fid's place another one."""
    monkeypatch.setenv("GENSSM_CACHE", str(tmp_path / "cache"))
    real = weights.candidates

    def candidates(known: weights.WeightFile) -> list[Path]:
        return [real(known)[0], tmp_path / "theirs" / known.name]

    monkeypatch.setattr(weights, "candidates", candidates)
    return tmp_path / "cache"


@pytest.fixture
def published(stand_in_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in taken for the published file."""
    known = weights.INCEPTION_FILES["torchscript"]
    digest = hashlib.sha256(stand_in_file.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.INCEPTION_FILES, "torchscript", dataclasses.replace(known, sha256=digest))
    return stand_in_file


@pytest.mark.parametrize("resize", ["clean", "legacy_tensorflow"])
def test_equals_clean_fid_on_a_folder(resize: str, stand_in_file: Path, tmp_path: Path) -> None:
    """The same vectors as clean-fid makes of the same images, written as PNG files."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    for i, image in enumerate(IMAGES):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    network = InceptionV3W(str(stand_in_file.parent), download=False, resize_inside=resize == "legacy_tensorflow")
    theirs = get_folder_features(
        str(tmp_path), network, num_workers=0, mode=resize, device=torch.device("cpu"), verbose=False
    )
    ours = InceptionFeatures(resize, stand_in_file)(IMAGES)
    assert ours.shape == (5, 2048)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-6)


def test_legacy_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-fid's network from a local file: bilinear resize, images in 0..1, clean-fid left as it was."""
    from cleanfid import inception_pytorch
    from torchvision.models import Inception3

    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    with monkeypatch.context() as patch:  # the random weights of clean-fid's own network stand for the published ones
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(Inception3, "load_state_dict", lambda self, _: state.update(self.state_dict()))
        inception_pytorch.fid_inception_v3()
    torch.save(state, tmp_path / "weights.pth")
    fetch = inception_pytorch.load_state_dict_from_url
    extractor = InceptionFeatures("legacy_pytorch", tmp_path / "weights.pth")
    assert inception_pytorch.load_state_dict_from_url is fetch
    resized = torch.nn.functional.interpolate(IMAGES[:2].float(), (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = extractor.network.network(resized / 255)[0].flatten(1)
    torch.testing.assert_close(extractor(IMAGES[:2]), expected)
    assert expected.shape == (2, 2048)
    assert (extractor.protocol.resize, extractor.protocol.is_fid) == ("legacy_pytorch 299", False)


def test_warnings_stay_audible(stand_in_file: Path) -> None:
    """clean-fid's bilinear resizer silences every warning of the process; ours must not."""
    import warnings

    from genssm.metrics.features import build_resizer

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = list(warnings.filters)
        build_resizer("legacy_pytorch")
        assert warnings.filters == before


def test_batches_and_mode_do_not_matter(stand_in_file: Path) -> None:
    extractor = InceptionFeatures("clean", stand_in_file)
    assert not extractor.network.training
    assert not any("DataParallel" in type(module).__name__ for module in extractor.network.modules())
    together, single = extractor(IMAGES), torch.cat([extractor(image[None]) for image in IMAGES])
    torch.testing.assert_close(together, single)


def test_only_the_published_file_gives_fid(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    protocol = InceptionFeatures("clean", published).protocol
    assert protocol.is_fid
    assert protocol.name == "inception-2015-12-05.pt pool_3"
    assert protocol.resize == "clean 299"
    assert protocol.library.startswith("clean-fid 0.")
    other = tmp_path / "other.pt"
    other.write_bytes(published.read_bytes())
    assert InceptionFeatures("clean", other).protocol.is_fid
    known = weights.INCEPTION_FILES["torchscript"]
    monkeypatch.setitem(weights.INCEPTION_FILES, "torchscript", dataclasses.replace(known, sha256="0" * 64))
    assert not InceptionFeatures("clean", other).protocol.is_fid
    assert "is not the published inception-2015-12-05.pt" in caplog.text


def test_found_in_our_cache_and_where_clean_fid_keeps_it(empty_cache: Path, published: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "theirs", empty_cache):
        folder.mkdir(exist_ok=True)
        (folder / published.name).write_bytes(published.read_bytes())
        found, digest = weights.find_inception(weights.INCEPTION_FILES["torchscript"])
        assert found == folder / published.name
        assert digest == weights.INCEPTION_FILES["torchscript"].sha256
    (empty_cache / published.name).write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"15 bytes.*broken download; delete it"):
        InceptionFeatures("clean")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GENSSM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert weights.cache_folder() == Path("/x/genssm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.cache_folder() == Path.home() / ".cache" / "genssm"
    monkeypatch.setenv("GENSSM_CACHE", "/g")
    assert weights.cache_folder() == Path("/g")


def no_network(*args: object, **kwargs: object) -> None:
    raise urllib.error.URLError("no route")


@pytest.mark.parametrize("forbidden", [True, False])
@pytest.mark.parametrize("resize", ["clean", "legacy_pytorch"])
def test_offline_error_says_what_to_do(
    resize: str, forbidden: bool, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which file, its size and hash, where to get it, and every place it may lie."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if forbidden else "0")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    known = weights.INCEPTION_FILES["pytorch" if resize == "legacy_pytorch" else "torchscript"]
    with pytest.raises(FileNotFoundError) as caught:
        InceptionFeatures(resize)
    text = str(caught.value)
    for part in (known.name, str(known.size), known.sha256, known.url, str(empty_cache), "theirs", "--weights"):
        assert part in text
    assert ("HF_HUB_OFFLINE" if forbidden else "no route") in text
    assert not list(empty_cache.rglob("*.p*"))


def test_download_is_checked(empty_cache: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download appears under its name only when its hash is right."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: io.BytesIO(b"an error page"))
    with pytest.raises(FileNotFoundError, match="the download has sha256"):
        InceptionFeatures("clean")
    assert list(empty_cache.iterdir()) == []
    content = published.read_bytes()
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: io.BytesIO(content))
    assert InceptionFeatures("clean").protocol.is_fid
    assert [file.name for file in empty_cache.iterdir()] == [published.name]
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert InceptionFeatures("clean").protocol.is_fid


def test_missing_explicit_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*inception-2015-12-05\.pt, 95607719 bytes"):
        InceptionFeatures("clean", tmp_path / "none.pt")


def test_wrong_files_are_named(stand_in_file: Path, tmp_path: Path) -> None:
    """A file of another kind, of other tensors, and one that is cut off."""
    (tmp_path / "cut.pt").write_bytes(stand_in_file.read_bytes()[:1000])
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for mode, name, message in (
        ("clean", "other.pth", r"other\.pth is no TorchScript network, as resize mode clean needs"),
        ("legacy_tensorflow", "cut.pt", r"cut\.pt is no TorchScript network, as resize mode legacy_tensorflow needs"),
        ("legacy_pytorch", "other.pth", r"other\.pth does not hold the Inception weights of pytorch-fid"),
        ("legacy_pytorch", "cut.pt", r"cut\.pt is no file of tensors"),
        ("legacy_pytorch", "list.pth", r"list\.pth holds a list; expected tensors by name"),
    ):
        with pytest.raises(ValueError, match=message):
            InceptionFeatures(mode, tmp_path / name)
    with pytest.raises(ValueError, match=r"inception-2015-12-05\.pt is no file of tensors"):
        InceptionFeatures("legacy_pytorch", stand_in_file)
    with pytest.raises(ValueError, match=r"cut\.pt is no TorchScript network \(torch\.jit\.save writes one\)"):
        build_extractor(f"torchscript:{tmp_path / 'cut.pt'}")


USER_MODULE = """
import torch

def mean(images):
    return images.float().mean(dim=(2, 3))

def flat(images):
    return images.float().mean()

class Network(torch.nn.Module):
    def forward(self, images):
        return images.float().amax(dim=(2, 3)) + (1000 if self.training else 0)

number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_features.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield "my_features"
    sys.modules.pop("my_features", None)


def test_user_networks(user_module: str) -> None:
    extractor = build_extractor(f"{user_module}:mean")
    torch.testing.assert_close(extractor(IMAGES), IMAGES.float().mean(dim=(2, 3)))
    assert extractor.protocol.weights_sha256 == hashlib.sha256(USER_MODULE.encode()).hexdigest()
    assert not extractor.protocol.is_fid
    network = build_extractor(f"{user_module}:Network")
    torch.testing.assert_close(network(IMAGES), IMAGES.float().amax(dim=(2, 3)))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("my_features:flat", ValueError, r"returned \(\) for 5 images; expected \(B, F\)"),
        ("my_features:number", ValueError, "is a int; expected a function"),
        ("my_features:nothing", ValueError, "has no 'nothing'"),
        ("not_there_at_all:f", ImportError, "cannot import 'not_there_at_all'"),
        ("resnet", ValueError, "expected inception, classifier:FILE"),
        ("classifier:none.safetensors", FileNotFoundError, "no classifier at"),
        ("torchscript:none.pt", FileNotFoundError, "no TorchScript file"),
    ],
)
def test_user_mistakes(user_module: str, spec: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build_extractor(spec)(IMAGES)


def test_resize_mode_is_for_inception() -> None:
    with pytest.raises(ValueError, match="is for inception"):
        build_extractor("my:function", resize="clean")
    with pytest.raises(ValueError, match="expected one of clean"):
        InceptionFeatures("bicubic")


def test_torchscript(tmp_path: Path) -> None:
    class Sum(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().sum(dim=(2, 3))

    torch.jit.script(Sum()).save(str(tmp_path / "sum.pt"))
    extractor = build_extractor(f"torchscript:{tmp_path / 'sum.pt'}")
    torch.testing.assert_close(extractor(IMAGES), IMAGES.float().sum(dim=(2, 3)))


@pytest.mark.parametrize("images", [IMAGES.float(), IMAGES[:, :1], IMAGES[0]])
def test_refuses_other_images(images: torch.Tensor, stand_in_file: Path) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(B, 3, H, W\)"):
        InceptionFeatures("clean", stand_in_file)(images)


def test_classifier_features(classifier_file: Path) -> None:
    extractor = ClassifierFeatures(classifier_file)
    images = IMAGES[:, :1, :8, :8].expand(-1, 3, -1, -1)
    features = extractor(images)
    network: SmallClassifier = load_classifier(classifier_file)[0]
    with torch.no_grad():
        assert (extractor.classes(features) == network(images).argmax(1)).all()
        torch.testing.assert_close(features, network.features(images[:, :1]))
    assert extractor.protocol.resize == "none"
    with pytest.raises(ValueError, match="images are 20x24 but the classifier was trained at 8x8"):
        extractor(IMAGES)
