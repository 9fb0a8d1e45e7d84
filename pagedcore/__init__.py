"""A paged LLM inference core that any serving framework can mount."""

from typing import TYPE_CHECKING, Any

from pagedcore._markers import hookimpl
from pagedcore.config import EngineConfig
from pagedcore.request import SamplingParams

if TYPE_CHECKING:
    from pagedcore.engine.llm import LLM

__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__", "hookimpl"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name == "LLM":
        from pagedcore.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'pagedcore' has no attribute {name!r}")
