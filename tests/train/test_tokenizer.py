"""Byte-level tokenizer, added tokens, chat templates."""

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vidllm.processing.rooms.samples import room_texts
from vidllm.train.presets import preset
from vidllm.train.tokenizer import (
    CHAT_TEMPLATE_FAMILIES,
    add_vidllm_tokens,
    byte_level_tokenizer,
    chat_template,
    learn_merges,
)


TOKENIZER = byte_level_tokenizer()
MERGED = byte_level_tokenizer(merges=preset("vidllm-nano").merges)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back_one_token_per_byte(text):
    # The spelling of a special token is that token; sanitising user text is the processor's part.
    assume(not any(token in text for token in TOKENIZER.all_special_tokens))
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert len(ids) == len(text.encode())
    merged = MERGED.encode(text)
    assert MERGED.decode(merged) == text
    assert len(merged) <= len(ids)


@pytest.mark.parametrize(
    "text",
    [" two  spaces ", "a .b , c n't ?", "\n\t\r\n", "St\u00fchle \u6905\u5b50 \U0001f6cb\ufe0f", "\x00\x7f\u200b", ""],
)
def test_awkward_text_comes_back(text):
    for tokenizer in (TOKENIZER, MERGED):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_word_of_the_rooms_is_one_token():
    texts = set(room_texts(seed=9, count=2))
    assert len(texts) > 100
    for text in texts:
        # Words with the space before them and marks of their own; a text starts without a space.
        assert len(MERGED.tokenize(text.strip())) <= len(re.findall(r"\w+|[^\w ]", text)), text


def test_merges_are_learned_by_use():
    assert learn_merges(["a chair", "a chair", "the chair"], 4) == learn_merges(["a chair", "a chair", "the chair"], 4)
    assert len(learn_merges(["ab ab ab"], 100)) == 2  # "ab", and " ab": there is nothing more to merge


@pytest.mark.slow
def test_the_file_of_merges_is_what_rooms_teach():
    from importlib.resources import files

    known = json.loads(files("vidllm.train").joinpath(preset("vidllm-nano").merges).read_bytes())
    assert known == learn_merges(room_texts(seed=3, count=60), 762)


@pytest.mark.parametrize("family", CHAT_TEMPLATE_FAMILIES)
def test_special_tokens(family, tmp_path):
    tokenizer = byte_level_tokenizer(family)
    ids = add_vidllm_tokens(tokenizer)
    assert list(ids) == ["video_token_id", "coord_token_id", "loc_token_id"]
    assert tokenizer.encode("a<video>b<loc><coord>")[1::2] == [ids["video_token_id"], ids["loc_token_id"]]
    assert len(tokenizer) <= 264
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    assert tokenizer(["a", "abc"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    prompt = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Where?"}]}]
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded.count(ids["video_token_id"]) == 1
    # Every mark of the template is one token: nothing but the text costs bytes.
    marks = [token for token in tokenizer.convert_ids_to_tokens(encoded) if token.startswith("<")]
    assert tokenizer.eos_token in marks
    assert all(tokenizer.encode(mark) == [tokenizer.convert_tokens_to_ids(mark)] for mark in marks)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode("x <loc> \u00e4") == tokenizer.encode("x <loc> \u00e4")
    assert (again.eos_token_id, again.pad_token_id, again.padding_side) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        "left",
    )
    assert again.chat_template == chat_template(family)


def test_adding_tokens_to_another_tokenizer_keeps_its_ids():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "chair": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    ids = add_vidllm_tokens(tokenizer)
    assert ids == {"video_token_id": 3, "coord_token_id": 4, "loc_token_id": 5}
    assert tokenizer.encode("a chair <loc>") == [1, 2, 5]
    assert add_vidllm_tokens(tokenizer) == ids  # once is enough
    assert len(tokenizer) == 6


def test_unknown_family_asks_for_one():
    for make in (chat_template, byte_level_tokenizer):
        with pytest.raises(ValueError, match=r"chatml, llama3.*got 'llama4'; did you mean 'llama3'"):
            make("llama4")
        with pytest.raises(ValueError, match=r"wanted one of chatml, llama3"):
            make("vicuna")
