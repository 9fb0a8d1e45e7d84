"""Documents: their links lead somewhere, their commands are understood, their programs compile."""

import ast
import contextlib
import importlib
import re
import shlex

import pytest
from cyclopts import MissingArgumentError

from pagedcore.cli import app

PAGES = (
    "README.md",
    "README.zh.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "deploy/README.md",
    *(f"docs/{name}.md" for name in ("architecture", "benchmarks", "configuration", "hooks")),
    *(
        f"docs/{name}.md"
        for name in (
            "offline",
            "performance",
            "models",
            "planning",
            "plugins",
            "quantization",
            "lora",
            "serving",
            "troubleshooting",
        )
    ),
)
COMMANDS = {
    "generate",
    "chat",
    "serve",
    "plan",
    "quantize",
    "plugins",
    "bench",
    "doctor",
    "--help",
    "--version",
}


@pytest.fixture(params=PAGES)
def page(request, root):
    return root / request.param


def blocks(text, language):
    """Fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(text):
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands(text, program):
    """Command lines that call a program: indented ones, and those in backticks."""
    indented = re.findall(r"^ {4,}(?=\S)(.*)$", prose(text), re.M)
    inline = re.findall(r"`([^`\n]+)`", prose(text))
    found = []
    for line in (*indented, *inline):
        try:
            words = shlex.split(line.rstrip(" &"), comments=True)
        except ValueError:  # no command line
            continue
        while words and (re.fullmatch(r"[A-Z_]+=.*", words[0])):
            words.pop(0)
        if words[:2] == ["uv", "run"]:
            words = words[words.index(program) :] if program in words else []
        if words and words[0] == program:
            found.append(words[1:])
    return found


def anchors(text):
    """What headings can be linked as."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_checked(root):
    there = {str(path.relative_to(root)) for path in (*root.glob("*.md"), *root.glob("docs/*.md"))}
    assert there - set(PAGES) <= {"docs/performance.md"}


def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", prose(text)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other.read_text(encoding="utf-8")), target


def test_commands_of_ours_are_understood(page):
    for words in commands(page.read_text(encoding="utf-8"), "pagedcore"):
        if not words or words[0] not in COMMANDS:
            continue
        given = [word for word in words if word not in ("--help", "...")]
        with contextlib.suppress(MissingArgumentError):  # `serve --server` is a mention
            app.parse_args(given, exit_on_error=False, print_error=False)


def test_scripts_and_targets_that_are_called_exist(root, page):
    text = page.read_text(encoding="utf-8")
    for words in commands(text, "python"):
        if words[0] == "-m":
            assert (root / f"{words[1].replace('.', '/')}.py").is_file()
        elif words[0].endswith(".py"):
            assert (root / words[0]).is_file(), words
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text("utf-8"), re.M))
    assert {words[0] for words in commands(text, "make") if words} <= targets


def test_programs_compile_and_import_what_there_is(page):
    for program in blocks(page.read_text(encoding="utf-8"), "python"):
        try:
            tree = ast.parse(program)
        except IndentationError:  # an excerpt, which another test compares with its source
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("pagedcore"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_pages_name_no_path_of_one_machine(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"(?:/root|/work|/home/\w+|/Users)/[\w./-]*", text) == []
