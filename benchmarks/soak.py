"""A long run of every model in a small number type, several side by side, and one table of what became of the losses.

    python -m benchmarks.soak --out runs/soak                    all that bring their data, 10,000 steps in bfloat16
    python -m benchmarks.soak --out runs/soak --models zigma dim --steps 2000 --at-once 2

Models are those of configs/debug/*.yaml. Each run is ``train.py`` in a folder of its own, OUT/NAME, begun when the
tokenizer or autoencoder that it works with is trained. On a CUDA device steps that can be recorded are replayed
(``train.cuda_graph``). It ends early at its first loss or gradient that is not finite.
The same command goes on where it was stopped. The table, a line for each run with the mean loss of each part of it, is
OUT/soak.md; exit code 1 if a run failed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from genssm.config import RunConfig, load_config
from genssm.env import device_name, versions
from genssm.errors import cli
from genssm.tasks import TASKS
from genssm.training.checkpoint import write_text
from genssm.training.checks import check_cuda_graph

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "debug"


@dataclass
class Soak:
    """One run: the config it is made of, its folder, the run whose autoencoder it works with, what ended it early."""

    name: str
    folder: Path
    overrides: list[str]
    needs: str | None
    error: str | None = None

    def losses(self) -> list[float]:
        """Mean loss of each part of the run, as far as it came."""
        file = self.folder / "metrics.jsonl"
        lines = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
        return list({line["step"]: line["loss"] for line in lines if "loss" in line}.values())


def available() -> list[str]:
    """Names of the small configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def with_data() -> list[str]:
    """Those of them that read no files of the user's."""
    return [name for name in available() if load_config(CONFIGS / f"{name}.yaml").data.path is None]


def vae_of(config: RunConfig) -> tuple[str, str | None]:
    """The key under which a config names an autoencoder, and the autoencoder."""
    return ("motion.vae", config.motion.vae) if config.motion.vae else ("data.vae", config.data.vae)


def replays(config: RunConfig) -> bool:
    """Whether the steps of a run can be recorded on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_cuda_graph(config, TASKS[config.model.name].recordable, device, 1)
    except ValueError:
        return False
    return True


def plan(args: argparse.Namespace) -> list[Soak]:
    """The runs, each behind the one that it needs."""
    configs = {name: load_config(CONFIGS / f"{name}.yaml") for name in available()}
    makers = {config.train.output_dir: name for name, config in configs.items()}
    needs = {name: makers.get(vae_of(config)[1]) for name, config in configs.items()}
    chosen = dict.fromkeys([*(needs[name] for name in args.models if needs[name]), *args.models])
    soaks = []
    for name in chosen:
        overrides = [
            f"train.output_dir={args.out / name}", f"train.max_train_steps={args.steps}",
            f"train.mixed_precision={args.mixed_precision}", f"train.checkpointing_steps={args.steps // args.parts}",
            "train.checkpoints_total_limit=1", f"log.log_every={args.steps // args.parts}", "log.sample_every=0",
        ]  # fmt: skip
        if replays(configs[name]):
            overrides.append("train.cuda_graph=true")
        if needs[name]:
            overrides.append(f"{vae_of(configs[name])[0]}={args.out / needs[name]}")
        soaks.append(Soak(name, args.out / name, overrides, needs[name]))
    return soaks


def train(soak: Soak, needed: Future | None, threads: int) -> Soak:
    """Run it to its end, once the run that it needs has ended."""
    if needed is not None and needed.result().error:
        soak.error = f"{soak.needs} failed"
        return soak
    command = [sys.executable, "train.py", "--quiet", "--config", str(CONFIGS / f"{soak.name}.yaml"), *soak.overrides]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        soak.error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return soak


def run_all(soaks: list[Soak], at_once: int) -> Iterator[Soak]:
    """Run them, at most ``at_once`` side by side; each is handed out when it has ended."""
    threads = max(1, (os.cpu_count() or 1) // at_once)
    pool, ended = ThreadPoolExecutor(at_once), {}
    try:
        for soak in soaks:  # what a run needs is begun before it, so that no run waits for one that cannot begin
            ended[soak.name] = pool.submit(train, soak, ended.get(soak.needs), threads)
        for future in as_completed(ended.values()):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def table(soaks: list[Soak], parts: int, steps: int, precision: str) -> str:
    """The table in Markdown, under a line that says what was run on what."""
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    ends = [f"{(part + 1) * (steps // parts):,}" for part in range(parts)]
    lines = [
        f"Mean loss of each part of {steps:,} steps, {precision}; {device}; {software}",
        "",
        "| config | " + " | ".join(f"to {end}" for end in ends) + " | ended |",
        "| --- |" + " ---: |" * parts + " --- |",
    ]
    for soak in soaks:
        losses = [f"{loss:.4g}" for loss in soak.losses()[:parts]]
        cells = [soak.name, *losses, *[""] * (parts - len(losses)), soak.error or "as planned"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    parser.add_argument("--models", nargs="+", default=with_data(), metavar="NAME", help="of " + ", ".join(available()))
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="steps of each run")
    parser.add_argument("--parts", type=int, default=10, metavar="N", help="columns of the table")
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "fp16", "bf16"), help="as in training")
    parser.add_argument("--at-once", type=int, default=4, metavar="N", help="runs side by side")
    args = parser.parse_args(arguments)
    args.out = args.out.absolute()
    unknown = [name for name in args.models if name not in available()]
    if unknown:
        raise ValueError(f"--models {' '.join(unknown)}: unknown; expected some of {', '.join(available())}")
    if args.at_once < 1 or args.parts < 1 or args.steps < args.parts or args.steps % args.parts:
        raise ValueError(
            f"--steps {args.steps} --parts {args.parts} --at-once {args.at_once}: expected whole numbers from 1 on, "
            "and steps in equal parts"
        )
    soaks, ended = plan(args), []
    for soak in run_all(soaks, args.at_once):
        ended.append(soak.name)
        print(f"{soak.name}: {soak.error or 'ended as planned'}", flush=True)
        shown = [soak for soak in soaks if soak.name in ended]
        write_text(args.out / "soak.md", table(shown, args.parts, args.steps, args.mixed_precision))
    print(f"table     {args.out / 'soak.md'}")
    return int(any(soak.error for soak in soaks))


if __name__ == "__main__":
    cli(main)
