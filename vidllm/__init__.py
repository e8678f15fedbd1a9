"""Vid-LLM: from a plain video of a room to answers, 3D boxes, captions and a metric reconstruction.

Public names are imported on first use, so that `import vidllm` costs nothing and does not import torch.
"""

import importlib
from typing import Any


__version__ = "0.1.0.dev0"

_MODULE_OF = {
    "VidLLMConfig": "vidllm.modeling_vidllm.configuration_vidllm",
    "VidLLMModel": "vidllm.modeling_vidllm.modeling_vidllm",
    "VidLLMForConditionalGeneration": "vidllm.modeling_vidllm.modeling_vidllm",
    "VidLLMScene": "vidllm.modeling_vidllm.scene_vidllm",
    "VidLLMReconstruction": "vidllm.modeling_vidllm.scene_vidllm",
    "VidLLMProcessor": "vidllm.processing.processing_vidllm",
    "VidLLMVideoProcessor": "vidllm.processing.video_processing_vidllm",
}

__all__ = [
    "VidLLMConfig",
    "VidLLMForConditionalGeneration",
    "VidLLMModel",
    "VidLLMProcessor",
    "VidLLMReconstruction",
    "VidLLMScene",
    "VidLLMVideoProcessor",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vidllm' has no attribute {name!r}")
    importlib.import_module("vidllm.registration").register_auto_classes()
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULE_OF))
