"""Which adapter (LoRA) lies in which slot of the device, and who still needs it there."""

from collections import OrderedDict

MAX_PASSED = 128
"""Sequences with adapters that may pass one that waits for a slot, before all of them wait."""


class AdapterSlots:
    """Slots for adapters, by the keys of their contents; "" is no adapter and needs none.

    A slot that no row uses keeps its adapter until another needs the slot: the one that has been
    idle longest gives way.
    """

    def __init__(self, num_slots: int) -> None:
        self._slot_of: dict[str, int] = {}
        self._num_rows: dict[str, int] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._free = list(range(num_slots))[::-1]
        self._num_passed = 0

    @property
    def num_running(self) -> int:
        """Adapters that rows use."""
        return len(self._num_rows)

    def slot_of(self, key: str) -> int:
        """Where an adapter lies; -1 for "", which lies nowhere."""
        return self._slot_of[key] if key else -1

    def admits(self, key: str, *, passes: bool) -> bool:
        """Whether a row with this adapter may begin; `passes` while others wait for a slot.

        So that those are not passed for ever, only MAX_PASSED may go first.
        """
        if not key:
            return True
        if passes and self._num_passed >= MAX_PASSED:
            return False
        return key in self._num_rows or bool(self._free) or bool(self._idle)

    def count_passed(self, num_passed: int | None) -> None:
        """So many have passed in this step; None when nobody waits for a slot any more."""
        self._num_passed = 0 if num_passed is None else self._num_passed + num_passed

    def take(self, key: str) -> None:
        """One more row uses an adapter; `admits` has said that it may."""
        if not key:
            return
        self._idle.pop(key, None)
        if key not in self._slot_of:
            if self._free:
                self._slot_of[key] = self._free.pop()
            else:
                oldest, _ = self._idle.popitem(last=False)
                self._slot_of[key] = self._slot_of.pop(oldest)
        self._num_rows[key] = self._num_rows.get(key, 0) + 1

    def release(self, key: str) -> None:
        """One row less uses an adapter."""
        if not key:
            return
        self._num_rows[key] -= 1
        if not self._num_rows[key]:
            del self._num_rows[key]
            self._idle[key] = None
