"""`bench/chart.py`: which figures it draws, out of the results of `bench/h200.py`."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "bench" / "chart.py"


@pytest.fixture
def chart(monkeypatch):
    specification = importlib.util.spec_from_file_location("bench_chart", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "bench_chart", module)  # where its dataclass looks for names
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def write(tmp_path):
    def write(name, date, card="NVIDIA H200", **shapes):
        path = tmp_path / name
        result = {"date": date, "commit": date[-2:], "gpu": {"name": card}, "shapes": shapes}
        path.write_text(json.dumps(result))
        return path

    return write


def rate(value, peer=100.0):
    return {"tokens_per_second": value, "samples": [value], "peer": peer}


def test_the_latest_figure_of_a_workload_counts(chart, write):
    paths = [
        write("a.json", "2026-11-03", **{"qwen3-0.6b": {"nano": rate(150), "b1": rate(300)}}),
        write("b.json", "2026-11-04", **{"qwen3-0.6b": {"nano": rate(200)}}),
        write("c.json", "2026-11-02", **{"qwen3-0.6b": {"nano": rate(50)}}),
    ]
    card, found = chart.read(paths)
    assert card == "NVIDIA H200"
    assert [(n, f.ratio, f.commit) for n, f in found["qwen3-0.6b"].items()] == [
        ("nano", 2.0, "04"),
        ("b1", 3.0, "03"),
    ]


def test_only_figures_with_a_peer_are_drawn(chart, write, tmp_path):
    other = tmp_path / "kernels.json"
    other.write_text('{"date": "2026-11-09", "figures": []}')
    figures = {"startup_seconds": {"total": 2.0}, "prefix": {"cold": 1.0}, "b1": rate(9, peer=None)}
    shapes = {"llama-3.1-8b": figures | {"b32": rate(90)}, "qwen3-30b-a3b": {"b1": rate(9, None)}}
    _, found = chart.read([other, write("a.json", "2026-11-03", **shapes)])
    assert {shape: list(of_shape) for shape, of_shape in found.items()} == {"llama-3.1-8b": ["b32"]}


def test_what_cannot_be_compared_ends_in_one_line(chart, write):
    shapes = {"qwen3-0.6b": {"nano": rate(150)}}
    one = write("a.json", "2026-11-03", **shapes)
    with pytest.raises(SystemExit, match="several kinds of GPU: NVIDIA H100, NVIDIA H200"):
        chart.read([one, write("b.json", "2026-11-03", "NVIDIA H100", **shapes)])
    with pytest.raises(SystemExit, match="no result"):
        chart.read([])
    with pytest.raises(SystemExit, match="no figure"):
        chart.read([write("c.json", "2026-11-03", **{"qwen3-0.6b": {"b1": rate(1, None)}})])


def test_the_same_files_make_the_same_chart(chart, write, tmp_path):
    shapes = {
        "qwen3-0.6b": {"nano": rate(150), "prefill": rate(99)},
        "llama-3.1-8b": {"b1": rate(80)},
        "a-new-shape": {"b32": rate(200)},
    }
    drawn = []
    for name in ("one.png", "two.png"):
        card, found = chart.read([write("a.json", "2026-11-03", **shapes)])
        chart.draw(tmp_path / name, card, found)
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith(b"\x89PNG")


def test_halves_are_rounded_up(chart):
    assert [chart.whole(value) for value in (238.5, 201.3, 344133.6)] == ["239", "201", "344,134"]
