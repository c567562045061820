"""Images larger than a DiM was trained for, without training."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput

from genssm.paths import check_choice
from genssm.pipelines.class_conditional_image import ClassConditionalImagePipeline, Label
from genssm.schedulers import flow_settings


class DiMUpsamplingPipeline(ClassConditionalImagePipeline):
    """Training-free upsampling with DiM (Teng et al. 2024, arXiv:2405.14224).

    While the noise is strong the prediction's coarse part is replaced by that at the size the denoiser knows
    (upsample guidance, Hwang et al. 2024, arXiv:2404.01709), at the time whose signal-to-noise ratio is that of the
    averaged pixels:

        e = e_large + scale up(e_small(pool(x) / sqrt(abar + (1 - abar) / m^2), tau) / m - pool(e_large))

    where m is the factor, e is the guided noise prediction, and snr(tau) = m^2 snr(t).

    Components are those of :class:`ClassConditionalImagePipeline`, whose saved folders it loads; the denoiser predicts
    noise. The published samples used the solver in the noise prediction and a position table that was resized to the
    large size first and back for the small one:

        pipe.scheduler = ContinuousDPMSolverScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver")
        pipe.denoiser = pipe.denoiser.resized(128)      # then give height=1024, width=1024
    """

    _records = False  # what is evaluated at a step depends on its time

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | torch.Tensor | None = None,
        *,
        factor: int = 2,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 4.0,
        upsample_scale: float = 1.0,
        upsample_from: float = 0.7,
        skip_tuning: str = "none",
        skip_tuning_top: float = 0.82,
        **arguments: object,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: as for :class:`ClassConditionalImagePipeline`.
            factor: m, how many times larger than the small prediction; 2 and 3 were tried by the authors.
            height, width: size of the images in pixels; by default ``factor`` times the denoiser's own.
            guidance_scale: weight of classifier-free guidance; the published 3.0 counts from 0, this from 1.
            upsample_scale: strength of the correction.
            upsample_from: the correction is used from this time on, 0 data to 1 noise.
            skip_tuning: "none"; "time": scale the long skips, the more the stronger the noise; "as_released": with
                the constant of the released code that leaves next to no effect
                (:meth:`genssm.models.DiM.enable_skip_tuning`).
            skip_tuning_top: scale of the last long skip at pure noise.
            arguments: further arguments of :class:`ClassConditionalImagePipeline`; no evaluation runs as a graph.
        Returns:
            An output with ``images``.
        Raises:
            ValueError: contradictory or impossible arguments; raised before anything is computed.

        Example:
            >>> from genssm import DiMUpsamplingPipeline
            >>> pipe = DiMUpsamplingPipeline.from_pretrained("dim-h-512", torch_dtype=torch.bfloat16).to("cuda")
            >>> pipe(207, factor=2, skip_tuning="time").images[0].save("golden_retriever_1024.png")
        """
        if flow_settings(self.scheduler) is not None or self.scheduler.config.prediction_type != "epsilon":
            raise ValueError("upsampling needs a denoiser of a noise schedule that predicts noise (epsilon)")
        if not isinstance(factor, int) or factor < 2:
            raise ValueError(f"factor is {factor!r}; expected a whole number, at least 2")
        if not 0 <= upsample_from <= 1:
            raise ValueError(f"upsample_from is {upsample_from}; expected 0 (always) to 1 (pure noise only)")
        check_choice("skip_tuning", skip_tuning, ("none", "time", "as_released"))
        sizes = [native * factor if size is None else size for size, native in zip((height, width), self.native_size)]
        unit = factor * self.vae_scale_factor * self.denoiser.config.patch_size
        for name, size in zip(("height", "width"), sizes):
            if size % unit:
                raise ValueError(f"{name} is {size}; upsampling by {factor} makes sizes that are multiples of {unit}")
        self._factor, self._upsample_scale, self._upsample_from = factor, upsample_scale, upsample_from
        arguments |= {"height": sizes[0], "width": sizes[1], "guidance_scale": guidance_scale}
        if skip_tuning == "none":
            return super().__call__(class_labels, **arguments)
        if not hasattr(self.denoiser, "enable_skip_tuning"):
            raise ValueError(f"skip_tuning needs the long skips of a DiM, and this is a {type(self.denoiser).__name__}")
        kept = self.denoiser.skip_tuning
        self.denoiser.enable_skip_tuning(skip_tuning_top, skip_tuning)
        try:
            return super().__call__(class_labels, **arguments)
        finally:
            self.denoiser.skip_tuning = kept

    def _predict(
        self,
        x: torch.Tensor,
        times: torch.Tensor,
        condition: Mapping[str, torch.Tensor],
        null: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The guided prediction at the large size, corrected by that at the small one; one time for all images."""
        prediction = super()._predict(x, times, condition, null)
        levels = self.scheduler.config.num_train_timesteps
        level = times.float() + 1  # diffusers counts the levels 1..N from 0
        if level / levels < torch.tensor(self._upsample_from, dtype=torch.float32):  # the grid's 0.7 is float32, too
            return prediction
        m = self._factor
        abar = float(self.scheduler.alphas_cumprod[int(level) - 1])
        small = F.avg_pool2d(x, m) / (abar + (1 - abar) / m**2) ** 0.5
        tau = matched_time(self.scheduler.alphas_cumprod, int(level), m).clamp(max=level / levels)
        correction = super()._predict(small, tau * levels - 1, condition, null) / m - F.avg_pool2d(prediction, m)
        return prediction + self._upsample_scale * F.interpolate(correction, scale_factor=m, mode="nearest")


def matched_time(alphas_cumprod: torch.Tensor, level: int, factor: int) -> torch.Tensor:
    """The time of a small image whose signal-to-noise ratio is that of a large one with its pixels averaged.

    Averaging factor^2 pixels divides the variance of the noise by factor^2. The candidates are the released ones: the
    ratio is looked up at the levels N-1, N-2, ..., 0 (in float32, truncated), the j-th stands for the time
    1 - j / (N - 1).

    Args:
        alphas_cumprod: abar of the noise levels 1..N, (N,).
        level: noise level of the large image, 1..N.
        factor: pixels per averaged pixel, along each side.
    Returns:
        Scalar, float32, in [0, 1].
    """
    levels = len(alphas_cumprod)
    abar = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])
    snr = abar / (1 - abar)  # infinite at level 0
    looked_up = (torch.arange(levels - 1, -1, -1, dtype=torch.float32) / levels * levels).long()
    best = (factor**2 * snr[level] - snr[looked_up]).abs().argmin()
    return torch.linspace(1.0, 0.0, levels)[best]
