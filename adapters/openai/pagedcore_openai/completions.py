"""The shapes of completion answers, whole and streamed."""

from typing import Any

from pagedcore.step import TokenLogprobs
from pagedcore.text.inputs import EngineInput
from pagedcore.text.tokenizer import Tokenizer
from pagedcore_openai.logprobs import completion_logprobs, prompt_logprobs
from pagedcore_openai.pieces import Piece
from pagedcore_openai.protocol import CompletionRequest


class CompletionShape:
    """What the answers to some prompts look like."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self, request: CompletionRequest, items: list[EngineInput], tokenizer: Tokenizer
    ) -> None:
        self._tokenizer = tokenizer
        self._items = items
        self._num_choices = items[0].params.n
        self._echo = bool(request.echo)
        self._has_logprobs = request.logprobs is not None
        self._prompt_logprobs = request.prompt_logprobs is not None
        self._token_ids = bool(request.return_token_ids)
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        choice = self._choice(piece)
        if self._prompt_logprobs:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, piece.prompt_logprobs)
        return choice

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The choice of the chunk that tells a piece, if it has something to tell."""
        told = piece.text or (self._token_ids and piece.token_ids) or piece.finish_reason
        return [self._choice(piece)] if told else []

    def top_level(self, pieces: list[Piece]) -> dict[str, Any]:
        """Nothing: a completion's extras are its choices'."""
        return {}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        begins = piece.index not in self._begun
        self._begun.add(piece.index)
        item = self._items[piece.index // self._num_choices]
        echo = self._echo and begins
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": (self._prompt_text(item) if echo else "") + piece.text,
            "logprobs": self._logprobs(piece, item, echo=echo) if self._has_logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._token_ids:
            choice["token_ids"] = piece.token_ids
            if begins:
                choice["prompt_token_ids"] = item.prompt_token_ids
        return choice

    def _prompt_text(self, item: EngineInput) -> str:
        if item.prompt is not None:
            return item.prompt
        return self._tokenizer.decode(item.prompt_token_ids)

    def _logprobs(self, piece: Piece, item: EngineInput, *, echo: bool) -> dict[str, Any]:
        token_ids: list[int] = list(piece.token_ids)
        logprobs: list[TokenLogprobs | None] = list(piece.logprobs)
        if echo:
            token_ids = item.prompt_token_ids + token_ids
            logprobs = [None, *piece.prompt_logprobs, *logprobs]
        offset = self._offsets.get(piece.index, 0)
        lists, self._offsets[piece.index] = completion_logprobs(
            self._tokenizer, token_ids, logprobs, offset
        )
        return lists
