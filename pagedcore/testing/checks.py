"""A promise that a conformance kit puts to the test."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of one thing that a plugin offers; calling it takes seconds at most."""

    subject: str
    """What is checked, such as "model LlamaForCausalLM"."""

    claim: str
    """What it promises, in a few words."""

    test: Callable[[], str]
    """Puts it to the test: a remark, or "". Raises PluginError, saying by how much it fell short;
    or whatever the thing itself raised."""

    def __call__(self) -> str:
        """See `test`."""
        return self.test()

    def __str__(self) -> str:
        return f"{self.subject}: {self.claim}" if self.claim else self.subject
