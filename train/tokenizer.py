"""Tokenizers: one over bytes, with or without merges, and the three tokens that Vid-LLM adds to any other."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


VIDEO_TOKEN, COORD_TOKEN, LOC_TOKEN = "<video>", "<coord>", "<loc>"
VIDLLM_TOKENS = (VIDEO_TOKEN, COORD_TOKEN, LOC_TOKEN)


@dataclass(frozen=True)
class _ChatFamily:
    """Template file and the tokens that it writes."""

    template_file: str
    pad_token: str
    turn_tokens: tuple[str, ...]
    eos_token: str
    bos_token: str | None = None


_FAMILIES = {
    "chatml": _ChatFamily(
        template_file="chat_template.jinja",
        pad_token="<|endoftext|>",
        turn_tokens=("<|im_start|>", "<|im_end|>"),
        eos_token="<|im_end|>",
    ),
    "llama3": _ChatFamily(
        template_file="chat_template_llama3.jinja",
        pad_token="<|end_of_text|>",
        turn_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos_token="<|eot_id|>",
        bos_token="<|begin_of_text|>",
    ),
}
CHAT_TEMPLATE_FAMILIES = tuple(_FAMILIES)


def _family(name: str) -> _ChatFamily:
    """The family of that name, or an error that asks for one."""
    if name in _FAMILIES:
        return _FAMILIES[name]
    close = difflib.get_close_matches(str(name), _FAMILIES, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"chat template family: wanted one of {', '.join(_FAMILIES)}, the one whose marks the language model was trained with; "
        f"got {name!r}{hint}"
    )


def chat_template(family: str) -> str:
    """The chat template of a language-model family.

    Args:
        family (`str`): `chatml` (Qwen and others) or `llama3`.

    Returns:
        `str`: Jinja text.

    Raises:
        ValueError: The family is unknown; a wrong template would make a silently worse model.

    Source:
        Ours: placeholders come from content blocks only.
    """
    return files("vidllm.processing").joinpath(_family(family).template_file).read_text(encoding="utf-8")


def byte_level_tokenizer(chat_template_family: str = "chatml", merges: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer over bytes: one token per byte, pairs of tokens that a file merges, and the special tokens.

    Args:
        chat_template_family (`str`): Whose turn marks and template it has.
        merges (`str`, *optional*): Name of a JSON file of this package, a list as `learn_merges` makes it; None: bytes alone.

    Returns:
        `PreTrainedTokenizerFast`: 256 bytes at ids 0..255 (in the order of their letters), the merged tokens, then padding, turn marks, `<video>`, `<coord>`, `<loc>`;
        pads on the left; any unicode text comes back unchanged.

    Raises:
        ValueError: The family is unknown.

    Source:
        Upstream: openai/gpt-2 byte-to-unicode table and merges, through huggingface/tokenizers `ByteLevel`.
    """
    family = _family(chat_template_family)
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = []
    if merges is not None:
        pairs = [tuple(line.split(" ")) for line in json.loads(files("vidllm.train").joinpath(merges).read_bytes())]
        vocabulary.update({"".join(pair): len(vocabulary) + number for number, pair in enumerate(pairs)})
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    # Words are cut apart first where there are merges, so that none reaches over a space.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=merges is not None)
    backend.decoder = decoders.ByteLevel()
    special = [family.pad_token, *family.turn_tokens, *VIDLLM_TOKENS]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos_token,
        eos_token=family.eos_token,
        pad_token=family.pad_token,
        extra_special_tokens=[*family.turn_tokens, *VIDLLM_TOKENS],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(chat_template_family),
    )


def learn_merges(texts: Iterable[str], count: int) -> list[str]:
    """The most useful merges of bytes for some texts.

    Args:
        texts (`Iterable[str]`): What will be read and written.
        count (`int`): Merges wanted; fewer come out of texts with few different words.

    Returns:
        `list[str]`: two tokens and a space between them, in the order in which they are merged.

    Source:
        Upstream: huggingface/tokenizers `BpeTrainer`. Ours: what a small model says about rooms is a few hundred words, and one token per
        word leaves its few layers free for the room.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + count, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [" ".join(pair) for pair in merges]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, model_type: str) -> str:
    """Give a language model's own tokenizer this package's chat template, an end of turn, and padding.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Changed in place; its tokens and ids stay.
        model_type (`str`): Of the language model's config, for messages.

    Returns:
        `str`: the chat template family, told by the turn marks that the vocabulary holds.

    Raises:
        ValueError: The vocabulary holds the turn marks of no known family.

    Source:
        Ours: a template whose marks are no tokens would be spelled letter by letter, and the model would know none of it.
    """
    vocabulary = tokenizer.get_vocab()
    name = next((n for n, family in _FAMILIES.items() if set(family.turn_tokens) <= set(vocabulary)), None)
    if name is None:
        marks = "; ".join(f"{n}: {' '.join(family.turn_tokens)}" for n, family in _FAMILIES.items())
        raise ValueError(
            f"language model: wanted a tokenizer with the turn marks of a chat model ({marks}); the one of this {model_type} model has none of these"
        )
    family = _FAMILIES[name]
    own_end = tokenizer.eos_token
    tokenizer.chat_template = chat_template(name)
    tokenizer.eos_token = family.eos_token
    if tokenizer.pad_token in (None, family.eos_token):
        tokenizer.pad_token = family.pad_token if family.pad_token in vocabulary else own_end
    tokenizer.padding_side = "left"
    return name


def add_vidllm_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Add `<video>`, `<coord>` and `<loc>` to a tokenizer, where it lacks them.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Changed in place; its own tokens and ids stay.

    Returns:
        `dict[str, int]`: `video_token_id`, `coord_token_id`, `loc_token_id`, as the model's config names them.

    Raises:
        ValueError: A token is not one id afterwards.

    Source:
        Ours: as special tokens, so that a user's text can never spell one.
    """
    # As AddedTokens they also survive tokenizers that lower-case or strip.
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in VIDLLM_TOKENS], special_tokens=True
    )
    ids = {}
    for token in VIDLLM_TOKENS:
        encoded = tokenizer.encode(token, add_special_tokens=False)
        if len(encoded) != 1:
            raise ValueError(f"tokenizer: wanted one id for {token}; got {encoded}")
        ids[f"{token.strip('<>')}_token_id"] = encoded[0]
    return ids
