"""Further feature networks: the Inception of torch-fidelity for the ADM evaluator's metrics, DINOv2 and CLIP.

All read local files only; where one is missing the error names the file, where it comes from and where it may lie.
"""

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from genssm.metrics.features import FeatureExtractor, FeatureProtocol, build_resizer, load_tensors
from genssm.metrics.weights import INCEPTION_FILES, cache_folder, file_hash, find_inception

POOL, LOGITS, SPATIAL = 2048, 1008, 7 * 17 * 17  # lengths of the parts of an AdmFeatures vector
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class AdmFeatures(FeatureExtractor):
    """The network and resize nearest to the ADM evaluator, run by torch-fidelity: three kinds of features in one pass.

    The TensorFlow graph of 2015-12-05 in PyTorch, with TensorFlow 1's bilinear resize. ``pool`` (2048) are the features
    of FID, precision and recall; ``logits`` (1008, without bias) those of the inception score; ``spatial`` (2023) those
    of sFID (Nash et al. 2021): 7 channels of the 17 x 17 map after the 1 x 1 branch of the block ``mixed_6``.

    Args:
        weights: the weight file; default: genssm's cache, then torch hub's, then the network.
        device: where the network runs.
    Raises:
        FileNotFoundError: there is no weight file and it cannot be fetched.
        ImportError: torch-fidelity is not installed.
    """

    parts: ClassVar[dict[str, slice]] = {
        "pool": slice(0, POOL),
        "logits": slice(POOL, POOL + LOGITS),
        "spatial": slice(POOL + LOGITS, POOL + LOGITS + SPATIAL),
    }  # fmt: skip
    gaussian = parts["pool"]

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ImportError("is, sfid, precision and recall need torch-fidelity; pip install genssm[eval]")
        known = INCEPTION_FILES["fidelity"]
        file, digest = find_inception(known, weights)
        self.network = _load_fidelity(file).to(self.device).eval()
        self._map: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.protocol = FeatureProtocol(
            name=f"{known.name} pool_3, logits, mixed_6" if digest == known.sha256 else file.name,
            weights_sha256=digest,
            resize="TensorFlow 1 bilinear 299",
            is_fid=digest == known.sha256,
            library=f"torch-fidelity {version('torch-fidelity')}",
        )

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._map = output

    def extract(self, images: Tensor) -> Tensor:
        pool, logits = self.network(images.to(self.device))  # (B, 2048), (B, 1008)
        spatial = self._map[:, :7].flatten(1)  # (B, 7 * 17 * 17)
        return torch.cat([pool, logits, spatial.float()], 1)


class VisionFeatures(FeatureExtractor):
    """A vision transformer saved by transformers: class-token features of DINOv2, or image embeddings of CLIP.

    Images are resized by Pillow's bicubic filter with antialias (clean-fid) to a square and normalised as the network's
    training images were.

    Args:
        kind: ``dinov2`` (FD-DINOv2, Stein et al. 2023) or ``clip`` (CMMD, Jayasumana et al. 2024; embeddings of length
            one).
        folder: with ``config.json`` and weights; default: the network's place in genssm's cache.
        device: where the network runs.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds another kind of network.
    """

    published: ClassVar[dict[str, tuple[str, str, int | None]]] = {
        "dinov2": ("facebook/dinov2-large", "dinov2-large", 224),
        "clip": ("openai/clip-vit-large-patch14-336", "clip-vit-large-patch14-336", None),
    }

    def __init__(self, kind: str, folder: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        source, name, size = self.published[kind]
        folder = cache_folder() / name if folder is None else Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"no {kind} network in {folder}: expected config.json and weights as transformers saves them; put the "
                f"files of {source} there or name another folder with --{kind} (of clips: frames:{kind}:DIR)"
            )
        self.kind = kind
        self.network = _load_vision(kind, folder).to(self.device).eval()
        self.size = size or self.network.config.image_size
        mean, deviation = IMAGENET if kind == "dinov2" else CLIP
        self.mean, self.deviation = (torch.tensor(v, device=self.device).reshape(3, 1, 1) for v in (mean, deviation))
        self._resize = build_resizer("clean", self.size)
        weights = next((f for f in sorted(folder.glob("*")) if f.suffix in (".safetensors", ".bin")), None)
        self.protocol = FeatureProtocol(
            name=f"{kind} {folder.name}",
            weights_sha256=file_hash(weights),
            resize=f"Pillow bicubic {self.size}",
            is_fid=False,
            library=f"transformers {version('transformers')}",
        )

    def extract(self, images: Tensor) -> Tensor:
        x = self._resize(images).to(self.device) / 255  # (B, 3, size, size)
        x = (x - self.mean) / self.deviation
        if self.kind == "dinov2":
            return self.network(x).pooler_output  # (B, F)
        return nn.functional.normalize(self.network(x).image_embeds, dim=1)


def _load_fidelity(file: Path) -> nn.Module:
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    state = load_tensors(file)
    fetch = fidelity.load_state_dict_from_url
    # It reads local files without weights_only; give it the tensors in place of its download instead.
    fidelity.load_state_dict_from_url = lambda *args, **kwargs: state
    try:
        return fidelity.FeatureExtractorInceptionV3("genssm", ["2048", "logits_unbiased"], verbose=False)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the Inception weights of torch-fidelity: {error}") from None
    finally:
        fidelity.load_state_dict_from_url = fetch


def _load_vision(kind: str, folder: Path) -> nn.Module:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(f"{kind} features need transformers; pip install genssm[text]")
    from transformers import AutoConfig, CLIPVisionModelWithProjection, Dinov2Model

    found = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if found not in (("dinov2",) if kind == "dinov2" else ("clip", "clip_vision_model")):
        raise ValueError(f"{folder} holds a {found} network; {kind} features need another")
    network = Dinov2Model if kind == "dinov2" else CLIPVisionModelWithProjection
    return network.from_pretrained(folder, local_files_only=True)
