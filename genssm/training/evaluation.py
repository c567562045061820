"""Measuring a run's samples while it trains: the distance to real images, by all processes together."""

import argparse
import inspect
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from genssm.config import RunConfig
from genssm.metrics.features import build_extractor
from genssm.metrics.generated import PipelineSource, choose_labels
from genssm.metrics.reference import Reference
from genssm.metrics.report import check_same_features, gaussian_of, metric_name
from genssm.metrics.statistics import collect


class Evaluation:
    """The Frechet distance of a run's samples, with everything that does not change computed once.

    Samples are drawn with the same seeds and classes each time, so that the numbers of a run can be compared.

    Args:
        config: the run; its ``evaluate`` section.
        task: the kind of training.
        device: where features are computed.

    Attributes:
        metric: name of the measure, as in reports.
        name: as in ``metrics.jsonl``.

    Raises:
        ValueError: the run's samples cannot be measured, or reference and features do not go together.
        FileNotFoundError: weights or reference are not there; the message says where they may lie.
    """

    def __init__(self, config: RunConfig, task: Any, device: torch.device) -> None:
        self.settings = settings = config.evaluate
        if not task.measurable:
            raise ValueError(f"samples of model.name={config.model.name} cannot be measured; set evaluate.every=0")
        with PartialState().main_process_first():  # one of them fetches the weights
            self.extractor = build_extractor(settings.features, weights=settings.weights, device=device)
        spec = settings.reference or f"dataset:{config.train.output_dir}:{config.data.split}"
        options = argparse.Namespace(path=None, resolution=None, crop=None, channels=None)
        reference = Reference(spec, options)
        if reference.images is None:
            self.reference = reference.file
        else:
            self.reference = reference.statistics(self.extractor, settings.batch_size)
        self.gaussian = gaussian_of(self.reference)
        classes = getattr(task, "num_classes", 0)
        self.labels = choose_labels("balanced", settings.num_samples, classes) if classes else None
        self.metric = metric_name(self.extractor.protocol)
        self.name = "fid" if self.extractor.protocol.is_fid else "frechet_distance"

    def measure(self, pipeline: Any) -> float:
        """The distance of ``evaluate.num_samples`` images of a pipeline, the same number in every process."""
        settings = self.settings
        known = inspect.signature(type(pipeline).__call__).parameters  # a model that draws code by code has no steps
        call = {key: getattr(settings, key) for key in ("num_inference_steps", "guidance_scale") if key in known}
        source = PipelineSource(
            pipeline,
            "samples",
            settings.num_samples,
            self.labels,
            settings.seed,
            **call,
        )
        samples = collect(source, self.extractor, batch_size=settings.batch_size)
        check_same_features(samples, self.reference)
        value = [gaussian_of(samples).distance(self.gaussian) if PartialState().is_main_process else 0.0]
        return broadcast_object_list(value)[0]
