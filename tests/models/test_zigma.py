import math
import warnings

import pytest
import torch

from genssm.layers import Mamba
from genssm.models.zigma import ZIGMA_PRESETS, ZigMa
from genssm.models.zigma_published import convert_zigma_state_dict, zigma_config_from_published
from genssm.scan_orders import stack, time_mirror
from tests.models import common

SMALL = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "num_layers": 3, "d_state": 4}
# Every family of models: constructor arguments beside SMALL.
VARIANTS = {
    "unconditional": {},
    "classes": {"num_classes": 5},
    "text": {"context_dim": 12},
    "two_directions": {"scan": "raster_bidirectional", "norm": "layer", "pos_embed": "none"},
    "video_factorised": {"num_frames": 3, "video_pattern": "sst", "temporal_pos_embed": True, "num_classes": 5},
    "video_sequence": {"num_frames": 3, "scan": "raster_bidirectional", "pos_embed": "sincos2d_fixed"},
}


def build(variant: str = "unconditional", **changes: object) -> ZigMa:
    torch.manual_seed(0)
    return ZigMa(**{**SMALL, **VARIANTS[variant], **changes})


def make_inputs(model: ZigMa, batch: int = 2, size: tuple[int, int] = (8, 8), frames: int | None = None) -> dict:
    generator = torch.Generator().manual_seed(1)
    config = model.config
    frames = (frames or config.num_frames,) if config.num_frames else ()
    inputs = {
        "hidden_states": torch.randn(batch, *frames, config.in_channels, *size, generator=generator),
        "timestep": 1000 * torch.rand(batch, generator=generator),
    }
    if config.num_classes:
        inputs["class_labels"] = torch.arange(batch) % config.num_classes
    return common.with_text(inputs, model)


each_variant = pytest.mark.parametrize("variant", VARIANTS)


@each_variant
def test_shapes_and_gradients(variant: str) -> None:
    model = build(variant)
    inputs = make_inputs(model)
    assert model(**inputs).sample.shape == inputs["hidden_states"].shape
    assert model(**inputs, return_dict=False)[0].shape == inputs["hidden_states"].shape
    unused = [name for name in ("null_context",) if name in dict(model.named_parameters())]
    common.check_gradients_reach_everything(model.eval(), inputs, tuple(unused))


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
    model = build(variant, drop_path=0.5)
    common.check_gradient_checkpointing(model, make_inputs(model))


@pytest.mark.parametrize("variant", ["classes", "text", "two_directions", "video_factorised"])
def test_bf16(variant: str, tmp_path) -> None:
    model = build(variant)
    common.check_bf16(model, make_inputs(model), tmp_path)


@pytest.mark.parametrize("variant", ["classes", "text", "video_factorised"])
def test_compile(variant: str) -> None:
    model = build(variant, num_layers=2)
    inputs = make_inputs(model)
    if variant == "text":
        model.null_context.requires_grad_(False)  # text is given, so this graph does not hold it
    common.check_compile(model, inputs)


@pytest.mark.parametrize("variant", ["classes", "two_directions"])
def test_lora(variant: str, tmp_path) -> None:
    pytest.importorskip("peft", reason="pip install genssm[lora]")
    model = build(variant)
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and diffusers speak of their own future
        common.check_lora(model, make_inputs(model), tmp_path, targets)


@pytest.mark.parametrize("variant", ["text", "two_directions"])
def test_offloading_and_storage_in_8_bits(variant: str) -> None:
    model = build(variant)
    common.check_offloading(model, make_inputs(model))
    common.check_layerwise_casting(model, make_inputs(model))


def test_null_class() -> None:
    model = build("classes")
    assert model.null_class_label == 5
    common.check_null_class(model, make_inputs(model))
    assert build("unconditional").null_class_label is None
    without = build("classes", null_condition=False)
    assert without.null_class_label is None
    with pytest.raises(ValueError, match="no null class"):
        without(torch.zeros(1, 3, 8, 8), 1.0)


def test_null_text_of_any_length() -> None:
    model = common.randomise(build("text")).eval()
    inputs = make_inputs(model)
    null = model.null_encoder_hidden_states.expand(2, 7, -1)
    with torch.no_grad():
        absent = model(inputs["hidden_states"], inputs["timestep"]).sample
        filled = model(inputs["hidden_states"], inputs["timestep"], encoder_hidden_states=null).sample
        real = model(**inputs).sample
    torch.testing.assert_close(absent, filled, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(absent, real, atol=1e-4)
    absent = model(inputs["hidden_states"], inputs["timestep"]).sample
    assert torch.autograd.grad(absent.square().mean(), model.null_context)[0].abs().max() > 0
    with pytest.raises(ValueError, match="no null text"):
        build("text", null_condition=False)(inputs["hidden_states"], 1.0)


def test_text() -> None:
    model = build("text")
    common.check_text(model, make_inputs(model))


def test_masked_text_tokens_do_not_matter() -> None:
    model = common.randomise(build("text")).eval()
    inputs = make_inputs(model)
    changed = inputs["encoder_hidden_states"].clone()
    changed[~inputs["encoder_attention_mask"]] = 1e3
    with torch.no_grad():
        expected = model(**inputs).sample
        torch.testing.assert_close(model(**{**inputs, "encoder_hidden_states": changed}).sample, expected)
        shorter = {k: v[1:2] for k, v in inputs.items()}
        shorter["encoder_hidden_states"] = shorter["encoder_hidden_states"][:, :3]
        shorter["encoder_attention_mask"] = None
        torch.testing.assert_close(model(**shorter).sample, expected[1:2], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(**{**inputs, "encoder_attention_mask": None}).sample[1], expected[1], atol=1e-4)


def test_initial_blocks_pass_the_normalised_stream() -> None:
    """Gates start closed: a block adds norm(s) to the stream s, whatever the condition says."""
    model = build("text")
    block = model.blocks[0]
    stream = torch.randn(2, 16, 32)
    out = block(stream, torch.randn(2, 32), model.token_orders[0], context=torch.randn(2, 3, 32))
    torch.testing.assert_close(out, stream + block.norm(stream), rtol=0, atol=0)


@each_variant
def test_initial_steps_and_states(variant: str) -> None:
    """No blanket initialisation touches a mixer: in each direction steps in [dt_min, dt_max], A = -(1..N), D = 1."""
    model = build(variant)
    mixers = [module for module in model.modules() if isinstance(module, Mamba)]
    assert len(mixers) == 3
    for mixer in mixers:
        for suffix in mixer.suffixes:
            steps = torch.nn.functional.softplus(getattr(mixer, "dt_bias" + suffix))
            assert steps.min() >= 0.99e-3 and steps.max() <= 0.101
            assert steps.max() > 5 * steps.min()
            torch.testing.assert_close(getattr(mixer, "A_log" + suffix).exp(), torch.arange(1.0, 5).expand(64, 4))
            assert (getattr(mixer, "D" + suffix) == 1).all()
            bound = mixer.dt_rank**-0.5
            assert 0.8 * bound < getattr(mixer, "dt_proj" + suffix).weight.abs().max() <= bound
        assert mixer.out_proj.weight.abs().max() <= 64**-0.5 * 3**-0.5 + 1e-6
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "conv1d" not in name:
            assert (parameter == 0).all() or "dt_bias" in name, name
    assert model.proj_out.weight.abs().max() > 0


def test_drop_path_rises_to_the_last_block() -> None:
    model = build(num_layers=5, drop_path=0.2)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    inputs = make_inputs(model, batch=8)
    common.randomise(model)
    assert torch.equal(model.eval()(**inputs).sample, model(**inputs).sample)
    model.train()
    assert not torch.equal(model(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize("scan", ["zigzag", "hilbert", "sweep", "raster", "column", "random"])
@pytest.mark.parametrize("pos_embed", ["learned", "sincos2d_fixed", "none"])
def test_other_sizes(scan: str, pos_embed: str) -> None:
    """Non-square inputs, natively and in a model made for squares."""
    model = common.randomise(build(scan=scan, pos_embed=pos_embed)).eval()
    inputs = make_inputs(model, size=(6, 10))
    with torch.no_grad():
        sample = model(**inputs).sample
        assert sample.shape == inputs["hidden_states"].shape
        assert torch.equal(model(**inputs).sample, sample)
    native = build(scan=scan, pos_embed=pos_embed, sample_size=[6, 10])
    assert native.token_orders.shape[1] == 15
    if pos_embed != "learned":
        native.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(native.eval()(**inputs).sample, sample)


def test_other_video_sizes() -> None:
    model = common.randomise(build("video_factorised")).eval()
    inputs = make_inputs(model, size=(12, 4), frames=5)
    with torch.no_grad():
        assert model(**inputs).sample.shape == inputs["hidden_states"].shape


def test_hilbert_released_is_the_inverse_of_hilbert() -> None:
    true, released = (build(scan=name).token_orders.long() for name in ("hilbert", "hilbert_released"))
    for a, b in zip(true, released):
        assert torch.equal(a[b], torch.arange(16))


def test_layers_cycle_through_the_paths() -> None:
    model = build(num_layers=5, num_paths=3)
    assert torch.equal(model.token_orders, stack("zigzag", 4, 4, paths=3))
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    model(**make_inputs(model))
    for layer, order in enumerate(seen):
        assert torch.equal(order, model.token_orders[layer % 3])


def test_random_orders_come_from_the_configured_seed(tmp_path) -> None:
    first, again, other = (build(scan="random", num_paths=2, scan_seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.token_orders, again.token_orders)
    assert not torch.equal(first.token_orders, other.token_orders)
    assert not torch.equal(first.token_orders[0], first.token_orders[1])
    first.save_pretrained(tmp_path)
    assert torch.equal(ZigMa.from_pretrained(tmp_path).token_orders, first.token_orders)


def test_explicit_orders(tmp_path) -> None:
    paths = stack("hilbert", 4, 4, paths=2).tolist()
    model, twin = build(scan=paths).eval(), build(scan="hilbert", num_paths=2).eval()
    inputs = make_inputs(model)
    common.randomise(model), common.randomise(twin)
    assert torch.equal(model(**inputs).sample, twin(**inputs).sample)
    common.check_save_load(model, inputs, tmp_path)
    with pytest.raises(ValueError, match="fix the input size"):
        model(**make_inputs(model, size=(8, 10)))
    with pytest.raises(ValueError, match=r"permutation of 0\.\.15"):
        build(scan=[[0] * 16])


def test_spatial_layers_keep_frames_apart_and_temporal_layers_join_them() -> None:
    """Layers s, s, t: before the temporal layer nothing crosses frames; after it everything later in time may."""
    for layers, expected in ((2, False), (3, True)):
        model = common.randomise(build("video_factorised", num_layers=layers, num_classes=0)).eval()
        inputs = make_inputs(model, batch=1)
        changed = {**inputs, "hidden_states": inputs["hidden_states"].clone()}
        changed["hidden_states"][:, 0] += 1
        with torch.no_grad():
            moved = (model(**inputs).sample - model(**changed).sample).abs().amax((0, 2, 3, 4)) > 1e-6
        assert moved.tolist() == [True, expected, expected]


def test_released_temporal_restore_mirrors_the_temporal_layers() -> None:
    model = common.randomise(build("video_factorised")).eval()
    mirrored = build("video_factorised", temporal_restore="as_released").eval()
    mirrored.load_state_dict(model.state_dict())
    ours, released = model.blocks[2], mirrored.blocks[2]
    assert ours.axis == released.axis == "time"
    stream, c = torch.randn(2, 48, 32), torch.randn(2, 32)
    branch = [b(stream, c, model.frame_orders[0], 3) - stream - b.norm(stream) for b in (ours, released)]
    assert torch.equal(ours.modulation(c)[2], released.modulation(c)[2])
    torch.testing.assert_close(branch[1], branch[0][:, time_mirror(3, 4, 4).long()], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(branch[0], branch[1], atol=1e-3)


def test_one_frame_sequence_video_is_an_image_model() -> None:
    image = common.randomise(build()).eval()
    video = build(num_frames=1).eval()
    video.load_state_dict(image.state_dict())
    inputs = make_inputs(image)
    clip = {**inputs, "hidden_states": inputs["hidden_states"][:, None]}
    assert torch.equal(video(**clip).sample[:, 0], image(**inputs).sample)


def test_time_convention() -> None:
    """Same weights, other convention: the network sees the mirrored time and its answer changes sign."""
    ours = common.randomise(build()).eval()
    theirs = build(time_convention="data_at_one").eval()
    theirs.load_state_dict(ours.state_dict())
    inputs = make_inputs(ours)
    mirrored = {**inputs, "timestep": 1000 - inputs["timestep"].double()}
    assert torch.equal(theirs(**mirrored).sample, -ours(**{**inputs, "timestep": inputs["timestep"].double()}).sample)


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500.0]), torch.tensor([500, 500])])
def test_timesteps_as_schedulers_give_them(timestep: object) -> None:
    model = common.randomise(build()).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x, timestep).sample, model(x, torch.tensor([500.0, 500.0])).sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 7}, "patch_size is 2"),
        ({"scan": "zigzig"}, "zigzag"),
        ({"num_paths": 9}, "8 paths"),
        ({"num_paths": 0}, "8 paths"),
        ({"pos_embed": "sine"}, "sincos2d_fixed"),
        ({"norm": "batch"}, "rms"),
        ({"video_pattern": "sst"}, "num_frames"),
        ({"num_frames": 2, "video_pattern": "ss"}, "both letters"),
        ({"num_frames": 2, "video_pattern": "st", "scan": "raster_bidirectional"}, "no video_pattern"),
        ({"time_convention": "noise"}, "data_at_one"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"d_state": 300}, "d_state"),
        ({"drop_path": 1.0}, "drop path"),
    ],
)
def test_bad_configurations(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("unconditional", {"hidden_states": torch.zeros(2, 3, 7, 8)}, "7x8"),
        ("unconditional", {"hidden_states": torch.zeros(2, 4, 8, 8)}, "takes"),
        ("unconditional", {"hidden_states": torch.zeros(2, 5, 3, 8, 8)}, "takes"),
        ("unconditional", {"class_labels": torch.zeros(2).long()}, "no classes"),
        ("unconditional", {"encoder_hidden_states": torch.zeros(2, 4, 12)}, "no text"),
        ("unconditional", {"timestep": torch.zeros(3)}, "timestep"),
        ("classes", {"class_labels": torch.zeros(3).long()}, "one per sample"),
        ("text", {"encoder_hidden_states": torch.zeros(2, 4, 13)}, "S, 12"),
        ("text", {"encoder_attention_mask": torch.ones(2, 5)}, "encoder_attention_mask"),
        ("text", {"encoder_hidden_states": None}, "without encoder_hidden_states"),
        ("video_factorised", {"hidden_states": torch.zeros(2, 3, 8, 8)}, "takes"),
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


# zigma.md section 1: measured by instantiating the released code.
PARAMETERS = {
    "S/1": 31_681_860,
    "S/2": 31_408_080,
    "S/4": 31_372_800,
    "B/1": 134_624_260,
    "B/2": 134_052_880,
    "B/4": 133_979_200,
    "M/1": 267_666_436,
    "M/2": 267_095_056,
    "M/4": 267_021_376,
    "L/1": 473_542_660,
    "L/2": 472_780_816,
    "L/4": 472_682_560,
    "H/1": 1_060_276_228,
    "H/2": 1_059_133_456,
    "H/4": 1_058_986_048,
    "zigzag8_b1_pe2": 134_624_260,
    "sweep2_b1_pe2": 140_190_724,
    "s1024_zigzag8_b2_old": 133_856_272,
    "3d_sweep2_b2": 142_646_032,
    "3d_zigzag8sst_b2": 137_079_568,
    "zigzag8_b1_pe2_coco14": 215_504_644,
    "demo": 116_996_483,
}


@pytest.mark.parametrize("preset", ZIGMA_PRESETS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    with torch.device("meta"):
        model = ZigMa(**ZIGMA_PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[preset]


def published_keys(hidden: int, layers: int, variant: str) -> dict[str, tuple[int, ...]]:
    """The key table of zigma.md section 7: names and shapes of the released code's checkpoints, written out by hand."""
    D, R, N, E = hidden, math.ceil(hidden / 16), 16, 2 * hidden
    text, two_ways, video = variant == "text", variant == "two_directions", variant == "video"
    keys = {
        "x_embedder.proj.weight": (D, 4, 2, 2),
        "x_embedder.proj.bias": (D,),
        "pos_embed": (1, (3 if video else 1) * 16, D),
        "t_embedder.mlp.0.weight": (D, 256),
        "t_embedder.mlp.0.bias": (D,),
        "t_embedder.mlp.2.weight": (D, D),
        "t_embedder.mlp.2.bias": (D,),
        "norm_f.weight": (D,),
        "final_layer.linear.weight": (16, D),
        "final_layer.linear.bias": (16,),
    }
    if text:
        keys |= {"y_embedder.weight": (D, 24), "y_embedder.bias": (D,)}
    else:
        keys |= {"y_embedder.embedding_table.weight": (7, D)}
    if video:
        keys |= {"temporal_pos_embedding": (1, 3, D)}
    for i in range(layers):
        block = {
            "norm.weight": (D,),
            "adaLN_modulation.1.weight": ((6 if text else 3) * D, D),
            "adaLN_modulation.1.bias": ((6 if text else 3) * D,),
            "mixer.in_proj.weight": (4 * D, D),
            "mixer.out_proj.weight": (D, E),
            "mixer.A_log": (E, N),
            "mixer.D": (E,),
        }
        for s in ("", "_b") if two_ways else ("",):
            block |= {
                f"mixer.conv1d{s}.weight": (E, 1, 4),
                f"mixer.conv1d{s}.bias": (E,),
                f"mixer.x_proj{s}.weight": (R + 2 * N, E),
                f"mixer.dt_proj{s}.weight": (E, R),
                f"mixer.dt_proj{s}.bias": (E,),
            }
        if two_ways:
            block |= {"mixer.A_b_log": (E, N), "mixer.D_b": (E,)}
        if text:
            block |= {f"msa.to_{x}.weight": (512, D) for x in "qkv"}
            block |= {"msa.to_out.0.weight": (D, 512), "msa.to_out.0.bias": (D,)}
        keys |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return keys


@pytest.mark.parametrize("variant", ["classes", "text", "two_directions", "video"])
def test_published_keys(variant: str) -> None:
    """Every published key lands on its own parameter of the same shape, and the sizes are read off the tensors."""
    published = {key: torch.randn(shape) for key, shape in published_keys(40, 2, variant).items()}
    config = zigma_config_from_published(published, {"scan": "zigzag"})
    assert (config["hidden_size"], config["num_layers"], config["patch_size"], config["in_channels"]) == (40, 2, 2, 4)
    assert (config["d_state"], config["d_conv"], config["expand"], config["dt_rank"]) == (16, 4, 2, "auto")
    assert config["num_classes"] == (0 if variant == "text" else 7)
    assert config["context_dim"] == (24 if variant == "text" else 0)
    assert config["sample_size"] == 8
    assert config["scan"] == ("raster_bidirectional" if variant == "two_directions" else "zigzag")
    model = ZigMa(**config)
    converted = convert_zigma_state_dict(published)
    assert len(converted) == len(published)
    model.load_state_dict(converted, strict=True)
    assert {id(value) for value in converted.values()} == {id(value) for value in published.values()}


def test_config_from_published_says_what_is_missing() -> None:
    published = {key: torch.zeros(shape) for key, shape in published_keys(40, 1, "classes").items()}
    with pytest.raises(ValueError, match="does not show scan"):
        zigma_config_from_published(published, {})
    with pytest.raises(ValueError, match="not ZigMa's"):
        zigma_config_from_published({"weight": torch.zeros(1)}, {})
    del published["pos_embed"]
    with pytest.raises(ValueError, match="does not show sample_size"):
        zigma_config_from_published(published, {"scan": "zigzag"})
