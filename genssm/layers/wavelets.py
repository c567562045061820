"""Frequency transforms of a token grid: Haar packets with DiMSUM's packing, block DCT, Fourier mixing.

# B batch, L tokens, C channels, F side of a cell, n = L / F^2 cells

A cell is a square of F x F neighbouring tokens. In *cell-major* layout the cells stand one after the other in raster
order, and the F^2 tokens of a cell in raster order inside it. Transforms leave their result there; a scan that should
visit the transformed grid along an order takes :func:`cell_major_order` of it, so that nothing has to be moved back.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from genssm.layers.buffers import table_device
from genssm.layers.modulation import upcast
from genssm.scan_orders import inverse, local_window

# The square of sqrt(1/2) in float32. Released filters hold it, and results agree to 1e-7 only with the same value.
HAAR_TAP = 0.49999997


def to_cells(tokens: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """Gather the cells of a raster-ordered token grid.

    Args:
        tokens: (B, h w, C), raster order.
        grid: (h, w), both multiples of ``side``.
        side: F.

    Returns:
        (B, n, F^2, C), cell-major.

    Raises:
        ValueError: ``side`` does not divide the grid.
    """
    height, width = grid
    if height % side or width % side:
        raise ValueError(
            f"the token grid is {height} x {width}, but {side} x {side} cells need both sides to be multiples of {side}"
        )
    x = tokens.reshape(tokens.shape[0], height // side, side, width // side, side, tokens.shape[-1])
    return x.transpose(2, 3).reshape(tokens.shape[0], -1, side * side, tokens.shape[-1])


def from_cells(cells: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """Undo :func:`to_cells`: (B, n, F^2, C) to (B, h w, C) in raster order."""
    height, width = grid
    x = cells.reshape(cells.shape[0], height // side, width // side, side, side, cells.shape[-1])
    return x.transpose(2, 3).reshape(cells.shape[0], height * width, cells.shape[-1])


def cell_major_order(order: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """Translate an order of raster indices into one of rows in cell-major layout, (L,) to (L,), same dtype."""
    return inverse(local_window(*grid, side))[order.long()].to(order.dtype)


def haar_matrix(levels: int) -> torch.Tensor:
    """Full Haar packet transform of one cell of side 2^levels.

    One level maps a 2 x 2 cell [[a, b], [c, e]] to LL = (a+b+c+e)/2, LH = (a+b-c-e)/2, HL = (a-b+c-e)/2 and
    HH = (a-b-c+e)/2; the second level splits all four subbands again. Rows are orthogonal with norm one.

    Args:
        levels: 1 or 2.

    Returns:
        (4^levels, 4^levels), float32: row = subband (first level slowest), column = raster index inside the cell.

    Raises:
        ValueError: ``levels`` is neither 1 nor 2.
    """
    if levels not in (1, 2):
        raise ValueError(f"the wavelet packing is defined for 1 or 2 levels, got {levels}")
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=table_device())  # (low or high, first or second)
    # band 2 h + v: v is a difference of rows, h of columns; v, h are bands and i, j rows and columns
    once = HAAR_TAP * torch.einsum("hj,vi->hvij", pair, pair).reshape(4, 2, 2)
    if levels == 1:
        return once.reshape(4, 4)
    # pixel (2 k + i, 2 l + j): the first level acts on (i, j), the second on its coarse result (k, l)
    return torch.einsum("sij,tkl->stkilj", once, once).reshape(16, 16)


def dct_matrix(side: int) -> torch.Tensor:
    """Orthonormal DCT-II of one cell, (F^2, F^2) float32: row = v F + u (v vertical), column = raster index."""
    k = torch.arange(side, dtype=torch.float64, device=table_device())
    basis = torch.cos(math.pi / side * (k + 0.5) * k[:, None]) * math.sqrt(2 / side)  # (frequency, position)
    basis[0] *= math.sqrt(0.5)
    return torch.kron(basis, basis).float()


class WaveletPacking(nn.Module):
    """Haar packets of every cell, packed as DiMSUM's released models do (Phung et al. 2024, arXiv:2411.04168).

    With F = 2^levels a cell has F^2 coefficients per channel, F^2 C numbers in all. Numbered subband first,
    kappa = s C + c, number kappa goes to channel kappa // F^2 of the token kappa % F^2 of the cell. So the subband
    varies along the channels, and a token of a cell holds one of F^2 residues of the channels. (The paper describes
    windows of single subbands; the released weights were trained with this.) Coefficients are divided by 2^levels: LL
    is the mean of its cell.

    Args:
        levels: 1 or 2.

    Raises:
        ValueError: other ``levels``.
    """

    def __init__(self, levels: int = 2) -> None:
        super().__init__()
        self.side = 2**levels
        matrix = haar_matrix(levels)
        self.register_buffer("analysis", matrix / self.side, persistent=False)
        self.register_buffer("synthesis", matrix.T * self.side, persistent=False)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int], inverse: bool = False) -> torch.Tensor:
        """Transform and pack, or unpack and transform back.

        Args:
            tokens: (B, h w, C), raster order; packed ones in cell-major layout for the inverse.
            grid: (h, w), multiples of F.
            inverse: go back.

        Returns:
            (B, h w, C), packed, in cell-major layout; in raster order from the inverse.

        Raises:
            ValueError: F does not divide the grid.
        """
        area, channels = self.side**2, tokens.shape[-1]
        if inverse:
            residues = tokens.reshape(tokens.shape[0], -1, area, channels).transpose(2, 3)  # (B, n, C, F^2)
            bands = residues.reshape(*residues.shape[:2], area, channels)  # (B, n, F^2 bands, C)
            return from_cells(self.synthesis.to(bands.dtype) @ bands, grid, self.side)
        cells = to_cells(tokens, grid, self.side)  # (B, n, F^2, C)
        bands = self.analysis.to(cells.dtype) @ cells  # (B, n, F^2 bands, C)
        residues = bands.reshape(*bands.shape[:2], channels, area)  # (B, n, C, F^2 tokens)
        return residues.transpose(2, 3).reshape(tokens.shape)


class BlockCosine(nn.Module):
    """Orthonormal DCT of every cell; token (v, u) of a cell holds the coefficient (v, u), channel by channel.

    Args:
        side: F.
    """

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("matrix", dct_matrix(side), persistent=False)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int], inverse: bool = False) -> torch.Tensor:
        """Transform (B, h w, C) in raster order to (B, h w, C) in cell-major layout, or back.

        Raises:
            ValueError: F does not divide the grid.
        """
        if inverse:
            cells = tokens.reshape(tokens.shape[0], -1, self.side**2, tokens.shape[-1])
            return from_cells(self.matrix.T.to(cells.dtype) @ cells, grid, self.side)
        cells = to_cells(tokens, grid, self.side)
        return (self.matrix.to(cells.dtype) @ cells).reshape(tokens.shape)


class FourierMixing(nn.Module):
    """Two complex block-diagonal layers between a Fourier transform and its inverse (EinFFT, arXiv:2403.15360).

        X = FFT over (L, blocks);  X = relu(X W_1 + b_1);  X = softshrink(X W_2 + b_2);  real part of the inverse

    relu and softshrink act on real and imaginary parts. The transforms are orthonormal and run in float32: there is no
    bfloat16 FFT.

    Args:
        hidden_size: channels C, a multiple of ``blocks``.
        blocks: diagonal blocks.
        sparsity: threshold of the soft shrinkage.

    Raises:
        ValueError: ``blocks`` does not divide ``hidden_size``.
    """

    def __init__(self, hidden_size: int, blocks: int = 4, sparsity: float = 0.01) -> None:
        super().__init__()
        if hidden_size % blocks:
            raise ValueError(f"Fourier mixing has {blocks} blocks, which do not divide {hidden_size} channels")
        self.blocks = blocks
        self.sparsity = sparsity
        width = hidden_size // blocks
        for layer in ("in", "out"):
            weight = nn.Parameter(torch.empty(2, blocks, width, width).normal_(std=0.02))  # real, imaginary part
            bias = nn.Parameter(torch.empty(2, blocks, width).normal_(std=0.02))
            self.register_parameter(f"weight_{layer}", weight)
            self.register_parameter(f"bias_{layer}", bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mix all tokens, (B, L, C) to (B, L, C), dtype kept."""
        x = upcast(tokens).unflatten(-1, (self.blocks, -1))  # (B, L, K, C/K)
        with torch.autocast(x.device.type, enabled=False):
            x = torch.fft.fft2(x, dim=(1, 2), norm="ortho").transpose(1, 2)  # (B, K, L, C/K)
            real, imaginary = _complex_linear(x.real, x.imag, self.weight_in, self.bias_in)
            real, imaginary = _complex_linear(F.relu(real), F.relu(imaginary), self.weight_out, self.bias_out)
            real, imaginary = F.softshrink(real, self.sparsity), F.softshrink(imaginary, self.sparsity)
            x = torch.complex(real, imaginary).transpose(1, 2)
            x = torch.fft.ifft2(x, dim=(1, 2), norm="ortho").real
        return x.flatten(2).to(tokens.dtype)


def _complex_linear(
    real: torch.Tensor, imaginary: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W + b of complex x (B, K, L, C), block by block; W (2, K, C, C), b (2, K, C) hold real and imaginary parts."""
    (w_r, w_i), (b_r, b_i) = weight.to(real.dtype), bias.to(real.dtype)[:, :, None]
    return real @ w_r - imaginary @ w_i + b_r, real @ w_i + imaginary @ w_r + b_i
