"""The policy kit: does a scheduling policy order any queue, and choose one of those who run?"""

import random

import numpy as np

from pagedcore.errors import PluginError
from pagedcore.request import Request, SamplingParams
from pagedcore.scheduling.policies import Policy

NUM_ROUNDS = 200


def check_policy(policy: Policy) -> str:
    """Ask about random requests, alike and different ones; raise PluginError for a bad answer."""
    rng = random.Random(0)
    for _ in range(NUM_ROUNDS):
        requests = [_draw(rng, i) for i in range(rng.randint(1, 8))]
        places = [policy.order(request) for request in requests]
        try:
            sorted(places)
        except TypeError as error:
            raise PluginError(f"order() gives places that do not sort: {error}") from None
        if [policy.order(request) for request in requests] != places:
            raise PluginError("order() gives one request another place when it is asked again")
        victim = policy.victim(requests)
        if isinstance(victim, bool) or not isinstance(victim, int):
            raise PluginError(f"victim() must give an index, not {victim!r}")
        if not 0 <= victim < len(requests):
            raise PluginError(f"victim() gives {victim} for {len(requests)} requests")
    return ""


def _draw(rng: random.Random, number: int) -> Request:
    prompt = np.arange(1, 1 + rng.choice([1, 5, 5, 900]), dtype=np.int32)
    return Request(
        id=number,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=rng.choice([1, 16, 16, 500])),
        priority=rng.choice([0, 0, 0, -3, 7]),
        arrival_time=rng.choice([1.0, 1.0, rng.random()]),
        cache_salt=rng.choice([None, "a"]),
        output_token_ids=list(range(rng.choice([0, 3]))),
        num_preemptions=rng.choice([0, 0, 2]),
    )
