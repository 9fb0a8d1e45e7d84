"""What a reviewer would say twice."""

import ast
import re

import pytest

import pagedcore

MOST_LINES = 400


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_public_names_are_these():
    assert pagedcore.__all__ == ["LLM", "EngineConfig", "SamplingParams", "__version__", "hookimpl"]
    assert all(name in vars(pagedcore) for name in pagedcore.__all__ if name != "LLM")  # lazy


def test_no_module_is_long(root, modules):
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    long = {str(path.relative_to(root)): n for path, n in sizes.items() if n > MOST_LINES}
    assert not long


def test_every_module_says_what_it_is_for(root, modules):
    assert [str(p.relative_to(root)) for p in modules if not ast.get_docstring(tree_of(p))] == []


def test_nothing_is_global(root, modules):
    wrong = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in modules
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Global)
    ]
    assert not wrong


def test_no_plugin_manager_is_made_by_an_import(root, modules):
    wrong = []
    for path in modules:
        for statement in tree_of(path).body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if any(
                isinstance(node, ast.Call) and ast.unparse(node.func).endswith("PluginManager")
                for node in ast.walk(statement)
            ):
                wrong.append(f"{path.relative_to(root)}:{statement.lineno}")
    assert not wrong


def dataclasses_of(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if "dataclass" in decorators:
                yield node


@pytest.mark.parametrize("name", ["config", "server_config", "request"])
def test_every_setting_is_documented_under_itself(root, name):
    """Flags, keywords and the reference page take their words from there."""
    missing = []
    for node in dataclasses_of(root / "pagedcore" / f"{name}.py"):
        if name == "request" and node.name not in ("SamplingParams", "SamplingLimits"):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and not documented:
                missing.append(f"{node.name}.{ast.unparse(field.target)}")
    assert not missing


def test_every_hook_is_documented(root):
    specs = tree_of(root / "pagedcore" / "hookspecs.py")
    hooks = [
        node
        for node in specs.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("pagedcore_")
    ]
    assert hooks
    assert [hook.name for hook in hooks if not ast.get_docstring(hook)] == []


def test_every_ignored_lint_rule_has_its_reason(root, modules):
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    lint = project[project.index("[tool.ruff.lint]") :]
    ignored = re.findall(r'^ +"[A-Z]+\d+",.*$', lint, re.M)
    ignored += re.findall(r'^"[^"]+" = \[.*$', lint, re.M)
    assert ignored
    assert [line for line in ignored if not re.search(r"# \w+", line)] == []
    bare = [
        f"{path.relative_to(root)}:{number}"
        for path in modules
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"# noqa(?!: [A-Z]+\d+(?:, ?[A-Z]+\d+)* +\S*\s*\w+)", line)
    ]
    assert not bare
