"""Whether sequences end with their newest token (semantics STOP-1 to STOP-5)."""

import numpy as np

from pagedcore.request import FinishReason, RepetitionDetection, Request
from pagedcore.scheduling.table import SequenceTable
from pagedcore.step import Bool, Int32

End = tuple[FinishReason, int | None]
"""Why a sequence ends, and the stop id that ended it, where one did."""


def may_have_ended(table: SequenceTable, rows: Int32, tokens: Int32) -> Bool:
    """Which of `rows` `why_ended` must look at, now that `tokens` are their last: bool [S]."""
    ends: Bool = tokens == table.eos[rows]
    ends |= table.num_known[rows] >= table.end[rows]
    stop_ids = table.stop_ids[rows]
    if (stop_ids[:, 0] >= 0).any():
        ends |= (stop_ids == tokens[:, None]).any(axis=1)
    ends |= table.needs_look[rows]
    return ends


def why_ended(request: Request, outputs: Int32, end: int) -> End | None:
    """Why a sequence ends with the last of its `outputs` [K]; None when it goes on.

    `end` is the length, prompt included, at which it ends at the latest.
    """
    if request.pooling is not None:  # what it got is its vector
        return FinishReason.STOP, None
    params = request.params
    token = int(outputs[-1])
    if token == request.eos_token_id and not params.ignore_eos:
        return FinishReason.STOP, None
    if token in params.stop_token_ids:
        return FinishReason.STOP, token
    if len(request.prompt_token_ids) + len(outputs) >= end:
        return FinishReason.LENGTH, None
    if len(outputs) < params.min_tokens:
        return None
    detection = params.repetition_detection
    if detection is not None and is_repetition(outputs, detection):
        return FinishReason.REPETITION, None
    return None


def is_repetition(outputs: Int32, detection: RepetitionDetection) -> bool:
    """Whether `outputs` end in a pattern that stands there often enough (STOP-5)."""
    for size in range(detection.min_pattern_size, detection.max_pattern_size + 1):
        length = size * detection.min_count
        if length > len(outputs):
            return False
        tail = outputs[-length:]
        if np.array_equal(tail[size:], tail[:-size]):
            return True
    return False
