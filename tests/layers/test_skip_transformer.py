"""Transformer layers equal torch's, in every form; the U merges its skips; positions."""

import pytest
import torch
from torch import nn

from genssm.layers.skip_transformer import (
    SequencePositions,
    SkipTransformer,
    TransformerLayer,
    TransformerStack,
    from_torch_layers,
)
from tests.models.common import randomise

X, MEMORY = torch.randn(2, 5, 12), torch.randn(2, 3, 12)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()


@pytest.mark.parametrize("memory", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_layer_equals_torchs(memory: bool, pre_norm: bool, activation: str) -> None:
    arguments = {"dim_feedforward": 20, "activation": activation, "norm_first": pre_norm, "batch_first": True}
    cls = nn.TransformerDecoderLayer if memory else nn.TransformerEncoderLayer
    theirs = randomise(cls(12, 3, **arguments)).eval()
    ours = TransformerLayer(12, 3, 20, activation=activation, pre_norm=pre_norm, memory=memory).eval()
    prefixed = {f"layers.0.{key}": value for key, value in theirs.state_dict().items()}
    converted = from_torch_layers(prefixed)
    ours.load_state_dict({key.removeprefix("layers.0."): value for key, value in converted.items()})
    with torch.no_grad():
        if memory:
            expected = theirs(X, MEMORY, tgt_key_padding_mask=~MASK)
            got = ours(X, MASK, MEMORY)
        else:
            expected, got = theirs(X, src_key_padding_mask=~MASK), ours(X, MASK)
    torch.testing.assert_close(got[MASK], expected[MASK], rtol=1e-5, atol=1e-5)


def test_u_merges_each_layer_with_its_twin() -> None:
    u = randomise(SkipTransformer(5, 12, num_heads=3, ff_size=20)).eval()
    with torch.no_grad():
        first = u.input_blocks[0](X)
        second = u.input_blocks[1](first)
        x = u.middle_block(second)
        x = u.output_blocks[0](u.linear_blocks[0](torch.cat([x, second], -1)))
        x = u.output_blocks[1](u.linear_blocks[1](torch.cat([x, first], -1)))
        torch.testing.assert_close(u(X), u.norm(x))
        stack = TransformerStack(2, 12, final_norm=False, num_heads=3, ff_size=20).eval()
        torch.testing.assert_close(stack(X), stack.layers[1](stack.layers[0](X)))
    with pytest.raises(ValueError, match="odd"):
        SkipTransformer(4, 12)


def test_positions() -> None:
    fixed = SequencePositions(4, "sinusoidal", 50).eval()
    table = fixed(torch.zeros(1, 3, 4))[0]
    torch.testing.assert_close(table[2], torch.tensor([2.0, 2.0, 0.02, 0.02]).sin().where(
        torch.tensor([True, False, True, False]), torch.tensor([2.0, 2.0, 0.02, 0.02]).cos()))  # fmt: skip
    assert "pe" not in fixed.state_dict()
    learned = SequencePositions(4, "learned", 3)
    assert learned.pe.min() >= 0 and learned.pe.max() < 1
    with pytest.raises(ValueError, match="4 tokens, but positions for 3"):
        learned(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="pos_embed"):
        SequencePositions(4, "rotary", 3)
