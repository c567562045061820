"""BVH files: reading any, and writing joints so that forward kinematics of the file gives the joints back.

F frames, N joints of a file with its end sites, J joints of a skeleton.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from genssm.data.motion.recording import Recording, fitting_joint_map
from genssm.motion import Skeleton
from genssm.motion.kinematics import check_joints
from genssm.motion.rotations import (
    AXES,
    between,
    euler_to_quaternion,
    inverse,
    matrix_to_quaternion,
    multiply,
    quaternion_to_euler,
    rotate,
)

Tensor = torch.Tensor
ORDER = "zyx"  # of written rotations: R = Rz Ry Rx, the order most tools write
_TOKEN = re.compile(r"[{}]|[^\s{}]+")


@dataclass
class BvhJoint:
    """A joint of a file: its parent (-1 for the root), its offset from there, and its channels ("Xposition", ...)."""

    name: str
    parent: int
    offset: Sequence[float]
    channels: tuple[str, ...] = ()


@dataclass
class Bvh:
    """A whole file.

    Attributes:
        joints: parents before children; ends of chains are joints without channels called ``<joint>_end``.
        values: one row per frame, (F, all channels) float64; angles in degrees.
        frame_time: seconds per frame.
        source: what messages call the file.
    """

    joints: list[BvhJoint]
    values: Tensor
    frame_time: float
    source: str = "the BVH file"

    def positions(self) -> Tensor:
        """Forward kinematics: positions of all joints, (F, N, 3) float64."""
        turns: list[Tensor] = []
        places: list[Tensor] = []
        column = 0
        for joint in self.joints:
            channels = self.values[:, column : column + len(joint.channels)]
            column += len(joint.channels)
            local, shift = _transform(joint, channels)
            if joint.parent < 0:
                turns.append(local)
                places.append(shift)
                continue
            above = turns[joint.parent]
            places.append(places[joint.parent] + rotate(above, shift))
            turns.append(multiply(above, local))
        return torch.stack(places, 1)

    def recording(self) -> Recording:
        """Positions with the joints' names, without a rest pose in frame 0 and with a missing thorax put back."""
        names = tuple(joint.name for joint in self.joints)
        restored = _with_thorax(self) if fitting_joint_map(names) in ("cmu_bvh", "cmu_3dsmax") else self
        return Recording(names, restored.positions(), 1 / self.frame_time, self.source).without_rest_pose()


def read_bvh(text: str, source: str = "the BVH file") -> Bvh:
    """Parse a BVH file.

    Raises:
        ValueError: the text is no BVH file, or its frames do not fit its channels.
    """
    head, found, motion = text.partition("MOTION")
    if not found or "HIERARCHY" not in head:
        raise ValueError(f"{source} is no BVH file: it needs the parts HIERARCHY and MOTION")
    try:
        joints = _hierarchy(_TOKEN.findall(head), source)
    except IndexError:  # a bracket too many, a line outside of all joints, or the end of the text within one
        raise ValueError(f"{source}: brackets or lines of the hierarchy are missing") from None
    lines = motion.strip().splitlines()
    if len(lines) < 2:
        raise ValueError(f"{source} says neither how many frames it has nor how long they take")
    frames, frame_time = int(lines[0].split()[-1]), float(lines[1].split()[-1])
    width = sum(len(joint.channels) for joint in joints)
    numbers = np.array(" ".join(lines[2:]).split(), dtype=np.float64)
    if len(numbers) != frames * width or not frames or frame_time <= 0:
        raise ValueError(
            f"{source} has {len(numbers)} numbers, not {frames} frames of {width} channels, {frame_time:g} s each"
        )
    return Bvh(joints, torch.from_numpy(numbers.reshape(frames, width)), frame_time, source)


def joints_to_bvh(joints: Tensor, skeleton: Skeleton, *, fps: float | None = None, scale: float = 100.0) -> Bvh:
    """A BVH file whose forward kinematics gives the joints back.

    Bones keep their mean length over the clip and their direction in each frame, so the round trip is exact where the
    clip's bones are rigid. Joints with several bones (pelvis, chest) take the rotation that fits them best; a helper
    joint of no length before each of these bones turns by the rest. At rest the body stands with arms to the sides.

    Args:
        joints: (T, J, 3), +Y up.
        skeleton: their skeleton.
        fps: frames per second; None takes the skeleton's.
        scale: file units per unit of the joints; 100 writes metres as centimetres.
    Raises:
        ValueError: shapes or values that are not finite.
    """
    check_joints(joints, skeleton)
    points = joints.detach().cpu().double() * scale
    rest = rest_pose(skeleton) * skeleton.lengths_of(points).mean(0)[:, None]  # (J, 3)
    children = [[c for c in range(skeleton.num_joints) if skeleton.parents[c] == j] for j in range(skeleton.num_joints)]
    made: list[BvhJoint] = []
    columns: list[Tensor] = []
    spin = tuple(f"{letter.upper()}rotation" for letter in ORDER)

    def add(name: str, parent: int, offset: Tensor, turn: Tensor) -> int:
        moving = ("Xposition", "Yposition", "Zposition") if parent < 0 else ()
        made.append(BvhJoint(name, parent, offset.tolist(), moving + spin))
        columns.extend([points[:, 0]] if parent < 0 else [])
        columns.append(_smooth_angles(turn))
        return len(made) - 1

    def visit(joint: int, parent: int, offset: Tensor, above: Tensor) -> None:
        """Write a joint and everything below; ``above`` is the rotation of what it hangs on, (T, 4)."""
        bones = [F.normalize(points[:, c] - points[:, joint], dim=-1) for c in children[joint]]
        local = [rotate(inverse(above), bone) for bone in bones]  # as the joint's parent sees them
        turn = _best_turn(rest[children[joint]], local) if local else _none(above)
        place = add(skeleton.joint_names[joint], parent, offset, turn)
        below = multiply(above, turn)
        for child, bone in zip(children[joint], bones):
            if len(children[joint]) == 1:
                visit(child, place, rest[child], below)
                continue
            correction = between(rest[child].expand_as(bone), rotate(inverse(below), bone))
            helper = add(f"{skeleton.joint_names[child]}_base", place, torch.zeros(3), correction)
            visit(child, helper, rest[child], multiply(below, correction))
        if not children[joint]:
            made.append(BvhJoint(f"{made[place].name}_end", place, (0.25 * offset).tolist()))

    identity = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=points.dtype).expand(len(points), 4)
    visit(0, -1, torch.zeros(3), identity)
    return Bvh(made, torch.cat(columns, 1), 1 / (fps or skeleton.fps), f"the BVH of a {skeleton.name} clip")


def write_bvh(path: str | Path, bvh: Bvh) -> None:
    """Write a file; offsets and channels have six decimals."""
    children = [[i for i, other in enumerate(bvh.joints) if other.parent == n] for n in range(len(bvh.joints))]
    lines = ["HIERARCHY"]

    def visit(number: int, indent: str) -> None:
        joint = bvh.joints[number]
        kind = "ROOT" if joint.parent < 0 else "JOINT"
        lines.append(f"{indent}{kind} {joint.name}" if joint.channels else f"{indent}End Site")
        lines.append(f"{indent}{{")
        lines.append(f"{indent}\tOFFSET {' '.join(f'{value:.6f}' for value in joint.offset)}")
        if joint.channels:
            lines.append(f"{indent}\tCHANNELS {len(joint.channels)} {' '.join(joint.channels)}")
        for child in children[number]:
            visit(child, indent + "\t")
        lines.append(f"{indent}}}")

    visit(0, "")
    lines += ["MOTION", f"Frames: {len(bvh.values)}", f"Frame Time: {bvh.frame_time:.7f}"]
    lines += [" ".join(f"{value:.6f}" for value in row) for row in bvh.values.tolist()]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def rest_pose(skeleton: Skeleton) -> Tensor:
    """Unit directions of bones in the pose that written files rest in, (J, 3): head up, arms to the sides."""
    directions = skeleton.rest_directions().double()
    for chain in skeleton.chains:
        if chain[0] != 0:  # an arm: every bone goes on as its first one
            directions[list(chain[2:])] = directions[chain[1]].clone()
    if "head" in skeleton.joint_names:
        directions[skeleton.joint_names.index("head")] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    return directions


def _transform(joint: BvhJoint, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Local rotation (F, 4) and shift from the parent (F, 3) of a joint."""
    shift = torch.tensor(joint.offset, dtype=torch.float64).repeat(len(channels), 1)
    angles = torch.zeros(len(channels), 3, dtype=torch.float64)
    order = ""
    for column, channel in enumerate(joint.channels):
        axis = AXES.index(channel[0].lower())
        if channel.lower().endswith("position"):
            shift[:, axis] = channels[:, column]  # in place of the offset, as every reader does
        else:
            angles[:, axis] = channels[:, column]
            order += channel[0].lower()
    order += "".join(letter for letter in AXES if letter not in order)
    return euler_to_quaternion(angles, order), shift


def _hierarchy(tokens: list[str], source: str) -> list[BvhJoint]:
    joints: list[BvhJoint] = []
    open_joints: list[int] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        if token in ("ROOT", "JOINT", "End"):
            start = i + 1
            while i < len(tokens) and tokens[i] != "{":  # a name may hold blanks
                i += 1
            name = " ".join(tokens[start:i])
            parent = open_joints[-1] if open_joints else -1
            open_joints.append(len(joints))
            joints.append(BvhJoint(f"{joints[parent].name}_end" if token == "End" else name, parent, (0.0, 0.0, 0.0)))
        elif token == "OFFSET":
            joints[open_joints[-1]].offset = [float(value) for value in tokens[i + 1 : i + 4]]
            i += 3
        elif token == "CHANNELS":
            count = int(tokens[i + 1])
            joints[open_joints[-1]].channels = tuple(tokens[i + 2 : i + 2 + count])
            i += 1 + count
        elif token == "}":
            open_joints.pop()
        elif token != "HIERARCHY":
            raise ValueError(f"{source}: {token!r} is not expected in the hierarchy")
        i += 1
    if open_joints or not joints:
        raise ValueError(f"{source}: the hierarchy is empty or a bracket is missing")
    return joints


def _with_thorax(bvh: Bvh) -> Bvh:
    """The file with the bone that conversions of CMU's data lose, where it is lost.

    They put neck and both collars at one place with the joint they hang on. Bones without length have no direction, so
    the three are moved along a copy of the bone before.
    """
    joints = [BvhJoint(j.name, j.parent, j.offset, j.channels) for j in bvh.joints]
    for number, joint in enumerate(joints):
        stuck = [j for j in joints if j.parent == number and j.channels and not any(j.offset)]
        if joint.parent >= 0 and any(joint.offset) and len(stuck) == 3:
            for child in stuck:
                child.offset = joint.offset
    return Bvh(joints, bvh.values, bvh.frame_time, bvh.source)


def _best_turn(rest: Tensor, bones: list[Tensor]) -> Tensor:
    """Quaternions (T, 4) that turn the bones at rest (c, 3) onto ``bones`` (c times (T, 3)) best (Kabsch 1976)."""
    if len(bones) == 1:
        return between(rest[0].expand_as(bones[0]), bones[0])
    target = torch.stack(bones, 1)  # (T, c, 3)
    covariance = target.transpose(1, 2) @ F.normalize(rest, dim=-1)  # (T, 3, 3)
    u, _, v = torch.linalg.svd(covariance)
    proper = torch.ones(len(target), 3, dtype=target.dtype)
    proper[:, 2] = torch.linalg.det(u @ v)
    return matrix_to_quaternion(u @ torch.diag_embed(proper) @ v)


def _smooth_angles(turn: Tensor) -> Tensor:
    """Degrees (T, 3) in :data:`ORDER`, without jumps of full turns from frame to frame."""
    degrees = quaternion_to_euler(turn, ORDER)[:, [AXES.index(letter) for letter in ORDER]]
    return torch.from_numpy(np.unwrap(degrees.numpy(), axis=0, period=360.0))


def _none(like: Tensor) -> Tensor:
    return torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=like.dtype).expand_as(like)
