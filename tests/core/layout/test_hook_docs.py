"""Each hook has a treaty, a page and a test."""

import inspect
import re

import pytest

from pagedcore import hookspecs

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("pagedcore_"))


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented_with_its_signature_and_a_worked_answer(root, hook):
    page = (root / "docs" / "hooks.md").read_text(encoding="utf-8")
    signature = str(inspect.signature(getattr(hookspecs, hook)))
    plain = re.sub(r"collections\.abc\.|typing\.|['\"]", "", signature)
    assert f"## `{hook}{plain}`" in page
    _, section = page.split(f"## `{hook}{plain}`")
    assert f"def {hook}(" in section.split("## `")[0]


def test_the_page_names_no_hook_that_does_not_exist(root):
    page = (root / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^## `(\w+)", page, re.MULTILINE)) == HOOKS


def test_the_page_states_the_version_of_the_spec(root):
    page = (root / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert f"version {'.'.join(map(str, hookspecs.SPEC_VERSION))} of the hook spec" in page


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_has_a_docstring_and_some_test_uses_it(root, hook):
    assert len(inspect.getdoc(getattr(hookspecs, hook)) or "") > 80
    tests = [
        path for path in (root / "tests").rglob("test_*.py") if path.name != "test_hook_docs.py"
    ]
    assert any(hook in path.read_text(encoding="utf-8") for path in tests)
