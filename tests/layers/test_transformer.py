import pytest
import torch
import torch.nn.functional as F

from genssm.layers.positions import ConvPositions, rotary_table, rotate
from genssm.layers.transformer import MLP, AttentionBlock, CrossFusion, split_heads


def test_mlp() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    gated, plain = MLP(8, gated=True), MLP(8, gated=False)
    a, b = gated.proj_in(x).chunk(2, dim=-1)
    torch.testing.assert_close(gated(x), gated.proj_out(F.gelu(a, approximate="tanh") * b))
    torch.testing.assert_close(plain(x), plain.proj_out(F.gelu(plain.proj_in(x), approximate="tanh")))
    assert gated.proj_in.out_features == 64 and plain.proj_in.out_features == 32
    assert not any(linear.bias.any() for mlp in (gated, plain) for linear in (mlp.proj_in, mlp.proj_out))
    torch.manual_seed(1)
    small = MLP(8, gated=False, out_scale=0.5).proj_out.weight
    torch.manual_seed(1)
    torch.testing.assert_close(small, 0.5 * MLP(8, gated=False).proj_out.weight)


@pytest.mark.parametrize("swap_keys", [False, True])
def test_cross_fusion(swap_keys: bool) -> None:
    torch.manual_seed(0)
    fusion = CrossFusion(16, num_heads=2, swap_keys=swap_keys)
    spatial, frequency = torch.randn(2, 2, 5, 8).unbind(0)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v

    q_s, k_s, v_s = split_heads(fusion.qkv_spatial(spatial), 2)
    q_f, k_f, v_f = split_heads(fusion.qkv_frequency(frequency), 2)
    if swap_keys:
        halves = [attend(q_f, k_s, v_f), attend(q_s, k_f, v_s)]
    else:
        halves = [attend(q_s, k_f, v_f), attend(q_f, k_s, v_s)]
    joined = torch.cat([half.transpose(1, 2).flatten(2) for half in halves], dim=-1)
    torch.testing.assert_close(fusion(spatial, frequency), fusion.proj(joined), rtol=1e-5, atol=1e-6)


def test_attention_block_with_closed_gates_passes_its_input() -> None:
    torch.manual_seed(0)
    block, x, c = AttentionBlock(32), torch.randn(2, 6, 32), torch.randn(2, 32)
    assert not torch.allclose(block(x, c), x, atol=1e-3), "its gates start open"
    torch.nn.init.zeros_(block.modulation.linear.weight)
    assert torch.equal(block(x, c), x)


def test_attention_block_does_not_know_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    block, x, c = AttentionBlock(32, gated_mlp=False), torch.randn(2, 6, 32), torch.randn(2, 32)
    order = torch.randperm(6)
    torch.testing.assert_close(block(x[:, order], c), block(x, c)[:, order], rtol=1e-5, atol=1e-5)


def test_rotary_products_depend_on_distances_only() -> None:
    table = rotary_table(16, 5, 7)
    assert table.shape == (2, 35, 8)
    q, k = torch.randn(2, 1, 1, 16).expand(2, 1, 35, 16).unbind(0)
    products = torch.einsum("blc,bmc->lm", rotate(q, table), rotate(k, table)).reshape(5, 7, 5, 7)
    torch.testing.assert_close(products[1, 2, 3, 3], products[0, 4, 2, 5], rtol=1e-4, atol=1e-5)
    assert (products[1, 2, 3, 3] - products[1, 2, 2, 4]).abs() > 1e-3
    x = torch.randn(1, 35, 16)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(x, table)[:, 0], x[:, 0])


def test_conv_positions_see_the_grid() -> None:
    torch.manual_seed(0)
    positions, c = ConvPositions(8), torch.zeros(1, 8)
    x = torch.zeros(1, 12, 8)
    x[:, 5] = torch.randn(8)  # row 1, column 1 of 3 x 4
    changed = (positions(x, c, (3, 4)) - positions(torch.zeros_like(x), c, (3, 4))).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.reshape(3, 4)[:, :3].all() and not changed.reshape(3, 4)[:, 3].any()
