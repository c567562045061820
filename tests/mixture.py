"""A denoiser whose right answer is known: the exact predictions for a mixture of Gaussians in the plane."""

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config

from genssm import paths
from genssm.layers import DenoiserOutput

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[1.2, -0.4], [-1.0, 0.8], [0.2, -1.2]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.10, 0.04], [0.04, 0.08]], [[0.05, -0.02], [-0.02, 0.12]], [[0.20, 0.0], [0.0, 0.04]]], dtype=torch.float64
)
MEAN = WEIGHTS @ MEANS
COVARIANCE = torch.einsum("k,kij->ij", WEIGHTS, COVARIANCES + torch.einsum("ki,kj->kij", MEANS, MEANS)) - torch.outer(
    MEAN, MEAN
)


class MixtureDenoiser(ModelMixin, ConfigMixin):
    """Answers E[target | x, time] for the mixture, as "images" of two channels and one pixel.

    Args:
        family: a path of genssm.paths, or "diffusion" for diffusers' default discrete schedule.
        prediction_type: what to answer.
        reverse_sign: answer the negative, to see that a wrong sign is noticed.
    """

    @register_to_config
    def __init__(
        self,
        family: str = "linear",
        prediction_type: str = "flow_prediction",
        reverse_sign: bool = False,
        sample_size: int = 1,
        in_channels: int = 2,
    ) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))  # gives the model a device and a dtype

    def _alpha_sigma(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.family != "diffusion":
            c = paths.coefficients(self.config.family, timestep.double() / 1000)
            return c.alpha, c.sigma
        abar = DDPMScheduler().alphas_cumprod.double()
        ratios = ((1 - abar) / abar).sqrt()
        # Between two indices diffusers interpolates sigma / alpha.
        low = timestep.double().floor().long().clamp(0, len(abar) - 2)
        ratio = torch.lerp(ratios[low], ratios[low + 1], timestep.double() - low)
        alpha = (1 + ratio.square()).rsqrt()
        return alpha, ratio * alpha

    def _clean(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x], (B, 2)."""
        eye = torch.eye(2, dtype=torch.float64)
        spread = (
            alpha[:, None, None, None] ** 2 * COVARIANCES + sigma[:, None, None, None] ** 2 * eye
        )  # (B or 1, K, 2, 2)
        centred = x[:, None] - alpha[:, None, None] * MEANS  # (B, K, 2)
        solved = (torch.linalg.inv(spread) @ centred[..., None])[..., 0]
        logits = WEIGHTS.log() - 0.5 * spread.logdet() - 0.5 * (centred * solved).sum(-1)
        means = MEANS + alpha[:, None, None] * (COVARIANCES @ solved[..., None])[..., 0]
        return (logits.softmax(1)[..., None] * means).sum(1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoiserOutput | tuple[torch.Tensor]:
        """hidden_states (B, 2, 1, 1), timestep (B,)."""
        x = hidden_states.double().flatten(1)
        timestep = timestep.reshape(-1)
        if (timestep == timestep[0]).all():
            timestep = timestep[:1]  # one set of coefficients serves all
        alpha, sigma = self._alpha_sigma(timestep)
        clean = self._clean(x, alpha, sigma)
        a, s = alpha[:, None], sigma[:, None]
        noise = (x - a * clean) / s.clamp(min=1e-9)
        kind = self.config.prediction_type
        if kind == "flow_prediction":
            c = paths.coefficients(self.config.family, timestep.double() / 1000).over(clean)
            answer = c.d_alpha * clean + c.d_sigma * noise
        elif kind == "v_prediction":
            answer = a * noise - s * clean
        else:
            answer = {"sample": clean, "epsilon": noise, "score": -noise / s}[kind]
        answer = (-answer if self.config.reverse_sign else answer).float().reshape(hidden_states.shape)
        return DenoiserOutput(answer) if return_dict else (answer,)


def even_noise(count: int) -> torch.Tensor:
    """Standard normal points spread evenly (Sobol), (count, 2, 1, 1): their moments are right to about 1 / count."""
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).float().reshape(count, 2, 1, 1)


def moment_error(samples: torch.Tensor) -> float:
    """Largest difference of mean and covariance from the mixture's, samples (B, 2, 1, 1)."""
    x = samples.double().flatten(1)
    return max(float((x.mean(0) - MEAN).abs().max()), float((x.T.cov() - COVARIANCE).abs().max()))
