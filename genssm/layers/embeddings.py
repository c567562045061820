"""Patches, times, labels and positions as vectors of the model's width."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each: a convolution with stride = kernel = ``patch_size``.

    Args:
        in_channels: channels C of the image or latent.
        hidden_size: width D of a token.
        patch_size: side of a patch, in pixels of the input.
    """

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` (B, C, H, W) to tokens (B, (H/p)(W/p), D) in raster order, in the dtype of the weights."""
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Turn tokens back into an image.

    Args:
        tokens: (B, gh gw, p p C), channels ordered (row in patch, column in patch, C).
        grid: (gh, gw), tokens per column and per row.
        patch_size: p.

    Returns:
        (B, C, gh p, gw p).
    """
    height, width = grid
    p = patch_size
    x = tokens.reshape(tokens.shape[0], height, width, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, height * p, width * p)


def sinusoidal_features(
    t: torch.Tensor,
    dim: int,
    *,
    scale: float = 1.0,
    max_period: float = 10000.0,
    sine_first: bool = False,
    shift: float = 0.0,
) -> torch.Tensor:
    """Sinusoidal features of a time, cosines first: [cos(scale t f_k), sin(scale t f_k)], f_k = max_period^(-2k/dim).

    Args:
        t: times, (B,), any real dtype; multiplied by ``scale`` in its own precision, then cast to float32.
        dim: number of features, even.
        scale: factor on the time, for networks that were trained with another unit.
        max_period: the longest period is 2 pi times this.
        sine_first: [sin, cos] instead.
        shift: f_k = max_period^(-k / (dim/2 - shift)); diffusers' ``downscale_freq_shift``.

    Returns:
        (B, dim), float32.

    Raises:
        ValueError: ``dim`` is odd.
    """
    if dim % 2:
        raise ValueError(f"sinusoidal features come in pairs; dim is {dim}, use an even number")
    half = dim // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    # Times reach 1000 and devices' float32 exponentials differ in the last bit: round the exact value instead.
    exact = torch.float32 if t.device.type == "mps" else torch.float64
    frequencies = exponents.to(exact).exp().float()
    angles = (t * scale).float()[:, None] * frequencies
    waves = [angles.sin(), angles.cos()] if sine_first else [angles.cos(), angles.sin()]
    return torch.cat(waves, dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear -> SiLU -> Linear on the sinusoidal features of the time.

    Args:
        hidden_size: width D of the result.
        num_features: number of sinusoidal features.
        scale: factor on the time before the features.
        sine_first, shift: convention of the features, see :func:`sinusoidal_features`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_features: int = 256,
        scale: float = 1.0,
        sine_first: bool = False,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.convention = {"scale": scale, "sine_first": sine_first, "shift": shift}
        self.linear_in = nn.Linear(num_features, hidden_size)
        self.linear_out = nn.Linear(hidden_size, hidden_size)
        for linear in (self.linear_in, self.linear_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Map times ``t`` (B,) to (B, D), in the dtype of the weights."""
        features = sinusoidal_features(t, self.num_features, **self.convention)
        return self.linear_out(F.silu(self.linear_in(features.to(self.linear_in.weight.dtype))))


class LabelEmbedding(nn.Module):
    """Table of class vectors that owns the null class.

    With ``null`` the table has one more row, the null class of classifier-free guidance, and its label is
    ``num_classes``. Dropping labels in training is the training step's work: it puts that label in their place.

    Args:
        num_classes: number of real classes.
        hidden_size: width D.
        null: own a null class.
    """

    def __init__(self, num_classes: int, hidden_size: int, null: bool = True) -> None:
        super().__init__()
        self.null_label = num_classes if null else None
        self.table = nn.Embedding(num_classes + int(null), hidden_size)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """Look up ``labels`` (B,) int64; None means the null class for all. Returns (B, D).

        Raises:
            ValueError: no labels and no null class, or not one label per sample.
        """
        if labels is None:
            if self.null_label is None:
                raise ValueError("class_labels is None but this model has no null class; pass one label per sample")
            # An offloaded table is on the meta device until its hook runs, which moves the labels to the right one.
            device = "cpu" if hasattr(self.table, "_hf_hook") else self.table.weight.device
            labels = torch.full((batch_size,), self.null_label, device=device)
        if labels.shape != (batch_size,):
            raise ValueError(f"class_labels has shape {tuple(labels.shape)}; expected ({batch_size},), one per sample")
        return self.table(labels)


def sincos_2d(dim: int, height: int, width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions (the convention of MAE and DiT).

    The first dim/2 channels encode the column, the last dim/2 the row; each half is [sin(p w_i), cos(p w_i)] with
    w_i = 10000^(-i/(dim/4)), computed in float64.

    Args:
        dim: width, a multiple of 4.
        height: rows of the token grid.
        width: columns of the token grid.

    Returns:
        (height * width, dim), float32, raster order.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"2-D sine-cosine positions need a width that is a multiple of 4, got {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    halves = []
    for position in (columns.flatten(), rows.flatten()):
        angles = position[:, None] * omega
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).float()


def resize_positions(
    table: torch.Tensor, grid: tuple[int, ...], new_grid: tuple[int, ...], mode: str | None = None
) -> torch.Tensor:
    """Resize learned positions to another token grid (half-pixel centres, no antialiasing).

    Args:
        table: (1, prod(grid), D), row-major over ``grid``.
        grid: shape of the token grid it was learned on: (length,), (rows, columns) or (frames, rows, columns).
        new_grid: shape wanted, of the same rank.
        mode: interpolation of :func:`torch.nn.functional.interpolate`; None means linear in every axis.

    Returns:
        (1, prod(new_grid), D), dtype of ``table``; ``table`` itself when the shapes agree.
    """
    if tuple(grid) == tuple(new_grid):
        return table
    mode = mode or ("linear", "bilinear", "trilinear")[len(grid) - 1]
    image = table.float().reshape(*grid, -1).movedim(-1, 0)[None]
    image = F.interpolate(image, size=tuple(new_grid), mode=mode, align_corners=False)
    return image[0].flatten(1).transpose(0, 1)[None].to(table.dtype)
