"""Answers on stdout while they are made."""

from transformers import TextStreamer

from vidllm.cli_console import write


class PrintableStreamer(TextStreamer):
    """Writes finished words; control characters that a model makes do not reach the terminal."""

    def __init__(self, tokenizer):  # noqa: ANN001
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write the next piece; a line break at the end."""
        write(text, end="\n" if stream_end else "")
