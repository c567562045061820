"""Weak scaling: the same training on 1, 2, ... processes, each with as many items, and how busy the GPUs are.

    python -m benchmarks.scaling --config configs/zigma/celebahq_256.yaml --processes 1 2 --per-process 20
    python -m benchmarks.scaling --config configs/debug/zigma.yaml --processes 1 2 --steps 20     on a CPU, with gloo

Every row is ``train.py`` under torch's launcher, in a folder of its own, OUT/N: data loading, optimiser, averages of
weights and exchange of gradients included, no samples. Items (images, clips, codes) per second are the mean over the
second half of the steps. "Times" is against the first row; N processes that do not hinder each other reach N. "Busy" is
the share of time in which a kernel was running, as nvidia-smi reports it, mean of all GPUs in the same half.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from genssm.config import load_config
from genssm.env import device_name
from genssm.errors import cli
from genssm.kernels.benchmarking import print_table

ROOT = Path(__file__).resolve().parent.parent
# What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` sets.
STRATEGIES = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
HEAD = ("processes", "items a step", "items/s", "times", "busy %", "GiB")
LINES = 10  # of the log of a run


@dataclass
class Row:
    """One run; ``busy`` is NaN where nobody could say."""

    processes: int
    batch: int
    rate: float  # items per second
    busy: float
    memory: float


def busy_now(gpus: int) -> list[float]:
    """Percent of the last moments in which the first ``gpus`` GPUs were running a kernel; empty where it is unknown."""
    tool = shutil.which("nvidia-smi")
    if tool is None or not torch.cuda.is_available():
        return []
    command = [tool, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    with suppress(ValueError):  # "[N/A]"
        return [float(line) for line in asked.stdout.split()[:gpus]]
    return []


def logged(run: Path) -> list[dict]:
    """The lines of metrics.jsonl that a run has written so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def per_second(line: dict) -> float:
    """The rate in a line of the log, whatever its items are called."""
    return next(number for name, number in line.items() if name.endswith("_per_second"))


def measure(processes: int, folder: Path, args: argparse.Namespace) -> Row:
    """Train with so many processes.

    Raises:
        ValueError: the training failed; with the end of what it said.
    """
    batch = args.per_process * processes
    overrides = [
        *args.overrides, f"train.output_dir={folder}", f"train.train_batch_size={batch}",
        f"train.max_train_steps={args.steps}", f"train.checkpointing_steps={args.steps}",
        f"log.log_every={args.steps // LINES}", "log.sample_every=0",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    busy: list[float] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        run = subprocess.Popen(
            [*launch, "train.py", "--config", str(args.config), *overrides], cwd=ROOT,
            env=os.environ | threads | STRATEGIES[args.strategy], stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while run.poll() is None:
            time.sleep(0.25)
            if LINES // 2 <= len(logged(folder)) < LINES:
                busy += busy_now(processes)
        if run.returncode:
            said.seek(0)
            lines = [line for line in said.read().splitlines() if "torch.distributed" not in line]
            errors = [line for line in lines if line.startswith("error:")]  # what a user can mend
            reason = errors or lines[-40:]  # both before the report of the launcher
            raise ValueError(f"training with {processes} processes failed:\n" + "\n".join(reason))
    last = logged(folder)[LINES // 2 :]
    # Windows hold as many steps each: their mean rate is the harmonic one.
    rate = len(last) / sum(1 / per_second(line) for line in last)
    mean = sum(busy) / len(busy) if busy else float("nan")
    return Row(processes, batch, rate, mean, max(line.get("memory_gib", float("nan")) for line in last))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--per-process", type=int, metavar="N",
                        help="items of a process (default: the config's train_batch_size)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=100, metavar="N", help=f"of each run, a multiple of {LINES}")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="default: ddp")
    parser.add_argument("--out", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    args.config = args.config.absolute()
    if args.per_process is None:
        args.per_process = config.train.train_batch_size
    if args.steps < LINES or args.steps % LINES or args.per_process < 1 or min(args.processes) < 1:
        raise ValueError(
            f"--steps {args.steps} --per-process {args.per_process} --processes {args.processes}: expected steps in "
            f"multiples of {LINES}, and whole numbers from 1 on"
        )
    gpus = torch.cuda.device_count()
    if gpus and max(args.processes) > gpus:
        raise ValueError(f"--processes {max(args.processes)}: this machine has {gpus} GPUs")
    device = device_name(torch.device("cuda" if gpus else "cpu"))
    print(f"{args.config.name}, {args.strategy}, {args.steps} steps; {device}; torch {torch.__version__}\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out.absolute() if args.out else Path(temporary)
        rows = []
        for processes in args.processes:
            rows.append(measure(processes, out / str(processes), args))
            print(f"{processes} processes: {rows[-1].rate:,.1f} items/s", flush=True)
    cells = [
        (f"{row.processes}", f"{row.batch}", f"{row.rate:,.1f}",
         f"{row.rate / rows[0].rate:.2f}", f"{row.busy:.0f}" if row.busy == row.busy else "-",
         f"{row.memory:.1f}" if row.memory == row.memory else "-")
        for row in rows
    ]  # fmt: skip
    print()
    print_table(HEAD, cells, args.csv)


if __name__ == "__main__":
    cli(main)
