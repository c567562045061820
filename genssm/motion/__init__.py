"""Human motion as numbers: skeletons, rotations, kinematics, feature vectors and their normalisation.

Pure functions on tensors, batched and differentiable; files, data sets and drawing are in :mod:`genssm.data.motion`.
"""

from genssm.motion.features import (
    RECOVERY_PATHS,
    canonical_joints,
    feature_parts,
    features_to_joints,
    joints_to_features,
    recover_root,
    uniform_skeleton,
)
from genssm.motion.kinematics import forward_kinematics, inverse_kinematics
from genssm.motion.normalisation import FeatureStatistics, feature_statistics
from genssm.motion.skeleton import KIT, SKELETONS, T2M, Skeleton, skeleton_of_features

__all__ = [
    "KIT",
    "RECOVERY_PATHS",
    "SKELETONS",
    "T2M",
    "FeatureStatistics",
    "Skeleton",
    "canonical_joints",
    "feature_parts",
    "feature_statistics",
    "features_to_joints",
    "forward_kinematics",
    "inverse_kinematics",
    "joints_to_features",
    "recover_root",
    "skeleton_of_features",
    "uniform_skeleton",
]
