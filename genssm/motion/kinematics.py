"""Joints to rotations and back: the inverse and forward kinematics behind HumanML3D's features.

T frames, J joints. Every chain of a skeleton starts again from the root's rotation, so arms are not relative to the
chest, and the rotations are not those of SMPL.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from genssm.motion.rotations import between, inverse, multiply, quaternion_to_matrix, rotate
from genssm.motion.skeleton import Skeleton

Tensor = torch.Tensor
HEADING_SIGMA = 20.0  # frames


def check_joints(joints: Tensor, skeleton: Skeleton) -> None:
    """Refuse joints that no kinematics can work with.

    Args:
        joints: (..., T, J, 3).
    Raises:
        ValueError: the shape does not fit, or a frame holds a value that is not finite (its number is named).
    """
    if joints.ndim < 3 or joints.shape[-2:] != (skeleton.num_joints, 3):
        raise ValueError(
            f"joints are {tuple(joints.shape)}; skeleton {skeleton.name!r} expects (..., T, {skeleton.num_joints}, 3)"
        )
    bad = ~joints.detach().isfinite().all(-1).all(-1)
    if bool(bad.any()):
        frames = bad.reshape(-1, bad.shape[-1]).any(0).nonzero().flatten().tolist()
        raise ValueError(f"joints are not finite in {named_frames(frames)}")


def named_frames(frames: list[int]) -> str:
    """ "frame 3" or "5 frames: 3, 4, 9, ..." for a message."""
    if len(frames) == 1:
        return f"frame {frames[0]}"
    return f"{len(frames)} frames: {', '.join(str(frame) for frame in frames[:8])}{', ...' if len(frames) > 8 else ''}"


def heading(joints: Tensor, skeleton: Skeleton, *, hip_sign: int = 1) -> Tensor:
    """Horizontal direction that the body faces, (..., J, 3) -> (..., 3): y x the unit vector across the body.

    It is shorter than 1 when the body leans to a side, which is its weight when headings are averaged. ``hip_sign`` -1
    counts the hips the wrong way round, as the published inverse kinematics does; features, means and checkpoints were
    made that way, so :func:`inverse_kinematics` does too.
    """
    a, b, c, d = (joints[..., joint, :] for joint in skeleton.across)
    across = F.normalize(hip_sign * (a - b) + (c - d), dim=-1)
    return torch.stack([across[..., 2], torch.zeros_like(across[..., 0]), -across[..., 0]], -1)


def smooth(values: Tensor, sigma: float = HEADING_SIGMA) -> Tensor:
    """Gaussian average along time, cut off at 4 sigma, ends repeated; (..., T, C) -> (..., T, C)."""
    radius = int(4 * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1, dtype=torch.float64, device=values.device)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    weights = (weights / weights.sum()).to(values)
    rows = values.transpose(-1, -2).reshape(-1, 1, values.shape[-2])  # (N C, 1, T)
    rows = F.conv1d(F.pad(rows, (radius, radius), mode="replicate"), weights[None, None])
    return rows.reshape(*values.shape[:-2], values.shape[-1], -1).transpose(-1, -2)


def inverse_kinematics(joints: Tensor, skeleton: Skeleton, *, smooth_heading: bool = True) -> Tensor:
    """Rotation of each bone relative to the bone before it in its chain, from positions.

    The root turns by between(forward, +Z), smoothed over time, and not at all in frame 0. Along a chain
    local_c = R^-1 between(rest direction of c, bone to c), R <- R local_c.

    Args:
        joints: (..., T, J, 3).
        skeleton: their skeleton.
        smooth_heading: average the heading along time first.
    Returns:
        Unit quaternions, (..., T, J, 4).
    Raises:
        ValueError: shapes, values that are not finite, or a bone without length.
    """
    check_joints(joints, skeleton)
    _check_bones(joints, skeleton)
    forward = heading(joints, skeleton, hip_sign=-1)  # (..., T, 3)
    forward = F.normalize(smooth(forward) if smooth_heading else forward, dim=-1)
    root = between(forward, forward.new_tensor([0.0, 0.0, 1.0]))  # (..., T, 4)
    first = root.new_tensor([1.0, 0.0, 0.0, 0.0]).expand_as(root[..., :1, :])
    root = torch.cat([first, root[..., 1:, :]], -2)
    rest = skeleton.rest_directions(joints)
    rotations = {0: root}
    for chain in skeleton.chains:
        total = root
        for parent, joint in pairwise(chain):
            bone = F.normalize(joints[..., joint, :] - joints[..., parent, :], dim=-1)
            rotations[joint] = multiply(inverse(total), between(rest[joint], bone))
            total = multiply(total, rotations[joint])
    return torch.stack([rotations[joint] for joint in range(skeleton.num_joints)], -2)


def forward_kinematics(rotations: Tensor, root_positions: Tensor, offsets: Tensor, skeleton: Skeleton) -> Tensor:
    """Positions from the rotations of :func:`inverse_kinematics`: P_c = R offset_c + P_parent with R <- R local_c.

    Args:
        rotations: quaternions (..., J, 4) or matrices (..., J, 3, 3).
        root_positions: (..., 3).
        offsets: bones at rest, (J, 3).
        skeleton: whose chains are walked.
    Returns:
        Joints, (..., J, 3).
    """
    is_matrix = rotations.shape[-2:] == (3, 3)
    matrices = rotations if is_matrix else quaternion_to_matrix(rotations)  # (..., J, 3, 3)
    positions = {0: root_positions}
    for chain in skeleton.chains:
        total = matrices[..., 0, :, :]
        for parent, joint in pairwise(chain):
            total = total @ matrices[..., joint, :, :]
            positions[joint] = (total @ offsets[joint].to(total)) + positions[parent]
    return torch.stack([positions[joint] for joint in range(skeleton.num_joints)], -2)


def turn_to_face_z(joints: Tensor, skeleton: Skeleton) -> Tensor:
    """The clip (..., T, J, 3) turned about the vertical so that frame 0 faces +Z."""
    forward = F.normalize(heading(joints[..., 0, :, :], skeleton), dim=-1)
    turn = between(forward, forward.new_tensor([0.0, 0.0, 1.0]))
    return rotate(turn[..., None, None, :], joints)


def _check_bones(joints: Tensor, skeleton: Skeleton) -> None:
    zero = skeleton.lengths_of(joints.detach())[..., 1:] == 0
    if bool(zero.any()):
        *_, frame, bone = zero.nonzero()[0].tolist()
        joint, parent = bone + 1, skeleton.parents[bone + 1]
        names = skeleton.joint_names
        raise ValueError(f"the bone from {names[parent]} to {names[joint]} has no length in frame {frame}")
