"""For pytest: the checks of an installed plugin as cases of a test.

    pytest_plugins = ["pagedcore.testing.pytest_plugin"]  # in conftest.py

    @pytest.mark.pagedcore_plugin("my-plugin")
    def test_my_plugin_keeps_its_promises(pagedcore_check):
        pagedcore_check()

`backends=` and `serves=` of the mark are those of `plugin_checks`.
"""

import os
from importlib.metadata import entry_points

import pytest

from pagedcore.errors import UnknownNameError
from pagedcore.plugins import GROUP
from pagedcore.testing.plugin_checks import INTERPRETED, find_plugin, plugin_checks

MARK = "pagedcore_plugin"
FIXTURE = "pagedcore_check"


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    about = "run what an installed plugin of pagedcore promises, one case for each check"
    config.addinivalue_line("markers", f"{MARK}(name, backends=('torch',), serves=False): {about}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case of a test for each check, if it takes `pagedcore_check`."""
    if FIXTURE not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker(MARK)
    if mark is None or len(mark.args) != 1:
        raise pytest.UsageError(f"a test that takes {FIXTURE} needs @pytest.mark.{MARK}('name')")
    (name,) = mark.args
    if INTERPRETED in mark.kwargs.get("backends", ()):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    try:
        entry = find_plugin(entry_points(group=GROUP), name)
    except UnknownNameError as error:
        raise pytest.UsageError(str(error)) from None
    checks = list(plugin_checks(entry.name, entry.load(), **mark.kwargs))
    metafunc.parametrize(FIXTURE, checks, ids=str)
