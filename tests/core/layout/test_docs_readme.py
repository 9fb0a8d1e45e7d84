"""README: its commands are there, its translation says the same, its figures are those measured."""

import json
import re
import shlex

import pytest

LANGUAGES = ("README.md", "README.zh.md")


@pytest.fixture(params=LANGUAGES)
def readme(request, root):
    return (root / request.param).read_text(encoding="utf-8")


@pytest.fixture
def both(root):
    return [(root / name).read_text(encoding="utf-8") for name in LANGUAGES]


def indented_commands(text):
    """Lines of indented code, without their remarks."""
    lines = re.findall(
        r"^ {4}(?=\S)(.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M
    )
    return [re.sub(r"\s+# .*$", "", line) for line in lines]


def figure_rows(text):
    """Rows of the table of figures: what, figure, where, command."""
    section = text.split("<!-- figures: begin")[1].split("<!-- figures: end -->")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def look_up(found, path):
    """What stands at /a/b=1,c=2/d: a key, or the one element of a list that has these values."""
    for part in path.strip("/").split("/"):
        if isinstance(found, dict):
            found = found[part]
            continue
        wanted = dict(pair.split("=") for pair in part.split(","))
        (found,) = (item for item in found if all(str(item[k]) == v for k, v in wanted.items()))
    return found


def agrees(shown, value):
    """Whether a figure such as "1,234.5 tokens/s" is the value, rounded as it is shown."""
    number = re.match(r"-?[\d,]+(\.\d+)?", shown)
    assert number, shown
    digits = len(number[1] or ".") - 1
    return float(number[0].replace(",", "")) == round(value, digits)


def test_the_two_languages_have_the_same_parts(both):
    headings = [re.findall(r"^(#+) ", text, re.M) for text in both]
    assert headings[0] == headings[1]
    rows = [len(re.findall(r"^\|", text, re.M)) for text in both]
    assert rows[0] == rows[1]
    steps = [re.findall(r"^\d\. ", text, re.M) for text in both]
    assert steps[0] == steps[1] == [f"{n}. " for n in range(1, 8)]


def test_the_two_languages_have_the_same_commands_and_programs(both):
    assert indented_commands(both[0]) == indented_commands(both[1]) != []
    programs = [re.findall(r"^```python$.*?^```$", text, re.M | re.S) for text in both]
    assert programs[0] == programs[1]


def test_the_two_languages_lead_to_the_same_places(both):
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - set(LANGUAGES) for text in both]
    assert links[0] == links[1]
    assert "README.zh.md" in both[0]
    assert "README.md" in both[1]


def test_the_two_languages_show_the_same_figures(both):
    rows = [[row[1:] for row in figure_rows(text)] for text in both]
    assert rows[0] == rows[1]


def test_every_figure_is_the_one_in_the_file_that_it_names(root, readme):
    for what, shown, where, command in figure_rows(readme):
        file, mark, path = where.strip("`").partition("#")
        assert mark, f"{what}: the place in {file} is missing"
        value = look_up(json.loads((root / file).read_text(encoding="utf-8")), path)
        assert agrees(shown, value), f"{what}: {shown}, but {where} is {value}"
        assert command.startswith("`"), f"{what} names no command"


def test_figures_are_compared_as_they_are_shown():
    result = {"figures": [{"rows": 1, "us": 3.2}, {"rows": 256, "depth": 2, "us": 1234.56}]}
    value = look_up(result, "/figures/rows=256,depth=2/us")
    assert agrees("1,234.6 µs", value)
    assert agrees("1,235 µs", value)
    assert not agrees("1,234 µs", value)


def test_the_journey_names_modules_in_seven_steps(root, readme):
    steps = re.split(r"^\d\. ", readme, flags=re.M)[1:]
    assert len(steps) == 7
    for step in steps:
        names = re.findall(r"\]\((pagedcore/[\w/]+\.py)\)", step.split("\n\n")[0])
        assert names
        assert all((root / name).is_file() for name in names)


def test_folders_in_the_tree_exist_and_none_is_missing(root, readme, members):
    (tree,) = re.findall(r"^```\n(pagedcore/.*?)^```$", readme, re.M | re.S)
    shown, parent = set(), ""
    for line in tree.splitlines():
        inner = line.startswith("  ")
        names = re.findall(r"[\w./-]+", line)[:1] if inner or "  " in line else line.split()
        parent = parent if inner else names[0]
        shown |= {f"{parent}{name}" if inner else name for name in names}
    assert [name for name in shown if not (root / name).exists()] == []
    packages = {
        f"{path.parent.relative_to(root)}/" for path in root.glob("pagedcore/*/__init__.py")
    }
    folders = {f"{member.relative_to(root)}/" for member in members}
    assert packages | folders | {"pagedcore/", "tests/", "docs/", "deploy/"} <= shown


def test_continuous_integration_runs_nothing_that_readme_does_not_name(root, both):
    script = (root / ".ci" / "run").read_text(encoding="utf-8")
    lines = [
        line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))
    ]
    named = [shlex.split(command) for command in indented_commands(both[0])]
    assert lines
    assert [line for line in lines if shlex.split(line) not in named] == []


def test_every_target_of_the_makefile_is_named(root, both):
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, re.M)
    assert targets
    assert [t for t in targets if f"make {t}" not in indented_commands(both[0])] == []
    scripts = re.findall(r"python (\S+\.py)", makefile)
    assert [script for script in scripts if not (root / script).is_file()] == []
