"""Every table of the operators and the whole models, from one command; on several GPUs side by side.

    python -m benchmarks.everything                      what `make bench` runs
    python -m benchmarks.everything --list               the commands, one for each table
    python -m benchmarks.everything --only scan floor    these alone

Each command has a GPU of its own; the crossover of models and transformers comes last and uses all of them. Without a
GPU sizes are small and commands run one after the other. Logs are written to the folder ``--out`` while they run and
printed when they end; a command that fails does not keep others from running.
"""

import argparse
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from genssm.errors import cli
from genssm.kernels.benchmarking import print_table

ROOT = Path(__file__).resolve().parent.parent
SCAN = "genssm.kernels.selective_scan.benchmark"
CAPTURED = "--captured --dtype bfloat16 --backends triton"
MODELS = "benchmarks.models --modes captured eager"


@dataclass(frozen=True)
class Job:
    """A command that makes a table.

    Args:
        name: of its log.
        gpu: module and arguments on a GPU.
        cpu: on a CPU; empty where another job's table says the same there.
        together: takes all GPUs: ``--processes`` is added.
    """

    name: str
    gpu: str
    cpu: str = ""
    together: bool = False

    def command(self, gpus: int) -> list[str]:
        """For a machine with so many GPUs; none where there is no command for it."""
        words = shlex.split(self.gpu if gpus else self.cpu)
        more = ["--processes", str(gpus)] if self.together and gpus else []
        return [sys.executable, "-m", *words, *more] if words else []


JOBS = (
    Job("scan", f"{SCAN} {CAPTURED} --no-alternatives --shapes 64x1024x1536x16 8x4096x1536x16 1x4096x1536x16 "
        "1x16384x2304x16", SCAN),
    Job("scan_orders", f"{SCAN} {CAPTURED} --shapes 64x1024x1536x16 --no-alternatives --directions 1 2 4 "
        "--orders raster random"),
    Job("scan_shapes", f"{SCAN} {CAPTURED} --no-alternatives --shapes 64x1024x1536x1 64x1024x1536x64 4096x4x512x16 "
        "256x64x1536x16 128x128x1536x16 64x256x1536x16"),
    Job("models_32768", f"{MODELS} --models zigma:B/1 zigma:sweep2_b1_pe2 --pixels 256 512 --tokens 32768"),
    Job("models_8192", f"{MODELS} --models dimsum:L/2 dim:L-256 dim:H-256 --pixels 256 --tokens 8192"),
    Job("decoding", "benchmarks.decoding", "benchmarks.decoding --layers 2 --tokens-side 4"),
    Job("ssd", f"genssm.kernels.ssd.benchmark {CAPTURED} --no-alternatives", "genssm.kernels.ssd.benchmark"),
    Job("floor", "benchmarks.floor", "benchmarks.floor --models dim:L-256 zigma:B/2"),
    Job("floor_zigma", "benchmarks.floor --models zigma:B/1 zigma:sweep2_b1_pe2 --tokens 32768"),
    Job("conv", f"genssm.kernels.causal_conv1d.benchmark {CAPTURED}", "genssm.kernels.causal_conv1d.benchmark"),
    Job("add_norm", f"genssm.kernels.add_norm.benchmark {CAPTURED}", "genssm.kernels.add_norm.benchmark"),
    Job("gated_residual", f"genssm.kernels.gated_residual.benchmark {CAPTURED}",
        "genssm.kernels.gated_residual.benchmark"),
    Job("isolated_scans", "genssm.kernels.isolated_scans.benchmark", "genssm.kernels.isolated_scans.benchmark"),
    Job("mamba2_step", "genssm.kernels.mamba2_step.benchmark", "genssm.kernels.mamba2_step.benchmark"),
    Job("draw_token", "genssm.kernels.draw_token.benchmark", "genssm.kernels.draw_token.benchmark"),
    Job("crossover", "benchmarks.models --pixels 256 512 1024 2048 --modes captured eager compiled --equal",
        "benchmarks.models --equal", together=True),
)  # fmt: skip


def visible() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def run(command: list[str], gpus: list[str], log: Path) -> tuple[int, float]:
    """Exit code and seconds of a command that sees these GPUs."""
    start = time.perf_counter()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    return done.returncode, time.perf_counter() - start


def side_by_side(jobs: list[Job], gpus: list[str], out: Path) -> Iterator[tuple[Job, int, float]]:
    """Run jobs, one on each GPU at a time; each with its exit code and seconds as they end."""
    waiting, ended = queue.SimpleQueue(), queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work(own: list[str]) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            ended.put((job, *run(job.command(len(gpus)), own, out / f"{job.name}.log")))

    for own in [[gpu] for gpu in gpus] or [[]]:
        threading.Thread(target=work, args=(own,), daemon=True).start()
    for _ in jobs:
        yield ended.get()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [job.name for job in JOBS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=names, help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the logs (default: runs/bench)")
    args = parser.parse_args(arguments)
    gpus = visible()
    jobs = [job for job in JOBS if job.name in args.only and job.command(len(gpus))]
    if args.list:
        for job in jobs:
            print(f"{job.name:15} {shlex.join(['python', *job.command(len(gpus))[1:]])}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    out, table = args.out.resolve(), []
    alone, together = [[job for job in jobs if job.together == whole] for whole in (False, True)]

    def all_of_them() -> Iterator[tuple[Job, int, float]]:
        yield from side_by_side(alone, gpus, out)
        for job in together:
            yield job, *run(job.command(len(gpus)), gpus, out / f"{job.name}.log")

    start = time.perf_counter()
    for job, code, seconds in all_of_them():
        print(f"\n== {job.name}: {shlex.join(['python', *job.command(len(gpus))[1:]])}\n")
        print((out / f"{job.name}.log").read_text(errors="replace"), flush=True)
        table.append((job.name, f"{seconds:.0f}", "done" if code == 0 else f"failed ({code})"))
    print_table(("table", "seconds", "result"), table, None)
    print(f"{time.perf_counter() - start:.0f} s in all; logs in {args.out}")
    return int(any(line[2] != "done" for line in table))


if __name__ == "__main__":
    cli(main)
