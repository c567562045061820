"""The denoisers, one file per paper, and what reads their captions."""

from genssm.models.dim import DIM_PRESETS, DiM
from genssm.models.dimsum import DIMSUM_PRESETS, DiMSUM
from genssm.models.text_encoder import TextEncoder
from genssm.models.tokenizer import CaptionTokenizer
from genssm.models.zigma import ZIGMA_PRESETS, ZigMa

MODELS = {"dim": DiM, "dimsum": DiMSUM, "zigma": ZigMa}

__all__ = [
    "DIMSUM_PRESETS",
    "DIM_PRESETS",
    "MODELS",
    "ZIGMA_PRESETS",
    "CaptionTokenizer",
    "DiM",
    "DiMSUM",
    "TextEncoder",
    "ZigMa",
]
