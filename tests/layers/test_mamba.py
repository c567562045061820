"""The Mamba-1 mixer against the formulas written out step by step."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from genssm.layers import Mamba
from genssm.layers.directions import DepthwiseTaps


def build(seed: int = 0, **options: object) -> Mamba:
    torch.manual_seed(seed)
    mixer = Mamba(12, **{"d_state": 3, "d_conv": 4, **options}).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def one_direction(mixer: Mamba, x: torch.Tensor, z: torch.Tensor, suffix: str = "") -> torch.Tensor:
    """Conv, scan and gate of one sample in the order it is given, token by token: x, z (L, E) -> (L, E)."""
    part = {name: getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "dt_bias", "A_log", "D")}
    weight, bias = part["conv1d"].weight[:, 0], part["conv1d"].bias
    width = weight.shape[1]
    state = torch.zeros(x.shape[1], mixer.d_state, dtype=x.dtype)
    outputs = []
    for t in range(len(x)):
        window = torch.cat([torch.zeros(width, x.shape[1], dtype=x.dtype), x[: t + 1]])[-width:]
        u = (window * weight.T).sum(0)
        u = F.silu(u if bias is None else u + bias)
        dt, B, C = (part["x_proj"].weight @ u).split([mixer.dt_rank, mixer.d_state, mixer.d_state])
        delta = F.softplus(part["dt_proj"].weight @ dt + part["dt_bias"])[:, None]
        state = torch.exp(-delta * part["A_log"].exp()) * state + delta * B * u[:, None]
        outputs.append((state @ C + part["D"] * u) * F.silu(z[t]))
    return torch.stack(outputs)


def expected(mixer: Mamba, h: torch.Tensor, orders: list[torch.Tensor]) -> torch.Tensor:
    """The mixer on (B, L, D) by gathering along each order, running every token, and scattering back."""
    samples = []
    for sample in h:
        x, z = mixer.in_proj(sample).chunk(2, dim=-1)
        total = torch.zeros_like(x)
        suffixes = mixer.suffixes if len(mixer.suffixes) > 1 else [""] * len(orders)
        for suffix, order in zip(suffixes, orders):
            total[order] += one_direction(mixer, x[order], z[order], suffix)
        samples.append(mixer.out_proj(total))
    return torch.stack(samples)


@pytest.mark.parametrize("options", [{}, {"dt_rank": 5, "expand": 1, "d_conv": 2}, {"bias": True, "conv_bias": False}])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_one_direction(options: dict, length: int) -> None:
    mixer, h = build(**options), torch.randn(2, length, 12, dtype=torch.float64)
    raster = torch.arange(length)
    torch.testing.assert_close(mixer(h), expected(mixer, h, [raster]))
    order = torch.randperm(length)
    torch.testing.assert_close(mixer(h, order.int()), expected(mixer, h, [order]))


def test_several_orders_share_parameters_and_are_summed() -> None:
    mixer, h = build(), torch.randn(2, 7, 12, dtype=torch.float64)
    orders = torch.stack([torch.randperm(7) for _ in range(3)])
    torch.testing.assert_close(mixer(h, orders.int()), expected(mixer, h, list(orders)))


def test_two_directions() -> None:
    mixer, h = build(bidirectional=True), torch.randn(2, 7, 12, dtype=torch.float64)
    raster, order, other = torch.arange(7), torch.randperm(7), torch.randperm(7)
    torch.testing.assert_close(mixer(h), expected(mixer, h, [raster, raster.flip(0)]))
    torch.testing.assert_close(mixer(h, order.int()), expected(mixer, h, [order, order.flip(0)]))
    pair = torch.stack([order, other]).int()
    torch.testing.assert_close(mixer(h, pair), expected(mixer, h, [order, other]))
    with pytest.raises(ValueError, match="bidirectional mixer takes"):
        mixer(h, torch.stack([order, other, raster]).int())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths(bidirectional: bool) -> None:
    """Padding neither changes nor receives anything, in either direction."""
    mixer, h = build(bidirectional=bidirectional), torch.randn(3, 8, 12, dtype=torch.float64)
    lengths = torch.tensor([8, 5, 1])
    padded = mixer(h, lengths=lengths)
    for sample, out, length in zip(h, padded, lengths.tolist()):
        torch.testing.assert_close(out[:length], mixer(sample[None, :length])[0])
        assert (out[length:] == 0).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences(bidirectional: bool) -> None:
    mixer, h = build(bidirectional=bidirectional), torch.randn(1, 9, 12, dtype=torch.float64)
    borders = [0, 4, 5, 9]
    packed = mixer(h, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    for start, end in pairwise(borders):
        torch.testing.assert_close(packed[:, start:end], mixer(h[:, start:end]))


@pytest.mark.parametrize("length", [1, 4])
def test_states_are_refused_where_none_can_be_kept(length: int) -> None:
    hidden = torch.randn(2, length, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="a state is kept along one direction"):
        build(bidirectional=True).allocate_state(2)
    mixer = build()
    state = mixer.allocate_state(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="a state is kept along one direction"):
        mixer(hidden, torch.arange(length).expand(2, length), state=state)
    with pytest.raises(ValueError, match="state and lengths or cu_seqlens are both given"):
        mixer(hidden, lengths=torch.tensor([length, 1]), state=state)


def test_gradients_of_every_parameter_against_the_formulas() -> None:
    mixer, h = build(bidirectional=True), torch.randn(2, 6, 12, dtype=torch.float64)
    order = torch.randperm(6)
    grads = []
    for out in (mixer(h, order.int()), expected(mixer, h, [order, order.flip(0)])):
        grads.append(torch.autograd.grad(out.square().sum(), list(mixer.parameters())))
    for name, ours, theirs in zip(dict(mixer.named_parameters()), *grads):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_initialisation() -> None:
    torch.manual_seed(0)
    mixer = Mamba(64, bidirectional=True, dt_min=0.01, dt_max=0.05, out_scale=0.5)
    for suffix in ("", "_b"):
        step = F.softplus(getattr(mixer, "dt_bias" + suffix))
        assert 0.0099 < step.min() < 0.012 and 0.04 < step.max() < 0.0501
        assert torch.equal(getattr(mixer, "D" + suffix), torch.ones(128))
        torch.testing.assert_close(getattr(mixer, "A_log" + suffix), torch.arange(1.0, 17).log().repeat(128, 1))
    assert not torch.equal(mixer.dt_bias, mixer.dt_bias_b)
    assert 0.45 < mixer.out_proj.weight.abs().max() / 128**-0.5 <= 0.5
    floor = Mamba(64, dt_min=1e-5, dt_max=2e-5, dt_floor=1e-3)
    torch.testing.assert_close(F.softplus(floor.dt_bias), torch.full((128,), 1e-3))


def test_step_bias_is_added_in_float32() -> None:
    """Below a bfloat16 model the step bias keeps its float32 digits: 8.03 is 8 in bfloat16, and acts as 8.03."""
    mixer, h = build().bfloat16(), torch.randn(1, 6, 12).bfloat16()
    outputs = []
    for bias in (8.0, 8.03):
        mixer.dt_bias.data = torch.full((24,), bias)
        outputs.append(mixer(h).float())
    change = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 1e-3 < change < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dt_rank": "full"}, "dt_rank"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"d_state": 0}, "d_state"),
        ({"d_conv": 9}, "d_conv"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba(16, **options)


def test_taps_are_initialised_as_a_depthwise_convolution() -> None:
    torch.manual_seed(0)
    weight, bias = DepthwiseTaps(512, 4)()
    assert weight.shape == (512, 4) and 0.49 < weight.abs().max() <= 0.5
    assert (bias == 0).all()
    assert DepthwiseTaps(8, 4, bias=False)()[1] is None
