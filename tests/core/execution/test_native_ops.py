"""Kernels in C against a direct computation in float64, and what happens where they do not run."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcore.errors import ConfigError
from pagedcore.execution.kv_formats import Int8, fp8
from pagedcore.execution.native import library
from pagedcore.execution.native.ops import NativeOps
from pagedcore.execution.ops import QKNorm, RopeTable, SamplingTensors
from pagedcore.execution.torch_ops import TorchOps

BF16 = torch.bfloat16
ULP = 2.0**-8
"""Half the distance of neighbours, relative: what one rounding to bfloat16 costs."""


def random(*shape, seed=0, dtype=BF16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got, want, scale=1.0):
    """One rounding, and a little for sums in float32."""
    assert got.dtype == BF16
    torch.testing.assert_close(got.double(), want, atol=ULP / 64 * scale, rtol=ULP)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.one_of(st.integers(1, 30), st.sampled_from([95, 96, 97, 200])),
    inputs=st.integers(1, 90).map(lambda half: 2 * half),
    outputs=st.integers(1, 140),
    bias=st.booleans(),
)
def test_a_product_is_rounded_once(native, tokens, inputs, outputs, bias):
    x, weight = random(tokens, inputs), random(outputs, inputs, seed=1)
    added = random(outputs, seed=2) if bias else None
    packed = native.pack_linear(weight)
    exact = x.double() @ weight.double().T

    check(native.linear(x, packed, added), exact + (added.double() if bias else 0), inputs**0.5)
    scores = native.scores(x, weight, packed)
    assert packed.shape == weight.shape
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, atol=1e-5 * inputs, rtol=1e-5)


def test_a_weight_packed_later_leaves_the_earlier_ones_as_they_are(native):
    x, weights = random(3, 64), [random(n, 64, seed=n) for n in (1, 31, 32, 33, 100)]
    packed = [native.pack_linear(weight) for weight in weights]
    for weight, one in zip(weights, packed, strict=True):
        check(native.linear(x, one), x.double() @ weight.double().T, 8)


def test_a_product_takes_rows_that_lie_apart(native):
    x, packed = random(5, 41)[:, :24], native.pack_linear(random(16, 24, seed=1))
    assert torch.equal(native.linear(x, packed), native.linear(x.contiguous(), packed))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.one_of(st.integers(1, 9), st.just(300)),
    h=st.integers(1, 150),
    eps=st.sampled_from([1e-6, 1e-5]),
)
def test_norms_divide_by_the_root_mean_square(native, tokens, h, eps):
    x, residual, weight = (
        random(*shape, seed=i) for i, shape in enumerate([(tokens, h)] * 2 + [(h,)])
    )

    def normed(x):
        x = x.double()
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()

    check(native.rms_norm(x, weight, eps), normed(x))
    total = x + residual
    norm, stream = native.add_rms_norm(x.clone(), residual.clone(), weight, eps)
    assert torch.equal(stream, total)
    check(norm, normed(total))


@settings(max_examples=40, deadline=None)
@given(tokens=st.one_of(st.integers(1, 9), st.just(400)), width=st.integers(1, 70))
def test_the_gate_comes_first_in_silu_mul(native, tokens, width):
    gate_up = random(tokens, 2 * width) * 4
    gate, up = gate_up.double().chunk(2, -1)
    check(native.silu_mul(gate_up), gate * gate.sigmoid() * up)


def test_gates_far_out_are_open_or_shut(native):
    gates = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30, torch.inf, torch.nan]]).to(BF16)
    out = native.silu_mul(torch.cat([gates, torch.ones_like(gates)], 1))[0]
    assert torch.equal(out[:-1], torch.tensor([0.0, 0, 0, 100, 1e30, torch.inf]).to(BF16))
    assert out[-1].isnan()


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    head_dim=st.sampled_from([32, 64, 96, 256]),
    share=st.sampled_from([1.0, 0.5, 0.25]),
    interleaved=st.booleans(),
    has_rope=st.booleans(),
    has_norm=st.booleans(),
    positions=st.one_of(
        st.lists(st.integers(0, 60), min_size=1, max_size=7), st.just([*range(60)])
    ),
)
def test_queries_and_keys_turn_as_in_plain_torch(
    native, new_pool, heads, head_dim, share, interleaved, has_rope, has_norm, positions
):
    rotated = int(head_dim * share)
    angles = random(61, rotated // 2, seed=3, dtype=torch.float32)
    rope = RopeTable(torch.cat([angles.cos(), angles.sin()], -1), interleaved) if has_rope else None
    norm = QKNorm(random(head_dim, seed=4), random(head_dim, seed=5), 1e-6) if has_norm else None
    results = []
    for ops in (TorchOps("cpu"), native):
        pool = new_pool(*heads, head_dim, block_size=16, dtype=BF16, ops=ops, num_blocks=10)
        sequence = pool.sequence(60)
        batch = pool.batch([(sequence, len(positions), len(positions))], 0)
        batch.positions = torch.tensor(positions)
        qkv = sequence.heads[: len(positions)].flatten(1).clone()
        ops.begin_step(batch)
        ops.rope_and_cache(qkv, heads[0], rope, norm, pool.cache, batch)
        results.append((qkv, pool.cache.key.flatten(0, 1)[batch.slots[0]]))
    (want, want_stored), (got, stored) = results
    torch.testing.assert_close(got, want, atol=ULP / 16, rtol=2 * ULP)
    torch.testing.assert_close(stored, want_stored, atol=ULP / 16, rtol=2 * ULP)


@st.composite
def _histories(draw):
    """For each of some sequences, the lengths of the pieces that it runs in."""
    piece = st.one_of(st.just(1), st.integers(2, 19), st.sampled_from([64, 65, 130]))
    return draw(st.lists(st.lists(piece, min_size=1, max_size=4), min_size=1, max_size=5))


@settings(max_examples=60, deadline=None)
@given(
    histories=_histories(),
    heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (9, 3), (8, 1)]),
    head_dim=st.sampled_from([32, 64, 96, 160]),
    block_size=st.sampled_from([1, 4, 16, 128]),
    window=st.sampled_from([None, 1, 7, 64, 100]),
    soft_cap=st.sampled_from([None, 0.7, 30.0]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_mix_of_pieces_gives_what_whole_sequences_give(
    native, new_pool, histories, heads, head_dim, block_size, window, soft_cap, has_sinks, seed
):
    pool = new_pool(
        *heads,
        head_dim,
        block_size=block_size,
        window=window,
        soft_cap=soft_cap,
        has_sinks=has_sinks,
        dtype=BF16,
        num_blocks=3000 // block_size + 10,
        seed=seed,
        ops=native,
    )
    sequences = [pool.sequence(sum(pieces)) for pieces in histories]
    for number in range(max(map(len, histories))):
        runs = [
            (sequence, pieces[number], sum(pieces[: number + 1]))
            for sequence, pieces in zip(sequences, histories, strict=True)
            if number < len(pieces)
        ]
        pool.check(pool.step(runs, num_padding=number % 2), tolerance=2e-2)


def test_nan_of_one_sequence_never_reaches_another(native, new_pool):
    """Reliability R18: not beside it in a step, and not from a block that it has left."""
    pool = new_pool(4, 2, 32, dtype=BF16, num_blocks=9, ops=native)
    bad, good = pool.sequence(11), pool.sequence(10)
    bad.heads[:] = torch.nan
    results = pool.step([(bad, 10, 10), (good, 9, 9)])
    results += pool.step([(bad, 1, 11), (good, 1, 10)])
    pool.check([result for result in results if result[0] is good], 2e-2)
    assert all(out.isnan().all() for sequence, _, _, out in results if sequence is bad)

    pool.free = [*bad.blocks]
    short, long = pool.sequence(2), pool.sequence(6)
    pool.check(pool.step([(short, 1, 1), (long, 5, 5)]), 2e-2)
    pool.check(pool.step([(short, 1, 2), (long, 1, 6), (good, 1, 10)]), 2e-2)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "kv_format"),
    [(torch.float32, 64, None), (BF16, 20, None), (BF16, 64, fp8()), (BF16, 64, Int8())],
)
def test_what_the_kernels_do_not_take_is_left_to_plain_torch(
    native, new_pool, dtype, head_dim, kv_format
):
    pool = new_pool(4, 2, head_dim, dtype=dtype, kv_format=kv_format, ops=native)
    sequence = pool.sequence(20)
    pool.check(pool.step([(sequence, 19, 19)]), 2e-2)
    pool.check(pool.step([(sequence, 1, 20)]), 2e-2)
    weight = random(8, 7, dtype=dtype)
    out = native.linear(random(2, 7, dtype=dtype), native.pack_linear(weight))
    assert torch.equal(out, TorchOps("cpu").linear(random(2, 7, dtype=dtype), weight))


def test_a_device_that_is_no_cpu_is_refused():
    with pytest.raises(ConfigError, match="runs on a CPU, not on 'cuda:0'"):
        NativeOps("cuda:0")


def test_a_processor_without_bfloat16_is_told_what_it_lacks(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor : 0\nflags : fma avx512f avx512bw avx512vl avx512dq avx512_vnni\n"
    )
    assert library.missing_features(cpuinfo) == ["avx512_bf16"]
    assert library.missing_features(tmp_path / "none") == list(library.NEEDED)

    monkeypatch.setattr(library, "missing_features", lambda _: ["avx512_bf16"])
    with pytest.raises(ConfigError, match="needs a processor with avx512_bf16: use --backend"):
        library.load_library()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "there is no C compiler"),
        ("echo 'x.c:1: error: no such thing' >&2; exit 1", "x.c:1: error: no such thing"),
    ],
)
def test_a_missing_or_broken_compiler_is_one_clear_error(tmp_path, monkeypatch, script, reason):
    monkeypatch.setattr(library, "missing_features", lambda _: [])
    monkeypatch.setenv("PAGEDCORE_CACHE", str(tmp_path))
    compiler = tmp_path / "cc"
    if script:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(ConfigError, match=rf"could not be compiled \({reason}\): install"):
        library.load_library()
    assert not [path for path in tmp_path.rglob("native*") if path.is_file()]


def test_the_library_is_compiled_once(native, tmp_path, monkeypatch):
    monkeypatch.setenv("PAGEDCORE_CACHE", str(tmp_path))
    library.load_library()
    (made,) = tmp_path.rglob("*.so")

    def refuse(*_, **__):
        raise subprocess.SubprocessError

    monkeypatch.setattr(subprocess, "run", refuse)
    library.load_library()
    assert [made] == list(tmp_path.rglob("*.so"))


def test_a_layer_of_another_group_reads_its_own_table(native, new_pool):
    """KV-6."""
    pool = new_pool(4, 2, 32, dtype=BF16, ordered=True, ops=native)
    sequence = pool.sequence(9)
    batch = pool.batch([(sequence, 9, 9)], 0)
    table = batch.block_tables + 100
    batch.block_tables = torch.cat([batch.block_tables, table])
    batch.slots = torch.cat([batch.slots, batch.slots + 100 * pool.block_size])
    for group in (0, 1):
        cache = replace(pool.cache, group=group)
        qkv = sequence.heads.flatten(1).clone()
        native.rope_and_cache(qkv, 4, None, None, cache, batch)
        out = native.attention(qkv, 4, pool.scale, cache, batch)
        pool.check([(sequence, 9, 9, out.view(9, 4, -1))], 2e-2)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 70),
    nans=st.lists(st.integers(0, 69), max_size=2),
    seed=st.integers(0, 99),
)
def test_the_most_likely_token_is_the_first_of_the_largest(native, rows, size, nans, seed):
    logits = random(rows, size, seed=seed, dtype=torch.float32).round()
    logits[-1, [i for i in nans if i < size]] = torch.nan
    plain = SamplingTensors(*torch.zeros(5, rows), all_greedy=True, any_filter=False)
    assert torch.equal(native.sample(logits, plain), TorchOps("cpu").sample(logits, plain))


def test_more_or_fewer_threads_give_the_same_bits(native):
    """Also while another thread is at work, which then has the helpers to itself."""
    x, packed = random(40, 128), native.pack_linear(random(3000, 128, seed=1))
    want = native.linear(x, packed)
    before = torch.get_num_threads()
    with ThreadPoolExecutor(3) as callers:
        for count in (1, 5, 2):
            native._library.threads(count)
            found = callers.map(lambda _: native.linear(x, packed), range(60))
            assert all(torch.equal(out, want) for out in found)
    native._library.threads(before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12's
def test_a_forked_process_works_without_its_helpers(native):
    x, packed = random(8, 128), native.pack_linear(random(3000, 128, seed=1))
    want = native.linear(x, packed)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native.linear(x, packed), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
