"""Small real components: a ZigMa of 8x8 images, unconditional and with three classes, and VAEs."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SchedulerMixin

from genssm.models import ZigMa
from genssm.pipelines import ClassConditionalImagePipeline
from genssm.training.objectives import FlowObjective

SMALL = {"sample_size": 8, "in_channels": 1, "patch_size": 2, "hidden_size": 32, "num_layers": 2, "drop_path": 0.0}


def make_denoiser(**changes: object) -> ZigMa:
    """A ZigMa whose every parameter contributes."""
    torch.manual_seed(0)
    model = ZigMa(**{**SMALL, "num_classes": 3, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="session")
def denoiser() -> ZigMa:
    """With classes 0, 1, 2 and a null class."""
    return make_denoiser()


@pytest.fixture(scope="session")
def unconditional() -> ZigMa:
    """Without classes, three channels."""
    return make_denoiser(num_classes=0, in_channels=3)


@pytest.fixture(scope="session")
def kl() -> AutoencoderKL:
    """8x8 RGB to 4x4 latents of four channels, with a scale and a shift."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


@pytest.fixture(scope="session")
def taesd() -> AutoencoderTiny:
    """16x16 RGB to 4x4 latents of four channels."""
    torch.manual_seed(1)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()


@pytest.fixture
def make_pipe(denoiser: ZigMa) -> Callable[..., ClassConditionalImagePipeline]:
    """A quiet pipeline of the class-conditional denoiser (or another) with a scheduler."""

    def make(scheduler: SchedulerMixin | None = None, model: ZigMa = denoiser, **components: object) -> object:
        pipe = ClassConditionalImagePipeline(model, scheduler or FlowObjective().scheduler(), **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
