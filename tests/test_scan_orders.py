"""Scan orders: permutations of every grid, equal to the golden tensors, continuous where they claim to be."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from genssm import scan_orders as so
from genssm.scan_orders.__main__ import main, parse_grid
from genssm.scan_orders.draw import RAMP
from tests.golden import scan_orders as golden

SIDES = st.integers(1, 13)
IMAGE = [name for name in so.ORDERS if not name.startswith("dimsum_frequency")]


def is_permutation(order: torch.Tensor, length: int) -> bool:
    return order.dtype == torch.int32 and order.device.type == "cpu" and order.sort().values.equal(torch.arange(length))


# Golden tensors


def test_golden_tensors(golden_dir: Path) -> None:
    files = []
    for path in sorted(golden_dir.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if golden.recognises(file.keys()):
                files.append(path)
    results = [entry for path in files for entry in golden.check(path)]
    assert {path.parent.name for path in files} >= {"zigma", "dim", "dimsum", "more"}
    assert len(results) >= 159
    assert [(name, detail) for name, right, detail in results if not right] == []


def test_golden_check_sees_faults(tmp_path: Path) -> None:
    tensors = {
        "zigzag.n4": so.stack("zigzag", 4, 4),
        "zigzag.n3": so.stack("zigzag", 3, 3).flip(0),
        "sweep.h2w2": so.stack("sweep", 2, 2),
        "orders.h2w2p1": so.stack("crisscross", 2, 2),
        "pattern_chain.depth4.patterns2": torch.zeros(4, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "orders.safetensors")
    found = {name: (right, detail) for name, right, detail in golden.check(tmp_path / "orders.safetensors")}
    assert found["zigzag.n4"] == (True, "0 of 128 entries differ")
    assert found["zigzag.n3"][0] is False
    assert found["sweep.h2w2"] == (False, "no rule for this key")
    assert "shape" in found["orders.h2w2p1"][1]
    assert "odd number of blocks" in found["pattern_chain.depth4.patterns2"][1]
    assert not golden.recognises(["w.zigzag.weight", "out.sample"])


# Any order


@pytest.mark.parametrize("name", IMAGE)
@settings(max_examples=25, deadline=None)
@given(h=SIDES, w=SIDES)
def test_image_orders_are_permutations(name: str, h: int, w: int) -> None:
    orders = so.stack(name, h, w)
    assert orders.shape == (so.NUM_PATHS[name], h * w)
    assert all(is_permutation(order, h * w) for order in orders)
    steps = torch.arange(h * w, dtype=torch.int32).expand_as(orders)
    assert torch.gather(so.inverse(orders), 1, orders.long()).equal(steps)
    assert torch.gather(orders, 1, so.inverse(orders).long()).equal(steps)


@pytest.mark.parametrize("name", so.VIDEO_ORDERS)
@settings(max_examples=15, deadline=None)
@given(frames=st.integers(1, 5), h=st.integers(1, 6), w=st.integers(1, 6))
def test_video_orders_are_permutations(name: str, frames: int, h: int, w: int) -> None:
    orders = so.stack(name, frames, h, w)
    assert orders.shape == (so.NUM_PATHS[name], frames * h * w)
    assert all(is_permutation(order, frames * h * w) for order in orders)


@pytest.mark.parametrize("name", [name for name in so.NUM_PATHS if name not in ("dimsum_frequency_serpentine",)])
def test_paths_differ(name: str) -> None:
    """Each path is an order of its own, on a grid without symmetry."""
    orders = so.stack(name, *((3,) if name in so.VIDEO_ORDERS else ()), 8, 16)
    assert len(torch.unique(orders, dim=0)) == so.NUM_PATHS[name]


def test_registry_is_complete() -> None:
    assert set(so.NUM_PATHS) == {*so.ORDERS, *so.VIDEO_ORDERS}
    assert len(so.NUM_PATHS) == len(so.ORDERS) + len(so.VIDEO_ORDERS)
    assert so.stack("zigzag", 3, 4, paths=2).equal(so.stack("zigzag", 3, 4)[:2])
    assert so.stack("zigzag", 3, 4, paths=[5, 1]).equal(so.stack("zigzag", 3, 4)[[5, 1]])
    assert so.stack("local", 6, 6, paths=[2], window=3)[0].equal(so.local_window(6, 6, 3, column_first=True))


@given(length=st.integers(1, 30), prefix=st.integers(0, 4), seed=st.integers(0, 99))
def test_operations_on_orders(length: int, prefix: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randperm(length, generator=generator).int() for _ in range(2))
    tokens = torch.randn(length, generator=generator)
    assert tokens[so.compose(first, second)].equal(tokens[first][second])
    assert so.reverse(so.reverse(first)).equal(first)
    assert tokens[so.reverse(first)].equal(tokens[first].flip(0))
    assert so.compose(first, so.inverse(first)).equal(torch.arange(length))
    front = so.with_prefix(first, prefix)
    assert front[:prefix].equal(torch.arange(prefix))
    assert (front[prefix:] - prefix).equal(first)
    assert so.with_prefix(torch.stack([first, second]), prefix)[1].equal(so.with_prefix(second, prefix))


def test_orders_stay_on_the_cpu_and_are_fresh() -> None:
    with torch.device("meta"):
        order = so.hilbert(4, 6)
    assert order.device.type == "cpu"
    order.zero_()
    assert is_permutation(so.hilbert(4, 6), 24)


# Shapes of single orders


@settings(deadline=None)
@given(h=SIDES, w=SIDES, path=st.integers(0, 7))
def test_zigzag_neighbours_touch(h: int, w: int, path: int) -> None:
    order = so.zigzag(h, w, path)
    assert (so.step_distances(order, h, w) == 1).all()
    corner = (h - 1 if path >= 4 else 0) * w + (w - 1 if path // 2 % 2 else 0)
    assert order[0] == corner
    if min(h, w) > 1:
        assert abs(int(order[1] - order[0])) == (w if path % 2 else 1)


def test_lamamba_and_3d_zigzag_touch() -> None:
    for h, w in [(4, 4), (3, 5), (6, 2), (1, 4)]:
        assert (so.step_distances(so.stack("lamamba", h, w), h, w) == 1).all()
        assert (so.step_distances(so.stack("zigzag_3d", 4, h, w), 4, h, w) == 1).all()
    time_directions = [int(so.zigzag_3d(2, 3, 4, path)[0]) >= 12 for path in range(4)]
    assert time_directions == [False, True, False, True]


def test_hilbert_is_continuous_on_every_grid() -> None:
    for h in range(1, 21):
        for w in range(1, 21):
            orders = so.stack("hilbert", h, w)
            assert (so.step_distances(orders, h, w) == 1).all(), (h, w)
            assert orders[0, 0] == 0
            assert len(torch.unique(orders, dim=0)) == (8 if min(h, w) > 1 else min(2, h * w)), (h, w)
            if h > 1 and (h % 2 == 0 or w % 2 == 1):
                assert orders[0, -1] == (h - 1) * w, (h, w)


def test_hilbert_symmetries() -> None:
    for h, w in [(8, 8), (5, 5), (6, 10), (7, 4)]:
        for path in range(8):
            times = so.inverse(so.hilbert(h, w, path)).reshape(h, w)
            assert so.inverse(so.hilbert(w, h, path ^ 1)).reshape(w, h).equal(times.T)
            turned = so.inverse(so.hilbert(w, h, (path & ~1) + 2 & 7 | path & 1)).reshape(w, h)
            assert turned.equal(times.rot90(-1 if path & 1 else 1)), (h, w, path)
            assert so.hilbert_released(h, w, path).equal(so.inverse(so.hilbert(h, w, path)))


def test_hilbert_keeps_neighbourhoods() -> None:
    """A stretch of n^2 tokens stays within a few n: the point of the curve."""
    for h, w in [(64, 64), (48, 80), (33, 50), (99, 4)]:
        order = so.hilbert(h, w)
        rows, columns = order // w, order % w
        span = rows.unfold(0, 64, 32), columns.unfold(0, 64, 32)
        assert all((axis.max(1).values - axis.min(1).values).max() <= 32 for axis in span), (h, w)


def test_hilbert_is_fast() -> None:
    start = time.perf_counter()
    so.hilbert(128, 128)
    so.hilbert(127, 250)
    assert time.perf_counter() - start < 1


def test_released_hilbert_jumps() -> None:
    """Mean distances measured on the reference: 2.0-2.3 at 4 x 4, 6.6-7.1 at 32 x 32."""
    for side, low, high in [(4, 2.0, 2.3), (16, 4.3, 5.1), (32, 6.6, 7.1)]:
        means = so.step_distances(so.stack("hilbert_released", side, side), side, side).float().mean(1)
        assert low <= means.min()
        assert means.max() <= high


@settings(deadline=None)
@given(h=SIDES, w=SIDES)
def test_jpeg_walks_the_diagonals(h: int, w: int) -> None:
    for path, order in enumerate(so.stack("jpeg", h, w)):
        row, column = order // w, order % w
        row = h - 1 - row if path >= 4 else row
        column = w - 1 - column if path // 2 % 2 else column
        steps = (row + column).diff()
        assert ((steps == 0) | (steps == 1)).all()
        assert torch.where(steps == 0, 2, 1).equal(so.step_distances(order, h, w))
        if min(h, w) > 1:
            assert (row[1], column[1]) == ((1, 0) if path % 2 else (0, 1))


@settings(deadline=None)
@given(h=SIDES, w=SIDES, rows=st.integers(1, 5), columns=st.integers(1, 5), column_first=st.booleans())
def test_local_windows(h: int, w: int, rows: int, columns: int, column_first: bool) -> None:
    order = so.local_window(h, w, (rows, columns), column_first)
    assert is_permutation(order, h * w)
    window = order // w // rows * w + order % w // columns
    assert len(torch.unique_consecutive(window)) == len(torch.unique(window))
    padded = so.local_window_padded(h, w, (rows, columns), column_first)
    assert len(padded) == -(-h // rows) * rows * -(-w // columns) * columns
    assert padded[padded >= 0].equal(order)
    transposed = so.local_window(w, h, (columns, rows), not column_first)
    assert (transposed % h * w + transposed // h).equal(order)


def test_four_ways() -> None:
    row, column = so.raster(3, 5), so.column(3, 5)
    assert row.tolist() == list(range(15))
    assert column[:4].tolist() == [0, 5, 10, 1]
    back = so.reverse
    assert so.stack("crisscross", 3, 5).equal(torch.stack([row, back(row), column, back(column)]))
    assert so.stack("cross_scan", 3, 5).equal(torch.stack([row, column, back(row), back(column)]))
    assert so.stack("dimsum_spatial", 3, 5).equal(so.stack("crisscross", 3, 5))
    serpentine = so.stack("dimsum_spatial_serpentine", 3, 5)
    assert serpentine[0].equal(so.zigzag(3, 5, 0))
    assert serpentine[3].equal(back(so.zigzag(3, 5, 1)))
    assert so.dimsum_spatial(3, 5, block=6).equal(so.dimsum_spatial(3, 5, block=2))


def test_dimsum_frequency() -> None:
    plain = so.dimsum_frequency(8, 16, block=1)
    assert plain.equal(so.local_window(8, 16, (2, 4), column_first=True))
    lines = so.dimsum_frequency(8, 16, block=1, serpentine=True).reshape(16, 8)
    assert lines[::2].equal(plain.reshape(16, 8)[::2])
    assert lines[1::2].equal(plain.reshape(16, 8)[1::2].flip(1))
    assert so.dimsum_frequency(6, 2, levels=1).equal(so.local_window(6, 2, (3, 1)))


@given(h=SIDES, w=SIDES, pad=st.integers(0, 4))
def test_dim_padded_grid(h: int, w: int, pad: int) -> None:
    cells = so.dim_image_cells(h, w, pad)
    image = torch.zeros((h + pad) * (w + pad), dtype=torch.bool)
    image[cells.long()] = True
    assert image.reshape(h + pad, w + pad)[:h, :w].all()
    for layout in ("per_side", "row_major_cycle"):
        tokens = so.dim_pad_tokens(h, w, pad, layout)
        assert ((tokens == -1) == image).all()
        assert set(tokens[~image].tolist()) == set(range(pad))


def test_dim_pattern_chain_mirrors() -> None:
    for depth in (1, 9, 25, 49):
        for patterns in (1, 2, 3, 4):
            chain = so.dim_pattern_chain(depth, patterns)
            assert len(chain) == depth
            assert chain == chain[::-1]
            assert chain[0] == 0
    assert so.dim_pattern_chain(9) == [0, -2, 1, -1, 0, -1, 1, -2, 0]


def test_vfimamba_write_positions() -> None:
    """On a 4 x 4 grid a quarter of the values return to their own place and half to the other frame (measured)."""
    order, rows = so.interleaved(2, 4, 4, 1), so.interleaved(2, 4, 4, 0)
    place = so.inverse(rows)[order.long()]
    written = so.vfimamba_column_write(4, 4)
    assert (written == place).float().mean() == 0.25
    assert (written % 2 != place % 2).float().mean() == 0.5


# Video


def test_video_kinds() -> None:
    layers = so.video_kinds("sst", 9, num_paths=4)
    assert "".join(layer.kind[0] for layer in layers) == "sstsstsst"
    assert [layer.path for layer in layers] == [0, 1, 0, 2, 3, 1, 0, 1, 0]


def test_factorised_layers_are_packed_scans() -> None:
    frames, h, w = 3, 4, 5
    for layer in so.video_kinds("sstt", 8):
        order, borders = so.factorised(layer, frames, h, w)
        assert is_permutation(order, frames * h * w)
        assert borders.dtype == torch.int32
        pieces = [order[low:high] for low, high in zip(borders[:-1].tolist(), borders[1:].tolist())]
        if layer.kind == "spatial":
            assert len(pieces) == frames
            for frame, piece in enumerate(pieces):
                assert (piece - frame * h * w).equal(so.zigzag(h, w, layer.path))
        else:
            assert len(pieces) == h * w
            times = torch.arange(frames).flip(0) if layer.path else torch.arange(frames)
            for cell, piece in enumerate(pieces):
                assert piece.equal((times * h * w + cell).int())
    by_column = so.factorised(so.VideoLayer("spatial", 1), frames, h, w, order=so.column)
    assert by_column.order[: h * w].equal(so.column(h, w, 1))


def test_time_mirror() -> None:
    mirror = so.time_mirror(3, 2, 2)
    assert mirror.tolist() == [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]
    clip = torch.arange(12).reshape(3, 2, 2)
    assert clip.flatten()[mirror].equal(clip.flip(0).flatten())


# Mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: so.get_order("zigzagg"), "did you mean 'zigzag'"),
        (lambda: so.get_order("temporal"), "videos .* not images"),
        (lambda: so.stack("zigzag", 2, 4, 4), "images .* not videos"),
        (lambda: so.stack("zigzag", 16), "got 1 sides"),
        (lambda: so.stack("zigzag", 4, 4, paths=9), "has 8 paths, 9"),
        (lambda: so.zigzag(4, 4, 8), "paths 0..7, got path 8"),
        (lambda: so.raster(0, 4), "at least 1, got 0 x 4"),
        (lambda: so.hilbert(4, 2.0), "whole sides"),
        (lambda: so.local_window(4, 4, 0), "window is a side"),
        (lambda: so.dim_pattern(4, 4, 2), "got 2"),
        (lambda: so.dim_pattern_chain(8), "odd number of blocks"),
        (lambda: so.dim_pattern_chain(9, 5), "1 to 4 patterns"),
        (lambda: so.dim_image_cells(4, 4, -1), "at least 0"),
        (lambda: so.dim_pad_tokens(4, 4, 3, "lateral"), "known: 'per_side'"),
        (lambda: so.dimsum_frequency(6, 8), "4 divides, got 6 x 8"),
        (lambda: so.video_kinds("ss", 4), "both letters"),
        (lambda: so.video_kinds("sst", 0), "at least 1"),
        (lambda: so.temporal(0, 4, 4), "at least 1 frame"),
        (lambda: so.inverse(torch.tensor([0, 2, 2])), "not a permutation"),
        (lambda: so.inverse(torch.tensor([0, 3, 1])), "not a permutation"),
        (lambda: so.inverse(torch.tensor([[0, 1], [1, 1]])), "not a permutation"),
        (lambda: so.compose(so.raster(2, 2), so.raster(2, 3)), "4, 6"),
    ],
)
def test_mistakes_are_named(mistake, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


# Command line


def test_program_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "order.png"
    arguments = ["--order", "zigzag", "--grid", "4x6", "--out", str(out)]
    assert main(arguments) == 0
    assert "mean grid distance 1.000, longest step 1" in capsys.readouterr().out
    picture = Image.open(out)
    assert picture.size == (440, 348)
    row_middles = [64 + 64 * row + 32 for row in range(4)]
    assert picture.getpixel((28 + 15, row_middles[0])) == RAMP[0]  # inside the filled first disc
    assert picture.getpixel((28 + 15, row_middles[3])) == RAMP[-1]  # 4 rows end at the left
    assert picture.getpixel((28 + 15, row_middles[1])) == (255, 255, 255)  # an open disc between

    command = [sys.executable, "-m", "genssm.scan_orders", *arguments]
    again = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {out} exists; pass --force to replace it\n"


@pytest.mark.parametrize("name", [*so.ORDERS, *so.VIDEO_ORDERS])
def test_every_order_can_be_drawn(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = "4x4" if name in so.ORDERS else "3x2x3"
    out = tmp_path / "order.png"
    assert main(["--order", name, "--grid", grid, "--path", "1", "--out", str(out)]) == 0
    assert f"{name}, path 1 of {so.NUM_PATHS[name]}: {grid}" in capsys.readouterr().out
    assert len(Image.open(out).getcolors(1 << 20)) > 50
    out.write_bytes(b"")
    main(["--order", name, "--grid", grid, "--out", str(out), "--force"])
    assert out.stat().st_size > 1000


def test_program_lists_and_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listing = capsys.readouterr().out
    assert all(f"  {name} " in listing for name in so.NUM_PATHS)
    assert main(["--order", "local", "--grid", "6x6", "--window", "3"]) == 0
    expected = so.step_distances(so.local_window(6, 6, 3), 6, 6).float().mean()
    assert f"mean grid distance {expected:.3f}" in capsys.readouterr().out
    assert main(["--order", "raster", "--grid", "1x1"]) == 0
    assert capsys.readouterr().out == "raster, path 0 of 2: 1x1, 1 token\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--list"),
        (["--order", "zigzag", "--grid", "4by4"], "16x24"),
        (["--order", "zigzag", "--path", "8"], "0..7"),
        (["--order", "zigzag", "--window", "3"], "belongs to the order 'local'"),
        (["--order", "raster", "--out", "order.jpg"], ".png"),
        (["--order", "raster", "--grid", "300x2", "--out", "order.png"], "256 x 256"),
    ],
)
def test_program_mistakes(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_program_needs_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main(["--order", "raster", "--out", str(tmp_path / "missing" / "order.png")])


def test_grid_texts() -> None:
    assert parse_grid("16x24") == (16, 24)
    assert parse_grid("8X16×24") == (8, 16, 24)
