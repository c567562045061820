"""Which parameters weight decay may touch."""

from typing import Any

from torch import nn

from genssm.layers.directions import DepthwiseTaps
from genssm.layers.isolated_scans import GroupedLinear

DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, DepthwiseTaps, GroupedLinear)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into an optimiser's groups.

    Only the weight matrices of linear and convolution layers decay. State matrices (``A_log``), skips (``D``), step
    biases, norms, biases, embeddings, positions and every other free parameter do not: pulling ``A_log`` or the step
    bias to zero changes the time scales that a state-space model starts with.

    Args:
        model: any module; parameters with ``requires_grad=False`` are left out.
        weight_decay: decay of the first group.

    Returns:
        Two groups for a torch optimiser, ``{"params": [...], "weight_decay": ...}``, decayed first; parameters in
        the order of ``model.parameters()``. A group may be empty of parameters.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 3), weight_decay=0.1)
        >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
        [(1, 0.1), (1, 0.0)]
    """
    decayed_ids = {id(m.weight) for m in model.modules() if isinstance(m, DECAYED)}
    decayed, kept = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if id(parameter) in decayed_ids else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
