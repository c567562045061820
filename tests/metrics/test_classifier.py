"""The feature classifier: how well it reads, that a seed fixes it, that its file gives it back."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genssm.metrics.classifier import (
    SmallClassifier,
    accuracy_of,
    load_classifier,
    main,
    save_classifier,
    train_classifier,
)
from genssm.metrics.sources import file_source


def stripes(path: Path, count: int, side: int = 12, channels: int = 3) -> Path:
    """Two classes: horizontal and vertical stripes, with noise."""
    generator = np.random.default_rng(len(path.name))
    labels = np.arange(count) % 2
    images = generator.integers(0, 60, (count, side, side, channels), dtype=np.uint8)
    images[labels == 0, ::2] += 190
    images[labels == 1, :, ::2] += 190
    np.savez(path, arr_0=images, arr_1=labels)
    return path


def test_reads_the_digits(classifier_file: Path) -> None:
    info = load_classifier(classifier_file)[1]
    assert info.test_accuracy >= 0.97
    assert (info.dataset, info.num_classes, info.in_channels, info.image_size) == ("digits train", 10, 1, (8, 8))
    assert info.train_images + info.test_images == 1797


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (28, 28), (32, 24), (64, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_and_channels(size: tuple[int, int], channels: int) -> None:
    network = SmallClassifier(channels, size, 7, width=4, feature_dim=5).eval()
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    features = network.features(images)
    assert features.shape == (2, 5)
    torch.testing.assert_close(network(images), network.scores(features))
    assert network(images).shape == (2, 7)


def test_grey_classifier_takes_the_mean_of_colours(random_classifier: SmallClassifier) -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    grey = images.float().mean(1, keepdim=True)
    torch.testing.assert_close(random_classifier.features(images), random_classifier.features(grey))


def test_a_seed_fixes_everything(tmp_path: Path) -> None:
    """Equal bytes from equal seeds, whatever happened to the global random state, which is left as it was."""
    train, test = file_source(stripes(tmp_path / "train.npz", 80)), file_source(stripes(tmp_path / "test.npz", 20))

    def run(seed: int, name: str) -> bytes:
        torch.rand(len(name))
        before = torch.get_rng_state()
        network, info = train_classifier(
            train, test, num_classes=2, in_channels=3, epochs=3, seed=seed, batch_size=16, width=4, feature_dim=3
        )
        assert torch.equal(before, torch.get_rng_state())
        save_classifier(tmp_path / name, network, info)
        return (tmp_path / name).read_bytes()

    first = run(0, "a.safetensors")
    assert run(0, "bb.safetensors") == first
    assert run(1, "ccc.safetensors") != first


def test_file_gives_it_back(classifier_file: Path, tmp_path: Path) -> None:
    network, info = load_classifier(classifier_file)
    save_classifier(tmp_path / "copy.safetensors", network, info)
    assert (tmp_path / "copy.safetensors").read_bytes() == classifier_file.read_bytes()
    again, same = load_classifier(tmp_path / "copy.safetensors")
    assert same == info
    assert not again.training
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(network(images), again(images))


def test_learns_stripes_and_accuracy_counts(tmp_path: Path) -> None:
    train, test = file_source(stripes(tmp_path / "train.npz", 200)), file_source(stripes(tmp_path / "test.npz", 50))
    network, info = train_classifier(
        train, test, num_classes=2, in_channels=3, epochs=4, batch_size=20, width=4, feature_dim=4
    )
    assert info.test_accuracy == 1.0
    assert dataclasses.asdict(info)["image_size"] == (12, 12)
    images = torch.stack([test.read(i)[0] for i in range(10)])
    labels = torch.tensor([test.read(i)[1] for i in range(10)])
    labels[:3] = 1 - labels[:3]
    assert accuracy_of(network, images, labels, batch_size=4) == 0.7


def test_mistakes(tmp_path: Path) -> None:
    source = file_source(stripes(tmp_path / "train.npz", 8))
    with pytest.raises(ValueError, match=r"labels 0\.\.1; expected 0\.\.0"):
        train_classifier(source, source, num_classes=1, in_channels=3)
    np.savez(tmp_path / "no.npz", arr_0=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="images without labels"):
        train_classifier(source, file_source(tmp_path / "no.npz"), num_classes=2, in_channels=3)
    other = file_source(stripes(tmp_path / "test.npz", 8, side=10))
    with pytest.raises(ValueError, match="they must agree"):
        train_classifier(source, other, num_classes=2, in_channels=3)
    with pytest.raises(ValueError, match="in_channels is 4"):
        SmallClassifier(4, (8, 8), 10)
    with pytest.raises(ValueError, match="images are 3x3"):
        SmallClassifier(1, (3, 3), 10)
    with pytest.raises(FileNotFoundError, match="make one: python -m genssm"):
        load_classifier(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="is no classifier made by"):
        load_classifier(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_classifier(tmp_path / "no.npz")


def test_command_line_on_another_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for split, count in (("train", 60), ("test", 20)):
        stripes(tmp_path / f"{split}.npz", count, channels=1)
    arguments = ["--data", "npz", "--path", str(tmp_path), "--resolution", "16", "--crop", "pad"]
    main([*arguments, "--out", str(tmp_path / "c.safetensors"), "--epochs", "2", "--width", "4", "--device", "cpu"])
    info = load_classifier(tmp_path / "c.safetensors")[1]
    assert (info.image_size, info.in_channels, info.dataset) == ((16, 16), 1, "npz train 16px pad")
    assert "of 20 test images right" in capsys.readouterr().out
