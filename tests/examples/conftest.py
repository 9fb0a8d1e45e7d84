"""A stranger's distributions, each installed beside this workspace in a place of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


class Installed:
    """An environment in which one of the examples is installed."""

    def __init__(self, name, target):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
        subprocess.run([*pip, *options, str(EXAMPLES / name)], check=True, timeout=120)
        self._environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    def run(self, *command, cwd=None):
        """Run Python there: what it printed. It must succeed."""
        result = subprocess.run(
            [sys.executable, *command],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=240,
            cwd=cwd,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def pagedcore(self, *command):
        """Run a command of pagedcore's."""
        return self.run("-m", "pagedcore.cli", *command)


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """Installs an example by the name of its folder."""
    return lambda name: Installed(name, tmp_path_factory.mktemp(name))
