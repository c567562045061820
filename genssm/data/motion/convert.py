"""One motion from a file to another: ``python -m genssm.data.motion.convert --help``."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from genssm.data.motion.clips import joints_to_clip_features, placed_joints
from genssm.data.motion.export import ENDINGS, save_motion
from genssm.data.motion.folders import describe_recording, load_array, with_lengths_from
from genssm.data.motion.recording import JOINT_MAPS, JointMap
from genssm.errors import cli
from genssm.motion import SKELETONS, T2M, Skeleton, features_to_joints, skeleton_of_features


def read_motion(
    path: str | Path,
    *,
    joint_map: JointMap | str | None = None,
    fps: float | None = None,
    up: str = "y",
    lengths_from: str | Path | None = None,
) -> tuple[torch.Tensor, Skeleton]:
    """Joints (T, J, 3) of a file and their skeleton.

    Args:
        path: a recording (.bvh, .amc, exponential maps as .txt), or .npy with joints (T, J, 3) or features (T, dim),
            not normalised; J and dim tell HumanML3D's from KIT-ML's.
        joint_map, up: see :meth:`genssm.data.motion.recording.Recording.to_joints`.
        fps: frame rate of joints in a .npy file; None takes the skeleton's.
        lengths_from: whose bones the target body has, see :func:`genssm.data.motion.folders.with_lengths_from`; None
            takes those that the skeleton ships.
    Raises:
        FileNotFoundError, ValueError: no such file, or one that cannot be read.
    """
    array, skeleton = None, T2M
    if Path(path).suffix == ".npy" and Path(path).is_file():
        array = load_array(path, path).float()
        if array.ndim == 2:
            skeleton = skeleton_of_features(array.shape[1])
        elif array.ndim == 3:
            skeleton = next((known for known in SKELETONS.values() if known.num_joints == array.shape[1]), T2M)
    if lengths_from is not None:
        skeleton = with_lengths_from(skeleton, lengths_from)
    if array is not None and array.ndim == 2:
        if joint_map is not None or fps is not None or up != "y":
            raise ValueError(f"{path} holds features; --joint-map, --fps and --up are for recordings and joints")
        return features_to_joints(array, skeleton), skeleton
    return describe_recording(path).joints(skeleton, joint_map=joint_map, fps=fps, up=up), skeleton


def load_joint_map(given: str | None) -> JointMap | str | None:
    """A joint map from its name or from a JSON file.

    Raises:
        FileNotFoundError: neither.
    """
    if given is None or given in JOINT_MAPS:
        return given
    if not Path(given).is_file():
        raise FileNotFoundError(f"joint map {given} is neither a file nor one of {', '.join(JOINT_MAPS)}")
    return json.loads(Path(given).read_text(encoding="utf-8"))


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how recordings are to be read."""
    parser.add_argument("--up", choices=["y", "z"], default="y", help="vertical axis (default: %(default)s)")
    parser.add_argument("--fps", type=float, help="frame rate of joints in .npy files (default: 20, KIT-ML 12.5)")
    parser.add_argument(
        "--lengths-from",
        metavar="PATH",
        help="take the bone lengths of features from a clip (joints or features as .npy, first frame), a skeleton.json "
        "or a data folder; needed for KIT-ML's skeleton, whose lengths are not shipped",
    )
    parser.add_argument(
        "--joint-map",
        help=f"one of {', '.join(JOINT_MAPS)}, or a JSON file with our joint names as keys and theirs as values "
        '(a name, or {"name": share, ...}); default: the one that fits',
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m genssm.data.motion.convert",
        description="Convert a motion: a recording (BVH, AMC with its ASF beside it, CMU exponential maps), joints or "
        f"features as .npy, to {', '.join(ENDINGS)}. Joints are those of HumanML3D at 20 frames per second, or "
        "those of KIT-ML where a .npy file holds them.",
        epilog="examples: python -m genssm.data.motion.convert walk.bvh walk.gif; "
        "python -m genssm.data.motion.convert walk.bvh walk.npy --features",
    )
    parser.add_argument("source", help="file to read")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--features", action="store_true", help="write features to the .npy file, not joints")
    parser.add_argument("--place", action="store_true", help="on the floor, from the origin, facing +Z, target body")
    add_reading_options(parser)
    args = parser.parse_args(arguments)
    if args.features and args.out.suffix != ".npy":
        raise ValueError(f"--features writes .npy, not {args.out}")
    joint_map = load_joint_map(args.joint_map)
    joints, skeleton = read_motion(
        args.source, joint_map=joint_map, fps=args.fps, up=args.up, lengths_from=args.lengths_from
    )
    if args.features:
        np.save(args.out, joints_to_clip_features(joints, skeleton).numpy())
    else:
        joints = placed_joints(joints, skeleton) if args.place else joints
        save_motion(args.out, joints, skeleton, title=Path(args.source).stem)
    print(f"{len(joints)} frames at {skeleton.fps:g} per second -> {args.out}")


if __name__ == "__main__":
    cli(main)
