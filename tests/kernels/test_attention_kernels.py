"""Attention over a paged cache against plain torch in float64, on steps of every kind."""

import random

import pytest
import torch

from pagedcore.execution.kv_formats import Int8, fp8
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.steps import make_step
from pagedcore_kernels.extend_attention import extend_attention
from pagedcore_kernels.extend_plan import ExtendConfig, build_tile_list, num_parts
from pagedcore_kernels.fallback import PlainOps
from pagedcore_kernels.kept_types import scales_of

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
SCALE = 0.3


def on_gpu(test):
    """Mark a test that needs a CUDA device, for shapes that the interpreter is too slow for."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(missing(test))


def kept(cache, codes, scale):
    """The numbers [N, K, B, D] that a cache holds, in float64."""
    return cache.kv_format.decode(codes, scale, torch.float64).cpu()


def reference(step, soft_cap=None, sinks=None, scale=SCALE):
    """Float64, one token and one head at a time."""
    batch, cache = step.batch, step.cache
    head_dim, block_size = cache.spec.head_dim, cache.block_size
    group = step.num_heads // cache.spec.num_kv_heads
    window = cache.spec.window or 1 << 30
    out = torch.zeros(len(step.qkv), step.num_heads, head_dim, dtype=torch.float64)
    queries = step.qkv.double().cpu().reshape(len(step.qkv), -1, head_dim)
    keys, values = (
        kept(cache, cache.key, cache.key_scale),
        kept(cache, cache.value, cache.value_scale),
    )
    starts = batch.query_start.tolist()
    for i, (context, row) in enumerate(
        zip(batch.context_len.tolist(), batch.rows.tolist(), strict=True)
    ):
        table = batch.block_tables[cache.group, row].cpu()
        for t in range(starts[i], starts[i + 1]):
            last = context - (starts[i + 1] - t)
            seen = torch.arange(max(last + 1 - window, 0), last + 1)
            if not len(seen):
                continue
            block, offset = table[seen // block_size].long(), seen % block_size
            for head in range(step.num_heads):
                scores = keys[block, head // group, offset] @ queries[t, head] * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head].double().cpu()[None]])
                weights = scores.softmax(0)[: len(seen)]
                out[t, head] = weights @ values[block, head // group, offset]
    return out.flatten(1)


def attend(ops, step, soft_cap=None, sinks=None, scale=SCALE):
    ops.begin_step(step.batch)
    return ops.attention(step.qkv, step.num_heads, scale, step.cache, step.batch, soft_cap, sinks)


def assert_right(step, soft_cap=None, make_ops=TritonOps, sinks=None, scale=SCALE):
    got = attend(make_ops(str(step.qkv.device)), step, soft_cap, sinks, scale)
    assert got.dtype == step.qkv.dtype
    assert got.is_contiguous()
    want = reference(step, soft_cap, sinks, scale)
    error = (got.double().cpu() - want).norm() / want.norm()
    assert error < LIMITS[step.qkv.dtype]


SINGLE = [(1, 1), (1, 16), (1, 17), (1, 130)]
LONGER = [(5, 5), (2, 40), (70, 70), (33, 91)]
HEADS = [(2, 2), (4, 2), (6, 2), (8, 2), (8, 1)]


@pytest.mark.parametrize("lengths", [SINGLE, LONGER], ids=["single", "longer"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_heads_that_share_keys_are_answered_together(lengths, num_heads, num_kv_heads, device):
    step = make_step(lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, device=device)
    assert_right(step)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_heads_of_any_size_fit(head_dim, device):
    lengths = [(1, 1), (1, 70), (20, 36)]
    step = make_step(lengths, head_dim=head_dim, dtype=torch.float16, device=device)
    assert_right(step)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_blocks_may_be_smaller_or_larger_than_a_tile(block_size, device):
    lengths = [(1, 1), (1, 128), (1, 200), (20, 145), (66, 66)]
    assert_right(make_step(lengths, block_size=block_size, device=device))


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("window", [1, 7, 64, 100])
def test_a_window_hides_what_lies_further_back(block_size, window, device):
    lengths = [(1, 1), (1, 64), (1, 190), (9, 9), (40, 150), (130, 130)]
    assert_right(make_step(lengths, block_size=block_size, window=window, device=device))


def test_scores_are_capped_softly(device):
    assert_right(make_step(SINGLE + LONGER, device=device), soft_cap=1.5)
    assert_right(make_step(SINGLE + LONGER, window=20, device=device), soft_cap=1.5)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("make_ops", [TritonOps, PlainOps])
def test_a_sink_takes_a_share_and_gives_nothing(make_ops, window, device):
    lengths = [*SINGLE, (1, 900), *LONGER]  # one is cut and merged
    step = make_step(lengths, num_heads=6, window=window, num_padding=2, device=device)
    sinks = torch.tensor([-50.0, -2.0, 0.0, 1.0, 5.0, 200.0], device=device)
    assert_right(step, make_ops=make_ops, sinks=sinks)


def test_sixteen_bits_are_enough(device):
    lengths = [*SINGLE, *LONGER, (1, 300)]
    assert_right(make_step(lengths, block_size=64, dtype=torch.float16, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kv_format", [fp8(), Int8()], ids=lambda kv_format: kv_format.name)
def test_keys_and_values_may_be_kept_in_eight_bits(kv_format, dtype, device):
    step = make_step([*SINGLE, *LONGER], dtype=dtype, kv_format=kv_format, device=device)
    assert_right(step)
    assert_right(step, make_ops=PlainOps)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "window"),
    [(64, 16, None), (80, 16, 7), (128, 64, 50), (64, 128, None)],
)
def test_scales_are_found_wherever_a_position_lies(head_dim, block_size, window, device):
    lengths = [(1, 1), (1, 70), (1, 140), (9, 9), (20, 90)]
    step = make_step(
        lengths, num_heads=6, head_dim=head_dim, block_size=block_size, window=window,
        kv_format=Int8(), num_padding=2, device=device,
    )  # fmt: skip
    spread_scales(step)
    sinks = torch.tensor([-50.0, -2.0, 0.0, 1.0, 5.0, 200.0], device=device)
    assert_right(step)
    assert_right(step, soft_cap=1.5, sinks=sinks)


def spread_scales(step):
    """Let the vectors of an 8-bit cache differ in size, from 0.2 to 5 times."""
    rng = torch.Generator().manual_seed(1)
    for scale in (step.cache.key_scale, step.cache.value_scale):
        factor = torch.empty(scale.shape).uniform_(-1.6, 1.6, generator=rng).exp()
        scale.mul_(factor.to(scale.device))


def test_padding_gives_zeros_and_disturbs_nobody(device):
    step = make_step([(1, 30), (1, 70)], num_padding=3, device=device)
    assert_right(step)
    got = attend(TritonOps(device), step)
    assert (got[2:] == 0).all()


def test_one_long_sequence_beside_many_short_ones_is_cut_and_merged(device):
    assert_right(make_step([(1, 900)] + [(1, n) for n in range(1, 24)], device=device))


def test_layers_that_share_a_list_of_work_give_the_same(device):
    step = make_step([(1, 500), (1, 400), (1, 3), (40, 60)], device=device)
    ops = TritonOps(device)
    first = attend(ops, step)
    again = ops.attention(step.qkv, step.num_heads, SCALE, step.cache, step.batch)
    torch.testing.assert_close(first, again)


def test_without_begin_step_each_layer_derives_its_own(device):
    step = make_step(SINGLE + LONGER, device=device)
    step.batch.shared = None
    got = TritonOps(device).attention(step.qkv, step.num_heads, SCALE, step.cache, step.batch)
    torch.testing.assert_close(got, attend(TritonOps(device), step))


@pytest.mark.parametrize("kv_format", [None, Int8()], ids=["own type", "int8"])
def test_a_sequence_with_nan_leaves_the_others_alone(kv_format, device):
    lengths = [(1, 40), (1, 90), (1, 17), (12, 50), (30, 30)]
    step = make_step(lengths, kv_format=kv_format, device=device)
    good, cache = attend(TritonOps(device), step), step.cache
    for sequence in (1, 3):
        row = step.batch.rows[sequence]
        block = step.batch.block_tables[1, row, 0]
        for stored in (cache.key, cache.value) if kv_format is None else scales_of(cache):
            stored[block] = torch.nan
    got = attend(TritonOps(device), step)
    assert got[1].isnan().all()
    others = [0, 2, *range(15, 45)]
    torch.testing.assert_close(got[others], good[others])


def extend(step, config, parts, soft_cap=None, sinks=None):
    """The extend kernel alone, over what it leaves of NaN."""
    batch, cache = step.batch, step.cache
    out = torch.full_like(step.qkv[:, : step.num_heads * cache.spec.head_dim], torch.nan)
    out = out.contiguous()
    singles = batch.num_single
    start = batch.query_start[singles:]
    tokens = config.queries * cache.spec.num_kv_heads // step.num_heads
    extend_attention(
        step.qkv,
        step.num_heads,
        SCALE,
        cache.key,
        cache.value,
        batch.block_tables[cache.group],
        start,
        batch.rows[singles:],
        batch.context_len[singles:],
        build_tile_list(start, len(step.qkv) - singles, tokens),
        out,
        first_token=singles,
        parts=parts,
        window=cache.spec.window,
        soft_cap=soft_cap,
        sinks=sinks,
        config=config,
    )
    return out


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize(("parts", "keys", "queries"), [(1, 16, 16), (3, 16, 32), (5, 32, 128)])
def test_keys_may_be_cut_in_parts_and_loaded_by_descriptors(
    parts, keys, queries, descriptors, window, device
):
    step = make_step(
        [(1, 3), (1, 70), (6, 200), (2, 3), (20, 20), (9, 110)],
        head_dim=80,
        block_size=32,
        window=window,
        device=device,
    )
    config = ExtendConfig(queries, keys, 4, 2, descriptors=descriptors)
    sinks = torch.tensor([-50.0, 0.0, 1.0, 30.0], device=device)
    got, want = extend(step, config, parts, 2.0, sinks), reference(step, 2.0, sinks)
    assert got[:2].isnan().all()
    assert (got[2:].double().cpu() - want[2:]).norm() / want[2:].norm() < 1e-5


def test_few_tokens_are_cut_in_more_parts_than_many():
    config = ExtendConfig(128, 64, 8, 2)
    assert num_parts(64, 32, 8, 8192, 132, config) == 8
    assert num_parts(64, 32, 8, 300, 132, config) == 2
    assert num_parts(4096, 32, 8, 8192, 132, config) == 1
    assert num_parts(1, 16, 8, 1 << 17, 132, config) == 16


@pytest.mark.parametrize("seed", range(6))
def test_random_steps(seed, device):
    rng = random.Random(seed)
    lengths = [(1, rng.randint(1, 260)) for _ in range(rng.randint(0, 9))]
    for _ in range(rng.randint(0, 3)):
        new = rng.randint(2, 60)
        lengths.append((new, new + rng.choice([0, rng.randint(1, 150)])))
    lengths = lengths or [(1, 1)]
    num_kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5])
    step = make_step(
        lengths,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice([64, 80]),
        block_size=rng.choice([16, 32, 64, 128]),
        window=rng.choice([None, None, rng.randint(1, 150)]),
        num_padding=rng.choice([0, 2]) if any(new == 1 for new, _ in lengths) else 0,
        dtype=rng.choice([torch.float32, torch.float16]),
        seed=seed,
        device=device,
    )
    assert_right(step, rng.choice([None, 2.0]))


def test_plain_torch_stands_in_for_the_kernels(device):
    assert_right(make_step(SINGLE + LONGER, window=20, device=device), 1.5, make_ops=PlainOps)
    assert_right(make_step(SINGLE, num_padding=2, device=device), make_ops=PlainOps)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_size_and_type_on_the_gpu(dtype, head_dim):
    lengths = [(1, 1), (1, 1000), (1, 64), (1, 65), (200, 200), (17, 300)]
    step = make_step(lengths, head_dim=head_dim, block_size=64, dtype=dtype, device="cuda")
    assert_right(step)


@on_gpu
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_query_may_see_nothing_of_a_tile_on_the_gpu(head_dim, dtype, with_sinks):
    # Where multiplication and addition are one instruction, which the interpreter has not.
    step = make_step(
        [(1, 1), (1, 300), (275, 275), (70, 300)], num_heads=8, num_kv_heads=1, head_dim=head_dim,
        block_size=64, window=128, dtype=dtype, device="cuda",
    )  # fmt: skip
    for scale in (SCALE, head_dim**-0.5, 0.1, 1.0):
        sinks = torch.randn(8, device="cuda") if with_sinks else None
        assert_right(step, sinks=sinks, scale=scale)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("kv_format", [fp8(), Int8()], ids=lambda kv_format: kv_format.name)
def test_eight_bits_on_the_gpu(kv_format, dtype, head_dim):
    lengths = [(1, 1), (1, 1000), (1, 64), (200, 200), (17, 300), (64, 3000)]
    step = make_step(
        lengths, num_heads=8, head_dim=head_dim, block_size=64, dtype=dtype, kv_format=kv_format,
        device="cuda",
    )  # fmt: skip
    if kv_format.scale_dtype is not None:
        spread_scales(step)
    assert_right(step)


@on_gpu
def test_the_same_step_gives_the_same_bits():
    lengths = [(1, 3000), (1, 20), (1, 1290), (1, 640), (90, 90), (64, 1000)]
    step = make_step(lengths, head_dim=128, block_size=64, dtype=torch.bfloat16, device="cuda")
    first = attend(TritonOps("cuda"), step)
    for _ in range(20):
        assert torch.equal(attend(TritonOps("cuda"), step), first)


@on_gpu
def test_a_step_runs_in_a_graph_and_follows_its_inputs():
    lengths = [(1, 300), (1, 20), (1, 129)]
    step = make_step(lengths, head_dim=128, block_size=64, num_padding=1, device="cuda")
    ops = TritonOps("cuda")
    attend(ops, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(ops, step)
    step.batch.context_len.copy_(torch.tensor([290, 1, 100, 0]))
    step.qkv.normal_()
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        want = reference(step)
        assert (out.double().cpu() - want).norm() / want.norm() < LIMITS[torch.float32]
