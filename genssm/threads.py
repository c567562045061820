"""How CPU threads wait and round; imported by programs before torch, which reads both settings once.

Waiting: GNU OpenMP spins for milliseconds by default, as if nobody else needed the processor: with two busy processes
on two cores a training step of a small model became 13 times slower. Not spinning at all costs half the speed of an
idle machine. 5,000 turns keep 485 of 543 images/s alone and 140 each for two processes (digits run, two cores).
``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` in the environment decide otherwise.

Rounding: Intel's matrix products choose their kernels by thread count and memory alignment, so that two processes can
differ in the last bit. The strict mode gives a resumed run the bits of the straight one, and an image the same bits in
any batch. ``MKL_CBWR`` in the environment decides otherwise.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
