"""Changes of logits that plugins bring, for the requests that name them.

    P sequences that ask for one processor   V vocabulary   L positions per row

A request says `logits_processors={"name": arguments}`. A processor is made when the first request
names it; it sees all sequences of a draw that ask for it at once, and nobody else's.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pagedcore.errors import PluginError, RequestError, UnknownNameError
from pagedcore.request import SamplingParams

if TYPE_CHECKING:
    from pagedcore.execution.logits import History

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsBatch:
    """The P sequences whose logits are changed; tensors are on the device."""

    arguments: list[Any]
    """What each request gave its processor."""

    tokens: Tensor
    """[P, L] int32: prompt and output of each; what lies behind `num_known` has no meaning."""

    num_prompt: Tensor
    """[P] int64: tokens of the prompt."""

    num_known: Tensor
    """[P] int64: tokens that are known, and so the position of the one that is drawn."""


class LogitsProcessor(Protocol):
    """One kind of change. A factory in the `pagedcore_logits_processors` hook makes it."""

    def check(self, arguments: Any) -> None:
        """Raise RequestError for arguments, as they came out of JSON, that cannot be used.

        Called when a request arrives, in the engine's thread.
        """
        ...

    def apply(self, logits: Tensor, batch: LogitsBatch) -> Tensor:
        """The new logits [P, V] float32; the given ones may be changed in place.

        Called in each draw with a sequence that asks. It should read nothing on the host: that
        would wait for the device. If it raises, the sequences that asked for it end with an error.
        """
        ...


Factory = Callable[[int, torch.device], LogitsProcessor]
"""Called with the size of the vocabulary and the device."""


class LogitsProcessors:
    """All that plugins offer, of which those are made that somebody asks for."""

    def __init__(
        self, factories: Mapping[str, Factory], *, vocab_size: int, device: torch.device
    ) -> None:
        self._factories = factories
        self._vocab_size = vocab_size
        self._device = device
        self._made: dict[str, LogitsProcessor] = {}

    def check(self, params: SamplingParams) -> None:
        """Raise RequestError for a processor that there is not, or that refuses its arguments."""
        for name, arguments in (params.logits_processors or {}).items():
            if name not in self._factories:
                error = UnknownNameError("logits processor", name[:80], self._factories)
                raise RequestError(str(error), "logits_processors")
            try:
                self.get(name).check(arguments)
            except RequestError as error:
                raise RequestError(f"{name}: {error}", "logits_processors") from None

    def get(self, name: str) -> LogitsProcessor:
        """The processor of this name; raises PluginError when it cannot be made."""
        if name not in self._made:
            try:
                self._made[name] = self._factories[name](self._vocab_size, self._device)
            except Exception as error:
                raise PluginError(
                    f"the logits processor {name!r} cannot be made: {type(error).__name__}: {error}"
                ) from error
        return self._made[name]


@dataclass(slots=True)
class ProcessorEdit:
    """One processor with the sequences of a draw that ask for it."""

    name: str
    processor: LogitsProcessor
    arguments: list[Any]
    index: Tensor
    """[P] int64: which of the draw's sequences they are."""

    num_prompt: Tensor

    def apply(self, logits: Tensor, history: "History") -> None:
        """Edit logits [S, V] in place; NaN for those whose processor failed, which ends them."""
        rows = history.rows[self.index].long()
        batch = LogitsBatch(
            arguments=self.arguments,
            tokens=history.tokens[rows, : history.longest],
            num_prompt=self.num_prompt,
            num_known=history.num_known[self.index],
        )
        mine = logits[self.index]
        shape = mine.shape
        try:
            mine = self.processor.apply(mine, batch)
            if mine.shape != shape:
                raise PluginError(f"it returned {list(mine.shape)} for {list(shape)}")
            logits[self.index] = mine
        except Exception:
            logger.exception("the logits processor %r failed: its requests end", self.name)
            logits[self.index] = torch.nan
