"""Golden cases of motion as data: features and back, rotations, normalisation, word vectors, evaluator, metrics.

These cases name no model; their ``kind`` picks the handler. Their tolerances are those that their README suggests.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from genssm.data.motion.words import WordVectors, pad_tokens
from genssm.metrics import motion_distances as distances
from genssm.metrics.frechet import Moments, frechet_distance_from_features
from genssm.metrics.motion_evaluator import CONTACTS, UNIT_LENGTH, evaluator_of_weights
from genssm.motion import (
    SKELETONS,
    Skeleton,
    canonical_joints,
    feature_parts,
    feature_statistics,
    features_to_joints,
    inverse_kinematics,
    joints_to_features,
    recover_root,
    rotations,
    uniform_skeleton,
)
from tests.golden.checks import Check, compare, equal

Info = Mapping[str, Any]
Tensors = dict[str, torch.Tensor]


def within(atol: float, rtol: float = 0.0) -> dict[str, float]:
    return {"atol": atol, "rtol": rtol}


def skeleton_with(num_joints: int) -> Skeleton:
    return next(skeleton for skeleton in SKELETONS.values() if skeleton.num_joints == num_joints)


def joints_to_features_and_back(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Joints to the uniform skeleton, features, quaternions, and joints again along both paths."""
    skeleton = replace(SKELETONS[info["skeleton"]], contact_threshold=info["feet_thre"])
    joints, offsets = tensors["in.joints"], tensors["in.tgt_offsets"]
    scale = max(1.0, float(tensors["out.global_positions"].abs().max()))
    uniform = uniform_skeleton(joints, skeleton, offsets)
    placed = canonical_joints(uniform, skeleton)
    parts = feature_parts(placed, skeleton)
    features = joints_to_features(joints, skeleton, offsets)
    root, path = recover_root(tensors["out.features"])
    position, feature = within(2e-6 * scale), within(1e-4 * scale)
    yield compare("out.uniform_joints", uniform, tensors["out.uniform_joints"], position)
    yield compare("out.global_positions", placed, tensors["out.global_positions"], position)
    yield compare("out.features", features, tensors["out.features"], feature)
    contacts = skeleton.groups["contacts"]
    yield compare("out.contacts", features[..., contacts], tensors["out.features"][..., contacts], within(1e-9))
    yield compare("out.local_positions", parts.local_positions, tensors["out.local_positions"], feature)
    yield compare("out.l_velocity", parts.linear_velocity, tensors["out.l_velocity"], feature)
    for key, smooth in (("out.ik_quat_smooth", True), ("out.ik_quat", False)):
        quaternions = inverse_kinematics(tensors["out.global_positions"], skeleton, smooth_heading=smooth)
        yield compare(key, quaternions, tensors[key], within(1e-4))
    yield compare("out.rec_root_quat", root, tensors["out.rec_root_quat"], within(2e-6))
    yield compare("out.rec_root_pos", path, tensors["out.rec_root_pos"], position)
    for key, way in (("out.rec_joints_ric", "positions"), ("out.rec_joints_rot", "rotations")):
        found = features_to_joints(tensors["out.features"], skeleton, path=way, offsets=offsets)
        yield compare(key, found, tensors[key], position)


def features_to_joints_case(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Arbitrary features to the root and to joints along both paths, and the gradient of the first."""
    skeleton = skeleton_with(info["joints"])
    features = tensors["in.features"].clone().requires_grad_()
    root, path = recover_root(features)
    joints = features_to_joints(features, skeleton)
    turned = features_to_joints(features, skeleton, path="rotations", offsets=tensors["in.offsets"])
    (gradient,) = torch.autograd.grad((joints * tensors["in.grad_ric"]).sum(), features)
    for key, found in (("root_quat", root), ("root_pos", path), ("joints_ric", joints), ("joints_rot", turned)):
        yield compare(f"out.{key}", found, tensors[f"out.{key}"], within(1e-5, 1e-5))
    yield compare("grad.in.features", gradient, tensors["grad.in.features"], within(1e-5))


def rotations_case(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Each conversion. Where a matrix or angles become a quaternion its sign is free: q and -q are one rotation."""
    q, p, v, w = (tensors[f"in.{name}"] for name in "qpvw")
    six = rotations.matrix_from_6d(tensors["in.six"])
    found = {
        "qinv_q": rotations.inverse(q),
        "qmul_qp": rotations.multiply(q, p),
        "qrot_qv": rotations.rotate(q, v),
        "qbetween_vw": rotations.between(v, w),
        "matrix_q": rotations.quaternion_to_matrix(q),
        "cont6d_q": rotations.quaternion_to_6d(q),
        "matrix_six": six,
        "quat_six": _signed_like(rotations.matrix_to_quaternion(six), tensors["out.quat_six"]),
        "quat_expmap": rotations.expmap_to_quaternion(tensors["in.expmap"]),
        "qfix": rotations.continuous(tensors["in.qseq"]),
    }
    for key in tensors:
        kind, _, order = key.removeprefix("out.").partition("_")
        if kind == "qeuler":  # the reference answers in the order's own sequence of axes
            columns = [rotations.AXES.index(letter) for letter in order]
            found[f"qeuler_{order}"] = rotations.quaternion_to_euler(q, order)[:, columns]
        elif kind == "euler2quat":
            turned = rotations.euler_to_quaternion(tensors["in.euler_deg"], order)
            found[f"euler2quat_{order}"] = _signed_like(turned, tensors[key])
    for key, value in found.items():
        yield compare(f"out.{key}", value, tensors[f"out.{key}"], within(1e-5, 1e-5))


def _signed_like(q: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return q * torch.sign((q * expected).sum(-1, keepdim=True))


def normalisation(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Mean, grouped deviation, and one pass of the feature bias."""
    skeleton = skeleton_with(info["joints"])
    found = feature_statistics((tensors[key] for key in sorted(tensors) if key.startswith("in.clip")), skeleton)
    biased = found.with_feature_bias(5.0, skeleton)
    for key, value in (("mean", found.mean), ("std", found.std), ("std_featbias5", biased.std)):
        yield compare(f"out.{key}", value, tensors[f"out.{key}"], within(1e-6, 1e-6))


def metrics(info: Info, tensors: Tensors) -> Iterator[Check]:
    """R-precision, MM-Dist, FID and its moments, diversity and multimodality at stored indices, the interval."""
    texts, motions, real = (tensors[f"in.{name}"] for name in ("text", "motion", "gt_motion"))
    tight = within(1e-6, 1e-5)
    size = info["R_size"]
    found = distances.retrieval(texts, motions, top_k=info["top_k"], group_size=size)
    moments = Moments.of(motions)
    matching = torch.cat(
        [distances.pair_distances(a, b).diagonal() for a, b in zip(texts.split(size), motions.split(size))]
    )
    interval = distances.Interval.of(tensors["in.replications"].numpy())
    values = {
        "dist_first_batch": distances.pair_distances(texts[:size], motions[:size]),
        "r_precision": torch.tensor(found.r_precision),
        "mm_dist": torch.tensor([found.mm_dist]),
        "matching_per_sample": matching,
        "mu_motion": torch.from_numpy(moments.mu),
        "cov_motion": torch.from_numpy(moments.sigma),
        "diversity": torch.tensor([distances.diversity(motions, *_indices(tensors, "div"))]),
        "multimodality": torch.tensor([distances.multimodality(tensors["in.mm"], *_indices(tensors, "mm"))]),
        "ci": torch.tensor([interval.mean, interval.half_width]),
    }
    for key, value in values.items():
        yield compare(f"out.{key}", value, tensors[f"out.{key}"], tight)
    for key, other in (("fid", motions), ("fid_self", real)):
        value = torch.tensor([frechet_distance_from_features(other, real)])
        yield compare(f"out.{key}", value, tensors[f"out.{key}"], within(1e-6, 1e-4))


def fid_rank_deficient(info: Info, tensors: Tensors) -> Iterator[Check]:
    """FID of fewer vectors than dimensions."""
    value = frechet_distance_from_features(tensors["in.a"], tensors["in.b"])
    yield compare("out.fid", torch.tensor([value]), tensors["out.fid"], within(0.0, 1e-3))


def jerk(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Jerk per frame, its peak and the area against real motion."""
    curves = distances.jerk(tensors["in.joints"], tensors["in.lengths"])
    values = {
        "jerk": curves,
        "peak_jerk": torch.tensor([distances.peak_jerk(curves)]),
        "auj": torch.tensor([distances.area_under_jerk(curves, info["gt_jerk"])]),
    }
    for key, value in values.items():
        yield compare(f"out.{key}", value, tensors[f"out.{key}"], within(1e-6, 1e-5))


def evaluator(info: Info, tensors: Tensors) -> Iterator[Check]:
    """The three networks from published keys; the golden tensors list motions by length, ours stay in their order."""
    weights = {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}
    network = evaluator_of_weights(weights)
    names = {"dim_pose": "feature_dim", "movement_latent": "movement_dim", "coemb": "embedding_dim", "word": "word_dim"}
    for key in ("dim_pose", "movement_hidden", "movement_latent", "text_hidden", "motion_hidden", "coemb", "word"):
        yield equal(f"config.{key}", getattr(network.sizes, names.get(key, key)), info[key])
    yield equal("config.unit_length", UNIT_LENGTH, info["unit_length"])
    motions, lengths, order = tensors["in.motions"], tensors["in.m_lens"], tensors["out.align_idx"]
    yield equal("config.align_idx", lengths[order].tolist(), lengths.sort(descending=True).values.tolist())
    texts = network.embed_texts(tensors["in.word_embs"], tensors["in.pos_onehot"], tensors["in.cap_lens"])
    values = {
        "movement": network.movement_encoder(motions[..., :-CONTACTS]),
        "motion_emb": network.embed_normalised(motions, lengths),
        "text_emb": texts,
    }
    for key, value in values.items():
        yield compare(f"out.{key}", value[order], tensors[f"out.{key}"], within(1e-5, 1e-5))


def word_vectors(info: Info, tensors: Tensors) -> Iterator[Check]:
    """Tokens to vectors and classes, exactly."""
    known = dict(zip(info["words"], tensors["in.vectors"].numpy()))
    vectors = WordVectors(known.get, tensors["in.vectors"].shape[1], info["max_text_len"])
    padded, length = pad_tokens(info["tokens"], info["max_text_len"])
    yield equal("padded tokens", padded, info["padded_tokens"])
    yield equal("sentence length", length, info["sent_len"])
    found = vectors(info["tokens"])
    yield compare("out.word_embs", torch.from_numpy(found.words), tensors["out.word_embs"], within(1e-30))
    yield compare("out.pos_onehot", torch.from_numpy(found.classes), tensors["out.pos_onehot"], within(1e-30))


def _indices(tensors: Tensors, name: str) -> tuple[np.ndarray, np.ndarray]:
    return tensors[f"in.{name}_first"].numpy(), tensors[f"in.{name}_second"].numpy()


KINDS = {
    "joints_to_features_and_back": joints_to_features_and_back,
    "features_to_joints": features_to_joints_case,
    "rotations": rotations_case,
    "normalisation": normalisation,
    "t2m_metrics": metrics,
    "fid_rank_deficient": fid_rank_deficient,
    "jerk": jerk,
    "t2m_evaluator": evaluator,
    "word_vectorizer": word_vectors,
}
