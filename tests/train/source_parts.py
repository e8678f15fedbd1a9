"""Small pretrained parts as their authors save them, for the tests of starting checkpoints."""

import os

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from vidllm.train.vggt_weights import vggt_key_map


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DECODERS = {
    "qwen2": ("qwen2", CHATML, {}),
    "qwen3": ("qwen3", CHATML, {"head_dim": 12}),
    "llama": ("llama", LLAMA3, {}),
    "smollm3": ("smollm3", CHATML, {"no_rope_layers": [1, 0]}),
}


def tokenizer_with(marks):
    """Bytes and turn marks, as a language model's folder has them."""
    vocabulary = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=marks[0])


def save_decoder(folder, kind, tied, vocab_size=264):
    """A language model with every parameter random, as transformers saves it."""
    model_type, marks, more = DECODERS[kind]
    config = AutoConfig.for_model(
        model_type, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocab_size, max_position_embeddings=512, tie_word_embeddings=tied, pad_token_id=256, **more,
    )  # fmt: skip
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer_with(marks).save_pretrained(folder)
    return model


def vggt_of(model):
    """VGGT's tensors under VGGT's names, of a model of ours; with a bit of the heads that are left out."""
    state = model.model.state_dict()
    tensors = {
        key: torch.cat([state[name] for name, _ in rule.targets]).clone()
        for key, rule in vggt_key_map(model.config).items()
    }
    return {**tensors, "point_head.norm.weight": torch.ones(64), "track_head.tracker.mask_token": torch.ones(3)}


def nothing_left(folder):
    assert not folder.exists()
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.")]


class Trap:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)
