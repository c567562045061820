"""What a run writes while it runs: metrics.jsonl, log.txt, a progress bar, a tracker."""

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

logger = logging.getLogger("genssm")


def start_logging(run: Path | None, *, quiet: bool) -> None:
    """Send the messages of genssm to the terminal and, if ``run`` is given, to ``log.txt`` there.

    Args:
        run: run folder; None on processes that only warn.
        quiet: show warnings only.
    """
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO if run is not None else logging.WARNING)
    terminal = _BarSafeHandler()
    terminal.setLevel(logging.WARNING if quiet else logging.INFO)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(terminal)
    if run is not None:
        file = logging.FileHandler(run / "log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)
    logger.propagate = False


class _BarSafeHandler(logging.Handler):
    """Writes above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class MetricsLog:
    """The numbers of a run: a line of ``metrics.jsonl`` per call, the progress bar, the tracker.

    Lines after the step that a run resumes at belong to a history that did not happen and are taken out.

    Args:
        run: run folder.
        start: step that the run starts or resumes at.
        stop: last step.
        quiet: no bar and no lines on the terminal.
        active: False on all processes but the first: nothing is written.
        tracker: an ``accelerate`` Accelerator whose trackers also get the numbers, or None.
    """

    def __init__(
        self, run: Path, start: int, stop: int, *, quiet: bool = False, active: bool = True, tracker: Any = None
    ) -> None:
        self.active, self.tracker, self.quiet, self.stop = active, tracker, quiet, stop
        self.terminal = sys.stderr.isatty()
        self._clock, self._counted = time.perf_counter(), start
        if active:
            path = run / "metrics.jsonl"
            _cut_after(path, start)
            self._file = path.open("a", encoding="utf-8")
        bar_off = quiet or not active or not self.terminal
        self._bar = tqdm(total=stop, initial=start, unit="step", disable=bar_off, dynamic_ncols=True)

    def step(self) -> None:
        """Move the bar."""
        self._bar.update()

    def rate(self, step: int, images_per_step: int) -> float:
        """Images per second since the last call."""
        now = time.perf_counter()
        steps, seconds = step - self._counted, now - self._clock
        self._clock, self._counted = now, step
        return steps * images_per_step / seconds if seconds > 0 else 0.0

    def pause(self) -> "_Pause":
        """A block that does not count as training time."""
        return _Pause(self)

    def write(self, step: int, **numbers: float) -> None:
        """Record numbers for a step."""
        if not self.active:
            return
        rounded = {name: float(f"{value:.6g}") for name, value in numbers.items()}
        # JSON has no infinity: a gradient that overflowed in float16 is null.
        known = {name: value if math.isfinite(value) else None for name, value in rounded.items()}
        self._file.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")
        self._file.flush()
        self._bar.set_postfix({n: f"{v:.4g}" for n, v in rounded.items() if n in ("loss", "images_per_second")})
        if not self.quiet and not self.terminal:
            shown = "  ".join(f"{n} {v:.4g}" for n, v in rounded.items() if n != "ema_decay")
            logger.info("step %d/%d  %s", step, self.stop, shown)
        if self.tracker is not None:
            self.tracker.log(rounded, step=step)

    def picture(self, step: int, image: Image.Image) -> None:
        """Give a sample grid to the tracker."""
        if self.active and self.tracker is not None:
            import numpy as np

            for tracker in self.tracker.trackers:
                if hasattr(tracker, "log_images"):
                    array = np.asarray(image.convert("RGB"))[None]
                    extra = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"samples": array}, step=step, **extra)

    def close(self) -> None:
        """Finish the bar and the file."""
        self._bar.close()
        if self.active:
            self._file.close()


class _Pause:
    def __init__(self, log: MetricsLog) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.begun = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.log._clock += time.perf_counter() - self.begun


def _cut_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to ``step``; a line cut off in the middle goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
