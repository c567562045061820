"""One digits classifier for the whole session, and a network that stands in for Inception where there is no file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genssm.metrics.classifier import SmallClassifier, main


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Tiny operations on one thread: where other programs keep the cores busy, two wait for each other for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Every test here works on tiny tensors."""
    with single_thread():
        yield


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the scikit-learn digits, trained by the command line with its default settings."""
    file = tmp_path_factory.mktemp("classifier") / "digits.safetensors"
    with single_thread():
        main(["--data", "digits", "--out", str(file), "--device", "cpu"])
    return file


@pytest.fixture
def random_classifier() -> SmallClassifier:
    """Untrained, for 8x8 grey images."""
    torch.manual_seed(0)
    return SmallClassifier(1, (8, 8), 10).eval()


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 2048)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(x, (4, 4))
        return self.linear(x.flatten(1)).reshape(-1, 2048, 1, 1)


class InceptionStandIn(nn.Module):
    """The interface of the published TorchScript file: ``layers``, and a forward pass that resizes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        x = nn.functional.interpolate(img, size=[299, 299], mode="bilinear", align_corners=False)
        return self.layers((x - 128) / 128)


@pytest.fixture(scope="session")
def stand_in_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small TorchScript file with the name and the interface of the published Inception network."""
    file = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.manual_seed(0)
    torch.jit.script(InceptionStandIn().eval()).save(str(file))
    return file


@pytest.fixture(scope="session")
def fidelity_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for torch-fidelity's Inception, scaled to keep the images apart."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    file = tmp_path_factory.mktemp("fidelity") / "weights.pth"
    state: dict[str, Tensor] = {}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        network = fidelity.FeatureExtractorInceptionV3
        patch.setattr(network, "load_state_dict", lambda self, _: state.update(self.state_dict()))
        network("random", ["2048"], verbose=False)
    torch.save({name: 2 * v if v.ndim == 4 else v for name, v in state.items()}, file)
    return file


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random DINOv2."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    folder = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP vision tower."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder
