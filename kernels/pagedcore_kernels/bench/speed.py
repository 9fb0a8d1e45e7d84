"""Each kernel's rate: bytes per second where memory limits it, operations where arithmetic does.

S sequences   H query heads   K kv heads   B positions per block   T tokens   h hidden size
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pagedcore.execution.expert_ops import Experts, Routing
from pagedcore.execution.kernel_bench import Figure
from pagedcore.execution.kv_formats import KVFormat, as_is
from pagedcore.execution.ops import QKNorm, RopeTable
from pagedcore_kernels import activation, norms, rope_cache
from pagedcore_kernels.bench.clock import num_rotations, time_calls
from pagedcore_kernels.decode_attention import DecodeConfig, decode_attention
from pagedcore_kernels.expert_routing import route
from pagedcore_kernels.extend_attention import extend_attention
from pagedcore_kernels.extend_plan import ExtendConfig, build_tile_list, num_parts
from pagedcore_kernels.moe import moe
from pagedcore_kernels.work_list import build_work_list

BLOCK_SIZE = 64
HEAD_DIM = 128
NUM_KV_HEADS = 8
"""Of the pool; cases with fewer see more blocks."""


class Pool:
    """One layer's cache, large enough for every case, whose blocks are handed out at random.

    `dtype` is the queries' type; `kv_format` that of keys and values, by default the same.
    """

    def __init__(
        self,
        num_blocks: int,
        dtype: torch.dtype,
        device: str,
        kv_format: KVFormat | None = None,
    ) -> None:
        self.dtype = dtype
        self.kv_format = kv_format or as_is(dtype)
        self.key, self._key_scale = _drawn(num_blocks, self.kv_format, dtype, device)
        self.value, self._value_scale = _drawn(num_blocks, self.kv_format, dtype, device)
        self.num_blocks = num_blocks
        self.device = device

    @property
    def words(self) -> str:
        """What a case's name ends with: nothing for the queries' own type."""
        return "" if self.kv_format.is_exact(self.dtype) else f", {self.kv_format.name}"

    def caches(self, num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values [N, num_kv_heads, B, D]."""
        shape = (-1, num_kv_heads, BLOCK_SIZE, HEAD_DIM)
        return self.key.view(shape), self.value.view(shape)

    def scales(self, num_kv_heads: int) -> tuple[Tensor, Tensor] | None:
        """Scales of both [N, num_kv_heads, B], where the format has them."""
        if self._key_scale is None or self._value_scale is None:
            return None
        shape = (-1, num_kv_heads, BLOCK_SIZE)
        return self._key_scale.view(shape), self._value_scale.view(shape)

    def tables(self, num_rows: int, width: int, count: int, num_kv_heads: int) -> list[Tensor]:
        """`count` block tables [num_rows, width] that share no block, as far as there are any."""
        blocks = torch.randperm(
            self.num_blocks * NUM_KV_HEADS // num_kv_heads, device=self.device
        ).int()
        needed = num_rows * width * count
        blocks = blocks.repeat(-(-needed // len(blocks)))
        return list(blocks[:needed].view(count, num_rows, width))


def _drawn(
    num_blocks: int, kv_format: KVFormat, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor | None]:
    """Codes of normal numbers and their scales, a few blocks at a time."""
    shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    codes = torch.empty(shape, dtype=kv_format.dtype, device=device)
    scale = None
    if kv_format.scale_dtype is not None:
        scale = torch.empty(shape[:3], dtype=kv_format.scale_dtype, device=device)
    for begin in range(0, num_blocks, 512):
        part = slice(begin, min(begin + 512, num_blocks))
        numbers = torch.randn(part.stop - begin, *shape[1:], dtype=dtype, device=device)
        codes[part], scale_of_part = kv_format.encode(numbers)
        if scale is not None and scale_of_part is not None:
            scale[part] = scale_of_part
    return codes, scale


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A batch of sequences that all run `new` tokens at the end of their context."""

    num_heads: int
    num_kv_heads: int
    lengths: tuple[int, ...]
    """Context of each sequence, with its new tokens."""

    new: int = 1

    def __str__(self) -> str:
        """Short, and the same from run to run."""
        longest, shortest = max(self.lengths), min(self.lengths)
        context = str(longest) if longest == shortest else f"{shortest}-{longest}"
        new = "" if self.new == 1 else f" new {self.new}"
        return (
            f"B {len(self.lengths)} ctx {context}{new} heads {self.num_heads}/{self.num_kv_heads}"
        )

    def bytes_read(self, kv_format: KVFormat) -> int:
        """Keys and values of all positions, with their scales."""
        return sum(self.lengths) * 2 * self.num_kv_heads * kv_format.vector_bytes(HEAD_DIM)

    @property
    def operations(self) -> int:
        """Multiplications and additions for each pair of a query and a position it sees."""
        pairs = sum(self.new * n - self.new * (self.new - 1) // 2 for n in self.lengths)
        return 4 * self.num_heads * HEAD_DIM * pairs


def decode_calls(
    case: AttentionCase, pool: Pool, config: DecodeConfig, num_sms: int
) -> list[Callable[[], object]]:
    """Calls of the decode kernel, each on blocks of its own."""
    device, dtype, num = pool.device, pool.dtype, len(case.lengths)
    rotations = num_rotations(case.bytes_read(pool.kv_format))
    keys, values = pool.caches(case.num_kv_heads)
    context = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    rows = torch.randperm(num, device=device).int()
    columns = (case.num_heads + 2 * case.num_kv_heads) * HEAD_DIM
    query = torch.randn(num, columns, dtype=dtype, device=device)
    out = torch.empty(num, case.num_heads * HEAD_DIM, dtype=dtype, device=device)
    width = -(-max(case.lengths) // BLOCK_SIZE)
    calls: list[Callable[[], object]] = []
    for table in pool.tables(num, width, rotations, case.num_kv_heads):
        work = build_work_list(
            context,
            rows,
            table,
            num_kv_heads=case.num_kv_heads,
            block_size=BLOCK_SIZE,
            tile=config.tile,
            window=None,
            max_context_len=max(case.lengths),
            programs=max(num_sms * config.programs_per_sm // case.num_kv_heads, 1),
            min_share=config.min_share,
        )
        calls.append(
            partial(
                decode_attention, query, case.num_heads, HEAD_DIM**-0.5, keys, values, work, out,
                scales=pool.scales(case.num_kv_heads), config=config,
            )
        )  # fmt: skip
    return calls


def extend_calls(
    case: AttentionCase, pool: Pool, config: ExtendConfig, num_sms: int
) -> list[Callable[[], object]]:
    """Calls of the extend kernel, each on blocks of its own."""
    device, dtype, num = pool.device, pool.dtype, len(case.lengths)
    rotations = num_rotations(case.bytes_read(pool.kv_format), 8)
    keys, values = pool.caches(case.num_kv_heads)
    num_tokens = num * case.new
    context = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    start = torch.arange(num + 1, dtype=torch.int32, device=device) * case.new
    rows = torch.randperm(num, device=device).int()
    columns = (case.num_heads + 2 * case.num_kv_heads) * HEAD_DIM
    query = torch.randn(num_tokens, columns, dtype=dtype, device=device)
    out = torch.empty(num_tokens, case.num_heads * HEAD_DIM, dtype=dtype, device=device)
    group = case.num_heads // case.num_kv_heads
    tiles = build_tile_list(start, num_tokens, config.queries // group)
    width = -(-max(case.lengths) // BLOCK_SIZE)
    parts = num_parts(
        num_tokens, case.num_heads, case.num_kv_heads, max(case.lengths), num_sms, config
    )
    return [
        partial(
            extend_attention, query, case.num_heads, HEAD_DIM**-0.5, keys, values, table, start,
            rows, context, tiles, out, scales=pool.scales(case.num_kv_heads), parts=parts,
            config=config,
        )
        for table in pool.tables(num, width, rotations, case.num_kv_heads)
    ]  # fmt: skip


def attention_figures(
    pool: Pool,
    decode: DecodeConfig,
    extend: Callable[[int], ExtendConfig],
    num_sms: int,
    cases: list[AttentionCase],
) -> Iterator[Figure]:
    """Time the attention kernels; `extend` gives the settings for heads that share keys."""
    for case in cases:
        name = f"{case}{pool.words}"
        if case.new == 1:
            passed = time_calls(decode_calls(case, pool, decode, num_sms))
            rate = case.bytes_read(pool.kv_format) / passed.median * 1e6
            yield Figure("decode_attention", name, passed, rate, "B/s")
        else:
            config = extend(case.num_heads // case.num_kv_heads)
            passed = time_calls(extend_calls(case, pool, config, num_sms))
            rate = case.operations / passed.median * 1e6
            yield Figure("extend_attention", name, passed, rate, "FLOP/s")


def dense_attention_figures(cases: list[AttentionCase], device: str) -> Iterator[Figure]:
    """Torch's own attention on whole prompts that lie contiguous: the mark for ours."""
    for case in cases:
        if case.new != max(case.lengths):
            continue
        num, length = len(case.lengths), case.new
        query = torch.randn(
            num, case.num_heads, length, HEAD_DIM, dtype=torch.bfloat16, device=device
        )
        key, value = (query[:, : case.num_kv_heads].contiguous() for _ in range(2))
        attend = partial(
            functional.scaled_dot_product_attention,
            query, key, value, is_causal=True, enable_gqa=True,
        )  # fmt: skip
        for name, kind in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
        ):
            with sdpa_kernel(kind):
                try:
                    passed = time_calls([attend])
                except RuntimeError:  # this torch or device lacks it
                    continue
            rate = case.operations / passed.median * 1e6
            yield Figure(f"torch {name}", str(case), passed, rate, "FLOP/s")


def row_figures(device: str, shapes: list[tuple[int, int]]) -> Iterator[Figure]:
    """Norms, activation and rotary embedding, for shapes (T, h), in bfloat16."""
    for tokens, h in shapes:
        size = tokens * h * 2
        count = num_rotations(4 * size, 32)
        draw = [torch.randn(2, tokens, h, device=device).to(torch.bfloat16) for _ in range(count)]
        weight = torch.ones(h, device=device, dtype=torch.bfloat16)
        case = f"T {tokens} h {h}"
        works: list[tuple[str, int, list[Callable[[], object]]]] = [
            ("rms_norm", 2, [partial(norms.rms_norm, x[0], weight, 1e-6) for x in draw]),
            (
                "add_rms_norm",
                4,
                [partial(norms.add_rms_norm, x[0], x[1], weight, 1e-6) for x in draw],
            ),
            ("silu_mul", 3, [partial(activation.silu_mul, x.view(tokens, -1)) for x in draw]),
        ]
        for name, moved, calls in works:
            passed = time_calls(calls)
            yield Figure(name, case, passed, moved * size / passed.median * 1e6, "B/s")


def rope_figures(pool: Pool, tokens: list[int]) -> Iterator[Figure]:
    """Rotary embedding with norms, for the heads of Qwen3-0.6B and Llama-8B."""
    device = pool.device
    table = RopeTable(torch.randn(4096, HEAD_DIM, device=device))
    weight = torch.ones(HEAD_DIM, device=device, dtype=pool.dtype)
    norm = QKNorm(weight, weight, 1e-6)
    for num in tokens:
        for num_heads in (16, 32):
            columns = (num_heads + 2 * NUM_KV_HEADS) * HEAD_DIM
            kept = 2 * NUM_KV_HEADS * pool.kv_format.vector_bytes(HEAD_DIM)
            size = num * (2 * columns * pool.dtype.itemsize + kept)
            positions = torch.randint(0, 4096, (num,), device=device)
            slots = torch.randperm(pool.num_blocks * BLOCK_SIZE, device=device)[:num]
            calls = [
                partial(
                    rope_cache.rope_and_cache,
                    torch.randn(num, columns, device=device).to(pool.dtype),
                    num_heads, table, norm, pool.key, pool.value, positions, slots,
                    pool.scales(NUM_KV_HEADS),
                )
                for _ in range(num_rotations(size, 32))
            ]  # fmt: skip
            passed = time_calls(calls)
            case = f"T {num} heads {num_heads}/{NUM_KV_HEADS}{pool.words}"
            yield Figure("rope_and_cache", case, passed, size / passed.median * 1e6, "B/s")


def moe_figures(
    device: str, tokens: list[int], shape: tuple[int, int, int, int]
) -> Iterator[Figure]:
    """Experts (E, C, h, F), with even routing: bytes for few tokens, operations for many."""
    num_experts, chosen, h, width = shape
    dtype = torch.bfloat16 if device != "cpu" else torch.float16
    gate_up = torch.randn(num_experts, 2 * width, h, device=device).to(dtype) * h**-0.5
    down = torch.randn(num_experts, h, width, device=device).to(dtype) * width**-0.5
    routing = Routing(num_chosen=chosen, normalize=True)
    mixture = Experts(gate_up=gate_up, down=down)
    for num in tokens:
        inputs = [
            (
                torch.randn(num, h, device=device).to(dtype),
                torch.randn(num, num_experts, device=device).to(dtype),
            )
            for _ in range(8)
        ]
        touched = sum(len(s.topk(chosen).indices.unique()) for _, s in inputs) / len(inputs)
        calls = [partial(_choose_and_mix, *pair, routing, mixture) for pair in inputs]
        passed = time_calls(calls)
        case = f"T {num} E {num_experts} chosen {chosen} h {h} F {width}"
        if num <= 512:
            rate = touched * 3 * width * h * dtype.itemsize / passed.median * 1e6
            yield Figure("moe", case, passed, rate, "B/s")
        else:
            yield Figure(
                "moe", case, passed, num * chosen * 6 * width * h / passed.median * 1e6, "FLOP/s"
            )


def _choose_and_mix(x: Tensor, scores: Tensor, routing: Routing, mixture: Experts) -> Tensor:
    return moe(x, *route(scores, routing), mixture)
