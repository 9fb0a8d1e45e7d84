"""The policy `fair`: owners of requests share the engine by tokens, not by who asks most."""

from collections.abc import Sequence
from dataclasses import dataclass

from pagedcore.request import Request

FIRST_GUESS = 256.0
"""Output tokens that a request of a new owner is taken to have, unless it may not have so many."""

_MEMORY = 0.9
"""How much of an owner's mean output length stays when another request has ended."""


@dataclass(slots=True)
class _Account:
    """What one owner has had, and what its live requests are expected to take."""

    served: float
    """Tokens of requests that have ended, from the level at which the owner came."""

    promised: float = 0.0
    num_live: int = 0
    mean_outputs: float = FIRST_GUESS


class FairShare:
    """Who has been served the fewest tokens comes first; who has had the most yields.

    A request's place is what its owner had been served when it came, and what the owner's requests
    before it are expected to take. So each owner's requests keep their order, a flood of one
    delays no other by more than what runs, and a request never loses its place. Prompt tokens
    that were found in the cache cost nothing. Who stays away saves nothing up: its account is
    raised to the lowest of those that were served meanwhile.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._places: dict[int, tuple[float, float]] = {}  # by request: place, expected cost
        self._level = 0.0

    def order(self, request: Request) -> float:
        """The place that it got when it came."""
        if request.id not in self._places:
            self._places[request.id] = self._arrive(request)
        return self._places[request.id][0]

    def victim(self, running: Sequence[Request]) -> int:
        """The last admitted of the owner that has had, and will have, most."""
        shares = [self._share(request) for request in running]
        return max(range(len(running)), key=lambda i: (shares[i], i))

    def ended(self, request: Request) -> None:
        """Charge its owner what it really took."""
        _, cost = self._places.pop(request.id)
        account = self._accounts[request.owner]
        num_outputs = len(request.output_token_ids)
        num_computed = len(request.prompt_token_ids) - request.num_cached_tokens
        account.promised -= cost
        account.served += num_computed + num_outputs
        account.mean_outputs += (1 - _MEMORY) * (num_outputs - account.mean_outputs)
        self._level = max(self._level, self._least_served())
        account.num_live -= 1

    def _arrive(self, request: Request) -> tuple[float, float]:
        account = self._accounts.setdefault(request.owner, _Account(self._level))
        if not account.num_live:
            account.served = max(account.served, self._level)
            account.promised = 0.0
        most = request.params.max_tokens
        outputs = account.mean_outputs if most is None else min(most, account.mean_outputs)
        cost = len(request.prompt_token_ids) + outputs
        place = account.served + account.promised
        account.promised += cost
        account.num_live += 1
        return place, cost

    def _least_served(self) -> float:
        return min(one.served for one in self._accounts.values() if one.num_live)

    def _share(self, request: Request) -> float:
        account = self._accounts[request.owner]
        return account.served + account.promised
