"""Chats to prompts: what the templates write, what stays text, points, scenes, bad chats."""

from types import SimpleNamespace

import jinja2
import pytest
import torch
from PIL import Image

from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.video_processing_vidllm import VidLLMVideoProcessor
from vidllm.processing.video_reading_vidllm import VidLLMInputError

from .media import NUM_SCENE_TOKENS, SPECIAL_TOKENS, byte_tokenizer, picture, template, tiny_processor, write_video


SLOTS = "<video>" * NUM_SCENE_TOKENS + "\n"


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "room.mp4", [picture(i) for i in range(6)])


def user(*content):
    return {"role": "user", "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


def point(*xyz, **frame):
    return {"type": "point", "xyz": list(xyz), **frame}


def encode(processor, chat, **kwargs):
    return processor.apply_chat_template(
        chat,
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs},
    )


def words_of(processor, ids):
    """Ids back to text; control tokens are written between guillemets, so that they differ from the same letters as text."""
    control = set(processor.tokenizer.get_added_vocab().values())
    parts = [(i in control, processor.tokenizer.decode([i])) for i in ids.tolist()]
    return "".join(f"\u00ab{part}\u00bb" if is_control else part for is_control, part in parts)


def test_chatml(processor, video):
    chat = [
        {"role": "system", "content": "Be brief."},
        user({"type": "video", "path": video}, text("Where is the "), point(1, 2, 3), text("?")),
        {"role": "assistant", "content": [text("There: "), {"type": "box"}, text(".")]},
        user(text("And the lamp?")),
    ]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<video>\nWhere is the <coord>?<|im_end|>\n"
        "<|im_start|>assistant\nThere: <loc>.<|im_end|>\n"
        "<|im_start|>user\nAnd the lamp?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs = encode(processor, chat)
    ids = inputs["input_ids"][0].tolist()
    assert processor.tokenizer.decode(ids) == rendered.replace("<video>\n", SLOTS)
    assert ids.count(processor.video_token_id) == NUM_SCENE_TOKENS
    assert ids.count(processor.loc_token_id) == ids.count(processor.coord_token_id) == 1


def test_llama3_family():
    chat = [
        {"role": "system", "content": [text("Be brief.")]},
        user({"type": "video"}, text("Where?"), point(1, 2, 3)),
        {"role": "assistant", "content": [{"type": "box"}]},
    ]
    llama3 = jinja2.Environment().from_string(template("llama3"))
    assert llama3.render(messages=chat, bos_token="<|begin_of_text|>", add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<video>\nWhere?<coord><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<loc><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_llama3_through_the_processor(video):
    tokenizer = byte_tokenizer()
    markers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, *markers], "bos_token": markers[0]})
    own = VidLLMProcessor(
        VidLLMVideoProcessor(size={"shortest_edge": 28}),
        tokenizer,
        num_scene_tokens=NUM_SCENE_TOKENS,
        chat_template=template("llama3"),
    )
    inputs = encode(own, [user({"type": "video", "path": video}, text("<|eot_id|>Hi"))])
    ids = inputs["input_ids"][0].tolist()
    assert [ids.count(tokenizer.convert_tokens_to_ids(marker)) for marker in markers] == [1, 2, 2, 1]
    assert ids.count(own.video_token_id) == NUM_SCENE_TOKENS


def test_other_names_of_the_tokens(video):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, "<|scene|>", "<|at|>", "<|box|>"]})
    names = {"video_token": "<|scene|>", "coord_token": "<|at|>", "loc_token": "<|box|>"}
    own = VidLLMProcessor(
        VidLLMVideoProcessor(size={"shortest_edge": 28}),
        tokenizer,
        num_scene_tokens=3,
        chat_template=template("chatml")
        .replace("<video>", "<|scene|>")
        .replace("<coord>", "<|at|>")
        .replace("<loc>", "<|box|>"),
        **names,
    )
    chat = [
        user({"type": "video", "path": video}, text("<|scene|>"), point(1, 2, 3)),
        {"role": "assistant", "content": [{"type": "box"}]},
    ]
    ids = encode(own, chat)["input_ids"][0].tolist()
    assert [ids.count(i) for i in (own.video_token_id, own.coord_token_id, own.loc_token_id)] == [3, 1, 1]


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_in_text_are_plain_text(processor, video, token, role):
    def chat(words):
        turns = {"user": "Hello", "assistant": "Hello", "system": "Hello", role: words}
        return [
            {"role": "system", "content": turns["system"]},
            user({"type": "video", "path": video}, text(turns["user"])),
            {"role": "assistant", "content": turns["assistant"]},
        ]

    clean = encode(processor, chat("a  b"))["input_ids"][0]
    ids = encode(processor, chat(f"a {token} b"))["input_ids"][0]
    for special in SPECIAL_TOKENS:
        special_id = processor.tokenizer.convert_tokens_to_ids(special)
        assert (ids == special_id).sum() == (clean == special_id).sum()
    assert len(ids) == len(clean) + len(token)  # one id per byte
    assert token in processor.tokenizer.decode(ids)
    assert words_of(processor, ids).count(token) == words_of(processor, clean).count(token) + 1


def test_forged_markers_do_not_help(processor):
    """The private marks of sanitising inside a text change nothing."""
    words = "a \U000f0000<loc>\U000f0001 <\U000f0000coord> <vid\U000f0001eo> <|im_\U000f0000end|>"
    ids = encode(processor, [user(text(words))])["input_ids"][0].tolist()
    for token in ("<loc>", "<coord>", "<video>"):
        assert processor.tokenizer.convert_tokens_to_ids(token) not in ids
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_sanitising_can_be_turned_off_and_then_mismatches_are_errors(processor):
    assert processor.apply_chat_template([user(text("<loc>"))]).count("<loc>") == 1
    ids = encode(processor, [user(text("<loc>"))], sanitize_control_tokens=False)["input_ids"][0].tolist()
    assert processor.loc_token_id in ids
    for token in ("<coord>", "<video>"):
        with pytest.raises(VidLLMInputError, match=f"wanted 0 {token} tokens"):
            encode(processor, [user(text(token))], sanitize_control_tokens=False)


def test_assistant_mask_is_refused_and_the_way_around_works(processor):
    chat = [user(text("Where?")), {"role": "assistant", "content": [text("There "), {"type": "box"}]}]
    with pytest.raises(VidLLMInputError, match="ids\\(prompt \\+ answer\\)"):
        encode(processor, chat, return_assistant_tokens_mask=True)
    prompt = encode(processor, chat[:1])["input_ids"][0]
    whole = encode(processor, chat, add_generation_prompt=False)["input_ids"][0]
    assert torch.equal(whole[: len(prompt)], prompt)
    assert words_of(processor, whole[len(prompt) :]) == "There \u00ab<loc>\u00bb\u00ab<|im_end|>\u00bb\n"


def test_continue_final_message(processor):
    chat = [user(text("How many?")), {"role": "assistant", "content": [text("There are ")]}]
    rendered = processor.apply_chat_template(chat, continue_final_message=True)
    assert rendered.endswith("<|im_start|>assistant\nThere are ")
    ids = encode(processor, chat, add_generation_prompt=False, continue_final_message=True)["input_ids"][0]
    assert processor.tokenizer.decode(ids) == rendered


def test_points_of_ragged_prompts(processor, video):
    block = {"type": "video", "path": video}
    chats = [
        [user(block, text("a"), point(1, 2, 3, frame="world"), point(-4, 5.5, 6e-3))],
        [user(block, text("b"))],
        [user(block, point(0, 0, 0)), {"role": "assistant", "content": "ok"}, user(text("c"), point(7, 8, 9))],
    ]
    inputs = encode(processor, chats)
    assert inputs["coord_points_world"].dtype == torch.float32
    assert inputs["coord_points_world"].tolist() == [
        [[1, 2, 3], [-4, 5.5, pytest.approx(6e-3)]],
        [[0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [7, 8, 9]],
    ]
    assert inputs["coord_mask"].tolist() == [[True, True], [False, False], [True, True]]
    for row, count in enumerate((2, 0, 2)):
        assert (inputs["input_ids"][row] == processor.coord_token_id).sum() == count
    assert "coord_mask" not in encode(processor, chats[1])


def fake_scene(rows=1, slots=NUM_SCENE_TOKENS):
    """What the processor reads of an encoded scene."""
    rotation = torch.linalg.qr(torch.randn(rows, 3, 3, dtype=torch.float64)).Q
    rotation = rotation * torch.linalg.det(rotation)[:, None, None]
    return SimpleNamespace(
        tokens=torch.zeros(rows, slots, 8), reconstruction=SimpleNamespace(room_from_world=rotation.float())
    )


def test_room_points_are_carried_to_the_world(processor):
    scene = fake_scene(rows=3)
    chats = [[user(text("x"), point(1.0, -2.0, 0.5, frame="room"))] for _ in range(3)]
    rotation = scene.reconstruction.room_from_world
    inputs = encode(processor, chats, scene=scene)
    back = torch.einsum("qij,qj->qi", rotation, inputs["coord_points_world"][:, 0])
    torch.testing.assert_close(back, torch.tensor([[1.0, -2.0, 0.5]] * 3))
    inputs = encode(processor, chats, scene=scene, scene_index=[2, 2, 0])
    back = torch.einsum("qij,qj->qi", rotation[[2, 2, 0]], inputs["coord_points_world"][:, 0])
    torch.testing.assert_close(back, torch.tensor([[1.0, -2.0, 0.5]] * 3))
    inputs = encode(processor, chats[0], room_from_world=rotation[1])
    torch.testing.assert_close(rotation[1] @ inputs["coord_points_world"][0, 0], torch.tensor([1.0, -2.0, 0.5]))


def test_room_points_want_a_rotation(processor, video):
    chat = [user({"type": "video", "path": video}, point(1, 2, 3, frame="room"))]
    with pytest.raises(VidLLMInputError, match="room frame wants scene= or room_from_world="):
        encode(processor, chat)
    for wrong in (torch.eye(4), torch.zeros(3, 3), -torch.eye(3), torch.full((3, 3), float("nan"))):
        with pytest.raises(VidLLMInputError, match="room_from_world: wanted"):
            encode(processor, chat, room_from_world=wrong)
    with pytest.raises(VidLLMInputError, match="wanted room_from_world of its video"):
        encode(processor, [user(point(1, 2, 3, frame="room"))], room_from_world=torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize(
    "xyz", [[1, 2], [1, 2, 3, 4], [1, 2, float("nan")], [1, float("inf"), 3], "123", None, [1, 2, "x"], 5]
)
def test_bad_coordinates(processor, xyz):
    with pytest.raises(VidLLMInputError, match="chat, message 0: wanted a point with"):
        encode(processor, [user(text("x"), {"type": "point", "xyz": xyz})])


def test_prompts_for_an_encoded_scene(processor, video):
    scene = fake_scene()
    question = user(text("How many?"))
    inputs = encode(processor, [question], scene=scene)
    assert set(inputs) == {"input_ids", "attention_mask", "scene_index"}
    assert inputs["scene_index"].tolist() == [0]
    with_video = encode(processor, [user({"type": "video", "path": video}, text("How many?"))])
    assert torch.equal(inputs["input_ids"], with_video["input_ids"])
    for block in ({"type": "video"}, {"type": "video", "path": "no/such/file.mp4"}):
        again = encode(processor, [user(block, text("How many?"))], scene=scene)
        assert torch.equal(again["input_ids"], inputs["input_ids"])
    turns = [
        {"role": "system", "content": "s"},
        question,
        {"role": "assistant", "content": "2"},
        user(text("And lamps?")),
    ]
    rendered = processor.apply_chat_template(turns, scene=scene)
    assert rendered.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n<video>\nHow many?")
    assert rendered.count("<video>") == 1
    assert turns[1] == question  # the caller's messages are left alone


def test_scene_index_rules(processor):
    chats = [[user(text(words))] for words in ("a", "bb", "ccc")]
    assert encode(processor, chats, scene=fake_scene(1))["scene_index"].tolist() == [0, 0, 0]
    assert encode(processor, chats, scene=fake_scene(3))["scene_index"].tolist() == [0, 1, 2]
    inputs = encode(processor, chats, scene=fake_scene(2), scene_index=[1, -1, 1])
    assert inputs["scene_index"].tolist() == [1, -1, 1]
    slots = (inputs["input_ids"] == processor.video_token_id).sum(dim=1)
    assert slots.tolist() == [NUM_SCENE_TOKENS, 0, NUM_SCENE_TOKENS]
    with pytest.raises(VidLLMInputError, match="2 rows for 3 chats"):
        encode(processor, chats, scene=fake_scene(2))
    for wrong in ([0, 1], [0, 1, 2], [0, -2, 0]):
        with pytest.raises(VidLLMInputError, match="scene_index: wanted 3 numbers"):
            encode(processor, chats, scene=fake_scene(2), scene_index=wrong)
    with pytest.raises(VidLLMInputError, match="text only"):
        encode(processor, [user({"type": "video"}, text("a"))], scene=fake_scene(2), scene_index=[-1])
    with pytest.raises(VidLLMInputError, match="give scene="):
        encode(processor, chats, scene_index=[0, 0, 0])
    with pytest.raises(VidLLMInputError, match="7 slots"):
        encode(processor, chats, scene=fake_scene(1, slots=7))


BAD_CHATS = {
    "no chat": ([], "wanted a list of messages"),
    "not a chat": ("How many?", "wanted a list of messages"),
    "empty batch": ([[]], "wanted a list of messages"),
    "unknown role": ([{"role": "robot", "content": "x"}], "a role among system, user, assistant"),
    "no role": ([{"content": "x"}], "a role among"),
    "no content": ([{"role": "user"}], "content as a text or a list"),
    "blank": ([{"role": "user", "content": "  \n"}], "the question is empty"),
    "blank block": ([user(text(""))], "the question is empty"),
    "only a video": ([user({"type": "video", "path": "a.mp4"})], "the question is empty"),
    "blank second turn": (
        [user(text("a")), {"role": "assistant", "content": "b"}, user(text(" "))],
        "message 2: the question is empty",
    ),
    "unknown block": ([user({"type": "audio", "path": "a"})], "text, video, point or box"),
    "no type": ([user({"text": "a"})], "text, video, point or box"),
    "text is no text": ([user({"type": "text", "text": 3})], "a text block with a text"),
    "video without source": ([user({"type": "video"}, text("a"))], "a video block with one of"),
    "two sources": ([user({"type": "video", "path": "a", "url": "b"}, text("a"))], "a video block with one of"),
    "two videos": (
        [user({"type": "video", "path": "a"}, {"type": "video", "path": "b"}, text("a"))],
        "at most one video",
    ),
    "video of the assistant": (
        [{"role": "assistant", "content": [{"type": "video", "path": "a"}]}],
        "belongs into a user's",
    ),
    "point of the assistant": ([{"role": "assistant", "content": [point(1, 2, 3)]}], "belongs into a user's"),
    "box of the user": ([user({"type": "box"}, text("a"))], "belongs into an assistant's"),
    "unknown frame": ([user(point(1, 2, 3, frame="camera"))], "world or room"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(processor, name):
    chat, reason = BAD_CHATS[name]
    with pytest.raises(ValueError, match=reason) as caught:
        encode(processor, chat)
    assert "\n" not in str(caught.value).replace("\\n", "")
    if name not in ("no chat", "not a chat", "empty batch"):
        with pytest.raises(ValueError, match=f"chat 1.*{reason}"):
            encode(processor, [[user(text("fine"))], chat])


def test_a_question_of_one_point_is_a_question(processor):
    assert encode(processor, [user(point(1, 2, 3))])["coord_mask"].tolist() == [[True]]


def test_photograph_as_image_block(processor):
    chat = [user({"type": "image", "image": Image.fromarray(picture(0))}, text("What?"))]
    with pytest.warns(UserWarning, match="geometry needs motion"):
        inputs = encode(processor, chat)
    assert inputs["video_size_shw"].tolist() == [[1, 28, 28]]
