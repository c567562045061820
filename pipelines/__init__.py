"""From a saved folder to images; importing this makes the classes known to diffusers' ``DiffusionPipeline``."""

import diffusers

from genssm.pipelines.autoregressive_image import AutoregressiveImagePipeline
from genssm.pipelines.class_conditional_image import ClassConditionalImagePipeline
from genssm.pipelines.masked_image import MaskedImagePipeline
from genssm.pipelines.motion_reconstruction import MotionReconstructionPipeline
from genssm.pipelines.reconstruction import ReconstructionPipeline
from genssm.pipelines.text_to_image import TextToImagePipeline
from genssm.pipelines.text_to_motion import TextToMotionPipeline
from genssm.pipelines.upsampling import DiMUpsamplingPipeline
from genssm.pipelines.video import VideoPipeline
from genssm.registration import register_library

__all__ = [
    "AutoregressiveImagePipeline",
    "ClassConditionalImagePipeline",
    "DiMUpsamplingPipeline",
    "MaskedImagePipeline",
    "MotionReconstructionPipeline",
    "ReconstructionPipeline",
    "TextToImagePipeline",
    "TextToMotionPipeline",
    "VideoPipeline",
]

register_library()
for _name in __all__:
    # DiffusionPipeline.from_pretrained looks a pipeline class up by its name on the diffusers module.
    setattr(diffusers, _name, globals()[_name])
