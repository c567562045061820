"""Where tables are made that no checkpoint holds: scan orders, transforms, fixed positions."""

import torch


def table_device() -> torch.device:
    """The default device; the CPU in a model that is built on the meta device, where a table would have no values."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device
