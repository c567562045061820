"""The denoisers, one file per paper, and what reads their captions."""

from genssm.models.dim import DIM_PRESETS, DiM
from genssm.models.dimsum import DIMSUM_PRESETS, DiMSUM
from genssm.models.mld import MLD, MLD_PRESETS
from genssm.models.motion_alignment import MotionAlignment
from genssm.models.motion_mamba import MOTION_MAMBA_PRESETS, MotionMamba
from genssm.models.motion_mamba_frames import MOTION_MAMBA_FRAMES_PRESETS, MotionMambaFrames
from genssm.models.motion_vae import MOTION_VAE_PRESETS, MotionVAE
from genssm.models.text_encoder import TextEncoder
from genssm.models.tokenizer import CaptionTokenizer
from genssm.models.zigma import ZIGMA_PRESETS, ZigMa

MODELS = {
    "dim": DiM,
    "dimsum": DiMSUM,
    "mld": MLD,
    "motion_mamba": MotionMamba,
    "motion_mamba_frames": MotionMambaFrames,
    "motion_vae": MotionVAE,
    "zigma": ZigMa,
}

__all__ = [
    "DIMSUM_PRESETS",
    "DIM_PRESETS",
    "MLD",
    "MLD_PRESETS",
    "MODELS",
    "MOTION_MAMBA_FRAMES_PRESETS",
    "MOTION_MAMBA_PRESETS",
    "MOTION_VAE_PRESETS",
    "ZIGMA_PRESETS",
    "CaptionTokenizer",
    "DiM",
    "DiMSUM",
    "MotionAlignment",
    "MotionMamba",
    "MotionMambaFrames",
    "MotionVAE",
    "TextEncoder",
    "ZigMa",
]
