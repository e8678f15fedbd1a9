"""Make transformers' Auto classes return this package's classes; called once, on first use of a public name."""

import functools


@functools.cache
def register_auto_classes() -> None:
    """Register config, model and processor with transformers.

    Once registered, `AutoModel.from_pretrained` uses these classes for a `vidllm` checkpoint, with and without
    `trust_remote_code`; without this package installed, the code files inside the checkpoint serve.

    Source:
        Upstream: huggingface/transformers `AutoConfig.register` and its siblings.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
    from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
    from vidllm.processing.processing_vidllm import VidLLMProcessor
    from vidllm.processing.video_processing_vidllm import VidLLMVideoProcessor

    AutoConfig.register(VidLLMConfig.model_type, VidLLMConfig)
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
        auto_class.register(VidLLMConfig, VidLLMForConditionalGeneration)
    AutoProcessor.register(VidLLMConfig, VidLLMProcessor)
    # AutoImageProcessor.register insists on BaseImageProcessor, whose torch version needs torchvision; the map behind it does not
    IMAGE_PROCESSOR_MAPPING.register(VidLLMConfig, {"pil": VidLLMVideoProcessor})


__all__ = ["register_auto_classes"]
