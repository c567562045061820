"""Blocks that two or more models use identically."""

from genssm.layers.attention import CrossAttention
from genssm.layers.context import ContextEmbedding
from genssm.layers.embeddings import (
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    resize_positions,
    sincos_2d,
    sinusoidal_features,
    unpatchify,
)
from genssm.layers.mamba import Mamba
from genssm.layers.mamba2 import Mamba2
from genssm.layers.mixers import make_mixer, mixer_options
from genssm.layers.modulation import DropPath, LayerNorm, Modulation, Norm, RMSNorm, modulate, upcast
from genssm.layers.outputs import DenoiserOutput, TokenOutput
from genssm.layers.packing import Packing
from genssm.layers.parameter_groups import parameter_groups
from genssm.layers.text import check_text, masked_mean, read_text

__all__ = [
    "ContextEmbedding",
    "CrossAttention",
    "DenoiserOutput",
    "DropPath",
    "LabelEmbedding",
    "LayerNorm",
    "Mamba",
    "Mamba2",
    "Modulation",
    "Norm",
    "Packing",
    "PatchEmbed",
    "RMSNorm",
    "TimestepEmbedding",
    "TokenOutput",
    "check_text",
    "make_mixer",
    "masked_mean",
    "mixer_options",
    "modulate",
    "parameter_groups",
    "read_text",
    "resize_positions",
    "sincos_2d",
    "sinusoidal_features",
    "unpatchify",
    "upcast",
]
