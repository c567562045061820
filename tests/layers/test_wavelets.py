import pytest
import torch

from genssm.layers.wavelets import (
    BlockCosine,
    FourierMixing,
    WaveletPacking,
    cell_major_order,
    dct_matrix,
    from_cells,
    haar_matrix,
    to_cells,
)
from genssm.scan_orders import inverse, local_window, zigzag

GRIDS = [(4, 4), (8, 4), (4, 12), (8, 8)]


def tokens(grid: tuple[int, int], channels: int = 5) -> torch.Tensor:
    return torch.randn(2, grid[0] * grid[1], channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("side", [2, 4])
def test_cells_are_windows_of_the_raster(grid: tuple[int, int], side: int) -> None:
    x = tokens(grid)
    cells = to_cells(x, grid, side)
    assert torch.equal(cells.flatten(1, 2), x[:, local_window(*grid, side).long()])
    assert torch.equal(from_cells(cells, grid, side), x)


@pytest.mark.parametrize("grid", GRIDS)
def test_cell_major_order_visits_the_same_tokens(grid: tuple[int, int]) -> None:
    x, order = tokens(grid), zigzag(*grid, 3)
    moved = to_cells(x, grid, 4).flatten(1, 2)
    there = cell_major_order(order, grid, 4)
    assert there.dtype == order.dtype
    assert torch.equal(moved[:, there.long()], x[:, order.long()])
    assert torch.equal(inverse(inverse(there)), there)


@pytest.mark.parametrize("levels", [1, 2])
def test_haar_is_orthonormal_and_separates_what_it_should(levels: int) -> None:
    matrix, side = haar_matrix(levels), 2**levels
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(side * side), rtol=0, atol=1e-6)
    rows = torch.arange(side).float()[:, None].expand(side, side)
    by_rows, by_columns = (matrix @ image.reshape(-1) for image in (rows, rows.T.contiguous()))
    # band 2 h + v of each level: v differences between rows, h between columns
    horizontal = torch.tensor([any((band >> 2 * k) & 2 for k in range(levels)) for band in range(side * side)])
    vertical = torch.tensor([any((band >> 2 * k) & 1 for k in range(levels)) for band in range(side * side)])
    assert by_rows[horizontal].abs().max() < 1e-6 and by_rows[vertical].abs().max() > 0.1
    assert by_columns[vertical].abs().max() < 1e-6 and by_columns[horizontal].abs().max() > 0.1
    constant = matrix @ torch.ones(side * side)
    torch.testing.assert_close(constant, side * torch.eye(side * side)[0], rtol=0, atol=1e-5)


def test_two_levels_split_every_subband_of_one() -> None:
    """The full packet transform by its definition: the coarse image of each subband is transformed again."""
    image = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    once = haar_matrix(1) @ to_cells(image.reshape(1, 16, 1), (4, 4), 2)[0, :, :, 0].T  # (subband, coarse raster)
    twice = once @ haar_matrix(1).T
    torch.testing.assert_close(haar_matrix(2) @ image.reshape(-1), twice.reshape(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("channels", [3, 16])
def test_packing_follows_the_formula_and_is_undone(grid: tuple[int, int], levels: int, channels: int) -> None:
    transform, x = WaveletPacking(levels), tokens(grid, channels)
    packed = transform(x, grid)
    side = transform.side
    bands = haar_matrix(levels) @ to_cells(x, grid, side) / side  # (B, n, subband, channel)
    cells = packed.unflatten(1, (-1, side * side))
    for token, channel in [(0, 0), (1, 2), (side * side - 1, channels - 1)]:
        kappa = channel * side * side + token
        expected = bands[:, :, kappa // channels, kappa % channels]
        torch.testing.assert_close(cells[:, :, token, channel], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(transform(packed, grid, inverse=True), x, rtol=0, atol=2e-6)


def test_low_pass_coefficient_is_the_mean_of_its_cell() -> None:
    x = tokens((8, 8), 16)
    packed = WaveletPacking(2)(x, (8, 8)).unflatten(1, (4, 16))
    means = to_cells(x, (8, 8), 4).mean(dim=2)  # (B, n, C): numbers 0..15 of the cell, on its 16 tokens' channel 0
    torch.testing.assert_close(packed[..., 0], means, rtol=0, atol=1e-6)


def test_dct_is_orthonormal_and_cosine() -> None:
    matrix = dct_matrix(4)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16), rtol=0, atol=1e-6)
    position = torch.arange(4).double()
    wave = torch.cos(torch.pi * (position + 0.5) * 3 / 4)  # horizontal frequency 3, constant over the rows
    coefficients = (matrix.double() @ wave.repeat(4)).abs() > 1e-6
    assert coefficients.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("grid", GRIDS)
def test_block_cosine_is_undone(grid: tuple[int, int]) -> None:
    x, transform = tokens(grid), BlockCosine(4)
    torch.testing.assert_close(transform(transform(x, grid), grid, inverse=True), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("transform", [WaveletPacking(1), WaveletPacking(2), BlockCosine(4)])
def test_transforms_in_bfloat16(transform: torch.nn.Module) -> None:
    x = tokens((8, 8), 16)
    low = transform(x.bfloat16(), (8, 8))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), transform(x, (8, 8)), rtol=0.02, atol=0.02)


def test_fourier_mixing_is_the_complex_formula() -> None:
    torch.manual_seed(0)
    mixing, x = FourierMixing(8, blocks=2, sparsity=0.05), torch.randn(2, 6, 8)
    with torch.no_grad():
        for parameter in mixing.parameters():
            parameter.mul_(20)
    weights = [torch.complex(*mixing.get_parameter(f"weight_{layer}")) for layer in ("in", "out")]
    biases = [torch.complex(*mixing.get_parameter(f"bias_{layer}")) for layer in ("in", "out")]

    def on_parts(function, z: torch.Tensor) -> torch.Tensor:
        return torch.complex(function(z.real), function(z.imag))

    z = torch.fft.fft(torch.fft.fft(x.reshape(2, 6, 2, 4), dim=1, norm="ortho"), dim=2, norm="ortho")
    z = on_parts(torch.relu, torch.einsum("blkc,kcd->blkd", z, weights[0]) + biases[0])
    z = torch.einsum("blkc,kcd->blkd", z, weights[1]) + biases[1]
    z = on_parts(lambda part: part.sign() * (part.abs() - 0.05).clamp(min=0), z)
    expected = torch.fft.ifft(torch.fft.ifft(z, dim=1, norm="ortho"), dim=2, norm="ortho").real.reshape(2, 6, 8)
    torch.testing.assert_close(mixing(x), expected, rtol=1e-4, atol=1e-5)
    assert mixing(x.bfloat16()).dtype == torch.bfloat16


def test_messages() -> None:
    with pytest.raises(ValueError, match="token grid is 6 x 4"):
        WaveletPacking(2)(torch.zeros(1, 24, 4), (6, 4))
    with pytest.raises(ValueError, match="1 or 2 levels"):
        WaveletPacking(3)
    with pytest.raises(ValueError, match="do not divide 6"):
        FourierMixing(6)
