"""What a deployer may tune: declared once here, checked once, before any memory is taken.

The command line's flags, the keywords of `LLM(...)` and the reference page all derive from these
declarations: a field `max_num_seqs` is the flag `--max-num-seqs` and the keyword `max_num_seqs`.
A field that is None has a default that depends on the model or the device; `resolve` fills it in.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from pagedcore.checked_types import check_types
from pagedcore.errors import ConfigError
from pagedcore.lora_config import LoraConfig
from pagedcore.presets import PRESETS, PresetName

logger = logging.getLogger(__name__)

DType = Literal["auto", "float16", "half", "bfloat16", "float32", "float"]
HashAlgorithm = Literal["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"]
ModelImpl = Literal["auto", "pagedcore", "transformers"]
LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]
Usage = Literal["offline", "serve"]

DEFAULT_MODEL = "smollm2-135m"

DEPRECATED = {
    "disable_log_requests": "it is the default; use --enable-log-requests for the opposite",
    "swap_space": "has no effect: preemption recomputes",
    "num_scheduler_steps": "has no effect: --async-scheduling overlaps steps",
    "use_v2_block_manager": "has no effect",
    "max_seq_len_to_capture": "has no effect: graphs do not depend on length",
    "preemption_mode": "has no effect: preemption recomputes",
    "disable_frontend_multiprocessing": "has no effect",
}
"""Names of the past: accepted with a warning, and without effect (semantics LEG-1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how its files are read."""

    model: str = DEFAULT_MODEL
    """A folder, a GGUF file, `hf:org/name`, `modelscope:org/name`, `wheel:...` or an alias."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    tokenizer: str | None = None
    """Folder or name to take the tokenizer from, when it is not the model's."""

    dtype: DType = "auto"
    """Type of weights and activations; `auto` is the checkpoint's, with float32 made smaller."""

    max_model_len: int | None = None
    """Most tokens of prompt and output together; -1 is the largest that fits in the cache."""

    model_impl: ModelImpl = "auto"
    """Code that runs the model: `pagedcore`'s plugins, or `transformers`' own over our cache, which
    is slower; `auto` takes the latter for architectures that no plugin has."""

    quantization: str | None = None
    """Weight format; by default what the checkpoint says."""

    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy` takes random weights from a config.json alone."""

    served_model_name: tuple[str, ...] = ()
    """Names that requests may use; the first is reported. By default the model's own."""

    generation_config: Literal["auto", "none"] = "auto"
    """`auto` takes sampling defaults from the model's generation_config.json (SAMPLE-2)."""

    chat_template: str | None = None
    """A Jinja template, or a file that holds one, in place of the model's."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_model_len is not None and self.max_model_len != -1 and self.max_model_len < 1:
            raise ConfigError(f"max_model_len must be -1 or at least 1, not {self.max_model_len}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Geometry of the paged KV cache.

    A *block* holds `block_size` consecutive positions of one sequence, in every layer. Above the
    executor, memory is counted in blocks and never in bytes.
    """

    block_size: int | None = None
    """Positions per block, a power of two; by default what the backend prefers."""

    gpu_memory_utilization: float = 0.92
    """Share of the device's total memory for this engine: weights, activations and cache."""

    kv_cache_memory_bytes: int | None = None
    """Bytes for the cache, in place of what gpu_memory_utilization leaves."""

    num_gpu_blocks_override: int | None = None
    """Blocks in the pool, in place of what memory would give."""

    cpu_kv_cache_gib: float = 1.0
    """GiB for the cache when the model runs on the CPU."""

    kv_cache_dtype: str = "auto"
    """Format of cached keys and values: `auto` (the model's type), `fp8` (`fp8_e4m3`), `int8` (a
    scale for each token and head), or a plugin's."""

    enable_prefix_caching: bool = True
    """Keep full blocks of ended requests for prompts that begin alike."""

    prefix_caching_hash_algo: HashAlgorithm = "sha256"
    """What identifies a block; `*_cbor` can be computed in other languages (KV-4)."""

    kv_watermark: float | None = None
    """Share of blocks that admission leaves free while something runs; by default 0 (SLOT-5)."""

    def __post_init__(self) -> None:
        check_types(self)
        size = self.block_size
        if size is not None and (size < 1 or size & (size - 1)):
            raise ConfigError(f"block_size must be a power of two, not {size}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization must be in (0, 1], not {self.gpu_memory_utilization}"
            )
        if self.kv_watermark is not None and not 0.0 <= self.kv_watermark < 1.0:
            raise ConfigError(f"kv_watermark must be in [0, 1), not {self.kv_watermark}")
        for name in ("kv_cache_memory_bytes", "num_gpu_blocks_override", "cpu_kv_cache_gib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step, and of what waits for one."""

    preset: PresetName = "general"
    """Defaults for a purpose: what is set explicitly wins over them."""

    max_num_seqs: int | None = None
    """Most sequences that run at the same time."""

    max_num_batched_tokens: int | None = None
    """Most tokens in one step, prompts and outputs together."""

    enable_chunked_prefill: bool = True
    """Cut prompts that do not fit into the step's budget."""

    long_prefill_token_threshold: int | None = None
    """Most prompt tokens of one sequence in a step, while others are there; by default 0, which is
    no limit.
    """

    scheduling_policy: str = "fcfs"
    """Order of the queue and choice of victims: `fcfs`, `priority`, `fair`, or a plugin's.

    Under `fair`, API keys share the engine by tokens: a flood of one does not delay the others.
    """

    scheduler_reserve_full_isl: bool = True
    """Admit a prompt only if all of it would fit, not only its first chunk (SLOT-4)."""

    async_scheduling: bool = True
    """Plan the next step while the device runs this one."""

    max_num_queued_reqs: int = 8192
    """Most sequences that wait; more are refused (QUEUE-1). 0 is no limit."""

    max_num_queued_tokens: int = 0
    """Most prompt tokens that wait; 0 is no limit."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        names = ("long_prefill_token_threshold", "max_num_queued_reqs", "max_num_queued_tokens")
        for name in names:
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionConfig:
    """Where and how steps run."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""

    backend: str | None = None
    """Operations: `torch`, `native`, `triton`, or a plugin's; by default the device's best."""

    enforce_eager: bool = False
    """Run without CUDA graphs."""

    seed: int = 0
    """Seeds the draw of requests that bring no seed of their own, and dummy weights."""

    logprobs_mode: LogprobsMode = "raw_logprobs"
    """What log-probabilities report: the model's own, or after all filters; or logits."""

    disable_plugin: tuple[str, ...] = ()
    """Installed plugins that are not loaded."""

    only_plugin: tuple[str, ...] = ()
    """Installed plugins that are loaded, besides `core`; by default all that are not disabled."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to start, in sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    """The KV cache."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """Steps and queue."""

    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    """Device and backend."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters beside the model."""

    @classmethod
    def from_options(cls, **options: Any) -> "EngineConfig":
        """Build from flat keywords, such as `max_num_seqs=8`.

        Raises ConfigError for an unknown name, with the nearest known one. Names of the past are
        dropped with a DeprecationWarning (semantics LEG-2).
        """
        options = drop_deprecated(options)
        sections = {f.name: f.default_factory for f in fields(cls)}
        owner = {f.name: section for section, kind in sections.items() for f in fields(kind)}  # type: ignore[arg-type]
        chosen: dict[str, dict[str, Any]] = {section: {} for section in sections}
        for name, value in options.items():
            if name not in owner:
                raise ConfigError(unknown_name("setting", name, owner))
            chosen[owner[name]][name] = value
        return cls(**{section: kind(**chosen[section]) for section, kind in sections.items()})  # type: ignore[operator]

    def resolve(
        self,
        *,
        usage: Usage,
        device_memory_gib: float | None,
        is_a100: bool = False,
        max_model_len: int,
        block_size: int,
        chunks_prompts: bool = True,
    ) -> "EngineConfig":
        """Fill in every default that depends on preset, device or model (CFG-2, CFG-3).

        `device_memory_gib` is None on the CPU; `max_model_len` is the model's own limit or the
        one that fits; `block_size` is the backend's preference. A model that must see each prompt
        whole has `chunks_prompts=False`, whatever `enable_chunked_prefill` says. Raises
        ConfigError when explicit values contradict each other.
        """
        chunks_prompts = chunks_prompts and self.scheduler.enable_chunked_prefill
        large = device_memory_gib is not None and device_memory_gib >= 70 and not is_a100
        asked, preset = self.scheduler, PRESETS[self.scheduler.preset]
        max_num_seqs = asked.max_num_seqs or preset.max_num_seqs or (1024 if large else 256)
        budget = asked.max_num_batched_tokens
        if budget is None:
            if preset.max_num_batched_tokens is not None:
                budget = preset.max_num_batched_tokens
            elif device_memory_gib is not None and device_memory_gib >= 160:
                budget = 16384
            elif large:
                budget = 16384 if usage == "offline" else 8192
            else:
                budget = 8192 if usage == "offline" else 2048
            budget = max(budget, max_num_seqs)
            if not chunks_prompts:
                budget = max(budget, max_model_len)
        elif asked.max_num_seqs is None:
            max_num_seqs = min(max_num_seqs, budget)
        if budget < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({budget}) must be at least max_num_seqs ({max_num_seqs})"
            )
        if not chunks_prompts and budget < max_model_len:
            raise ConfigError(
                f"without chunked prefill, max_num_batched_tokens ({budget}) must be at least "
                f"max_model_len ({max_model_len})"
            )
        threshold, watermark = asked.long_prefill_token_threshold, self.cache.kv_watermark
        if threshold is None:
            threshold = preset.long_prefill_token_threshold or 0
        if watermark is None:
            watermark = preset.kv_watermark or 0.0
        return replace(
            self,
            model=replace(self.model, max_model_len=max_model_len),
            cache=replace(
                self.cache, block_size=self.cache.block_size or block_size, kv_watermark=watermark
            ),
            scheduler=replace(
                asked,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=budget,
                long_prefill_token_threshold=threshold,
            ),
        )


def drop_deprecated(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out names of the past, with a DeprecationWarning and a log line each (LEG-2)."""
    for name in [name for name in options if name in DEPRECATED]:
        message = f"{name} is deprecated: {DEPRECATED[name]}"
        logger.warning("%s", message)
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    return {name: value for name, value in options.items() if name not in DEPRECATED}


def unknown_name(kind: str, name: str, known: Mapping[str, Any]) -> str:
    """The message for a name that nothing declares, with the nearest that is."""
    close = get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}" + (f": did you mean {close[0]!r}?" if close else "")
