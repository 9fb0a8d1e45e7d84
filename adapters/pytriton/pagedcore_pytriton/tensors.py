"""Inputs and outputs of the model, as Triton declares them; names are those of vLLM's backend.

Each input is a vector, and one request is no batch: Triton's own batching is off.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagedcore.config import unknown_name
from pagedcore.errors import RequestError
from pagedcore.request import SamplingParams, field_names
from pagedcore_openai.answer import Piece

INPUTS: dict[str, type] = {
    "text_input": bytes,
    "input_ids": np.int32,
    "messages": bytes,
    "stream": np.bool_,
    "sampling_parameters": bytes,
    "exclude_input_in_output": np.bool_,
    "return_finish_reason": np.bool_,
    "return_num_input_tokens": np.bool_,
    "return_num_output_tokens": np.bool_,
}
"""A request has exactly one of the first three: text, token ids, or a conversation as JSON.

As in vLLM's backend, the answer to a text repeats it, unless it is streamed or the input
`exclude_input_in_output` is true. What `return_...` names is returned unless that is false.
"""

OUTPUTS: dict[str, type] = {
    "text_output": bytes,
    "index": np.int32,
    "num_input_tokens": np.int32,
    "num_output_tokens": np.int32,
    "output_ids": np.int32,
    "finish_reason": bytes,
}
"""Vectors over the choices that a response has news of, `output_ids` over their new tokens."""

_TEXTS = frozenset({"stop", "bad_words"})
"""Sampling parameters that may be text."""

_NOT_OFFERED = {
    "logprobs": "it has no output here; the OpenAI surface has",
    "prompt_logprobs": "it has no output here; the OpenAI surface has",
    "output_kind": "use the input `stream`",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for."""

    prompt: str | list[int] | None
    """Text or token ids to go on with."""

    messages: list[Any] | None
    """A conversation to answer, where there is no prompt."""

    stream: bool
    """Several responses with what is new, or one with everything."""

    sampling: dict[str, Any]
    """Sampling parameters that were given."""

    repeated: str
    """Text that each choice begins with."""

    hidden: frozenset[str]
    """Outputs that are not wanted."""


def read(data: Mapping[str, "NDArray[Any]"], parameters: Mapping[str, Any]) -> Asked:
    """Read a request's inputs, and its parameters: further sampling parameters.

    Raises RequestError for anything that is not as declared, or not known.
    """
    given = [name for name in ("text_input", "input_ids", "messages") if name in data]
    if len(given) != 1:
        raise RequestError(
            "exactly one of text_input, input_ids and messages is needed, not "
            + (" and ".join(given) or "none")
        )
    prompt: str | list[int] | None = None
    messages = None
    if "text_input" in data:
        prompt = _text(data, "text_input")
    elif "input_ids" in data:
        prompt = data["input_ids"].ravel().tolist()
    else:
        messages = _json(data, "messages", list)
    sampling = dict(parameters)
    if "sampling_parameters" in data:
        sampling |= _json(data, "sampling_parameters", dict)
    for name in sampling:
        if name not in field_names():
            known = dict.fromkeys(sorted(field_names() - _NOT_OFFERED.keys()))
            raise RequestError(unknown_name("sampling parameter", name, known), name)
        if name in _NOT_OFFERED:
            raise RequestError(f"{name} cannot be asked for: {_NOT_OFFERED[name]}", name)
    stream = _flag(data, "stream", False)
    exclude = _flag(data, "exclude_input_in_output", stream or not isinstance(prompt, str))
    if stream and not exclude:
        raise RequestError(
            "a stream cannot repeat the input: exclude_input_in_output must be true or absent",
            "exclude_input_in_output",
        )
    repeated = "" if exclude or not isinstance(prompt, str) else prompt
    flags = ("finish_reason", "num_input_tokens", "num_output_tokens")
    hidden = frozenset(name for name in flags if not _flag(data, f"return_{name}", True))
    return Asked(prompt, messages, stream, sampling, repeated, hidden)


def sampling_params(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """Merge; raises RequestError for a value of the wrong type or out of range.

    Clients of vLLM's backend send numbers as text.
    """
    values = {name: _number(name, value) for name, value in given.items()}
    try:
        return SamplingParams(**{**defaults, **values})
    except TypeError as error:
        raise RequestError(f"a sampling parameter has the wrong type: {error}") from None


def response(asked: Asked, pieces: Sequence[Piece], num_inputs: int) -> dict[str, "NDArray[Any]"]:
    """The tensors of one response."""
    tensors = {
        "text_output": _strings(asked.repeated + piece.text for piece in pieces),
        "index": np.array([piece.index for piece in pieces], np.int32),
        "num_input_tokens": np.array([num_inputs], np.int32),
        "num_output_tokens": np.array([len(piece.token_ids) for piece in pieces], np.int32),
        "output_ids": np.array([i for piece in pieces for i in piece.token_ids], np.int32),
    }
    if any(piece.finish_reason for piece in pieces):
        tensors["finish_reason"] = _strings(piece.finish_reason or "" for piece in pieces)
    return {name: value for name, value in tensors.items() if name not in asked.hidden}


def _number(name: str, value: Any) -> Any:
    """A number, where its text stands in the place of one."""
    if not isinstance(value, str) or name in _TEXTS:
        return value
    try:
        return json.loads(value.lower())
    except ValueError:
        raise RequestError(f"{name} must be a number, not {value[:80]!r}", name) from None


def _strings(texts: Any) -> "NDArray[Any]":
    return np.array([text.encode() for text in texts], object)


def _one(data: Mapping[str, "NDArray[Any]"], name: str) -> Any:
    if data[name].size != 1:
        raise RequestError(f"{name} must have one element, not {data[name].size}", name)
    return data[name].item()


def _flag(data: Mapping[str, "NDArray[Any]"], name: str, default: bool) -> bool:
    return bool(_one(data, name)) if name in data else default


def _text(data: Mapping[str, "NDArray[Any]"], name: str) -> str:
    value = _one(data, name)
    try:
        return value if isinstance(value, str) else bytes(value).decode()
    except UnicodeDecodeError:
        raise RequestError(f"{name} must be UTF-8", name) from None


def _json(data: Mapping[str, "NDArray[Any]"], name: str, kind: type) -> Any:
    wanted = "an array" if kind is list else "an object"
    try:
        value = json.loads(_text(data, name))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise RequestError(f"{name} must be JSON text of {wanted}", name)
    return value
