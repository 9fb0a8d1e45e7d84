"""The fields of each request (semantics 5.2), by type and nothing else: values are checked where
they are used. Types are strict: "1" and true are no numbers. An absent field and null are the same.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema

Refused = SkipJsonSchema[Any]
"""A field that is known and not built: every value but null is refused."""

_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {
    "anyOf": [
        _TEXT,
        _IDS,
        {"type": "array", "items": _TEXT, "minItems": 1},
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {"role": {"type": "string"}, "content": {}},
    },
}
_FORMAT = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"const": "text"}},
}

Prompt = Annotated[Any, WithJsonSchema(_PROMPT)]
Messages = Annotated[Any, WithJsonSchema(_MESSAGES)]
Format = Annotated[Any, WithJsonSchema(_FORMAT)]
Input = Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, _MESSAGES]})]
TextFormat = Annotated[Any, WithJsonSchema({"type": "object", "properties": {"format": _FORMAT}})]


class Fields(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    NO_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "session_id",
            "kv_transfer_params",
            "best_of",
            "guided_decoding_backend",
            "vllm_xargs",
            "mm_processor_kwargs",
            "include_reasoning",
        }
    )
    """Fields that are known and change nothing here (REQ-3)."""


class StreamOptions(BaseModel):
    """What a stream tells besides its text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RepetitionDetectionFields(BaseModel):
    """See `pagedcore.request.RepetitionDetection`."""

    model_config = ConfigDict(strict=True)

    max_pattern_size: int
    min_count: int
    min_pattern_size: int = 1


class GenerationRequest(Fields):
    """What completions and chat have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    logits_processors: dict[str, Any] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    repetition_detection: RepetitionDetectionFields | None = None

    # Known, but nothing here can do them yet: see `prepare.refuse_unsupported`.
    response_format: Format = None
    structured_outputs: Refused = None
    thinking_token_budget: Refused = None
    guided_json: Refused = None
    guided_regex: Refused = None
    guided_choice: Refused = None
    guided_grammar: Refused = None
    guided_json_object: Refused = None
    guided_whitespace_pattern: Refused = None
    use_beam_search: Annotated[Any, WithJsonSchema({"const": False})] = None
    best_of: int | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt = None
    suffix: str | None = None
    logprobs: int | None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Messages = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class TokenizeRequest(Fields):
    """POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class ResponseRequest(Fields):
    """POST /v1/responses."""

    NO_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {
            "user",
            "service_tier",
            "parallel_tool_calls",
            "max_tool_calls",
            "reasoning",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
        }
    )
    """See `Fields`."""

    model: str | None = None
    input: Input = None
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] | None = None
    priority: int | None = None
    cache_salt: str | None = None

    # Known, but nothing here can do them: see `response_input.check_response`.
    text: TextFormat = None
    tools: Refused = None
    tool_choice: Refused = None
    include: Refused = None
    top_logprobs: Refused = None
    conversation: Refused = None
    prompt: Refused = None
