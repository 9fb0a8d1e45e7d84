"""Plugins that watch: told after tokens are out, and put in quarantine when they fail."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pluggy

from pagedcore.request import FinishReason, Request

logger = logging.getLogger(__name__)

HOOKS = ("pagedcore_step_finished", "pagedcore_request_finished")

QUARANTINED = "plugin_observers_quarantined"
"""What an engine's stats call the number of observers that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What an observer learns of one finished step."""

    num_seqs: int
    """Sequences in the step."""

    num_tokens: int
    """Tokens that it ran."""

    num_outputs: int
    """Tokens that it produced."""

    num_running: int
    """Sequences that hold a row now."""

    num_waiting: int
    """Sequences that wait now."""

    cache_usage: float
    """Share of blocks in use, in 0..1."""

    plan_seconds: float
    """Host time spent planning and launching."""

    wait_seconds: float
    """Host time spent waiting for the device."""

    finish_seconds: float
    """Host time spent on the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What an observer learns of a sequence that is over."""

    request: Request
    """What was asked for, with all outputs in it. It is the engine's own: to be read only."""

    reason: FinishReason
    """Why it ended; ABORT when somebody left, or a stop string was found in its text."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that the prefix cache had."""

    num_output_tokens: int
    num_preemptions: int
    queue_seconds: float | None
    """From arrival to the first admission; None when it was never admitted."""

    total_seconds: float
    """From arrival to the end."""


def record_of(request: Request, reason: FinishReason, now: float) -> RequestRecord:
    """The record of a request that ended `now`, on the clock of its `arrival_time`."""
    admitted = request.first_scheduled_time
    return RequestRecord(
        request=request,
        reason=reason,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_cached_tokens=request.num_cached_tokens,
        num_output_tokens=len(request.output_token_ids),
        num_preemptions=request.num_preemptions,
        queue_seconds=max(0.0, admitted - request.arrival_time) if admitted else None,
        total_seconds=max(0.0, now - request.arrival_time),
    )


class Observers:
    """The observing hooks of all plugins. Nothing that they do can break a step."""

    def __init__(self, plugins: pluggy.PluginManager | None) -> None:
        self._listening: dict[str, list[Any]] = {
            hook: list(getattr(plugins.hook, hook).get_hookimpls()) if plugins else []
            for hook in HOOKS
        }
        self._num_quarantined = 0

    def listen_to(self, hook: str) -> bool:
        """Whether anybody does, so that there is a reason to gather what is told."""
        return bool(self._listening[hook])

    def tell(self, hook: str, **facts: Any) -> None:
        """Call each observer; one that raises is named in the log, and not called again."""
        for observer in list(self._listening[hook]):
            try:
                observer.function(*(facts[name] for name in observer.argnames))
            except Exception:
                logger.exception(
                    "%s of the plugin %r failed and is not called again",
                    hook,
                    observer.plugin_name,
                )
                self._listening[hook].remove(observer)
                self._num_quarantined += 1

    def stats(self) -> Mapping[str, float]:
        """How many observers are not called any more."""
        return {QUARANTINED: self._num_quarantined}
