"""The models, one file per paper, and what reads captions."""

from genssm.models.aim import AIM_PRESETS, AiM
from genssm.models.dim import DIM_PRESETS, DiM
from genssm.models.dimsum import DIMSUM_PRESETS, DiMSUM
from genssm.models.maskmamba import MaskMamba
from genssm.models.text_encoder import TextEncoder
from genssm.models.tokenizer import CaptionTokenizer
from genssm.models.vq import VQ_PRESETS, VQTokenizer
from genssm.models.zigma import ZIGMA_PRESETS, ZigMa

MODELS = {
    "aim": AiM,
    "dim": DiM,
    "dimsum": DiMSUM,
    "maskmamba": MaskMamba,
    "vq": VQTokenizer,
    "zigma": ZigMa,
}

__all__ = [
    "AIM_PRESETS",
    "DIMSUM_PRESETS",
    "DIM_PRESETS",
    "MODELS",
    "VQ_PRESETS",
    "ZIGMA_PRESETS",
    "AiM",
    "CaptionTokenizer",
    "DiM",
    "DiMSUM",
    "MaskMamba",
    "TextEncoder",
    "VQTokenizer",
    "ZigMa",
]
