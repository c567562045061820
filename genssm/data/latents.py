"""Data sets of latents encoded beforehand, and encoding with a VAE: ``{"latents": float32 (C, H, W), "class_labels"}``.

A latent reaches the model as ``(z - shift) * scale``, diffusers' convention, where z is drawn from the moments when
moments are stored. What a file holds is declared, never guessed: see :class:`genssm.config.LatentsConfig`.
"""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genssm.config import LatentsConfig
from genssm.data.captions import draw_caption, mirrors
from genssm.data.layouts import LAYOUTS, Store
from genssm.data.sources import READ_ERRORS, count_classes

logger = logging.getLogger("genssm")


def open_latents(path: str | None, split: str, config: LatentsConfig, *, flip: bool = False) -> "LatentDataset":
    """The latents at ``path``; a sub-folder with the name of the split is used when there is one.

    Raises:
        FileNotFoundError: nothing there, or nothing that any layout recognises.
        ValueError: the declaration is incomplete or contradicts the arrays.
    """
    if path is None or not Path(path).exists():
        raise FileNotFoundError(f"data.path={path}: no latents there; python -m genssm.data.encode makes them")
    root = Path(path) / split if (Path(path) / split).is_dir() else Path(path)
    if config.layout != "auto" and config.layout not in LAYOUTS:
        raise ValueError(f"data.latents.layout={config.layout!r}: expected auto, {', '.join(LAYOUTS)}")
    for name in LAYOUTS if config.layout == "auto" else (config.layout,):
        try:
            store = LAYOUTS[name](root)
        except READ_ERRORS as error:
            raise ValueError(f"cannot read {root} as latents of layout {name}: {_reason(error)}") from error
        if store is not None:
            break
    else:
        raise FileNotFoundError(f"{root} holds no latents of layout {config.layout}; layouts: {', '.join(LAYOUTS)}")
    given = {n: getattr(config, n) for n in ("form", "scaled", "scale", "shift", "flip_rows")}
    declared = store.declared | {n: v for n, v in given.items() if v is not None}
    undeclared = [n for n in ("form", "scaled") if declared.get(n) is None]
    if declared.get("scaled") is False and declared.get("scale") is None:
        undeclared.append("scale")
    if undeclared:
        keys = " and ".join(f"data.latents.{n}" for n in undeclared)
        raise ValueError(f"{root} (layout {name}) does not say what it holds; set {keys}")
    return LatentDataset(store, flip=flip, **{n: v for n, v in declared.items() if v is not None})


class LatentDataset(torch.utils.data.Dataset):
    """Stored latents.

    ``dataset[i]`` is the plain row, for moments its mean; ``dataset.item(i, key)`` draws from the moments and chooses
    between the row and its mirrored copy by the key.

    Args:
        store: the arrays.
        form: ``sample``; ``mean_logvar`` or ``mean_std``, both halves along the first axis.
        scaled: whether shift and scale were applied before storing.
        scale, shift: a number, or one per channel.
        flip_rows: rows N..2N-1 are mirrored copies of rows 0..N-1.
        flip: use the mirrored copies.

    Attributes:
        num_classes, class_names, labels, captions, item_shape: as :class:`genssm.data.images.ImageDataset`.
        scale, shift: float32 arrays that broadcast against an item.
    """

    tensor_name = "latents"

    def __init__(
        self,
        store: Store,
        *,
        form: str,
        scaled: bool,
        scale: float | list[float] = 1.0,
        shift: float | list[float] = 0.0,
        flip_rows: bool = False,
        flip: bool = False,
    ) -> None:
        if flip and not flip_rows:
            raise ValueError(
                "data.flip=true needs mirrored copies among the latents: a mirrored latent is not the latent of the "
                "mirrored image; encode with --flip"
            )
        self.store, self.form, self.scaled, self.flip = store, form, scaled, flip
        self.count = store.rows // 2 if flip_rows else store.rows
        self.labels = store.labels
        if self.labels is not None and len(self.labels) != self.count:
            raise ValueError(f"{self.count} latents but {len(self.labels)} labels; check data.latents.flip_rows")
        self.captions = store.captions
        if self.captions is not None and len(self.captions) != self.count:
            raise ValueError(f"{self.count} latents but captions of {len(self.captions)}; encode them again")
        count = 0 if self.labels is None else count_classes(self.labels)
        self.class_names = store.class_names or tuple(str(i) for i in range(count))
        self.num_classes = len(self.class_names)
        shape = self._stored(0).shape
        if form != "sample" and shape[0] % 2:
            raise ValueError(f"form {form} needs two halves of channels, but a stored array is {shape}")
        self.item_shape = shape if form == "sample" else (shape[0] // 2, *shape[1:])
        ndim = (1,) * (len(shape) - 1)
        self.scale, self.shift = (np.asarray(v, np.float32).reshape(-1, *ndim) for v in (scale, shift))
        self._check_deviation()

    def __len__(self) -> int:
        return self.count

    def latents(self, index: int, key: int | None) -> np.ndarray:
        """The latent as a model sees it, float32 ``item_shape``."""
        mirrored = self.flip and key is not None and key & 1
        if mirrored and self.captions is not None:
            mirrored = mirrors(draw_caption(self.captions[index], key))
        row = index + self.count if mirrored else index
        z = np.asarray(self._stored(row), np.float32)
        if self.form != "sample":
            z, spread = np.split(z, 2)
            if key is not None:
                deviation = np.exp(0.5 * spread.clip(-30, 20)) if self.form == "mean_logvar" else spread
                draw = np.random.Generator(np.random.Philox(key))
                z = z + deviation * draw.standard_normal(z.shape, np.float32)
        return z if self.scaled else (z - self.shift) * self.scale

    def _stored(self, row: int) -> np.ndarray:
        try:
            return self.store.read(row)
        except READ_ERRORS as error:
            raise ValueError(f"cannot read row {row} of the latents: {_reason(error)}") from error

    def item(self, index: int, key: int | None) -> dict[str, Any]:
        """One training item; ``key`` decides what is random in it, None leaves nothing random."""
        item: dict[str, Any] = {"latents": torch.from_numpy(np.array(self.latents(index, key), np.float32))}
        if self.captions is not None:
            item["text"] = draw_caption(self.captions[index], key)
        if self.labels is not None:
            item["class_labels"] = int(self.labels[index])
        return item

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(int(index), None)

    def in_memory(self) -> "LatentDataset":
        """The same data set with every stored array read once and kept."""
        arrays = np.stack([self._stored(row) for row in range(self.store.rows)])
        kept = copy.copy(self)
        kept.store = dataclasses.replace(self.store, read=lambda row: arrays[row])
        return kept

    def _check_deviation(self) -> None:
        """Warn when the numbers do not look like the declaration (latents for a model have a deviation of 0.5 to 1)."""
        some = np.linspace(0, self.count - 1, min(self.count, 256)).astype(int)
        deviation = float(np.std(np.stack([self.latents(i, None) for i in some])))
        if not 0.3 < deviation < 2.5:
            declared = "already scaled" if self.scaled else f"not scaled, scale {self.scale.reshape(-1).tolist()}"
            logger.warning(
                "latents declared as %s, %s have a deviation of %.2f, expected about 1; check data.latents.scaled and "
                "data.latents.scale",
                self.form,
                declared,
                deviation,
            )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def load_vae(path: str | Path) -> torch.nn.Module:
    """The VAE in a folder (an AutoencoderKL or AutoencoderTiny saved by diffusers), frozen; ``path/vae`` is tried too.

    Raises:
        FileNotFoundError: no ``config.json`` in either folder.
        ValueError: the folder holds another kind of model.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel

    folder = next((f for f in (Path(path), Path(path, "vae")) if (f / "config.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no VAE in {path}: a folder with config.json and weights, saved by diffusers, is expected"
        )
    vae = AutoModel.from_pretrained(str(folder))
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny):
        raise ValueError(f"{folder} holds a {type(vae).__name__}; expected an AutoencoderKL or AutoencoderTiny")
    return vae.requires_grad_(False).eval()


def vae_scaling(vae: torch.nn.Module) -> tuple[float, float]:
    """(scale, shift) of a VAE's latents."""
    return float(getattr(vae.config, "scaling_factor", None) or 1.0), float(
        getattr(vae.config, "shift_factor", None) or 0
    )


def vae_moments(vae: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and log-variance of the latents of images (B, 3, H, W) in -1..1; None for a VAE without variance."""
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mean, encoded.latent_dist.logvar
    return encoded.latents, None


@torch.no_grad()
def encode_images(vae: torch.nn.Module, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Scaled latents of images.

    Args:
        vae: from :func:`load_vae`.
        pixels: (B, C, H, W) in -1..1.
        noise: standard normal, shape of the latents; None takes the mean.

    Returns:
        float32 (B, c, h, w).
    """
    mean, logvar = vae_moments(vae, pixels)
    scale, shift = vae_scaling(vae)
    z = mean if noise is None or logvar is None else mean + torch.exp(0.5 * logvar) * noise
    return ((z - shift) * scale).float()


def check_vae(dataset: LatentDataset, vae: torch.nn.Module) -> None:
    """Refuse a VAE whose scaling is not the one the stored latents were made with."""
    scale, shift = vae_scaling(vae)
    if not (np.allclose(dataset.scale, scale, rtol=1e-3) and np.allclose(dataset.shift, shift, atol=1e-3)):
        raise ValueError(
            f"the latents use scale {dataset.scale.reshape(-1).tolist()}, shift {dataset.shift.reshape(-1).tolist()}; "
            f"the VAE has {scale} and {shift}; set data.latents.scale and data.latents.shift, or use their VAE"
        )
