"""Train a model: read the run -> build it -> loop -> save.

    python train.py --config configs/zigma/digits.yaml train.max_train_steps=500
    accelerate launch --num_processes 4 train.py --config ...          (or torchrun)

The same command resumes. SIGTERM or Ctrl-C saves a checkpoint and ends the run; a killed run goes on from its last one.
"""

import genssm.threads  # noqa: F401  # isort: skip - before torch
import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler

from genssm.config import RunConfig, describe_keys, dump_config, load_config
from genssm.data.loading import Shares, training_batches
from genssm.devices import means_cpu
from genssm.env import device_name, versions
from genssm.errors import cli
from genssm.graphs import TrainingGraphs
from genssm.layers import parameter_groups
from genssm.tasks import Task, build_task
from genssm.training.checkpoint import (
    BEST,
    best_checkpoint,
    load_checkpoint,
    readable,
    remove_old_checkpoints,
    save_checkpoint,
    write_text,
)  # fmt: skip
from genssm.training.checks import check_cuda_graph, check_numbers, claim_run_folder, flat_config
from genssm.training.ema import EMA
from genssm.training.evaluation import Evaluation
from genssm.training.guard import NonFiniteError, explain_nonfinite
from genssm.training.layer_shuffle import shuffle_layers
from genssm.training.logging import MetricsLog, logger, start_logging
from genssm.training.memory import describe_run
from genssm.training.model_card import write_model_card
from genssm.training.seeding import generator_for, seed_globals
from genssm.training.sharding import gather, load_whole_state, put, shard, wants_sharding, whole, whole_state
from genssm.training.stop import StopRequest

GRAPHS = 64  # of a block at most: packed rows differ in length and in how many samples they hold
OVERFLOWS_IN_A_ROW = 50  # fp16: skipped steps after which the loss scale is not the reason


@dataclass
class Run:
    """Everything a training step needs."""

    config: RunConfig
    accelerator: Accelerator
    shares: Shares
    task: Task
    feed: Any = None  # the data set as training reads it
    pipeline: DiffusionPipeline | None = None
    sharded: bool = False
    trained: torch.nn.Module | None = None  # what is optimised: the task's learner, or a sharded copy of it
    wrapped: torch.nn.Module | None = None  # it, as accelerate runs it
    stepped: Any = None  # that, or its recorded passes: what a training step calls
    ema: EMA | None = None  # of its parameters
    shown: EMA | None = None  # of the model's: the same average, or its whole copy
    optimizer: Any = None
    skips: bool = False  # whether the optimiser leaves a step out that it is told of on the device
    lr_scheduler: Any = None
    evaluation: Evaluation | None = None

    @property
    def path(self) -> Path:
        return Path(self.config.train.output_dir)

    @property
    def model(self) -> torch.nn.Module:
        return self.task.model


@dataclass
class Step:
    """A step whose gradient nobody has looked at yet."""

    number: int
    parts: list[dict]
    draws: dict[str, torch.Tensor]
    finite: torch.Tensor


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="keys, defaults, meaning:\n" + describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="the run, e.g. configs/debug/zigma.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to it, e.g. train.learning_rate=3e-4"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the run, its size and its memory, and stop")
    parser.add_argument("--quiet", action="store_true", help="warnings only on the terminal")
    return parser.parse_intermixed_args(arguments)


def build(config: RunConfig, accelerator: Accelerator) -> Run:
    """A run, its parts checked against each other; the model still on the CPU."""
    train = config.train
    shares = Shares(
        train.train_batch_size, train.gradient_accumulation_steps, accelerator.num_processes, accelerator.process_index
    )
    task = build_task(config, accelerator.device)
    if train.cuda_graph:
        check_cuda_graph(config, task.recordable, accelerator.device, accelerator.num_processes)
    return Run(config, accelerator, shares, task)


def prepare(run: Run, *, sharded: bool = False) -> None:
    """Put the model on its device and give it an optimiser, a schedule, an average and a pipeline."""
    accelerator, train = run.accelerator, run.config.train
    device = accelerator.device
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = train.tf32
    learner = run.task.learner.to("cpu" if sharded else device).train()
    if sharded and (learner is not run.model or not run.task.shardable):
        what = f"model.name={run.config.model.name}" if learner is run.model else "a run with align.encoder"
        raise ValueError(f"{what} cannot be sharded; launch it with configs/accelerate/ddp.yaml")
    run.sharded, run.trained = sharded, shard(learner, device, run.shares.world) if sharded else learner
    model = run.trained if sharded else run.model
    if train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if train.compile:
        torch._dynamo.config.cache_size_limit = GRAPHS
        model.compile_repeated_blocks(fullgraph=True)
    if train.layer_shuffle:
        shuffle_layers(model, train.layer_shuffle)
    optimizer = torch.optim.AdamW(
        parameter_groups(run.trained, train.weight_decay),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=device.type in ("cpu", "cuda"),
    )
    course = "constant_with_warmup" if train.lr_scheduler == "constant" else train.lr_scheduler
    run.lr_scheduler = get_scheduler(
        course, optimizer, num_warmup_steps=train.lr_warmup_steps, num_training_steps=train.max_train_steps
    )
    # A fused step can be left out by the device itself: the gradient's norm is read a step later, without waiting.
    run.skips = optimizer.defaults["fused"] and accelerator.scaler is None and not sharded
    run.ema = EMA(model, train.ema_decay) if train.ema_decay else None
    run.shown = EMA(run.model, train.ema_decay) if run.ema is not None and sharded else run.ema
    run.pipeline = run.task.build_pipeline()
    run.pipeline.set_progress_bar_config(disable=True)
    if sharded:
        run.wrapped = accelerator.prepare_model(run.trained, evaluation_mode=True)  # autocast, but no DDP around it
        run.optimizer = accelerator.prepare(optimizer)
    else:
        run.wrapped, run.optimizer = accelerator.prepare(run.trained, optimizer)
    run.stepped = TrainingGraphs(run.wrapped, run.trained.parameters()) if train.cuda_graph else run.wrapped
    run.feed = run.task.feed()


def resume(run: Run, checkpoint: Path | None) -> int:
    """Load a checkpoint into the run; returns the steps done."""
    if checkpoint is None:
        return 0
    state = load_checkpoint(checkpoint, run.model, run.task.component)
    with readable(checkpoint, "state.pt"):
        load_whole_state(run.optimizer, state["optimizer"])
        run.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if run.accelerator.scaler is not None and state["scaler"] is not None:
            run.accelerator.scaler.load_state_dict(state["scaler"])
    if run.ema is not None:
        with readable(checkpoint, "pipeline"):
            average = run.task.saved_average(checkpoint / "pipeline")
        run.ema.load(average)
    if run.sharded:
        for ours, loaded in zip(run.trained.parameters(), run.model.parameters(), strict=True):
            put(ours, loaded)
    with readable(checkpoint, "state.pt"):
        run.task.load_state_dict(state["task"])
    logger.info("resumed from %s", checkpoint)
    return state["step"]


def draw_step(run: Run, step: int) -> dict[str, torch.Tensor]:
    """The random numbers of a step: a function of the seed and the step, whatever the number of processes."""
    generator = generator_for(run.config.train.seed, "noise", step, device=run.accelerator.device)
    return run.task.random_numbers(run.shares.batch_size, generator)


def part_loss(run: Run, model: Any, step: int, part: int, batch: dict, draws: dict) -> torch.Tensor:
    """Mean loss of one process's part of a step."""
    own = run.shares.slice(part)
    seed_globals(run.config.train.seed, "dropout", step, part, run.shares.rank)
    return run.task.loss(model, batch, {name: numbers[own] for name, numbers in draws.items()}).mean()


def accumulate(run: Run, *, last: bool) -> AbstractContextManager[None]:
    """Around the backward pass of a part: gradients are exchanged between the processes with the last one alone."""
    if run.sharded:
        run.trained.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else run.accelerator.no_sync(run.wrapped)


@contextmanager
def whole_model(run: Run) -> Iterator[None]:
    """The model whole, on its device, without dropout and with the averaged weights, to draw with."""
    collect(run)
    with run.shown.applied() if run.shown is not None else nullcontext():
        run.model.to(run.accelerator.device).eval()
        yield
        run.model.to("cpu" if run.sharded else run.accelerator.device).train()


def collect(run: Run) -> None:
    """Bring the whole model and its average up to date with the sharded ones; every process must take part."""
    if run.sharded:
        gather(run.trained.parameters(), run.model.parameters())
        gather(run.trained.buffers(), run.model.buffers())
        if run.ema is not None:
            gather(run.ema.average, run.shown.average)


def train(run: Run, start: int, stop: StopRequest, *, quiet: bool) -> int:
    """The loop; returns the steps done."""
    config, accelerator, shares = run.config.train, run.accelerator, run.shares
    batches = training_batches(
        run.feed,
        run.task.stream(),
        shares,
        first=start,
        last=config.max_train_steps,
        device=accelerator.device,
        num_workers=run.config.data.num_workers,
    )
    reading = (  # steps between those whose numbers or weights leave the loop
        run.config.log.log_every, run.config.log.sample_every, config.checkpointing_steps,
        run.config.evaluate.every if run.evaluation is not None else 0,
    )  # fmt: skip
    log = MetricsLog(
        run.path,
        start,
        config.max_train_steps,
        quiet=quiet,
        active=accelerator.is_main_process,
        tracker=accelerator if accelerator.trackers else None,
    )
    window, steps, overflows = torch.zeros((), device=accelerator.device), 0, 0
    unseen: Step | None = None
    for step in range(start + 1, config.max_train_steps + 1):
        draws = draw_step(run, step)
        parts = [next(batches) for _ in range(shares.parts)]
        for part, batch in enumerate(parts):
            with accumulate(run, last=part == shares.parts - 1):
                loss = part_loss(run, run.stepped, step, part, batch, draws) / shares.parts
                accelerator.backward(loss)
            window += loss.detach()
        norm = whole(accelerator.clip_grad_norm_(run.trained.parameters(), config.max_grad_norm or math.inf))
        settle(run, unseen)
        unseen = Step(step, parts, draws, torch.isfinite(norm))
        if accelerator.scaler is not None:
            overflows = 0 if bool(unseen.finite) else overflows + 1
            unseen = unseen if overflows > OVERFLOWS_IN_A_ROW else None
        if not run.skips or step == config.max_train_steps or any(every and step % every == 0 for every in reading):
            settle(run, unseen)
            unseen = None
        else:
            run.optimizer.optimizer.found_inf = (~unseen.finite).float()
        run.optimizer.step()
        run.lr_scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.task.after_step(step)
        if run.ema is not None:
            run.ema.update(step)
        log.step()
        steps += 1

        last = step == config.max_train_steps
        if step % run.config.log.log_every == 0 or last:
            mean = accelerator.reduce(window / steps, "mean").item()
            log.write(step, loss=mean, grad_norm=norm.item(), **rates(run, step, log))
            window, steps = torch.zeros_like(window), 0
        ending = stop.agreed(step) or last
        if ending:
            settle(run, unseen)
        with log.pause():
            if run.config.log.sample_every and (step % run.config.log.sample_every == 0 or last):
                log.picture(step, sample(run, step))
            measured = None
            if run.evaluation is not None and (step % run.config.evaluate.every == 0 or last):
                measured = evaluate(run, step, log)
            if step % config.checkpointing_steps == 0 or ending or measured is not None:
                save(run, step, measured)
        if ending:
            break
    log.close()
    return step


def settle(run: Run, step: Step | None) -> None:
    """Look whether the gradient of a step was finite, which waits until the device has come so far.

    Raises:
        NonFiniteError: it was not; says where that began.
    """
    if step is not None and not bool(step.finite):
        raise NonFiniteError(explain(run, step.number, step.parts, step.draws))


def rates(run: Run, step: int, log: MetricsLog) -> dict[str, float]:
    """What is logged beside loss and gradient norm."""
    numbers = {
        "learning_rate": run.lr_scheduler.get_last_lr()[0],
        f"{run.task.unit}_per_second": log.rate(step, run.shares.batch_size),
    }
    numbers |= run.task.numbers_to_log()
    if run.ema is not None:
        numbers["ema_decay"] = run.ema.decay_at(step)
    if run.accelerator.device.type == "cuda":
        numbers["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return numbers


def explain(run: Run, step: int, parts: list[dict], draws: dict) -> str:
    """Where the first non-finite number of a step comes from, and what to do."""
    collect(run)
    learner = run.task.learner.to(run.accelerator.device)
    for part, batch in enumerate(parts):
        reason = explain_nonfinite(
            learner, batch, lambda part=part, batch=batch: part_loss(run, learner, step, part, batch, draws)
        )
        if reason:
            break
    reason = reason or "repeating it in this process gives finite numbers: another process, or the hardware"
    return (
        f"step {step}: loss or gradient is not finite; {reason}. The step was not applied; the last checkpoint is "
        "good. Try a lower train.learning_rate, train.mixed_precision=no, or look at the data"
    )


def sample(run: Run, step: int) -> Any:
    """Draw the grid, each process its share, and save it."""
    with whole_model(run):
        mine = run.task.draw(run.pipeline, run.shares.rank, run.shares.world)
    pictures = dict(gather_object(list(mine.items())))
    grid = run.task.arrange([pictures[i] for i in range(run.config.log.num_samples)])
    if run.accelerator.is_main_process:
        grid.save(run.path / "samples" / f"step_{step:07d}.png")
    return grid


def evaluate(run: Run, step: int, log: MetricsLog) -> float | None:
    """Measure samples of the averaged weights, on all processes; the distance if it is the smallest so far."""
    with whole_model(run):
        value = run.evaluation.measure(run.pipeline)
    log.write(step, **{run.evaluation.name: value})
    best = best_checkpoint(run.path)
    smallest = [best is None or best["step"] >= step or value < best["value"]]
    return value if broadcast_object_list(smallest)[0] else None  # as the first process has read it


def save(run: Run, step: int, measured: float | None = None) -> None:
    """Write a checkpoint, on the first process; the others wait. ``measured``: its distance, the smallest so far."""
    collect(run)
    optimizer = whole_state(run.optimizer) if run.sharded else run.optimizer.state_dict()
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        state = {
            "optimizer": optimizer,
            "lr_scheduler": run.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "seed": run.config.train.seed,
            "task": run.task.state_dict(),
        }

        def save_pipeline(folder: Path) -> None:
            with run.shown.applied() if run.shown is not None else nullcontext():
                run.pipeline.save_pretrained(folder)
            write_model_card(folder, run.task, step=step, pipeline=run.pipeline, versions=versions())

        checkpoint = save_checkpoint(run.path, step, run.model, state, save_pipeline)
        if measured is not None:
            about = {"checkpoint": checkpoint.name, "step": step, "metric": run.evaluation.metric, "value": measured}
            write_text(run.path / BEST, json.dumps(about, indent=1))
        remove_old_checkpoints(run.path, run.config.train.checkpoints_total_limit)
        logger.info("saved %s", checkpoint)
    run.accelerator.wait_for_everyone()


def begin_folder(run: Run) -> None:
    """Files of the run folder that are written once."""
    names = dict(enumerate(run.task.dataset.class_names))
    write_text(run.path / "labels.json", json.dumps(names, indent=1, ensure_ascii=False))
    device = run.accelerator.device
    about = {"versions": versions(), "device": device_name(device), "processes": run.accelerator.num_processes}
    write_text(run.path / "env.json", json.dumps(about, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config = load_config(args.config, args.overrides)
    check_numbers(config)
    sharded = wants_sharding()
    tracker = None if config.log.report_to == "none" else config.log.report_to
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=means_cpu(),
        mixed_precision=config.train.mixed_precision,
        log_with=tracker,
        project_dir=config.train.output_dir,
        kwargs_handlers=[ddp],
    )
    if accelerator.distributed_type not in (
        DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU
    ):  # fmt: skip
        raise ValueError(
            f"{accelerator.distributed_type} is not supported; use one process, data parallel processes, or FSDP 2 "
            "(configs/accelerate/)"
        )
    if sharded and config.train.mixed_precision == "fp16":
        raise ValueError("train.mixed_precision=fp16 cannot be sharded; use bf16")
    sharded = sharded and accelerator.num_processes > 1
    run = build(config, accelerator)
    if claim_run_folder(config, write=False) is None and config.train.init_from is not None:
        run.task.start_from(config.train.init_from)
    if args.dry_run:
        if accelerator.is_main_process:
            print(dump_config(config) + "\n" + describe_run(run.task, run.shares))
        return
    accelerator.wait_for_everyone()  # a process that still looks would take the folder made below for another run's
    with accelerator.main_process_first():
        checkpoint = claim_run_folder(config, write=accelerator.is_main_process)
    start_logging(run.path if accelerator.is_main_process else None, quiet=args.quiet)
    if config.evaluate.every:
        run.evaluation = Evaluation(config, run.task, accelerator.device)
    size = describe_run(run.task, run.shares) if accelerator.is_main_process else ""
    prepare(run, sharded=sharded)
    start = resume(run, checkpoint)
    if start >= config.train.max_train_steps:
        logger.info("%s is finished (%d steps); raise train.max_train_steps to go on", run.path, start)
        return
    if accelerator.is_main_process:
        begin_folder(run)
        logger.info("%s", size)
    if tracker:
        accelerator.init_trackers(run.path.name, config=flat_config(config))
    with StopRequest(accelerator) as stop:
        done = train(run, start, stop, quiet=args.quiet)
    accelerator.end_training()
    if done < config.train.max_train_steps:
        logger.info("stopped at step %d of %d; the same command goes on", done, config.train.max_train_steps)
    else:
        logger.info("finished: %s", run.path)


if __name__ == "__main__":
    cli(main)
