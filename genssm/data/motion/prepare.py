"""Recordings to a data set in HumanML3D's layout: ``python -m genssm.data.motion.prepare --help``."""

import argparse
import json
import logging
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from genssm.data.motion.clips import joints_to_clip_features, mirror_joints, placed_joints
from genssm.data.motion.convert import add_reading_options, load_joint_map
from genssm.data.motion.folders import Described, describe_recordings, with_lengths_from
from genssm.data.motion.recording import JointMap
from genssm.errors import cli
from genssm.motion import SKELETONS, T2M, Skeleton, feature_statistics

logger = logging.getLogger("genssm")


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    skeleton: Skeleton = T2M,
    mirror: bool = False,
    joint_map: JointMap | str | None = None,
    fps: float | None = None,
    up: str = "y",
    quiet: bool = False,
) -> int:
    """Write every recording of a folder as features, joints and captions; statistics are of the training part.

    Args:
        source: see :func:`genssm.data.motion.folders.describe_recordings`.
        out: folder to make.
        skeleton: of the features; one with bone lengths, see :func:`genssm.data.motion.folders.with_lengths_from`.
        mirror: also write the mirror images, as ``M<id>``.
        joint_map, up: see :meth:`genssm.data.motion.recording.Recording.to_joints`.
        fps: frame rate of joints in .npy files; None takes the skeleton's.
        quiet: no progress bar.
    Returns:
        The number of clips written.
    Raises:
        FileExistsError: ``out`` is there already.
        FileNotFoundError, ValueError: a recording is missing or cannot be read; the message names it. Nothing is left
            of the folder then.
    """
    final = Path(out)
    if final.exists():
        raise FileExistsError(f"{final} exists already; give another folder or remove it")
    skeleton.offsets()  # a skeleton without bone lengths makes no features
    recordings = describe_recordings(source)
    _check_names(recordings, mirror)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}_", dir=final.parent) as folder:
        out = Path(folder) / final.name  # complete, or not there at all
        count = _write(recordings, out, skeleton, mirror, quiet, joint_map=joint_map, fps=fps, up=up)
        out.rename(final)
    return count


def _check_names(recordings: list[Described], mirror: bool) -> None:
    """Refuse recordings that would be written into one file."""
    names = [f"{image}{recording.name}" for recording in recordings for image in ("", "M")[: 2 if mirror else 1]]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"two recordings, or one and a mirror image, would be written as {twice[0]}; rename one")


def _write(
    recordings: list[Described], out: Path, skeleton: Skeleton, mirror: bool, quiet: bool, **reading: object
) -> int:
    for name in ("new_joints", "new_joint_vecs", "texts"):
        (out / name).mkdir(parents=True)
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": [], "train_val": [], "all": []}
    labels, training = {}, []
    for recording in tqdm(recordings, desc="recordings", unit="clip", disable=quiet):
        joints = recording.joints(skeleton, **reading)
        for name, clip in (("", joints), ("M", mirror_joints(joints, skeleton)))[: 2 if mirror else 1]:
            number = f"{name}{recording.name}"
            features = _write_clip(out, number, clip, skeleton, recording, mirrored=bool(name))
            for split in splits:
                if recording.in_split(split):
                    splits[split].append(number)
            if recording.in_split("train"):
                training.append(features)
            if recording.label is not None:
                labels[number] = recording.label
    feature_statistics(training, skeleton).save(out / "Mean.npy", out / "Std.npy")
    for split, names in splits.items():
        (out / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (out / "skeleton.json").write_text(json.dumps(skeleton.to_config(), indent=2), encoding="utf-8")
    if labels:
        (out / "labels.json").write_text(json.dumps(labels, indent=2), encoding="utf-8")
    return len(splits["all"])


def _write_clip(
    out: Path, name: str, joints: torch.Tensor, skeleton: Skeleton, recording: Described, *, mirrored: bool
) -> torch.Tensor:
    try:
        features = joints_to_clip_features(joints, skeleton)
    except ValueError as error:
        raise ValueError(f"{recording.name}: {error}") from None
    np.save(out / "new_joints" / f"{name}.npy", placed_joints(joints, skeleton).numpy())
    np.save(out / "new_joint_vecs" / f"{name}.npy", features.numpy())
    lines = []
    for timed in recording.captions:
        caption = timed.caption.mirrored() if mirrored else timed.caption
        lines.append(f"{caption.text.replace('#', ' ')}#{' '.join(caption.tokens)}#{timed.start}#{timed.end}\n")
    (out / "texts" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    return features


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m genssm.data.motion.prepare",
        description="Convert a folder of recordings (BVH, ASF/AMC, CMU exponential maps, joints as .npy; also inside "
        "of .tar archives) to a data set in HumanML3D's layout. Captions, classes and splits come from a CSV file in "
        "the folder with the columns path, captions (divided by ' | '), action and split; or from NAME.txt beside a "
        "recording; or from the files' names.",
        epilog="examples: python -m genssm.data.motion.prepare mocap/cmu data/cmu --mirror; "
        "python -m genssm.data.motion.prepare my_joints data/mine --skeleton kit --lengths-from KIT-ML",
    )
    parser.add_argument("source", help="folder of recordings")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--mirror", action="store_true", help="also write mirror images, with left and right exchanged")
    parser.add_argument(
        "--skeleton", choices=list(SKELETONS), default="t2m", help="of the features (default: %(default)s, HumanML3D's)"
    )
    add_reading_options(parser)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    skeleton = SKELETONS[args.skeleton]
    if args.lengths_from:
        skeleton = with_lengths_from(skeleton, args.lengths_from)
    count = prepare(
        args.source, args.out, skeleton=skeleton, mirror=args.mirror, joint_map=load_joint_map(args.joint_map),
        fps=args.fps, up=args.up,
    )  # fmt: skip
    print(f"{count} clips in {args.out}")


if __name__ == "__main__":
    cli(main)
