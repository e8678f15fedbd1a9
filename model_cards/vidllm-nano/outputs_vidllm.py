"""What one forward pass returns: all that the losses and the public methods need.

Shapes: B videos, Q prompts, S frames, H W pixels, L text tokens, G `<loc>` tokens.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .grounding_vidllm import VidLLMGroundingOutput
from .reconstruction_vidllm import VidLLMRawReconstruction
from .scene_vidllm import VidLLMScene


@dataclass
class VidLLMModelOutput(ModelOutput):
    """Outputs of [`VidLLMModel`]: what the losses and the public methods need, in one forward.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(prompts, tokens, size)`, *optional*): Language model, after its final norm.
        past_key_values (`Cache`, *optional*): Language model's cache.
        hidden_states (`tuple(torch.Tensor)`, *optional*): Language model's layers, each `(prompts, tokens, size)`.
        attentions (`tuple(torch.Tensor)`, *optional*): Language model's attention weights.
        attention_mask (`torch.Tensor` of shape `(prompts, tokens)`, int64, *optional*): The caller's mask with empty slots masked;
            extend this one when decoding by hand.
        scene (`VidLLMScene`, *optional*): The scene that was encoded or given.
        raw_reconstruction (`VidLLMRawReconstruction`, *optional*): Raw, relative, with gradient: for losses.
        metric_depth_m (`torch.Tensor` of shape `(batch, frames, height, width)`, *optional*): Metric head's own depth, metres.
        grounding (`VidLLMGroundingOutput`, *optional*): One row per `<loc>` token.
        loc_index (`torch.Tensor` of shape `(G, 2)`, int64, *optional*): Prompt and position of each `<loc>` token.
        scene_index (`torch.Tensor` of shape `(prompts,)`, int64, *optional*): Row of the scene of each prompt, -1 = text only.
        geom_tokens (`torch.Tensor` of shape `(batch, frames, patches, encoder_width)`, *optional*): Adapter's stream to the reconstruction,
            with `output_adapter_tokens`; rows of patches of smaller videos are padded with 0 at the end.
        lang_tokens (`torch.Tensor` of shape `(batch, frames, patches, encoder_width)`, *optional*): Adapter's stream to the language model.

    Source:
        Ours: DDP and FSDP want a single forward.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    attention_mask: torch.Tensor | None = None
    scene: VidLLMScene | None = None
    raw_reconstruction: VidLLMRawReconstruction | None = None
    metric_depth_m: torch.Tensor | None = None
    grounding: VidLLMGroundingOutput | None = None
    loc_index: torch.Tensor | None = None
    scene_index: torch.Tensor | None = None
    geom_tokens: torch.Tensor | None = None
    lang_tokens: torch.Tensor | None = None


@dataclass
class VidLLMLossAndLogits(ModelOutput):
    """What comes first in [`VidLLMOutput`], so that as a tuple it begins like those of transformers' models.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Next-token loss where `labels` are given.
        logits (`torch.Tensor` of shape `(prompts, kept tokens, vocabulary)`, *optional*): Next-token scores.

    Source:
        Ours: fields of a base class that stands further right come first.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass
class VidLLMOutput(VidLLMModelOutput, VidLLMLossAndLogits):
    """Outputs of [`VidLLMForConditionalGeneration`]: loss and logits, then those of the model.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Next-token loss where `labels` are given.
        logits (`torch.Tensor` of shape `(prompts, kept tokens, vocabulary)`, *optional*): Next-token scores.

    Source:
        Ours: names as in transformers' composite models.
    """


__all__ = ["VidLLMModelOutput", "VidLLMOutput"]
