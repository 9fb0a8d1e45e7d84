"""What stands where in this repository."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def members():
    """The folders of the member distributions."""
    found = [ROOT / "kernels", *ROOT.glob("adapters/*"), *ROOT.glob("plugins/*")]
    return sorted(folder for folder in found if (folder / "pyproject.toml").is_file())


@pytest.fixture(scope="session")
def packages(members):
    """The folder of every package that is shipped."""
    inner = [path.parent for member in members for path in member.glob("*/__init__.py")]
    return [ROOT / "pagedcore", *sorted(inner)]


@pytest.fixture(scope="session")
def modules(packages):
    """Every module that is shipped."""
    return sorted(path for package in packages for path in package.rglob("*.py"))


@pytest.fixture(scope="session")
def projects(members):
    """The parsed pyproject.toml of the root and of each member, by folder."""
    return {
        folder: tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        for folder in (ROOT, *members)
    }
