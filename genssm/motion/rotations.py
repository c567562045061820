"""Rotations: quaternions (w, x, y, z), matrices, 6-D columns, Euler angles and exponential maps, batched.

Quaternions follow Hamilton's product and rotate actively: ``rotate(q, v)`` is q v q*. Every function takes any leading
shape, keeps the dtype and is differentiable. Sources: Zhou et al. 2019 (the 6-D form), Grassia 1998 (exponential maps).
"""

import math

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
AXES = "xyz"


def multiply(q: Tensor, p: Tensor) -> Tensor:
    """Hamilton product q p: the rotation p, then the rotation q. (..., 4) and (..., 4) -> (..., 4)."""
    w, x, y, z = q.unbind(-1)
    a, b, c, d = p.unbind(-1)
    return torch.stack(
        [
            w * a - x * b - y * c - z * d,
            w * b + x * a + y * d - z * c,
            w * c - x * d + y * a + z * b,
            w * d + x * c - y * b + z * a,
        ],
        -1,
    )


def inverse(q: Tensor) -> Tensor:
    """Conjugate of q (..., 4), the inverse of a unit quaternion."""
    return q * q.new_tensor([1.0, -1.0, -1.0, -1.0])


def rotate(q: Tensor, v: Tensor) -> Tensor:
    """v + 2 (w (u x v) + u x (u x v)), u the vector part of the unit quaternion q; (..., 4), (..., 3) -> (..., 3)."""
    w, u = q[..., :1], q[..., 1:]
    u, v = torch.broadcast_tensors(u, v)
    once = torch.linalg.cross(u, v, dim=-1)
    return v + 2 * (w * once + torch.linalg.cross(u, once, dim=-1))


def between(a: Tensor, b: Tensor) -> Tensor:
    """The shortest rotation that turns direction a into direction b: normalised [|a| |b| + a.b, a x b].

    Opposite directions have no shortest rotation; they get a half turn around an axis across a.

    Args:
        a, b: (..., 3), not zero.
    Returns:
        Unit quaternions, (..., 4).
    """
    a, b = torch.broadcast_tensors(a, b)
    w = (a.square().sum(-1) * b.square().sum(-1)).sqrt() + (a * b).sum(-1)
    q = torch.cat([w[..., None], torch.linalg.cross(a, b, dim=-1)], -1)
    opposite = (q == 0).all(-1, keepdim=True)
    aside = torch.linalg.cross(a, F.one_hot(a.abs().argmin(-1), 3).to(a), dim=-1)
    half_turn = torch.cat([torch.zeros_like(w)[..., None], aside], -1)
    q = torch.where(opposite, half_turn, q)
    return q / q.norm(dim=-1, keepdim=True)


def quaternion_to_matrix(q: Tensor) -> Tensor:
    """Rotation matrix (..., 3, 3) of the quaternion q (..., 4), whatever its length."""
    w, x, y, z = (q * math.sqrt(2) / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        torch.stack([1 - y * y - z * z, x * y - w * z, x * z + w * y], -1),
        torch.stack([x * y + w * z, 1 - x * x - z * z, y * z - w * x], -1),
        torch.stack([x * z - w * y, y * z + w * x, 1 - x * x - y * y], -1),
    ]
    return torch.stack(rows, -2)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Unit quaternion (..., 4) of a rotation matrix (..., 3, 3); its largest component is positive."""
    m = matrix
    xx, yy, zz = m.diagonal(dim1=-2, dim2=-1).unbind(-1)
    # Row k is 4 q_k q: 4 q_k^2 at place k, and every other product from sums and differences of elements.
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    xy, xz, yz = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    rows = torch.stack(
        [
            torch.stack([1 + xx + yy + zz, wx, wy, wz], -1),
            torch.stack([wx, 1 + xx - yy - zz, xy, xz], -1),
            torch.stack([wy, xy, 1 - xx + yy - zz, yz], -1),
            torch.stack([wz, xz, yz, 1 - xx - yy + zz], -1),
        ],
        -2,
    )
    best = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = rows.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    return row / row.norm(dim=-1, keepdim=True)


def quaternion_to_6d(q: Tensor) -> Tensor:
    """First two columns of the matrix of q, one after the other; (..., 4) -> (..., 6)."""
    matrix = quaternion_to_matrix(q)
    return torch.cat([matrix[..., 0], matrix[..., 1]], -1)


def matrix_from_6d(six: Tensor) -> Tensor:
    """Matrix whose columns are x = a/|a|, y = z x x, z = normalised x x b for six = [a, b]; (..., 6) -> (..., 3, 3)."""
    a, b = six[..., :3], six[..., 3:]
    x = F.normalize(a, dim=-1)
    z = F.normalize(torch.linalg.cross(x, b, dim=-1), dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x, dim=-1), z], -1)


def expmap_to_quaternion(v: Tensor) -> Tensor:
    """Unit quaternion of the rotation by |v| radians around v; (..., 3) -> (..., 4)."""
    angle = v.norm(dim=-1, keepdim=True)
    return torch.cat([torch.cos(angle / 2), torch.sinc(angle / (2 * math.pi)) * v / 2], -1)


def euler_to_quaternion(angles: Tensor, order: str) -> Tensor:
    """Quaternion of R_i(angle_i) R_j(angle_j) R_k(angle_k) for ``order`` "ijk": the last axis of the order turns first.

    Args:
        angles: degrees around x, y, z in this order whatever ``order`` is, (..., 3).
        order: three different letters of "xyz".
    Returns:
        (..., 4).
    Raises:
        ValueError: another order.
    """
    half = torch.deg2rad(angles) / 2
    result = None
    for axis in _axes(order):
        vector = torch.sin(half[..., axis, None]) * F.one_hot(torch.tensor(axis), 3).to(half)
        q = torch.cat([torch.cos(half[..., axis, None]), vector], -1)
        result = q if result is None else multiply(result, q)
    return result


def quaternion_to_euler(q: Tensor, order: str) -> Tensor:
    """Degrees around x, y, z (..., 3) such that :func:`euler_to_quaternion` gives q (..., 4) back, up to its sign.

    The middle axis of the order stays within 90 degrees. At exactly 90 degrees only the sum or the difference of the
    other two matters; the last axis of the order then gets 0.
    """
    i, j, k = _axes(order)
    sign = 1.0 if (j - i) % 3 == 1 else -1.0
    m = quaternion_to_matrix(q)
    middle = torch.asin((sign * m[..., i, k]).clamp(-1, 1))
    locked = m[..., i, k].abs() >= 1 - 4 * torch.finfo(q.dtype).eps
    first = torch.atan2(-sign * m[..., j, k], m[..., k, k])
    last = torch.atan2(-sign * m[..., i, j], m[..., i, i])
    first = torch.where(locked, torch.atan2(sign * m[..., k, j], m[..., j, j]), first)
    found = {i: first, j: middle, k: torch.where(locked, 0.0, last)}
    return torch.rad2deg(torch.stack([found[axis] for axis in range(3)], -1))


def continuous(q: Tensor) -> Tensor:
    """The same rotations with the signs along the first axis chosen so that neighbours lie in one half; (T, ..., 4)."""
    flips = (q[1:] * q[:-1]).sum(-1, keepdim=True) < 0
    odd = flips.cumsum(0) % 2 == 1
    return torch.cat([q[:1], torch.where(odd, -q[1:], q[1:])])


def _axes(order: str) -> list[int]:
    if sorted(order) != list(AXES):
        raise ValueError(f"order of the Euler angles is {order!r}; expected the letters x, y, z in some order")
    return [AXES.index(letter) for letter in order]
