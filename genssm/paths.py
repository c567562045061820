"""Probability paths between data and noise: the one written convention of time and sign.

Time. Every model of this project is called with ``timestep`` on diffusers' scale. With ``num_train_timesteps = 1000``

    s = timestep / 1000,      s = 0 is data, s = 1 is noise,      x_s = alpha(s) x_0 + sigma(s) noise.

Sign. The velocity is the derivative along increasing s, from data to noise,

    flow_prediction  v = dx_s/ds = alpha'(s) x_0 + sigma'(s) noise,      on the linear path: noise - x_0,

so sampling integrates from s = 1 down to s = 0. Publications that put the data at time one (SiT, ZigMa, DiMSUM) write
t = 1 - s and u = dx/dt = -v: their networks are called with ``1 - timestep / 1000`` and answer ``-v``.

Paths (Ma et al., 2024, "SiT", section 3 and appendix; VP: Song et al., 2021):

    linear   alpha = 1 - s              sigma = s
    gvp      alpha = cos(pi s / 2)      sigma = sin(pi s / 2)
    vp       alpha = exp(-(20 - 0.1) s^2 / 4 - 0.1 s / 2)      sigma = sqrt(1 - alpha^2)

What a network may predict, all at the same (x_s, s): ``flow_prediction`` (v), ``epsilon`` (the noise), ``sample`` (x_0)
and ``score`` (the gradient of log density, -noise / sigma).
"""

import math
from typing import NamedTuple

import torch

PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("flow_prediction", "epsilon", "sample", "score")
DIFFUSIONS = ("none", "constant", "sigma", "linear", "decreasing", "increasing-decreasing", "log", "sbdm")
VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0


class Coefficients(NamedTuple):
    """alpha and sigma of a path at times s, with their derivatives along s; each of the shape of s."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    d_alpha: torch.Tensor
    d_sigma: torch.Tensor

    def over(self, x: torch.Tensor) -> "Coefficients":
        """The same coefficients shaped (B, 1, ...) to multiply x (B, ...); scalars stay scalars."""
        return Coefficients(*(per_sample(c, x) for c in self))

    @property
    def determinant(self) -> torch.Tensor:
        """alpha sigma' - alpha' sigma > 0, the determinant of (x_0, noise) -> (x, v)."""
        return self.alpha * self.d_sigma - self.d_alpha * self.sigma


def per_sample(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape values (B,) to (B, 1, ..., 1) with as many dimensions as x (B, ...)."""
    return values.reshape(-1, *[1] * (x.ndim - 1)) if values.ndim else values


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the choices unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{what} is {value!r}; expected one of {', '.join(choices)}")


def coefficients(path: str, s: torch.Tensor) -> Coefficients:
    """alpha, sigma, alpha', sigma' of a path.

    Args:
        path: "linear", "gvp" or "vp".
        s: times in [0, 1], any shape, floating point; the result has its dtype.
    Raises:
        ValueError: unknown path.
    """
    check_choice("path", path, PATHS)
    if path == "linear":
        one = torch.ones_like(s)
        return Coefficients(1 - s, s, -one, one)
    if path == "gvp":
        angle = 0.5 * math.pi * s
        alpha, sigma = angle.cos(), angle.sin()
        return Coefficients(alpha, sigma, -0.5 * math.pi * sigma, 0.5 * math.pi * alpha)
    log_alpha = -0.25 * (VP_BETA_MAX - VP_BETA_MIN) * s.square() - 0.5 * VP_BETA_MIN * s
    alpha = log_alpha.exp()
    sigma = (-torch.expm1(2 * log_alpha)).sqrt()
    d_alpha = -0.5 * (VP_BETA_MIN + (VP_BETA_MAX - VP_BETA_MIN) * s) * alpha
    return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)


def interpolate(path: str, clean: torch.Tensor, noise: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """x_s = alpha(s) clean + sigma(s) noise for clean, noise (B, ...) and s (B,)."""
    c = coefficients(path, s).over(clean)
    return c.alpha * clean + c.sigma * noise


def velocity(path: str, clean: torch.Tensor, noise: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """v = alpha'(s) clean + sigma'(s) noise for clean, noise (B, ...) and s (B,)."""
    c = coefficients(path, s).over(clean)
    return c.d_alpha * clean + c.d_sigma * noise


def convert(
    path: str, prediction: torch.Tensor, x: torch.Tensor, s: torch.Tensor, *, source: str, target: str
) -> torch.Tensor:
    """Turn one kind of prediction at (x, s) into another.

    Solves x = alpha x_0 + sigma noise together with what ``source`` says for (x_0, noise). Exact wherever the answer
    exists; it does not where alpha = 0 (from ``epsilon`` or ``score``) or sigma = 0 (from ``sample``, and to
    ``score``).

    Args:
        path: name of the path.
        prediction: (B, ...), of kind ``source``.
        x: noisy sample, (B, ...).
        s: times, (B,) or scalar.
        source: kind of ``prediction``; "flow_prediction", "epsilon", "sample" or "score".
        target: kind of the result.
    Returns:
        (B, ...).
    Raises:
        ValueError: unknown path, source or target.
    """
    check_choice("source", source, PREDICTIONS)
    check_choice("target", target, PREDICTIONS)
    if source == target:
        return prediction
    c = coefficients(path, s).over(x)
    if source == "flow_prediction":
        if target == "sample":
            return (c.d_sigma * x - c.sigma * prediction) / c.determinant
        noise = (c.alpha * prediction - c.d_alpha * x) / c.determinant
    elif source == "sample":
        noise = (x - c.alpha * prediction) / c.sigma
    else:
        noise = prediction if source == "epsilon" else -c.sigma * prediction
    if target == "epsilon":
        return noise
    if target == "score":
        return -noise / c.sigma
    clean = prediction if source == "sample" else (x - c.sigma * noise) / c.alpha
    return clean if target == "sample" else c.d_alpha * clean + c.d_sigma * noise


def drift_coefficient(path: str, s: torch.Tensor) -> torch.Tensor:
    """f(s) = alpha' / alpha of the forward process dx = f x ds + sqrt(2 g) dW; shape of s."""
    c = coefficients(path, s)
    return c.d_alpha / c.alpha


def drift_variance(path: str, s: torch.Tensor) -> torch.Tensor:
    """g(s) = sigma sigma' - sigma^2 alpha' / alpha, with v = f x - g score; shape of s."""
    c = coefficients(path, s)
    return c.sigma * c.d_sigma - c.sigma.square() * c.d_alpha / c.alpha


def diffusion(path: str, form: str, s: torch.Tensor, norm: float = 1.0) -> torch.Tensor:
    """w(s), the strength of the noise in the reverse process dx = (-v + w score) dt + sqrt(2 w) dW, t = 1 - s.

    Every w >= 0 gives the same marginals (Ma et al., 2024, section 2.4).

    Args:
        path: name of the path.
        form: "none" 0; "constant" norm; "sigma" norm sigma(s); "linear" norm s; "decreasing"
            (1 - norm cos(pi s))^2 / 4; "increasing-decreasing" norm sin(pi s)^2; "log" norm log(1 + s - s^2);
            "sbdm" 2 norm g(s).
        s: times, any shape.
        norm: overall strength.
    Returns:
        shape of s.
    Raises:
        ValueError: unknown form.
    """
    check_choice("diffusion form", form, DIFFUSIONS)
    if form in ("none", "constant"):
        return torch.full_like(s, norm if form == "constant" else 0.0)
    if form == "sigma":
        return norm * coefficients(path, s).sigma
    if form == "linear":
        return norm * s
    if form == "decreasing":
        return 0.25 * (1 - norm * torch.cos(math.pi * s)).square()
    if form == "increasing-decreasing":
        return norm * torch.sin(math.pi * s).square()
    if form == "log":
        return norm * torch.log1p(s - s.square())
    return 2 * norm * drift_variance(path, s)
