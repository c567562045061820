"""The ``--device`` of command lines, checked before anything long begins."""

import argparse

import torch


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
