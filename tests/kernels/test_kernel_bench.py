"""The bench of the kernels: what it checks, and what it counts."""

import pytest
import torch

from pagedcore.errors import ConfigError
from pagedcore.execution.kernel_bench import Check, Measured
from pagedcore.execution.kv_formats import Int8, as_is
from pagedcore_kernels.backend import TritonOps
from pagedcore_kernels.bench.checks import check_kernels
from pagedcore_kernels.bench.clock import num_rotations, time_calls
from pagedcore_kernels.bench.packed_checks import FORMATS, check_packed
from pagedcore_kernels.bench.packed_tuning import packed_cases, random_weight, tune_packed
from pagedcore_kernels.bench.speed import AttentionCase
from pagedcore_kernels.bench.suite import decode_cases, extend_cases
from pagedcore_kernels.tuned_plans import load_plans


def test_every_check_passes_and_there_is_one_for_each_kernel(device):
    checks = list(check_kernels(device, small=True))
    assert [check.name for check in checks if not check.passed] == []
    kernels = {check.name.split()[0] for check in checks}
    rows = {"rms_norm", "add_rms_norm", "silu_mul", "gelu_mul", "cap_scores"}
    rows |= {"latent_attention", "latent_to_cache"}
    assert kernels == rows | {"attention", "rope_and_cache", "copy_blocks", "moe"}


def test_every_format_of_packed_weights_is_checked(device):
    checks = list(check_packed(device, small=True))
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == len(FORMATS)


@pytest.mark.parametrize(("error", "passed"), [(0.1, True), (0.3, False), (float("nan"), False)])
def test_a_check_passes_within_its_limit(error, passed):
    assert Check("a kernel", error, 0.2).passed is passed


def test_a_prompt_counts_each_pair_of_a_query_and_a_position_it_sees():
    case = AttentionCase(2, 1, (3,), 3)
    assert case.operations == 4 * 2 * 128 * (1 + 2 + 3)
    case = AttentionCase(2, 1, (10, 10), 1)
    assert case.operations == 4 * 2 * 128 * 20
    assert case.bytes_read(as_is(torch.bfloat16)) == 20 * 2 * 128 * 2
    assert case.bytes_read(Int8()) == 20 * 2 * (128 + 4)


def test_small_data_is_rotated_and_large_data_is_not():
    assert num_rotations(1 << 30) == 1
    assert num_rotations(64 << 20) == 4
    assert num_rotations(1, most=7) == 7


def test_times_are_positive_and_in_order():
    passed = time_calls([lambda: None])
    assert 0 < passed.least <= passed.median <= passed.p99


def test_the_backend_times_every_kernel_and_both_ceilings(device):
    ops = TritonOps(device)
    assert isinstance(ops, Measured)
    bench = ops.kernel_bench(small=True)
    assert all(rate > 0 for rate in bench.ceilings().values())
    figures = list(bench.figures())
    assert {figure.kernel for figure in figures} == {
        *("decode_attention", "extend_attention", "rope_and_cache"),
        *("rms_norm", "add_rms_norm", "silu_mul", "moe"),
    }
    assert all(figure.rate > 0 and figure.unit in bench.ceilings() for figure in figures)


def test_settings_of_one_kernel_are_tried_in_turn(device):
    bench = TritonOps(device).kernel_bench(small=True)
    first = next(bench.trials("decode"))
    assert first.rate > 0
    assert first.case == "B 2 ctx 3-70 heads 4/2"
    with pytest.raises(ConfigError, match="decode, extend, packed"):
        bench.trials("copy")


def test_plans_of_packed_products_are_tried_and_the_best_is_kept(device, tmp_path):
    cases = packed_cases(small=True)
    path = tmp_path / "plans.json"
    trials = list(tune_packed(cases, device, torch.float16, path))
    case = "m 8 n 32 k 1024 bits 4 group 128"
    assert {trial.case for trial in trials} == {case}
    best = max(trials, key=lambda trial: trial.rate)
    weight = random_weight(cases[0], device)
    assert load_plans(path).choose(2, weight) == best.config


def test_no_room_for_one_block_is_refused(device):
    with pytest.raises(ConfigError, match="cache_gib"):
        TritonOps(device).kernel_bench(cache_gib=1e-6)


def test_cases_have_names_of_their_own():
    names = [str(case) for case in (*decode_cases(), *extend_cases())]
    assert len(set(names)) == len(names)
