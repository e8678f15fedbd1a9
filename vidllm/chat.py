"""A conversation about one encoded scene."""

from typing import TYPE_CHECKING, Any

from vidllm.commands import Answer, PromptTooLongError, answer_batch, check_texts


if TYPE_CHECKING:
    from vidllm import VidLLMForConditionalGeneration, VidLLMProcessor, VidLLMScene


class ChatSession:
    """Questions that may refer to earlier answers; the scene's own prefix is computed once.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        processor (`VidLLMProcessor`): Of the model.
        scene (`VidLLMScene`): Of one video.
        max_new_tokens (`int`, *optional*): Longest answer; the checkpoint's own number if not given.

    Source:
        Ours.
    """

    def __init__(
        self,
        model: "VidLLMForConditionalGeneration",
        processor: "VidLLMProcessor",
        scene: "VidLLMScene",
        max_new_tokens: int | None = None,
    ):
        self.model, self.processor, self.scene = model, processor, scene
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, Any]] = []
        self.num_forgotten = 0

    def ask(self, question: str, streamer: Any = None) -> Answer:
        """Take one turn.

        Args:
            question (`str`): Not empty.
            streamer (`TextStreamer`, *optional*): Is given each token at once.

        Returns:
            `Answer`: also kept as history. Where everything together is too long for the model, the oldest turns are forgotten
            and counted in `num_forgotten`.

        Raises:
            ValueError: The question is empty, or too long by itself.
        """
        check_texts([question], "question")
        turn = {"role": "user", "content": [{"type": "text", "text": question}]}
        history = list(self.messages)
        while True:
            try:
                results = answer_batch(
                    self.model, self.processor, self.scene, [[*history, turn]], self.max_new_tokens, streamer
                )
                break
            except PromptTooLongError:
                if not history:
                    raise
                # A question and its answer.
                history = history[2:]
        text, boxes, ids = results[0]
        self.num_forgotten += (len(self.messages) - len(history)) // 2
        self.messages = [*history, turn, {"role": "assistant", "content": self._blocks(ids)}]
        return Answer(question, text, boxes)

    def _blocks(self, ids: list[int]) -> list[dict[str, str]]:
        """New tokens as content blocks: `<loc>` becomes a `box` block, for text cannot write it."""
        blocks: list[dict[str, str]] = []
        piece: list[int] = []
        for token in [*ids, None]:
            if token is not None and token != self.processor.loc_token_id:
                piece.append(token)
                continue
            text = self.processor.decode(piece, skip_special_tokens=True)
            piece = []
            if text:
                blocks.append({"type": "text", "text": text})
            if token is not None:
                blocks.append({"type": "box"})
        return blocks


__all__ = ["ChatSession"]
