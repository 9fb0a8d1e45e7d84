"""Plans on disk: what was measured is used again, and what is broken is not."""

import json
import logging

import pytest
import torch

from pagedcore.execution.quantized import Grouped
from pagedcore_kernels.packed_layout import pack
from pagedcore_kernels.packed_plans import PackedPlan, choose_plan
from pagedcore_kernels.tuned_plans import (
    VERSION,
    TunedPlans,
    case_of,
    load_plans,
    plans_file,
    save_plans,
)

PLAN = PackedPlan(64, 2, 4, 8, 3, 0, early=False, halves=True)
ROW = [64, 2, 4, 8, 3, 0, False, True]


@pytest.fixture
def weight():
    codes = torch.zeros((32, 128), dtype=torch.uint8)
    return pack(Grouped(codes, torch.ones((32, 2), dtype=torch.float16), 4))


def test_plans_are_found_again_and_others_stay(tmp_path, weight):
    path = tmp_path / "plans" / "gpu.json"
    save_plans(path, {case_of(3, weight): PLAN})
    save_plans(path, {case_of(100, weight): None})
    found = load_plans(path)
    assert found.choose(2, weight) == PLAN
    assert found.choose(8, weight) == PLAN
    assert found.choose(100, weight) is None
    assert found.choose(9, weight) == choose_plan(9, 32, 256, 64)
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


def test_without_a_file_plans_come_from_the_shape(tmp_path, weight, caplog):
    with caplog.at_level(logging.WARNING):
        assert load_plans(tmp_path / "none.json").choose(1, weight) == choose_plan(1, 32, 256, 64)
    assert not caplog.records


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2}',
        '{"version": 2, "packed": []}',
        "[" * 100_000,
        *(
            json.dumps({"version": VERSION, "packed": {"a case": row}})
            for row in (
                "64",
                ROW[:-1],
                [*ROW[:-1], 0],
                ["64", *ROW[1:]],
                [1 << 40, *ROW[1:]],
                [0, *ROW[1:]],
                [*ROW[:2], -1, *ROW[3:]],
                [*ROW[:3], 3, *ROW[4:]],
            )
        ),
    ],
    ids=range(15),
)
def test_a_broken_file_counts_as_none_and_is_named(text, tmp_path, weight, caplog):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert load_plans(path).choose(1, weight) == choose_plan(1, 32, 256, 64)
    assert str(path) in caplog.text
    assert "--tune packed" in caplog.text
    save_plans(path, {case_of(1, weight): PLAN})
    assert load_plans(path).choose(1, weight) == PLAN


def test_plans_for_another_kernel_are_forgotten(tmp_path, weight):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"version": VERSION + 1, "packed": {case_of(1, weight): ROW}}))
    assert load_plans(path).choose(1, weight) == choose_plan(1, 32, 256, 64)


def test_a_large_file_is_not_read(tmp_path, caplog):
    path = tmp_path / "gpu.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with caplog.at_level(logging.WARNING):
        load_plans(path)
    assert "bytes" in caplog.text


def test_the_file_lies_in_the_cache_and_names_the_device(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGEDCORE_CACHE", str(tmp_path))
    path = plans_file(torch.device("cpu"))
    assert path.parent == tmp_path / "plans"
    assert path.name.startswith("cpu-")


def test_formats_and_shapes_have_plans_of_their_own(weight):
    codes, scale = torch.zeros((32, 128), dtype=torch.uint8), torch.ones((32, 2))
    others = [
        pack(Grouped(codes, scale, 4, zero=torch.ones((32, 2), dtype=torch.uint8))),
        pack(Grouped(codes, torch.ones((32, 4)), 4)),
        pack(Grouped(codes, torch.ones((32, 1)), 8)),
        pack(Grouped(codes[:16], scale[:16], 4)),
    ]
    cases = {case_of(1, other) for other in [weight, *others]}
    assert len(cases) == 5
    assert len({case_of(m, weight) for m in (1, 2, 8, 9, 16, 17)}) == 4
    assert TunedPlans({}).choose(1, weight) == choose_plan(1, 32, 256, 64)
