"""Data sets of motion on disk: HumanML3D and KIT-ML as published, and folders of recordings (BVH, ASF/AMC, joints).

A folder in the published layout holds ``new_joint_vecs/<id>.npy`` (features), ``texts/<id>.txt`` (captions),
``Mean.npy``, ``Std.npy`` and ``<split>.txt`` (ids). ``python -m genssm.data.motion.prepare`` writes recordings in that
layout, with two files more: ``labels.json`` (id -> class) and ``skeleton.json``.
"""

import csv
import hashlib
import io
import json
import logging
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import torch

from genssm.data.motion.asf_amc import read_amc, read_asf
from genssm.data.motion.bvh import read_bvh
from genssm.data.motion.clips import Caption, Clip, TimedCaption, cut_clips, finite_clips, read_captions
from genssm.data.motion.expmap import read_expmap
from genssm.data.motion.recording import JointMap, Recording
from genssm.motion import T2M, FeatureStatistics, Skeleton, features_to_joints, skeleton_of_features

logger = logging.getLogger("genssm")
# Where the published data sets lie below the folder that a user names.
PUBLISHED_ROOTS = (
    *("", "HumanML3D", "humanml3d", "KIT-ML", "kit-ml", "dataset/HumanML3D", "dataset/KIT-ML", "datasets/humanml3d"),
    *("datasets/kit-ml", "HumanML3D/HumanML3D"),
)
SPLITS = ("train", "val", "test", "train_val", "all")
RECORDINGS = (".bvh", ".amc", ".npy", ".txt")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")


@dataclass(frozen=True, eq=False)
class MotionFolder:
    """What was read from a folder.

    Attributes:
        clips: of the split.
        skeleton: of the features.
        statistics: of the data set's training part, or None.
        class_names: of all splits, in alphabetical order; empty unless every clip has a class.
    """

    clips: list[Clip]
    skeleton: Skeleton
    statistics: FeatureStatistics | None
    class_names: tuple[str, ...]


def load_array(file: str | Path | BinaryIO, name: str | Path) -> torch.Tensor:
    """Numbers of a .npy file, float64.

    Raises:
        ValueError: it is none, or damaged; the message calls it ``name``.
    """
    try:
        array = np.load(file)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of arrays")
        return torch.from_numpy(array.astype(np.float64))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} holds no numbers as .npy, or is damaged: {error}") from None


def class_names(labels: Iterable[str | None]) -> tuple[str, ...]:
    """The different labels in alphabetical order; empty when one is missing."""
    found = set(labels)
    return () if None in found else tuple(sorted(found))


def find_published(path: str | Path) -> Path | None:
    """The folder in the published layout at ``path`` or in one of the usual places below it."""
    for place in PUBLISHED_ROOTS:
        if (Path(path) / place / "new_joint_vecs").is_dir():
            return Path(path) / place
    return None


def open_published(path: str | Path, split: str) -> MotionFolder:
    """A data set in the published layout.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing; the message names it and the places looked at.
        ValueError: unknown split, features of an unknown length, or a line of captions that cannot be read.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected {', '.join(SPLITS)}")
    root = find_published(path)
    if root is None:
        places = ", ".join(str(Path(path) / place / "new_joint_vecs") for place in PUBLISHED_ROOTS[:4])
        raise FileNotFoundError(f"no motion data set at {path}; looked for {places} and further usual places")
    for name in ("texts", "Mean.npy", "Std.npy", f"{split}.txt"):
        if not (root / name).exists():
            raise FileNotFoundError(f"the motion data set {root} lacks {root / name}")
    statistics = FeatureStatistics.load(root / "Mean.npy", root / "Std.npy")
    described = root / "skeleton.json"
    if described.is_file():
        skeleton = Skeleton.from_config(json.loads(described.read_text(encoding="utf-8")))
    else:
        skeleton = skeleton_of_features(len(statistics.mean))
    labels = root / "labels.json"
    classes = json.loads(labels.read_text(encoding="utf-8")) if labels.is_file() else {}
    lines = (root / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    ids = [line.strip() for line in lines if line.strip()]  # a name may hold blanks
    clips = list(_published_clips(root, ids, skeleton.feature_dim, classes))
    if not clips:
        raise FileNotFoundError(f"none of the {len(ids)} clips of {root / split}.txt is in {root / 'new_joint_vecs'}")
    names = class_names(classes.values()) if all(clip.label is not None for clip in clips) else ()
    clips = finite_clips(clips)
    if skeleton.bone_lengths is None and clips:  # KIT-ML: every clip is of the target body
        skeleton = skeleton.with_lengths_of(features_to_joints(clips[0].features[:1], skeleton))
    return MotionFolder(clips, skeleton, statistics, names)


def with_lengths_from(skeleton: Skeleton, source: str | Path) -> Skeleton:
    """The skeleton with the body of a user's clip as the target body of its features.

    Published features are of one target body each; that of KIT-ML is not shipped, but every clip of it has its bones.

    Args:
        skeleton: of the clip.
        source: joints (T, J, 3) or features (T, dim, not normalised) as .npy, whose first frame is taken; a
            ``skeleton.json`` that ``prepare`` wrote; or a folder: a motion data set, or .npy files, the first by name.
    Raises:
        FileNotFoundError: no such file, or no clip in the folder.
        ValueError: a clip of another skeleton, values that are not finite, or a bone without length.
    """
    path = _body_in(Path(source)) if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no clip or folder at {path} to take bone lengths from")
    if path.suffix == ".json":
        lengths = Skeleton.from_config(json.loads(path.read_text(encoding="utf-8"))).bone_lengths
        if lengths is None or len(lengths) != skeleton.num_joints:
            raise ValueError(f"{path} holds no bone lengths of the {skeleton.num_joints} joints of {skeleton.name!r}")
        return replace(skeleton, bone_lengths=lengths)
    if path.suffix != ".npy":
        raise ValueError(f"{path}: bone lengths come from joints or features as .npy, a skeleton.json, or a folder")
    clip = load_array(path, path).double()
    shapes = {2: (skeleton.feature_dim,), 3: (skeleton.num_joints, 3)}
    if clip.shape[1:] != shapes.get(clip.ndim) or len(clip) == 0:
        raise ValueError(
            f"{path} has shape {tuple(clip.shape)}; skeleton {skeleton.name!r} has joints "
            f"(T, {skeleton.num_joints}, 3) and features (T, {skeleton.feature_dim})"
        )
    joints = features_to_joints(clip[:1], skeleton) if clip.ndim == 2 else clip
    lengths = skeleton.lengths_of(joints[0])
    if not lengths.isfinite().all() or lengths[1:].min() <= 0:
        joint = skeleton.joint_names[1 + int(lengths[1:].nan_to_num(0.0, 0.0).argmin())]
        raise ValueError(f"{path}: the bone to {joint!r} has no length in frame 0; take another clip")
    return skeleton.with_lengths_of(joints)


def _body_in(folder: Path) -> Path:
    """The file of a folder that shows the target body."""
    root = find_published(folder) or folder
    if (root / "skeleton.json").is_file():
        return root / "skeleton.json"
    for place in (root / "new_joints", root / "new_joint_vecs", root):
        clips = sorted(place.glob("*.npy"))
        if clips:
            return clips[0]
    raise FileNotFoundError(f"{folder} holds no clip (.npy) to take bone lengths from")


def _published_clips(root: Path, ids: list[str], dim: int, classes: Mapping[str, str]) -> Iterator[Clip]:
    missing = []
    for name in ids:
        vectors, texts = root / "new_joint_vecs" / f"{name}.npy", root / "texts" / f"{name}.txt"
        absent = [file for file in (vectors, texts) if not file.is_file()]
        if absent:
            missing.append(absent[0])
            continue
        features = load_array(vectors, vectors).float()
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"{vectors} has shape {tuple(features.shape)}; expected (T, {dim})")
        captions = read_captions(texts.read_text(encoding="utf-8"), str(texts))
        yield from cut_clips(name, features, captions, classes.get(name))
    if missing:
        logger.warning(
            "%d of %d clips are left out because files are missing, first %s", len(missing), len(ids), missing[0]
        )


@dataclass(frozen=True, eq=False)
class Described:
    """A recording of a folder with its captions, class and part of the data set."""

    name: str
    read: Callable[[], Recording | torch.Tensor]
    captions: tuple[TimedCaption, ...]
    label: str | None = None
    split: str | None = None

    def in_split(self, split: str) -> bool:
        """Whether the recording belongs to a split; one that is not told gets it from a hash of its name (8:1:1)."""
        part = self.split
        if part is None:
            place = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "little") % 10
            part = {0: "test", 1: "val"}.get(place, "train")
        return split == "all" or split == part or (split == "train_val" and part in ("train", "val"))

    def joints(
        self,
        skeleton: Skeleton = T2M,
        *,
        joint_map: JointMap | str | None = None,
        fps: float | None = None,
        up: str = "y",
    ) -> torch.Tensor:
        """Joints (T, J, 3) at the skeleton's frame rate, see :meth:`Recording.to_joints`; ``fps`` is that of a .npy."""
        found = self.read()
        if isinstance(found, torch.Tensor):
            if found.ndim != 3 or found.shape[1:] != (skeleton.num_joints, 3) or not len(found):
                raise ValueError(f"{self.name} has shape {tuple(found.shape)}; expected (T, {skeleton.num_joints}, 3)")
            found = Recording(skeleton.joint_names, found.double(), fps or skeleton.fps, self.name)
            joint_map = {name: name for name in skeleton.joint_names}
        return found.to_joints(skeleton, joint_map=joint_map, up=up)


@dataclass
class _Files:
    """Files by path; those in archives are read in memory, never unpacked."""

    root: Path
    readers: dict[str, Callable[[], bytes]] = field(default_factory=dict)

    @classmethod
    def below(cls, root: Path) -> "_Files":
        """All files of a folder and of the archives in it; ValueError if one of these cannot be read."""
        files = cls(root)
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            if not path.name.endswith(ARCHIVES):
                files.readers[path.relative_to(root).as_posix()] = path.read_bytes
                continue
            try:
                with tarfile.open(path) as archive:
                    for member in archive:
                        if member.isfile():
                            content = archive.extractfile(member).read()
                            files.readers[member.name] = lambda content=content: content
            except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                raise ValueError(f"archive {path} cannot be read: {error}") from None
        return files

    @classmethod
    def beside(cls, path: Path) -> "_Files":
        """A file and the skeletons (.asf) beside it."""
        near = [path, *(other for other in path.parent.iterdir() if other.suffix.lower() == ".asf")]
        return cls(path.parent, {file.name: file.read_bytes for file in near})

    def text(self, name: str) -> str:
        return self.readers[name]().decode("utf-8", errors="replace")

    def find(self, wanted: str) -> str | None:
        """The file whose path ends in ``wanted``, or the recording whose path does but for its ending."""
        parts = PurePosixPath(wanted).parts
        for name in self.readers:
            path = PurePosixPath(name)
            bare = path.with_suffix("").parts if path.suffix.lower() in RECORDINGS else ()
            if path.parts[-len(parts) :] == parts or bare[-len(parts) :] == parts:
                return name
        return None


def describe_recording(path: str | Path) -> Described:
    """One recording, named and captioned by its file name; an AMC file's skeleton lies beside it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no recording.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recording at {path}")
    files = _Files.beside(path)
    return Described(path.stem, _reader(files, path.name), (TimedCaption(Caption.of(_words_of(path.name)), 0.0, 0.0),))


def describe_recordings(path: str | Path) -> list[Described]:
    """The recordings of a folder, also inside of .tar archives, each with its captions.

    Captions and classes come from the first CSV file with a column ``path`` (or ``file``, ``name``) and ``captions``
    (several divided by " | "; or ``caption``, ``text``), ``action`` (or ``label``, ``class``) and ``split``. Without
    one, captions come from ``<name>.txt`` beside a recording, or else the file's name is its caption and its class.

    Raises:
        FileNotFoundError: no folder, no recording, or one that the CSV file names is missing.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"no folder of recordings at {path}")
    files = _Files.below(Path(path))
    table = next((name for name in files.readers if name.endswith(".csv") and _rows(files, name)), None)
    found = list(_from_table(files, table) if table else _from_names(files))
    if not found:
        raise FileNotFoundError(f"{path} holds no recording (.bvh, .amc with its .asf, joints as .npy)")
    return found


def _rows(files: _Files, name: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(files.text(name))))
    return rows if rows and _column(rows[0], "path", "file", "name") else []


def _column(row: Mapping[str, str], *names: str) -> str | None:
    """The first filled one of the columns."""
    return next((row[name].strip() for name in names if (row.get(name) or "").strip()), None)


def _from_table(files: _Files, table: str) -> Iterator[Described]:
    for row in _rows(files, table):
        wanted = _column(row, "path", "file", "name")
        name = files.find(wanted)
        if name is None:
            raise FileNotFoundError(f"{files.root / table} names {wanted}, which is neither there nor in an archive")
        label = _column(row, "action", "label", "class")
        texts = _column(row, "captions", "caption", "text") or label or _words_of(name)
        captions = [TimedCaption(Caption.of(text.strip()), 0.0, 0.0) for text in texts.split(" | ")]
        split = _column(row, "split")
        yield Described(_name_of(name), _reader(files, name), tuple(captions), label, split)


def _from_names(files: _Files) -> Iterator[Described]:
    for name in files.readers:
        if not name.lower().endswith(RECORDINGS) or (name.lower().endswith(".txt") and not _is_expmap(files, name)):
            continue
        beside = str(PurePosixPath(name).with_suffix(".txt"))
        if beside != name and beside in files.readers:
            captions, label = read_captions(files.text(beside), beside), None
        else:
            label = _words_of(name)
            captions = [TimedCaption(Caption.of(label), 0.0, 0.0)]
        yield Described(_name_of(name), _reader(files, name), tuple(captions), label)


def _reader(files: _Files, name: str) -> Callable[[], Recording | torch.Tensor]:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".bvh":
        return lambda: read_bvh(files.text(name), name).recording()
    if suffix == ".amc":
        return lambda: read_amc(files.text(name), read_asf(*_skeleton_of(files, name)), source=name)
    if suffix == ".npy":
        return lambda: load_array(io.BytesIO(files.readers[name]()), name)
    if suffix == ".txt":
        return lambda: read_expmap(files.text(name), name)
    raise ValueError(f"{name} is no recording that can be read (.bvh, .amc, .npy, exponential maps as .txt)")


def _skeleton_of(files: _Files, name: str) -> tuple[str, str]:
    """Text and name of an AMC file's ASF file: of the same name, of the subject's number, or the only one there."""
    stem, folder = PurePosixPath(name).stem, PurePosixPath(name).parent
    there = [n for n in files.readers if n.lower().endswith(".asf") and PurePosixPath(n).parent == folder]
    for wanted in (stem, stem.split("_")[0]):
        for candidate in there:
            if PurePosixPath(candidate).stem == wanted:
                return files.text(candidate), candidate
    if len(there) == 1:
        return files.text(there[0]), there[0]
    raise FileNotFoundError(f"{name} needs its skeleton {stem.split('_')[0]}.asf beside it")


def _is_expmap(files: _Files, name: str) -> bool:
    first = files.readers[name]()[:4000].split(b"\n", 1)[0]
    return first.count(b",") == 116


def _name_of(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")).replace("/", "__")


def _words_of(name: str) -> str:
    """ "run/walk_fast-01.bvh" -> "walk fast"; the folder's name where the file's is all digits."""
    for part in (PurePosixPath(name).stem, PurePosixPath(name).parent.name):
        words = re.findall(r"[A-Za-z]+", part)
        if words:
            return " ".join(words).lower()
    return "motion"
