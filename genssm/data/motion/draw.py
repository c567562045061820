"""Pictures of moving skeletons, with Pillow alone: contact sheets, GIF, and MP4 where ffmpeg is installed.

Each panel looks down on a piece of floor that moves along with the body; its lines are half a metre apart and stand
still, and the root's path is drawn on it. T frames, J joints, lengths in metres after scaling.
"""

import contextlib
import itertools
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from genssm.motion import Skeleton
from genssm.motion.kinematics import check_joints

Tensor = torch.Tensor
Point = tuple[float, float]
LEFT, RIGHT, MIDDLE = (37, 99, 197), (204, 82, 36), (60, 60, 66)
FLOOR, LINES, PATH, BEHIND, INK = (238, 238, 234), (205, 205, 200), (110, 110, 110), (40, 150, 90), (30, 30, 34)
OVERSAMPLING = 2  # drawn larger and scaled down, because Pillow's lines have hard edges
REACH = 1.3  # metres from the body to the edge of the floor


@dataclass(frozen=True)
class View:
    """How a panel looks.

    Attributes:
        size: width and height in pixels.
        azimuth: degrees from +Z, where a canonical clip starts facing, around the vertical.
        elevation: degrees above the floor.
        height: metres that fit into the panel's height.
    """

    size: int = 256
    azimuth: float = 35.0
    elevation: float = 18.0
    height: float = 2.5

    def project(self, points: Tensor, centre: Tensor) -> tuple[list[Point], list[float]]:
        """Pixels and depths (larger is nearer) of points (n, 3); ``centre`` (3,) on the floor is low in the middle."""
        a, e = math.radians(self.azimuth), math.radians(self.elevation)
        towards = points.new_tensor([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])
        right = points.new_tensor([math.cos(a), 0.0, -math.sin(a)])
        upward = torch.linalg.cross(towards, right)
        away = points - centre
        zoom = self.size / self.height
        x = self.size / 2 + zoom * (away @ right)
        y = 0.8 * self.size - zoom * (away @ upward)
        return list(zip(x.tolist(), y.tolist())), (away @ towards).tolist()


def draw_frame(
    joints: Tensor, skeleton: Skeleton, frame: int, view: View | None = None, title: str = ""
) -> Image.Image:
    """One panel: the body in a frame of a clip (T, J, 3), its floor, and its root's path before and after.

    Raises:
        ValueError: the clip's shape does not fit, or a value is not finite.
    """
    check_joints(joints, skeleton)
    return _panel(joints.detach().cpu().double() * skeleton.metres, skeleton, frame, view or View(), title)


def contact_sheet(
    clips: Sequence[Tensor],
    skeleton: Skeleton,
    titles: Sequence[str] = (),
    *,
    columns: int = 8,
    view: View | None = None,
) -> Image.Image:
    """Frames of each clip at equal distances, one row per clip.

    Args:
        clips: joints, (T_i, J, 3) each.
        skeleton: of all.
        titles: one per clip, e.g. its caption.
        columns: frames per row.
        view: how a panel looks.
    Raises:
        ValueError: no clip, fewer titles than clips, or joints that cannot be drawn.
    """
    moving = _prepared(clips, skeleton, titles)
    view = view or View(size=192)
    sheet = Image.new("RGB", (columns * view.size, len(moving) * view.size), "white")
    for row, joints in enumerate(moving):
        title = titles[row] if titles else ""
        for column in range(columns):
            frame = round(column * (len(joints) - 1) / max(columns - 1, 1))
            panel = _panel(joints, skeleton, frame, view, f"{frame / skeleton.fps:.1f} s")
            sheet.paste(panel, (column * view.size, row * view.size))
        strip = ImageDraw.Draw(sheet)
        strip.text((6, row * view.size + 20), _fitted(title, columns * view.size - 12, _font(13)), INK, _font(13))
    return sheet


def animation_frames(
    clips: Sequence[Tensor], skeleton: Skeleton, titles: Sequence[str] = (), *, view: View | None = None
) -> Iterator[Image.Image]:
    """Pictures of all clips side by side, one per frame of the longest; shorter ones stop in their last frame.

    Raises:
        ValueError: as :func:`contact_sheet`.
    """
    moving = _prepared(clips, skeleton, titles)
    view = view or View(size=320)
    columns = min(len(moving), 4)
    rows = -(-len(moving) // columns)
    for frame in range(max(len(joints) for joints in moving)):
        picture = Image.new("RGB", (columns * view.size, rows * view.size), "white")
        for number, joints in enumerate(moving):
            title = titles[number] if titles else ""
            panel = _panel(joints, skeleton, min(frame, len(joints) - 1), view, title)
            picture.paste(panel, (number % columns * view.size, number // columns * view.size))
        yield picture


def write_animation(
    path: str | Path,
    clips: Sequence[Tensor],
    skeleton: Skeleton,
    titles: Sequence[str] = (),
    *,
    fps: float | None = None,
    view: View | None = None,
) -> None:
    """Write clips side by side as .gif or, with ffmpeg, as .mp4.

    Args:
        path: file to write; its ending decides.
        clips, skeleton, titles, view: see :func:`animation_frames`.
        fps: frames per second; None takes the skeleton's.
    Raises:
        ValueError: another ending, or joints that cannot be drawn.
        FileNotFoundError: .mp4 without ffmpeg.
    """
    path, rate = Path(path), fps or skeleton.fps
    frames = animation_frames(clips, skeleton, titles, view=view)
    if path.suffix.lower() == ".gif":
        first, *rest = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
        first.save(path, save_all=True, append_images=rest, duration=1000 / rate, loop=0)
    elif path.suffix.lower() == ".mp4":
        _write_mp4(path, frames, rate)
    else:
        raise ValueError(f"{path}: an animation is .gif or .mp4")


def _write_mp4(path: Path, frames: Iterator[Image.Image], fps: float) -> None:
    program = shutil.which("ffmpeg")
    if program is None:
        raise FileNotFoundError(f"{path} needs the program ffmpeg, which is not installed; write a .gif instead")
    first = next(frames)
    width, height = (side - side % 2 for side in first.size)  # the usual pixel format has even sides
    command = [program, "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", f"{fps:g}", "-i", "-", "-an", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    with contextlib.suppress(BrokenPipeError):  # ffmpeg gave up; its code says so
        for frame in itertools.chain([first], frames):
            process.stdin.write(frame.crop((0, 0, width, height)).tobytes())
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    if process.wait():
        raise ValueError(f"ffmpeg could not write {path}; its message is above")


def _prepared(clips: Sequence[Tensor], skeleton: Skeleton, titles: Sequence[str]) -> list[Tensor]:
    if not clips or (titles and len(titles) != len(clips)):
        raise ValueError(
            f"{len(clips)} clips and {len(titles)} titles; expected at least one clip and a title for each"
        )
    for joints in clips:
        check_joints(joints, skeleton)
    return [joints.detach().cpu().double() * skeleton.metres for joints in clips]


def _panel(joints: Tensor, skeleton: Skeleton, frame: int, view: View, title: str) -> Image.Image:
    """A panel of a clip in metres."""
    large = replace(view, size=view.size * OVERSAMPLING)
    picture = Image.new("RGB", (large.size, large.size), "white")
    pen = ImageDraw.Draw(picture)
    centre = joints[frame, 0] * joints.new_tensor([1.0, 0.0, 1.0])
    _draw_floor(pen, centre, large)
    unit = large.size / 256
    ground = joints[:, 0] * joints.new_tensor([1.0, 0.0, 1.0])
    near = ((ground - centre).abs().amax(-1) <= REACH).tolist()
    points, _ = large.project(ground, centre)
    for i in range(1, len(points)):
        if near[i] and near[i - 1]:
            pen.line([points[i - 1], points[i]], PATH if i > frame else BEHIND, round(2 * unit))
    _draw_body(pen, joints[frame], skeleton, centre, large, unit)
    picture = picture.resize((view.size, view.size), Image.Resampling.BOX)
    if title:
        font = _font(11)
        ImageDraw.Draw(picture).text((6, 4), _fitted(title, view.size - 12, font), INK, font)
    return picture


def _draw_floor(pen: ImageDraw.ImageDraw, centre: Tensor, view: View) -> None:
    x, _, z = centre.tolist()
    corners = [[x - REACH, z - REACH], [x + REACH, z - REACH], [x + REACH, z + REACH], [x - REACH, z + REACH]]
    points, _ = view.project(centre.new_tensor([[a, 0.0, b] for a, b in corners]), centre)
    pen.polygon(points, FLOOR)
    for axis, middle in ((0, x), (1, z)):
        for step in range(math.ceil((middle - REACH) * 2), math.floor((middle + REACH) * 2) + 1):
            ends = (
                [[step / 2, z - REACH], [step / 2, z + REACH]]
                if axis == 0
                else [[x - REACH, step / 2], [x + REACH, step / 2]]
            )
            line, _ = view.project(centre.new_tensor([[a, 0.0, b] for a, b in ends]), centre)
            pen.line(line, LINES, max(1, view.size // 256))


def _draw_body(
    pen: ImageDraw.ImageDraw, pose: Tensor, skeleton: Skeleton, centre: Tensor, view: View, unit: float
) -> None:
    shadow = pose * pose.new_tensor([1.0, 0.0, 1.0])
    flat, _ = view.project(shadow, centre)
    points, depths = view.project(pose, centre)
    bones = [(parent, joint) for joint, parent in enumerate(skeleton.parents) if parent >= 0]
    for parent, joint in bones:
        pen.line([flat[parent], flat[joint]], LINES, round(3 * unit))
    for parent, joint in sorted(bones, key=lambda bone: depths[bone[0]] + depths[bone[1]]):
        name = skeleton.joint_names[joint]
        colour = LEFT if name.startswith("left") else RIGHT if name.startswith("right") else MIDDLE
        pen.line([points[parent], points[joint]], colour, round(4 * unit))
        for x, y in (points[parent], points[joint]):
            pen.ellipse([x - 2 * unit, y - 2 * unit, x + 2 * unit, y + 2 * unit], colour)
    if "head" in skeleton.joint_names:
        x, y = points[skeleton.joint_names.index("head")]
        pen.ellipse([x - 6 * unit, y - 6 * unit, x + 6 * unit, y + 6 * unit], MIDDLE)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fitted(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut where it would be wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
