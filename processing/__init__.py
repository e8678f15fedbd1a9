"""Videos, chats and given geometry in; model inputs out. The `*_vidllm.py` files here also ship inside checkpoints."""

from pathlib import Path


CHAT_TEMPLATES = {"chatml": "chat_template.jinja", "llama3": "chat_template_llama3.jinja"}
FAMILY_OF_MODEL_TYPE = {"qwen2": "chatml", "qwen3": "chatml", "smollm3": "chatml", "llama": "llama3"}


def chat_template_for(
    name: str, video_token: str = "<video>", coord_token: str = "<coord>", loc_token: str = "<loc>"
) -> str:
    """The chat template for a family of language models; chosen when a checkpoint is made.

    Args:
        name (`str`): A family (`chatml`, `llama3`) or the `model_type` of a language model.
        video_token (`str`): Placeholder of the scene.
        coord_token (`str`): Placeholder of a point.
        loc_token (`str`): Token that asks for boxes.

    Returns:
        `str`: A jinja template.

    Raises:
        ValueError: The family is unknown: a wrong template would cost accuracy in silence.

    Source:
        Ours: blocks write the placeholders, see `VidLLMProcessor.apply_chat_template`.
    """
    family = name if name in CHAT_TEMPLATES else FAMILY_OF_MODEL_TYPE.get(name)
    if family is None:
        raise ValueError(
            f"chat template: no template is known for {name!r}; choose one of {', '.join(CHAT_TEMPLATES)} or write your own"
        )
    template = (Path(__file__).parent / CHAT_TEMPLATES[family]).read_text(encoding="utf-8")
    for default, token in (("<video>", video_token), ("<coord>", coord_token), ("<loc>", loc_token)):
        template = template.replace(f"'{default}", f"'{token}")
    return template


__all__ = ["CHAT_TEMPLATES", "FAMILY_OF_MODEL_TYPE", "chat_template_for"]
