"""Acclaim motion capture: a skeleton (ASF) and its movements (AMC), as CMU's database publishes them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from genssm.data.motion.recording import Recording

Tensor = torch.Tensor
_ROOT_ORDER = ("tx", "ty", "tz", "rx", "ry", "rz")
_SLOTS = {"tx": 0, "ty": 1, "tz": 2, "rx": 3, "ry": 4, "rz": 5, "l": 6}


@dataclass
class Bone:
    """A bone of an ASF file: unit direction at rest, length, the frame of its axes (3, 3), and its channels."""

    direction: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    length: float = 0.0
    axes: Tensor = field(default_factory=lambda: torch.eye(3, dtype=torch.float64))
    channels: tuple[str, ...] = ()


@dataclass
class Acclaim:
    """An ASF skeleton: bones by name ("root" first), parents, and radians per unit of an angle."""

    bones: dict[str, Bone]
    parents: dict[str, str]
    radians: float


def read_asf(text: str, source: str = "the ASF file") -> Acclaim:
    """Parse an ASF file.

    Raises:
        ValueError: the file lacks its hierarchy or a bone of it.
    """
    sections = _sections(text)
    units = dict(line.split()[:2] for line in sections.get("units", []) if len(line.split()) >= 2)
    radians = 1.0 if units.get("angle", "deg").startswith("rad") else math.pi / 180
    root = {words[0]: words[1:] for words in map(str.split, sections.get("root", []))}
    bones = {"root": Bone(channels=tuple(word.lower() for word in root.get("order", _ROOT_ORDER)))}
    for block in _blocks(sections.get("bonedata", [])):
        entries = {words[0]: words[1:] for words in map(str.split, block)}
        absent = [key for key in ("name", "direction", "length", "axis") if not entries.get(key)]
        if absent:
            raise ValueError(f"{source}: a bone lacks its {absent[0]} (bone {' '.join(entries.get('name', ['?']))})")
        angles = torch.tensor([float(word) for word in entries["axis"][:3]], dtype=torch.float64) * radians
        order = entries["axis"][3] if len(entries["axis"]) > 3 else "XYZ"
        bones[entries["name"][0]] = Bone(
            direction=torch.tensor([float(word) for word in entries["direction"]], dtype=torch.float64),
            length=float(entries["length"][0]),
            axes=_turn(angles, order.lower()),
            channels=tuple(word.lower() for word in entries.get("dof", [])),
        )
    parents = {}
    for block in _blocks(sections.get("hierarchy", [])):
        for line in block:
            parent, *children = line.split()
            parents.update(dict.fromkeys(children, parent))
    missing = [bone for bone in parents if bone not in bones]
    if missing or not parents:
        raise ValueError(
            f"{source} has no hierarchy of known bones" + (f"; {missing[0]!r} is unknown" if missing else "")
        )
    return Acclaim(bones, parents, radians)


def read_amc(text: str, skeleton: Acclaim, *, fps: float = 120.0, source: str = "the AMC file") -> Recording:
    """Positions of all bone ends of a movement.

    With C the rotation of a bone's axes and L that of its channels, both Rz Ry Rx:
    R = R_parent C L C^T, end = end_parent + length R direction.

    Args:
        text: content of the AMC file.
        skeleton: of its subject.
        fps: frame rate, which AMC files do not hold; CMU records 120.
        source: what messages call the file.
    Raises:
        ValueError: a frame names an unknown bone, or lacks one that moves.
    """
    values = _values(text, skeleton, source)
    count = len(next(iter(values.values())))
    order = ["root", *_from_the_root(skeleton.parents)]
    turns, ends = {}, {}
    for name in order:
        bone = skeleton.bones[name]
        channels = values.get(name, torch.zeros(count, 0, dtype=torch.float64))
        slots = torch.zeros(count, 7, dtype=torch.float64)
        for column, channel in enumerate(bone.channels if channels.shape[1] else ()):
            slots[:, _SLOTS[channel]] = channels[:, column]
        local = bone.axes @ _turn(slots[:, 3:6] * skeleton.radians, "xyz") @ bone.axes.T
        if name == "root":
            turns[name], ends[name] = local, slots[:, :3]
            continue
        parent = skeleton.parents[name]
        turns[name] = turns[parent] @ local
        ends[name] = ends[parent] + bone.length * (turns[name] @ bone.direction)
    return Recording(tuple(order), torch.stack([ends[name] for name in order], 1), fps, source)


def _turn(angles: Tensor, order: str) -> Tensor:
    """Matrix R_k R_j R_i of angles (..., 3) in radians around x, y, z for ``order`` "ijk"."""
    result = torch.eye(3, dtype=angles.dtype)
    for letter in order:
        axis = "xyz".index(letter)
        c, s = angles[..., axis].cos(), angles[..., axis].sin()
        j, k = (axis + 1) % 3, (axis + 2) % 3
        matrix = torch.zeros(*angles.shape[:-1], 3, 3, dtype=angles.dtype)
        matrix[..., axis, axis] = 1
        matrix[..., j, j], matrix[..., k, k] = c, c
        matrix[..., j, k], matrix[..., k, j] = -s, s
        result = matrix @ result
    return result


def _sections(text: str) -> dict[str, list[str]]:
    """Lines of each ":keyword" section."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if stripped.startswith(":"):
            current = found.setdefault(stripped[1:].split()[0].lower(), [])
        else:
            current.append(stripped)
    return found


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Lines between each "begin" and "end"."""
    block: list[str] = []
    for line in lines:
        if line == "begin":
            block = []
        elif line == "end":
            yield block
        elif not line.startswith("("):  # further limits
            block.append(line)


def _values(text: str, skeleton: Acclaim, source: str) -> dict[str, Tensor]:
    """Channels of each moving bone, (F, channels)."""
    rows: dict[str, list[Any]] = {name: [] for name, bone in skeleton.bones.items() if bone.channels}
    frames = 0
    for line in text.splitlines():
        words = line.split()
        if not words or words[0].startswith(("#", ":")):
            continue
        if len(words) == 1 and words[0].isdigit():
            frames += 1
            continue
        if words[0] not in rows or len(words) - 1 != len(skeleton.bones[words[0]].channels):
            raise ValueError(
                f"{source}, frame {frames}: {words[0]!r} with {len(words) - 1} values is not in the skeleton"
            )
        rows[words[0]].append([float(word) for word in words[1:]])
    short = [name for name, found in rows.items() if len(found) != frames]
    if short or not frames:
        raise ValueError(f"{source} has {frames} frames" + (f" but not all of bone {short[0]!r}" if short else ""))
    return {name: torch.tensor(found, dtype=torch.float64) for name, found in rows.items()}


def _from_the_root(parents: dict[str, str]) -> list[str]:
    """Bones such that each comes after its parent."""
    order, waiting = ["root"], dict(parents)
    while waiting:
        ready = [bone for bone, parent in waiting.items() if parent in order]
        if not ready:
            raise ValueError(f"the hierarchy never reaches bone {next(iter(waiting))!r} from the root")
        order += ready
        for bone in ready:
            del waiting[bone]
    return order[1:]
