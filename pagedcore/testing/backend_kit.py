"""The backend kit: does every operation compute what plain torch computes in higher precision?

    T tokens   h hidden size   F MLP width   H query heads   K kv heads   D head size   E experts

Shapes are odd and random; inputs are rounded to the type under test, and plain torch gets the same
numbers in float32. An error is a root mean square, as a share of the result's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pagedcore.cache_spec import CacheSpec
from pagedcore.errors import PluginError
from pagedcore.execution.expert_ops import Experts, Routing
from pagedcore.execution.kv_formats import as_is
from pagedcore.execution.lora_ops import NO_ADAPTER, AdapterStep, LoraWeights
from pagedcore.execution.ops import LayerCache, Ops, QKNorm, RopeTable, SamplingTensors
from pagedcore.execution.quantized import FLOAT8, Grouped
from pagedcore.execution.torch_ops import TorchOps
from pagedcore.testing.backend_steps import DrawnStep, draw_step
from pagedcore.testing.checks import Check

LIMITS = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest error in each type."""

EIGHT_BITS = 6e-2
"""The same, where activations are rounded to 8 bits."""

Pairs = Iterator[tuple[str, Tensor, Tensor]]
"""What is compared: a word, what the backend gave, what plain torch gave."""


class Draw:
    """Random inputs: `pair` gives a tensor in the type under test, and the same in float32."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, low: int, high: int) -> int:
        """A number in low .. high."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def pair(self, *shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Normal numbers."""
        values = (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)
        return values, values.float()


def backend_checks(
    name: str,
    make: Callable[[str], Ops],
    dtypes: Sequence[torch.dtype],
    *,
    num_shapes: int = 3,
) -> Iterator[Check]:
    """What a backend promises on the CPU: each operation, in each type, on so many shapes."""
    for dtype in dtypes:
        for operation, compare in OPERATIONS.items():
            words = f"{operation} in {str(dtype).removeprefix('torch.')}"
            yield Check(
                f"backend {name}", words, partial(check_operation, make, dtype, compare, num_shapes)
            )


def check_operation(
    make: Callable[[str], Ops],
    dtype: torch.dtype,
    compare: Callable[[Ops, Ops, Draw], Pairs],
    num_shapes: int,
) -> str:
    """Compare one operation on a few shapes; raise PluginError where it is off by too much."""
    ops, plain, largest = make("cpu"), TorchOps("cpu"), 0.0
    for seed in range(num_shapes):
        for what, got, want in compare(ops, plain, Draw(dtype, seed)):
            if got.shape != want.shape:
                raise PluginError(f"{what}: {list(got.shape)} instead of {list(want.shape)}")
            limit = EIGHT_BITS if "8 bits" in what else LIMITS[dtype]
            error = _error(got, want)
            if not error <= limit:
                raise PluginError(f"{what}: the error is {error:.2g}; {limit:.2g} is allowed")
            largest = max(largest, error)
    return f"error {largest:.1g}"


def _error(got: Tensor, want: Tensor) -> float:
    if not got.is_floating_point():
        return float((got.long() != want.long()).any())
    scale = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / (scale or 1.0)


def _rand(draw: Draw, *shape: int) -> Tensor:
    return torch.rand(shape, generator=draw.generator)


def _norms(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    tokens, h = draw.size(1, 9), draw.size(1, 150)
    (x, x32), (r, _), (w, w32) = draw.pair(tokens, h), draw.pair(tokens, h), draw.pair(h)
    yield "rms_norm", ops.rms_norm(x, w, 1e-5), plain.rms_norm(x32, w32, 1e-5)
    total = r + x
    normed, stream = ops.add_rms_norm(x.clone(), r.clone(), w, 1e-5)
    yield "the sum of add_rms_norm", stream, total.float()
    yield "add_rms_norm", normed, plain.rms_norm(total.float(), w32, 1e-5)


def _activations(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    x, x32 = draw.pair(draw.size(1, 9), 2 * draw.size(1, 80), scale=3.0)
    yield "silu_mul", ops.silu_mul(x), plain.silu_mul(x32)
    for tanh in (False, True):
        yield f"gelu_mul, {tanh=}", ops.gelu_mul(x, tanh=tanh), plain.gelu_mul(x32, tanh=tanh)
    yield "cap_scores", ops.cap_scores(x.clone(), 4.0), plain.cap_scores(x32.clone(), 4.0)


def _products(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    columns, rows = 2 * draw.size(4, 60), draw.size(8, 130)
    (w, w32), (b, b32) = draw.pair(rows, columns), draw.pair(rows)
    for tokens in (1, draw.size(2, 40)):
        x, x32 = draw.pair(tokens, columns)
        packed = ops.pack_linear(w.clone())
        yield "linear", ops.linear(x, packed), plain.linear(x32, w32)
        yield "linear with a bias", ops.linear(x, packed, b), plain.linear(x32, w32, b32)
        yield "scores", ops.scores(x, w, packed), plain.scores(x32, w32, w32)


def _eight_bits(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    tokens, h, rows = draw.size(1, 9), 16 * draw.size(2, 8), 16 * draw.size(1, 6)
    x, x32 = draw.pair(tokens, h)
    found = ops.quantize(x)
    yield "quantize, 8 bits", found.values.float() * found.scale, x32
    weight = draw.pair(rows, h)[1].to(FLOAT8)
    scale = _rand(draw, rows, 1) + 0.5
    want = plain.linear(x32, weight.float() * scale)
    yield "scaled_linear, 8 bits", ops.scaled_linear(x, weight, scale), want
    if ops.wants_quantized(tokens, weight, scale, draw.dtype):
        yield "scaled_linear of 8 bits", ops.scaled_linear(found, weight, scale), want


def _attention(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    heads, kv_heads = ((4, 2), (6, 2), (3, 3))[draw.size(0, 2)]
    head_dim = (16, 32, 64)[draw.size(0, 2)]
    for window, cap in ((None, None), (9, None), (None, 2.0)):
        spec = CacheSpec(num_kv_heads=kv_heads, head_dim=head_dim, window=window)
        step = draw_step(draw.generator, lengths=[(1, 1), (1, 37), (5, 5), (11, 30)])
        qkv, qkv32 = draw.pair(step.num_tokens, (heads + 2 * kv_heads) * head_dim)
        past, past32 = draw.pair(sum(step.past), (heads + 2 * kv_heads) * head_dim)
        norms = [draw.pair(head_dim) for _ in "qk"]
        angles = torch.outer(torch.arange(64.0), _rand(draw, head_dim // 2))
        rope = RopeTable(torch.cat([angles.cos(), angles.sin()], 1))
        results = []
        for backend, new, old, part in ((ops, qkv, past, 0), (plain, qkv32, past32, 1)):
            norm = QKNorm(norms[0][part], norms[1][part], 1e-6)
            cache = backend.new_cache(
                spec, 0, step.num_blocks, step.block_size, as_is(new.dtype), torch.device("cpu")
            )
            _run_past(backend, cache, old.clone(), heads, rope, norm, step)
            mine = new.clone()
            backend.begin_step(step.batch)
            backend.rope_and_cache(mine, heads, rope, norm, cache, step.batch)
            step.batch.shared = None
            backend.begin_step(step.batch)
            mixed = backend.attention(mine, heads, head_dim**-0.5, cache, step.batch, soft_cap=cap)
            results.append((mine[:, : (heads + kv_heads) * head_dim], mixed))
        yield "rope_and_cache", results[0][0], results[1][0]
        yield f"attention, {window=}, soft_cap={cap}", results[0][1], results[1][1]


def _run_past(
    backend: Ops,
    cache: LayerCache,
    qkv: Tensor,
    heads: int,
    rope: RopeTable,
    norm: QKNorm,
    step: DrawnStep,
) -> None:
    """Put what came before the step into the cache."""
    backend.begin_step(step.past_batch)
    backend.rope_and_cache(qkv, heads, rope, norm, cache, step.past_batch)


def _experts(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    experts, h, width = draw.size(4, 9), 16 * draw.size(1, 4), 16 * draw.size(1, 4)
    x, x32 = draw.pair(draw.size(1, 20), h)
    (up, up32), (down, down32) = (
        draw.pair(experts, 2 * width, h, scale=h**-0.5),
        draw.pair(experts, h, width, scale=width**-0.5),
    )
    routing = Routing(num_chosen=3, normalize=True)
    logits = draw.pair(len(x), experts)[1]
    weights, chosen = plain.route(logits, routing)
    got_weights, got_chosen = ops.route(logits.to(draw.dtype), routing)
    rounded, rounded_chosen = plain.route(logits.to(draw.dtype).float(), routing)
    yield "the experts of route", got_chosen, rounded_chosen
    yield "the weights of route", got_weights, rounded
    mixed = ops.moe(x, weights, chosen, Experts(gate_up=up, down=down))
    yield "moe", mixed, plain.moe(x32, weights, chosen, Experts(gate_up=up32, down=down32))
    few_bits = Experts(
        gate_up=_codes(draw, experts * 2 * width, h), down=_codes(draw, experts * h, width)
    )
    wanted = plain.moe(x32, weights, chosen, few_bits)
    mixed = ops.moe(x, weights, chosen, ops.pack_experts(few_bits, draw.dtype))
    yield "moe of packed experts", mixed, wanted


def _codes(draw: Draw, rows: int, columns: int) -> Grouped:
    """A weight [rows, columns] of 4 bits in groups of 16."""
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, generator=draw.generator)
    scale = (_rand(draw, rows, columns // 16) + 0.5) / (4 * columns**0.5)
    return Grouped(codes, scale, 4)


def _adapters(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    """The first sequences run one token each; those behind run several."""
    num_single, num_others, slots, rank = draw.size(0, 4), draw.size(1, 40), 3, 16
    num_tokens, h = num_single + num_others, draw.size(5, 90)
    widths = (draw.size(3, 70), draw.size(3, 70))
    (x, x32), (y, y32) = draw.pair(num_tokens, h), draw.pair(num_tokens, sum(widths))
    (a, a32), (b, b32) = (
        draw.pair(slots, len(widths) * rank, h, scale=h**-0.5),
        draw.pair(slots, sum(widths), rank, scale=rank**-0.5),
    )
    present = torch.ones(slots, len(widths), dtype=torch.int32)
    part_widths = torch.tensor(widths, dtype=torch.int32)
    of = torch.randint(NO_ADAPTER, slots, (num_tokens,), generator=draw.generator).int()
    ops.add_lora(y, x, LoraWeights(a, b, widths, part_widths, present), AdapterStep(of, num_single))
    exact = LoraWeights(a32, b32, widths, part_widths, present)
    plain.add_lora(y32, x32, exact, AdapterStep(of, num_single))
    yield "add_lora", y, y32


def _rows(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    num_rows, longest, block_size = 6, 40, 16
    tokens = torch.randint(0, 90, (num_rows, longest), generator=draw.generator).int()
    tables = torch.randint(1, 50, (2, num_rows, 3), generator=draw.generator).int()
    rows = torch.tensor([3, 0, num_rows - 1])
    positions = torch.tensor([5, 17, 0])
    names = ("token ids", "rows", "context lengths", "slots")
    gave, want = (
        o.decode_inputs(tokens, tables, rows, positions, block_size) for o in (ops, plain)
    )
    for name, mine, theirs in zip(names, gave, want, strict=True):
        yield f"decode_inputs: {name}", mine[..., :2], theirs[..., :2]
    drawn, logits = torch.tensor([7, 8, 9]), draw.pair(3, 90)[0]
    logits[1] = torch.nan
    states = []
    for backend in (ops, plain):
        table, at = tokens.clone(), positions.clone()
        told = backend.advance_rows(drawn, logits, table, rows, at)
        states.append((told[:2], table[rows[:2]], at))
    for name, mine, theirs in zip(("tokens", "table", "positions"), *states, strict=True):
        yield f"advance_rows: {name}", mine, theirs


def _draws(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    """In float32 whatever the type: rounded logits have ties, of which either may be taken."""
    size, vocab = 5, draw.size(20, 300)
    logits = torch.randn(size, vocab, generator=draw.generator) * 3
    for greedy, filtered in ((True, False), (False, False), (False, True)):
        sampling = SamplingTensors(
            temperature=torch.zeros(size) if greedy else torch.full((size,), 0.8),
            min_p=torch.full((size,), 0.02 if filtered else 0.0),
            top_k=torch.full((size,), 17 if filtered else 0, dtype=torch.int32),
            top_p=torch.full((size,), 0.9 if filtered else 1.0),
            uniform=_rand(draw, size),
            all_greedy=greedy,
            any_filter=filtered,
        )
        what = f"sample, {greedy=}, {filtered=}"
        yield what, ops.sample(logits.clone(), sampling), plain.sample(logits, sampling)


def _copies(ops: Ops, plain: Ops, draw: Draw) -> Pairs:
    """A copied block must serve as the one that it was copied from."""
    spec = CacheSpec(num_kv_heads=2, head_dim=16)
    step = draw_step(draw.generator, lengths=[(1, 14)])
    width = 6 * 16
    past, new = draw.pair(sum(step.past), width)[0], draw.pair(1, width)[0]
    cache = ops.new_cache(spec, 0, step.num_blocks + 1, 16, as_is(draw.dtype), torch.device("cpu"))
    none = QKNorm(torch.ones(16, dtype=draw.dtype), torch.ones(16, dtype=draw.dtype), 1e-6)
    rope = RopeTable(torch.cat([torch.ones(64, 8), torch.zeros(64, 8)], 1))
    _run_past(ops, cache, past, 2, rope, none, step)
    results = []
    for copied in (False, True):
        if copied:
            source, target = int(step.batch.block_tables[0, 0, 0]), step.num_blocks
            ops.copy_blocks(cache, torch.tensor([[source, target, 13]], dtype=torch.int32))
            step.batch.block_tables[0, 0, 0] = target
            step.batch.slots = step.batch.slots - source * 16 + target * 16
        mine = new.clone()
        step.batch.shared = None
        ops.begin_step(step.batch)
        ops.rope_and_cache(mine, 2, rope, none, cache, step.batch)
        results.append(ops.attention(mine, 2, 0.25, cache, step.batch))
    yield "copy_blocks", results[1], results[0].float()


OPERATIONS: Mapping[str, Callable[[Ops, Ops, Draw], Pairs]] = {
    "norms": _norms,
    "activations": _activations,
    "products": _products,
    "products in 8 bits": _eight_bits,
    "attention": _attention,
    "experts": _experts,
    "adapters": _adapters,
    "rows": _rows,
    "draws": _draws,
    "copies": _copies,
}
"""By the words that a report has for them."""
