"""The mixers that a denoiser's blocks can have, by name."""

from typing import Any

from torch import nn

from genssm.layers.mamba import Mamba
from genssm.layers.mamba2 import Mamba2

MIXERS: dict[str, type[nn.Module]] = {"mamba": Mamba, "mamba2": Mamba2}


def mixer_options(
    mixer: str, *, dt_rank: int | str, headdim: int | None, ngroups: int | None, **options: Any
) -> dict[str, Any]:
    """Options of :func:`make_mixer` from the arguments of a model.

    Args:
        mixer: "mamba" or "mamba2".
        dt_rank: of Mamba, see there; "auto" with Mamba-2.
        headdim, ngroups: of Mamba-2, None for its own 64 and 1; None with Mamba.
        **options: what both mixers take.

    Raises:
        ValueError: an unknown mixer, or an option of the other one.
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer is {mixer!r}; expected one of {', '.join(MIXERS)}")
    if mixer == "mamba":
        if headdim is not None or ngroups is not None:
            raise ValueError("headdim and ngroups are options of mixer 'mamba2'; leave them out, or choose that mixer")
        return {"kind": mixer, "dt_rank": dt_rank, **options}
    if dt_rank != "auto":
        raise ValueError(f"dt_rank is {dt_rank!r}, an option of mixer 'mamba'; leave it out, or choose that mixer")
    given = {"headdim": headdim, "ngroups": ngroups}
    return {"kind": mixer, **{name: value for name, value in given.items() if value is not None}, **options}


def make_mixer(hidden_size: int, *, kind: str = "mamba", **options: Any) -> Mamba | Mamba2:
    """A mixer for tokens of width ``hidden_size``; ``kind`` is a key of :data:`MIXERS`, the rest its own options."""
    return MIXERS[kind](hidden_size, **options)
