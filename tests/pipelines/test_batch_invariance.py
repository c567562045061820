"""BatchInvariant: the same values as without, and an entry's bits do not depend on the others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genssm.pipelines.denoising import BatchInvariant

MATRIX = torch.randn(48, 7)
GROUPS = torch.randn(3, 20, 48)
CASES = {
    "linear": (nn.Linear(100, 33), (100,)),
    "linear of tokens": (nn.Linear(64, 64), (5, 64)),
    "conv1d": (nn.Conv1d(8, 16, 3), (8, 20)),
    "conv2d": (nn.Conv2d(16, 32, 3, padding=1), (16, 9, 9)),
    "patches": (nn.Conv2d(4, 64, 2, 2), (4, 16, 16)),
    "conv3d": (nn.Conv3d(3, 8, 2), (3, 4, 6, 6)),
    "transposed": (nn.ConvTranspose2d(8, 4, 2, 2), (8, 5, 5)),
    "matmul": (lambda x: x @ MATRIX, (3, 48)),
    "matmul of rows": (lambda x: torch.matmul(x, MATRIX), (48,)),
    "einsum of a batch": (lambda x: torch.einsum("bkli,koi->bklo", x, GROUPS), (3, 9, 48)),
    "sigmoid": (torch.sigmoid, (3, 37)),
    "silu": (nn.SiLU(), (3, 37)),
    "softplus": (F.softplus, (3, 37)),
    "softplus of a scale": (nn.Softplus(beta=2.0, threshold=1.0), (41,)),
    "gelu": (nn.GELU(), (41,)),
    "gelu by tanh": (nn.GELU(approximate="tanh"), (41,)),
    "rms norm": (nn.RMSNorm(37), (3, 37)),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 33, 16)),
    "product of batches": (lambda x: x @ x.transpose(1, 2), (12, 40)),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_entries_do_not_depend_on_the_batch(name: str) -> None:
    layer, shape = CASES[name]
    x = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0))
    plain = layer(x)
    with BatchInvariant():
        together = layer(x)
        parts = {size: torch.cat([layer(part) for part in x.split(size)]) for size in (1, 2, 3)}
    torch.testing.assert_close(together, plain, rtol=1e-4, atol=1e-5)
    for size, found in parts.items():
        assert torch.equal(found, together), size


@torch.no_grad()
def test_half_precision_is_rounded_once() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.bfloat16)
    with BatchInvariant():
        found = F.silu(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, F.silu(x.float()).bfloat16(), rtol=0, atol=0)


@torch.no_grad()
def test_inputs_without_a_batch_pass_through() -> None:
    with BatchInvariant():
        vector = nn.Linear(4, 3)(torch.ones(4))
        image = nn.Conv2d(2, 3, 1)(torch.ones(2, 5, 5))
        matrix = torch.eye(4) @ torch.ones(4)
    assert (vector.shape, image.shape, matrix.shape) == ((3,), (3, 5, 5), (4,))
