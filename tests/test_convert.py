"""The converter: reading checkpoints safely, inferring configurations, writing pipeline folders."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from genssm.convert import PUBLISHED, load_published, main, read_checkpoint, resolve_config
from genssm.data.codes import load_tokenizer
from genssm.models import ZigMa
from genssm.models.zigma_published import _PUBLISHED_KEYS
from genssm.pipelines import (
    AutoregressiveImagePipeline,
    ClassConditionalImagePipeline,
    TextToImagePipeline,
    VideoPipeline,
)
from tests.models.test_aim import make_model as make_aim
from tests.models.test_aim import published as published_aim
from tests.models.test_dim import published_keys as dim_keys
from tests.models.test_dimsum import published_keys as dimsum_keys
from tests.models.test_vq import make_tokenizer
from tests.models.test_vq import published as published_vq
from tests.models.test_zigma import published_keys

SCAN = '{"scan": "zigzag"}'


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = published_keys(32, 2, "classes")
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def foreign_object() -> object:
    """An object whose class will be gone when the checkpoint is read, as OmegaConf's usually is."""
    module = types.ModuleType("gone_config")

    class Config:
        def __init__(self, content: dict) -> None:
            self.content = content

        def __setstate__(self, state: dict) -> None:
            raise AssertionError("code of the checkpoint was run")

    Config.__module__, Config.__qualname__ = "gone_config", "Config"
    module.Config = Config
    sys.modules["gone_config"] = module
    return Config({"lr": 1e-4, "nested": Config({})})


@pytest.fixture
def training_checkpoint(published: dict, tmp_path: Path) -> Path:
    """Model, EMA, optimiser and a pickled configuration in one file, as the released training loop writes it."""
    ema = {f"module.{key}": value for key, value in published.items()}
    raw = {key: value + 1 for key, value in ema.items()}
    path = tmp_path / "0090000.pt"
    torch.save({"model": raw, "ema": ema, "opt": {"state": {}}, "args": foreign_object(), "train_steps": 90000}, path)
    del sys.modules["gone_config"]
    return path


def test_training_checkpoint_is_read_without_its_classes(training_checkpoint: Path, published: dict) -> None:
    for weights, offset in ((None, 0), ("ema", 0), ("model", 1)):
        read = read_checkpoint(training_checkpoint, weights)
        assert set(read) == set(published)
        assert all(torch.equal(read[key], value + offset) for key, value in published.items())


def test_flat_files_are_read(published: dict, tmp_path: Path) -> None:
    save_file(published, tmp_path / "a.safetensors")
    torch.save(published, tmp_path / "a.pth")
    torch.save({"state_dict": published}, tmp_path / "a.ckpt")
    torch.save(published, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    for suffix in (".safetensors", ".pth", ".ckpt", ".bin"):
        read = read_checkpoint(tmp_path / f"a{suffix}")
        assert all(torch.equal(read[key], value) for key, value in published.items())


def test_names_of_wrapped_models(published: dict, tmp_path: Path) -> None:
    for wrapper in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        torch.save({f"{wrapper}{key}": value for key, value in published.items()}, tmp_path / "a.pt")
        assert set(read_checkpoint(tmp_path / "a.pt")) == set(published)


SMALL_FILES = {
    "zigma": lambda: (zeros(published_keys(32, 1, "classes")), {"scan": "zigzag"}),
    "dim": lambda: (zeros(dim_keys(32, 3, "classes")), {}),
    "dimsum": lambda: (zeros(dimsum_keys()), {}),
    "aim": lambda: (published_aim(make_aim(num_layers=1)), {"sample_size": [3, 4]}),
    "vq": lambda: (published_vq(make_tokenizer()), {"norm_num_groups": 4}),
}


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", SMALL_FILES)
def test_half_precision_and_missing_tensors(name: str) -> None:
    """Weights in float16 become float32; without any one of them the answer is a report or a message, no traceback."""
    weights, given = SMALL_FILES[name]()
    weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    model, report = load_published(name, weights, given)
    assert report.complete, str(report)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    refused = 0
    for key in weights:
        rest = {other: value for other, value in weights.items() if other != key}
        try:
            resolve_config(name, rest, given)
        except ValueError as error:
            refused += "the checkpoint has no" in str(error)
    assert refused > 1


class Attack:
    """A pickle that calls a function when it is read naively."""

    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code of the checkpoint was run')",)


def test_code_in_a_checkpoint_is_not_run(published: dict, tmp_path: Path) -> None:
    torch.save({"ema": published, "args": Attack()}, tmp_path / "a.pt")
    assert set(read_checkpoint(tmp_path / "a.pt")) == set(published)


def test_what_cannot_be_read_safely_says_what_to_do(published: dict, tmp_path: Path) -> None:
    torch.save({"ema": published, "args": Attack()}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="If you trust its source"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "content", "weights", "message"),
    [
        ("a.zip", {}, None, "expected .safetensors"),
        ("a.pt", [1, 2], None, "holds a list"),
        ("a.pt", {"optimizer": {"a": 1}}, None, "no part 'ema' or 'model'"),
        ("a.pt", {"model": {"a": torch.zeros(1)}}, "ema", "no part 'ema'"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: object, weights: str | None, message: str) -> None:
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / name, weights)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "legacy.pt"])
def test_half_a_file(published: dict, name: str, tmp_path: Path) -> None:
    """A download that broke off."""
    whole = tmp_path / name
    if name == "a.safetensors":
        save_file(published, whole)
    else:
        torch.save(published, whole, _use_new_zipfile_serialization=name == "a.pt")
    whole.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"is no whole .*; download it again"):
        read_checkpoint(whole)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*a\.pt"):
        read_checkpoint(tmp_path / "a.pt")


def test_config_is_read_off_the_tensors_and_may_not_be_contradicted(published: dict) -> None:
    config = resolve_config("zigma", published, {"scan": "zigzag", "drop_path": 0.0})
    assert config["hidden_size"] == 32 and config["num_classes"] == 7 and config["drop_path"] == 0.0
    assert config["time_convention"] == "data_at_one" and config["null_condition"] is False
    with pytest.raises(ValueError, match="hidden_size is 32 in the checkpoint but 64 was given"):
        resolve_config("zigma", published, {"scan": "zigzag", "hidden_size": 64})
    with pytest.raises(ValueError, match="no argument depth"):
        resolve_config("zigma", published, {"scan": "zigzag", "depth": 2})


def test_rectangular_grids_must_be_given(published: dict) -> None:
    published["pos_embed"] = torch.zeros(1, 8, 32)
    with pytest.raises(ValueError, match="does not show sample_size"):
        resolve_config("zigma", published, {"scan": "zigzag"})
    model, report = load_published("zigma", published, {"scan": "zigzag", "sample_size": [4, 8]})
    assert report.complete and model.native_grid == (2, 4)


def test_key_report(published: dict) -> None:
    published["surplus.weight"] = published.pop("norm_f.weight")
    published["blocks.0.norm.weight"] = torch.zeros(31)
    _, report = load_published("zigma", published, {"scan": "zigzag"})
    assert report.missing == ["norm_out.weight"] and report.unexpected == ["surplus.weight"]
    assert report.reshaped == ["blocks.0.norm.weight: (31,) in the checkpoint, (32,) in the model"]
    assert not report.complete
    assert "missing keys: 1\n  norm_out.weight" in str(report)


def test_every_pattern_of_the_key_table_is_used() -> None:
    keys = [key for variant in ("classes", "text", "two_directions", "video") for key in published_keys(32, 1, variant)]
    for pattern in _PUBLISHED_KEYS:
        assert any(re.search(pattern, key) for key in keys), pattern


def test_command_line_writes_a_pipeline(training_checkpoint: Path, published: dict, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "pipeline"
    arguments = ["zigma", str(training_checkpoint), str(out), "--config", SCAN]
    assert main(arguments) == 0
    assert "missing keys: none\nunexpected keys: none\nreshaped keys: none" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "denoiser", "model_index.json", "scheduler"]
    assert [path.name for path in out.parent.iterdir()] == ["pipeline"], "nothing half-written is left"
    assert json.loads((out / "model_index.json").read_text())["denoiser"] == ["genssm", "ZigMa"]

    pipe = ClassConditionalImagePipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        [1, 2], num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (2, 4, 8, 8) and torch.as_tensor(images).isfinite().all()
    expected, _ = load_published("zigma", published, {"scan": "zigzag"})
    x, label = torch.randn(1, 4, 8, 8), torch.tensor([3])
    assert torch.equal(pipe.denoiser(x, 250.0, label).sample, expected(x, 250.0, label).sample)

    command = [sys.executable, "-m", "genssm.convert", *arguments]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "nothing is overwritten" in again.stderr and "Traceback" not in again.stderr


def test_text_and_video_models_become_their_pipelines(tmp_path: Path) -> None:
    for variant, config in (("text", {"scan": "zigzag"}), ("video", {"scan": "zigzag", "video_pattern": "st"})):
        weights = {key: 0.1 * torch.randn(shape) for key, shape in published_keys(32, 2, variant).items()}
        save_file(weights, tmp_path / f"{variant}.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.42"}))
        out = tmp_path / variant
        files = [str(tmp_path / f"{variant}.safetensors"), str(out), "--config", str(tmp_path / "config.json")]
        assert main(["zigma", *files]) == 0
        pipe = DiffusionPipeline.from_pretrained(out)
        pipe.set_progress_bar_config(disable=True)
        config = pipe.denoiser.config
        if variant == "text":
            assert isinstance(pipe, TextToImagePipeline) and pipe.config.read_padding and pipe.text_encoder is None
            call = {"prompt_embeds": torch.randn(1, 7, config.context_dim), "output_type": "latent"}
            assert pipe(**call, num_inference_steps=1).images.isfinite().all()
        else:
            assert isinstance(pipe, VideoPipeline) and config.num_frames == 3
            label = 0 if config.num_classes else None
            assert pipe(label, num_inference_steps=1, output_type="latent").frames.shape[1] == 3
            with pytest.raises(ValueError, match="--text-encoder is for models that read text"):
                main(["zigma", *files[:1], str(tmp_path / "other"), *files[2:], "--text-encoder", "clip"])


def test_misfits_are_not_written_unless_asked(published: dict, tmp_path: Path, capsys) -> None:
    published["surplus"] = torch.zeros(1)
    save_file(published, tmp_path / "a.safetensors")
    arguments = ["zigma", str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--config", SCAN]
    assert main(arguments) == 1
    assert not (tmp_path / "out").exists()
    assert "unexpected keys: 1\n  surplus" in capsys.readouterr().out
    assert main([*arguments, "--allow-missing"]) == 0
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_presets(published: dict, tmp_path: Path) -> None:
    save_file(published, tmp_path / "a.safetensors")
    arguments = ["zigma", str(tmp_path / "a.safetensors"), str(tmp_path / "out")]
    with pytest.raises(ValueError, match="no preset 'Z' of zigma; there are S/1"):
        main([*arguments, "--preset", "Z"])
    with pytest.raises(ValueError, match="in the checkpoint but"):
        main([*arguments, "--preset", "zigzag8_b1_pe2"])
    with pytest.raises(ValueError, match="not JSON"):
        main([*arguments, "--config", "{scan"])
    with pytest.raises(FileNotFoundError, match="no configuration at"):
        main([*arguments, "--config", "scan.json"])
    assert not (tmp_path / "out").exists()


def test_half_written_folders_disappear(published: dict, tmp_path: Path, monkeypatch) -> None:
    save_file(published, tmp_path / "a.safetensors")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ZigMa, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        main(["zigma", str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--config", SCAN])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_presets_name_what_weights_do_not_show() -> None:
    for preset, arguments in PUBLISHED["zigma"].presets.items():
        assert {"sample_size", "scan"} <= set(arguments), preset


def test_aim_file_becomes_a_pipeline_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Both models of one file; a file of the sequence model alone takes a converted tokenizer."""
    sequence = published_aim(make_aim(sample_size=4, vocab_size=32, num_groups=2))
    # A released tokenizer has 32 groups, which nothing in the file shows.
    wide = make_tokenizer(base_channels=32, norm_num_groups=32)
    tokenizer = {f"vqvae.{key}": value for key, value in published_vq(wide).items()}
    save_file(sequence | tokenizer, tmp_path / "model.safetensors")
    assert main(["aim", str(tmp_path / "model.safetensors"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("missing keys: none") == 2
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0, 1], guidance_scale=2.0, output_type="pt").images.shape == (2, 1, 8, 8)
    assert torch.equal(pipe.model.code_embed.weight, sequence["mamba.backbone.embeddings.word_embeddings.weight"])

    torch.save({"ema": published_vq(wide)}, tmp_path / "vq.pt")
    save_file(sequence, tmp_path / "alone.safetensors")
    assert main(["vq", str(tmp_path / "vq.pt"), str(tmp_path / "vq")]) == 0
    assert load_tokenizer(tmp_path / "vq").config.num_vq_embeddings == 32
    given = ["aim", str(tmp_path / "alone.safetensors"), str(tmp_path / "again")]
    with pytest.raises(ValueError, match="holds no tokenizer"):
        main(given)
    assert main([*given, "--vae", str(tmp_path / "vq")]) == 0
    again = AutoregressiveImagePipeline.from_pretrained(tmp_path / "again")
    for key, value in pipe.vqvae.state_dict().items():
        assert torch.equal(again.vqvae.state_dict()[key], value)
    with pytest.raises(ValueError, match="a tokenizer is written alone"):
        main(["vq", str(tmp_path / "vq.pt"), str(tmp_path / "vq2"), "--vae", "x"])
