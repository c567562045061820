"""Motion on disk: recordings, data sets, captions and drawing. What the numbers mean is in :mod:`genssm.motion`."""

from genssm.data.motion.dataset import Lengths, MotionDataset, build_motion_dataset

__all__ = ["Lengths", "MotionDataset", "build_motion_dataset"]
