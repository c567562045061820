"""The protocol as a whole: rows of a table, what makes them comparable, files and the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genssm.data.motion import Lengths, MotionDataset
from genssm.data.motion.words import WordVectors
from genssm.metrics.motion import Evaluation, Protocol, load_pipeline, long_motion, main, table, time_per_sentence
from genssm.metrics.motion_clips import FileMotions, PipelineMotions, draw_clips
from genssm.metrics.motion_evaluator import EvaluatorInfo, MotionEvaluator, save_evaluator
from genssm.models import ZigMa
from genssm.motion import T2M, features_to_joints
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.schedulers import FlowODEScheduler
from tests.metrics.motion.conftest import SMALL, make_dataset
from tests.pipelines.test_text_to_motion import frame_pipeline

OWN = EvaluatorInfo("own", False, "hashed", "made")
QUICK = Protocol(repetitions=2, diversity_pairs=20)


class NoisyTruth:
    """Clips of the data set by caption or class, with noise: a pipeline in all that the evaluation asks of one."""

    skeleton = T2M

    def __init__(self, dataset: MotionDataset, noise: float, reads: str = "text") -> None:
        self.dataset, self.noise = dataset, noise
        self.text_encoder = object() if reads == "text" else None
        self.config = SimpleNamespace(class_names=["walk"] if reads == "classes" else None)
        self.calls: list[tuple] = []

    def set_progress_bar_config(self, **options: bool) -> None:
        pass

    def __call__(
        self, prompt=None, *, class_labels=None, num_motions=None, num_frames, generator, output_type, **call
    ) -> SimpleNamespace:
        wanted = prompt or class_labels or [None] * num_motions
        self.calls.append((tuple(wanted), call))
        made = []
        for told, length, source in zip(wanted, num_frames, generator):
            clip = next(
                c
                for c in self.dataset.clips
                if len(c.features) >= length and told in (c.captions[0].text, c.label, None)
            )
            noise = torch.randn(length, 263, generator=source) * self.dataset.statistics.std
            made.append(clip.features[:length] + self.noise * noise)
        return SimpleNamespace(motions=made)

    def long(self, prompts, *, seconds, generator, output_type, **call) -> SimpleNamespace:
        """Segments of equal steps, one after the other, with a jump of 10 cm at each border."""
        frames = [round(20 * length) for length in seconds]
        borders = np.cumsum(frames)[:-1].tolist()
        x = torch.arange(sum(frames)) * 0.01 + sum(0.1 * (torch.arange(sum(frames)) >= border) for border in borders)
        self.calls.append((tuple(prompts), call))
        return SimpleNamespace(motions=[x[:, None, None].expand(-1, 22, 3)], borders=[borders])


@pytest.fixture
def evaluation(clips_of_motion: MotionDataset) -> Evaluation:
    torch.manual_seed(0)
    evaluator = MotionEvaluator(SMALL, clips_of_motion.statistics).eval()
    return Evaluation(clips_of_motion, evaluator, OWN, WordVectors.hashed(20), QUICK)


def test_worse_motion_has_worse_numbers(evaluation: Evaluation, clips_of_motion: MotionDataset) -> None:
    real = evaluation.run(None)
    rows = {
        noise: evaluation.run(PipelineMotions(NoisyTruth(clips_of_motion, noise), "noisy")) for noise in (0.05, 0.5, 2)
    }
    fids = [real["fid"].mean, *(row["fid"].mean for row in rows.values())]
    assert fids == sorted(fids) and fids[-1] > 10 * fids[0]
    assert rows[2]["peak_jerk"].mean > rows[0.5]["peak_jerk"].mean > real["peak_jerk"].mean
    assert "multimodality" not in rows[2]
    text = table({"real": real, "noisy": rows[2]})
    assert "r_precision_3" in text and "±" in text and "multimodality" not in text


def test_repetitions_are_reproducible_and_differ(evaluation: Evaluation, clips_of_motion: MotionDataset) -> None:
    source = PipelineMotions(NoisyTruth(clips_of_motion, 0.5), "noisy", batch_size=7)
    other = PipelineMotions(NoisyTruth(clips_of_motion, 0.5), "noisy", batch_size=36, num_inference_steps=3)
    assert evaluation.repetition(source, 0) == pytest.approx(evaluation.repetition(other, 0), rel=1e-4)
    assert evaluation.repetition(source, 0) != evaluation.repetition(source, 1)
    assert other.pipeline.calls[0][1] == {"num_inference_steps": 3}


def test_multimodality_sees_the_noise(clips_of_motion: MotionDataset, evaluation: Evaluation) -> None:
    evaluation.protocol = Protocol(
        repetitions=1, diversity_pairs=20, multimodality_captions=2, multimodality_samples=6, multimodality_pairs=3
    )
    still, lively = (
        evaluation.run(PipelineMotions(NoisyTruth(clips_of_motion, noise), "x"))["multimodality"].mean
        for noise in (0.0, 1.0)
    )
    assert still == pytest.approx(0, abs=1e-5) and lively > 0.01


def test_draws_of_clips(clips_of_motion: MotionDataset) -> None:
    a, again, other = (draw_clips(clips_of_motion, 0, r) for r in (0, 0, 1))
    assert a.names == again.names != other.names and sorted(a.names) == sorted(other.names)
    crops = draw_clips(clips_of_motion, 0, 0, take="b")
    assert crops.names == a.names and crops.captions == a.captions
    assert len(draw_clips(clips_of_motion, 0, 0, windows=3).names) == 108


def test_comparability(evaluation: Evaluation) -> None:
    assert "not comparable" in evaluation.comparability() and "'own' is not the published" in evaluation.comparability()
    evaluation.info = EvaluatorInfo("published t2m", True, "glove", "t2m")
    assert "the protocol differs" in evaluation.comparability() and "'own'" not in evaluation.comparability()
    evaluation.protocol, evaluation.diversity_pairs = Protocol(seed=4, multimodality_captions=100), 300
    assert evaluation.comparability() == "not comparable with published tables: clips are chosen by other lengths"
    evaluation.dataset = MotionDataset(evaluation.dataset.clips, T2M, evaluation.dataset.statistics, Lengths())
    assert evaluation.comparability() == "published protocol"


def test_too_few_clips_are_refused(evaluation: Evaluation) -> None:
    few = make_dataset(0, 8)
    arguments = (evaluation.evaluator, OWN, evaluation.vectors)
    with pytest.raises(ValueError, match="8 test clips are fewer than a group of 32"):
        Evaluation(few, *arguments, QUICK)
    assert Evaluation(few, *arguments, Protocol(windows=4)).diversity_pairs == 32


@pytest.mark.parametrize("reads", ["text", "classes", "nothing"])
def test_what_a_pipeline_is_told(clips_of_motion: MotionDataset, reads: str) -> None:
    source = PipelineMotions(NoisyTruth(clips_of_motion, 0.0, reads), "made", batch_size=36)
    clips = draw_clips(clips_of_motion, 0, 0)
    made = source.motions(clips, 0)
    told = {"text": [c.text for c in clips.captions], "classes": clips.labels, "nothing": [None] * 36}[reads]
    assert source.pipeline.calls[0][0] == tuple(told) and [len(motion) for motion in made] == clips.lengths
    if reads == "classes":
        clips.labels[4] = None
        with pytest.raises(ValueError, match=f"{clips.names[4]!r} has no class"):
            source.motions(clips, 0)


def test_time_per_sentence(clips_of_motion: MotionDataset) -> None:
    source = PipelineMotions(NoisyTruth(clips_of_motion, 0.0), "made", guidance_scale=2.0)
    clips = draw_clips(clips_of_motion, 0, 0)
    found = time_per_sentence(source, clips, 4, torch.device("cpu"))
    assert found["sentences"] == 4 and 0 < found["median_s"] < 1
    assert len(source.pipeline.calls) == 7
    assert source.pipeline.calls[0] == ((clips.captions[0].text,), {"guidance_scale": 2.0})


def test_jerk_between_prompts(clips_of_motion: MotionDataset) -> None:
    source = PipelineMotions(NoisyTruth(clips_of_motion, 0.0), "made", guidance_scale=1.5)
    found = long_motion(source, draw_clips(clips_of_motion, 0, 0), 2, segments=3)
    assert found["transitions"] == 4 and len(source.pipeline.calls) == 2
    assert source.pipeline.calls[0][1] == {"guidance_scale": 1.5}
    assert found["peak_jerk"] == pytest.approx(3 * 0.2, rel=1e-3)  # the third difference of a step of 0.1: 1, -2, 1
    assert found["area_under_jerk"] > 0
    with pytest.raises(ValueError, match="neither texts nor classes"):
        long_motion(
            PipelineMotions(NoisyTruth(clips_of_motion, 0.0, "nothing"), "x"), draw_clips(clips_of_motion, 0, 0), 1
        )


def test_limit(clips_of_motion: MotionDataset, evaluation: Evaluation) -> None:
    protocol = Protocol(repetitions=1, limit=33)
    limited = Evaluation(clips_of_motion, evaluation.evaluator, OWN, evaluation.vectors, protocol)
    assert limited.diversity_pairs == 33
    assert len(draw_clips(clips_of_motion, 0, 0, limit=33).names) == 33


def test_command_line(clips_of_motion: MotionDataset, evaluation: Evaluation, tmp_path: Path, capsys) -> None:
    """A folder in the published layout, an own evaluator, and samples as features and as joints."""
    data, samples = tmp_path / "data", tmp_path / "samples"
    for folder in (data / "new_joint_vecs", data / "texts", samples):
        folder.mkdir(parents=True)
    for number, clip in enumerate(clips_of_motion.clips):
        np.save(data / "new_joint_vecs" / f"{clip.name}.npy", clip.features.numpy())
        caption = clip.captions[0]
        (data / "texts" / f"{clip.name}.txt").write_text(f"{caption.text}#{' '.join(caption.tokens)}#0.0#0.0\n")
        joints = features_to_joints(torch.cat([clip.features, clip.features[-1:]]))
        np.save(samples / f"{clip.name}.npy", (joints if number % 2 else clip.features).numpy())
    clips_of_motion.statistics.save(data / "Mean.npy", data / "Std.npy")
    (data / "test.txt").write_text("\n".join(clip.name for clip in clips_of_motion.clips))
    save_evaluator(tmp_path / "own.safetensors", evaluation.evaluator, OWN)
    arguments = ["--data", str(data), "--evaluator", str(tmp_path / "own.safetensors"), "--device", "cpu"]
    arguments += ["--samples", str(samples), "--repetitions", "2", "--report", str(tmp_path / "report.json")]
    main(arguments)
    assert "not comparable with published tables" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["results"]) == {"real", str(samples)} and report["clips"] == 36
    assert report["protocol"]["group_size"] == 32 and report["protocol"]["diversity_pairs"] == 36
    assert report["results"]["real"]["fid"]["repetitions"] == 2
    (samples / "clip3.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"clip3\.npy is missing"):
        main(arguments)
    with pytest.raises(ValueError, match="nothing to do"):
        main(["--data", str(data)])
    frame_pipeline(max_frames=48).save_pretrained(tmp_path / "short")
    short = ["--data", str(data), "--model", str(tmp_path / "short"), "--aits", "1", "--num-inference-steps", "2"]
    with pytest.raises(ValueError, match=r"makes up to 48 frames.*--max-frames 48"):
        main([*short, "--device", "cpu"])
    main([*short, "--device", "cpu", "--max-frames", "48", "--longer", "window"])
    assert "AITS" in capsys.readouterr().out


def test_files_that_do_not_fit(clips_of_motion: MotionDataset, tmp_path: Path) -> None:
    clips = draw_clips(clips_of_motion, 0, 0)
    np.save(tmp_path / f"{clips.names[0]}.npy", np.zeros((20, 100)))
    with pytest.raises(ValueError, match=r"\(20, 100\)"):
        FileMotions(tmp_path, T2M).motions(clips, 0)
    np.save(tmp_path / f"{clips.names[0]}.npy", np.full((20, 263), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        FileMotions(tmp_path, T2M).motions(clips, 0)


def test_a_pipeline_of_images_is_refused(clips_of_motion: MotionDataset, tmp_path: Path) -> None:
    model = ZigMa(sample_size=4, in_channels=1, hidden_size=32, num_layers=1, patch_size=2)
    ClassConditionalImagePipeline(model, FlowODEScheduler()).save_pretrained(tmp_path / "images")
    with pytest.raises(ValueError, match="ClassConditionalImagePipeline, which makes no motion"):
        load_pipeline(tmp_path / "images", torch.device("cpu"), torch.float32)
