"""The house itself: import arrows, the light import, shipped configs, README commands, public names, wheel contents."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_FILES = sorted(
    path
    for folder in ("genssm", "kernels", "pipelines")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
PYTHON_FILES = [*PACKAGE_FILES, ROOT / "train.py", ROOT / "sample.py"]

# Floors of the house, top to bottom; an import may only point to the same floor or a lower one.
FLOORS = [
    {"train", "sample"},
    {"genssm.convert", "genssm.env", "genssm.motion_samples"},
    {"genssm.tasks"},
    # These draw their samples through a pipeline.
    {"genssm.metrics.fid", "genssm.metrics.motion", "genssm.metrics.pairs", "genssm.metrics.video"},
    {"genssm.pipelines"},
    {"genssm.training", "genssm.data", "genssm.metrics", "genssm.text"},
    {"genssm.models"},
    {"genssm.layers", "genssm.motion", "genssm.schedulers", "genssm.single_step_solver", "genssm.solvers"},
    {
        "genssm.scan_orders",
        "genssm.config",
        "genssm.devices",
        "genssm.values",
        "genssm.threads",
        "genssm.errors",
        "genssm.graphs",
        "genssm.paths",
        "genssm.registration",
    },
    {"genssm.kernels"},
]
OPTIONAL = (
    "triton",
    "transformers",
    "tokenizers",
    "cleanfid",
    "clean_fid",
    "torchvision",
    "torchdiffeq",
    "peft",
    "sklearn",
    "scipy",
)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("kernels", "pipelines"):
        parts.insert(0, "genssm")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int | None:
    """Number of the floor of ``module`` (0 is the top), by the longest prefix named in FLOORS."""
    found = [
        (len(name), number)
        for number, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(found)[1] if found else None


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at any depth of its code."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names.add(source)
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    own, here = module_name(path), floor(module_name(path))
    if own == "genssm":
        return  # the front door names everything
    assert here is not None, f"{own} stands on no floor; give it one in FLOORS"
    for name in imports(path):
        assert name.split(".")[0] not in ("kernels", "pipelines"), f"{own} imports bare {name}; import genssm.{name}"
        target = floor(name)
        assert target is None or target >= here, f"{own} imports {name}, which stands above it"
        if own.startswith("genssm.kernels"):
            assert not name.startswith("genssm") or name.startswith("genssm.kernels"), f"{own} imports {name}"
        if own.startswith("genssm.models.") and name.startswith("genssm.models."):
            raise AssertionError(f"models never import each other: {own} imports {name}")


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_triton_stays_in_its_files(path: Path) -> None:
    if "triton" in {name.split(".")[0] for name in imports(path)}:
        assert path.name.startswith(("triton_", "bench")), "Triton is imported in triton_*.py and in benchmarks only"


def test_kernels_is_no_regular_package() -> None:
    """`kernels` is also a published package that transformers and diffusers look for; a namespace never hides it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="session")
def bare_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages folder like ours but without any optional package."""
    site = Path(sys.modules["pytest"].__file__).resolve().parent.parent
    bare = tmp_path_factory.mktemp("site")
    for entry in site.iterdir():
        if not entry.name.replace("-", "_").startswith((*OPTIONAL, "scikit_learn", "__editable__", "genssm")):
            (bare / entry.name).symlink_to(entry)
    return bare


def run_bare(site: Path, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_import_needs_no_optional_package(bare_site: Path) -> None:
    code = f"""
import importlib.util, sys
assert not [name for name in {OPTIONAL!r} if importlib.util.find_spec(name)], sys.path
import torch, genssm, genssm.pipelines
from genssm import ZigMa
model = ZigMa(sample_size=4, in_channels=1, hidden_size=32, num_layers=1, patch_size=2, num_classes=3)
print(model(torch.zeros(1, 1, 4, 4), 500.0, torch.tensor([1])).sample.shape)
"""
    done = run_bare(bare_site, code)
    assert done.returncode == 0, done.stderr
    assert "[1, 1, 4, 4]" in done.stdout


def test_public_names() -> None:
    import genssm

    assert sorted(genssm.__all__) == genssm.__all__
    for name in genssm.__all__:
        assert getattr(genssm, name) is not None


RUNS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_config_builds(path: Path) -> None:
    import torch

    from genssm.config import load_config
    from genssm.models import MODELS

    config = load_config(path, [])
    with torch.device("meta"):
        MODELS[config.model.name](**config.model.args)


def readme_commands() -> list[str]:
    """Every command line of the README's bash blocks, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.slow
def test_readme_commands_run(tmp_path: Path) -> None:
    """The README's shell commands, in their order, in a clean copy; `make` and `pip` lines are checked by name only."""
    copy = tmp_path / "checkout"
    tracked = ["genssm", "kernels", "pipelines", "configs", "train.py", "sample.py", "pyproject.toml", "tests"]
    for name in tracked:
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, copy / name, ignore=ignore) if source.is_dir() else shutil.copy(source, copy / name)
    environment = {**os.environ, "PYTHONPATH": str(copy), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    ran = 0
    for command in readme_commands():
        words = shlex.split(command)
        if words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert words[1] in targets, command
        elif words[0] in ("pip", "git", "cd"):
            continue
        else:
            done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            ran += 1
    assert ran >= 5


@pytest.mark.slow
def test_readme_python_runs(tmp_path: Path) -> None:
    """The README's Python blocks run as one program in a fresh process, on the pipeline that its commands made."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    train = [str(ROOT / "train.py"), "--config", str(ROOT / "configs/debug/zigma.yaml")]
    for words in (train, ["-c", "\n".join(blocks)]):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("genssm", "kernels", "pipelines", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    expected = {
        module_name(path).replace(".", "/") for path in PYTHON_FILES if path.name not in ("train.py", "sample.py")
    }
    shipped = {name.removesuffix(".py").removesuffix("/__init__") for name in names if name.endswith(".py")}
    assert shipped == expected
    assert {f"genssm/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")} <= names
    assert "genssm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("kernels", "pipelines", "tests", "configs"))]
