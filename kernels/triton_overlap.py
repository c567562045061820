"""Kernels of a chain that start while the one before still runs (NVIDIA's programmatic dependent launch).

A kernel that is launched with ``**overlap(device)`` may begin before its predecessor has ended. It loads what no launch
just before it has written, calls `wait_for_inputs`, and only then touches the rest. As all let the next one begin after
their own wait, whatever the predecessor's predecessor has written is complete when a kernel begins.
"""

import torch
import triton
import triton.language as tl

from genssm.kernels.triton_launch import overlaps


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait for the launch before to end, then let the next one begin."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlap(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch whose kernel calls `wait_for_inputs`; the option is an error where it is not known."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps(device) else {"OVERLAP": False}
