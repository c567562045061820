"""Pictures of scan orders, with Pillow alone."""

import math
from itertools import pairwise

import torch
from PIL import Image, ImageDraw, ImageFont

from genssm.scan_orders.grid import inverse

Colour = tuple[int, int, int]
Point = tuple[float, float]

RAMP: list[Colour] = [(38, 30, 92), (106, 36, 140), (190, 46, 120), (236, 88, 78), (250, 158, 60)]
PAPER, INK, FAINT = (255, 255, 255), (42, 42, 52), (120, 122, 134)
SHARPNESS = 3  # drawn so many times larger, then shrunk: Pillow's lines have hard edges
MARGIN, HEADER, GAP = 28, 64, 26
LONGEST = 1280  # pixels of the longer side, about
MAX_SIDE = 256


def ramp(t: float) -> Colour:
    """Colour of the time ``t`` from 0 (start, dark) to 1 (end, bright)."""
    place = t * (len(RAMP) - 1)
    left = min(int(place), len(RAMP) - 2)
    return mix(RAMP[left], RAMP[left + 1], place - left)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


class Layout:
    """Where the cells stand on the picture: one panel per frame, in rows of panels. All lengths are enlarged."""

    def __init__(self, frames: int, h: int, w: int) -> None:
        in_a_row = (LONGEST - 2 * MARGIN - GAP * (frames - 1)) / (frames * w)
        self.columns = frames if in_a_row >= 26 else max(1, min(frames, round(math.sqrt(1.6 * frames * h / w))))
        self.rows = math.ceil(frames / self.columns)
        room = LONGEST - 2 * MARGIN
        across = (room - GAP * (self.columns - 1)) / (self.columns * w)
        down = (room - GAP * (self.rows - 1)) / (self.rows * h)
        self.h, self.w = h, w
        self.cell = max(4, min(64, int(min(across, down)))) * SHARPNESS
        self.margin, self.gap = MARGIN * SHARPNESS, GAP * SHARPNESS
        self.header = (HEADER if frames == 1 else HEADER + 20) * SHARPNESS

    def panel(self, frame: int) -> Point:
        """Upper left corner of a frame."""
        row, column = divmod(frame, self.columns)
        return (
            self.margin + column * (self.w * self.cell + self.gap),
            self.header + row * (self.h * self.cell + self.gap),
        )

    def centre(self, index: int) -> Point:
        """Middle of the cell with this raster index."""
        frame, cell = divmod(index, self.h * self.w)
        row, column = divmod(cell, self.w)
        left, top = self.panel(frame)
        return left + (column + 0.5) * self.cell, top + (row + 0.5) * self.cell

    @property
    def size(self) -> tuple[int, int]:
        left, top = self.panel(self.columns * self.rows - 1)
        return left + self.w * self.cell + self.margin, top + self.h * self.cell + self.margin


def draw(order: torch.Tensor, sides: tuple[int, ...], title: str, caption: str) -> Image.Image:
    """Picture of one order: cells tinted by visiting time, the path from dark (start, disc) to bright (end, square).

    Steps between touching cells are thick, jumps thin. Visit numbers stand in the cells where they are legible.

    Args:
        order: (L,) integers.
        sides: (h, w), or (frames, h, w) for one panel per frame.
        title: first line above the picture.
        caption: second, smaller line.
    Returns:
        An RGB image of up to about 1300 pixels a side.
    Raises:
        ValueError: the grid has more than 256 cells a side or 64 frames.
    """
    frames, h, w = (1, *sides)[-3:]
    if max(h, w) > MAX_SIDE or frames > 64:
        raise ValueError(f"a picture takes up to {MAX_SIDE} x {MAX_SIDE} cells and 64 frames, got {sides}; use fewer")
    layout = Layout(frames, h, w)
    width = max(layout.size[0], 420 * SHARPNESS)
    image = Image.new("RGB", (width, layout.size[1]), PAPER)
    canvas = ImageDraw.Draw(image)
    _text(canvas, layout, title, caption)
    _cells(canvas, layout, order, frames)
    _path(canvas, layout, order.tolist())
    if layout.cell >= 26 * SHARPNESS and order.numel() <= 1000:
        _numbers(canvas, layout, order.tolist())
    else:
        _ends(canvas, layout, order.tolist())
    return image.resize((image.width // SHARPNESS, image.height // SHARPNESS), Image.Resampling.LANCZOS)


def _text(canvas: ImageDraw.ImageDraw, layout: Layout, title: str, caption: str) -> None:
    canvas.text((layout.margin, 14 * SHARPNESS), title, INK, font=ImageFont.load_default(19 * SHARPNESS))
    canvas.text((layout.margin, 38 * SHARPNESS), caption, FAINT, font=ImageFont.load_default(13 * SHARPNESS))


def _cells(canvas: ImageDraw.ImageDraw, layout: Layout, order: torch.Tensor, frames: int) -> None:
    """Pale squares, tinted by visiting time."""
    inset, last = layout.cell * 0.03, max(order.numel() - 1, 1)
    half = layout.cell / 2 - inset
    for index, time in enumerate(inverse(order).tolist()):
        x, y = layout.centre(index)
        colour = mix(ramp(time / last), PAPER, 0.84)
        canvas.rounded_rectangle((x - half, y - half, x + half, y + half), layout.cell * 0.12, colour)
    if frames > 1:
        font = ImageFont.load_default(12 * SHARPNESS)
        for frame in range(frames):
            left, top = layout.panel(frame)
            canvas.text((left, top - 2 * SHARPNESS), f"frame {frame}", FAINT, font=font, anchor="lb")


def _path(canvas: ImageDraw.ImageDraw, layout: Layout, order: list[int]) -> None:
    points = [layout.centre(index) for index in order]
    frame = [index // (layout.h * layout.w) for index in order]
    steps = list(enumerate(pairwise(points)))
    near = [math.dist(a, b) < 1.01 * layout.cell for _, (a, b) in steps]
    thick, thin = max(layout.cell * 0.16, 1.2 * SHARPNESS), max(layout.cell * 0.035, 0.5 * SHARPNESS)
    for t, (a, b) in steps:  # jumps first, so that they stay below
        if not near[t]:
            fade = 0.35 if frame[t] == frame[t + 1] else 0.7
            canvas.line(_jump(a, b, layout.cell), mix(ramp(t / len(steps)), PAPER, fade), round(thin))
    for t, (a, b) in steps:
        if near[t]:
            colour = ramp(t / len(steps))
            canvas.line((a, b), colour, round(thick))
            for x, y in (a, b):  # round joints
                canvas.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), colour)


def _jump(a: Point, b: Point, cell: float) -> list[Point]:
    """A straight line, or a flat bow along a row or column, where a line would hide behind the cells between."""
    (x, y), (dx, dy), length = a, (b[0] - a[0], b[1] - a[1]), math.dist(a, b)
    height = 0.48 * cell / length if min(abs(dx), abs(dy)) < 0.01 * cell else 0
    bends = [(k / 16, 4 * height * (k / 16) * (1 - k / 16)) for k in range(17)] if height else [(0, 0), (1, 0)]
    return [(x + s * dx - bend * dy, y + s * dy + bend * dx) for s, bend in bends]


def _mark(canvas: ImageDraw.ImageDraw, point: Point, radius: float, colour: Colour, last: bool, fill: Colour) -> None:
    x, y = point
    box, width = (x - radius, y - radius, x + radius, y + radius), round(radius * 0.16)
    if last:
        canvas.rounded_rectangle(box, radius * 0.3, fill, colour, width)
    else:
        canvas.ellipse(box, fill, colour, width)


def _numbers(canvas: ImageDraw.ImageDraw, layout: Layout, order: list[int]) -> None:
    """Visit numbers in discs; the first and last are filled."""
    digits = len(str(len(order) - 1))
    radius = layout.cell * 0.33
    font = ImageFont.load_default(radius * (1.0 if digits < 3 else 0.8))
    for t, index in enumerate(order):
        colour, end = ramp(t / max(len(order) - 1, 1)), t in (0, len(order) - 1)
        _mark(canvas, layout.centre(index), radius, colour, t > 0 and end, colour if end else PAPER)
        canvas.text(layout.centre(index), str(t), PAPER if t == 0 else INK, font=font, anchor="mm")


def _ends(canvas: ImageDraw.ImageDraw, layout: Layout, order: list[int]) -> None:
    radius = max(layout.cell * 0.36, 3.5 * SHARPNESS)
    _mark(canvas, layout.centre(order[0]), radius, RAMP[0], False, PAPER)
    _mark(canvas, layout.centre(order[-1]), radius, RAMP[-1], True, PAPER)
