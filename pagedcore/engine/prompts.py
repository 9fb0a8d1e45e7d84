"""What offline callers may give as prompts and parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from pagedcore.errors import RequestError
from pagedcore.request import SamplingParams

Message = Mapping[str, Any]
Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None


def is_conversation(value: object) -> bool:
    """Whether this is a list of messages."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and isinstance(value[0], Mapping)
    )


def as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt, or several, as a list; raises RequestError for what is neither."""
    if isinstance(prompts, str) or (is_list(prompts) and prompts and isinstance(prompts[0], int)):
        return [prompts]
    for prompt in [prompts] if not is_list(prompts) else prompts:
        if not isinstance(prompt, str) and not is_list(prompt):
            raise RequestError(
                "a prompt must be text or a list of token ids, and several prompts a list of "
                f"these, not {type(prompt).__name__}",
                "prompt",
            )
    return list(prompts)


def is_list(value: object) -> bool:
    """Whether this is several of something, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def for_each(params: Any, num_prompts: int) -> Sequence[SamplingParams | None]:
    """One of `params` for each prompt; raises RequestError for anything else."""
    listed = params if is_list(params) else [params] * num_prompts
    for one in listed:
        if one is not None and not isinstance(one, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(one).__name__}")
    if len(listed) != num_prompts:
        raise RequestError(f"{num_prompts} prompts need as many params, not {len(listed)}")
    return listed
