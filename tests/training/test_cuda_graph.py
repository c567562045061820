"""``train.cuda_graph``: the numbers of the plain loop, also over parts and after a resume; what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from genssm.config import load_config
from genssm.tasks import TASKS
from genssm.training.checks import check_cuda_graph
from tests.pretend_graphs import PretendGraph
from tests.tasks.conftest import run_train
from tests.training.conftest import DEBUG, EMA_WEIGHTS, largest_difference, metrics, weights

STEPS = (
    "train.max_train_steps=5", "train.checkpointing_steps=1", "train.checkpoints_total_limit=0", "log.log_every=1",
    "log.sample_every=0",
)  # fmt: skip
ONE = ("train.max_train_steps=1", "train.checkpointing_steps=1", "log.sample_every=0")
# Debug run -> what it needs to be short, and the run that it reads
CASES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "zigma": ((), None),
    "dim": ((), None),
    "dimsum": (("model.args.drop_path=0.1",), None),
    "video": ((), None),
    "text": ((), None),
    "aim": ((), "vq"),
    "aim_text": ((), "vq"),
    "maskmamba": ((), "vq"),
    "motion_mamba": (("motion.contrastive_weight=0.5",), "motion_vae"),
    "motion_frames": ((), None),
    "motion_vae": (("model.args.dropout=0.1",), None),
}


@pytest.fixture(scope="session")
def run_read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], tuple[str, ...]]:
    """The option that names a run of one step of a tokenizer or a motion VAE."""
    made: dict[str, Path] = {}

    def option(name: str | None) -> tuple[str, ...]:
        if name is None:
            return ()
        if name not in made:
            made[name] = run_train(name, tmp_path_factory.mktemp(name) / "run", *ONE)
        return (f"{'data' if name == 'vq' else 'motion'}.vae={made[name]}",)

    return option


@pytest.fixture
def anywhere(device: torch.device, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> torch.device:
    """Every device; graphs on the CPU pretend."""
    if device.type == "cpu":
        request.getfixturevalue("pretend_graphs")
        monkeypatch.setattr(train, "check_cuda_graph", lambda *arguments: None)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # or two plain runs differ, too
    return device


def logged(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(run)]


def parting(run: Path, plain: Path, part: str = "model.safetensors") -> str:
    """The first step in which two runs differ, in what and by how much; nothing if they are the same."""
    assert len(logged(run)) == len(logged(plain)) == 5
    for step, (found, expected) in enumerate(zip(logged(run), logged(plain)), 1):
        here, there = weights(run, step, part), weights(plain, step, part)
        apart = {name: largest_difference({name: here[name]}, {name: there[name]}) for name in there}
        differ = sorted((name for name in apart if apart[name] != 0), key=apart.__getitem__, reverse=True)
        if found != expected or differ:
            shown = ", ".join(f"{name} by {apart[name]:.2g}" for name in differ[:5])
            return (
                f"step {step}: loss and gradient norm {found}, plainly {expected}; "
                f"{len(differ)} of {len(apart)} weights differ: {shown}"
            )
    return ""


def assert_same(run: Path, plain: Path, again: Callable[[], Path]) -> None:
    """Two runs are the same, or the message says where they part and whether plain runs do."""
    where = parting(run, plain)
    if where:
        pytest.fail(f"{where}\na second plain run: {parting(again(), plain) or 'the same as the first'}")


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers(
    name: str, anywhere: torch.device, run_read: Callable[[str | None], tuple[str, ...]], tmp_path: Path
) -> None:
    """Losses and gradients of five steps, bit for bit; random numbers inside the model are those of the seed."""
    options, reads = CASES[name]
    if "text" in name or name.startswith("motion"):
        pytest.importorskip("tokenizers")
    options = (*options, *run_read(reads), *STEPS)
    plain = run_train(name, tmp_path / "plain", *options)
    replayed = run_train(name, tmp_path / "replayed", *options, "train.cuda_graph=true")
    assert_same(replayed, plain, lambda: run_train(name, tmp_path / "again", *options))
    if anywhere.type == "cpu":
        assert PretendGraph.replays == 2 * 5


@pytest.mark.parametrize(
    "options",
    [
        ("train.gradient_accumulation_steps=2",),
        ("train.mixed_precision=bf16", "log.sample_every=2", "log.num_samples=10", "log.num_inference_steps=6"),
    ],
    ids=["parts", "bf16"],
)
def test_parts_samples_and_resuming(anywhere: torch.device, options: tuple[str, ...], tmp_path: Path) -> None:
    """A run that is stopped, goes on with graphs, and draws in between, is the plain one."""
    options = (*STEPS, *options)
    plain = run_train("zigma", tmp_path / "plain", *options)
    begun = run_train("zigma", tmp_path / "run", *options, "train.max_train_steps=3", "train.cuda_graph=true")
    run_train("zigma", begun, *options, "train.cuda_graph=true")
    assert_same(begun, plain, lambda: run_train("zigma", tmp_path / "again", *options))
    assert not parting(begun, plain, EMA_WEIGHTS)


@pytest.mark.gpu
def test_float16(tmp_path: Path) -> None:
    """Scaled losses; a step that overflows is skipped in both."""
    runs = [
        run_train("zigma", tmp_path / value, *STEPS, "train.mixed_precision=fp16", f"train.cuda_graph={value}")
        for value in ("false", "true")
    ]
    assert not parting(runs[1], runs[0])


REFUSED = {
    "train.layer_shuffle=0.5": "draws orders anew",
    "train.compile=true": "graphs of its own",
    "train.gradient_checkpointing=true": "sets random numbers back",
    "align.encoder=dino": "watches a block",
    "data.pack_tokens=64": "many shapes",
    "motion.pack_frames=64": "many shapes",
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_changes_from_step_to_step_is_refused(option: str) -> None:
    config = load_config(DEBUG, [option])
    with pytest.raises(ValueError, match=rf"^{option.split('=')[0]} .*{REFUSED[option]}.*train\.cuda_graph"):
        check_cuda_graph(config, True, torch.device("cuda"), 1)


def test_devices_processes_and_models_that_record_nothing() -> None:
    config = load_config(DEBUG)
    check_cuda_graph(config, True, torch.device("cuda", 0), 1)
    with pytest.raises(ValueError, match="needs a CUDA device, and this run is on cpu"):
        check_cuda_graph(config, True, torch.device("cpu"), 1)
    with pytest.raises(ValueError, match="one process, and 2 share the batch"):
        check_cuda_graph(config, True, torch.device("cuda"), 2)
    with pytest.raises(ValueError, match=r"a step of model\.name=zigma cannot be recorded"):
        check_cuda_graph(config, False, torch.device("cuda"), 1)
    assert sorted(name for name, task in TASKS.items() if not task.recordable) == ["vq"]


def test_a_cpu_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match=r"train\.cuda_graph needs a CUDA device"):
        run_train("zigma", tmp_path / "run", "train.cuda_graph=true")
    assert not (tmp_path / "run").exists()
