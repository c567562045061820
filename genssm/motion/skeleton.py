"""Skeletons: which joints there are, how they hang together and where bones point at rest.

:data:`T2M` (HumanML3D) and :data:`KIT` (KIT-ML) hold the constants that published features and checkpoints depend on
(Guo et al. 2022, "Generating Diverse and Natural 3D Human Motions from Text"). Any other tree is another
:class:`Skeleton`. All of them are +Y up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

_UNITS = {"+x": (1, 0, 0), "-x": (-1, 0, 0), "+y": (0, 1, 0), "-y": (0, -1, 0), "+z": (0, 0, 1), "-z": (0, 0, -1)}


@dataclass(frozen=True)
class Skeleton:
    """A tree of joints with the constants that turn joints into features.

    Attributes:
        name: of the skeleton.
        joint_names: J names; joint 0 is the root.
        chains: paths of joints from the root or from an earlier chain outwards; every joint but 0 ends one bone.
        directions: axis along which the bone to each joint points at rest, "+x" ... "-z"; "" for the root.
        across: (a, b, c, d): joints a - b (hips) and c - d (shoulders) point across the body; they define the heading.
        legs: two joints whose bones tell the size of a body.
        left_foot, right_foot: ankle and toe joints whose ground contact is a feature.
        contact_threshold: squared displacement per frame below which such a joint counts as resting.
        fps: frames per second of the features.
        metres: length of one unit of the joints.
        bone_lengths: length of the bone to each joint in the target body, 0 for the root; None where it is not known.
    """

    name: str
    joint_names: tuple[str, ...]
    chains: tuple[tuple[int, ...], ...]
    directions: tuple[str, ...]
    across: tuple[int, int, int, int]
    legs: tuple[int, int]
    left_foot: tuple[int, int]
    right_foot: tuple[int, int]
    contact_threshold: float
    fps: float
    metres: float = 1.0
    bone_lengths: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        ends = [joint for chain in self.chains for joint in chain[1:]]
        if sorted(ends) != list(range(1, self.num_joints)):
            raise ValueError(
                f"chains of skeleton {self.name!r} end in joints {sorted(ends)}; expected each of 1..J-1 once"
            )
        if len(self.directions) != self.num_joints or not set(self.directions[1:]) <= set(_UNITS):
            raise ValueError(
                f"skeleton {self.name!r} needs a direction of {', '.join(_UNITS)} for each joint but the root"
            )
        if self.bone_lengths is not None and len(self.bone_lengths) != self.num_joints:
            raise ValueError(
                f"skeleton {self.name!r} has {len(self.bone_lengths)} bone lengths, {self.num_joints} joints"
            )

    @property
    def num_joints(self) -> int:
        """J."""
        return len(self.joint_names)

    @property
    def feature_dim(self) -> int:
        """Length of a feature vector, 12 J - 1."""
        return 12 * self.num_joints - 1

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent of each joint, -1 for the root."""
        above = {joint: parent for chain in self.chains for parent, joint in pairwise(chain)}
        return tuple(above.get(joint, -1) for joint in range(self.num_joints))

    @cached_property
    def groups(self) -> dict[str, slice]:
        """Columns of a feature vector: what they hold -> where."""
        j = self.num_joints
        ends = {
            "yaw_velocity": 1,
            "linear_velocity": 3,
            "height": 4,
            "positions": 4 + 3 * (j - 1),
            "rotations": 4 + 9 * (j - 1),
            "velocities": 4 + 9 * (j - 1) + 3 * j,
            "contacts": self.feature_dim,
        }
        return {name: slice(start, end) for (name, end), start in zip(ends.items(), [0, *ends.values()])}

    def rest_directions(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors of the bones at rest, (J, 3), zero for the root; device and dtype of ``like``."""
        vectors = torch.tensor([_UNITS.get(direction, (0, 0, 0)) for direction in self.directions], dtype=torch.float32)
        return vectors if like is None else vectors.to(like)

    def offsets(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """Bones of the target body at rest, (J, 3).

        Raises:
            ValueError: the skeleton has no bone lengths.
        """
        if self.bone_lengths is None:
            raise ValueError(
                f"skeleton {self.name!r} ships no bone lengths, which features are made with; take them from a clip of "
                "your own: --lengths-from CLIP.npy or a data folder, skeleton.with_lengths_of(joints) in Python"
            )
        directions = self.rest_directions(like)
        return directions * directions.new_tensor(self.bone_lengths)[:, None]

    def lengths_of(self, pose: torch.Tensor) -> torch.Tensor:
        """Bone lengths of a pose (..., J, 3), (..., J), 0 for the root."""
        if pose.shape[-2:] != (self.num_joints, 3):
            raise ValueError(
                f"joints are {tuple(pose.shape)}; skeleton {self.name!r} expects (..., {self.num_joints}, 3)"
            )
        lengths = (pose[..., 1:, :] - pose[..., list(self.parents[1:]), :]).norm(dim=-1)
        return torch.cat([torch.zeros_like(lengths[..., :1]), lengths], -1)

    def with_lengths_of(self, joints: torch.Tensor) -> "Skeleton":
        """The same skeleton with the bone lengths of the first frame of a clip (T, J, 3) as its target body."""
        return replace(self, bone_lengths=tuple(float(length) for length in self.lengths_of(joints[0])))

    def makes_features_of(self, other: "Skeleton") -> bool:
        """Whether features of ``other`` mean the same; bone lengths that one of the two does not know are not asked."""
        if replace(self, bone_lengths=None) != replace(other, bone_lengths=None):
            return False
        if self.bone_lengths is None or other.bone_lengths is None:
            return True
        pairs = zip(self.bone_lengths, other.bone_lengths)
        return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) for a, b in pairs)

    def mirrored_joints(self) -> list[int]:
        """For each joint the one on the other side, by the names' "left" and "right"; the middle maps to itself."""
        swapped = [_other_side(name) for name in self.joint_names]
        return [self.joint_names.index(name) for name in swapped]

    def to_config(self) -> dict[str, Any]:
        """Plain values for a JSON file; :meth:`from_config` reads them."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: "str | Mapping[str, Any] | Skeleton") -> "Skeleton":
        """A skeleton from its name, from :meth:`to_config`, or itself."""
        if isinstance(config, Skeleton):
            return config
        if isinstance(config, str):
            if config not in SKELETONS:
                raise ValueError(f"no skeleton is called {config!r}; there are {', '.join(SKELETONS)}")
            return SKELETONS[config]
        return cls(**{name: _tuples(value) for name, value in config.items()})


def _other_side(name: str) -> str:
    if name.startswith("left"):
        return "right" + name.removeprefix("left")
    return "left" + name.removeprefix("right") if name.startswith("right") else name


def _tuples(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_tuples(item) for item in value)
    return value


T2M = Skeleton(
    name="t2m",
    joint_names=(
        *("pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle"),
        *("right_ankle", "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head"),
        *("left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist"),
    ),
    chains=((0, 2, 5, 8, 11), (0, 1, 4, 7, 10), (0, 3, 6, 9, 12, 15), (9, 14, 17, 19, 21), (9, 13, 16, 18, 20)),
    directions=(
        *("", "+x", "-x", "+y", "-y", "-y", "+y", "-y", "-y", "+y", "+z", "+z", "+y", "+x", "-x", "+z"),
        *("-y", "-y", "-y", "-y", "-y", "-y"),
    ),
    across=(2, 1, 17, 16),
    legs=(5, 8),
    left_foot=(7, 10),
    right_foot=(8, 11),
    contact_threshold=0.002,
    fps=20.0,
    bone_lengths=(
        *(0.0, 0.103074, 0.109883, 0.131568, 0.393623, 0.390188, 0.143190, 0.432433, 0.425644, 0.057365, 0.143382),
        *(0.149419, 0.219360, 0.137487, 0.143383, 0.103039, 0.131614, 0.122984, 0.256840, 0.263092, 0.266012, 0.269876),
    ),
)

# Sides as the published features name them: the joints of `right_foot` are the first pair of the face indices.
KIT = Skeleton(
    name="kit",
    joint_names=(
        *("pelvis", "spine1", "spine2", "neck", "head", "right_shoulder", "right_elbow", "right_wrist"),
        *("left_shoulder", "left_elbow", "left_wrist", "right_hip", "right_knee", "right_ankle", "right_heel"),
        *("right_foot", "left_hip", "left_knee", "left_ankle", "left_heel", "left_foot"),
    ),
    chains=((0, 11, 12, 13, 14, 15), (0, 16, 17, 18, 19, 20), (0, 1, 2, 3, 4), (3, 5, 6, 7), (3, 8, 9, 10)),
    directions=(
        *("", "+y", "+y", "+y", "+y", "+x", "-y", "-y", "-x", "-y", "-y", "+x", "-y", "-y", "+z", "+z"),
        *("-x", "-y", "-y", "+z", "+z"),
    ),
    across=(11, 16, 5, 8),
    legs=(17, 18),
    left_foot=(19, 20),
    right_foot=(14, 15),
    contact_threshold=0.05,
    fps=12.5,
    metres=0.001,
)

SKELETONS = {skeleton.name: skeleton for skeleton in (T2M, KIT)}


def skeleton_of_features(dim: int) -> Skeleton:
    """The published skeleton whose features have length ``dim``; ValueError where there is none."""
    for skeleton in SKELETONS.values():
        if skeleton.feature_dim == dim:
            return skeleton
    known = ", ".join(f"{skeleton.feature_dim} ({name})" for name, skeleton in SKELETONS.items())
    raise ValueError(f"features have length {dim}; the published skeletons have {known}")
