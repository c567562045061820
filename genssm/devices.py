"""Devices: ``--device`` of command lines, checked before anything long begins; whether the CPU is meant; copies."""

import argparse

import torch
from accelerate.utils import parse_flag_from_env


def device_option(text: str) -> str:
    """A device of this machine by its name; for ``argparse``.

    Args:
        text: "cpu", or the accelerator's kind with or without a number: "cuda", "cuda:1".

    Returns:
        The text.

    Raises:
        argparse.ArgumentTypeError: no such device here; the message says which there are.
    """
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if kind is not None else 0
    known = ["cpu", *([kind.type] if kind is not None else []), *(f"{kind}:{i}" for i in range(count))]
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine, which has {', '.join(known)}")
    return text


def means_cpu(device: str | None = None) -> bool:
    """Whether a command runs on the CPU: it says so, its launcher does, or there is no accelerator.

    accelerate joins the processes of a launcher on the CPU only when told; untold, each would do all the work alone.

    Args:
        device: what ``--device`` says, if anything.
    """
    return device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on ``device``, without the CPU waiting for what a CUDA device still has to do.

    CUDA puts memory that is not pinned aside before it goes on; what other kinds of devices read later, they wait for.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
