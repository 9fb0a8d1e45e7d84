"""What a deployer may tune about serving: addresses, limits, keys and streams.

Like `pagedcore.config`, the one declaration of each setting: a field `max_n` is the flag `--max-n`
of `pagedcore serve` and a keyword of every mount. No web framework is known here.
"""

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pagedcore.errors import ConfigError
from pagedcore.logs import LogFormat
from pagedcore.request import SamplingLimits

API_KEY_VARIABLE = "PAGEDCORE_API_KEY"
"""Environment variable that holds keys, separated by commas."""

_TRACING = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
"""What the extra `tracing` installs."""


def _keys_from_environment() -> tuple[str, ...]:
    return tuple(filter(None, os.environ.get(API_KEY_VARIABLE, "").split(",")))


def _keys_from_file(path: str) -> list[str]:
    """The keys of a file; raises ConfigError where there is none, without repeating a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"api_key_file: cannot read {path}: {reason}") from None
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"api_key_file: {path} holds no key; write one a line")
    return keys


def _check_traces_endpoint(endpoint: str) -> None:
    """Raise ConfigError unless spans can be sent there, once it answers."""
    try:
        url = urlsplit(endpoint)
        is_address = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(
            f"otlp_traces_endpoint must be the http or https address of an OTLP/HTTP receiver, "
            f"such as http://localhost:4318/v1/traces, not {endpoint[:200]!r}"
        )
    if url.username is not None:
        raise ConfigError(
            "otlp_traces_endpoint must not hold a user or a password: put what the receiver asks "
            "for into the environment variable OTEL_EXPORTER_OTLP_TRACES_HEADERS"
        )
    for module in _TRACING:
        try:
            found = find_spec(module)
        except ModuleNotFoundError:  # what it is in is missing
            found = None
        if found is None:
            raise ConfigError(
                f"otlp_traces_endpoint: needs the package {module}: "
                "pip install 'pagedcore[tracing]'."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP surface of one server. Raises ConfigError for a value out of range."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of the machine."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    api_key: tuple[str, ...] = field(default_factory=_keys_from_environment, repr=False)
    """Keys that clients may present, one or more; also PAGEDCORE_API_KEY (AUTH-1)."""

    api_key_file: str | None = None
    """File with further keys, one a line; empty lines and those that begin with # are skipped."""

    auth_exempt_paths: tuple[str, ...] = ("/health", "/livez", "/readyz", "/ping")
    """Paths that need no key."""

    max_request_bytes: int = 32 * 2**20
    """Most bytes of a request's body; more is 413."""

    max_body_chunks: int = 65536
    """Most chunks of a chunked body; more is 400."""

    max_json_depth: int = 128
    """Most brackets within each other in a body; more is 400."""

    max_json_values: int = 1_000_000
    """Most values in a body, counted by its commas; more is 400."""

    max_header_bytes: int = 64 * 2**10
    """Most bytes of all headers of a request; more is 431."""

    max_header_count: int = 256
    """Most header fields of a request; more is 431."""

    http_read_timeout: float = 10.0
    """Seconds for all headers to arrive, and then for the whole body."""

    max_n: int = 128
    """Most choices per prompt."""

    max_prompts_per_request: int = 1024
    """Most prompts in one completion request."""

    max_stop_strings: int = 16
    """Most stop strings of a request."""

    max_bad_words: int = 128
    """Most bad words of a request."""

    max_logit_bias: int = 1024
    """Most logit_bias entries of a request."""

    max_logprobs: int = 20
    """Most log-probabilities per token; -1 allows the whole vocabulary."""

    template_timeout: float = 30.0
    """Seconds that rendering a chat template may take."""

    strict_params: bool = False
    """Refuse unknown request fields, in place of naming them in a header (REQ-2, REQ-3)."""

    stream_interval: int = 1
    """Tokens per streamed chunk, after the first token, which is sent at once."""

    sse_keepalive_interval: float = 0.0
    """Seconds between keep-alive comments in a silent stream; 0 sends none."""

    enable_prompt_tokens_details: bool = False
    """Report in `usage` how many prompt tokens were found in the cache."""

    enable_force_include_usage: bool = False
    """Report usage in every chunk of every stream."""

    max_inflight_per_key: int = 0
    """Most HTTP requests of one API key at the same time; more are 429. 0 is no limit.

    Each front-end process counts for itself, and all callers without a key as one.
    """

    max_requests_per_minute: int = 0
    """Most inference requests of one API key in any minute; more are 429. 0 is no limit.

    It is counted as `max_inflight_per_key` is.
    """

    trust_request_chat_template: bool = False
    """Let requests bring their own chat template (REQ-9)."""

    enable_admin_api: bool = False
    """Offer the routes that change the server, such as /reset_prefix_cache (HTTP-3)."""

    metrics_alias: Literal["vllm"] | None = None
    """Also export each metric under the names that vLLM's dashboards use (METRIC-4)."""

    allowed_origins: tuple[str, ...] = ()
    """Web origins that browsers may call from, such as https://example.org; by default none."""

    ssl_certfile: str | None = None
    """PEM file with the certificate chain; with it, the server speaks TLS."""

    ssl_keyfile: str | None = None
    """PEM file with the certificate's key, when that is not in `ssl_certfile`."""

    log_format: LogFormat = "text"
    """How the log is written: `text`, or `json` for one object a line."""

    enable_log_requests: bool = False
    """Log one line per request, without its text."""

    otlp_traces_endpoint: str | None = None
    """Where to send a span per inference request: the address of an OTLP/HTTP receiver, such as
    http://localhost:4318/v1/traces (LIFE-6).

    It needs the extra `tracing`. Without a path, /v1/traces is meant.
    """

    shutdown_timeout: float = 0.0
    """Seconds that accepted requests may take to end after SIGTERM; 0 aborts them (LIFE-4)."""

    num_api_servers: int = 1
    """Front-end processes that share the port, where the mount supports several."""

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("host must not be empty; 0.0.0.0 is every network of the machine")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in 0..65535, not {self.port}")
        if self.api_key_file is not None:
            keys = (*self.api_key, *_keys_from_file(self.api_key_file))
            object.__setattr__(self, "api_key", tuple(dict.fromkeys(keys)))
        if any(not key or key.strip() != key for key in self.api_key):
            raise ConfigError("api_key must hold keys that are not empty and have no outer spaces")
        for path in self.auth_exempt_paths:
            if not path.startswith("/"):
                raise ConfigError(f"auth_exempt_paths must begin with '/', not {path!r}")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:  # also refuses NaN
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("http_read_timeout", "template_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 seconds, not {getattr(self, name)}")
        if self.otlp_traces_endpoint is not None:
            _check_traces_endpoint(self.otlp_traces_endpoint)
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("ssl_keyfile needs ssl_certfile")
        for name in ("ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not os.access(path, os.R_OK):
                raise ConfigError(f"{name}: {path} is no file that can be read")

    @property
    def sampling_limits(self) -> SamplingLimits:
        """The caps that `SamplingParams.check_limits` enforces."""
        return SamplingLimits(
            max_n=self.max_n,
            max_logprobs=self.max_logprobs,
            max_stop_strings=self.max_stop_strings,
            max_bad_words=self.max_bad_words,
            max_logit_bias=self.max_logit_bias,
        )


_LEAST: dict[str, int] = {
    "max_request_bytes": 1,
    "max_body_chunks": 1,
    "max_json_depth": 1,
    "max_json_values": 1,
    "max_header_bytes": 1,
    "max_header_count": 1,
    "max_n": 1,
    "max_prompts_per_request": 1,
    "max_stop_strings": 0,
    "max_bad_words": 0,
    "max_logit_bias": 0,
    "max_logprobs": -1,
    "stream_interval": 1,
    "sse_keepalive_interval": 0,
    "max_inflight_per_key": 0,
    "max_requests_per_minute": 0,
    "shutdown_timeout": 0,
    "num_api_servers": 1,
}
