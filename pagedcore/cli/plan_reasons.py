"""Where the value of each setting comes from, and why it is what it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from pagedcore.cli.flags import field_docs
from pagedcore.config import EngineConfig, Usage
from pagedcore.execution.plan import Plan
from pagedcore.presets import PRESETS

NOT_PLANNED = {
    "model",
    "revision",
    "tokenizer",
    "served_model_name",
    "generation_config",
    "chat_template",
    "seed",
    "logprobs_mode",
    "disable_plugin",
    "only_plugin",
    "load_format",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
}
"""Settings that no plan depends on, and two that replace others where they are given."""

REASONS: Mapping[str, str] = {
    "dtype": "what config.json says; float32 is made smaller",
    "model_impl": "pagedcore's own code where a plugin has the architecture",
    "quantization": "what config.json says",
    "gpu_memory_utilization": "8 % stay free for graphs that grow and for others on the device",
    "cpu_kv_cache_gib": "little, because a host's memory is for others too",
    "kv_cache_dtype": "the model's: 8 bits halve the cache, and answers may differ a little",
    "enable_prefix_caching": "costs nothing where no prompts begin alike",
    "prefix_caching_hash_algo": "no two blocks are ever taken for each other",
    "kv_watermark": "room that is left free is not used",
    "preset": "nothing is known of what it is for",
    "enable_chunked_prefill": "long prompts do not hold up those who decode",
    "long_prefill_token_threshold": "a long prompt may use the whole step",
    "scheduling_policy": "first come, first served",
    "scheduler_reserve_full_isl": "a prompt that is begun is not preempted for want of blocks",
    "async_scheduling": "the device does not wait for the host",
    "max_num_queued_reqs": "8 times as many as run at most by default: more would time out",
    "max_num_queued_tokens": "requests are counted, whatever their length",
    "enable_lora": "room for adapters is taken from the cache",
    "enforce_eager": "graphs spare the host's time",
}
"""Why a default is what it is; where nothing is to be said, its declaration says what it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One line of a plan."""

    name: str
    value: Any
    origin: str
    """`given`, `preset ...`, `device`, `model`, `backend` or `default`."""
    why: str


def explain(
    plan: Plan, resolved: EngineConfig, given: Mapping[str, Any], usage: Usage
) -> list[Setting]:
    """Every setting that the plan depends on; `given` are those that were asked for."""
    preset = PRESETS[resolved.scheduler.preset]
    docs = {n: d for each in fields(resolved) for n, d in _docs(getattr(resolved, each.name))}
    found = _found(plan, usage)
    settings = []
    for section in fields(EngineConfig):
        part = getattr(resolved, section.name)
        for field in fields(part):
            name, value = field.name, getattr(part, field.name)
            is_given = given.get(name) is not None
            if (name in NOT_PLANNED and not is_given) or name == "model":
                continue
            if name in _ELSEWHERE[plan.device] and not is_given:
                continue
            if section.name == "lora" and name != "enable_lora" and not resolved.lora.enable_lora:
                continue
            origin, why = "default", REASONS.get(name) or docs[name]
            if name in found:
                value, origin, why = found[name]
            if name in preset.settings:
                origin, why = f"preset {resolved.scheduler.preset}", "see docs/configuration.md"
                if value != preset.settings[name]:
                    why = f"moved from {preset.settings[name]}: another setting needs it to"
            if is_given:
                origin, why = "given", ""
            settings.append(Setting(name=name, value=value, origin=origin, why=why))
    return settings


def _docs(section: Any) -> Iterable[tuple[str, str]]:
    return field_docs(type(section)).items()


_ELSEWHERE = {
    "cpu": {"gpu_memory_utilization", "enforce_eager"},
    "gpu": {"cpu_kv_cache_gib"},
}
"""Settings that mean nothing on a device."""


def _found(plan: Plan, usage: Usage) -> dict[str, tuple[Any, str, str]]:
    """Value, origin and reason of what depends on model, backend or device."""
    device = "a CPU" if plan.device == "cpu" else "this GPU"
    seqs = "1024 on GPUs of 70 GiB or more, but A100; 256 elsewhere"
    tokens = (
        "for requests that nobody waits for, large steps pay"
        if usage == "offline"
        else f"for {device}, a step that takes about as long as a reader notices"
    )
    if plan.max_num_batched_tokens == plan.max_num_seqs:
        tokens = "every running sequence needs a token of the step"
    return {
        "dtype": (plan.dtype, "model", REASONS["dtype"]),
        "quantization": (plan.quantization, "model", REASONS["quantization"]),
        "max_model_len": (
            plan.max_model_len,
            "model",
            "as long as config.json says it was made for",
        ),
        "block_size": (plan.block_size, "backend", f"what {plan.backend} reads fastest"),
        "backend": (plan.backend, "device", f"the best for {device}"),
        "device": (plan.device, "device", "the GPU that is planned for, or else the CPU"),
        "max_num_seqs": (plan.max_num_seqs, "device", seqs),
        "max_num_batched_tokens": (plan.max_num_batched_tokens, "device", tokens),
    }
