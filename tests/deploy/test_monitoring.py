"""The dashboard and the alerts name what /metrics shows (METRIC-1, METRIC-3)."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagedcore.engine.info import EngineInfo
from pagedcore_openai.counters import Counters
from pagedcore_openai.metrics import exposition

SCRAPED = {"instance", "job", "le"}
"""Labels that Prometheus and histograms add."""

INFO = EngineInfo(
    model="folder",
    served_model_names=("tiny",),
    max_model_len=2048,
    vocab_size=256,
    block_size=16,
    num_blocks=8,
    max_num_seqs=4,
    startup_seconds={"weights": 1.0, "total": 2.0},
)


@pytest.fixture(scope="module")
def shown():
    """Series that a server shows, each with its labels."""
    page = exposition([(INFO, {}, Counters())], alias=None).decode()
    series = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


@pytest.fixture
def expressions(dashboard, parse):
    """Every question to Prometheus, by where it stands."""
    found = {
        f"panel {panel['title']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    for group in parse("prometheus/rules.yml")["groups"]:
        found |= {f"alert {rule['alert']}": rule["expr"] for rule in group["rules"]}
    return found


def test_every_series_that_is_asked_for_is_shown(expressions, dashboard, shown):
    asked = {name for text in expressions.values() for name in re.findall(r"pagedcore:\w+", text)}
    for variable in dashboard["templating"]["list"]:
        asked.update(re.findall(r"pagedcore:\w+", variable["query"]))
    assert len(asked) > 15
    assert asked - shown.keys() == set()


def test_every_label_that_is_asked_for_is_there(expressions, shown):
    for where, text in expressions.items():
        names = re.findall(r"pagedcore:\w+", text)
        known = SCRAPED.union(*(shown[name] for name in names))
        for name, matchers in re.findall(r"(pagedcore:\w+)\{([^}]*)\}", text):
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert asked <= shown[name] | SCRAPED, where
        for grouping in re.findall(r"\bby \(([^)]*)\)", text):
            assert {label.strip() for label in grouping.split(",")} <= known, where


def test_legends_and_messages_show_labels_that_their_question_keeps(dashboard, parse):
    def kept(text):
        return {
            label.strip()
            for grouping in re.findall(r"\bby \(([^)]*)\)", text)
            for label in grouping.split(",")
        }

    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert legend <= kept(target["expr"]), panel["title"]
    for group in parse("prometheus/rules.yml")["groups"]:
        for rule in group["rules"]:
            words = " ".join(rule["annotations"].values())
            named = set(re.findall(r"\$labels\.(\w+)", words))
            if " by (" in rule["expr"]:
                assert named <= kept(rule["expr"]), rule["alert"]
            else:
                assert named <= {"instance", "model_name"}, rule["alert"]


def test_brackets_of_every_question_match(expressions):
    pairs = {")": "(", "]": "[", "}": "{"}
    for where, text in expressions.items():
        open_brackets = []
        for character in re.sub(r'"[^"]*"', "", text):
            if character in pairs.values():
                open_brackets.append(character)
            elif character in pairs:
                assert open_brackets, where
                assert open_brackets.pop() == pairs[character], where
        assert not open_brackets, where


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


def test_each_alert_says_what_is_wrong_and_what_to_do(parse):
    rules = [r for group in parse("prometheus/rules.yml")["groups"] for r in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["alert"].startswith("Pagedcore")
        assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]


def test_reasons_that_alerts_look_for_are_those_that_are_counted(parse, shown):
    page = exposition([(INFO, {}, Counters())], alias=None).decode()
    for group in parse("prometheus/rules.yml")["groups"]:
        for rule in group["rules"]:
            for label, value in re.findall(r'(\w*reason)=~?"([^"]*)"', rule["expr"]):
                for reason in value.split("|"):
                    assert f'{label}="{reason}"' in page, rule["alert"]


def test_prometheus_asks_the_route_that_there_is(parse):
    (job,) = parse("prometheus/prometheus.yml")["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["job_name"] == "pagedcore"
    assert parse("prometheus/prometheus.yml")["rule_files"] == ["rules.yml"]
