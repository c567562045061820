"""The one place that tells diffusers about this library, so that saved pipelines load again.

diffusers writes the library and the class of every component into ``model_index.json``. Of a library it does not know
it writes the full module path, which breaks when a file moves and which the Hub loader refuses. Registered, a component
is saved as ``["genssm", "ZigMa"]`` and looked up as an attribute of ``genssm``.
"""

import logging

LIBRARY = "genssm"
_METHODS = ["save_pretrained", "from_pretrained"]

logger = logging.getLogger(LIBRARY)


def register_library() -> bool:
    """Enter ``genssm`` into diffusers' table of loadable libraries; repeated calls change nothing.

    Returns:
        Whether diffusers has that table. It is not part of its public interface: without it pipelines still run, and
        saving writes module paths.
    """
    try:
        from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
    except ImportError:
        logger.warning("this diffusers has no table of loadable libraries; saved pipelines will name module paths")
        return False
    bases = ("ModelMixin", "SchedulerMixin", "CaptionTokenizer")
    LOADABLE_CLASSES[LIBRARY] = {base: list(_METHODS) for base in bases}
    # Loading looks base classes up by name here, and diffusers knows no tokenizer but those of transformers.
    ALL_IMPORTABLE_CLASSES["CaptionTokenizer"] = list(_METHODS)
    return True
