"""The shapes of chat answers, whole and streamed."""

from typing import Any

from pagedcore.text.inputs import EngineInput
from pagedcore.text.tokenizer import Tokenizer
from pagedcore_openai.logprobs import chat_logprobs, prompt_logprobs
from pagedcore_openai.pieces import Piece
from pagedcore_openai.protocol import ChatRequest


class ChatShape:
    """What one conversation's answer looks like."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, item: EngineInput, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._item = item
        self._num_top = (request.top_logprobs or 0) if request.logprobs else None
        self._echo = (item.prompt or "") if request.echo else ""
        self._token_ids = bool(request.return_token_ids)

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        choice: dict[str, Any] = {
            "index": piece.index,
            "message": {"role": "assistant", "content": self._echo + piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The choices of the chunks that tell a piece (STREAM-2, STREAM-5)."""
        chunks: list[dict[str, Any]] = []
        if piece.first:
            chunks.append(
                {
                    "index": piece.index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
            )
            if self._echo:
                chunks.append(
                    {
                        "index": piece.index,
                        "delta": {"content": self._echo},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                )
        ended = piece.finish_reason is not None
        if not (piece.text or ended or (self._token_ids and piece.token_ids)):
            return chunks
        chunk: dict[str, Any] = {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        if ended:
            chunk["stop_reason"] = piece.stop_reason
        if self._token_ids:
            chunk["token_ids"] = piece.token_ids
        chunks.append(chunk)
        return chunks

    def top_level(self, pieces: list[Piece]) -> dict[str, Any]:
        """What a whole answer has beside its choices."""
        extra: dict[str, Any] = {}
        if self._item.params.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(self._tokenizer, pieces[0].prompt_logprobs)
        if self._token_ids:
            extra["prompt_token_ids"] = self._item.prompt_token_ids
        return extra

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._num_top is None or not piece.logprobs:
            return None
        return chat_logprobs(self._tokenizer, piece.logprobs, self._num_top)
