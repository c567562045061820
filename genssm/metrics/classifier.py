"""A small classifier whose penultimate features measure images that Inception was not made for (digits, clothes).

Distances in such features live on the scale of this one network: publish the file with the number. It is trained on
the real training split alone, and without flips, crops or shifts, because features trained to ignore a change of the
image cannot see it in the samples.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from genssm import errors
from genssm.devices import device_option
from genssm.metrics.features import exact_convolutions
from genssm.metrics.sources import ImageSource, add_data_options, dataset_source

METADATA_KEY = "genssm_classifier"  # one key, because safetensors writes several in random order


@dataclass(frozen=True)
class ClassifierInfo:
    """What a classifier file says about itself; the metadata of the safetensors file."""

    dataset: str
    in_channels: int
    image_size: tuple[int, int]
    num_classes: int
    width: int
    feature_dim: int
    epochs: int
    seed: int
    train_images: int
    test_images: int
    test_accuracy: float


class SmallClassifier(nn.Module):
    """Convolutions to a map of at most 4 x 4, its average, ``feature_dim`` features, class scores.

    Two 3 x 3 convolutions per scale, batch norm, ReLU; the width doubles with each halving up to four times the first.
    """

    # B images, C in_channels, H W image size, F feature_dim, K num_classes

    def __init__(
        self, in_channels: int, image_size: tuple[int, int], num_classes: int, width: int = 32, feature_dim: int = 64
    ) -> None:
        super().__init__()
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels is {in_channels}; the classifier reads grey (1) or colour (3) images")
        if min(image_size) < 4:
            raise ValueError(f"images are {image_size[0]}x{image_size[1]}; the classifier needs 4x4 at least")
        stages, channels, out, side = [], in_channels, width, max(image_size)
        while True:
            stages.append(_stage(channels, out, halve=side > 4))
            channels, out = out, min(2 * out, 4 * width)
            if side <= 4:
                break
            side = -(-side // 2)
        self.in_channels = in_channels
        self.stages = nn.Sequential(*stages)
        self.project = nn.Linear(channels, feature_dim)
        self.classify = nn.Linear(feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features.

        Args:
            images: (B, 3 or C, H, W), uint8 or float in 0..255. A grey classifier takes the mean of three channels.
        Returns:
            (B, F) float32, before the last rectifier.
        """
        x = images.float()
        if self.in_channels == 1 and x.shape[1] != 1:
            x = x.mean(dim=1, keepdim=True)  # (B, 1, H, W)
        x = self.stages(x / 127.5 - 1)  # (B, 4 * width, h, w)
        return self.project(x.mean(dim=(2, 3)))  # (B, F)

    def scores(self, features: Tensor) -> Tensor:
        """Class scores (B, K) of features (B, F)."""
        return self.classify(F.relu(features))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (B, K) of images, see :meth:`features`."""
        return self.scores(self.features(images))


def _stage(in_channels: int, out_channels: int, *, halve: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    if halve:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers)


def train_classifier(
    train: ImageSource,
    test: ImageSource,
    *,
    num_classes: int,
    in_channels: int,
    epochs: int = 20,
    seed: int = 0,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    width: int = 32,
    feature_dim: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> tuple[SmallClassifier, ClassifierInfo]:
    """Train on ``train``, measure the accuracy on ``test`` once, at the end.

    The same seed, machine and versions give the same weights: the order of the images and the initial weights come from
    the seed, and the algorithms are deterministic. The global random state is put back.

    Args:
        train, test: images with labels, all of one size.
        num_classes: number of classes K.
        in_channels: 1 or 3.
        epochs, batch_size, learning_rate: AdamW on a one-cycle schedule with this peak.
        width, feature_dim: of :class:`SmallClassifier`.
        progress: show a bar.
    Returns:
        The classifier in evaluation mode and what its file will say.
    Raises:
        ValueError: a source has no labels, images of several sizes, or labels outside 0..K-1.
    """
    images, labels = _labelled(train, num_classes)
    test_images, test_labels = _labelled(test, num_classes)
    size = (int(images.shape[2]), int(images.shape[3]))
    if test_images.shape[2:] != images.shape[2:]:
        raise ValueError(f"{train.name} has {size} images, {test.name} {tuple(test_images.shape[2:])}; they must agree")
    images, labels = images.to(device), labels.to(device)
    with torch.random.fork_rng(devices=[]), exact_convolutions():
        torch.default_generator.manual_seed(seed)  # weights are drawn on the CPU
        network = SmallClassifier(in_channels, size, num_classes, width, feature_dim).to(device)
        _fit(network, images, labels, epochs, batch_size, learning_rate, seed, progress)
    network.eval()
    accuracy = accuracy_of(network, test_images, test_labels)
    info = ClassifierInfo(
        dataset=train.name,
        in_channels=in_channels,
        image_size=size,
        num_classes=num_classes,
        width=width,
        feature_dim=feature_dim,
        epochs=epochs,
        seed=seed,
        train_images=len(images),
        test_images=len(test_images),
        test_accuracy=accuracy,
    )
    return network, info


def _fit(
    network: SmallClassifier,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> None:
    batch_size = min(batch_size, len(images))
    steps = len(images) // batch_size
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=epochs * steps)
    order_generator = torch.Generator().manual_seed(seed)
    network.train()
    bar = tqdm(range(epochs), desc="classifier", unit="epoch", disable=not progress)
    for _ in bar:
        order = torch.randperm(len(images), generator=order_generator).to(images.device)
        total = torch.zeros((), device=images.device)
        for step in range(steps):  # the last, shorter batch is dropped: batch norm dislikes a batch of one
            rows = order[step * batch_size : (step + 1) * batch_size]
            loss = F.cross_entropy(network(images[rows]), labels[rows], label_smoothing=0.1)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach()
        bar.set_postfix(loss=f"{total.item() / steps:.4f}")


def accuracy_of(network: SmallClassifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of the uint8 images (N, 3, H, W) that ``network`` puts in their class ``labels`` (N,)."""
    device = network.classify.weight.device
    correct = 0
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            correct += int((network(images[rows].to(device)).argmax(1).cpu() == labels[rows].cpu()).sum())
    return correct / len(images)


def save_classifier(path: str | Path, network: SmallClassifier, info: ClassifierInfo) -> None:
    """Write weights and ``info`` to a safetensors file; equal contents give equal bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, str(path), metadata={METADATA_KEY: json.dumps(asdict(info), sort_keys=True)})


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> tuple[SmallClassifier, ClassifierInfo]:
    """Read what :func:`save_classifier` wrote; the network is in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no classifier of ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no classifier at {path}; make one: python -m genssm.metrics.classifier --out {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{path} is no classifier made by python -m genssm.metrics.classifier")
    values = json.loads(text)
    info = ClassifierInfo(**{**values, "image_size": tuple(values["image_size"])})
    network = SmallClassifier(info.in_channels, info.image_size, info.num_classes, info.width, info.feature_dim)
    network.load_state_dict(load_file(str(path)))
    return network.to(device).eval(), info


def _labelled(source: ImageSource, num_classes: int) -> tuple[Tensor, Tensor]:
    batches = list(source.batches(range(len(source)), 1000))
    if any(batch.labels is None for batch in batches):
        raise ValueError(f"{source.name} has images without labels; a classifier needs classes")
    if len({batch.images.shape[1:] for batch in batches}) > 1:
        raise ValueError(f"{source.name} has images of several sizes; give --resolution")
    labels = torch.cat([torch.from_numpy(batch.labels) for batch in batches])
    if num_classes < 2 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{source.name} has labels {int(labels.min())}..{int(labels.max())}; expected 0..{num_classes - 1}"
        )
    return torch.cat([batch.images for batch in batches]), labels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m genssm.metrics.classifier",
        description="Train a small classifier on the real images of a data set. Its penultimate features serve "
        "genssm.metrics.fid where Inception features mean little: grey, tiny or synthetic images.",
        epilog="Example: python -m genssm.metrics.classifier --data fashion_mnist --path data/fashion-mnist "
        "--epochs 12 --device cuda --out fashion.safetensors",
    )
    parser.add_argument("--data", required=True, metavar="NAME", help="data set, configuration file or run folder")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors", help="file to write")
    parser.add_argument("--train-split", default="train", help="part to train on (default: %(default)s)")
    parser.add_argument("--test-split", default="test", help="part to measure accuracy on (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training part (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage (default: %(default)s)")
    parser.add_argument("--feature-dim", type=int, default=64, help="length of the features (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    parser.add_argument(
        "--device", type=device_option, default=None, help="cpu, cuda, ...; default: cuda where there is one"
    )
    add_data_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    options = _parser().parse_args(arguments)
    train = dataset_source(options.data, options.train_split, options)
    test = dataset_source(options.data, options.test_split, options)
    network, info = train_classifier(
        train,
        test,
        num_classes=train.num_classes,
        in_channels=train.channels,
        epochs=options.epochs,
        seed=options.seed,
        width=options.width,
        feature_dim=options.feature_dim,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        progress=True,
    )
    save_classifier(options.out, network, info)
    print(
        f"classifier of {info.dataset}: {info.test_accuracy:.2%} of {info.test_images} test images right "
        f"(seed {info.seed}, {info.epochs} epochs) -> {options.out}"
    )


if __name__ == "__main__":
    errors.cli(main)
