"""Draw N images of a model and measure them in every usual way: ``python benchmarks/fid.py --help``."""

import sys
from pathlib import Path

sys.path.remove(sys.path[0])  # this folder, whose files are no modules for others
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # sample.py and, in a plain checkout, genssm

import genssm.threads  # noqa: F401  # isort: skip - before torch
import sample
from genssm.errors import cli
from genssm.metrics import benchmark

if __name__ == "__main__":
    cli(lambda: benchmark.main(sample.main))
