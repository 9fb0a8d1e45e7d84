"""Pages of documentation say what the code says."""

import ast
import inspect
import re

import pytest

from pagedcore.cli.flags import engine_parameters, parameters
from pagedcore.cli.reference import page
from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.engine.info import EngineInfo
from pagedcore.plugins import collect, load_plugins
from pagedcore.request import SamplingParams
from pagedcore.server_config import ServerConfig
from pagedcore_openai.app import build_app
from pagedcore_openai.counters import Counters
from pagedcore_openai.metrics import exposition

REMEDY = "print it anew: python -m pagedcore.cli.reference > docs/configuration.md"
FLAGS_OF_OTHERS = {"--dry-run", "--out", "--help", "--from", "--with", "--enable-shared"}


@pytest.fixture
def read(root):
    return lambda name: (root / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_page_of_settings_is_what_their_declarations_print(read):
    assert read("configuration") == page(), REMEDY


def test_the_page_of_settings_has_every_one(read):
    text = read("configuration")
    flags = [*engine_parameters(), *parameters(ServerConfig)]
    missing = [flag.name for flag in flags if f"| `--{flag.name.replace('_', '-')}` |" not in text]
    missing += [
        flag.name for flag in parameters(SamplingParams) if f"| `{flag.name}` |" not in text
    ]
    assert missing == []


def declared_flags():
    """Every flag of every command."""
    from pagedcore.cli import plugins
    from pagedcore.cli.bench import kernels, latency, serve, startup, throughput
    from pagedcore.cli.doctor import doctor
    from pagedcore.cli.plan import plan

    flags = [*engine_parameters(), *engine_parameters(rename={"seed": "engine_seed"})]
    flags += [*parameters(ServerConfig), *parameters(SamplingParams)]
    benches = (kernels.kernels, latency.latency, serve.serve, startup.startup)
    for command in (*benches, throughput.throughput, plan, doctor, plugins.check):
        flags += inspect.signature(command).parameters.values()
    names = {flag.name.replace("_", "-") for flag in flags} | {"model", "server", "prompt"}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names}


@pytest.mark.parametrize(
    "name",
    [
        "architecture",
        "benchmarks",
        "lora",
        "offline",
        "planning",
        "plugins",
        "serving",
        "troubleshooting",
    ],
)
def test_flags_that_pages_name_exist(read, name):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", read(name)))
    assert named - FLAGS_OF_OTHERS - declared_flags() == set()


def test_the_tutorial_quotes_the_examples_as_they_are(root, read):
    files = [*(root / "examples").glob("my-*/*"), *(root / "tests/examples").glob("*.py")]
    sources = [path.read_text("utf-8") for path in files if path.suffix in {".py", ".toml"}]
    excerpts = re.findall(r"^```\w+\n(.*?)^```$", read("plugins"), re.M | re.S)
    assert len(excerpts) >= 5
    for excerpt in excerpts:
        assert any(excerpt in source for source in sources), excerpt


def messages_of_code(root):
    """Every text in our code, with ... for what is filled in."""
    found = []
    folders = ("pagedcore", "kernels", "adapters", "plugins")
    for path in (path for folder in folders for path in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    # In the log a text has its arguments as % and a letter.
    return [re.sub(r"%[sdg]", "\0", text).replace("`", "") for text in found]


def test_messages_that_are_explained_are_those_of_the_code(root, read):
    rows = re.findall(r"^\| `{1,2}(.+?)`{1,2} \| .+ \|$", read("troubleshooting"), re.M)
    assert len(rows) > 40
    texts = messages_of_code(root)
    unknown = []
    for row in rows:
        pieces = [piece for piece in row.replace("`", "").split("…") if piece.strip(" .:'()")]
        pattern = re.compile(".*?".join(map(re.escape, pieces)), re.S)
        if not any(pattern.search(text) for text in texts):
            unknown.append(row)
    assert unknown == []


def test_the_routes_that_are_told_are_those_that_answer(read, tmp_path):
    client = EngineClient(str(tmp_path / "engine.sock"))
    server = ServerConfig(api_key=(), enable_admin_api=True)
    served = {route.path for route in build_app(client, EngineConfig(), server).routes}
    served = {re.sub(r"\{[^}]*\}", "{id}", path) for path in served}
    table = read("serving").split("## Routes")[1].split("## Headers")[0]
    rows = "\n".join(line for line in table.splitlines() if line.startswith("| `"))
    told = set(re.findall(r"(?<=[ `])/[\w{}/.]*", rows))
    assert told - served == set()
    from pagedcore_openai import unbuilt

    others = {*unbuilt.UNBUILT, *unbuilt.ADMIN_UNBUILT}
    assert served - told - others == set()


def test_the_series_that_are_told_are_those_that_are_shown(read):
    info = EngineInfo(
        model="folder",
        served_model_names=("tiny",),
        max_model_len=64,
        vocab_size=256,
        block_size=16,
        num_blocks=8,
        max_num_seqs=4,
        startup_seconds={"total": 1.0},
    )
    shown = exposition([(info, {}, Counters())], alias=None).decode()
    table = read("serving").split("## Metrics")[1].split("## Logs")[0]
    named = re.findall(r"`(\w+)(?:\{(\w+)\})?`", re.findall(r"(?s)\| Series.*", table)[0])
    assert len(named) > 10
    for name, label in named:
        assert re.search(rf"^pagedcore:{name}(_count)?\{{", shown, re.M), name
        assert not label or f'{label}="' in shown


def test_the_page_of_models_has_every_architecture_that_is_offered(read):
    page, offered = read("models"), collect(load_plugins(), "pagedcore_models")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(listed) == sorted(offered.keys() - {"*"}), "print it anew, as the page says"
    assert "**fails**" not in page
