"""The files in deploy/, and what they are held against."""

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def members():
    """The folders of the member distributions, as paths in the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["tool"]["uv"]["workspace"]["members"])


@pytest.fixture(scope="session")
def read():
    """The text of a file in deploy/."""
    return lambda name: (DEPLOY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def parse(read):
    """A YAML file in deploy/ as what it says."""
    yaml = pytest.importorskip("yaml", reason="nothing here reads YAML")
    return lambda name: yaml.safe_load(read(name))


@pytest.fixture(scope="session")
def dashboard(read):
    return json.loads(read("grafana/dashboards/pagedcore.json"))


@pytest.fixture(scope="session")
def unit(read):
    """The systemd unit: section to setting to its values, in order."""
    sections = {}
    for line in read("pagedcore.service").splitlines():
        if not line or line.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            settings = sections.setdefault(heading[1], {})
            continue
        name, equals, value = line.partition("=")
        assert equals, line
        settings.setdefault(name, []).append(value)
    return sections
