"""Norms, modulation, stochastic depth, cross attention, parameter groups."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genssm.layers import (
    CrossAttention,
    DropPath,
    LabelEmbedding,
    LayerNorm,
    Mamba,
    Modulation,
    RMSNorm,
    modulate,
    parameter_groups,
)
from genssm.models import ZigMa


def test_rms_norm() -> None:
    norm = RMSNorm(6, eps=1e-3)
    norm.weight.data.normal_()
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight)


@pytest.mark.parametrize("norm", [RMSNorm(64), LayerNorm(64)])
def test_norm_statistics_are_in_float32(norm: nn.Module) -> None:
    """Values whose squares overflow half precision are normalised all the same; the result has the weight's dtype."""
    x = 1000 * torch.randn(4, 64)
    exact = norm(x)
    norm = norm.half()
    torch.testing.assert_close(norm(x.half()).float(), exact, rtol=2e-3, atol=2e-3)
    assert norm(x).dtype == torch.half
    assert norm.double()(x.double()).dtype == torch.double


def test_layer_norm_without_weights_keeps_the_input_dtype() -> None:
    norm, x = LayerNorm(8, affine=False), torch.randn(3, 8)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), eps=1e-6))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert not list(norm.parameters())


def test_modulation() -> None:
    modulation = Modulation(8, 3, chunk_size=4)
    c = torch.randn(2, 8)
    assert all((part == 0).all() and part.shape == (2, 1, 4) for part in modulation(c))
    modulation.linear.weight.data.normal_()
    parts = torch.cat(modulation(c), dim=-1)[:, 0]
    torch.testing.assert_close(parts, F.silu(c) @ modulation.linear.weight.T)
    assert torch.equal(torch.cat(modulation(F.silu(c), activated=True), dim=-1)[:, 0], parts)
    x, shift, scale = torch.randn(2, 5, 4), torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    torch.testing.assert_close(modulate(x, shift, scale), shift + x + x * scale)


def test_drop_path() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.randn(4000, 2, 3)
    ratio = (drop(x) / x).flatten(1)
    kept = ratio[:, 0] != 0
    assert ((ratio != 0) == kept[:, None]).all(), "dropped sample by sample"
    assert abs(float(kept.float().mean()) - 0.75) < 0.03
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 4 / 3))
    torch.manual_seed(1)
    factor = drop.factor(x)
    torch.manual_seed(1)
    assert factor.shape == (4000, 1, 1) and torch.equal(drop(x), x * factor)
    assert drop.eval()(x) is x
    assert drop.factor(x) is None
    assert DropPath(0.0)(x) is x
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="drop path"):
            DropPath(rate)


def test_drop_path_of_any_rate_is_one_graph() -> None:
    """Deep models have more rates than torch.compile makes graphs of one function."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for rate in (0.1, 0.2, 0.3):
        drop = DropPath(rate)
        drop.compile(backend=count, fullgraph=True)
        drop(torch.ones(4, 2))
    assert len(graphs) == 1


def test_cross_attention() -> None:
    attention = CrossAttention(12, num_heads=2, head_dim=5)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 4, 12)
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    heads = []
    for h in (slice(0, 5), slice(5, 10)):
        weights = (q[..., h] @ k[..., h].transpose(1, 2) / 5**0.5).softmax(-1)
        heads.append(weights @ v[..., h])
    torch.testing.assert_close(attention(x, context), attention.to_out(torch.cat(heads, dim=-1)))
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    masked = attention(x, context, mask)
    torch.testing.assert_close(masked[0], attention(x[:1], context[:1, :2])[0])
    torch.testing.assert_close(masked[1], attention(x, context)[1])
    assert (attention.to_out.bias == 0).all() and attention.to_q.bias is None


def test_parameter_groups_decay_matrices_only() -> None:
    model = ZigMa(
        sample_size=8, patch_size=2, hidden_size=16, num_layers=2, num_classes=3, context_dim=6,
        scan="raster_bidirectional", norm="layer", num_frames=2, temporal_pos_embed=True,
    )  # fmt: skip
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names, kept_names = ({names[id(p)] for p in group["params"]} for group in (decayed, kept))
    assert decayed_names | kept_names == set(names.values()) and not decayed_names & kept_names
    last = {name.split(".")[-2] for name in decayed_names}
    assert last == {
        "in_proj", "out_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "conv1d", "conv1d_b", "linear", "proj",
        "linear_in", "linear_out", "context_embed", "to_q", "to_k", "to_v", "to_out", "proj_out",
    }  # fmt: skip
    for part in (
        "A_log",
        "A_log_b",
        "D",
        "D_b",
        "dt_bias",
        "dt_bias_b",
        "table.weight",
        "norm.weight",
        "norm_out.weight",
    ):
        assert any(name.endswith(part) for name in kept_names), part
    assert {"positions", "frame_positions", "null_context"} <= kept_names


def test_parameter_groups_leave_frozen_parameters_out() -> None:
    model = nn.ModuleList([nn.Linear(2, 3), LabelEmbedding(3, 4), Mamba(8)])
    model[0].requires_grad_(False)
    decayed, kept = parameter_groups(model, 0.5)
    assert all(p.requires_grad for p in decayed["params"] + kept["params"])
    assert len(decayed["params"]) == 5 and len(kept["params"]) == 5
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    before = model[2].A_log.clone(), model[2].in_proj.weight.clone()
    for parameter in decayed["params"] + kept["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model[2].A_log, before[0])
    torch.testing.assert_close(model[2].in_proj.weight, before[1] * 0.95)
