"""TritonOps: the operations that models are made of, as kernels for NVIDIA GPUs.

A kernel that does not compile on the device at hand is replaced by plain torch (see `fallback`).
With TRITON_INTERPRET=1 in the environment before triton is imported, everything runs on the CPU, in
triton's interpreter: slow, and the same arithmetic.

A layer's cache is two tensors [N blocks, K kv heads, B positions, D elements]: the positions of one
head in one block lie together, in one run that attention reads in full lines. Scales, where the
format has them, are two more [N, K, B]. Latent vectors are one tensor of this kind, of one head.
"""

import torch
import triton
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.errors import ConfigError
from pagedcore.execution.expert_ops import Experts, Routing
from pagedcore.execution.kernel_bench import KernelBench
from pagedcore.execution.kv_formats import Cast, Int8, KVFormat, no_kernels
from pagedcore.execution.lora_ops import AdapterStep, LoraWeights
from pagedcore.execution.ops import (
    LayerCache,
    Ops,
    QKNorm,
    RopeTable,
    SamplingTensors,
    StepBatch,
)
from pagedcore_kernels import (
    activation,
    block_copy,
    decode_rows,
    expert_routing,
    lora,
    norms,
    packed_experts,
    rope_cache,
)
from pagedcore_kernels import moe as mixtures
from pagedcore_kernels import sampling as draws
from pagedcore_kernels.decode_attention import choose_decode, decode_attention
from pagedcore_kernels.dependent import can_depend
from pagedcore_kernels.extend_attention import extend_attention
from pagedcore_kernels.extend_plan import choose_extend, num_parts
from pagedcore_kernels.fallback import PlainOps, with_fallback
from pagedcore_kernels.kept_types import scales_of
from pagedcore_kernels.latent_ops import LatentOps
from pagedcore_kernels.linear_ops import LinearOps
from pagedcore_kernels.small_linear import Scratch
from pagedcore_kernels.step_lists import shared_tile_list, shared_work_list
from pagedcore_kernels.tuned_plans import load_plans, plans_file

MIN_CAPABILITY = (8, 0)
"""The first with bfloat16 matrix products and asynchronous copies."""


class TritonOps(LinearOps, LatentOps):
    """The `triton` backend, for one device."""

    name = "triton"
    block_size = 64

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.replaced: set[str] = set()
        self.plain: Ops = PlainOps(device)
        self.supports_graphs = self.device.type == "cuda"
        self._num_sms, self._shared_memory = _size_of(self.device)
        self._scratch = Scratch(self.device)
        self._plans = load_plans(plans_file(self.device))

    def kernel_bench(self, *, small: bool = False, cache_gib: float = 16.0) -> KernelBench:
        """See `pagedcore.execution.kernel_bench.Measured`."""
        from pagedcore_kernels.bench.suite import Suite  # which needs this module

        return Suite(
            str(self.device),
            num_sms=self._num_sms,
            shared_memory=self._shared_memory,
            small=small,
            cache_gib=cache_gib,
        )

    def begin_step(self, batch: StepBatch) -> None:
        """See `Ops.begin_step`."""
        batch.shared = {}

    @with_fallback
    def decode_inputs(
        self,
        tokens: Tensor,
        block_tables: Tensor,
        rows: Tensor,
        positions: Tensor,
        block_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Ops.decode_inputs`."""
        return decode_rows.decode_inputs(tokens, block_tables, rows, positions, block_size)

    @with_fallback
    def advance_rows(
        self, drawn: Tensor, logits: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """See `Ops.advance_rows`."""
        return decode_rows.advance_rows(drawn, logits, tokens, rows, positions)

    @with_fallback
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return norms.rms_norm(x, weight, eps)

    @with_fallback
    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`."""
        return norms.add_rms_norm(x, residual, weight, eps)

    @with_fallback
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        return activation.silu_mul(gate_up)

    @with_fallback
    def gelu_mul(self, gate_up: Tensor, *, tanh: bool) -> Tensor:
        """See `Ops.gelu_mul`."""
        return activation.gelu_mul(gate_up, tanh=tanh)

    @with_fallback
    def cap_scores(self, scores: Tensor, cap: float) -> Tensor:
        """See `Ops.cap_scores`."""
        return activation.cap_scores(scores, cap)

    def new_cache(
        self,
        spec: CacheSpec,
        group: int,
        num_blocks: int,
        block_size: int,
        kv_format: KVFormat,
        device: torch.device,
    ) -> LayerCache:
        """See `Ops.new_cache`."""
        if not isinstance(kv_format, Cast | Int8):
            raise no_kernels(self.name, kv_format, ("auto", "fp8", "int8"))
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        key = torch.zeros(shape, dtype=kv_format.dtype, device=device)
        value = key if spec.latent else torch.zeros_like(key)
        cache = LayerCache(spec, group, block_size, kv_format, key, value)
        if kv_format.scale_dtype is not None:
            cache.key_scale = torch.zeros(shape[:3], dtype=kv_format.scale_dtype, device=device)
            cache.value_scale = torch.zeros_like(cache.key_scale)
        return cache

    @with_fallback
    def rope_and_cache(
        self,
        qkv: Tensor,
        num_heads: int,
        rope: RopeTable | None,
        norm: QKNorm | None,
        cache: LayerCache,
        batch: StepBatch,
    ) -> None:
        """See `Ops.rope_and_cache`."""
        rope_cache.rope_and_cache(
            qkv,
            num_heads,
            rope,
            norm,
            cache.key,
            cache.value,
            batch.positions,
            batch.slots[cache.group],
            scales_of(cache),
        )

    @with_fallback
    def attention(
        self,
        qkv: Tensor,
        num_heads: int,
        scale: float,
        cache: LayerCache,
        batch: StepBatch,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `Ops.attention`."""
        num_tokens, num_single = len(qkv), batch.num_single
        spec = cache.spec
        out = torch.empty(
            (num_tokens, num_heads * spec.head_dim), dtype=qkv.dtype, device=qkv.device
        )
        if num_single:
            decode = choose_decode(
                spec.head_dim, cache.key.dtype, cache.block_size, self._shared_memory
            )
            decode_attention(
                qkv[:num_single],
                num_heads,
                scale,
                cache.key,
                cache.value,
                shared_work_list(cache, batch, spec.num_kv_heads, self._num_sms, decode),
                out[:num_single],
                scales=scales_of(cache),
                window=spec.window,
                soft_cap=soft_cap,
                sinks=sinks,
                config=decode,
            )
        if num_single < len(batch.rows):
            group = num_heads // spec.num_kv_heads
            extend = choose_extend(
                spec.head_dim,
                qkv.dtype,
                group,
                self._shared_memory,
                can_describe=can_depend(self.device) and cache.key.dtype == qkv.dtype,
            )
            extend_attention(
                qkv,
                num_heads,
                scale,
                cache.key,
                cache.value,
                batch.block_tables[cache.group],
                batch.query_start[num_single:],
                batch.rows[num_single:],
                batch.context_len[num_single:],
                shared_tile_list(extend.queries // group, num_tokens, batch),
                out,
                scales=scales_of(cache),
                first_token=num_single,
                parts=num_parts(
                    num_tokens - num_single,
                    num_heads,
                    spec.num_kv_heads,
                    batch.max_context_len,
                    self._num_sms,
                    extend,
                ),
                window=spec.window,
                soft_cap=soft_cap,
                sinks=sinks,
                config=extend,
            )
        return out

    @with_fallback
    def route(
        self, router_logits: Tensor, routing: Routing, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.route`."""
        return expert_routing.route(router_logits, routing, bias)

    def pack_experts(self, experts: Experts, dtype: torch.dtype) -> Experts:
        """See `Ops.pack_experts`."""
        return packed_experts.pack_experts(experts, dtype)

    @with_fallback
    def moe(self, x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
        """See `Ops.moe`."""
        if isinstance(experts, packed_experts.PackedExperts):
            return packed_experts.moe(
                x, weights, chosen, experts, shared_memory=self._shared_memory
            )
        return mixtures.moe(x, weights, chosen, experts)

    @with_fallback
    def add_lora(self, y: Tensor, x: Tensor, weights: LoraWeights, step: AdapterStep) -> None:
        """See `LoraOps.add_lora`."""
        lora.add_lora(y, x, weights, step, num_sms=self._num_sms)

    @with_fallback
    def copy_blocks(self, cache: LayerCache, copies: Tensor) -> None:
        """See `Ops.copy_blocks`."""
        block_copy.copy_blocks(cache.key, cache.value, copies)
        scales = scales_of(cache)
        if scales is not None:
            keys, values = scales
            block_copy.copy_blocks(keys[..., None], values[..., None], copies)

    @with_fallback
    def sample(self, logits: Tensor, sampling: SamplingTensors) -> Tensor:
        """See `Ops.sample`."""
        return draws.sample(logits, sampling)


def _size_of(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program can have on one."""
    if triton.knobs.runtime.interpret and device.type == "cpu":
        return 4, 1 << 17
    if device.type == "meta":  # shapes alone, to plan for a GPU that is elsewhere
        return 132, 227 << 10
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f"the backend 'triton' needs an NVIDIA GPU, and the device is {str(device)!r}: "
            "choose device='cuda', or backend='torch'."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (MIN_CAPABILITY, capability))
        raise ConfigError(
            f"the backend 'triton' needs compute capability {needed} or later, and "
            f"{torch.cuda.get_device_name(device)} has {found}: choose backend='torch'."
        )
    facts = torch.cuda.get_device_properties(device)
    limit: int = facts.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs
    return facts.multi_processor_count, limit
