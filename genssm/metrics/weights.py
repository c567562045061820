"""Weight files of feature networks: which, where they are looked for, and what to do when there is no network."""

import hashlib
import logging
import os
import platform
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger("genssm")
TIMEOUT_S = 20
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class WeightFile:
    """A published file: name, where it is served, length in bytes, sha256."""

    name: str
    url: str
    size: int
    sha256: str


INCEPTION_FILES = {
    # TorchScript translation of the TensorFlow graph; clean-fid's modes clean and legacy_tensorflow.
    "torchscript": WeightFile(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        95_607_719,
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    ),
    # pytorch-fid's translation of the same graph; clean-fid's mode legacy_pytorch.
    "pytorch": WeightFile(
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        95_628_359,
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    # The same file under the name that torch-fidelity gives it: torch hub's names carry the beginning of the hash.
    "fidelity": WeightFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        95_628_359,
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
}


def cache_folder() -> Path:
    """Where genssm keeps weights: ``GENSSM_CACHE``, else ``XDG_CACHE_HOME``/genssm, else ``~/.cache/genssm``."""
    if os.environ.get("GENSSM_CACHE"):
        return Path(os.environ["GENSSM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genssm"


def candidates(known: WeightFile) -> list[Path]:
    """Places where ``known`` is looked for, in order: ours, then where clean-fid puts it."""
    if known.name.endswith(".pth"):
        theirs = Path(torch.hub.get_dir()) / "checkpoints"
    else:
        theirs = Path("." if platform.system() == "Windows" else "/tmp")
    return [cache_folder() / known.name, theirs / known.name]


def find_inception(known: WeightFile, weights: str | Path | None = None) -> tuple[Path, str]:
    """The file to load and its sha256.

    Args:
        known: the published file.
        weights: a file, or a folder that holds one called ``known.name``; taken as it is, whatever its hash.
    Returns:
        Path and sha256. Without ``weights`` the hash is always the published one.
    Raises:
        FileNotFoundError: nowhere found and not to be fetched.
        ValueError: the file found in a cache is not the published one.
    """
    if weights is not None:
        file = Path(weights) / known.name if Path(weights).is_dir() else Path(weights)
        if not file.is_file():
            raise FileNotFoundError(f"no Inception weights at {file}; expected the file {_describe(known)}")
        return file, file_hash(file)
    for file in candidates(known):
        if file.is_file():
            digest = file_hash(file)
            # These folders are written by programs, the second one perhaps by other people: never load what is not it.
            if digest != known.sha256:
                raise ValueError(
                    f"{file} ({file.stat().st_size} bytes, sha256 {digest}) is not {_describe(known)}: "
                    "a broken download; delete it, or pass it as explicit weights to use it all the same"
                )
            return file, digest
    return _download(known), known.sha256


def file_hash(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def short_hash(digest: str) -> str:
    """The first eight characters, for names."""
    return digest[:8]


def _download(known: WeightFile) -> Path:
    target = cache_folder() / known.name
    if any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE):
        raise _missing(known, f"{' or '.join(_OFFLINE)} forbids the network")
    logger.info("fetching %s to %s", known.url, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{known.name}.{os.getpid()}")
    try:
        digest = hashlib.sha256()
        with partial.open("wb") as out, urllib.request.urlopen(known.url, timeout=TIMEOUT_S) as response:
            while block := response.read(1 << 20):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != known.sha256:
            raise _missing(known, f"the download has sha256 {digest.hexdigest()}")
        os.replace(partial, target)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise _missing(known, f"no network ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _missing(known: WeightFile, reason: str) -> FileNotFoundError:
    places = "\n  ".join(str(path) for path in candidates(known))
    return FileNotFoundError(
        f"the Inception weights are not here and cannot be fetched: {reason}.\n"
        f"Fetch {known.url}\n  ({_describe(known)}) and put it at one of\n  {places}\n"
        f"or name it with --weights FILE. For small or grey images use --features classifier:FILE instead."
    )


def _describe(known: WeightFile) -> str:
    return f"{known.name}, {known.size} bytes, sha256 {known.sha256}"
