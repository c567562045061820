import math
import warnings
from pathlib import Path

import pytest
import torch

from genssm import convert
from genssm.layers.wavelets import to_cells
from genssm.models.dimsum import DIMSUM_PRESETS, DiMSUM
from genssm.models.dimsum_published import convert_dimsum_state_dict, dimsum_config_from_published
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.scan_orders import dimsum_frequency, dimsum_spatial, jpeg, local_window, serpentine, sweep, zigzag
from genssm.schedulers import FlowODEScheduler
from tests.models import common

SMALL = {
    "sample_size": 8, "in_channels": 3, "patch_size": 1, "hidden_size": 32, "num_layers": 2, "d_state": 4,
    "attention_every": 2,
}  # fmt: skip
# Every kind of block, scan, position and attention: constructor arguments beside SMALL.
VARIANTS = {
    "combined": {},
    "classes": {"num_classes": 5},
    "two_directions": {"scan": "bidirectional", "norm": "layer", "pos_embed": "sincos2d_fixed", "serpentine": True},
    "paths": {"scan": "jpeg", "num_paths": 3, "pos_embed": "rotary", "swap_keys": True, "final_norm": True},
    "fourier": {"block_type": "combined_fourier", "pos_embed": "conv", "serpentine": True, "gated_mlp": False},
    "einfft": {"block_type": "combined_einfft", "attention_every": 1, "shared_attention": False},
    "linear": {"block_type": "linear", "scan": "sweep", "learn_sigma": True},
    "raw": {"block_type": "raw", "attention_every": 0},
    "wave": {"block_type": "wave", "scan": "zigzag", "num_classes": 5},
    "text": {"context_dim": 12, "text_attention": True, "attention_every": 1},
    "text_mean": {"block_type": "linear", "context_dim": 12, "num_classes": 5},
    "window": {"block_type": "window", "time_convention": "data_at_one"},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str = "combined", **changes: object) -> DiMSUM:
    torch.manual_seed(0)
    return DiMSUM(**{**SMALL, **VARIANTS[variant], **changes})


def make_inputs(model: DiMSUM, batch: int = 2, size: tuple[int, int] = (8, 8)) -> dict:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(batch, model.config.in_channels, *size, generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
    }
    if model.config.num_classes:
        inputs["class_labels"] = torch.arange(batch) % model.config.num_classes
    return common.with_text(inputs, model)


@pytest.mark.parametrize("variant", ["text", "text_mean"])
def test_text(variant: str) -> None:
    model = build(variant)
    common.check_text(model, make_inputs(model))
    with pytest.raises(ValueError, match="no null text"):
        build(variant, null_condition=False)(
            torch.zeros(1, 3, 8, 8), 1.0, torch.tensor([0]) if "mean" in variant else None
        )


@each_variant
def test_shapes_and_gradients(variant: str) -> None:
    model = build(variant)
    inputs = make_inputs(model)
    channels = 6 if variant == "linear" else 3
    assert model(**inputs).sample.shape == (2, channels, 8, 8)
    assert model(**inputs, return_dict=False)[0].shape == (2, channels, 8, 8)
    unused = ("null_context",)  # of the text variants; every row has text
    common.check_gradients_reach_everything(model.eval(), inputs, unused)


@each_variant
def test_save_load(variant: str, tmp_path: Path) -> None:
    model = build(variant)
    common.check_save_load(model, make_inputs(model), tmp_path)


@each_variant
def test_batch_of_two_is_two_batches_of_one(variant: str) -> None:
    model = build(variant)
    common.check_batch_independent(model, make_inputs(model))


@pytest.mark.parametrize("variant", ["combined", "paths", "wave"])
def test_gradient_checkpointing(variant: str) -> None:
    model = build(variant, num_layers=3, drop_path=0.5)
    common.check_gradient_checkpointing(model, make_inputs(model))


@pytest.mark.parametrize("variant", ["classes", "two_directions", "fourier", "einfft", "wave"])
def test_bf16(variant: str, tmp_path: Path) -> None:
    model = build(variant)
    common.check_bf16(model, make_inputs(model), tmp_path)


@each_variant
def test_models_are_built_on_the_meta_device_with_their_tables(variant: str) -> None:
    model = common.randomise(build(variant)).eval()
    with torch.device("meta"):
        twin = build(variant).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    inputs = make_inputs(model)
    assert torch.equal(twin(**inputs).sample, model(**inputs).sample)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["combined", "paths", "fourier"])
def test_models_are_built_on_the_default_device(variant: str) -> None:
    with torch.device("cuda"):
        model = build(variant, drop_path=0.5)
        model.train()(torch.zeros(2, 3, 8, 8), 1.0)
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.gpu
@each_variant
def test_accelerator_equals_cpu(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = common.randomise(build(variant)).eval()
    inputs = make_inputs(model)
    expected, slopes = model(**inputs).sample, common.gradients(model, inputs)
    model.cuda()
    inputs = {key: value.cuda() for key, value in inputs.items()}
    torch.testing.assert_close(model(**inputs).sample.cpu(), expected, rtol=1e-4, atol=1e-4)
    for name, slope in common.gradients(model, inputs).items():
        assert (slope.cpu() - slopes[name]).norm() <= 1e-3 * slopes[name].norm(), name  # some are zero


@pytest.mark.parametrize("variant", ["classes", "einfft"])
def test_compile(variant: str) -> None:
    model = build(variant)
    common.check_compile(model, make_inputs(model))


def test_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="pip install genssm[lora]")
    model = build("classes")
    targets = ["in_proj", "out_proj", "qkv_spatial", "qkv_frequency", "proj_in", "qkv"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and diffusers speak of their own future
        common.check_lora(model, make_inputs(model), tmp_path, targets)


@pytest.mark.parametrize("variant", ["classes", "einfft"])
def test_offloading(variant: str) -> None:
    model = build(variant)
    common.check_offloading(model, make_inputs(model))


def test_layerwise_casting() -> None:
    model = build("classes")
    common.check_layerwise_casting(model, make_inputs(model))


def test_null_class() -> None:
    model = build("classes")
    assert model.null_class_label == 5
    common.check_null_class(model, make_inputs(model))
    assert build().null_class_label is None
    without = build("classes", null_condition=False)
    assert without.null_class_label is None
    with pytest.raises(ValueError, match="no null class"):
        without(torch.zeros(1, 3, 8, 8), 1.0)


def test_unconditional_models_have_one_row() -> None:
    assert build().label_embed.table.weight.shape == (1, 32)
    assert build(null_condition=False).label_embed.table.weight.shape == (1, 32)


@each_variant
def test_untrained_output_is_zero(variant: str) -> None:
    model = build(variant)
    assert not model(**make_inputs(model)).sample.any()


def test_initial_gates() -> None:
    """The outer modulation of a block starts closed, those of its branches and of the attention block open."""
    block = build().blocks[0]
    assert not block.modulation.linear.weight.any()
    assert block.spatial.modulation.linear.weight.any() and block.frequency.modulation.linear.weight.any()
    assert build().attention_blocks[0].modulation.linear.weight.any()
    biases = [p for name, p in build().named_parameters() if name.endswith("modulation.linear.bias")]
    assert len(biases) == 2 * 3 + 1 and not any(bias.any() for bias in biases)
    for variant in ("linear", "raw", "wave", "window"):
        assert not build(variant).blocks[0].modulation.linear.weight.any()


@pytest.mark.parametrize("variant", ["combined", "two_directions"])
def test_initial_mixers(variant: str) -> None:
    mixer = build(variant, hidden_size=64).blocks[1].spatial.mixer
    for suffix in mixer.suffixes:
        assert torch.equal(mixer.get_parameter("A_log" + suffix).exp().round(), torch.arange(1.0, 5).expand(64, 4))
        assert (mixer.get_parameter("D" + suffix) == 1).all()
        steps = torch.nn.functional.softplus(mixer.get_parameter("dt_bias" + suffix))
        assert (steps > 9e-4).all() and (steps < 0.11).all()
    bound = 1 / math.sqrt(64) / math.sqrt(2)  # Kaiming-uniform(a = sqrt 5) over sqrt(num_layers)
    assert 0.8 * bound < mixer.out_proj.weight.abs().max() <= bound


def test_initial_positions_encode_the_column_first() -> None:
    table = build(sample_size=[4, 8]).positions[0].reshape(4, 8, 32)
    assert torch.equal(table[0, :, :16], table[3, :, :16]) and not torch.equal(table[0, 0], table[0, 1])
    assert torch.equal(table[:, 0, 16:], table[:, 5, 16:])


def test_drop_path_starts_in_the_second_block() -> None:
    model = build(num_layers=5, drop_path=0.4)
    assert [round(block.drop_path.rate, 3) for block in model.blocks] == [0.0, 0.0, 0.1, 0.2, 0.3]
    model = common.randomise(model).train()
    inputs = make_inputs(model)
    assert not torch.equal(model(**inputs).sample, model(**inputs).sample)


def test_residual_stream_is_dropped_at_the_end() -> None:
    """The output depends on the stream through the norms of later blocks only; with the final norm it ends on it."""
    model = common.randomise(build(num_layers=1, attention_every=0)).eval()
    scaled = common.randomise(build(num_layers=1, attention_every=0)).eval()
    inputs = make_inputs(model)
    with torch.no_grad():
        for parameter in (scaled.patch_embed.proj.weight, scaled.patch_embed.proj.bias, scaled.positions):
            parameter.mul_(8.0)
        expected = model(**inputs).sample
        torch.testing.assert_close(scaled(**inputs).sample, expected, rtol=1e-3, atol=1e-3)
        ending = common.randomise(build(num_layers=1, attention_every=0, final_norm=True)).eval()
        ending.load_state_dict({**ending.state_dict(), **model.state_dict()})
        assert not torch.allclose(ending(**inputs).sample, expected, atol=1e-2)


def test_attention_blocks_are_shared_or_independent() -> None:
    for shared, number in ((True, 1), (False, 3)):
        model = build("raw", num_layers=7, attention_every=2, shared_attention=shared)
        assert len(model.attention_blocks) == number
        calls = []
        for index, block in enumerate(model.attention_blocks):
            block.register_forward_hook(lambda *_, index=index, calls=calls: calls.append(index))
        model(**make_inputs(model))
        assert calls == ([0, 0, 0] if shared else [0, 1, 2])
    assert len(build("raw", num_layers=3, attention_every=4).attention_blocks) == 0


GRID = (8, 12)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [dimsum_spatial(*GRID, i) for i in range(4)]),
        ({"serpentine": True}, [dimsum_spatial(*GRID, i, serpentine=True) for i in range(4)]),
        ({"scan": "sweep", "num_paths": 3}, [sweep(*GRID, i) for i in range(3)]),
        ({"scan": "zigzag"}, [zigzag(*GRID, i) for i in range(8)]),
        ({"scan": "jpeg"}, [jpeg(*GRID, i) for i in range(8)]),
        ({"scan": "zigzag", "serpentine": True}, [serpentine(*GRID)[zigzag(*GRID, i).long()] for i in range(8)]),
        ({"block_type": "window"}, [local_window(*GRID, 4, column_first=bool(i % 2)) for i in range(4)]),
        ({"block_type": "window", "scan": "sweep"}, [local_window(*GRID, 4)[sweep(*GRID, i).long()] for i in range(8)]),
    ],
)
def test_spatial_orders(arguments: dict, expected: list[torch.Tensor]) -> None:
    model = build(**{"block_type": "linear", "sample_size": GRID, **arguments})
    assert torch.equal(model.orders, torch.stack(expected)) and model.frequency_orders is None
    if arguments.get("block_type") != "window":
        combined = build(**{"sample_size": GRID, **arguments})
        assert torch.equal(combined.orders, model.orders)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [dimsum_frequency(*GRID, i) for i in range(4)]),
        ({"serpentine": True}, [dimsum_frequency(*GRID, i, serpentine=True) for i in range(4)]),
        ({"scan": "zigzag"}, [dimsum_frequency(*GRID)[zigzag(*GRID, i).long()] for i in range(8)]),
        ({"block_type": "combined_fourier"}, [jpeg(*GRID, i) for i in range(2)]),
        (
            {"block_type": "combined_fourier", "serpentine": True},
            [serpentine(*GRID)[jpeg(*GRID, i).long()] for i in range(2)],
        ),
        ({"block_type": "wave"}, [dimsum_spatial(*GRID, i) for i in range(4)]),
    ],
)
def test_orders_of_transformed_tokens(arguments: dict, expected: list[torch.Tensor]) -> None:
    """Seen from the raster, the frequency branch visits windows; its orders are rows of the cell-major layout."""
    model = build(**{"sample_size": GRID, **arguments})
    orders = model.orders if arguments.get("block_type") == "wave" else model.frequency_orders
    raster = to_cells(torch.arange(96).reshape(1, 96, 1), GRID, 4).flatten()
    assert torch.equal(raster[orders.long()], torch.stack(expected).long())


def test_two_directions_run_every_order_both_ways() -> None:
    model = build("two_directions", serpentine=False)
    assert torch.equal(model.orders[0, 0], torch.arange(64, dtype=torch.int32))
    assert torch.equal(model.orders[0, 1], model.orders[0, 0].flip(0))
    assert torch.equal(model.frequency_orders[0, 1], model.frequency_orders[0, 0].flip(0))
    fourier = build("fourier", scan="bidirectional")
    assert fourier.orders.shape == (1, 2, 64) and fourier.frequency_orders.shape == (2, 64)
    assert len(fourier.blocks[0].spatial.mixer.suffixes) == 2 and len(fourier.blocks[0].frequency.mixer.suffixes) == 1


@pytest.mark.parametrize(
    ("variant", "size"),
    [(variant, (4, 12)) for variant in VARIANTS]
    + [(variant, (5, 7)) for variant in ("einfft", "linear", "raw", "window")],
)
def test_other_sizes(variant: str, size: tuple[int, int]) -> None:
    """Non-square and odd inputs, natively and in a model made for squares."""
    model = common.randomise(build(variant)).eval()
    inputs = make_inputs(model, size=size)
    native = build(variant, sample_size=list(size)).eval()
    assert native.orders.shape[-1] == math.prod(size)
    with torch.no_grad():
        sample = model(**inputs).sample
        assert sample.shape[-2:] == size
        if model.positions is None:
            native.load_state_dict(model.state_dict())
            assert torch.equal(native(**inputs).sample, sample)


def test_weights_for_another_size_and_smaller_patches() -> None:
    source = common.randomise(build("raw", sample_size=16, patch_size=4))
    same = build("raw", sample_size=16, patch_size=4)
    same.load_resized(source)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), source.parameters()))
    target = build("raw", sample_size=[12, 16], patch_size=2)
    target.load_resized(source)
    assert torch.equal(target.patch_embed.proj.weight, source.patch_embed.proj.weight[..., :2, :2])
    kept, rows = target.proj_out.weight.reshape(2, 2, 3, 32), source.proj_out.weight.reshape(4, 4, 3, 32)
    assert torch.equal(kept, rows[:2, :2])
    assert target.positions.shape == (1, 48, 32)
    corner = target.positions.reshape(6, 8, 32)[0, 0] - source.positions[0, 0]
    assert corner.abs().max() < 1.0 and not torch.equal(target.positions[0, 0], target.positions[0, 1])
    with pytest.raises(ValueError, match="patch_size 2 -> 4 grows"):
        source.load_resized(target)
    with pytest.raises(ValueError, match="d_state 4 -> 8"):
        build("raw", d_state=8).load_resized(source)


def test_time_convention() -> None:
    """Same weights, other convention: the network sees the mirrored time and its velocity changes sign."""
    ours = common.randomise(build("linear")).eval()
    theirs = build("linear", time_convention="data_at_one").eval()
    theirs.load_state_dict(ours.state_dict())
    inputs = make_inputs(ours)
    mirrored = {**inputs, "timestep": 1000 - inputs["timestep"].double()}
    expected = ours(**{**inputs, "timestep": inputs["timestep"].double()}).sample
    velocity, more = theirs(**mirrored).sample.chunk(2, dim=1)
    assert torch.equal(velocity, -expected[:, :3]) and torch.equal(more, expected[:, 3:])


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500.0]), torch.tensor([500, 500])])
def test_timesteps_as_schedulers_give_them(timestep: object) -> None:
    model = common.randomise(build()).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x, timestep).sample, model(x, torch.tensor([500.0, 500.0])).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 6}, "multiples of 4, because"),
        ({"sample_size": 20, "patch_size": 2}, "multiples of 8, because"),
        ({"sample_size": 7, "patch_size": 2, "block_type": "linear"}, "multiples of 2$"),
        ({"block_type": "moe"}, "combined_einfft"),
        ({"scan": "hilbert"}, "alternating"),
        ({"num_paths": 9}, "8 paths"),
        ({"pos_embed": "none"}, "rotary"),
        ({"attention_every": -1}, "attention_every is -1"),
        ({"block_type": "linear", "swap_keys": True}, "fuses nothing"),
        ({"block_type": "window", "serpentine": True}, "no lines"),
        ({"norm": "batch"}, "rms"),
        ({"hidden_size": 40}, "multiple of 16"),
        ({"time_convention": "noise"}, "data_at_one"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"drop_path": 1.0}, "drop path"),
    ],
)
def test_bad_configurations(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("combined", {"hidden_states": torch.zeros(2, 3, 6, 8)}, "6x8"),
        ("combined", {"hidden_states": torch.zeros(2, 4, 8, 8)}, "takes"),
        ("combined", {"hidden_states": torch.zeros(2, 5, 3, 8, 8)}, "takes"),
        ("combined", {"class_labels": torch.zeros(2).long()}, "no classes"),
        ("combined", {"encoder_hidden_states": torch.zeros(2, 4, 12)}, "no text"),
        ("combined", {"timestep": torch.zeros(3)}, "timestep"),
        ("classes", {"class_labels": torch.zeros(3).long()}, "one per sample"),
    ],
)
def test_bad_inputs(variant: str, change: dict, message: str) -> None:
    model = build(variant)
    with pytest.raises(ValueError, match=message):
        model(**{**make_inputs(model), **change})


# dimsum.md section 2: measured by instantiating the released code, dead cond_proj included. (unconditional, classes)
PARAMETERS = {
    "B/2": (197_779_216, 198_547_216),
    "L/2": (458_892_304, 459_916_304),
    "L/2-v1": (566_916_112, None),
    "L/4": (458_794_048, None),
    "L/4-v1": (566_817_856, None),
    "XL/2": (853_679_248, 854_831_248),
}


def count(**arguments: object) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiMSUM(**arguments).parameters())


@pytest.mark.parametrize("preset", DIMSUM_PRESETS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    released = {**DIMSUM_PRESETS[preset], "released_cond_proj": True}
    unconditional, classes = PARAMETERS[preset]
    assert count(**released) == unconditional
    if classes:
        assert count(**released, num_classes=1000) == classes


def test_parts_of_the_large_model_have_the_published_number_of_parameters() -> None:
    large = DIMSUM_PRESETS["L/2"]
    released = {**large, "released_cond_proj": True}
    assert count(**large) == 425_305_104  # without cond_proj
    assert count(**released, sample_size=64) == 459_678_736
    assert count(**released, sample_size=64, num_classes=1000) == 460_702_736
    assert count(**released, gated_mlp=False) == 387_519_504
    assert count(**released, attention_every=0) == 435_804_176
    with torch.device("meta"):
        model = DiMSUM(**released)
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 27_005_952
    assert sum(p.numel() for p in model.attention_blocks.parameters()) == 23_088_128


def test_dead_weights_are_frozen_and_change_nothing() -> None:
    with_dead, without = build(released_cond_proj=True), build()
    dead = {name for name, _ in with_dead.named_parameters()} - {name for name, _ in without.named_parameters()}
    assert len(dead) == 8 and all("cond_proj" in name for name in dead)
    assert not any(with_dead.get_parameter(name).requires_grad for name in dead)
    common.randomise(with_dead)
    without.load_state_dict({k: v for k, v in with_dead.state_dict().items() if k not in dead})
    inputs = make_inputs(without)
    assert torch.equal(with_dead.eval()(**inputs).sample, without.eval()(**inputs).sample)


def published_keys(classes: int = 7, layers: int = 4) -> dict[str, tuple[int, ...]]:
    """The key table of dimsum.md section 11: names and shapes of released checkpoints, written out by hand."""
    D, d, E, n, r = 32, 16, 32, 16, 1
    keys = {
        "pos_embed": (1, 16, D),
        "x_embedder.proj.weight": (D, 4, 2, 2),
        "x_embedder.proj.bias": (D,),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "y_embedder.embedding_table.weight": (classes, D),
        "attn_block.attn.qkv.weight": (3 * D, D),
        "attn_block.attn.qkv.bias": (3 * D,),
        "attn_block.attn.proj.weight": (D, D),
        "attn_block.attn.proj.bias": (D,),
        "attn_block.mlp.w12.weight": (8 * D, D),
        "attn_block.mlp.w12.bias": (8 * D,),
        "attn_block.mlp.w3.weight": (D, 4 * D),
        "attn_block.mlp.w3.bias": (D,),
        "attn_block.adaLN_modulation.1.weight": (6 * D, D),
        "attn_block.adaLN_modulation.1.bias": (6 * D,),
        "final_layer.linear.weight": (16, D),
        "final_layer.linear.bias": (16,),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D),
        "final_layer.adaLN_modulation.1.bias": (2 * D,),
    }
    for i in range(layers):
        block = {
            "norm.weight": (D,),
            "norm_2.weight": (D,),
            "proj.qkv1.weight": (3 * d, d),
            "proj.qkv1.bias": (3 * d,),
            "proj.qkv2.weight": (3 * d, d),
            "proj.qkv2.bias": (3 * d,),
            "proj.proj.weight": (D, D),
            "proj.proj.bias": (D,),
            "adaLN_modulation.1.weight": (3 * D, D),
            "adaLN_modulation.1.bias": (3 * D,),
            "mlp.w12.weight": (8 * D, D),
            "mlp.w12.bias": (8 * D,),
            "mlp.w3.weight": (D, 4 * D),
            "mlp.w3.bias": (D,),
            **{f"freq_mamba.dwt.w_{band}": (1, 1, 2, 2) for band in ("ll", "lh", "hl", "hh")},
            "freq_mamba.idwt.filters": (4, 1, 2, 2),
        }
        for branch in ("spatial_mamba", "freq_mamba"):
            block |= {
                f"{branch}.mixer.in_proj.weight": (2 * E, d),
                f"{branch}.mixer.conv1d.weight": (E, 1, 4),
                f"{branch}.mixer.conv1d.bias": (E,),
                f"{branch}.mixer.x_proj.weight": (r + 2 * n, E),
                f"{branch}.mixer.dt_proj.weight": (E, r),
                f"{branch}.mixer.dt_proj.bias": (E,),
                f"{branch}.mixer.A_log": (E, n),
                f"{branch}.mixer.D": (E,),
                f"{branch}.mixer.out_proj.weight": (d, E),
                f"{branch}.mixer.cond_proj.weight": (E, D),
                f"{branch}.mixer.cond_proj.bias": (E,),
                f"{branch}.adaLN_modulation.1.weight": (3 * d, D),
                f"{branch}.adaLN_modulation.1.bias": (3 * d,),
            }
        keys |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return keys


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: 0.1 * torch.randn(shape) for key, shape in published_keys().items()}


def test_published_keys(published: dict) -> None:
    """Every published weight lands on its own parameter of the same shape, and the sizes are read off the tensors."""
    config = dimsum_config_from_published(published, {})
    assert config == {
        "sample_size": 8, "in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_layers": 4, "num_classes": 6,
        "block_type": "combined", "scan": "alternating", "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto",
        "norm": "rms", "learn_sigma": False, "final_norm": False, "gated_mlp": True, "shared_attention": True,
        "pos_embed": "learned", "time_convention": "data_at_one",
    }  # fmt: skip
    model = DiMSUM(**config, released_cond_proj=True)
    converted = convert_dimsum_state_dict(published)
    assert len(published) - len(converted) == 4 * 5  # Haar filters
    model.load_state_dict(converted, strict=True)


def test_dead_weights_are_reported_and_left_out_unless_asked(published: dict) -> None:
    model, report = convert.load_published("dimsum", published)
    assert report.complete and len(report.dead) == 16 and "dead keys, left out: 16" in str(report)
    assert not any("cond_proj" in name for name, _ in model.named_parameters())
    kept, report = convert.load_published("dimsum", published, {"released_cond_proj": True})
    assert report.complete and not report.dead
    stored = published["blocks.2.freq_mamba.mixer.cond_proj.weight"]
    assert torch.equal(kept.blocks[2].frequency.cond_proj.weight, stored)
    inputs = make_inputs(model)
    inputs["hidden_states"] = torch.randn(2, 4, 8, 8)
    assert torch.equal(kept(**inputs).sample, model(**inputs).sample)


def test_config_from_published_tells_variants_apart(published: dict) -> None:
    def read(changed: dict, **given: object) -> dict:
        return dimsum_config_from_published(changed, given)

    assert read(published, null_condition=False)["num_classes"] == 7
    assert read({**published, "y_embedder.embedding_table.weight": torch.zeros(1, 32)})["num_classes"] == 0
    both = {f"blocks.{i}.spatial_mamba.mixer.A_b_log": torch.zeros(32, 16) for i in range(4)}
    assert read({**published, **both})["scan"] == "bidirectional"
    for name, family in (("jpeg", jpeg), ("zigzag", zigzag)):
        tables = torch.stack([family(4, 4, i % 2) for i in range(8)]).long()
        changed = {**published, "blocks.0.spatial_mamba.mixer.zigzag_paths": tables}
        shown = read(changed)
        assert (shown["scan"], shown["num_paths"]) == (name, 2)
    with pytest.raises(ValueError, match="none of sweep, zigzag and jpeg"):
        read({**published, "blocks.0.spatial_mamba.mixer.zigzag_paths": torch.arange(16).flip(0).repeat(8, 1)})
    assert "pos_embed" not in read(published, pos_embed="rotary")
    assert read(published, pos_embed="sincos2d_fixed")["pos_embed"] == "learned"
    fixed = {**published, "pos_embed": build(sample_size=4).positions.detach()}
    assert read(fixed, pos_embed="sincos2d_fixed")["pos_embed"] == "sincos2d_fixed"
    assert read({**published, "pos_cnn.norm.weight": torch.zeros(32)})["pos_embed"] == "conv"
    without = {key: value for key, value in published.items() if not key.startswith("attn_block")}
    assert read(without)["attention_every"] == 0
    with pytest.raises(ValueError, match="not DiMSUM's"):
        read({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no square"):
        read({**published, "pos_embed": torch.zeros(1, 32, 32)})
    with pytest.raises(ValueError, match="scan is"):
        convert.load_published("dimsum", {**published, **both}, {"scan": "sweep"})


def test_command_line_writes_a_pipeline(published: dict, tmp_path: Path, capsys) -> None:
    torch.save({"epoch": 1, "ema": published, "model": {}}, tmp_path / "content.pth")
    assert convert.main(["dimsum", str(tmp_path / "content.pth"), str(tmp_path / "pipeline")]) == 0
    assert "dead keys, left out: 16" in capsys.readouterr().out
    pipeline = ClassConditionalImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(pipeline.denoiser, DiMSUM)
    assert isinstance(pipeline.scheduler, FlowODEScheduler) and pipeline.scheduler.config.path == "gvp"


def test_images_do_not_depend_on_the_batch() -> None:
    """Each image is what its generator and label make it, bit by bit, for every kind of block."""
    for variant in ("classes", "fourier", "einfft", "wave"):
        model = common.randomise(build(variant, num_classes=3)).eval()
        pipeline = ClassConditionalImagePipeline(model, FlowODEScheduler(path="gvp"))
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}

        def generators() -> list[torch.Generator]:
            return [torch.Generator().manual_seed(i) for i in range(3)]

        together = pipeline([0, 1, 2], generator=generators(), **options).images
        alone = [pipeline(i, generator=generators()[i], **options).images for i in range(3)]
        assert torch.equal(together, torch.cat(alone)), variant
