"""Features and back: exact round trips, batches, gradients, padding, other skeletons, and what is refused."""

from dataclasses import replace

import pytest
import torch

from genssm.motion import (
    KIT,
    T2M,
    Skeleton,
    canonical_joints,
    features_to_joints,
    forward_kinematics,
    inverse_kinematics,
    joints_to_features,
    recover_root,
    skeleton_of_features,
    uniform_skeleton,
)
from genssm.motion.rotations import rotate
from tests.motion.conftest import made_clip

PATHS = ["positions", "rotations"]


@pytest.mark.parametrize("path", PATHS)
def test_joints_come_back(clip: torch.Tensor, path: str, device: torch.device) -> None:
    clip = clip.to(device)
    placed = canonical_joints(uniform_skeleton(clip, T2M), T2M)
    features = joints_to_features(clip, T2M)
    assert features.shape == (59, 263)
    torch.testing.assert_close(features_to_joints(features, path=path), placed[:-1], atol=1e-6, rtol=0)


def test_canonical_clip_stands_at_the_origin_and_faces_z(clip: torch.Tensor) -> None:
    turn = torch.tensor([0.6, 0.0, 0.8, 0.0], dtype=torch.float64)  # about the vertical
    moved = rotate(turn, clip) + torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    placed = canonical_joints(moved, T2M)
    assert placed[..., 1].min() == 0
    torch.testing.assert_close(placed[0, 0, [0, 2]], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(joints_to_features(moved, T2M), joints_to_features(clip, T2M))
    hips = placed[0, 1] - placed[0, 2]
    assert hips[0] > 0.15, "the left hip is at +x when the body faces +z"


def test_bones_and_size_of_the_source_do_not_matter(clip: torch.Tensor) -> None:
    stretched = forward_kinematics(inverse_kinematics(clip, T2M), 2 * clip[:, 0], 2 * T2M.offsets(clip), T2M)
    # The same rotations and twice the body: the same features.
    expected = joints_to_features(
        forward_kinematics(inverse_kinematics(clip, T2M), clip[:, 0], T2M.offsets(clip), T2M), T2M
    )
    torch.testing.assert_close(joints_to_features(stretched, T2M), expected, atol=1e-9, rtol=0)


def test_batches_are_their_clips(clip: torch.Tensor) -> None:
    other = made_clip(60, seed=1)
    together = joints_to_features(torch.stack([clip, other])[None], T2M)[0]
    for features, joints in zip(together, (clip, other)):
        torch.testing.assert_close(features, joints_to_features(joints, T2M))
    for path in PATHS:
        torch.testing.assert_close(
            features_to_joints(together, path=path)[1], features_to_joints(together[1], path=path)
        )


@pytest.mark.parametrize("path", PATHS)
def test_padding_never_changes_what_comes_before(clip: torch.Tensor, path: str) -> None:
    features = joints_to_features(clip, T2M)
    padded = torch.cat([features, torch.randn(20, 263, dtype=torch.float64)])
    torch.testing.assert_close(features_to_joints(padded, path=path)[:59], features_to_joints(features, path=path))


@pytest.mark.parametrize("path", PATHS)
def test_recovery_is_differentiable(path: str) -> None:
    features = joints_to_features(made_clip(4), T2M).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: features_to_joints(x, path=path), features, atol=1e-6)


def test_making_features_is_differentiable(clip: torch.Tensor) -> None:
    joints = clip[:6].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(joints_to_features(joints, T2M).square().sum(), joints)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_root_turns_by_twice_the_feature() -> None:
    features = torch.zeros(5, 263)
    features[:, 0] = torch.pi / 8  # half of a turn by 45 degrees
    features[:, 2] = 1.0
    quaternions, path = recover_root(features)
    forward = rotate(quaternions * torch.tensor([1.0, -1, -1, -1]), torch.tensor([0.0, 0, 1]).expand(5, 3))
    torch.testing.assert_close(forward[2], torch.tensor([-1.0, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(path[1], forward[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("direction", [1, -1])
def test_turning_past_minus_z(direction: int) -> None:
    """There the published features have one increment of the wrong sign."""
    clip = made_clip(240)
    half = direction * torch.linspace(0, 0.8 * torch.pi, 240, dtype=torch.float64)
    none = torch.zeros_like(half)
    turning = rotate(torch.stack([half.cos(), none, half.sin(), none], -1)[:, None], clip)
    placed = canonical_joints(uniform_skeleton(turning, T2M), T2M)
    right, published = (joints_to_features(turning, T2M, shortest_turn=short) for short in (True, False))
    torch.testing.assert_close(features_to_joints(right), placed[:-1], atol=1e-6, rtol=0)
    assert (features_to_joints(published) - placed[:-1]).abs().max() > 0.05
    different = (right - published).abs().amax(-1).nonzero().flatten()
    assert len(different) == 1
    torch.testing.assert_close(right[different, 0], -published[different, 0])


def test_contacts_are_of_feet_at_rest(clip: torch.Tensor) -> None:
    held = clip.clone()
    held[20:30] = clip[20]
    contacts = joints_to_features(held, T2M)[:, T2M.groups["contacts"]]
    assert contacts[20:29].eq(1).all() and contacts[:20].eq(0).any()


def test_three_frames_are_no_special_case() -> None:
    """A product over the first axis of length 3 would mix up frames and coordinates here."""
    clip = made_clip(5)
    torch.testing.assert_close(
        inverse_kinematics(clip[:3], T2M, smooth_heading=False), inverse_kinematics(clip, T2M, smooth_heading=False)[:3]
    )


def test_other_skeletons() -> None:
    kit = KIT.with_lengths_of(torch.randn(2, 21, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    joints = torch.randn(1, 21, 3, dtype=torch.float64) + 0.1 * torch.randn(8, 21, 3, dtype=torch.float64)
    features = joints_to_features(joints, kit)
    assert features.shape == (7, 251) and features.isfinite().all()
    assert skeleton_of_features(251) is KIT
    again = Skeleton.from_config(kit.to_config())
    assert again == kit and Skeleton.from_config("t2m") is T2M
    small = replace(T2M, name="half", contact_threshold=1.0)
    assert small.parents == T2M.parents


def test_what_is_refused(clip: torch.Tensor) -> None:
    broken = clip.clone()
    broken[[7, 9], 3, 1] = torch.nan
    with pytest.raises(ValueError, match="2 frames: 7, 9"):
        joints_to_features(broken, T2M)
    short = clip.clone()
    short[5, 4] = short[5, 1]
    with pytest.raises(ValueError, match=r"left_hip to left_knee has no length in frame 5"):
        joints_to_features(short, T2M)
    with pytest.raises(ValueError, match="bone lengths"):
        joints_to_features(torch.randn(4, 21, 3), KIT)
    with pytest.raises(ValueError, match=r"\(.*21, 3\)"):
        joints_to_features(clip[:, :21], T2M)
    with pytest.raises(ValueError, match="2 at least"):
        joints_to_features(clip[:1], T2M)
    with pytest.raises(ValueError, match="263"):
        features_to_joints(torch.zeros(3, 100))
    with pytest.raises(ValueError, match="path"):
        features_to_joints(torch.zeros(3, 263), path="both")
    with pytest.raises(ValueError, match="half-a-man"):
        Skeleton.from_config("half-a-man")
    with pytest.raises(ValueError, match="each of 1"):
        replace(T2M, chains=T2M.chains[:-1])
