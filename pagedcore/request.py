"""What a caller asks for, and the request that carries it through the engine. No tensors here."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pagedcore.errors import RequestError
from pagedcore.pooling import PoolingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy (semantics SAMPLE-3)."""


class FinishReason(StrEnum):
    """Why a sequence ended (semantics STOP-6)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


class OutputKind(StrEnum):
    """What an offline stream yields (semantics SAMPLE-11)."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True, slots=True)
class RepetitionDetection:
    """End an output that has become a loop (semantics STOP-5)."""

    max_pattern_size: int
    min_count: int
    min_pattern_size: int = 1

    def __post_init__(self) -> None:
        if self.min_pattern_size == 0:
            object.__setattr__(self, "min_pattern_size", 1)
        if self.min_count < 2:
            raise RequestError(
                f"repetition_detection.min_count must be at least 2, not {self.min_count}",
                "repetition_detection",
            )
        if not 1 <= self.min_pattern_size <= self.max_pattern_size:
            raise RequestError(
                "repetition_detection needs 1 <= min_pattern_size <= max_pattern_size, not "
                f"{self.min_pattern_size} and {self.max_pattern_size}",
                "repetition_detection",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingLimits:
    """Caps on what one request may ask for (semantics LIMIT-1)."""

    max_n: int = 128
    """Most choices per prompt."""

    max_logprobs: int = 20
    """Most log-probabilities per token; -1 allows the whole vocabulary."""

    max_stop_strings: int = 16
    """Most stop strings."""

    max_bad_words: int = 128
    """Most bad words."""

    max_logit_bias: int = 1024
    """Most logit_bias entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when a sequence ends (semantics SAMPLE-1).

    Raises RequestError, naming the field, for any value out of range.
    """

    n: int = 1
    """Sequences per prompt."""

    temperature: float = 1.0
    """0 is greedy; below 0.01 it is raised to 0.01 (SAMPLE-3)."""

    top_p: float = 1.0
    """Smallest set of tokens whose probabilities sum to this, in (0, 1]."""

    top_k: int = 0
    """Most likely tokens kept; 0 or -1 keeps all."""

    min_p: float = 0.0
    """Least probability relative to the most likely token's, in [0, 1]."""

    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already produced."""

    frequency_penalty: float = 0.0
    """Subtracted once for each time a token was produced."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output."""

    max_tokens: int | None = 16
    """Most tokens to produce; None goes on to the model's length."""

    min_tokens: int = 0
    """EOS and stop ids are masked until this many tokens are out."""

    logprobs: int | None = None
    """Log-probabilities per output token: the sampled one and this many of the most likely."""

    prompt_logprobs: int | None = None
    """The same for each prompt token but the first."""

    logit_bias: Mapping[int, float] | None = None
    """Added to the logits, by token id; clamped to [-100, 100]."""

    allowed_token_ids: Sequence[int] | None = None
    """The only tokens that may be produced."""

    bad_words: Sequence[str] = ()
    """Words whose last token is masked once the earlier ones were produced."""

    logits_processors: Mapping[str, Any] | None = None
    """Plugins' changes of the logits: the name of each, and what it is told."""

    stop: Sequence[str] = ()
    """Strings that end the output."""

    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output."""

    seed: int | None = None
    """Makes the draw reproducible, whatever else is in the batch."""

    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""

    include_stop_str_in_output: bool = False
    """Keep the stop string, or a stop token's text, at the end of the output."""

    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    spaces_between_special_tokens: bool = True
    """Put a space between special tokens that are kept."""

    detokenize: bool = True
    """Produce text; without it only token ids come back."""

    skip_reading_prefix_cache: bool = False
    """Compute the whole prompt, but leave it in the cache for others (KV-10)."""

    repetition_detection: RepetitionDetection | None = None
    """End an output that repeats itself (STOP-5)."""

    output_kind: OutputKind = OutputKind.CUMULATIVE
    """What each item of an offline stream holds (SAMPLE-11)."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            items = (value,) if isinstance(value, str) else tuple(value or ())
            object.__setattr__(self, name, items)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _check_numbers(self)
        _check_words(self)
        if GREEDY_BELOW <= self.temperature < 0.01:
            logger.warning("temperature %g is raised to 0.01; 0 is greedy", self.temperature)
            object.__setattr__(self, "temperature", 0.01)
        if self.is_greedy:
            for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                object.__setattr__(self, name, neutral)

    def for_choice(self, index: int) -> "SamplingParams":
        """What choice `index` of n runs with: n is 1, the seed is seed + index (SAMPLE-10)."""
        if self.n == 1:
            return self
        seed = self.seed
        if seed is not None:
            seed = (seed + index + 2**63) % 2**64 - 2**63
        return replace(self, n=1, seed=seed)

    def check_limits(self, limits: SamplingLimits) -> None:
        """Raise RequestError for what is valid but more than this deployment allows."""
        caps: tuple[tuple[str, int, int], ...] = (
            ("n", self.n, limits.max_n),
            ("stop", len(self.stop), limits.max_stop_strings),
            ("bad_words", len(self.bad_words), limits.max_bad_words),
            ("logit_bias", len(self.logit_bias or ()), limits.max_logit_bias),
        )
        for name, asked, cap in caps:
            if asked > cap:
                raise RequestError(f"{name} may have at most {cap}, not {asked}", name)
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if (
                asked is not None
                and limits.max_logprobs != -1
                and not 0 <= asked <= limits.max_logprobs
            ):
                raise RequestError(
                    f"{name} must be in 0..{limits.max_logprobs}, not {asked} "
                    "(raise --max-logprobs to allow more)",
                    name,
                )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError for a token id outside 0..vocab_size-1 (SAMPLE-4)."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{name} holds token id {token}, outside 0..{vocab_size - 1}", name
                    )


_FLOATS: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, math.inf, ">= 0"),
    "top_p": (math.nextafter(0.0, 1.0), 1.0, "in (0, 1]"),
    "min_p": (0.0, 1.0, "in [0, 1]"),
    "presence_penalty": (-2.0, 2.0, "in [-2, 2]"),
    "frequency_penalty": (-2.0, 2.0, "in [-2, 2]"),
    "repetition_penalty": (math.nextafter(0.0, 1.0), math.inf, "> 0"),
}
_INTS: dict[str, tuple[int, int, str]] = {
    "n": (1, 2**31 - 1, ">= 1"),
    "top_k": (-1, 2**63 - 1, "-1, 0 or >= 1"),
    "max_tokens": (1, 2**31 - 1, ">= 1"),
    "min_tokens": (0, 2**31 - 1, ">= 0"),
    "logprobs": (-1, 2**31 - 1, ">= 0, or -1 for the whole vocabulary"),
    "prompt_logprobs": (-1, 2**31 - 1, ">= 0, or -1 for the whole vocabulary"),
    "seed": (-(2**63), 2**63 - 1, "a 64-bit signed integer"),
}
_OPTIONAL = {"max_tokens", "logprobs", "prompt_logprobs", "seed"}


def _check_numbers(params: SamplingParams) -> None:
    for name, (low, high, allowed) in _FLOATS.items():
        value = getattr(params, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(f"{name} must be a number, not {_show(value)}", name)
        if not math.isfinite(value) or not low <= value <= high:
            raise RequestError(f"{name} must be {allowed}, not {_show(value)}", name)
        object.__setattr__(params, name, float(value))
    for name, (least, most, allowed) in _INTS.items():
        value = getattr(params, name)
        if value is None and name in _OPTIONAL:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise RequestError(f"{name} must be an integer, not {_show(value)}", name)
        if not least <= value <= most:
            raise RequestError(f"{name} must be {allowed}, not {_show(value)}", name)
    if params.is_greedy and params.n > 1:
        raise RequestError(
            f"n must be 1 when temperature is 0, not {params.n}: all choices would be equal", "n"
        )
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens must be at most max_tokens ({params.max_tokens}), not {params.min_tokens}",
            "min_tokens",
        )


def _check_words(params: SamplingParams) -> None:
    for name in ("stop", "bad_words"):
        for item in getattr(params, name):
            if not isinstance(item, str) or not item:
                raise RequestError(f"{name} must hold non-empty strings, not {_show(item)}", name)
    if params.stop and not params.detokenize:
        raise RequestError("stop strings need detokenize=True", "stop")
    if params.allowed_token_ids is not None and len(params.allowed_token_ids) == 0:
        raise RequestError("allowed_token_ids must not be empty", "allowed_token_ids")
    for name in ("stop_token_ids", "allowed_token_ids"):
        for token in getattr(params, name) or ():
            if isinstance(token, bool) or not isinstance(token, int):
                raise RequestError(f"{name} must hold integers, not {_show(token)}", name)
    named = params.logits_processors
    if named is not None and not (
        isinstance(named, Mapping) and all(isinstance(name, str) for name in named)
    ):
        raise RequestError(
            f"logits_processors must map names to arguments, not {_show(named)}",
            "logits_processors",
        )
    if params.logit_bias is not None:
        object.__setattr__(params, "logit_bias", _clamped_bias(params.logit_bias))


def _clamped_bias(bias: Mapping[Any, Any]) -> dict[int, float]:
    clamped: dict[int, float] = {}
    for key, value in bias.items():
        try:
            token = int(key)
        except (TypeError, ValueError):
            raise RequestError(
                f"logit_bias keys must be token ids, not {_show(key)}", "logit_bias"
            ) from None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise RequestError(
                f"logit_bias values must be finite numbers, not {_show(value)}", "logit_bias"
            )
        clamped[token] = max(-100.0, min(100.0, float(value)))
    return clamped


def _show(value: object) -> str:
    """A value as an error may repeat it: never the whole of a long input (ERR-3)."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def field_names() -> frozenset[str]:
    """Names of every sampling field."""
    return frozenset(f.name for f in fields(SamplingParams))


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One sequence on its way through the engine (semantics GEN-6).

    The engine touches it when it is admitted, preempted, forked, aborted or finished, and never
    per token: while it runs, its state lives in the columns of `scheduling.table.SequenceTable`.
    """

    id: int
    """Unique in the engine; the caller's own ids never come this far (IN-26)."""

    prompt_token_ids: "NDArray[np.int32]"
    """int32 [num_prompt_tokens], not empty."""

    params: SamplingParams = field(default_factory=SamplingParams)
    """`max_tokens` is resolved: never None here."""

    eos_token_id: int = -1
    """Ends the output unless `params.ignore_eos`; -1 is none."""

    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """`params.bad_words` in tokens, each with and without a leading space (SAMPLE-8)."""

    priority: int = 0
    """Lower is served first under the priority policy."""

    arrival_time: float = 0.0
    """Seconds on the engine's monotonic clock; orders the queue."""

    owner: str = ""
    """Who asks, however that is known: owners share under the policy `fair`."""

    cache_salt: str | None = None
    """Requests share cached prefixes only with the same salt (KV-3)."""

    adapter: str | None = None
    """Name of the adapter (LoRA) that it runs with."""

    adapter_key: str = ""
    """Identifies that adapter's content, for the cache and the device; the engine fills it in."""

    pooling: PoolingParams | None = None
    """Settled, for a request that wants a vector: it ends with its prompt, and draws no token."""

    output_token_ids: list[int] = field(default_factory=list)
    """Known outputs; brought up to date when the sequence leaves the table."""

    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at the first admission (USAGE-3)."""

    first_scheduled_time: float = 0.0
    """When the first admission was, on the engine's monotonic clock (METRIC-6)."""

    num_preemptions: int = 0
    """Times its blocks were taken away."""
