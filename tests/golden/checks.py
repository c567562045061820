"""One comparison of the golden runner, and its tolerance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        name: what was compared.
        error: largest difference, relative to the largest expected value.
        used: largest difference in units of its tolerance; at most 1 passes.
        note: what a number does not say.
    """

    name: str
    error: float
    used: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.used <= 1.0

    @classmethod
    def failure(cls, name: str, note: str) -> "Check":
        return cls(name, float("inf"), float("inf"), note)


def compare(
    name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: Mapping[str, Any], slack: float = 0.0
) -> Check:
    """Check |got - expected| <= atol + slack + rtol |expected| for every element, in float64.

    Args:
        name: what is compared; the name of a gradient starts with "grad.", and both sides are then divided by the
            largest expected magnitude first.
        got: any shape.
        expected: the golden tensor, of the same shape.
        tolerance: "rtol" and "atol".
        slack: uncertainty of the golden tensor itself; a check that has needed it says so in its note.
    """
    if got.shape != expected.shape:
        return Check.failure(name, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    got, expected = got.detach().double().cpu(), expected.double()
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    if name.startswith("grad."):
        got, expected = got / largest, expected / largest
        largest = torch.ones_like(largest)
    difference = (got - expected).abs()
    if not bool(difference.isfinite().all()):
        return Check.failure(name, "not finite")
    allowed = tolerance["atol"] + tolerance["rtol"] * expected.abs()
    error, used = float(difference.max() / largest), float((difference / allowed).max())
    if used <= 1 or not slack:
        return Check(name, error, used)
    note = f"{used:.2f} x tolerance without {slack:.1e} for the last bit of the time features, error {error:.1e}"
    return Check(name, error, float((difference / (allowed + slack)).max()), note)


def equal(name: str, got: object, expected: object) -> Check:
    """Check that two values of a configuration agree exactly."""
    return Check(name, 0.0, 0.0) if got == expected else Check.failure(name, f"{got!r}, expected {expected!r}")
