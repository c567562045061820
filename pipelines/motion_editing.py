"""Motions with given parts, and motions made of overlapping segments."""

from collections.abc import Callable, Sequence

import torch
from diffusers import SchedulerMixin

from genssm import paths
from genssm.schedulers import flow_settings

# B motions, T frames, F features, n latent tokens, D their width


class CleanView:
    """A scheduler's prediction as the clean sample that it implies, and back.

        x = alpha x_0 + sigma noise

    Args:
        scheduler: of a flow, or of a diffusion with ``alphas_cumprod``.
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        self.scheduler = scheduler
        self.flow = flow_settings(scheduler)

    def _coefficients(self, time: torch.Tensor) -> tuple[float, float]:
        """alpha and sigma of a diffusion."""
        abar = float(self.scheduler.alphas_cumprod[round(float(time))])
        return abar**0.5, (1 - abar) ** 0.5

    def clean(self, prediction: torch.Tensor, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The clean sample of a prediction made at (x, time)."""
        if self.flow is not None:
            path, source = self.flow
            s = (time / self.scheduler.config.num_train_timesteps).to(x)
            return paths.convert(path, prediction, x, s, source=source, target="sample")
        kind = self.scheduler.config.prediction_type
        alpha, sigma = self._coefficients(time)
        if kind == "sample":
            return prediction
        return (x - sigma * prediction) / alpha if kind == "epsilon" else alpha * x - sigma * prediction

    def prediction(self, clean: torch.Tensor, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The prediction at (x, time) that implies a clean sample."""
        if self.flow is not None:
            path, target = self.flow
            s = (time / self.scheduler.config.num_train_timesteps).to(x)
            return paths.convert(path, clean, x, s, source="sample", target=target)
        kind = self.scheduler.config.prediction_type
        alpha, sigma = self._coefficients(time)
        if kind == "sample":
            return clean
        return (x - alpha * clean) / sigma if kind == "epsilon" else (alpha * x - clean) / sigma


def hold_frames(
    view: CleanView,
    prediction: torch.Tensor,
    x: torch.Tensor,
    time: torch.Tensor,
    known: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """The prediction changed where frames are given, so that it points at them.

    Each sampler then carries the given frames from its noise to their values, as if it had always predicted them.

    Args:
        view: of the scheduler.
        prediction, x: (B, T, F).
        time: the time of the prediction.
        known: given frames, normalised, (B, T, F).
        mask: (B, T) bool, True where they are given.
    Returns:
        (B, T, F).
    """
    return torch.where(mask[..., None], view.prediction(known, x, time), prediction)


def hold_latents(
    view: CleanView,
    prediction: torch.Tensor,
    x: torch.Tensor,
    time: torch.Tensor,
    known: torch.Tensor,
    mask: torch.Tensor,
    decode: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
    lengths: Sequence[int],
    iterations: int = 20,
    rate: float = 0.1,
) -> torch.Tensor:
    """The prediction of latents pulled towards those whose decoded motion holds the given frames.

    The clean latents that the prediction implies are moved by some steps of Adam on the squared error of the given
    frames (in the spirit of reconstruction guidance, Ho et al. 2022, but through the decoder alone).

    Args:
        view: of the scheduler.
        prediction, x: (B, n, D).
        time: the time of the prediction.
        known: given frames, normalised, (B, T, F).
        mask: (B, T) bool, True where they are given.
        decode: latents and lengths to normalised features (B, T, F).
        lengths: frames of each motion.
        iterations, rate: of Adam.
    Returns:
        (B, n, D).
    """
    with torch.enable_grad():
        latents = view.clean(prediction, x, time).detach().requires_grad_()
        optimizer = torch.optim.Adam([latents], lr=rate)
        for _ in range(iterations):
            error = (decode(latents, lengths) - known).square() * mask[..., None]
            # A sum over motions, each by its own number of frames: none changes another's step.
            loss = (error.mean(-1).sum(-1) / mask.sum(-1).clamp(min=1)).sum()
            (latents.grad,) = torch.autograd.grad(loss, latents)
            optimizer.step()
    return view.prediction(latents.detach(), x, time)


def segment_windows(lengths: Sequence[int], overlap: int) -> list[tuple[int, int]]:
    """First and last frame + 1 of each segment's window: half an overlap more on each inner side.

    Args:
        lengths: frames of each segment.
        overlap: frames that neighbours share, even.
    Returns:
        One (start, end) per segment; the windows cover all frames.
    Raises:
        ValueError: an overlap that is not shorter than every segment, so that three windows would meet.
    """
    if overlap < 0 or (len(lengths) > 1 and overlap >= min(lengths)):
        raise ValueError(
            f"transitions have {overlap} frames, the shortest segment {min(lengths)}; make transition_seconds shorter"
        )
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    total, half = sum(lengths), overlap // 2
    return [(max(start - half, 0), min(start + length + half, total)) for start, length in zip(starts, lengths)]


def join_segments(segments: Sequence[torch.Tensor], overlap: int) -> torch.Tensor:
    """Segments (T_i, F) that share ``overlap`` frames with their neighbours as one (T, F), crossfaded linearly."""
    weights = (torch.arange(overlap, device=segments[0].device) + 1.0) / (overlap + 1)  # of the later segment
    joined = segments[0]
    for segment in segments[1:]:
        if overlap:
            w = weights[:, None].to(segment)
            blended = (1 - w) * joined[-overlap:] + w * segment[:overlap]
            joined = torch.cat([joined[:-overlap], blended, segment[overlap:]])
        else:
            joined = torch.cat([joined, segment])
    return joined
