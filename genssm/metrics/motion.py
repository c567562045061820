"""Evaluate generated motion against a data set: ``python -m genssm.metrics.motion --help``."""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssm.data.motion import Lengths, MotionDataset, build_motion_dataset
from genssm.data.motion.words import WordVectors
from genssm.devices import device_option
from genssm.errors import cli
from genssm.metrics import motion_distances as distances
from genssm.metrics.frechet import frechet_distance_from_features
from genssm.metrics.motion_clips import (
    Clips,
    FileMotions,
    MotionSource,
    PipelineMotions,
    draw_clips,
    embed_captions,
    embed_motions,
)
from genssm.metrics.motion_evaluator import EvaluatorInfo, MotionEvaluator, load_evaluator, load_published
from genssm.motion import features_to_joints
from genssm.training.seeding import derive

logger = logging.getLogger("genssm")
REPETITIONS = 20
# HumanML3D, KIT-ML, and the long clips of HumanML3D-LS.
PUBLISHED_LENGTHS = (Lengths(), Lengths(min_frames=24), Lengths(min_frames=191))
TRANSITION_SECONDS = 3.0
COLUMNS = ("r_precision_1", "r_precision_2", "r_precision_3", "fid", "mm_dist", "diversity", "multimodality")
JOINT_COLUMNS = ("peak_jerk", "area_under_jerk", "foot_skating")
EPILOG = """\
examples
  a trained model on HumanML3D, with the published evaluator and its GloVe vectors:
    python -m genssm.metrics.motion --data HumanML3D --model runs/motion_mamba --published . --glove glove \\
      --multimodality 100 --report motion.json
  the same on data of one's own, with an evaluator of one's own:
    python -m genssm.metrics.motion_evaluator_training --data data/cmu --out own.safetensors
    python -m genssm.metrics.motion --data data/cmu --model runs/cmu --evaluator own.safetensors --windows 8
  average inference time per sentence alone:
    python -m genssm.metrics.motion --data HumanML3D --model runs/motion_mamba --aits 100
"""


@dataclass(frozen=True)
class Protocol:
    """How an evaluation is done.

    Attributes:
        repetitions: each with its own order, crops, captions and seeds.
        windows: how often each test clip is drawn; 1 where tables are compared.
        limit: clips of a repetition, drawn at random; None takes all.
        diversity_pairs: pairs of motions.
        multimodality_captions: captions that get several motions, 0 to leave MultiModality out.
        multimodality_samples: motions for each of them.
        multimodality_pairs: pairs of these.
        group_size: of R-precision.
        seed: of everything.
    """

    repetitions: int = REPETITIONS
    windows: int = 1
    limit: int | None = None
    diversity_pairs: int = distances.DIVERSITY_PAIRS
    multimodality_captions: int = 0
    multimodality_samples: int = 30
    multimodality_pairs: int = distances.MULTIMODALITY_PAIRS
    group_size: int = distances.GROUP_SIZE
    seed: int = 0


class Evaluation:
    """An evaluator, its words and the test clips, for any number of sources.

    Args:
        dataset: the test part.
        evaluator: in evaluation mode.
        info: where it comes from.
        vectors: of the words that it was trained with.
        protocol: None takes the published one.
        device: where the evaluator runs.
    """

    def __init__(
        self,
        dataset: MotionDataset,
        evaluator: MotionEvaluator,
        info: EvaluatorInfo,
        vectors: WordVectors,
        protocol: Protocol | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if evaluator.sizes.feature_dim != dataset.skeleton.feature_dim:
            raise ValueError(
                f"the evaluator reads {evaluator.sizes.feature_dim} features, the data set has "
                f"{dataset.skeleton.feature_dim}"
            )
        if evaluator.sizes.word_dim != vectors.dim:
            raise ValueError(
                f"the evaluator reads word vectors of length {evaluator.sizes.word_dim}, not {vectors.dim}"
            )
        self.dataset, self.info, self.vectors = dataset, info, vectors
        self.protocol, self.device = protocol or Protocol(), torch.device(device)
        self.evaluator = evaluator.to(self.device)
        drawn = len(self._draw(0).names)
        if drawn < self.protocol.group_size:
            raise ValueError(
                f"{drawn} test clips are fewer than a group of {self.protocol.group_size}; draw each several times "
                "(--windows) or take another split"
            )
        self.diversity_pairs = min(self.protocol.diversity_pairs, drawn)
        skeleton = dataset.skeleton
        if (skeleton.name, skeleton.fps) == ("t2m", 20):
            self.real_jerk = distances.REAL_JERK["humanml3d"]
        else:  # no published constant: the mean over the test clips
            joints, lengths = self._joints([clip.features for clip in dataset.clips])
            valid = (lengths - 3).clamp(min=0).sum()
            self.real_jerk = float(distances.jerk(joints, lengths).double().sum() / valid)

    def run(self, source: MotionSource | None) -> dict[str, distances.Interval]:
        """Mean and interval of every metric; ``source`` None compares real motion with other crops of itself."""
        rows = [self.repetition(source, number) for number in range(self.protocol.repetitions)]
        return {name: distances.Interval.of([row[name] for row in rows]) for name in rows[0]}

    def repetition(self, source: MotionSource | None, number: int) -> dict[str, float]:
        """One repetition: metric -> value."""
        seed = self.protocol.seed
        clips = self._draw(number)
        if source is None:
            made = self._draw(number, take="b").features
        else:
            made = source.motions(clips, derive(seed, "motions", number))
        frames = self.dataset.lengths.max_frames
        texts = embed_captions(self.evaluator, clips.captions, self.vectors, self.device)
        real = embed_motions(self.evaluator, clips.features, frames, self.device)
        found = embed_motions(self.evaluator, made, frames, self.device)
        near = distances.retrieval(texts, found, group_size=self.protocol.group_size)
        pairs = distances.diversity_indices(len(found), derive(seed, "diversity", number), self.diversity_pairs)
        values = {f"r_precision_{k}": share for k, share in enumerate(near.r_precision, start=1)}
        values |= {
            "fid": frechet_distance_from_features(found, real),
            "mm_dist": near.mm_dist,
            "diversity": distances.diversity(found, *pairs),
        }
        if source is not None and self.protocol.multimodality_captions:
            values["multimodality"] = self._multimodality(source, clips, number)
        return values | self._of_joints(made)

    def _draw(self, number: int, take: str = "a") -> Clips:
        protocol = self.protocol
        return draw_clips(self.dataset, protocol.seed, number, protocol.windows, limit=protocol.limit, take=take)

    def _multimodality(self, source: MotionSource, clips: Clips, number: int) -> float:
        protocol = self.protocol
        count = min(protocol.multimodality_captions, len(clips.captions))
        rows = [i for i in range(count) for _ in range(protocol.multimodality_samples)]
        made = source.motions(clips.take(rows), derive(protocol.seed, "multimodality", number))
        found = embed_motions(self.evaluator, made, self.dataset.lengths.max_frames, self.device)
        pairs = distances.diversity_indices(
            protocol.multimodality_samples, derive(protocol.seed, "pairs", number), protocol.multimodality_pairs
        )
        return distances.multimodality(found.unflatten(0, (count, -1)), *pairs)

    def _of_joints(self, made: Sequence[Tensor]) -> dict[str, float]:
        joints, lengths = self._joints(made)
        curves = distances.jerk(joints, lengths)
        toes = (self.dataset.skeleton.left_foot[1], self.dataset.skeleton.right_foot[1])
        return {
            "peak_jerk": distances.peak_jerk(curves),
            "area_under_jerk": distances.area_under_jerk(curves, self.real_jerk),
            "foot_skating": distances.foot_skating(joints, toes, lengths),
        }

    def _joints(self, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Joints in metres, padded to the longest (B, T, J, 3), and the lengths (B,)."""
        skeleton = self.dataset.skeleton
        lengths = torch.tensor([len(features) for features in clips])
        joints = torch.zeros(len(clips), int(lengths.max()), skeleton.num_joints, 3)
        for i, features in enumerate(clips):
            joints[i, : len(features)] = features_to_joints(features, skeleton) * skeleton.metres
        return joints, lengths

    def comparability(self) -> str:
        """Whether the numbers may stand beside published ones, and if not, why."""
        reasons = []
        if not self.info.published:
            reasons.append(f"the evaluator {self.info.name!r} is not the published one")
        published = Protocol(seed=self.protocol.seed, multimodality_captions=self.protocol.multimodality_captions)
        if self.protocol != published or self.diversity_pairs != distances.DIVERSITY_PAIRS:
            reasons.append("the protocol differs from the published one")
        if self.dataset.lengths not in PUBLISHED_LENGTHS:
            reasons.append("clips are chosen by other lengths")
        return f"not comparable with published tables: {'; '.join(reasons)}" if reasons else "published protocol"


def time_per_sentence(
    source: PipelineMotions, clips: Clips, count: int, device: torch.device, seed: int = 0
) -> dict[str, float]:
    """AITS: seconds per sentence at batch 1, text encoding, sampling and decoding together.

    Loading and the recovery of joints are not in it. The first sentences, which compile and allocate, are not counted.

    Args:
        source: the pipeline and its sampling.
        clips: whose captions and lengths are used, one after the other.
        count: sentences that are timed.
        device: of the pipeline.
        seed: of the noise.
    Returns:
        Mean, median and number of sentences.
    """
    single = PipelineMotions(source.pipeline, source.name, 1, **source.call)
    seconds = []
    for number in range(count + 3):
        one = clips.take([number % len(clips.names)])
        _synchronise(device)
        start = time.perf_counter()
        single.motions(one, derive(seed, number))
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    counted = torch.tensor(seconds[3:], dtype=torch.float64)
    return {"mean_s": float(counted.mean()), "median_s": float(counted.median()), "sentences": count}


def long_motion(
    source: PipelineMotions, clips: Clips, count: int, segments: int = 4, seed: int = 0
) -> dict[str, float]:
    """Jerk where one prompt gives way to the next, over long motions of several captions.

    Args:
        source: the pipeline, with ``long(prompts=[...], seconds=..., generator=...)``, and its sampling.
        clips: whose captions (or classes) and lengths the segments take, in their order.
        count: long motions.
        segments: captions of each.
        seed: of the first.
    Returns:
        Peak jerk and area under it in windows of three seconds (Barquero et al. 2024), and how many there were; the
        area only for the skeleton of HumanML3D, where the jerk of real motion is published.
    Raises:
        ValueError: the pipeline reads neither texts nor classes.
    """
    if "num_motions" in source.condition(clips):
        raise ValueError(f"{source.name} reads neither texts nor classes; there is nothing to change between")
    skeleton = source.pipeline.skeleton
    windows = []
    for number in range(count):
        parts = clips.take([(number * segments + i) % len(clips.names) for i in range(segments)])
        made = source.pipeline.long(
            **source.condition(parts, texts="prompts"),
            seconds=[max(length / skeleton.fps, TRANSITION_SECONDS) for length in parts.lengths],
            generator=torch.Generator().manual_seed(derive(seed, number)),
            output_type="joints",
            **source.call,
        )
        joints = made.motions[0].float().cpu() * skeleton.metres
        windows.append(distances.transitions(joints, made.borders[0], round(TRANSITION_SECONDS * skeleton.fps)))
    curves = distances.jerk(torch.cat(windows))
    found = {"peak_jerk": distances.peak_jerk(curves), "transitions": len(curves)}
    if (skeleton.name, skeleton.fps) == ("t2m", 20):
        found["area_under_jerk"] = distances.area_under_jerk(curves)
    return found


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def table(rows: dict[str, dict[str, distances.Interval]]) -> str:
    """The rows as aligned text; metrics that no row has are left out."""
    names = [name for name in (*COLUMNS, *JOINT_COLUMNS) if any(name in row for row in rows.values())]
    width = max(len(name) for name in rows)
    lines = ["  ".join([" " * width, *names])]
    for title, row in rows.items():
        cells = [f"{row[name]!s:>{len(name)}}" if name in row else f"{'-':>{len(name)}}" for name in names]
        lines.append("  ".join([f"{title:<{width}}", *cells]))
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Every option, with its meaning."""
    result = argparse.ArgumentParser(
        prog="python -m genssm.metrics.motion",
        description="R-precision (groups of 32), FID, MM-Dist, Diversity, MultiModality, jerk and foot skating of\n"
        "generated motion, as mean and 95 % interval of repetitions, beside a row of real motion.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--data", required=True, help="folder of the data set (HumanML3D's layout, or recordings)")
    result.add_argument("--split", default="test", help="part of it (default: %(default)s)")
    what = result.add_mutually_exclusive_group()
    what.add_argument("--model", help="pipeline folder or run folder; motions are drawn from it")
    what.add_argument("--samples", help="folder of motions, <name of the test clip>.npy, features or joints")
    who = result.add_mutually_exclusive_group()
    who.add_argument("--evaluator", metavar="FILE", help="evaluator of one's own (.safetensors)")
    who.add_argument("--published", nargs="+", metavar="ROOT", help="folders to look for the published evaluator in")
    result.add_argument("--glove", help="folder of GloVe vectors (our_vab_*), for evaluators trained with them")
    result.add_argument("--repetitions", type=int, default=REPETITIONS, help="default: %(default)s")
    result.add_argument("--windows", type=int, default=1, help="draw each test clip so often (default: %(default)s)")
    result.add_argument(
        "--multimodality", type=int, default=0, metavar="CAPTIONS", help="captions of MultiModality; published: 100"
    )
    result.add_argument("--aits", type=int, default=0, metavar="N", help="also time N sentences, one at a time")
    result.add_argument("--long", type=int, default=0, metavar="N", help="also measure jerk between 4 prompts, N times")
    result.add_argument("--clips", type=int, metavar="N", help="test clips of a repetition (default: all)")
    result.add_argument("--min-frames", type=int, help="shortest clip (default: 40, KIT-ML 24; HumanML3D-LS: 191)")
    result.add_argument("--max-frames", type=int, help="longest clip (default: 196)")
    result.add_argument("--longer", choices=["leave_out", "window"], help="what becomes of longer clips")
    result.add_argument("--num-inference-steps", type=int, help="steps of the sampler (default: the pipeline's)")
    result.add_argument("--guidance-scale", type=float, help="default: the pipeline's")
    result.add_argument("--batch-size", type=int, default=32, help="motions per call (default: %(default)s)")
    result.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    result.add_argument("--device", type=device_option, help="cpu, cuda, ...; default: cuda where there is one")
    result.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model")
    result.add_argument("--report", type=Path, metavar="FILE.json", help="write protocol and results")
    return result


def main(arguments: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    options = parser().parse_args(arguments)
    if not (options.evaluator or options.published or options.aits or options.long):
        raise ValueError(
            "nothing to do: give --evaluator or --published for metrics, --aits N for the time, or --long N"
        )
    if (options.aits or options.long) and not options.model:
        raise ValueError("--aits and --long need a pipeline; give --model")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dataset = build_motion_dataset(options.data, options.split, lengths=_lengths(options))
    call = {
        key: getattr(options, key)
        for key in ("num_inference_steps", "guidance_scale")
        if getattr(options, key) is not None
    }
    source: MotionSource | None = None
    if options.model:
        pipeline = load_pipeline(Path(options.model), device, getattr(torch, options.dtype))
        longest, asked = pipeline.config.get("max_frames"), dataset.lengths.max_frames
        if longest is not None and longest < asked:
            raise ValueError(
                f"{options.model} makes up to {longest} frames, the clips have up to {asked}; give "
                f"--max-frames {longest} --longer window, and an evaluator trained with that"
            )
        source = PipelineMotions(pipeline, options.model, options.batch_size, **call)
    elif options.samples:
        source = FileMotions(options.samples, dataset.skeleton)
    report: dict[str, Any] = {"data": options.data, "split": options.split, "clips": len(dataset), "sampling": call}
    clips = draw_clips(dataset, options.seed, 0)  # what is over soon comes first: mistakes show before the metrics
    if options.long:
        report["long"] = long_motion(source, clips, options.long, seed=options.seed)
        print("between prompts: " + ", ".join(f"{name} {value:.4g}" for name, value in report["long"].items()))
    if options.aits:
        report["aits"] = time_per_sentence(source, clips, options.aits, device, options.seed)
        report["aits"]["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print("AITS {mean_s:.4f} s (median {median_s:.4f}, {sentences} sentences, {device})".format(**report["aits"]))
    if options.evaluator or options.published:
        report |= _metrics(options, dataset, source, device)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(json.dumps(report, indent=2), encoding="utf-8")


def load_pipeline(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of a folder or of a run's newest complete checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not make motion.
    """
    from diffusers import DiffusionPipeline

    import genssm.pipelines  # noqa: F401 - makes our classes known to diffusers
    from genssm.training.checkpoint import resolve_pipeline

    pipeline = DiffusionPipeline.from_pretrained(str(resolve_pipeline(path)), dtype=dtype).to(device)
    if not (hasattr(pipeline, "skeleton") and hasattr(pipeline, "denoiser")):
        raise ValueError(f"{path} is a {type(pipeline).__name__}, which makes no motion")
    return pipeline


def _metrics(
    options: argparse.Namespace, dataset: MotionDataset, source: MotionSource | None, device: torch.device
) -> dict[str, Any]:
    if options.published:
        evaluator, info = load_published(options.published, dataset.skeleton.name)
    else:
        evaluator, info = load_evaluator(options.evaluator)
    if info.word_vectors == "glove" and not options.glove:
        raise ValueError(f"the evaluator {info.name!r} reads GloVe vectors; say where they are with --glove")
    vectors = (
        WordVectors.load(options.glove)
        if info.word_vectors == "glove"
        else WordVectors.hashed(evaluator.sizes.word_dim)
    )
    protocol = Protocol(
        repetitions=options.repetitions,
        windows=options.windows,
        limit=options.clips,
        multimodality_captions=options.multimodality,
        seed=options.seed,
    )
    evaluation = Evaluation(dataset, evaluator, info, vectors, protocol, device)
    rows = {"real": evaluation.run(None)}
    if source is not None:
        rows[source.name] = evaluation.run(source)
    print(table(rows))
    print(f"{options.repetitions} repetitions, mean ± 95 % interval; {evaluation.comparability()}")
    return {
        "evaluator": asdict(info),
        "protocol": asdict(protocol) | {"diversity_pairs": evaluation.diversity_pairs},
        "comparability": evaluation.comparability(),
        "results": {title: {name: asdict(value) for name, value in row.items()} for title, row in rows.items()},
    }


def _lengths(options: argparse.Namespace) -> Lengths | None:
    """The lengths that were asked for; None where none was, so that the data set takes its own."""
    given = {"min_frames": options.min_frames, "max_frames": options.max_frames, "longer": options.longer}
    given = {name: value for name, value in given.items() if value is not None}
    return Lengths(**given) if given else None


if __name__ == "__main__":
    cli(main)
