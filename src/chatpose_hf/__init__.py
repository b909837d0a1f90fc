"""ChatPose on Hugging Face: a LLaVA that answers with 3D human poses."""

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING


try:
    __version__ = version("chatpose_hf")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

# The folder of the small checkpoint that comes with the package (its README.md is its card), for `from_pretrained`.
CHATPOSE_TINY = str(Path(__file__).parent / "assets" / "chatpose-tiny")

_EXPORTS = {
    "ChatPoseConfig": "configuration_chatpose",
    "ChatPoseForConditionalGeneration": "modeling_chatpose",
    "ChatPoseGenerateOutput": "modeling_chatpose",
    "ChatPoseOutput": "modeling_chatpose",
    "ChatPosePipeline": "pipeline_chatpose",
    "ChatPoseProcessor": "processing_chatpose",
    "ChatPoseTokenizer": "tokenization_chatpose",
    "vicuna_chat_template": "processing_chatpose",
}

if TYPE_CHECKING:
    from .configuration_chatpose import ChatPoseConfig
    from .modeling_chatpose import ChatPoseForConditionalGeneration, ChatPoseGenerateOutput, ChatPoseOutput
    from .pipeline_chatpose import ChatPosePipeline
    from .processing_chatpose import ChatPoseProcessor, vicuna_chat_template
    from .tokenization_chatpose import ChatPoseTokenizer

__all__ = [
    "CHATPOSE_TINY",
    "ChatPoseConfig",
    "ChatPoseForConditionalGeneration",
    "ChatPoseGenerateOutput",
    "ChatPoseOutput",
    "ChatPosePipeline",
    "ChatPoseProcessor",
    "ChatPoseTokenizer",
    "__version__",
    "register_auto_classes",
    "vicuna_chat_template",
]


@cache
def register_auto_classes() -> None:
    """Makes `AutoConfig`, `AutoModel...`, `AutoTokenizer`, `AutoProcessor` and `pipeline` know ChatPose without remote code."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer
    from transformers.models.auto import modeling_auto

    from . import configuration_chatpose, modeling_chatpose, processing_chatpose, tokenization_chatpose

    config_class = configuration_chatpose.ChatPoseConfig
    AutoConfig.register("chatpose", config_class, exist_ok=True)
    AutoTokenizer.register(config_class, tokenization_chatpose.ChatPoseTokenizer, exist_ok=True)
    AutoProcessor.register(config_class, processing_chatpose.ChatPoseProcessor, exist_ok=True)
    for name in modeling_chatpose.AUTO_CLASSES:
        auto_class = getattr(modeling_auto, name)
        auto_class.register(config_class, modeling_chatpose.ChatPoseForConditionalGeneration, exist_ok=True)


def __getattr__(name: str):
    if name in _EXPORTS:
        register_auto_classes()
        # Kept, so that Python finds it by itself the next time.
        globals()[name] = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
