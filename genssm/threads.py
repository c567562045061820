"""How long CPU threads spin while they wait; imported by programs before torch, which reads this once.

GNU OpenMP spins for milliseconds by default, as if nobody else needed the processor: with two busy processes on two
cores a training step of a small model became 13 times slower. Not spinning at all costs half the speed of an idle
machine. 5,000 turns keep 485 of 543 images/s alone and 140 each for two processes (digits run, two cores).
``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` in the environment decide otherwise.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
