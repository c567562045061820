"""Kernels of a chain that start while the one before still runs (NVIDIA's programmatic dependent launch).

A kernel that is launched with ``**overlap(device)`` may begin before its predecessor has ended. It loads what no launch
just before it has written, calls `wait_for_inputs`, and only then touches the rest. As all let the next one begin after
their own wait, whatever the predecessor's predecessor has written is complete when a kernel begins.
"""

import torch
import triton
import triton.language as tl

from genssm.kernels.triton_launch import compiled_for_nvidia


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait for the launch before to end, then let the next one begin."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def overlap(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch whose kernel calls `wait_for_inputs`; devices before sm_90 and other makers' know no such."""
    if compiled_for_nvidia(device.type) and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
