"""The Triton step as a custom op, which `torch.compile` takes as it is. It changes its states in place."""

from torch import Tensor

from genssm.kernels.custom_op import custom_op


@custom_op("genssm::mamba2_step", mutates=("conv_windows", "conv_turns", "ssm_state"))
def step(
    projected: Tensor,
    conv_windows: Tensor,
    conv_turns: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ngroups: int,
) -> Tensor:
    from genssm.kernels.mamba2_step.triton_step import step_triton

    return step_triton(
        projected, conv_windows, conv_turns, ssm_state, conv_weight, conv_bias, A_log, D, dt_bias, ngroups
    )  # fmt: skip


@step.register_fake
def _(projected, conv_windows, conv_turns, ssm_state, conv_weight, conv_bias, A_log, D, dt_bias, ngroups) -> Tensor:
    return projected.new_empty(ssm_state.shape[0], ssm_state.shape[2] * ssm_state.shape[3])
