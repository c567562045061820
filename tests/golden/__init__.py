"""Golden runner: every case of a folder of reference tensors, through the converters that users run.

``python -m tests.golden FOLDER [FOLDER ...]`` (see :mod:`tests.golden.__main__`). A case is ``NAME.safetensors`` with
``NAME.json`` beside it; its ``model`` and ``kind`` there ("network" where none is named) pick the handler from
:data:`HANDLERS`. Where no model is named, configuration and tensors show the kind: scan orders go to
:mod:`tests.golden.scan_orders`, parts of networks to :mod:`tests.golden.mamba2` and :mod:`tests.golden.dimsum`. File
names mean nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.golden import aim, dim, dimsum, mamba2, motion, motion_data, scan_orders, zigma
from tests.golden.checks import Check

Handler = Callable[[Mapping[str, Any], dict[str, torch.Tensor]], Iterator[Check]]

# model -> kind -> handler(what the JSON says, tensors)
HANDLERS: dict[str | None, dict[str, Handler]] = {
    None: {**dimsum.PARTS, **mamba2.PARTS, **aim.PARTS, **motion.KINDS, **motion_data.KINDS},
    "aim": {"network": aim.network},
    "dim": {
        "network": dim.network,
        "objective": dim.objective,
        "sampling": dim.sampling,
        "upsample_guidance": dim.upsample_guidance,
    },
    "dimsum": {"network": dimsum.network},
    "zigma": {"network": zigma.network, "objective": zigma.objective, "sampling": zigma.sampling},
}


@dataclass(frozen=True)
class Case:
    """A golden case: its tensors' file and what its JSON says."""

    path: Path
    info: Mapping[str, Any]

    @property
    def model(self) -> str | None:
        return self.info.get("model")

    @property
    def kind(self) -> str:
        if self.model is None:
            with safe_open(self.path, "pt") as file:
                keys = list(file.keys())
            if scan_orders.recognises(keys):
                return "scan orders"
            part = mamba2.kind_of_part(keys) or aim.kind_of_part(keys) or dimsum.kind_of_part(self.info, keys)
            return part or self.info.get("kind") or "unknown"
        return self.info.get("kind") or "network"


def find_cases(folder: str | Path) -> list[Case]:
    """The cases of a folder, by name.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no case.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of golden tensors at {folder}")
    cases = []
    for path in sorted(folder.glob("*.safetensors")):
        described = path.with_suffix(".json")
        cases.append(Case(path, json.loads(described.read_text()) if described.is_file() else {}))
    if not cases:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    return cases


def run_case(case: Case) -> list[Check]:
    """Run a case. A model or kind without a handler is a miss, and so is what a handler raises."""
    expected = case.info.get("sha256")
    if expected is not None and hashlib.sha256(case.path.read_bytes()).hexdigest() != expected:
        return [Check.failure("file", "the file's SHA-256 differs from the one in its JSON")]
    if case.kind == "scan orders":
        return list(_scan_orders(case.path))
    handler = HANDLERS.get(case.model, {}).get(case.kind)
    if handler is None:
        return [Check.failure("case", f"no handler for model {case.model!r}, kind {case.kind!r}")]
    checks = []
    try:
        for check in handler(case.info, load_file(case.path)):
            checks.append(check)
    except Exception as error:
        checks.append(Check.failure("case", f"{type(error).__name__}: {error}"))
    return checks


def _scan_orders(path: Path) -> Iterator[Check]:
    for key, correct, note in scan_orders.check(path):
        yield Check(f"out.{key}", 0.0, 0.0) if correct else Check.failure(f"out.{key}", note)
