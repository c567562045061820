"""Key frames of a clip by density peaks, to mask in training (in the spirit of KMM, arXiv:2411.06481)."""

import torch


def key_frame_scores(
    tokens: torch.Tensor, bandwidth: float = 1.0, lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How much each frame is the centre of its surroundings.

        density_i = sum_j exp(-|x_i - x_j|^2 / bandwidth)                       (a frame counts for itself)
        distance_i = min over frames of greater density |x_i - x_j|            (the densest: its largest distance)
        score_i = density_i distance_i

    Args:
        tokens: embedded frames, (B, L, D). Their distances should be about one in units of the square root of the
            bandwidth, else all densities are 1 or L.
        bandwidth: scale of the squared distances.
        lengths: valid frames of each clip, (B,); None means all. Frames after them have the score 0.
    Returns:
        density, distance and score, (B, L) each, dtype of ``tokens``.
    Raises:
        ValueError: the bandwidth is not positive.
    """
    if bandwidth <= 0:
        raise ValueError(f"bandwidth is {bandwidth}; expected a positive number")
    count = tokens.shape[1]
    if lengths is None:
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    else:
        valid = torch.arange(count, device=tokens.device) < lengths.to(tokens.device)[:, None]
    # A matrix product would lose the small distances that densities are made of.
    distances = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")  # (B, L, L)
    pairs = valid[:, None, :].expand_as(distances)
    density = torch.where(pairs, (-distances.square() / bandwidth).exp(), 0.0).sum(-1)  # (B, L)
    greater = (density[:, None, :] > density[:, :, None]) & pairs
    nearest = torch.where(greater, distances, torch.inf).amin(-1)
    farthest = torch.where(pairs, distances, 0.0).amax(-1)
    distance = torch.where(greater.any(-1), nearest, farthest)
    score = density * distance
    return density, distance, torch.where(valid, score, 0.0)


def key_frame_mask(features: torch.Tensor, lengths: torch.Tensor, ratio: float, bandwidth: float = 1.0) -> torch.Tensor:
    """The frames of the highest scores of each clip, to be hidden from a model that must find them again.

    Args:
        features: normalised features of frames, (B, T, F).
        lengths: valid frames, (B,).
        ratio: part of a clip's valid frames, rounded down.
        bandwidth: squared distance per feature.
    Returns:
        (B, T) bool, True for hidden frames.
    """
    _, _, score = key_frame_scores(features, bandwidth * features.shape[2], lengths)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < (ratio * lengths).long()[:, None]
