"""Operations in plain torch, attention aside, against a direct computation in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.cache_spec import CacheSpec
from pagedcore.execution.expert_ops import Experts, Routing
from pagedcore.execution.kv_formats import as_is
from pagedcore.execution.ops import QKNorm, RopeTable, SamplingTensors, StepBatch
from pagedcore.execution.torch_ops import TorchOps

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = st.sampled_from(sorted(TOLERANCE, key=str))


@pytest.fixture
def ops():
    return TorchOps("cpu")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got, want, dtype=torch.float32):
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def normed(x, weight, eps):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def one_step(positions, num_slots=None):
    """A batch that says where tokens stand; their slots are their numbers in reverse."""
    count = len(positions)
    return StepBatch(
        positions=torch.tensor(positions),
        rows=torch.zeros(1, dtype=torch.int32),
        query_start=torch.tensor([0, count], dtype=torch.int32),
        context_len=torch.tensor([max(positions) + 1], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, 4, dtype=torch.int32),
        slots=torch.arange(num_slots or count).flip(0)[None, :count],
        num_single=0,
        max_query_len=count,
        max_context_len=max(positions) + 1,
    )


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 9),
    size=st.sampled_from([(1, 1), (7, 3), (64, 96), (33, 70)]),
    dtype=DTYPES,
    bias=st.booleans(),
)
def test_a_packed_weight_multiplies_like_the_weight_it_was(tokens, size, dtype, bias):
    ops = TorchOps("cpu")
    x, weight = random(tokens, size[0], dtype=dtype), random(*size[::-1], dtype=dtype, seed=1)
    added = random(size[1], dtype=dtype, seed=2) if bias else None
    packed = ops.pack_linear(weight)

    out = ops.linear(x, packed, added)

    want = x.double() @ weight.double().T + (0 if added is None else added.double())
    assert packed.shape == weight.shape
    scale = max(want.abs().max().item(), 1.0)
    check(out.div(scale), want / scale, dtype)


def test_a_product_takes_rows_that_lie_apart(ops):
    x = random(5, 40, dtype=torch.bfloat16)[:, :24]
    weight = random(16, 24, dtype=torch.bfloat16, seed=1)
    dense = ops.linear(x.contiguous(), ops.pack_linear(weight))
    assert torch.equal(ops.linear(x, ops.pack_linear(weight)), dense)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 9), h=st.integers(1, 80), dtype=DTYPES)
def test_norms_divide_by_the_root_mean_square(tokens, h, dtype):
    ops = TorchOps("cpu")
    x, weight = random(tokens, h, dtype=dtype), random(h, dtype=dtype, seed=1)
    check(ops.rms_norm(x, weight, 1e-5), normed(x, weight, 1e-5), dtype)

    residual = random(tokens, h, dtype=dtype, seed=2)
    want = x + residual
    out, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, want)
    check(out, normed(want, weight, 1e-5), dtype)


def test_the_norm_of_a_tiny_row_is_held_by_eps(ops):
    x = torch.full((1, 8), 1e-6)
    check(ops.rms_norm(x, torch.ones(8), 1e-5), normed(x, torch.ones(8), 1e-5))
    assert not ops.rms_norm(torch.zeros(1, 8), torch.ones(8), 1e-5).any()


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 9), width=st.integers(1, 50), dtype=DTYPES)
def test_the_gate_comes_first_in_silu_mul_and_gelu_mul(tokens, width, dtype):
    gate_up = random(tokens, 2 * width, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    ops = TorchOps("cpu")
    check(ops.silu_mul(gate_up), gate * gate.sigmoid() * up, dtype)
    check(ops.gelu_mul(gate_up, tanh=False), gate * (1 + (gate / 2**0.5).erf()) / 2 * up, dtype)
    turned = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    check(ops.gelu_mul(gate_up, tanh=True), gate * (1 + turned.tanh()) / 2 * up, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_capped_in_float32(dtype):
    scores = 40 * random(3, 50, dtype=dtype)
    want = 30 * torch.tanh(scores.double() / 30)
    out = TorchOps("cpu").cap_scores(scores, 30.0)
    assert out.dtype == torch.float32
    check(out, want)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    head_dim=st.sampled_from([4, 10, 64]),
    share=st.sampled_from([1.0, 0.5]),
    interleaved=st.booleans(),
    has_rope=st.booleans(),
    has_norm=st.booleans(),
    dtype=DTYPES,
    positions=st.lists(st.integers(0, 60), min_size=1, max_size=7),
)
def test_queries_and_keys_are_normed_and_turned_and_values_are_not(
    heads, head_dim, share, interleaved, has_rope, has_norm, dtype, positions
):
    ops, (num_heads, num_kv_heads) = TorchOps("cpu"), heads
    rotated = int(head_dim * share) // 2 * 2
    angles = random(61, rotated // 2, seed=3)
    rope = RopeTable(torch.cat([angles.cos(), angles.sin()], -1), interleaved)
    norm = QKNorm(random(head_dim, seed=4), random(head_dim, seed=5), 1e-6)
    qkv = random(len(positions), (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    want = qkv.double().view(len(positions), -1, head_dim)
    query, key, value = want.split([num_heads, num_kv_heads, num_kv_heads], 1)
    if has_norm:
        query = normed(query, norm.query_weight, norm.eps)
        key = normed(key, norm.key_weight, norm.eps)
    if has_rope:
        query, key = (turn(x, angles[positions].double(), interleaved) for x in (query, key))
    spec = CacheSpec(num_kv_heads=num_kv_heads, head_dim=head_dim)
    cache = ops.new_cache(spec, 0, 4, 2, as_is(dtype), CPU)
    batch = one_step(positions, num_slots=8)

    ops.rope_and_cache(
        qkv, num_heads, rope if has_rope else None, norm if has_norm else None, cache, batch
    )

    check(qkv.view(want.shape), torch.cat([query, key, value], 1), dtype)
    stored = cache.key.flatten(0, 1)[batch.slots[0]]
    assert torch.equal(stored, qkv.view(want.shape)[:, num_heads:])


def turn(x, angles, interleaved):
    rotated = 2 * angles.shape[1]
    head, rest = x[..., :rotated], x[..., rotated:]
    if interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = head.chunk(2, -1)
    number = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    parts = (number.real, number.imag)
    head = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([head, rest], -1)


def test_layers_of_a_step_share_what_they_derive(ops):
    batch = one_step([3, 4])
    rope = RopeTable(random(8, 4))
    spec = CacheSpec(num_kv_heads=1, head_dim=4)
    cache = ops.new_cache(spec, 0, 2, 2, as_is(torch.float32), CPU)
    outputs = []
    for shares in (False, True):
        if shares:
            ops.begin_step(batch)
        for _ in range(2):
            qkv = random(2, 12)
            ops.rope_and_cache(qkv, 1, rope, None, cache, batch)
            outputs.append(qkv)
        assert bool(batch.shared) == shares
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])

    batch.positions += 1
    ops.begin_step(batch)
    again = random(2, 12)
    ops.rope_and_cache(again, 1, rope, None, cache, batch)
    assert not torch.equal(outputs[0], again)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_mixed_by_their_probabilities(ops, normalize, dtype):
    x, logits = random(6, 10, dtype=dtype), random(6, 5, dtype=dtype, seed=1)
    gate_up = random(5, 14, 10, dtype=dtype, seed=2)
    down = random(5, 10, 7, dtype=dtype, seed=3)

    routing = Routing(num_chosen=2, normalize=normalize)
    out = ops.moe(x, *ops.route(logits, routing), Experts(gate_up=gate_up, down=down))

    want = torch.zeros(6, 10, dtype=torch.float64)
    for token, probabilities in enumerate(logits.double().softmax(-1)):
        weights, experts = probabilities.topk(2)
        for weight, expert in zip(weights, experts, strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            share = weight / weights.sum() if normalize else weight
            want[token] += share * (down[expert].double() @ (gate * gate.sigmoid() * up))
    scale = want.abs().max().item()
    check(out.div(scale), want / scale, dtype)


def test_the_draw_is_the_samplers(ops):
    logits = random(3, 20)
    sampling = SamplingTensors(
        temperature=torch.zeros(3),
        min_p=torch.zeros(3),
        top_k=torch.zeros(3, dtype=torch.int32),
        top_p=torch.ones(3),
        uniform=torch.full((3,), 0.5),
        all_greedy=True,
        any_filter=False,
    )
    assert torch.equal(ops.sample(logits, sampling), logits.argmax(-1))


def test_a_decode_step_begins_with_its_rows_state_and_moves_it_on(ops):
    tokens = torch.arange(24, dtype=torch.int32).view(3, 8)
    tables = torch.tensor([[[5, 6, 0], [7, 8, 0], [0, 0, 0]]], dtype=torch.int32)
    rows, positions = torch.tensor([1, 2, 0]), torch.tensor([3, 0, 1])

    ids, rows32, context_len, slots = ops.decode_inputs(tokens, tables, rows, positions, 2)

    assert ids.tolist() == [11, 16, 1]
    assert rows32.dtype == context_len.dtype == torch.int32
    assert context_len.tolist() == [4, 0, 2]
    assert slots.tolist() == [[8 * 2 + 1, 0, 5 * 2 + 1]]

    logits = torch.zeros(3, 4)
    logits[0, 2] = torch.nan
    drawn = ops.advance_rows(torch.tensor([2, 3, 1]), logits, tokens, rows, positions)
    assert drawn.tolist() == [-3, 3, 1]
    assert positions.tolist() == [4, 0, 2]
    assert (tokens[1, 4], tokens[0, 2]) == (2, 1)
