"""The configuration: conversion, errors, round trip, and every shipped file."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genssm.config import DataConfig, describe_keys, differences, dump_config, iter_keys, load_config, load_data_config
from genssm.models import MODELS
from genssm.training.objectives import build_objective
from genssm.values import check_arguments, read_yaml, write_yaml

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")
MINIMAL = "model: {name: zigma, args: {hidden_size: 16}}\ndata: {name: digits}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_and_overrides(file: Path) -> None:
    config = load_config(
        file, ["train.learning_rate=1e-4", "model.args.num_layers=2", "data.path=17", "log.report_to=none"]
    )
    assert config.train.learning_rate == 1e-4 and isinstance(config.train.learning_rate, float)
    assert config.model.args == {"hidden_size": 16, "num_layers": 2}
    assert config.data.path == "17"
    assert config.train.output_dir == str(Path("runs") / "tiny")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_train_steps: 1e3", "max_train_steps", 1000),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("compile: True", "compile", True),
        ("output_dir: null", "output_dir", str(Path("runs") / "tiny")),
    ],
)
def test_values_by_type(tmp_path: Path, text: str, field: str, value: object) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL + "train: {" + text + "}\n")
    found = getattr(load_config(path).train, field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.learning_rat=1", ["command line", "train.learning_rat", "did you mean train.learning_rate?"]),
        ("train.lr=1", ["did you mean train.learning_rate?"]),
        ("batch_size=1", ["did you mean train.train_batch_size?"]),
        ("trian.seed=1", ["did you mean train?"]),
        ("zebra=1", ["model, objective, data, text, train, log"]),
        ("train.seed=010", ["train.seed", "'010'", "octal"]),
        ("train.seed=true", ["train.seed", "whole number", "True"]),
        ("train.seed=1.5", ["whole number", "1.5"]),
        ("train.compile=no", ["train.compile", "true or false", "'no'"]),
        ("train.compile=1", ["true or false"]),
        ("train.learning_rate=fast", ["expected a number", "'fast'"]),
        ("train.mixed_precision=fp8", ["no, fp16, bf16", "fp8"]),
        ("data.channels=2", ["1, 3"]),
        ("data.latents.scale=[a]", ["data.latents.scale", "number"]),
        ("model=3", ["model must be a section"]),
        ("train.seed=[1", ["train.seed", "not valid YAML"]),
        ("seed", ["section.key=value"]),
    ],
)
def test_refused_overrides(file: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_config(file, [override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {learning_rat: 1}", ["tiny.yaml", "train.learning_rat", "train.learning_rate"]),
        ("train: {seed: 1, seed: 2}", ["tiny.yaml", "'seed' is given twice"]),
        ("train: {output_dir: 7}", ["tiny.yaml", "train.output_dir", "quotes"]),
        ("train: [1]", ["train must be a section"]),
        ("extra: 1", ["unknown key"]),
    ],
)
def test_refused_files(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL + text + "\n")
    with pytest.raises(ValueError) as error:
        load_config(path)
    for part in parts:
        assert part in str(error.value)


def test_missing_keys_and_files(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text("model: {name: zigma}\n")
    with pytest.raises(ValueError, match=r"data is missing|data\.name is missing"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match="configs/"):
        load_config(tmp_path / "none.yaml")


def test_dump_reads_back_equal_and_comments_every_key(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["train.adam_epsilon=1e-10", "data.latents.scale=[0.5,2]", 'model.args.scan="010"'])
    text = dump_config(config)
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_config(again) == config
    for dotted, field in iter_keys():
        assert field.metadata["comment"] in text and dotted.rpartition(".")[2] in text
    # A reader by the older rules of YAML must not misunderstand it.
    assert yaml.safe_load(text)["train"]["mixed_precision"] == "no"


@pytest.mark.parametrize("value", ["no", "010", "1e-4", "null", "", 1e-5, 1, True, None, ["a", 1], {"a": {"b": 0.5}}])
def test_yaml_round_trip(value: object) -> None:
    assert read_yaml(write_yaml(value), "text") == value


def test_help_lists_every_key() -> None:
    text = describe_keys()
    for dotted, field in iter_keys():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {dotted} ")]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        assert ("(required)" in line) == required, line


def test_differences_ignore_what_may_change(file: Path) -> None:
    old = load_config(file)
    assert (
        differences(old, load_config(file, ["train.max_train_steps=5", "data.num_workers=3", "log.log_every=1"])) == []
    )
    changed = differences(old, load_config(file, ["train.seed=5", "model.args.hidden_size=32"]))
    assert len(changed) == 2 and "train.seed: 0 -> 5" in changed


def test_data_section_alone(file: Path) -> None:
    assert load_data_config(None, ["name=digits", "resolution=16"]) == DataConfig(name="digits", resolution=16)
    assert load_data_config(file, ["split=test"]).split == "test"
    with pytest.raises(ValueError, match=r"data\.resolution"):
        load_data_config(None, ["name=digits", "resolutoin=16"])


def test_arguments_of_a_model() -> None:
    zigma = MODELS["zigma"]
    found = check_arguments(
        zigma, {"sample_size": [8, 4], "hidden_size": "64", "drop_path": 0, "dt_rank": "auto"}, "args"
    )
    assert found == {"sample_size": [8, 4], "hidden_size": 64, "drop_path": 0.0, "dt_rank": "auto"}
    assert isinstance(found["drop_path"], float)
    for arguments, message in [
        ({"sample_sise": 8}, "did you mean sample_size"),
        ({"sample_size": "8x"}, r"args\.sample_size: expected a whole number"),
        ({"null_condition": "no"}, "true or false"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_arguments(zigma, arguments, "args")
    with pytest.raises(ValueError, match="needs width"):
        check_arguments(lambda width, height=2: None, {}, "args")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_shipped_configs_build(path: Path) -> None:
    """Every shipped run loads, has a comment on every key, and its model and objective can be made."""
    config = load_config(path)
    for line in path.read_text().splitlines():
        if line.strip() and not line.lstrip().startswith("#") and not line.rstrip().endswith(":"):
            assert "#" in line, f"{path.name}: no comment on {line!r}"
    arguments = check_arguments(MODELS[config.model.name], config.model.args, "model.args")
    with torch.device("meta"):
        model = MODELS[config.model.name](**arguments)
    assert sum(p.numel() for p in model.parameters()) > 0
    objective = build_objective(config.objective, (config.objective.name,))
    assert getattr(objective, "prediction_type", "flow_prediction") == config.objective.prediction_type
    if config.train.class_dropout_prob:
        assert model.null_class_label is not None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("zigma/celebahq_256", 134_624_260),
        ("zigma/church_256", 134_624_260),
        ("zigma/faceshq_1024", 133_856_272),
        ("zigma/ucf101_256", 137_079_568),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    """The paper's runs have exactly the parameters of its released models."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    with torch.device("meta"):
        model = MODELS[config.model.name](**config.model.args)
    assert sum(p.numel() for p in model.parameters()) == parameters


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
)
VALUES = st.recursive(PLAIN, lambda inner: st.dictionaries(st.text(max_size=6), inner, max_size=2), max_leaves=4)
KEYS = [dotted for dotted, _ in iter_keys()]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(dotted=st.sampled_from(KEYS), value=VALUES)
def test_any_value_is_taken_or_refused_with_its_key(file: Path, dotted: str, value: object) -> None:
    """Whatever stands at a key: a run that reads back equal, or an error that names the key."""
    try:
        config = load_config(file, [f"{dotted}={write_yaml(value)}"])
    except ValueError as error:
        assert dotted.split(".")[0] in str(error)
        return
    again = file.with_name("again.yaml")
    again.write_text(dump_config(config), encoding="utf-8")
    assert dump_config(load_config(again)) == dump_config(config)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    text=st.one_of(
        st.text(max_size=40), st.dictionaries(st.sampled_from(["model", "data", "train"]), VALUES).map(write_yaml)
    )
)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with contextlib.suppress(ValueError):
        load_config(path)
