"""The models, one file per paper, and what reads captions."""

from genssm.models.aim import AIM_PRESETS, AiM
from genssm.models.dim import DIM_PRESETS, DiM
from genssm.models.dimsum import DIMSUM_PRESETS, DiMSUM
from genssm.models.maskmamba import MaskMamba
from genssm.models.mld import MLD, MLD_PRESETS
from genssm.models.motion_alignment import MotionAlignment
from genssm.models.motion_mamba import MOTION_MAMBA_PRESETS, MotionMamba
from genssm.models.motion_mamba_frames import MOTION_MAMBA_FRAMES_PRESETS, MotionMambaFrames
from genssm.models.motion_vae import MOTION_VAE_PRESETS, MotionVAE
from genssm.models.text_encoder import TextEncoder
from genssm.models.tokenizer import CaptionTokenizer
from genssm.models.vq import VQ_PRESETS, VQTokenizer
from genssm.models.zigma import ZIGMA_PRESETS, ZigMa

MODELS = {
    "aim": AiM,
    "dim": DiM,
    "dimsum": DiMSUM,
    "maskmamba": MaskMamba,
    "mld": MLD,
    "motion_mamba": MotionMamba,
    "motion_mamba_frames": MotionMambaFrames,
    "motion_vae": MotionVAE,
    "vq": VQTokenizer,
    "zigma": ZigMa,
}

__all__ = [
    "AIM_PRESETS",
    "DIMSUM_PRESETS",
    "DIM_PRESETS",
    "MLD",
    "MLD_PRESETS",
    "MODELS",
    "MOTION_MAMBA_FRAMES_PRESETS",
    "MOTION_MAMBA_PRESETS",
    "MOTION_VAE_PRESETS",
    "VQ_PRESETS",
    "ZIGMA_PRESETS",
    "AiM",
    "CaptionTokenizer",
    "DiM",
    "DiMSUM",
    "MaskMamba",
    "MotionAlignment",
    "MotionMamba",
    "MotionMambaFrames",
    "MotionVAE",
    "TextEncoder",
    "VQTokenizer",
    "ZigMa",
]
