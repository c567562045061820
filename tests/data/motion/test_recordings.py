"""Recordings: BVH, ASF/AMC and exponential maps to joints and features, and BVH files written from joints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genssm.data.motion.asf_amc import read_amc, read_asf
from genssm.data.motion.bvh import joints_to_bvh, read_bvh, rest_pose, write_bvh
from genssm.data.motion.clips import placed_joints
from genssm.data.motion.expmap import read_expmap
from genssm.data.motion.folders import Described
from genssm.data.motion.recording import Recording, resample
from genssm.motion import KIT, T2M, Skeleton, forward_kinematics, joints_to_features
from genssm.motion.rotations import expmap_to_quaternion

CMU_METRES = 0.0254 / 0.45
SMALL = """HIERARCHY
ROOT Hips
{
  OFFSET 1 2 3
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Left Knee
  {
    OFFSET 0 -2 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {
      OFFSET 0 0 1
    }
  }
}
MOTION
Frames: 2
Frame Time: 0.05
0 0 0  0 0 0   0 0 0
5 0 0  90 0 0  0 0 90
"""


def test_small_bvh_by_hand() -> None:
    bvh = read_bvh(SMALL)
    assert [joint.name for joint in bvh.joints] == ["Hips", "Left Knee", "Left Knee_end"]
    expected = [
        [[0.0, 0, 0], [0, -2, 0], [0, -2, 1]],
        # The thigh (0,-2,0) turned by 90 degrees about z points to +x; the foot is first turned about y, from +z to +x,
        # and with the thigh to +y.
        [[5.0, 0, 0], [7, 0, 0], [7, 1, 0]],
    ]
    torch.testing.assert_close(bvh.positions(), torch.tensor(expected, dtype=torch.float64))
    assert bvh.recording().fps == pytest.approx(20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("MOTION", "MOVES"), "HIERARCHY and MOTION"),
        (("90 0 0  0 0 90", "90 0 0"), "15 numbers, not 2 frames of 9 channels"),
        (("JOINT", "JOIN"), "'JOIN' is not expected"),
        (("MOTION", "}\nMOTION"), "brackets or lines of the hierarchy are missing"),
    ],
)
def test_broken_bvh(change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_bvh(SMALL.replace(*change))


@pytest.mark.parametrize("skeleton", [T2M, replace(KIT, bone_lengths=(0.0, *[100.0 + n for n in range(20)]))])
def test_written_bvh_gives_the_joints_back(tmp_path: Path, skeleton: Skeleton) -> None:
    waves = torch.linspace(0, 4, 30)[:, None, None] * torch.rand(skeleton.num_joints, 3) * 2
    offsets = skeleton.offsets()
    root = torch.randn(30, 3).cumsum(0) * 0.05 / skeleton.metres
    joints = forward_kinematics(expmap_to_quaternion(0.5 * waves.sin()), root, offsets, skeleton)
    scale = 100 * skeleton.metres
    write_bvh(tmp_path / "a.bvh", joints_to_bvh(joints, skeleton, scale=scale))
    again = read_bvh((tmp_path / "a.bvh").read_text())
    names = [joint.name for joint in again.joints]
    found = again.positions()[:, [names.index(name) for name in skeleton.joint_names]] / scale
    torch.testing.assert_close(found.float(), joints, atol=2e-6 / skeleton.metres, rtol=0)
    assert 1 / again.frame_time == pytest.approx(skeleton.fps, rel=1e-5)
    assert again.values.diff(dim=0).abs().max() < 200, "no jumps by full turns"


def test_written_bvh_is_read_as_our_skeleton(joints: torch.Tensor) -> None:
    recording = joints_to_bvh(joints, T2M).recording()
    torch.testing.assert_close(recording.to_joints(scale=0.01), joints, atol=1e-6, rtol=0)


def test_rest_pose_stands_with_arms_to_the_sides() -> None:
    rest = dict(zip(T2M.joint_names, rest_pose(T2M).tolist()))
    assert rest["left_wrist"] == [1, 0, 0] and rest["right_elbow"] == [-1, 0, 0]
    assert rest["head"] == [0, 1, 0] and rest["left_knee"] == [0, -1, 0]


def test_amc_is_the_golden_clip(cmu: dict[str, Described], golden_dir: Path) -> None:
    expected = load_file(golden_dir / "motion" / "feat_t2m_walk.safetensors")["in.joints"]
    found = cmu["asfamc__02__02_01"].read().to_joints(scale=CMU_METRES)
    torch.testing.assert_close(found[: len(expected)], expected, atol=1e-6, rtol=0)


def test_exponential_maps_agree_with_amc(cmu: dict[str, Described]) -> None:
    """The same take in two publications, on two bodies."""
    amc, maps = (
        cmu[name].read().to_joints(scale=CMU_METRES)
        for name in ("asfamc__02__02_01", "actions__train__walking__walking_1")
    )
    distance = (amc - maps[: len(amc)]).norm(dim=-1)
    assert distance.mean(0).max() < 0.006 and distance.max() < 0.0125


@pytest.mark.parametrize("name", ["cmu__bvh__12_01", "cmu__bvh__131_03"])
def test_bvh_of_two_publishers(cmu: dict[str, Described], name: str) -> None:
    recording = cmu[name].read()
    joints = recording.to_joints()
    features = joints_to_features(joints.double(), T2M)
    assert features.isfinite().all()
    assert (
        len(recording.positions) == {"cmu__bvh__12_01": 523, "cmu__bvh__131_03": 1102}[name]
    )  # 12_01 begins with a T-pose
    placed = placed_joints(joints, T2M)
    assert (placed[:, T2M.joint_names.index("head"), 1] > 1.2).all(), "a head is above the floor"
    assert placed[-1, 0, 2] > 1.0, "these clips go forward"


def test_scale_up_axis_and_joint_map(joints: torch.Tensor) -> None:
    names = tuple(f"Rig:{name.upper()}" for name in T2M.joint_names)
    z_up = torch.stack([joints[..., 0], -joints[..., 2], joints[..., 1]], -1).double() * 39.37
    found = Recording(names, z_up, 20.0, "inches").to_joints(up="z")
    torch.testing.assert_close(found, joints, atol=2e-6, rtol=0)
    table = {name: name for name in T2M.joint_names} | {"spine2": {"spine1": 0.5, "spine3": 0.5}}
    mixed = Recording(T2M.joint_names, joints.double(), 20.0, "mixed").to_joints(joint_map=table, scale=1.0)
    torch.testing.assert_close(mixed[:, 6], (joints[:, 3] + joints[:, 9]) / 2)


def test_recordings_that_cannot_be_used(joints: torch.Tensor) -> None:
    recording = Recording(T2M.joint_names, joints.double(), 20.0, "a.bvh")
    with pytest.raises(ValueError, match=r"a\.bvh has no joint 'Hips'"):
        recording.to_joints(joint_map="mixamo")
    with pytest.raises(ValueError, match="none of the joint maps"):
        Recording(("a", "b"), joints[:, :2].double(), 20.0, "b.bvh").to_joints()
    with pytest.raises(ValueError, match="too few"):
        Recording(T2M.joint_names, joints.double(), 8.0, "slow").to_joints()
    joints[4, 2] = torch.nan
    with pytest.raises(ValueError, match=r"a\.bvh: positions are not finite in frame 4"):
        Recording(T2M.joint_names, joints.double(), 20.0, "a.bvh").to_joints()


def test_resampling() -> None:
    line = torch.arange(13, dtype=torch.float64)[:, None, None]
    assert resample(line, 120, 20).flatten().tolist() == [0, 6, 12]
    assert resample(line, 30, 20).flatten().tolist() == pytest.approx([0, 1.5, 3, 4.5, 6, 7.5, 9, 10.5, 12])
    assert resample(line, 20, 30).flatten().tolist()[:3] == pytest.approx([0, 2 / 3, 4 / 3])


def test_acclaim_that_cannot_be_used(cmu: dict[str, Described]) -> None:
    asf = """:units
angle deg
:bonedata
begin
name leg
direction 0 -1 0
length 2
axis 0 0 0 XYZ
dof rz
end
:hierarchy
begin
root leg
end
"""
    frames = "1\nroot 0 1 0 0 0 0\nleg 90\n2\nroot 0 1 0 0 0 90\nleg 90\n"
    ends = read_amc(frames, read_asf(asf)).positions[:, 1]
    torch.testing.assert_close(ends, torch.tensor([[2.0, 1, 0], [0, 3, 0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="frame 2: 'arm'"):
        read_amc(frames.replace("leg 90\n", "arm 90\n").replace("arm", "leg", 1), read_asf(asf))
    with pytest.raises(ValueError, match="not all of bone 'leg'"):
        read_amc(frames.rpartition("leg")[0], read_asf(asf))
    with pytest.raises(ValueError, match=r"a bone lacks its axis \(bone leg\)"):
        read_asf(asf.replace("axis 0 0 0 XYZ\n", ""))
    with pytest.raises(ValueError, match="'foot' is unknown"):
        read_asf(asf.replace("root leg", "root leg foot"))
    with pytest.raises(ValueError, match="lines of 117"):
        read_expmap("1,2,3\n4,5,6\n", "a.txt")
