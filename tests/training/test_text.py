"""Training under captions: it learns to combine words, resumes exactly, trains both parts, reads frozen encoders."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from genssm.config import DataConfig, load_config
from genssm.data import build_dataset
from genssm.data.text_states import TextStates, encode_captions
from genssm.metrics import pairs
from genssm.models import CaptionTokenizer
from genssm.tasks import TextDenoising, build_task
from genssm.training.checkpoint import resolve_pipeline
from genssm.values import read_yaml, write_yaml
from tests.training.conftest import ROOT, largest_difference, metrics, run_train, weights

pytest.importorskip("tokenizers")
TEXT = ("--config", str(ROOT / "configs" / "debug" / "text.yaml"))
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown")
SHAPES = ("circle", "square", "heart")
PARTS = ("denoiser", "text_encoder")
HELD_OUT = ("purple square", "green circle", "blue heart")


def run_text(folder: Path, *overrides: str) -> Path:
    """The debug run of this task, 12 steps."""
    short = ("train.max_train_steps=12", "train.checkpointing_steps=6", "log.sample_every=0", "log.log_every=3")
    return run_train(folder, *short, *overrides, flags=("--quiet", *TEXT))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_text(tmp_path_factory.mktemp("text") / "run")


@pytest.fixture(scope="module")
def shapes(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured shapes among the emoji, three combinations of colour and shape held out."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = [json.loads(line) for line in (data_dir / "emoji" / "metadata.jsonl").read_text("utf-8").splitlines()]
    wanted = {f"{colour} {shape}" for colour in COLOURS for shape in SHAPES}
    rows = [row for row in rows if row["text"] in wanted]
    with tarfile.open(data_dir / "emoji" / "emoji-64.tar.xz", "r:xz") as archive:
        names = {row["file_name"] for row in rows}
        members = [m for m in archive if any(m.name.endswith(name) for name in names)]
        archive.extractall(folder, members, filter="data")
    table = [{"file_name": row["file_name"], "text": row["text"],
              "split": "test" if row["text"] in HELD_OUT else "train"} for row in rows]  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    return folder


def test_words_are_learned_and_combined(shapes: Path, tmp_path: Path) -> None:
    """18 emoji of 8x8 pixels are drawn from their words, and three more from words that were never seen together."""
    options = (
        "data.name=image_folder", f"data.path={shapes}", "data.caption=text", "data.channels=3",
        "data.crop=resize_center", "model.args.in_channels=3", "objective.prediction_type=sample",
        "train.max_train_steps=160", "train.train_batch_size=36", "train.learning_rate=3e-3",
        "train.lr_scheduler=cosine", "train.ema_decay=0.97", "train.checkpointing_steps=160", "log.log_every=80",
        "text.dropout_prob=0", "log.guidance_scale=1",
    )  # fmt: skip
    run = run_text(tmp_path / "run", *options)
    arguments = ["--model", str(run), "--split", "train", "test", "--num-inference-steps", "10", "--device", "cpu"]
    pairs.main([*arguments, "--picture", str(tmp_path / "pairs.png"), "--report", str(tmp_path / "pairs.json")])
    results = json.loads((tmp_path / "pairs.json").read_text())["results"]
    data = {"name": "image_folder", "path": str(shapes), "caption": "text", "resolution": 8, "crop": "resize_center"}
    seen, unseen = (pairs.true_pictures(build_dataset(**data, split=split))[0] for split in ("train", "test"))
    mean = seen.mean(dim=0)
    assert results["train"]["mse"] < 0.1 * float((seen - mean).square().mean())
    assert results["test"]["mse"] < 0.5 * float((unseen - mean).square().mean())


def test_runs_repeat_and_resume_bitwise(straight: Path, tmp_path: Path) -> None:
    run = run_text(tmp_path / "run", "train.max_train_steps=6")
    run_text(run)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(straight)]
    for part in ("model.safetensors", *(f"pipeline/{name}/diffusion_pytorch_model.safetensors" for name in PARTS)):
        assert largest_difference(weights(run, 12, part), weights(straight, 12, part)) == 0.0, part


def test_both_parts_are_trained_averaged_and_saved(straight: Path) -> None:
    raw = weights(straight, 12)
    for name in PARTS:
        early, late = (
            weights(straight, step, f"pipeline/{name}/diffusion_pytorch_model.safetensors") for step in (6, 12)
        )
        own = {key.removeprefix(f"{name}."): value for key, value in raw.items() if key.startswith(f"{name}.")}
        assert own.keys() == late.keys()
        assert largest_difference(early, late) > 1e-4  # it moves
        assert largest_difference(own, late) > 1e-4  # and the pipeline holds the average
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(straight))
    assert len(pipe.tokenizer) == pipe.text_encoder.config.vocab_size <= 300
    assert "text-to-image" in (resolve_pipeline(straight) / "README.md").read_text()
    pipe.set_progress_bar_config(disable=True)
    assert pipe("7", guidance_scale=1.5, num_inference_steps=2).images[0].size == (8, 8)


def test_captions_are_dropped_to_the_null_text(tmp_path: Path) -> None:
    config = load_config(TEXT[1], ["text.dropout_prob=0.3", f"train.output_dir={tmp_path}"])
    task = build_task(config, torch.device("cpu"))
    assert isinstance(task, TextDenoising)
    numbers = task.random_numbers(2000, torch.Generator().manual_seed(0))
    condition = task.conditions({"text": ["7"] * 2000}, numbers)
    assert abs(float((~condition["present"]).float().mean()) - 0.3) < 0.04
    assert torch.equal(condition["present"], numbers["text_dropout"] >= 0.3)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([300.0, 300.0])
    for parameter in task.denoiser.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    with torch.no_grad():
        ids, mask = task.tokenizer(["7", "7"])
        present = torch.tensor([True, False])
        out = task.model(x, t, input_ids=ids, attention_mask=mask, present=present).sample
        null = task.denoiser(x, t).sample
    torch.testing.assert_close(out[1], null[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[0], null[0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dim", ("model.args.num_text_tokens=8", "model.args.num_layers=3", "model.args.null_condition=false")),
        ("dimsum", ("model.args.text_attention=true", "model.args.attention_every=1")),
    ],
)
def test_other_denoisers_read_text(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    values = read_yaml(Path(TEXT[1]).read_text(), "text.yaml")
    values["model"]["name"] = name
    if name == "dim":
        del values["model"]["args"]["drop_path"]
    (tmp_path / "c.yaml").write_text(write_yaml(values))
    short = ("train.max_train_steps=2", "log.sample_every=2", "log.num_inference_steps=2", "log.num_samples=2")
    run = run_train(tmp_path / "run", *short, *options, flags=("--quiet", "--config", str(tmp_path / "c.yaml")))
    assert (run / "samples" / "step_0000002.png").is_file()
    assert type(DiffusionPipeline.from_pretrained(resolve_pipeline(run)).denoiser).__name__.lower() == name


def save_frozen(folder: Path) -> str:
    """A T5 encoder of width 32 with a tokenizer, as transformers saves them."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=300, **sizes)).save_pretrained(folder)
    backend = CaptionTokenizer.learn(["0 1 2 3 4 5 6 7 8 9"], 300).backend
    backend.add_special_tokens(["<pad>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", model_max_length=6).save_pretrained(folder)
    return str(folder)


FROZEN = ("text.args={}", "text.vocab_size=4096", "text.max_length=null")


def test_frozen_encoder_and_its_cache_train_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder = save_frozen(tmp_path / "t5")
    data = DataConfig(name="digits", caption="class")
    cache = encode_captions(data, encoder, tmp_path / "states", dtype="float32", quiet=True)
    assert TextStates(cache).states.shape[0] == 11  # ten digits and the empty text
    frozen = (f"text.encoder={encoder}", *FROZEN)
    plain = run_text(tmp_path / "plain", *frozen)
    cached = run_text(tmp_path / "cached", *frozen, f"text.cache={cache}")
    shorter = ("text.args={}", "text.vocab_size=4096", "text.max_length=4", f"text.encoder={encoder}")
    with pytest.raises(ValueError, match=r"holds texts of up to 6 tokens, the run's have 4; set text\.max_length"):
        run_text(tmp_path / "shorter", *shorter, f"text.cache={cache}")
    difference = largest_difference(weights(plain, 12), weights(cached, 12))
    assert difference < 1e-5
    assert not any("text_encoder" in key for key in weights(plain, 12))
    pipe = DiffusionPipeline.from_pretrained(resolve_pipeline(cached))
    assert type(pipe.text_encoder).__name__ == "T5EncoderModel"
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(["3", "4"], num_inference_steps=2).images) == 2
    with pytest.raises(FileExistsError, match="choose another --out"):
        encode_captions(data, encoder, cache)
    with pytest.raises(ValueError, match="the data have no captions"):
        encode_captions(DataConfig(name="digits"), encoder, tmp_path / "x")


def test_a_run_that_starts_from_another_keeps_its_tokenizer(straight: Path, tmp_path: Path) -> None:
    run = run_text(
        tmp_path / "run", f"train.init_from={straight}", "text.vocab_size=290", "train.max_train_steps=1",
        "train.ema_decay=0", "train.learning_rate=1e-12",
    )  # fmt: skip
    before, after = (DiffusionPipeline.from_pretrained(resolve_pipeline(folder)) for folder in (straight, run))
    assert before.tokenizer.backend.to_str() == after.tokenizer.backend.to_str()
    for a, b in zip(before.text_encoder.parameters(), after.text_encoder.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("data.caption=null",), ValueError, "the data have none; set data.caption"),
        (("model.args.num_classes=10",), ValueError, "is drawn without classes"),
        (("data.caption=sidecar",), ValueError, "data.caption means nothing to data.name=digits"),
        (("text.dropout_prob=1.5",), ValueError, "text.dropout_prob is 1.5"),
        (("text.dropout_prob=0",), ValueError, "needs a null text that was trained"),
        (("model.args.null_condition=false",), ValueError, "text.dropout_prob drops captions to the null text"),
        (("text.args.hidden_size=8",), ValueError, "text.args.hidden_size follows from"),
        (("text.args.heads=8",), ValueError, "text.args: TextEncoder has no argument 'heads'; did you mean num_heads"),
        (("text.args.num_heads=3",), ValueError, "num_heads=3 must divide"),
        (("text.cache=x",), ValueError, "leave it out with text.encoder=learned"),
        (("text.encoder=clip",), ValueError, "text.args and text.vocab_size shape a learned encoder"),
        (("text.encoder=no/clip", *FROZEN), FileNotFoundError, "no text encoder 'no/clip'"),
        (("text.vocab_size=20",), ValueError, "vocab_size is 20"),
        (("text.max_length=0",), ValueError, "model_max_length is 0"),
        (("model.args.context_dim=0",), ValueError, "the section text is for models that read text"),
    ],
)
def test_mistakes_are_found_before_the_work(
    overrides: tuple[str, ...], error: type, message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_text(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_cache_of_other_captions_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    encoder = save_frozen(tmp_path / "t5")
    cache = encode_captions(DataConfig(name="digits", caption="class"), encoder, tmp_path / "states", quiet=True)
    states = TextStates(cache)
    with pytest.raises(ValueError, match="lacks 1 captions, first 'eleven'"):
        states.check(["1", "eleven"], 32)
    with pytest.raises(ValueError, match=r"states of width 32, model\.args\.context_dim is 16"):
        states.check(["1"], 16)
    (cache / "lengths.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"lengths\.npy missing; python -m genssm\.data\.text_states"):
        TextStates(cache)


def test_dry_run_and_checkpointing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_train(tmp_path / "run", "train.gradient_checkpointing=true", flags=("--dry-run", *TEXT))
    printed = capsys.readouterr().out
    assert "10 captions, up to 8 tokens, encoder learned" in printed and "text:" in printed
