"""Images, video and human motion from state-space models (Mamba), for diffusers.

Public names load on first use, so that `import genssm` is quick and needs neither Triton, a GPU, transformers,
torchvision nor clean-fid.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path

# In a checkout `kernels/` and `pipelines/` stand beside this folder; an installed genssm has them inside.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

__version__ = "0.1.0"

_HOMES = {
    "AiM": "genssm.models",
    "AutoregressiveImagePipeline": "genssm.pipelines",
    "CaptionTokenizer": "genssm.models",
    "ClassConditionalImagePipeline": "genssm.pipelines",
    "ContinuousDPMSolverScheduler": "genssm.single_step_solver",
    "DiM": "genssm.models",
    "DiMSUM": "genssm.models",
    "DiMUpsamplingPipeline": "genssm.pipelines",
    "FlowODEScheduler": "genssm.schedulers",
    "FlowSDEScheduler": "genssm.schedulers",
    "MLD": "genssm.models",
    "MODELS": "genssm.models",
    "MaskMamba": "genssm.models",
    "MaskedImagePipeline": "genssm.pipelines",
    "MotionAlignment": "genssm.models",
    "MotionMamba": "genssm.models",
    "MotionMambaFrames": "genssm.models",
    "MotionReconstructionPipeline": "genssm.pipelines",
    "MotionVAE": "genssm.models",
    "ReconstructionPipeline": "genssm.pipelines",
    "TextEncoder": "genssm.models",
    "TextToImagePipeline": "genssm.pipelines",
    "TextToMotionPipeline": "genssm.pipelines",
    "VQTokenizer": "genssm.models",
    "VideoPipeline": "genssm.pipelines",
    "ZigMa": "genssm.models",
    "build_dataset": "genssm.data",
    "causal_conv1d": "genssm.kernels.causal_conv1d",
    "frechet_distance": "genssm.metrics.frechet",
    "selective_scan": "genssm.kernels.selective_scan",
    "ssd": "genssm.kernels.ssd",
    # diffusers looks up the load methods of a component's base class in the library that the index names.
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'genssm' has no attribute {name!r}")
    return getattr(_import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
