import warnings

import pytest
import torch

from genssm.layers import Mamba
from genssm.models.dim import DIM_PRESETS, DiM
from genssm.models.dim_published import convert_dim_state_dict, dim_config_from_published
from genssm.scan_orders import dim_pad_tokens, dim_pattern, dim_pattern_chain, inverse
from tests.models import common

SMALL = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "num_layers": 5, "d_state": 4}
# Every family of models: constructor arguments beside SMALL.
VARIANTS = {
    "classes": {"num_classes": 5},
    "unconditional": {"skip_fusion": "concat_linear"},
    "time_only": {
        "null_condition": False, "num_scan_patterns": 2, "num_pad_tokens": 0, "num_prefix_tokens": 0,
        "edge_convs": False, "skip_fusion": "none",
    },
    "text": {"context_dim": 12, "num_text_tokens": 5, "null_condition": False},
    "text_mean": {"context_dim": 12, "num_classes": 5, "duplicate_condition_tokens": True},
    "extras": {
        "num_classes": 5, "time_token_mlp": True, "duplicate_condition_tokens": True, "final_conv": True,
        "edge_dilation": 2, "pad_layout": "row_major_cycle", "num_scan_patterns": 3,
    },
}  # fmt: skip
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str = "classes", **changes: object) -> DiM:
    torch.manual_seed(0)
    return DiM(**{**SMALL, **VARIANTS[variant], **changes})


def make_inputs(model: DiM, batch: int = 2, size: tuple[int, int] = (8, 8)) -> dict:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(batch, model.config.in_channels, *size, generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
    }
    if model.config.num_classes:
        inputs["class_labels"] = torch.arange(batch) % model.config.num_classes
    return common.with_text(inputs, model)


@each_variant
def test_shapes_and_gradients(variant: str) -> None:
    model = build(variant)
    inputs = make_inputs(model)
    assert model(**inputs).sample.shape == inputs["hidden_states"].shape
    assert model(**inputs, return_dict=False)[0].shape == inputs["hidden_states"].shape
    common.check_gradients_reach_everything(model, inputs)


@pytest.mark.parametrize("variant", ["text", "text_mean"])
def test_text(variant: str) -> None:
    model = build(variant)
    common.check_text(model, make_inputs(model))


def test_text_stands_in_front_of_every_scan() -> None:
    model = build("text")
    assert model.orders[:, : 1 + 5 + 3].tolist() == [list(range(9))] * 4  # time, text, prefix
    common.randomise(model).eval()
    inputs = make_inputs(model)
    reordered = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(1)}
    reordered["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
    with torch.no_grad():
        difference = (model(**inputs).sample - model(**reordered).sample).abs().amax(dim=(1, 2, 3))
    assert (difference > 1e-4).all()  # the same mean, another order


def test_more_text_than_places_is_cut() -> None:
    model = common.randomise(build("text")).eval()
    tokens = torch.randn(2, 9, 12)
    mask = torch.arange(9) < 5
    call = {**make_inputs(model), "encoder_attention_mask": mask.expand(2, -1)}
    short = {**call, "encoder_hidden_states": tokens[:, :5], "encoder_attention_mask": None}
    with torch.no_grad():
        long = model(**{**call, "encoder_hidden_states": tokens}).sample
        torch.testing.assert_close(long, model(**short).sample, rtol=1e-5, atol=1e-5)


def test_learned_sigma_doubles_the_channels() -> None:
    model = build(learn_sigma=True, final_conv=True)
    assert model(**make_inputs(model)).sample.shape == (2, 6, 8, 8)


@each_variant
def test_save_load(variant: str, tmp_path) -> None:
    model = build(variant)
    common.check_save_load(model, make_inputs(model), tmp_path)


@each_variant
def test_batch_of_two_is_two_batches_of_one(variant: str) -> None:
    model = build(variant)
    common.check_batch_independent(model, make_inputs(model))


@each_variant
def test_gradient_checkpointing(variant: str) -> None:
    model = build(variant)
    common.check_gradient_checkpointing(model, make_inputs(model))


@each_variant
def test_bf16(variant: str, tmp_path) -> None:
    model = build(variant)
    common.check_bf16(model, make_inputs(model), tmp_path)


@pytest.mark.gpu
@each_variant
def test_accelerator_equals_cpu(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = common.randomise(build(variant)).eval()
    inputs = make_inputs(model, size=(8, 12))
    expected, slopes = model(**inputs).sample, common.gradients(model, inputs)
    model.cuda()
    inputs = {key: value.cuda() for key, value in inputs.items()}
    torch.testing.assert_close(model(**inputs).sample.cpu(), expected, rtol=1e-4, atol=1e-4)
    for name, slope in common.gradients(model, inputs).items():
        assert (slope.cpu() - slopes[name]).norm() < 1e-3 * slopes[name].norm(), name
    assert all(value.is_cuda for value in model.resized(4).state_dict().values())


def test_compile() -> None:
    model = build(num_layers=3)
    common.check_compile(model, make_inputs(model))


def test_lora(tmp_path) -> None:
    pytest.importorskip("peft", reason="pip install genssm[lora]")
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and diffusers speak of their own future
        common.check_lora(model, make_inputs(model), tmp_path, ["in_proj", "x_proj", "out_proj", "from_skip"])


def test_offloading_and_storage_in_8_bits() -> None:
    for check in (common.check_offloading, common.check_layerwise_casting):
        model = build("extras")
        check(model, make_inputs(model))


def test_null_class() -> None:
    model = build()
    assert model.null_class_label == 5
    common.check_null_class(model, make_inputs(model))
    unconditional = build("unconditional")
    assert unconditional.null_class_label is None
    assert len(unconditional.label_embed.table.weight) == 1
    without = build(null_condition=False)
    assert without.null_class_label is None
    with pytest.raises(ValueError, match="no null class"):
        without(torch.zeros(1, 3, 8, 8), 1.0)


@pytest.mark.parametrize(("depth", "patterns"), [(5, 4), (7, 3), (9, 4), (11, 2), (5, 1)])
def test_one_raster_stream_is_the_released_order_of_tokens(depth: int, patterns: int) -> None:
    """The released way: tokens are moved into each block's pattern, skips are used in the order they were left in."""
    model = common.randomise(build(num_layers=depth, num_scan_patterns=patterns, num_prefix_tokens=2)).eval()
    inputs, streams, modulations = make_inputs(model), [], []
    model.blocks[0].register_forward_pre_hook(
        lambda module, args: modulations.append(args[1]) or streams.append(args[0])
    )
    model.blocks[-1].register_forward_hook(lambda module, args, out: streams.append(out))
    with torch.no_grad():
        model(**inputs)
        front, chain = 4, dim_pattern_chain(depth, patterns)
        in_place = torch.arange(front + 49, dtype=torch.int32)
        x, last, skips = streams[0], 0, []
        for layer, (block, pattern) in enumerate(zip(model.blocks, chain)):
            if layer > depth // 2:
                x = block.long_skip(x, skips.pop())
            move = inverse(dim_pattern(7, 7, last))[dim_pattern(7, 7, pattern).long()].long()
            x, last = torch.cat([x[:, :front], x[:, front:][:, move]], dim=1), pattern
            fusion, block.long_skip = block.long_skip, None
            x = block(x, modulations[0], in_place)
            block.long_skip = fusion
            if 1 <= layer <= depth // 2:
                skips.append(x)
    assert last == 0 and not skips
    torch.testing.assert_close(streams[1], x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(streams[0], x, atol=0.1)


@pytest.mark.parametrize("layout", ["per_side", "row_major_cycle"])
def test_pad_and_prefix_tokens_stand_where_they_should(layout: str) -> None:
    model = common.randomise(build(pad_layout=layout)).eval()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = make_inputs(model, size=(8, 12))
    model(**inputs)
    sequence, cells = seen[0][0], dim_pad_tokens(4, 6, 3, layout)
    assert len(sequence) == 2 + 3 + 7 * 9
    assert torch.equal(sequence[2:5], model.prefix_tokens)
    pads = cells >= 0
    assert torch.equal(sequence[5:][pads], model.pad_tokens[cells[pads].long()])
    other = {**inputs, "hidden_states": -inputs["hidden_states"]}
    model(**other)
    assert torch.equal((seen[1][0] != sequence).any(-1), torch.cat([torch.zeros(5).bool(), ~pads]))


@pytest.mark.parametrize(
    ("preset", "length"),
    [("S-32", 366), ("L-256", 366), ("H-256", 366), ("H-512", 1230), ("H-1024", 4494), ("H-1536", 9806)],
)
def test_presets_have_the_measured_number_of_parameters_and_tokens(preset: str, length: int) -> None:
    """dim.md section 1: measured by instantiating the released code."""
    measured = {
        "S-32": 50_568_716,
        "L-256": 386_063_376,
        "H-256": 862_407_184,
        "H-512": 863_586_832,
        "H-1024": 868_305_424,
        "H-1536": 876_169_744,
    }
    with torch.device("meta"):
        model = DiM(**DIM_PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == measured[preset]
    assert model.orders.shape == (4, length)
    assert set(measured) == set(DIM_PRESETS)


def test_initial_values() -> None:
    """dim.md section 4: no output starts at zero, gates are open, convolutions keep their biases."""
    model = build("extras", hidden_size=128, num_layers=9)
    values = dict(model.named_parameters())
    assert (values["positions"] == 0).all()
    for name, value in values.items():
        if name.endswith(".bias") and not name.rpartition(".")[0].endswith(("conv1d", "conv_in", "conv_out", "proj")):
            assert (value == 0).all() or "conv_final" in name, name
    for name in ("pad_tokens", "prefix_tokens", "label_embed.table.weight", "time_embed.linear_in.weight"):
        assert 0.016 < values[name].std() < 0.024, name
    for name in ("conv_in", "conv_out", "patch_embed.proj", "blocks.0.mixer.conv1d"):
        fan_in = values[f"{name}.weight"][0].numel()
        for part in ("weight", "bias"):
            assert 0.9 * fan_in**-0.5 < values[f"{name}.{part}"].abs().max() <= fan_in**-0.5, name
    tables = torch.stack([block.table for block in model.blocks])
    assert 0.95 < tables.std() * 128**0.5 < 1.05
    out = torch.stack([block.mixer.out_proj.weight for block in model.blocks])
    assert 0.95 < out.abs().max() * (256 * 9) ** 0.5 <= 1
    for mixer in (module for module in model.modules() if isinstance(module, Mamba)):
        steps = torch.nn.functional.softplus(mixer.dt_bias)
        assert steps.min() >= 0.99e-3 and steps.max() <= 0.101 and steps.max() > 5 * steps.min()
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 5).expand(256, 4))
    assert 0.2 < model(**make_inputs(model)).sample.std() < 0.9


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (4, 4), (2, 10)])
@pytest.mark.parametrize("variant", ["classes", "extras"])
def test_other_sizes(variant: str, size: tuple[int, int]) -> None:
    """A model runs at other sizes, as does its resized copy, which shares its weights."""
    model = common.randomise(build(variant)).eval()
    inputs = make_inputs(model, size=size)
    resized = model.resized(size)
    assert resized.native_grid == (size[0] // 2, size[1] // 2) and not resized.training
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, resized(**inputs).sample)
    assert resized.norm_out.weight.data_ptr() == model.norm_out.weight.data_ptr()
    assert resized.resized(8).positions.shape == model.positions.shape


def test_weak_to_strong_start() -> None:
    """A higher resolution starts from a lower one's weights: positions resized, condition rows kept, other pads."""
    weak = common.randomise(build())
    strong = build(sample_size=16, pad_layout="row_major_cycle")
    strong.load_resized(weak)
    for name, value in weak.named_parameters():
        if name != "positions":
            assert torch.equal(strong.get_parameter(name), value)
    assert torch.equal(strong.positions[:, :2], weak.positions[:, :2])
    table, wanted = (p[0, 2:].unflatten(0, (side, side)) for p, side in ((weak.positions, 4), (strong.positions, 8)))
    torch.testing.assert_close(wanted[0, 0], table[0, 0])  # half-pixel centres: the corner is the corner
    mixed = 0.75 * table[1, 1] + 0.25 * table[1, 2]
    mixed = 0.75 * mixed + 0.25 * (0.75 * table[2, 1] + 0.25 * table[2, 2])
    torch.testing.assert_close(wanted[3, 3], mixed)
    with torch.no_grad():
        strong.norm_out.weight.zero_()
    assert weak.norm_out.weight.abs().max() > 0
    with pytest.raises(ValueError, match="num_classes 5 -> 6"):
        build(sample_size=16, num_classes=6).load_resized(weak)


def test_skip_tuning() -> None:
    """Of blocks 3 and 4 the last gives its skip less weight, in proportion to the time."""
    model = common.randomise(build()).eval()
    inputs = {**make_inputs(model), "timestep": torch.tensor([1000.0, 500.0])}
    twins = [build().eval() for _ in range(2)]
    with torch.no_grad():
        for twin, factor in zip(twins, (0.7, 0.85)):
            twin.load_state_dict(model.state_dict())
            twin.blocks[4].long_skip.from_skip.weight.mul_(factor)
        plain = model(**inputs).sample
        model.enable_skip_tuning(0.7, "time")
        tuned = model(**inputs).sample
        for i, twin in enumerate(twins):
            torch.testing.assert_close(tuned[i], twin(**inputs).sample[i], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tuned, plain, atol=1e-2)
        model.enable_skip_tuning(0.7, "as_released")
        released = model(**inputs).sample
        assert 0 < (released - plain).abs().max() < 0.01 * (tuned - plain).abs().max()
        model.disable_skip_tuning()
        assert torch.equal(model(**inputs).sample, plain)
    with pytest.raises(ValueError, match="as_released"):
        model.enable_skip_tuning(0.7, "always")
    with pytest.raises(ValueError, match="no"):
        build("time_only").enable_skip_tuning()


def test_time_convention() -> None:
    diffusers = common.randomise(build()).eval()
    published = build(time_convention="one_based").eval()
    published.load_state_dict(diffusers.state_dict())
    inputs = make_inputs(diffusers)
    with torch.no_grad():
        shifted = published(**{**inputs, "timestep": inputs["timestep"].double() - 1}).sample
        torch.testing.assert_close(shifted, diffusers(**inputs).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500.0]), torch.tensor([500, 500])])
def test_timesteps_as_schedulers_give_them(timestep: object) -> None:
    model = common.randomise(build("unconditional")).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x, timestep).sample, model(x, torch.tensor([500.0, 500.0])).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 7}, "patch_size is 2"),
        ({"num_layers": 4}, "odd"),
        ({"hidden_size": 33}, "even"),
        ({"num_scan_patterns": 5}, "1 to 4"),
        ({"num_pad_tokens": -1}, "at least 0"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens"),
        ({"pad_layout": "lateral"}, "per_side"),
        ({"skip_fusion": "add"}, "two_linears"),
        ({"time_convention": "noise"}, "one_based"),
        ({"edge_dilation": 0}, "edge_dilation"),
        ({"dt_rank": 0}, "dt_rank"),
    ],
)
def test_bad_configurations(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("classes", {"hidden_states": torch.zeros(2, 3, 7, 8)}, "7x8"),
        ("classes", {"hidden_states": torch.zeros(2, 4, 8, 8)}, "takes"),
        ("classes", {"class_labels": torch.zeros(3).long()}, "one per sample"),
        ("classes", {"encoder_hidden_states": torch.zeros(2, 4, 12)}, "no text"),
        ("classes", {"timestep": torch.zeros(3)}, "timestep"),
        ("unconditional", {"class_labels": torch.zeros(2).long()}, "no classes"),
    ],
)
def test_bad_inputs(variant: str, change: dict, message: str) -> None:
    model = build(variant)
    with pytest.raises(ValueError, match=message):
        model(**{**make_inputs(model), **change})


def test_first_block_cache() -> None:
    """diffusers' cache skips the blocks after the first where the step changed little."""
    from diffusers import FirstBlockCacheConfig

    model = common.randomise(build()).eval()
    inputs = make_inputs(model)
    calls = []
    model.blocks[1].mixer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(**inputs).sample
        model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        with model.cache_context("all"):
            first, second = model(**inputs).sample, model(**inputs).sample
    assert len(calls) == 2
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)


def published_keys(hidden: int, layers: int, variant: str) -> dict[str, tuple[int, ...]]:
    """The key table of dim.md section 9: names and shapes of the released code's checkpoints, written out by hand."""
    D, R, N, E = hidden, -(-hidden // 16), 16, 2 * hidden
    classes = variant != "time_only"
    keys = {
        "additional_embed": (1, (2 if classes else 1) + 16, D),
        "pos_embed.proj.weight": (D, 4, 2, 2),
        "pos_embed.proj.bias": (D,),
        "adaln_single.emb.timestep_embedder.linear_1.weight": (D, 256),
        "adaln_single.emb.timestep_embedder.linear_1.bias": (D,),
        "adaln_single.emb.timestep_embedder.linear_2.weight": (D, D),
        "adaln_single.emb.timestep_embedder.linear_2.bias": (D,),
        "adaln_single.linear.weight": (3 * D, D),
        "adaln_single.linear.bias": (3 * D,),
        "a4m_adapter.pad_token": (1, D, 3),
        "a4m_adapter.pad_token_dec_split": (1, 3, D),
        "norm_out.norm.weight": (D,),
        "proj_out_1.weight": (2 * D, D),
        "proj_out_1.bias": (2 * D,),
        "proj_out_2.weight": (16, D),
        "proj_out_2.bias": (16,),
    }
    keys |= {f"a4m_adapter.{end}_smoother.weight": (D, 1, 3, 3) for end in ("first", "last")}
    keys |= {f"a4m_adapter.{end}_smoother.bias": (D,) for end in ("first", "last")}
    if classes:
        keys |= {"adaln_single.emb.class_embedder.embedding_table.weight": (8, D), "label_emb.weight": (8, D)}
    if variant == "switches":
        keys |= {"time_embed.0.weight": (4 * D, D), "time_embed.0.bias": (4 * D,)}
        keys |= {"time_embed.2.weight": (D, 4 * D), "time_embed.2.bias": (D,)}
        keys |= {"final_layer.weight": (4, 4, 3, 3), "final_layer.bias": (4,)}
    for i in range(layers):
        block = {
            "scale_shift_table": (3, D),
            "norm1.norm.weight": (D,),
            "attn1.in_proj.weight": (4 * D, D),
            "attn1.conv1d.weight": (E, 1, 3),
            "attn1.conv1d.bias": (E,),
            "attn1.x_proj.weight": (R + 2 * N, E),
            "attn1.dt_proj.weight": (E, R),
            "attn1.dt_proj.bias": (E,),
            "attn1.A_log": (E, N),
            "attn1.D": (E,),
            "attn1.out_proj.weight": (D, E),
        }
        if i > layers // 2 and variant == "large":
            block |= {f"skip_linear.{j}.weight": (D, D) for j in (0, 1)}
            block |= {f"skip_linear.{j}.bias": (D,) for j in (0, 1)}
        elif i > layers // 2:
            block |= {"skip_linear.weight": (D, 2 * D), "skip_linear.bias": (D,)}
        keys |= {f"transformer_blocks.{i}.{key}": shape for key, shape in block.items()}
    return keys


@pytest.mark.parametrize("variant", ["large", "small", "time_only", "switches"])
def test_published_keys(variant: str) -> None:
    """Every published key lands on its own parameter of the same shape, and the sizes are read off the tensors."""
    published = {key: torch.randn(shape) for key, shape in published_keys(40, 5, variant).items()}
    config = dim_config_from_published(published, {})
    assert (config["hidden_size"], config["num_layers"], config["patch_size"], config["in_channels"]) == (40, 5, 2, 4)
    assert (config["d_state"], config["d_conv"], config["expand"], config["dt_rank"]) == (16, 3, 2, "auto")
    assert config["num_classes"] == (0 if variant == "time_only" else 7)
    assert config["skip_fusion"] == ("two_linears" if variant == "large" else "concat_linear")
    assert (config["sample_size"], config["pad_layout"], config["time_convention"]) == (8, "per_side", "one_based")
    assert config["time_token_mlp"] == config["final_conv"] == (variant == "switches")
    model = DiM(**config)
    converted = convert_dim_state_dict(published)
    assert len(converted) == len(published)
    model.load_state_dict(converted, strict=True)
    assert {value.data_ptr() for value in converted.values()} == {value.data_ptr() for value in published.values()}
    assert torch.equal(model.pad_tokens[1], published["a4m_adapter.pad_token"][0, :, 1])
    assert torch.equal(model.prefix_tokens, published["a4m_adapter.pad_token_dec_split"][0])


def test_grid_from_published_positions() -> None:
    def read(rows: int, **given: object) -> tuple:
        published = {key: torch.empty(shape) for key, shape in published_keys(40, 3, "large").items()}
        published["additional_embed"] = torch.empty(1, rows, 40)
        config = dim_config_from_published(published, given)
        return config["sample_size"], config["pad_layout"], config["duplicate_condition_tokens"]

    assert read(258) == (32, "per_side", False)
    assert read(1026) == (64, "row_major_cycle", False)
    assert read(1026, pad_layout="per_side") == (64, "per_side", False)
    assert read(4 + 25) == (10, "per_side", True)
    assert read(2 + 20, sample_size=[10, 8]) == ([10, 8], "per_side", False)
    assert read(4 + 20, sample_size=[10, 8]) == ([10, 8], "per_side", True)
    with pytest.raises(ValueError, match="no square"):
        read(2 + 20)
    with pytest.raises(ValueError, match="does not fit"):
        read(2 + 20, sample_size=8)
    with pytest.raises(ValueError, match="not DiM's"):
        dim_config_from_published({"weight": torch.zeros(1)}, {})


def test_convert_command(tmp_path, capsys) -> None:
    """A published checkpoint becomes a pipeline folder with the published solver and schedule."""
    from genssm.convert import main
    from genssm.pipelines import ClassConditionalImagePipeline, DiMUpsamplingPipeline
    from genssm.single_step_solver import ContinuousDPMSolverScheduler

    published = {key: 0.1 * torch.randn(shape) for key, shape in published_keys(32, 3, "large").items()}
    torch.save(published, tmp_path / "nnet_ema.pth")
    assert main(["dim", str(tmp_path / "nnet_ema.pth"), str(tmp_path / "dim")]) == 0
    printed = capsys.readouterr().out
    assert all(f"{kind} keys: none" in printed for kind in ("missing", "unexpected", "reshaped"))
    pipe = ClassConditionalImagePipeline.from_pretrained(tmp_path / "dim")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is ContinuousDPMSolverScheduler
    assert pipe.scheduler.alphas_cumprod[-1].item() == pytest.approx(0.00466, rel=1e-2)
    images = pipe([3], num_inference_steps=3, guidance_scale=1.4, output_type="latent").images
    assert images.shape == (1, 4, 8, 8) and images.isfinite().all()
    assert DiMUpsamplingPipeline.from_pretrained(tmp_path / "dim").denoiser.config.time_convention == "one_based"

    del published["a4m_adapter.pad_token_dec_split"], published["proj_out_1.bias"]
    torch.save(published, tmp_path / "nnet.pth")
    assert main(["dim", str(tmp_path / "nnet.pth"), str(tmp_path / "broken")]) == 1
    assert "missing keys: 1\n  modulation_out.linear.bias" in capsys.readouterr().out
