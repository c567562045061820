"""Feature networks: images, uint8 (B, 3, H, W), to vectors, (B, F) float32.

Distances in :mod:`genssm.metrics.frechet` are computed from these vectors, so any network may be used; only the
Inception network of the FID protocol gives numbers that may be called FID.
"""

import abc
import importlib
import importlib.util
import inspect
import logging
import os
import pickle
import shutil
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from genssm.metrics.weights import INCEPTION_FILES, file_hash, find_inception

logger = logging.getLogger("genssm")
# The published Inception file is TorchScript; the announced end of that format is no news to its user.
_JIT_DEPRECATED = r".*torch\.jit\.load"
RESIZE_MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")


@dataclass(frozen=True)
class FeatureProtocol:
    """What must be equal for two distances to be comparable.

    Attributes:
        name: of the network, for people.
        weights_sha256: of the file that holds the weights (or the code) of the network.
        resize: how images reach the network's size; "none" when they are passed as they are.
        is_fid: whether this is a network and resize of the FID protocol.
        library: package and version that does the resize and runs the network.
    """

    name: str
    weights_sha256: str
    resize: str
    is_fid: bool
    library: str


class FeatureExtractor(abc.ABC):
    """A feature network in evaluation mode on one device; ``protocol`` says which.

    Attributes:
        gaussian: the part of a feature vector whose mean and covariance are taken.
        of: what a feature vector is of: "images"; of clips, "clips" or "frames".
        rows: feature vectors of one item.
    """

    protocol: FeatureProtocol
    gaussian: slice = slice(None)
    of: ClassVar[str] = "images"
    rows: int = 1

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    @abc.abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """Features of uint8 images (B, 3, H, W) that lie on the CPU; any type, any device, (B, F)."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: uint8, (B, 3, H, W).
        Returns:
            float32 on the CPU, (B, F).
        Raises:
            ValueError: the images are of another type or shape, or the network returns another shape.
        """
        self.check(images)
        with exact_convolutions():
            features = self.extract(images)
        count = len(images) * self.rows
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != count:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.protocol.name} returned {got} for {count} {self.of}; expected (B, F)")
        return features.float().cpu()

    def check(self, images: Tensor) -> None:
        """Raise a ValueError unless a batch has the type and the shape that :meth:`extract` takes."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (B, 3, H, W)")


class InceptionFeatures(FeatureExtractor):
    """The 2048 pooled features of the Inception network of 2015-12-05, resized and run by clean-fid.

    Args:
        resize: ``clean`` (Pillow bicubic with antialias; Parmar et al. 2022), ``legacy_tensorflow`` (bilinear inside
            the network, nearest to the ADM evaluator) or ``legacy_pytorch`` (pytorch-fid: another port of the weights,
            bilinear without antialias).
        weights: the weight file; default: genssm's cache, then where clean-fid keeps it, then the network.
    Raises:
        FileNotFoundError: there is no weight file and it cannot be fetched; says which, its size and where it goes.
        ImportError: clean-fid is not installed.
        ValueError: an unknown resize, or a file of ours or of clean-fid that is not the published one.
    """

    def __init__(
        self, resize: str = "clean", weights: str | Path | None = None, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(device)
        if resize not in RESIZE_MODES:
            raise ValueError(f"resize mode {resize!r}; expected one of {', '.join(RESIZE_MODES)}")
        version = _require_cleanfid()
        known = INCEPTION_FILES["pytorch" if resize == "legacy_pytorch" else "torchscript"]
        file, digest = find_inception(known, weights)
        is_published = digest == known.sha256
        if not is_published:
            logger.warning("%s is not the published %s (sha256 %s); no FID", file, known.name, known.sha256)
        load = _load_pytorch_fid if resize == "legacy_pytorch" else _load_torchscript
        self.network = load(file, resize).to(self.device).eval()
        self._resize = build_resizer(resize)
        self.protocol = FeatureProtocol(
            name=f"{known.name} pool_3" if is_published else file.name,
            weights_sha256=digest,
            resize=f"{resize} 299",
            is_fid=is_published,
            library=f"clean-fid {version}",
        )

    def extract(self, images: Tensor) -> Tensor:
        x = self._resize(images).to(self.device)  # (B, 3, 299, 299) float32 in 0..255; legacy_tensorflow (B, 3, H, W)
        return self.network(x)


class ClassifierFeatures(FeatureExtractor):
    """Penultimate features of a classifier made by ``python -m genssm.metrics.classifier``; images are not resized."""

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        from genssm.metrics.classifier import load_classifier

        self.network, self.info = load_classifier(path, device)
        digest = file_hash(Path(path))
        self.protocol = FeatureProtocol(
            name=f"the {self.info.dataset} classifier",
            weights_sha256=digest,
            resize="none",
            is_fid=False,
            library="genssm",
        )

    def extract(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != tuple(self.info.image_size):
            got, expected = ("x".join(map(str, size)) for size in (images.shape[2:], self.info.image_size))
            raise ValueError(
                f"images are {got} but the classifier was trained at {expected}; "
                f"train one at the size of the samples (python -m genssm.metrics.classifier --resolution)"
            )
        return self.network.features(images.to(self.device))

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Class scores before the softmax, (B, K) float32 on the CPU, from features (B, F) of :meth:`__call__`."""
        return self.network.scores(features.to(self.device)).cpu()

    @torch.no_grad()
    def classes(self, features: Tensor) -> Tensor:
        """The most probable class, (B,) int64, from features (B, F) of :meth:`__call__`."""
        return self.network.scores(features.to(self.device)).argmax(dim=1).cpu()


class UserFeatures(FeatureExtractor):
    """A network of the user's: any callable from uint8 images (B, 3, H, W) on ``device`` to features (B, F).

    It does its own resizing and scaling. A module is put in evaluation mode on ``device``; a class is built first.
    """

    def __init__(
        self, function: Any, name: str, digest: str, library: str = "user", device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(device)
        if inspect.isclass(function):
            function = function()
        if isinstance(function, nn.Module):
            function = function.to(self.device).eval()
        if not callable(function):
            raise ValueError(f"{name} is a {type(function).__name__}; expected a function of {self.of}")
        self.function = function
        self.protocol = FeatureProtocol(name, digest, resize="by the network", is_fid=False, library=library)

    def extract(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        if isinstance(self.function, torch.jit.ScriptModule):
            return call_torchscript(self.function, self.protocol.name, images)
        return self.function(images)


def call_torchscript(network: nn.Module, name: str, x: Tensor, **options: bool) -> Tensor:
    """What a network of a file returns; a ValueError with the shape of ``x`` where it cannot compute that."""
    try:
        return network(x, **options)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, torch.jit.Error) as error:
        reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise ValueError(f"{name} cannot read {tuple(x.shape)}: {reason}") from error


def exact_convolutions() -> AbstractContextManager[None]:
    """Within the context cuDNN uses neither TensorFloat-32 (its default, 10 bits) nor algorithms that vary."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def build_extractor(
    spec: str,
    *,
    resize: str | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> FeatureExtractor:
    """A feature network from its name on the command line.

    Args:
        spec: ``inception``; ``classifier:FILE.safetensors``; ``torchscript:FILE.pt``; or ``module:function``, which is
            imported (from the current folder too) and called with uint8 (B, 3, H, W).
        resize, weights: of :class:`InceptionFeatures`; only for ``inception``.
        device: where the network runs.
    Raises:
        ValueError: the text means none of these, or ``resize`` or ``weights`` is given with another network.
        FileNotFoundError: there is no such file.
        ImportError: the module cannot be imported.
    """
    if spec == "inception":
        return InceptionFeatures(resize or "clean", weights, device)
    for option, value in (("resize mode", resize), ("weight file", weights)):
        if value is not None:
            raise ValueError(f"{option} {value!r} is for inception; {spec!r} gets the images as they are")
    kind, _, rest = spec.partition(":")
    if not rest:
        raise ValueError(f"features {spec!r}; expected inception, classifier:FILE, torchscript:FILE or module:function")
    if kind == "classifier":
        return ClassifierFeatures(rest, device)
    if kind == "torchscript":
        return UserFeatures(*load_torchscript(Path(rest)), "TorchScript", device)
    function, digest = import_function(kind, rest)
    return UserFeatures(function, spec, digest, device=device)


def load_torchscript(file: Path) -> tuple[nn.Module, str, str]:
    """A TorchScript network on the CPU, the name of its file and its sha256.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no TorchScript file {file}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_JIT_DEPRECATED)
            network = torch.jit.load(str(file), map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"{file} is no TorchScript network (torch.jit.save writes one): {_first(error)}") from None
    return network, file.name, file_hash(file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file of PyTorch; a ValueError if it holds something else."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{file} is no file of tensors (torch.save writes one): {_first(error)}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds a {type(state).__name__}; expected tensors by name")
    return state


def _first(error: Exception) -> str:
    """The first sentence of a long message."""
    return str(error).strip().splitlines()[0].split(". ")[0]


def _require_cleanfid() -> str:
    if importlib.util.find_spec("cleanfid") is None:
        raise ImportError("Inception features need clean-fid; pip install clean-fid")
    from importlib.metadata import version

    return version("clean-fid")


def _load_torchscript(file: Path, resize: str) -> nn.Module:
    from cleanfid.inception_torchscript import InceptionV3W

    name, given = INCEPTION_FILES["torchscript"].name, file
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_JIT_DEPRECATED)
        if file.name != name:  # clean-fid takes a folder and opens this name in it
            shutil.copyfile(file, Path(folder, name))
            file = Path(folder, name)
        try:
            return InceptionV3W(str(file.parent), download=False, resize_inside=resize == "legacy_tensorflow")
        except RuntimeError as error:
            raise ValueError(
                f"{given} is no TorchScript network, as resize mode {resize} needs: {_first(error)}"
            ) from None


def _load_pytorch_fid(file: Path, resize: str) -> nn.Module:
    from cleanfid import inception_pytorch

    state = load_tensors(file)
    fetch = inception_pytorch.load_state_dict_from_url
    # clean-fid can only load from its URL; give it the tensors that are already here instead.
    inception_pytorch.load_state_dict_from_url = lambda *args, **kwargs: state
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the Inception weights of pytorch-fid: {_first(error)}") from None
    finally:
        inception_pytorch.load_state_dict_from_url = fetch
    return _PytorchFid(network)


class _PytorchFid(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x / 255)[0].flatten(1)


def build_resizer(mode: str, size: int = 299) -> Any:
    """uint8 (B, 3, H, W) -> float32 (B, 3, size, size) in 0..255 (``legacy_tensorflow``: size unchanged).

    Args:
        mode: a resize of clean-fid.
        size: side of the square; other sizes than Inception's are for ``clean`` alone.
    """
    from cleanfid import resize as theirs

    with warnings.catch_warnings():  # clean-fid silences every warning of the process here
        resize = (
            theirs.build_resizer(mode) if size == 299 else theirs.make_resizer("PIL", False, "bicubic", (size, size))
        )
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def one(image: Tensor) -> Tensor:
        array = np.asarray(resize(image.permute(1, 2, 0).numpy()), dtype=np.float32)  # (299, 299, 3)
        return torch.from_numpy(array).permute(2, 0, 1)

    return lambda images: torch.stack(list(pool.map(one, images)))


def import_function(module_name: str, function_name: str) -> tuple[Any, str]:
    """``function_name`` of a module on the Python path or in the current folder, and the sha256 of its file.

    Raises:
        ImportError: the module cannot be imported.
        ValueError: the module has no such function.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"cannot import {module_name!r} ({error}); features are inception, classifier:FILE, torchscript:FILE or "
            "module:function with the module on the Python path or in the current folder"
        ) from error
    if not hasattr(module, function_name):
        raise ValueError(f"module {module_name} has no {function_name!r}")
    source = getattr(module, "__file__", None)
    digest = file_hash(Path(source)) if source else "built-in"
    return getattr(module, function_name), digest
