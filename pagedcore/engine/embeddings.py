"""What offline callers get back for a text that becomes a vector."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagedcore.step import Finished
from pagedcore.text.inputs import PooledInput


@dataclass(slots=True)
class EmbeddingOutput:
    """One prompt and its vector."""

    prompt: str | None
    """The text that was asked for; None when the prompt was token ids."""

    prompt_token_ids: list[int]
    """What the model saw."""

    vector: NDArray[np.float32]
    """[n] float32, a read-only array; empty where there is none."""

    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""

    message: str | None = None
    """Why there is no vector, when the engine failed on this prompt."""


class VectorJob:
    """One prompt on its way."""

    def __init__(self, entry: PooledInput, request_id: int) -> None:
        self.id = request_id
        self.output = EmbeddingOutput(entry.prompt, entry.prompt_token_ids, np.empty(0, np.float32))
        self.num_live = 1
        """1 until it has ended."""

    def settle(self, end: Finished) -> None:
        """Take the end; the vector is there already, if there is one."""
        self.output.message = end.message
        self.num_live = 0
