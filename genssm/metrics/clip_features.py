"""Feature networks of clips, uint8 (B, F, 3, H, W), to vectors: I3D, VideoMAE, a user's own, or those of every frame.

The Frechet video distance (FVD, Unterthiner et al. 2018) is the Frechet distance of one vector per clip. All networks
are read from local files; where one is missing the error names the file, where it comes from and where it may lie.
"""

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from genssm.metrics.features import (
    FeatureExtractor,
    FeatureProtocol,
    UserFeatures,
    build_extractor,
    build_resizer,
    call_torchscript,
    import_function,
    load_torchscript,
)
from genssm.metrics.networks import IMAGENET, VisionFeatures
from genssm.metrics.weights import cache_folder, file_hash

I3D_FILE = "i3d_torchscript.pt"
I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
VIDEOMAE = "videomae-base-finetuned-kinetics"


class ClipFeatures(FeatureExtractor):
    """A feature network of clips; ``extract`` gets uint8 (B, F, 3, H, W)."""

    of = "clips"

    def check(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[2] != 3:
            raise ValueError(f"clips are {images.dtype} {tuple(images.shape)}; expected uint8 (B, F, 3, H, W)")


class I3DFeatures(ClipFeatures):
    """The I3D network of action recognition in TorchScript, as the field computes FVD since StyleGAN-V.

    The file is called with clips (B, 3, F, H, W) in 0..255 and ``rescale=True, resize=True, return_features=True``: it
    scales to -1..1, resizes to 224 and returns the 400 numbers before the softmax.

    Args:
        file: the network; default: ``i3d_torchscript.pt`` in genssm's cache.
        device: where it runs.
    Raises:
        FileNotFoundError: there is no such file; says where it comes from and where it may lie.
        ValueError: the file holds something else.
    """

    def __init__(self, file: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        file = cache_folder() / I3D_FILE if file is None else Path(file)
        if not file.is_file():
            raise FileNotFoundError(
                f"no I3D network {file}.\nFetch {I3D_URL}\n  and put it at\n  {cache_folder() / I3D_FILE}\nor name it "
                "with --features i3d:FILE; other networks: videomae:DIR, torchscript:FILE, frames:NET"
            )
        network, name, digest = load_torchscript(file)
        self.network = network.to(self.device).eval()
        self.protocol = FeatureProtocol(name, digest, "224 by the network", is_fid=False, library="TorchScript")

    def extract(self, images: Tensor) -> Tensor:
        x = images.to(self.device).permute(0, 2, 1, 3, 4).float()  # (B, 3, F, H, W)
        return call_torchscript(self.network, self.protocol.name, x, rescale=True, resize=True, return_features=True)


class VideoMAEFeatures(ClipFeatures):
    """The mean of the last tokens of a VideoMAE saved by transformers (the features of Ge et al. 2024 are of its kind).

    Frames are resized by Pillow's bicubic filter with antialias (clean-fid) to the network's square.

    Args:
        folder: with ``config.json`` and weights; default: the network's place in genssm's cache.
        device: where the network runs.
    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: transformers is not installed.
        ValueError: the folder holds another kind of network.
    """

    def __init__(self, folder: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        folder = cache_folder() / VIDEOMAE if folder is None else Path(folder)
        weights = next((f for f in sorted(folder.glob("*")) if f.suffix in (".safetensors", ".bin")), None)
        if weights is None or not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"no VideoMAE in {folder}: expected config.json and weights as transformers saves them; put the files "
                f"of MCG-NJU/{VIDEOMAE} there or name another folder with --features videomae:DIR"
            )
        self.network = _load_videomae(folder).to(self.device).eval()
        self.size = self.network.config.image_size
        self.mean, self.deviation = (torch.tensor(v, device=self.device).reshape(3, 1, 1) for v in IMAGENET)
        self._resize = build_resizer("clean", self.size)
        self.protocol = FeatureProtocol(
            name=f"VideoMAE {folder.name}",
            weights_sha256=file_hash(weights),
            resize=f"Pillow bicubic {self.size}",
            is_fid=False,
            library=f"transformers {version('transformers')}",
        )

    def extract(self, images: Tensor) -> Tensor:
        count, frames = images.shape[:2]
        if frames != self.network.config.num_frames:
            raise ValueError(
                f"{self.protocol.name} reads {self.network.config.num_frames} frames, the clips have {frames}; "
                "set --num-frames"
            )
        x = self._resize(images.flatten(0, 1)).to(self.device) / 255  # (B F, 3, size, size)
        x = ((x - self.mean) / self.deviation).unflatten(0, (count, frames))
        return self.network(x).last_hidden_state.mean(1)


class UserClipFeatures(ClipFeatures, UserFeatures):
    """A network of the user's: any callable from uint8 clips (B, F, 3, H, W) on ``device`` to features (B, C).

    It does its own resizing and scaling. A module is put in evaluation mode on ``device``; a class is built first.
    """


class FrameFeatures(ClipFeatures):
    """The features of every frame in a network of images: F vectors of each clip, which know nothing of motion.

    Args:
        network: of images.
        num_frames: F.
    """

    of: ClassVar[str] = "frames"

    def __init__(self, network: FeatureExtractor, num_frames: int) -> None:
        super().__init__(network.device)
        self.network, self.rows = network, num_frames
        self.protocol, self.gaussian = network.protocol, network.gaussian

    def extract(self, images: Tensor) -> Tensor:
        return self.network(images.flatten(0, 1))  # (B F, C)


def build_clip_extractor(
    spec: str,
    num_frames: int,
    *,
    resize: str | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> ClipFeatures:
    """A feature network of clips from its name on the command line.

    Args:
        spec: ``i3d`` or ``i3d:FILE``; ``videomae`` or ``videomae:DIR``; ``torchscript:FILE`` or ``module:function``,
            called with uint8 (B, F, 3, H, W); or ``frames:NET``: every frame in a network NET of
            :func:`genssm.metrics.features.build_extractor`, or in ``clip`` or ``dinov2``, perhaps with ``:DIR``.
        num_frames: frames of the clips.
        resize, weights: of ``frames:inception`` alone.
        device: where the network runs.
    Raises:
        ValueError: the text means none of these, or ``resize`` or ``weights`` is given with another network.
        FileNotFoundError: there is no such file.
        ImportError: a module cannot be imported.
    """
    kind, _, rest = spec.partition(":")
    if kind == "frames":
        name, _, folder = rest.partition(":")
        if name not in VisionFeatures.published:
            return FrameFeatures(build_extractor(rest, resize=resize, weights=weights, device=device), num_frames)
    for option, value in (("--resize-mode", resize), ("--weights", weights)):
        if value is not None:
            raise ValueError(f"{option} is for frames:inception; --features {spec} has none")
    if kind == "frames":
        return FrameFeatures(VisionFeatures(name, folder or None, device), num_frames)
    if kind == "i3d":
        return I3DFeatures(rest or None, device)
    if kind == "videomae":
        return VideoMAEFeatures(rest or None, device)
    if not rest:
        raise ValueError(
            f"features {spec!r}; expected i3d[:FILE], videomae[:DIR], torchscript:FILE, module:function or frames:NET"
        )
    if kind == "torchscript":
        return UserClipFeatures(*load_torchscript(Path(rest)), "TorchScript", device)
    function, digest = import_function(kind, rest)
    return UserClipFeatures(function, spec, digest, device=device)


def _load_videomae(folder: Path) -> nn.Module:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("VideoMAE features need transformers; pip install genssm[text]")
    from transformers import AutoConfig, VideoMAEModel

    found = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if found != "videomae":
        raise ValueError(f"{folder} holds a {found} network; expected a VideoMAE")
    return VideoMAEModel.from_pretrained(folder, local_files_only=True)
