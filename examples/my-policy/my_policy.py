"""A scheduling policy of our own: the shortest prompt first, but nobody waits for ever.

Short requests overtake long ones. So that a stream of short ones cannot starve a long one, each
second of arrival counts as many tokens as PATIENCE says.
"""

from collections.abc import Sequence

from pagedcore import hookimpl
from pagedcore.request import Request

pagedcore_requires = ">=1,<2"

PATIENCE = 1000.0
"""Tokens that one second of waiting makes up for."""


@hookimpl
def pagedcore_policies():
    return {"shortest-first": ShortestFirst}


class ShortestFirst:
    def order(self, request: Request) -> float:
        # Lower is first. Outputs count: one that was preempted comes back soon.
        length = len(request.prompt_token_ids) - len(request.output_token_ids)
        return length + PATIENCE * request.arrival_time

    def victim(self, running: Sequence[Request]) -> int:
        # Who has least to lose: the one that would be computed again soonest.
        costs = [len(r.prompt_token_ids) + len(r.output_token_ids) for r in running]
        return min(range(len(running)), key=lambda i: (costs[i], -i))
