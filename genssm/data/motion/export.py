"""Motion to files: joints as .npy, BVH, and pictures; the ending of the path decides."""

from pathlib import Path

import numpy as np
import torch

from genssm.data.motion.bvh import joints_to_bvh, write_bvh
from genssm.data.motion.draw import contact_sheet, write_animation
from genssm.motion import Skeleton

ENDINGS = (".npy", ".bvh", ".gif", ".mp4", ".png")


def save_motion(
    path: str | Path, joints: torch.Tensor, skeleton: Skeleton, *, fps: float | None = None, title: str = ""
) -> None:
    """Write a clip.

    ``.npy`` holds the joints (T, J, 3) float32; ``.bvh`` opens in animation programs (centimetres, +Y up, see
    :func:`genssm.data.motion.bvh.joints_to_bvh`); ``.gif`` and ``.mp4`` move; ``.png`` is a contact sheet.

    Args:
        path: file to write; its folder is made.
        joints: (T, J, 3) in the skeleton's unit.
        skeleton: of the joints.
        fps: frames per second; None takes the skeleton's.
        title: written into pictures.
    Raises:
        ValueError: another ending, or joints that are not finite.
        FileNotFoundError: .mp4 without ffmpeg.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path}: motion is written as {', '.join(ENDINGS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if ending == ".npy":
        np.save(path, joints.detach().cpu().float().numpy())
    elif ending == ".bvh":
        write_bvh(path, joints_to_bvh(joints, skeleton, fps=fps, scale=100 * skeleton.metres))
    elif ending == ".png":
        contact_sheet([joints], skeleton, [title]).save(path)
    else:
        write_animation(path, [joints], skeleton, [title], fps=fps)
