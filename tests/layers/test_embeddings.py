import math

import pytest
import torch
import torch.nn.functional as F

from genssm.layers import (
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    resize_positions,
    sincos_2d,
    sinusoidal_features,
    unpatchify,
)


def test_patches_are_in_raster_order_and_unpatchify_puts_them_back() -> None:
    """With the identity as projection a patch comes out as its pixels, (row, column, channel)."""
    embed = PatchEmbed(3, 12, 2)
    identity = torch.eye(12).reshape(12, 2, 2, 3).permute(0, 3, 1, 2)
    embed.proj.weight.data.copy_(identity)
    x = torch.randn(2, 3, 4, 6)
    tokens = embed(x)
    assert tokens.shape == (2, 6, 12)
    torch.testing.assert_close(tokens[1, 4].reshape(2, 2, 3), x[1, :, 2:4, 2:4].permute(1, 2, 0))
    torch.testing.assert_close(unpatchify(tokens, (2, 3), 2), x)


def test_patch_embed_starts_as_one_xavier_matrix() -> None:
    torch.manual_seed(0)
    embed = PatchEmbed(4, 256, 4)
    bound = math.sqrt(6 / (256 + 64))
    assert 0.98 * bound < embed.proj.weight.abs().max() <= bound
    assert (embed.proj.bias == 0).all()


def test_sinusoidal_features() -> None:
    t = torch.tensor([0.0, 1.0, 999.0])
    features = sinusoidal_features(t, 8)
    frequencies = torch.tensor([10000.0 ** (-k / 4) for k in range(4)])
    angles = t[:, None] * frequencies
    torch.testing.assert_close(features, torch.cat([angles.cos(), angles.sin()], dim=1), rtol=0, atol=1e-4)
    assert torch.equal(features[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(sinusoidal_features(t / 1000, 8, scale=1000.0), features, rtol=0, atol=1e-4)
    assert sinusoidal_features(torch.tensor([1]), 8).dtype == torch.float32
    with pytest.raises(ValueError, match="even"):
        sinusoidal_features(t, 7)


def test_timestep_embedding_follows_its_weights_dtype() -> None:
    embed = TimestepEmbedding(16, num_features=8, scale=0.5)
    expected = embed.linear_out(F.silu(embed.linear_in(sinusoidal_features(torch.tensor([1.0, 2.0]), 8))))
    torch.testing.assert_close(embed(torch.tensor([2.0, 4.0])), expected)
    assert embed.bfloat16()(torch.tensor([999.0])).dtype == torch.bfloat16


def test_label_embedding_owns_the_null_class() -> None:
    embed = LabelEmbedding(5, 8)
    assert embed.null_label == 5 and embed.table.weight.shape == (6, 8)
    assert torch.equal(embed(None, 3), embed.table.weight[5].expand(3, 8))
    assert torch.equal(embed(torch.tensor([1, 5]), 2), embed.table.weight[[1, 5]])
    plain = LabelEmbedding(5, 8, null=False)
    assert plain.null_label is None and plain.table.weight.shape == (5, 8)
    with pytest.raises(ValueError, match="no null class"):
        plain(None, 2)
    with pytest.raises(ValueError, match="one per sample"):
        embed(torch.tensor([1, 2, 3]), 2)


def test_sincos_2d_encodes_the_column_first() -> None:
    table = sincos_2d(16, 3, 5).reshape(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    omega = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    torch.testing.assert_close(table[1, 3, :4], (3 * omega).sin().float())
    torch.testing.assert_close(table[1, 3, 4:8], (3 * omega).cos().float())
    torch.testing.assert_close(table[2, 3, 8:12], (2 * omega).sin().float())
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(18, 3, 5)


def test_resize_positions() -> None:
    table = torch.randn(1, 12, 4)
    assert resize_positions(table, (3, 4), (3, 4)) is table
    constant = resize_positions(torch.full((1, 12, 4), 2.0), (3, 4), (5, 7))
    torch.testing.assert_close(constant, torch.full((1, 35, 4), 2.0))
    # A ramp along the columns stays one, sampled at half-pixel centres and held at the borders.
    ramp = torch.arange(4.0).repeat(3)[None, :, None]
    wide = resize_positions(ramp, (3, 4), (3, 8)).reshape(3, 8)
    torch.testing.assert_close(wide[1], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    assert resize_positions(table.bfloat16(), (3, 4), (6, 8), mode="bicubic").dtype == torch.bfloat16
    clip = resize_positions(torch.arange(2.0).repeat_interleave(6)[None, :, None], (2, 2, 3), (4, 2, 3)).reshape(4, 6)
    torch.testing.assert_close(clip[:, 0], torch.tensor([0, 0.25, 0.75, 1]))
    frames = resize_positions(torch.arange(3.0)[None, :, None], (3,), (5,))
    assert frames.shape == (1, 5, 1) and (frames[0, 1:] > frames[0, :-1]).all()
