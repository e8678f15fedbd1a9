"""How each task is put to the model: our wording, and those of other works, by name. Texts only; no shapes.

A template is a text with `{question}`, `{situation}`, `{description}` (filled with the file's words) and `{point}` (a place, which
becomes a content block). The video goes before it.
"""

import difflib
import re
from dataclasses import dataclass

from vidllm.processing.video_reading_vidllm import VidLLMInputError


DEFAULT_STYLE = "vidllm"
_SLOT = re.compile(r"\{(question|situation|description|point)\}")


@dataclass(frozen=True)
class PromptStyle:
    """Templates of one work.

    Args:
        name (`str`): How it is asked for.
        templates (`dict[str, str]`): Template by task; a task that the work does not have is absent.
        source (`str`): Where the wording is from.
        capitalise (`bool`): Whether descriptions start with a capital letter and go on in small ones, in prompts and replies.

    Source:
        Ours: prompts move scores, so they have names.
    """

    name: str
    templates: dict[str, str]
    source: str
    capitalise: bool = False


_STYLES = (
    PromptStyle(
        "vidllm",
        {
            "qa": "{question}\nReply with a word or a short phrase.",
            "sqa": "{situation}\n{question}\nReply with a word or a short phrase.",
            "ground": "Find the object: {description}",
            "caption": "Describe the object at {point}, what it looks like and where it is.",
        },
        "own wording",
    ),
    PromptStyle(
        "plain",
        {"qa": "{question}", "sqa": "{situation} {question}", "ground": "{description}", "caption": "{point}"},
        "the file's words alone",
    ),
    PromptStyle(
        "video3dllm",
        {
            "qa": "{question} Answer the question simply.",
            "sqa": "{situation} {question} Answer the question using a single word or phrase.",
            "ground": "Identify the object according to the following description.\n{description}",
            "caption": "Given an object located at {point} , describe the object in detail.",
        },
        "Video-3D-LLM scripts/3d/preprocessing/process_*.py @62d518f (also 3DRS, Ross3D)",
        capitalise=True,
    ),
    PromptStyle(
        "llava3d",
        {
            "qa": "{question} Answer the question using one word or one phrase.",
            "sqa": "{situation} {question} Answer the question using one word or one phrase.",
            "caption": "The related object is located at {point}. Describe the object in detail.",
        },
        "LLaVA-3D docs/fintune_custom_data.md @d66f09e; it has no grounding prompt",
    ),
)
STYLES: dict[str, PromptStyle] = {style.name: style for style in _STYLES}


def prompt_style(name: str) -> PromptStyle:
    """A style by its name.

    Args:
        name (`str`): One of `STYLES`.

    Returns:
        `PromptStyle`

    Raises:
        VidLLMInputError: There is none of that name.

    Source:
        Ours.
    """
    if name not in STYLES:
        near = difflib.get_close_matches(str(name), STYLES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise VidLLMInputError(f"prompts: wanted one of {', '.join(STYLES)}; got {name!r}{hint}")
    return STYLES[name]


def user_turn(style: str, task: str, **words: str) -> dict:
    """A user's turn: the video, then the template with its slots filled.

    Args:
        style (`str`): Name of a style.
        task (`str`): `qa`, `sqa`, `ground` or `caption`.
        **words (`str`): What the slots hold; line ends and repeated spaces become one space.

    Returns:
        `dict`: role and content blocks.

    Raises:
        VidLLMInputError: The style does not have the task.

    Source:
        Ours: words are put in as they are and never read as a template.
    """
    chosen = prompt_style(style)
    if task not in chosen.templates:
        raise VidLLMInputError(f"prompts: {style} has none for the task {task}; it has {', '.join(chosen.templates)}")
    content: list[dict] = [{"type": "video"}]
    text = ""
    # The pattern has one group, so every second piece is the name of a slot.
    for number, piece in enumerate(_SLOT.split(chosen.templates[task])):
        if number % 2 == 0:
            text += piece
        elif piece == "point":
            if text:
                content.append({"type": "text", "text": text})
            content.append({"type": "point"})
            text = ""
        else:
            text += spoken(words[piece], chosen.capitalise and piece == "description")
    if text:
        content.append({"type": "text", "text": text})
    return {"role": "user", "content": content}


def reply_turn(text: str) -> dict:
    """An assistant's turn that is a text.

    Args:
        text (`str`): What it says.

    Returns:
        `dict`: role and content blocks.

    Source:
        Ours.
    """
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def box_turn() -> dict:
    """An assistant's turn that is one `<loc>`, whose boxes the grounding decoder finds.

    Returns:
        `dict`: role and content blocks.

    Source:
        Ours.
    """
    return {"role": "assistant", "content": [{"type": "box"}]}


def spoken(text: str, capitalise: bool = False) -> str:
    """A text of a file as it is put into a prompt or a reply: on one line.

    Args:
        text (`str`): The file's words.
        capitalise (`bool`): First letter large, all others small.

    Returns:
        `str`

    Source:
        Ours. Upstream: LaVi-Lab/Video-3D-LLM (`str.capitalize`).
    """
    text = " ".join(text.split())
    return text.capitalize() if capitalise else text


__all__ = ["DEFAULT_STYLE", "STYLES", "PromptStyle", "box_turn", "prompt_style", "reply_turn", "spoken", "user_turn"]
