"""The Mamba-2 mixer against the formulas written out step by step."""

import pytest
import torch
import torch.nn.functional as F

from genssm.layers import Mamba2
from genssm.layers.mamba2 import GroupRMSNorm


def build(seed: int = 0, **options: object) -> Mamba2:
    torch.manual_seed(seed)
    mixer = Mamba2(12, **{"d_state": 3, "headdim": 4, **options}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def one_direction(mixer: Mamba2, mapped: torch.Tensor, dt: torch.Tensor, suffix: str) -> torch.Tensor:
    """Convolution and scan of one sample in the order it is given, token by token: (L, M), (L, H) -> (L, H, P)."""
    part = {name: getattr(mixer, name + suffix) for name in ("conv1d", "dt_bias", "A_log", "D")}
    weight, bias = part["conv1d"].weight[:, 0], part["conv1d"].bias
    (heads, width, states), groups, taps = mixer.state_shape, mixer.map_shape[0], weight.shape[1]
    state = torch.zeros(mixer.state_shape, dtype=mapped.dtype)
    outputs = []
    for t in range(len(mapped)):
        window = torch.cat([torch.zeros(taps, mapped.shape[1], dtype=mapped.dtype), mapped[: t + 1]])[-taps:]
        u = (window * weight.T).sum(0)
        x, B, C = F.silu(u if bias is None else u + bias).split([heads * width, groups * states, groups * states])
        step = F.softplus(dt[t] + part["dt_bias"])
        for h in range(heads):
            group = slice(h // (heads // groups) * states, (h // (heads // groups) + 1) * states)
            x_h = x[h * width : (h + 1) * width]
            decay = torch.exp(-step[h] * part["A_log"][h].exp())
            state[h] = decay * state[h] + step[h] * torch.outer(x_h, B[group])
            outputs.append(state[h] @ C[group] + part["D"][h] * x_h)
    return torch.stack(outputs).view(-1, heads * width)


def expected(mixer: Mamba2, hidden: torch.Tensor, orders: list[torch.Tensor]) -> torch.Tensor:
    """The mixer on (B, L, D) by gathering along each order, running every token, and scattering back."""
    inner = mixer.state_shape[0] * mixer.state_shape[1]
    samples = []
    for sample in hidden:
        projected = mixer.in_proj(sample)
        z, mapped, dt = (
            projected[:, :inner],
            projected[:, inner : -mixer.state_shape[0]],
            projected[:, -mixer.sizes[2] :],
        )
        total = torch.zeros_like(z)
        suffixes = mixer.suffixes if len(mixer.suffixes) > 1 else [""] * len(orders)
        for suffix, order in zip(suffixes, orders):
            total[order] += one_direction(mixer, mapped[order], dt[order], suffix)
        gated = (total * F.silu(z)).unflatten(-1, (mixer.map_shape[0], -1))
        gated = gated * (gated.square().mean(-1, keepdim=True) + mixer.norm.eps).rsqrt()
        samples.append(mixer.out_proj(gated.flatten(-2) * mixer.norm.weight))
    return torch.stack(samples)


OPTIONS = [{}, {"ngroups": 3, "d_conv": 2}, {"expand": 1, "headdim": 6, "conv_bias": False}, {"bias": True}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_one_direction(options: dict, length: int) -> None:
    mixer, hidden = build(**options), torch.randn(2, length, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(hidden), expected(mixer, hidden, [torch.arange(length)]))
    order = torch.randperm(length)
    torch.testing.assert_close(mixer(hidden, order.int()), expected(mixer, hidden, [order]))


def test_several_orders_share_parameters_and_are_summed() -> None:
    mixer, hidden = build(), torch.randn(2, 7, 12, dtype=torch.float64)
    orders = torch.stack([torch.randperm(7) for _ in range(3)])
    torch.testing.assert_close(mixer(hidden, orders.int()), expected(mixer, hidden, list(orders)))


def test_two_directions() -> None:
    mixer, hidden = build(bidirectional=True, ngroups=2), torch.randn(2, 7, 12, dtype=torch.float64)
    raster, order, other = torch.arange(7), torch.randperm(7), torch.randperm(7)
    torch.testing.assert_close(mixer(hidden), expected(mixer, hidden, [raster, raster.flip(0)]))
    torch.testing.assert_close(mixer(hidden, order), expected(mixer, hidden, [order, order.flip(0)]))
    pair = torch.stack([order, other])
    torch.testing.assert_close(mixer(hidden, pair), expected(mixer, hidden, [order, other]))
    with pytest.raises(ValueError, match="a bidirectional mixer takes"):
        mixer(hidden, torch.stack([order, other, raster]))
    mixer(hidden).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


def test_lengths_and_packing() -> None:
    mixer, hidden = build(bidirectional=True), torch.randn(2, 9, 12, dtype=torch.float64)
    padded = mixer(hidden, lengths=torch.tensor([4, 9]))
    torch.testing.assert_close(padded[:1, :4], mixer(hidden[:1, :4]))
    torch.testing.assert_close(padded[1:], mixer(hidden[1:]))
    packed = mixer(hidden.view(1, 18, 12), cu_seqlens=torch.tensor([0, 9, 18]))
    torch.testing.assert_close(packed.view_as(hidden), mixer(hidden))


def test_prefill_and_steps_equal_the_whole() -> None:
    mixer, hidden = build(ngroups=2), torch.randn(2, 9, 12, dtype=torch.float64)
    whole = mixer(hidden)
    state = mixer.allocate_state(2, dtype=torch.float64)
    parts = [mixer(hidden[:, :2], state=state), mixer(hidden[:, 2:6], state=state)]
    parts += [mixer.step(token, state)[:, None] for token in hidden[:, 6:].unbind(1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert not torch.cat(parts, dim=1).requires_grad
    assert state.ssm.shape == (2, 1, 6, 4, 3) and state.window.shape == (2, 1, 24 + 12, 3)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_a_narrow_state_follows_a_wide_one(dtype: torch.dtype, bound: float) -> None:
    mixer, hidden = build().float(), torch.randn(2, 40, 12)
    whole = mixer(hidden)
    state = mixer.allocate_state(2, dtype=dtype)
    parts = [mixer(hidden[:, :5], state=state)]
    parts += [mixer.step(token, state)[:, None] for token in hidden[:, 5:].unbind(1)]
    assert state.ssm.dtype == dtype and state.conv.dtype == torch.float32
    error = (torch.cat(parts, dim=1) - whole).norm() / whole.norm()
    assert error < bound
    torch.testing.assert_close(parts[0], whole[:, :5])


def test_states_are_refused_where_none_can_be_kept() -> None:
    hidden = torch.randn(2, 4, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="a state is kept along one direction"):
        build(bidirectional=True).allocate_state(2)
    mixer = build()
    state = mixer.allocate_state(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="a state is kept along one direction"):
        mixer(hidden, torch.arange(4).expand(2, 4), state=state)
    with pytest.raises(ValueError, match="state and lengths or cu_seqlens are both given"):
        mixer(hidden, lengths=torch.tensor([4, 2]), state=state)


def test_initial_values() -> None:
    torch.manual_seed(0)
    mixer = Mamba2(512, bidirectional=True, out_scale=0.25)
    for suffix in mixer.suffixes:
        step = F.softplus(getattr(mixer, "dt_bias" + suffix))
        decay = getattr(mixer, "A_log" + suffix).exp()
        assert step.min() > 1e-3 * 0.99 and step.max() < 0.1 * 1.01
        assert decay.min() >= 1 and decay.max() <= 16 * 1.001 and decay.std() > 2
        assert torch.equal(getattr(mixer, "D" + suffix), torch.ones(16))
    assert mixer.out_proj.weight.abs().max() <= 0.25 * 1024**-0.5
    names = {name for name, _ in Mamba2(64).named_parameters()}
    assert names == {
        "in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight",
    }  # fmt: skip


def test_counts_of_the_published_mixers() -> None:
    counts = {768: 3_764_552, 1024: 6_600_032, 1536: 14_642_576}
    with torch.device("meta"):
        assert {d: sum(p.numel() for p in Mamba2(d).parameters()) for d in counts} == counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 257}, "d_state is 257"),
        ({"d_conv": 9}, "d_conv is 9"),
        ({"headdim": 5}, "headdim is 5; expected 1..256 and a divisor of expand"),
        ({"ngroups": 4}, "ngroups is 4; expected a divisor of the 6 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2(12, **{"headdim": 4, **options})


def test_norm_keeps_the_dtype_of_its_weight() -> None:
    norm = GroupRMSNorm(8, 2)
    assert norm(torch.randn(3, 8).bfloat16()).dtype == torch.float32
    assert norm.bfloat16()(torch.randn(3, 8)).dtype == torch.bfloat16
