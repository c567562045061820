"""Motion capture of any skeleton, and its way to the joints of HumanML3D.

F frames, N joints of the recording, T frames and 22 joints after the conversion.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from genssm.motion import T2M, Skeleton
from genssm.motion.kinematics import named_frames

logger = logging.getLogger("genssm")

# Ours -> theirs: one name, or names with weights. Names are compared in lower case without punctuation and namespace.
JointMap = Mapping[str, str | Mapping[str, float]]


_SPINE = ("pelvis", "spine1", "spine2", "spine3", "neck", "head")
_LIMBS = ("hip", "knee", "ankle", "foot", "shoulder", "elbow", "wrist")
_SIDES = ("left", "right")


def _body(spine: Sequence[str | Mapping[str, float]], limbs: Sequence[str], collar: str | None = None) -> JointMap:
    """A joint map from names with "{side}" (left, right) or "{s}" (l, r) for the limbs.

    Without a ``collar``, because the recording has it at the chest itself, it is put on the way to the shoulder.
    """
    table = dict(zip(_SPINE, spine))
    for side in _SIDES:
        names = [name.format(side=side, s=side[0]) for name in limbs]
        table |= {f"{side}_{ours}": theirs for ours, theirs in zip(_LIMBS, names)}
        between = {spine[3]: 0.65, names[4]: 0.35}
        table[f"{side}_collar"] = collar.format(side=side, s=side[0]) if collar else between
    return table


_MOTION_BUILDER = (
    "{side}UpLeg",
    "{side}Leg",
    "{side}Foot",
    "{side}ToeBase",
    "{side}Arm",
    "{side}ForeArm",
    "{side}Hand",
)

JOINT_MAPS: dict[str, JointMap] = {
    "t2m": {name: name for name in T2M.joint_names},
    # CMU originals (ASF/AMC): a joint is the end of the bone of that name.
    "cmu_asf": _body(
        ("root", "lowerback", "upperback", "thorax", "lowerneck", "head"),
        ("{s}hipjoint", "{s}femur", "{s}tibia", "{s}foot", "{s}clavicle", "{s}humerus", "{s}radius"),
    ),
    # CMU as BVH and as exponential maps.
    "cmu_bvh": _body(("Hips", "Spine", "Spine1", "Neck", "Neck1", "Head_end"), _MOTION_BUILDER),
    # CMU as BVH for 3ds Max.
    "cmu_3dsmax": _body(
        ("Hips", "Chest", "Chest2", "lowerneck", "Neck", "Head_end"),
        ("{side}Hip", "{side}Knee", "{side}Ankle", "{side}Toe", "{side}Shoulder", "{side}Elbow", "{side}Wrist"),
    ),
    "mixamo": _body(("Hips", "Spine", "Spine1", "Spine2", "Neck", "Head"), _MOTION_BUILDER, "{side}Shoulder"),
    "lafan": _body(
        ("Hips", "Spine", "Spine1", "Spine2", "Neck", "Head"),
        ("{side}UpLeg", "{side}Leg", "{side}Foot", "{side}Toe", "{side}Arm", "{side}ForeArm", "{side}Hand"),
        "{side}Shoulder",
    ),
    "bandai_namco": _body(
        ("Hips", "Spine", {"Spine": 0.5, "Chest": 0.5}, "Chest", "Neck", "Head"),
        ("UpperLeg_{s}", "LowerLeg_{s}", "Foot_{s}", "Toes_{s}", "UpperArm_{s}", "LowerArm_{s}", "Hand_{s}"),
        "Shoulder_{s}",
    ),
}


@dataclass(frozen=True, eq=False)
class Recording:
    """Positions of a recording's joints.

    Attributes:
        joint_names: N names; the end of a chain without a name of its own is called ``<joint>_end``.
        positions: (F, N, 3) float64, in the file's unit.
        fps: frames per second.
        source: what a message calls it.
    """

    joint_names: tuple[str, ...]
    positions: torch.Tensor
    fps: float
    source: str

    def frames(self, start: int, stop: int | None = None) -> "Recording":
        """A part of the recording."""
        return replace(self, positions=self.positions[start:stop])

    def without_rest_pose(self) -> "Recording":
        """The recording without its first frame where that one is a pose for setting up, seen by the jump after it."""
        steps = (self.positions.diff(dim=0)).norm(dim=-1).mean(-1)  # (F - 1,)
        if len(steps) < 3 or steps[0] <= 4 * steps[1:].max():
            return self
        logger.info("%s: frame 0 jumps into frame 1; taken for a rest pose and dropped", self.source)
        return self.frames(1)

    def to_joints(
        self,
        skeleton: Skeleton = T2M,
        *,
        joint_map: JointMap | str | None = None,
        fps: float | None = None,
        scale: float | None = None,
        up: str = "y",
    ) -> torch.Tensor:
        """Joints of ``skeleton``, +Y up, at its frame rate.

        Args:
            skeleton: whose joints are wanted.
            joint_map: ours -> theirs for every joint, a name of :data:`JOINT_MAPS`, or None to find the one that fits.
            fps: frame rate of the result; None takes the skeleton's.
            scale: factor into the skeleton's unit; None makes the legs as long as those of the skeleton's body, which
                is what features do anyway, and leaves joints as they are for a skeleton without bone lengths.
            up: "y" or "z", the recording's vertical axis.
        Returns:
            (T, J, 3) float32.
        Raises:
            ValueError: joints cannot be found, the frame rate is lower than wanted by more than a half, or values are
                not finite.
        """
        if up not in ("y", "z"):
            raise ValueError(f"up is {up!r}; expected y or z")
        bad = (~self.positions.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{self.source}: positions are not finite in {named_frames(bad)}")
        joints = self._mapped(skeleton, joint_map)
        if up == "z":
            joints = torch.stack([joints[..., 0], joints[..., 2], -joints[..., 1]], -1)
        joints = resample(joints, self.fps, fps or skeleton.fps)
        if scale is None and skeleton.bone_lengths is None:
            scale = 1.0
        elif scale is None:
            legs = list(skeleton.legs)
            scale = float(skeleton.offsets(joints)[legs].abs().sum() / skeleton.lengths_of(joints[0])[legs].sum())
        return (joints * scale).float()

    def _mapped(self, skeleton: Skeleton, joint_map: JointMap | str | None) -> torch.Tensor:
        places = {_plain(name): i for i, name in enumerate(self.joint_names)}
        table = fitting_joint_map(self.joint_names) if joint_map is None else joint_map
        if table is None:
            raise ValueError(
                f"{self.source}: none of the joint maps {', '.join(JOINT_MAPS)} fits the joints "
                f"{', '.join(self.joint_names)}; give joint_map, the names of {skeleton.name} to theirs"
            )
        if isinstance(table, str):
            if table not in JOINT_MAPS:
                raise ValueError(f"joint map {table!r} is unknown; there are {', '.join(JOINT_MAPS)}")
            table = JOINT_MAPS[table]
        columns = []
        for ours in skeleton.joint_names:
            if ours not in table:
                raise ValueError(
                    f"{self.source}: the joint map names nothing for {ours!r} of skeleton {skeleton.name!r}"
                )
            theirs = table[ours]
            mixture = {theirs: 1.0} if isinstance(theirs, str) else theirs
            missing = [name for name in mixture if _plain(name) not in places]
            if missing:
                raise ValueError(f"{self.source} has no joint {missing[0]!r}; it has {', '.join(self.joint_names)}")
            columns.append(sum(self.positions[:, places[_plain(name)]] * share for name, share in mixture.items()))
        return torch.stack(columns, 1)


def fitting_joint_map(names: Sequence[str]) -> str | None:
    """The name of the joint map whose joints are all among ``names``, or None."""
    present = {_plain(name) for name in names}
    for key, table in JOINT_MAPS.items():
        if {
            _plain(n) for theirs in table.values() for n in ([theirs] if isinstance(theirs, str) else theirs)
        } <= present:
            return key
    return None


def resample(positions: torch.Tensor, fps: float, target: float) -> torch.Tensor:
    """Positions (F, ...) at another frame rate: every k-th frame where that is exact, else between neighbours.

    Raises:
        ValueError: the recording has fewer than half of the frames wanted.
    """
    step = fps / target
    if step < 0.5:
        raise ValueError(f"the recording has {fps:g} frames per second, {target:g} are wanted; too few to fill in")
    if abs(step - round(step)) < 1e-3:
        return positions[:: round(step)]
    count = int((len(positions) - 1) / step) + 1
    times = torch.arange(count, dtype=torch.float64) * step
    before = times.floor().long().clamp(max=len(positions) - 1)
    after = (before + 1).clamp(max=len(positions) - 1)
    share = (times - before).reshape(-1, *[1] * (positions.ndim - 1))
    return positions[before] * (1 - share) + positions[after] * share


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rpartition(":")[2].lower())
