"""Rotations: conversions undo each other, compose as matrices do, and stay differentiable at their edges."""

from itertools import permutations

import pytest
import torch

from genssm.motion import rotations as r


def random_quaternions(count: int = 50) -> torch.Tensor:
    q = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return q / q.norm(dim=-1, keepdim=True)


def same_rotation(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a * b).sum(-1).abs() - 1).abs().max() < 1e-10)


def test_products_and_rotations_are_those_of_matrices() -> None:
    q, p = random_quaternions(), random_quaternions().flip(0)
    v = torch.randn(50, 3, dtype=torch.float64)
    a, b = r.quaternion_to_matrix(q), r.quaternion_to_matrix(p)
    torch.testing.assert_close(r.quaternion_to_matrix(r.multiply(q, p)), a @ b)
    torch.testing.assert_close(r.rotate(q, v), (a @ v[..., None]).squeeze(-1))
    torch.testing.assert_close(r.rotate(r.inverse(q), r.rotate(q, v)), v)
    torch.testing.assert_close(r.quaternion_to_matrix(3 * q), a)


def test_matrices_and_columns_come_back() -> None:
    q = torch.cat([random_quaternions(), torch.eye(4, dtype=torch.float64)])
    matrix = r.quaternion_to_matrix(q)
    assert same_rotation(r.matrix_to_quaternion(matrix), q)
    torch.testing.assert_close(r.matrix_from_6d(r.quaternion_to_6d(q)), matrix)


@pytest.mark.parametrize("order", ["".join(p) for p in permutations("xyz")])
def test_euler_angles_come_back_in_every_order(order: str) -> None:
    q = random_quaternions()
    assert same_rotation(r.euler_to_quaternion(r.quaternion_to_euler(q, order), order), q)
    middle = "xyz".index(order[1])
    for angle in (90.0, -90.0):  # gimbal lock
        locked = torch.tensor([[20.0, 30.0, -50.0]], dtype=torch.float64)
        locked[0, middle] = angle
        turned = r.euler_to_quaternion(locked, order)
        assert same_rotation(r.euler_to_quaternion(r.quaternion_to_euler(turned, order), order), turned)


def test_euler_order_is_checked() -> None:
    with pytest.raises(ValueError, match="xxz"):
        r.euler_to_quaternion(torch.zeros(3), "xxz")


def test_between_turns_one_direction_into_the_other() -> None:
    a, b = torch.randn(2, 30, 3, dtype=torch.float64)
    turned = r.rotate(r.between(a, b), a)
    torch.testing.assert_close(turned / turned.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True))
    for axis in torch.eye(3, dtype=torch.float64):  # opposite directions: some half turn, and no NaN
        torch.testing.assert_close(r.rotate(r.between(axis, -axis), axis), -axis)


def test_exponential_map() -> None:
    v = torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.pi / 2, 0.0]], dtype=torch.float64, requires_grad=True)
    q = r.expmap_to_quaternion(v)
    x = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(2, 3)
    torch.testing.assert_close(r.rotate(q, x), torch.tensor([[1.0, 0, 0], [0, 0, -1.0]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(q.sum(), v)
    assert gradient.isfinite().all()


def test_continuous_keeps_the_rotations() -> None:
    smooth = r.expmap_to_quaternion(torch.linspace(0, 9, 40, dtype=torch.float64)[:, None, None] * torch.ones(1, 2, 3))
    signs = torch.where(torch.rand(40, 2, 1, generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0)
    fixed = r.continuous(smooth * signs)
    assert (fixed[1:] * fixed[:-1]).sum(-1).min() > 0
    assert same_rotation(fixed, smooth)
