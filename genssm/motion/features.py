"""HumanML3D's and KIT-ML's feature vectors: from joints, and back along two differentiable paths.

T frames, J joints, (..., T, J, 3) joints <-> (..., T - 1, 12 J - 1) features. One row holds, in the columns of
:attr:`genssm.motion.skeleton.Skeleton.groups`: *half* the yaw increment in radians, the root's velocity on the ground
in the heading frame, its height, the other joints relative to the root with the heading removed, their rotations as
6-D columns, the velocities of all joints in the heading frame, and ground contact of left and right ankle and toe.
Source: Guo et al. 2022 (HumanML3D).
"""

from typing import NamedTuple

import torch

from genssm.motion.kinematics import check_joints, forward_kinematics, inverse_kinematics, turn_to_face_z
from genssm.motion.rotations import inverse, matrix_from_6d, multiply, quaternion_to_6d, rotate
from genssm.motion.skeleton import Skeleton, skeleton_of_features

Tensor = torch.Tensor
RECOVERY_PATHS = ("positions", "rotations")


class FeatureParts(NamedTuple):
    """A clip's features before they are joined; T frames.

    Attributes:
        rotations: quaternions of all joints, root first, (..., T, J, 4).
        local_positions: joints in the heading frame of their own frame, (..., T, J, 3).
        yaw_velocity: half angles, (..., T - 1).
        linear_velocity: x and z in the heading frame, (..., T - 1, 2).
        velocities: (..., T - 1, J, 3).
        contacts: 0 or 1 for left ankle, left toe, right ankle, right toe, (..., T - 1, 4).
    """

    rotations: Tensor
    local_positions: Tensor
    yaw_velocity: Tensor
    linear_velocity: Tensor
    velocities: Tensor
    contacts: Tensor

    def join(self) -> Tensor:
        """The feature rows, (..., T - 1, 12 J - 1)."""
        positions, rotations = self.local_positions[..., :-1, :, :], self.rotations[..., :-1, 1:, :]
        return torch.cat(
            [
                self.yaw_velocity[..., None],
                self.linear_velocity,
                positions[..., 0, 1:2],
                positions[..., 1:, :].flatten(-2),
                quaternion_to_6d(rotations).flatten(-2),
                self.velocities.flatten(-2),
                self.contacts,
            ],
            -1,
        )


def uniform_skeleton(joints: Tensor, skeleton: Skeleton, offsets: Tensor | None = None) -> Tensor:
    """The same movement by the target body: rotations kept, bones replaced, the root's path scaled with the legs.

    Args:
        joints: (..., T, J, 3).
        skeleton: their skeleton.
        offsets: bones of the target body at rest, (J, 3); None takes ``skeleton.offsets()``.
    Returns:
        (..., T, J, 3).
    Raises:
        ValueError: shapes, values that are not finite, a bone without length, or no target body.
    """
    check_joints(joints, skeleton)
    offsets = skeleton.offsets(joints) if offsets is None else offsets.to(joints)
    legs = list(skeleton.legs)
    source = skeleton.lengths_of(joints[..., 0, :, :])[..., legs].sum(-1)
    scale = offsets[legs].abs().amax(-1).sum() / source  # (...)
    rotations = inverse_kinematics(joints, skeleton, smooth_heading=False)
    return forward_kinematics(rotations, joints[..., 0, :] * scale[..., None, None], offsets, skeleton)


def canonical_joints(joints: Tensor, skeleton: Skeleton) -> Tensor:
    """The clip (..., T, J, 3) put on the floor (lowest joint at y = 0), started at the origin and facing +Z."""
    floor = joints[..., 1].amin((-1, -2))
    start = joints[..., 0, 0, :]
    shift = torch.stack([start[..., 0], floor, start[..., 2]], -1)
    return turn_to_face_z(joints - shift[..., None, None, :], skeleton)


def feature_parts(joints: Tensor, skeleton: Skeleton, *, shortest_turn: bool = False) -> FeatureParts:
    """The parts of the features of canonical joints (..., T, J, 3), at least two frames.

    See :func:`joints_to_features` for ``shortest_turn``.
    """
    if joints.shape[-3] < 2:
        raise ValueError(
            f"a clip has {joints.shape[-3]} frame(s); features are made of differences and need 2 at least"
        )
    rotations = inverse_kinematics(joints, skeleton)
    root = rotations[..., 0, :]  # (..., T, 4)
    step = joints[..., 1:, :, :] - joints[..., :-1, :, :]  # (..., T - 1, J, 3)
    feet = step[..., [*skeleton.left_foot, *skeleton.right_foot], :]
    turn = multiply(root[..., 1:, :], inverse(root[..., :-1, :]))
    if shortest_turn:
        turn = torch.where(turn[..., :1] < 0, -turn, turn)
    ground = joints[..., :1, :] * joints.new_tensor([1.0, 0.0, 1.0])
    return FeatureParts(
        rotations=rotations,
        local_positions=rotate(root[..., None, :], joints - ground),
        yaw_velocity=torch.asin(turn[..., 2].clamp(-1, 1)),
        linear_velocity=rotate(root[..., 1:, :], step[..., 0, :])[..., [0, 2]],
        velocities=rotate(root[..., :-1, None, :], step),
        contacts=(feet.square().sum(-1) < skeleton.contact_threshold).to(joints),
    )


def joints_to_features(
    joints: Tensor, skeleton: Skeleton, offsets: Tensor | None = None, *, shortest_turn: bool = False
) -> Tensor:
    """Features of clips of equal length.

    Args:
        joints: (..., T, J, 3), +Y up, in the skeleton's unit and frame rate.
        skeleton: of the joints.
        offsets: bones of the target body at rest, (J, 3); None takes ``skeleton.offsets()``.
        shortest_turn: False makes features exactly as the published ones were made. Where the heading passes -Z, two
            neighbouring quaternions have opposite signs and their yaw increment comes out with the wrong sign, so that
            joints recovered from the features bend off there. True takes the short way round and has no such frame.
    Returns:
        (..., T - 1, 12 J - 1): the last frame only ends the last difference.
    Raises:
        ValueError: shapes, fewer than two frames, values that are not finite, or a bone without length.
    """
    uniform = uniform_skeleton(joints, skeleton, offsets)
    return feature_parts(canonical_joints(uniform, skeleton), skeleton, shortest_turn=shortest_turn).join()


def recover_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Heading and path of the root, by summing up its velocities.

    Args:
        features: (..., T, dim), not normalised.
    Returns:
        Quaternions (..., T, 4) into the heading frame, and positions (..., T, 3).
    """
    zero = torch.zeros_like(features[..., :1, 0])
    angle = torch.cat([zero, features[..., :-1, 0]], -1).cumsum(-1)  # half angles, so no further half
    none = torch.zeros_like(angle)
    root = torch.stack([angle.cos(), none, angle.sin(), none], -1)
    velocity = torch.stack([features[..., :-1, 1], none[..., 1:], features[..., :-1, 2]], -1)
    step = rotate(inverse(root[..., 1:, :]), velocity)
    path = torch.cat([torch.zeros_like(root[..., :1, :3]), step], -2).cumsum(-2)
    return root, torch.stack([path[..., 0], features[..., 3], path[..., 2]], -1)


def features_to_joints(
    features: Tensor, skeleton: Skeleton | None = None, *, path: str = "positions", offsets: Tensor | None = None
) -> Tensor:
    """Joints of features; later frames never change earlier ones, so padded batches need no mask.

    Args:
        features: (..., T, dim), not normalised.
        skeleton: None takes the published one with this ``dim``.
        path: "positions" reads the joints' positions; "rotations" turns the bones ``offsets`` by the 6-D rotations.
        offsets: for "rotations": bones at rest, (J, 3); None takes ``skeleton.offsets()``.
    Returns:
        (..., T, J, 3).
    Raises:
        ValueError: ``dim`` does not fit, or an unknown path.
    """
    skeleton = skeleton_of_features(features.shape[-1]) if skeleton is None else skeleton
    if features.shape[-1] != skeleton.feature_dim:
        raise ValueError(
            f"features have length {features.shape[-1]}; skeleton {skeleton.name!r} has {skeleton.feature_dim}"
        )
    if path not in RECOVERY_PATHS:
        raise ValueError(f"path is {path!r}; expected {' or '.join(RECOVERY_PATHS)}")
    root, positions = recover_root(features)
    if path == "rotations":
        offsets = skeleton.offsets(features) if offsets is None else offsets
        six = features[..., skeleton.groups["rotations"]].unflatten(-1, (-1, 6))
        six = torch.cat([quaternion_to_6d(root)[..., None, :], six], -2)
        return forward_kinematics(matrix_from_6d(six), positions, offsets, skeleton)
    local = features[..., skeleton.groups["positions"]].unflatten(-1, (-1, 3))
    turned = rotate(inverse(root)[..., None, :], local)
    ground = positions * positions.new_tensor([1.0, 0.0, 1.0])
    return torch.cat([positions[..., None, :], turned + ground[..., None, :]], -2)
