"""A request into what the engine takes: checked, tokenised, with settled parameters.

Everything here may be slow for a long prompt: it runs in a thread, unless `is_quick`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pagedcore.errors import RequestError
from pagedcore.request import RepetitionDetection, SamplingParams, field_names
from pagedcore.server_config import ServerConfig
from pagedcore.text.inputs import EngineInput
from pagedcore_openai.bounded_inputs import BoundedInputs
from pagedcore_openai.errors import ApiError
from pagedcore_openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)

MAX_TEMPERATURE = 2
"""Highest temperature that HTTP takes (SAMPLE-1)."""

_SAMPLING = field_names() & GenerationRequest.model_fields.keys() - {"max_tokens"}
_STRUCTURED = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_json_object",
    "guided_whitespace_pattern",
)
_TEMPLATE_OWN = (
    "tokenize",
    "chat_template",
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
)


QUICK_CHARACTERS = 512
"""Up to here, tokenising a text costs less than handing it to a thread."""

QUICK_TOKENS = 4096
"""The same for a prompt of token ids, which are only looked at."""


def is_quick(request: CompletionRequest) -> bool:
    """Whether `completion_inputs` may run in the event loop."""
    prompt = request.prompt
    if isinstance(prompt, str):
        is_short = len(prompt) <= QUICK_CHARACTERS
    else:
        is_short = isinstance(prompt, list) and len(prompt) <= QUICK_TOKENS
        is_short = is_short and all(type(token) is int for token in prompt)
    return is_short and not request.bad_words


def check_generation(request: GenerationRequest, server: ServerConfig, policy: str) -> None:
    """Refuse what can be refused without a tokenizer; `policy` is the scheduling policy."""
    _refuse_unsupported(request)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError("best_of must be absent or equal to n", "best_of")
    if request.use_beam_search not in (None, False):
        raise RequestError("use_beam_search is not supported: remove it", "use_beam_search")
    check_priority(request.priority, policy)
    if request.cache_salt == "":
        raise RequestError("cache_salt must not be empty", "cache_salt")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed: set stream=false", "stream")
    options = request.stream_options
    if options is not None:
        if not request.stream:
            raise RequestError("stream_options needs stream=true", "stream_options")
        if options.continuous_usage_stats and not options.include_usage:
            raise RequestError("continuous_usage_stats needs include_usage=true", "stream_options")
    if request.n is not None and request.n > server.max_n:
        raise RequestError(f"n may be at most {server.max_n}, not {request.n}", "n")
    if request.temperature is not None and request.temperature > MAX_TEMPERATURE:
        raise RequestError(
            f"temperature must be in 0..{MAX_TEMPERATURE}, not {request.temperature}", "temperature"
        )
    if isinstance(request, CompletionRequest) and request.suffix:
        raise RequestError("suffix is not supported: remove it", "suffix")
    if isinstance(request, ChatRequest):
        _check_chat(request, server)


def check_priority(priority: int | None, policy: str) -> None:
    """Refuse a priority that the scheduling policy would not heed."""
    if priority and policy != "priority":
        raise RequestError(
            f"priority must be 0 under the scheduling policy {policy!r}; "
            "start the server with --scheduling-policy priority",
            "priority",
        )


def completion_inputs(
    request: CompletionRequest, inputs: BoundedInputs, server: ServerConfig
) -> list[EngineInput]:
    """One input per prompt; raises RequestError."""
    values = _params(request, inputs)
    values["max_tokens"] = _asked_max_tokens(request, inputs.max_model_len) or 16
    values["logprobs"] = request.logprobs
    if request.echo and request.prompt_logprobs is None:
        values["prompt_logprobs"] = request.logprobs
    params = _checked(values, server)
    add_special_tokens = request.add_special_tokens is not False
    prompts = _prompts(request.prompt)
    for prompt in prompts:
        inputs.check_characters(len(prompt), "prompt")
    return [
        inputs.completion(
            prompt,
            params,
            add_special_tokens=add_special_tokens,
            truncate_prompt_tokens=request.truncate_prompt_tokens,
        )
        for prompt in prompts
    ]


def chat_input(request: ChatRequest, inputs: BoundedInputs, server: ServerConfig) -> EngineInput:
    """The conversation as one input; raises RequestError, or ApiError 422 without a template."""
    values = _params(request, inputs)
    asked = _asked_max_tokens(request, inputs.max_model_len)
    values["max_tokens"] = inputs.default_max_tokens if asked is None else asked
    if request.logprobs:
        values["logprobs"] = request.top_logprobs or 0
    params = _checked(values, server)
    return inputs.chat(
        _messages(request.messages, inputs, request.chat_template),
        params,
        add_special_tokens=bool(request.add_special_tokens),
        truncate_prompt_tokens=request.truncate_prompt_tokens,
        chat_template=request.chat_template,
        **template_options(request),
    )


def template_options(request: Any) -> dict[str, Any]:
    """What a request tells its chat template, besides the messages."""
    options: dict[str, Any] = dict(request.chat_template_kwargs or {})
    for name in ("documents", "reasoning_effort"):
        if getattr(request, name, None) is not None:
            options[name] = getattr(request, name)
    options["add_generation_prompt"] = request.add_generation_prompt is not False
    options["continue_final_message"] = bool(request.continue_final_message)
    options["tools"] = request.tools
    return options


def check_template_kwargs(kwargs: Mapping[str, Any] | None) -> None:
    """Refuse variables that other fields set (REQ-9)."""
    for name in _TEMPLATE_OWN:
        if name in (kwargs or {}):
            raise RequestError(f"chat_template_kwargs may not set {name!r}", "chat_template_kwargs")


def tokenized(request: TokenizeRequest, inputs: BoundedInputs) -> list[int]:
    """The token ids of a text or a conversation, however long."""
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("tokenize needs either prompt or messages", "prompt")
    special = request.add_special_tokens
    if request.prompt is not None:
        inputs.check_characters(len(request.prompt), "prompt")
        return inputs.tokenizer.encode(request.prompt, special is not False)
    messages = inputs.quoted(_messages(request.messages, inputs, None))
    assert inputs.chat_template is not None
    text = inputs.chat_template.render(messages, **template_options(request))
    return inputs.tokenizer.encode_quoted(text, bool(special))


def detokenized(request: DetokenizeRequest, inputs: BoundedInputs, vocab_size: int) -> str:
    """The text of token ids, special tokens included."""
    for token in request.tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(f"tokens holds {token}, outside 0..{vocab_size - 1}", "tokens")
    return inputs.tokenizer.decode(request.tokens, skip_special_tokens=False)


def used_max_tokens(request: GenerationRequest, items: Sequence[EngineInput]) -> int | None:
    """`max_tokens` after it was cut to what fits, if it was given and cut (REQ-7)."""
    asked = _given_max_tokens(request)
    used = min(item.params.max_tokens or 0 for item in items)
    return used if asked is not None and used < asked else None


def _refuse_unsupported(request: GenerationRequest) -> None:
    for name in _STRUCTURED:
        if getattr(request, name) is not None:
            raise ApiError(501, f"{name}: structured outputs are not implemented", name)
    if request.thinking_token_budget is not None:
        message = "thinking_token_budget is not implemented"
        raise ApiError(501, message, "thinking_token_budget")
    wanted = request.response_format
    if wanted is not None and (not isinstance(wanted, dict) or wanted.get("type") != "text"):
        if isinstance(wanted, dict) and wanted.get("type") in (
            "json_object",
            "json_schema",
            "structural_tag",
        ):
            raise ApiError(501, "only response_format text is implemented", "response_format")
        raise RequestError('response_format must be like {"type": "text"}', "response_format")


def _check_chat(request: ChatRequest, server: ServerConfig) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
    choice = request.tool_choice
    if choice not in (None, "none", "auto") and not request.tools:
        raise RequestError("tool_choice needs tools", "tool_choice")
    if request.tools and choice != "none":
        raise ApiError(
            501,
            "calling tools is not implemented; with tool_choice='none' the model only reads them",
            "tools",
        )
    if request.chat_template is not None and not server.trust_request_chat_template:
        raise RequestError(
            "chat_template is not allowed in requests; the server needs "
            "--trust-request-chat-template",
            "chat_template",
        )
    check_template_kwargs(request.chat_template_kwargs)


def _messages(messages: Any, inputs: BoundedInputs, own_template: str | None) -> Any:
    if inputs.chat_template is None and own_template is None:
        raise ApiError(
            422, "this model has no chat template: use completions, or start with --chat-template"
        )
    if isinstance(messages, list):
        inputs.check_characters(sum(map(_num_characters, messages)), "messages")
    return messages


def _num_characters(message: Any) -> int:
    """The length of a message's text; what is no message is refused elsewhere."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else ()
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return sum(len(text) for text in texts if isinstance(text, str))


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion request: texts or lists of token ids (REQ-5)."""
    if isinstance(prompt, str):
        return [_not_empty(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt):
            return [_not_empty(item) for item in prompt]
        if all(isinstance(item, list) for item in prompt):
            return [_not_empty(item) for item in prompt]
    raise RequestError(
        "prompt must be a text, a list of token ids, or a list of either, and not empty", "prompt"
    )


def _not_empty(prompt: Any) -> Any:
    if not prompt:
        raise RequestError("prompt must not be empty, nor hold an empty element", "prompt")
    return prompt


def _params(request: GenerationRequest, inputs: BoundedInputs) -> dict[str, Any]:
    values = inputs.default_params()
    for name in _SAMPLING:
        value = getattr(request, name)
        if value is not None:
            values[name] = value
    loop = values.get("repetition_detection")
    if loop is not None:
        values["repetition_detection"] = RepetitionDetection(**loop.model_dump())
    return values


def _checked(values: dict[str, Any], server: ServerConfig) -> SamplingParams:
    params = SamplingParams(**values)
    params.check_limits(server.sampling_limits)
    return params


def _given_max_tokens(request: GenerationRequest) -> int | None:
    if request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def _asked_max_tokens(request: GenerationRequest, max_model_len: int) -> int | None:
    asked = _given_max_tokens(request)
    if asked is not None and not 1 <= asked <= max_model_len:
        named = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        raise RequestError(f"{named} must be in 1..{max_model_len}, not {asked}", named)
    return asked
