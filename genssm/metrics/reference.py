"""The real images of a benchmark: their features in any network, computed once and kept by hash, or read."""

import argparse
import hashlib
import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from genssm.config import DataConfig, load_config
from genssm.metrics.features import FeatureExtractor
from genssm.metrics.frechet import Float64
from genssm.metrics.sources import ImageSource, dataset_source, file_source
from genssm.metrics.statistics import (
    Statistics,
    collect,
    is_statistics,
    load_statistics,
    open_archive,
    save_statistics,
)
from genssm.metrics.weights import cache_folder, file_hash, short_hash

logger = logging.getLogger("genssm")


class Reference:
    """Real images, or what a file holds of them.

    Args:
        spec: a folder of images; an ``.npz`` of images (``arr_0``), of statistics (``mu``, ``sigma``) or, as the ADM
            evaluator's reference batches, of both; ``dataset:NAME[:SPLIT]``; ``dataset:RUN``, the data of a run.
        options: of :func:`genssm.metrics.sources.add_data_options`.
        cache: folder of computed statistics; default: ``statistics`` in genssm's cache.

    Attributes:
        images: their source, None where a file holds statistics alone.
        file: the ``mu`` and ``sigma`` of the file, or None.
        spatial: its ``mu_s`` and ``sigma_s``, or None.
    """

    def __init__(self, spec: str, options: argparse.Namespace, cache: Path | None = None) -> None:
        self.spec, self.cache = spec, cache or cache_folder() / "statistics"
        self.images: ImageSource | None = None
        self.file: Statistics | None = None
        self.spatial: tuple[Float64, Float64] | None = None
        path = Path(spec)
        if path.suffix == ".npz" and path.is_file() and is_statistics(path):
            self.file = load_statistics(path)
            with open_archive(path) as archive:
                if {"mu_s", "sigma_s"} <= set(archive.files):
                    self.spatial = archive["mu_s"].astype(np.float64), archive["sigma_s"].astype(np.float64)
                if "arr_0" in archive.files:
                    self.images = file_source(path)
            self.fingerprint = self.file.sha256
            return
        if spec.startswith("dataset:"):
            name, _, split = spec.removeprefix("dataset:").partition(":")
            self.images = dataset_source(name, split or "train", options)
            place = options.path or _data_path(name)
        else:
            self.images, place = file_source(path), spec
        self.fingerprint = _fingerprint(self.images.name, None if place is None else Path(place))

    def statistics(self, extractor: FeatureExtractor, batch_size: int) -> Statistics:
        """Statistics with every feature, read from the cache or computed by all processes and put there.

        Raises:
            ValueError: the reference is a file without images.
        """
        if self.images is None:
            raise ValueError(
                f"{self.spec} holds mu and sigma but no images; this metric needs the features of real images: give a "
                "folder, a data set or an .npz with arr_0"
            )
        protocol = hashlib.sha256(json.dumps(asdict(extractor.protocol), sort_keys=True).encode()).hexdigest()
        file = self.cache / f"{self.fingerprint[:16]}-{protocol[:16]}.npz"
        state = PartialState()
        known = [file.is_file()]
        broadcast_object_list(known)  # a file that appears meanwhile must not part the processes
        if known[0]:
            logger.info("statistics of %s from %s", self.images.name, file)
            return replace(load_statistics(file), name=self.images.name)
        found = collect(self.images, extractor, batch_size=batch_size, progress=True)
        if state.is_main_process:
            save_statistics(file, found, with_features=True)
        state.wait_for_everyone()
        return found

    def describe(self) -> str:
        """One line for people."""
        parts = [] if self.images is None else [f"{len(self.images)} images"]
        parts += [] if self.file is None else ["mu, sigma of the file"]
        parts += [] if self.spatial is None else ["mu_s, sigma_s of the file"]
        return f"{self.spec}: {', '.join(parts)} ({short_hash(self.fingerprint)})"


def _data_path(name: str) -> str | None:
    """The folder of a data set that is named by a configuration file or a run folder."""
    file = Path(name) / "config.yaml" if Path(name).is_dir() else Path(name)
    config = load_config(file).data if file.suffix in (".yaml", ".yml") else DataConfig(name=name)
    return config.path


def _fingerprint(name: str, place: Path | None) -> str:
    """A hash of which images these are: of the file, or of the names, sizes and times of all files in the folder."""
    digest = hashlib.sha256(name.encode())
    if place is not None and place.is_file():
        digest.update(file_hash(place).encode())
    elif place is not None:
        for folder, folders, names in os.walk(place, followlinks=True):
            folders.sort()
            for entry in sorted(names):
                file = Path(folder, entry)
                about = file.stat()
                line = f"{file.relative_to(place).as_posix()} {about.st_size} {about.st_mtime_ns}\n"
                digest.update(line.encode())
    return digest.hexdigest()
