"""CMU's movements as text files of exponential maps, one line per frame: the form of the motion-prediction literature.

A line holds the root's position and 38 rotation vectors. All files share one skeleton, which is written here since they
do not hold it. The local rotation of a joint is exp(-[r]x).
"""

import io

import numpy as np
import torch

from genssm.data.motion.recording import Recording
from genssm.motion.rotations import expmap_to_quaternion, quaternion_to_matrix

FPS = 120.0
_PARENTS = (
    *(-1, 0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 10, 11, 0, 13, 14, 15, 16, 17, 18, 15, 20, 21, 22, 23, 24, 25, 23, 27),
    *(15, 29, 30, 31, 32, 33, 34, 32, 36),
)
_NAMES = (
    *("Hips", "LHipJoint", "LeftUpLeg", "LeftLeg", "LeftFoot", "LeftToeBase", "LeftToeBase_end", "RHipJoint"),
    *("RightUpLeg", "RightLeg", "RightFoot", "RightToeBase", "RightToeBase_end", "LowerBack", "Spine", "Spine1"),
    *("Neck", "Neck1", "Head", "Head_end", "LeftShoulder", "LeftArm", "LeftForeArm", "LeftHand", "LeftFingerBase"),
    *("LeftHandIndex1", "LeftHandIndex1_end", "LThumb", "LThumb_end", "RightShoulder", "RightArm", "RightForeArm"),
    *("RightHand", "RightFingerBase", "RightHandIndex1", "RightHandIndex1_end", "RThumb", "RThumb_end"),
)
# The published skeleton has the thorax (joints 16, 20, 29) at its own start; its length is put back here.
_THORAX = (0.0015, 2.068, 0.008)
_OFFSETS = {
    2: (1.65674, -1.80282, 0.62477),
    3: (2.5972, -7.13576, 0),
    4: (2.49236, -6.8477, 0),
    5: (0.19704, -0.54136, 2.14581),
    6: (0, 0, 1.11249),
    8: (-1.6107, -1.80282, 0.62476),
    9: (-2.59502, -7.12977, 0),
    10: (-2.4678, -6.78024, 0),
    11: (-0.23024, -0.63258, 2.13368),
    12: (0, 0, 1.11569),
    14: (0.01961, 2.0545, -0.14112),
    15: (0.01021, 2.06436, -0.05921),
    16: _THORAX,
    17: (0.00713, 1.56711, 0.14968),
    18: (0.03429, 1.56041, -0.10006),
    19: (0.01305, 1.6256, -0.05265),
    20: _THORAX,
    21: (3.54205, 0.90436, -0.17364),
    22: (4.86513, 0, 0),
    23: (3.35554, 0, 0),
    25: (0.66117, 0, 0),
    26: (0.53306, 0, 0),
    28: (0.5412, 0, 0.5412),
    29: _THORAX,
    30: (-3.49802, 0.75994, -0.32616),
    31: (-5.02649, 0, 0),
    32: (-3.36431, 0, 0),
    34: (-0.73041, 0, 0),
    35: (-0.58887, 0, 0),
    37: (-0.59786, 0, 0.59786),
}


def read_expmap(text: str, source: str = "the file of exponential maps") -> Recording:
    """Positions of the 38 joints; the first line, an added T-pose, is left out.

    Raises:
        ValueError: lines are not of 117 numbers.
    """
    try:
        values = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float64, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if values.shape[1] != 3 * (len(_NAMES) + 1) or len(values) < 2:
        raise ValueError(f"{source} has {values.shape[0]} lines of {values.shape[1]} numbers; expected lines of 117")
    rows = torch.from_numpy(values[1:]).unflatten(1, (-1, 3))  # (F, 39, 3)
    local = quaternion_to_matrix(expmap_to_quaternion(-rows[:, 1:]))  # (F, 38, 3, 3)
    turns, positions = [local[:, 0]], [rows[:, 0]]
    for joint, parent in enumerate(_PARENTS[1:], start=1):
        offset = torch.tensor(_OFFSETS.get(joint, (0.0, 0.0, 0.0)), dtype=torch.float64)
        positions.append(positions[parent] + turns[parent] @ offset)
        turns.append(turns[parent] @ local[:, joint])
    return Recording(_NAMES, torch.stack(positions, 1), FPS, source)
