"""What the memory of a training run goes to, in every way to save some, in one table.

    python -m benchmarks.memory --config configs/dim/cifar10_s.yaml --at-once 8 32 --shards 2

One line for each number type, with and without gradient checkpointing, and each number of images at once in a process.
Nothing is computed: activations are counted on tensors without numbers, so the table takes seconds and no accelerator,
and leaves out what libraries and the allocator add. With ``--shards N`` weights, gradients and optimiser state are
those of one of N sharded processes (configs/accelerate/fsdp2.yaml).
"""

import argparse
from collections.abc import Iterator, Sequence

import torch

from genssm.config import RunConfig, load_config
from genssm.errors import cli
from genssm.tasks import Task, build_task
from genssm.training.memory import count_parameters, estimate_memory

TYPES = {"float32": None, "bfloat16": torch.bfloat16}
PARTS = ("weights", "gradients", "optimizer", "ema", "activations", "total")
SHARDED = ("weights", "gradients", "optimizer", "ema")


def rows(task: Task, config: RunConfig, batches: Sequence[int], shards: int) -> Iterator[dict[str, str | int]]:
    """The table, line by line; bytes per process under the names of :data:`PARTS`."""
    for name, dtype in TYPES.items():
        for checkpointing in (False, True):
            for batch in batches:
                found = estimate_memory(
                    task.model.train(),
                    lambda batch=batch: task.sketch(batch).mean(),
                    dtype=dtype,
                    ema=config.train.ema_decay > 0,
                    checkpointing=checkpointing,
                )
                for part in SHARDED:
                    found[part] = -(-found[part] // shards)
                found["total"] = sum(found[part] for part in PARTS[:-1])
                yield {"type": name, "checkpointing": "yes" if checkpointing else "no", "at once": batch, **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="images in a process")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="sharded processes (default: 1, none)")
    args = parser.parse_intermixed_args(arguments)
    if min(args.at_once) < 1 or args.shards < 1:
        raise ValueError(f"--at-once {args.at_once}, --shards {args.shards}: expected whole numbers from 1 on")
    config = load_config(args.config, args.overrides)
    task = build_task(config, torch.device("cpu"))
    sharded = "" if args.shards == 1 else f", sharded over {args.shards} processes"
    print(f"{type(task.model).__name__}, {count_parameters(task.model):,} parameters{sharded}; MiB per process\n")
    print("| type | checkpointing | at once | " + " | ".join(PARTS) + " |")
    print("|" + " --- |" * (3 + len(PARTS)))
    for row in rows(task, config, args.at_once, args.shards):
        numbers = [f"{row[part] / 2**20:,.1f}" for part in PARTS]
        print(f"| {row['type']} | {row['checkpointing']} | {row['at once']} | " + " | ".join(numbers) + " |")


if __name__ == "__main__":
    cli(main)
