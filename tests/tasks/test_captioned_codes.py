"""Models of codes under captions: prompts decide what is drawn, runs resume exactly, stored codes keep captions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import sample
from genssm.config import DataConfig, load_config
from genssm.data import build_dataset
from genssm.data.encode_codes import encode_codes
from genssm.data.text_states import encode_captions
from genssm.tasks import TextMaskedToken, TextNextToken, build_task
from genssm.training.checkpoint import resolve_pipeline
from tests.tasks.conftest import ROOT, run_train
from tests.training.conftest import _logger_as_before, largest_difference, metrics, weights  # noqa: F401
from tests.training.test_text import FROZEN, save_frozen

pytest.importorskip("tokenizers")
SHORT = ("train.max_train_steps=6", "train.checkpointing_steps=3", "log.sample_every=0", "log.log_every=3")
PARTS = ("model", "text_encoder")
# what configs/debug/aim_text.yaml has and configs/debug/maskmamba.yaml lacks
TEXT = (
    "model.args.num_classes=0", "model.args.context_dim=32", "model.args.context_length=8", "data.caption=class",
    "text.args.num_layers=1", "text.args.num_heads=2", "text.vocab_size=300", "text.max_length=8",
    "text.dropout_prob=0.1", "train.class_dropout_prob=0",
)  # fmt: skip
CONFIGS = {"aim_text": (), "maskmamba": TEXT}


def run_text(name: str, tokenizer: Path, folder: Path, *overrides: str) -> Path:
    return run_train(name, folder, f"data.vae={tokenizer}", *CONFIGS[name], *overrides)


def saved(run: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """All weights in a checkpoint, file by file."""
    files = ("model.safetensors", *(f"pipeline/{name}/diffusion_pytorch_model.safetensors" for name in PARTS))
    return {file: weights(run, step, file) for file in files}


@pytest.fixture(scope="module")
def straight(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of AiM."""
    return run_text("aim_text", tokenizer, tmp_path_factory.mktemp("codes") / "run", *SHORT)


def share_of_right_digits(pipe: DiffusionPipeline, **call: object) -> float:
    """Of ten images of each prompt, how many look like their digit to the five nearest neighbours in the data."""
    data = build_dataset(name="digits", resolution=8, channels=1)
    pixels = torch.stack([data[i]["pixel_values"] for i in range(len(data))]).flatten(1)
    prompts = [str(i % 10) for i in range(100)]
    generators = [torch.Generator().manual_seed(i) for i in range(100)]
    images = pipe(prompt=prompts, generator=generators, guidance_scale=2.0, output_type="pt", **call).images
    nearest = torch.cdist(2 * images.flatten(1) - 1, pixels).topk(5, largest=False).indices
    found = torch.from_numpy(data.labels)[nearest].mode(dim=1).values
    return float((found == torch.arange(100) % 10).float().mean())


@pytest.mark.parametrize(("name", "length", "least"), [("aim_text", 100, 0.7), ("maskmamba", 150, 0.4)])
def test_prompts_decide_what_is_drawn(tokenizer: Path, tmp_path: Path, name: str, length: int, least: float) -> None:
    """One in ten would be chance; the grid is what the saved pipeline and ``sample.py`` draw."""
    prompts = "log.prompts=[" + ",".join(f'"{digit}"' for digit in range(10)) + "]"
    run = run_text(name, tokenizer, tmp_path / "run", prompts, f"train.max_train_steps={length}")
    assert metrics(run)[-1]["loss"] < 0.85 * metrics(run)[0]["loss"]
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(run))
    pipe.set_progress_bar_config(disable=True)
    assert share_of_right_digits(pipe) > least
    card = (resolve_pipeline(run) / "README.md").read_text()
    assert "text-to-image" in card and "pipe(prompt='0', guidance_scale=2.0" in card

    steps = ["--num-inference-steps", "8"] if name == "maskmamba" else []
    command = ["--model", str(run), "--prompt", *map(str, range(10)), "--guidance-scale", "1.5", "--device", "cpu"]
    sample.main([*command, *steps, "--out", str(tmp_path / "out")])
    grid = np.asarray(Image.open(run / "samples" / f"step_{length:07d}.png"))
    second = np.asarray(Image.open(tmp_path / "out" / "000001.png"))
    assert np.array_equal(grid[2:66, 2 + 66 : 66 + 66][::8, ::8], second)
    sample.main([*command, *steps, "--negative-prompt", "1", "--out", str(tmp_path / "negative")])
    settings = json.loads((tmp_path / "negative" / "samples.json").read_text())["settings"]
    assert settings["negative_prompt"] == "1" and settings["prompt"][1] == "1"
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "negative" / "000003.png")),
                              np.asarray(Image.open(tmp_path / "out" / "000003.png")))  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_runs_resume_bitwise_and_train_both_parts(tokenizer: Path, straight: Path, tmp_path: Path, name: str) -> None:
    whole = straight if name == "aim_text" else run_text(name, tokenizer, tmp_path / "whole", *SHORT)
    run = run_text(name, tokenizer, tmp_path / "run", *SHORT, "train.max_train_steps=3")
    run_text(name, tokenizer, run, *SHORT)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(whole)]
    early, late, again = saved(whole, 3), saved(whole, 6), saved(run, 6)
    for file, tensors in late.items():
        assert largest_difference(tensors, again[file]) == 0.0, file
        assert largest_difference(tensors, early[file]) > 1e-4, file
    for part in PARTS:  # the pipeline holds the average
        prefix = "denoiser." if part == "model" else "text_encoder."
        raw = {k.removeprefix(prefix): v for k, v in late["model.safetensors"].items() if k.startswith(prefix)}
        assert largest_difference(raw, late[f"pipeline/{part}/diffusion_pytorch_model.safetensors"]) > 1e-4


def test_stored_codes_keep_their_captions(tokenizer: Path, straight: Path, tmp_path: Path) -> None:
    """Codes and captions made while training and stored before give the same weights."""
    data = load_config(ROOT / "configs" / "debug" / "aim_text.yaml").data
    out = encode_codes(data, str(tokenizer), tmp_path / "codes", quiet=True)
    plain = (
        "data.resolution=null", "data.channels=null", "data.caption=null", "data.name=codes", f"data.path={out}"
    )  # fmt: skip
    for cache in ("ram", "none"):
        stored = run_text("aim_text", tokenizer, tmp_path / cache, *SHORT, *plain, f"data.cache={cache}")
        assert largest_difference(weights(straight, 6), weights(stored, 6)) == 0
    bare = encode_codes(DataConfig(name="digits", resolution=8), str(tokenizer), tmp_path / "bare", quiet=True)
    with pytest.raises(ValueError, match=r"have none; set data\.caption when they are encoded"):
        run_text("aim_text", tokenizer, tmp_path / "x", *plain, f"data.path={bare}")


def test_frozen_encoder_and_its_cache_train_the_same(tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder = save_frozen(tmp_path / "t5")
    cache = encode_captions(
        DataConfig(name="digits", caption="class"), encoder, tmp_path / "states", dtype="float32", quiet=True
    )
    frozen = (*SHORT, f"text.encoder={encoder}", *FROZEN)
    plain = run_text("aim_text", tokenizer, tmp_path / "plain", *frozen)
    cached = run_text("aim_text", tokenizer, tmp_path / "cached", *frozen, f"text.cache={cache}")
    assert largest_difference(weights(plain, 6), weights(cached, 6)) < 1e-5
    assert not any("text_encoder" in key for key in weights(plain, 6))
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(cached))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.text_encoder).__name__ == "T5EncoderModel" and len(pipe(prompt=["3", "4"]).images) == 2


def test_a_run_starts_from_another(tokenizer: Path, straight: Path, tmp_path: Path) -> None:
    run = run_text(
        "aim_text", tokenizer, tmp_path / "run", f"train.init_from={straight}", "text.vocab_size=290", *SHORT,
        "train.max_train_steps=1", "train.ema_decay=0", "train.learning_rate=1e-12",
    )  # fmt: skip
    for part in PARTS:
        file = f"pipeline/{part}/diffusion_pytorch_model.safetensors"
        assert largest_difference(weights(straight, 6, file), weights(run, 1, file)) < 1e-9
    tokenizers = [DiffusionPipeline.from_pretrained(resolve_pipeline(f)).tokenizer for f in (straight, run)]
    assert tokenizers[0].backend.to_str() == tokenizers[1].backend.to_str()


@pytest.mark.parametrize(("name", "kind"), [("aim_text", TextNextToken), ("maskmamba", TextMaskedToken)])
def test_captions_are_dropped_to_the_null_text(tokenizer: Path, tmp_path: Path, name: str, kind: type) -> None:
    overrides = [*CONFIGS[name], f"data.vae={tokenizer}", "text.dropout_prob=0.3", f"train.output_dir={tmp_path}"]
    task = build_task(load_config(ROOT / "configs" / "debug" / f"{name}.yaml", overrides), torch.device("cpu"))
    assert type(task) is kind
    numbers = task.random_numbers(2000, torch.Generator().manual_seed(0))
    condition = task.conditions({"text": ["7"] * 2000}, numbers)
    assert torch.equal(condition["present"], numbers["text_dropout"] >= 0.3)
    assert abs(float((~condition["present"]).float().mean()) - 0.3) < 0.04
    codes = torch.zeros(2, 15 if name == "aim_text" else 16, dtype=torch.long)
    ids, mask = task.tokenizer(["7", "7"])
    with torch.no_grad():
        for parameter in task.denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        present = torch.tensor([True, False])
        out = task.model(codes, input_ids=ids, attention_mask=mask, present=present).logits
        null = task.denoiser(codes).logits
    torch.testing.assert_close(out[1], null[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[0], null[0], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.caption=null", "the data have none; set data.caption"),
        ("model.args.num_classes=10", "is drawn without classes"),
        ("model.args.context_length=4", "up to 8 tokens but model.args.context_length is 4"),
        ("model.args.context_dim=0", "the section text is for models that read text"),
        ("text.dropout_prob=0", "needs a null text that was trained; set it to 1, or text.dropout_prob"),
        ("text.args.hidden_size=8", "text.args.hidden_size follows from"),
        ("train.class_dropout_prob=0.1", "the model has no classes"),
    ],
)
def test_misfits_are_refused(tokenizer: Path, tmp_path: Path, change: str, message: str) -> None:
    overrides = [f"data.vae={tokenizer}", f"train.output_dir={tmp_path}", change]
    config = load_config(ROOT / "configs" / "debug" / "aim_text.yaml", overrides)
    with pytest.raises(ValueError, match=message):
        build_task(config, torch.device("cpu"))
