"""Who may import whom."""

import ast
import subprocess
import sys

import pytest

CONTRACT = {
    "_markers",
    "cache_spec",
    "checked_types",
    "config",
    "errors",
    "hookspecs",
    "logs",
    "lora_config",
    "metrics",
    "plugins",
    "pooling",
    "presets",
    "request",
    "server_config",
    "step",
}
BELOW = {
    "scheduling": set(),
    "execution": set(),
    "text": set(),
    "sources": set(),
    "engine": {"scheduling", "execution", "text", "sources"},
    "testing": {"scheduling", "execution", "text", "sources", "engine"},
    "cli": {"scheduling", "execution", "text", "sources", "engine", "testing"},
}
"""What a layer may import besides the contract and itself."""

HEAVY = ("torch", "triton", "transformers", "litserve", "pytriton")
MOUNTS = {"pagedcore_litserve", "pagedcore_pytriton"}


def imports(path, *, types_too=False):
    """Names of the modules that a file imports, wherever in it."""
    found = []

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types_too:
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            if node.module == "pagedcore":
                found.extend(f"pagedcore.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def fresh_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_every_part_of_the_core_has_its_layer(root):
    parts = {path.stem for path in (root / "pagedcore").iterdir() if path.suffix == ".py"}
    parts |= {path.parent.name for path in (root / "pagedcore").glob("*/__init__.py")}
    # These two put the parts together, and import them only when they are asked for.
    assert parts - {"__init__", "builtin"} <= CONTRACT | BELOW.keys()


@pytest.mark.parametrize("layer", BELOW)
def test_a_layer_imports_downwards_only(root, layer):
    allowed = CONTRACT | BELOW[layer] | {layer}
    wrong = {
        f"{path.relative_to(root)}: {name}"
        for path in (root / "pagedcore" / layer).rglob("*.py")
        for name in imports(path)
        if name.startswith("pagedcore.") and name.split(".")[1] in BELOW.keys() - allowed
    }
    assert not wrong


def test_the_contract_imports_no_layer(root):
    wrong = {
        f"{name}: {imported}"
        for name in CONTRACT
        for imported in imports(root / "pagedcore" / f"{name}.py")
        if imported.startswith("pagedcore.") and imported.split(".")[1] in BELOW
    }
    assert not wrong


def test_what_knows_no_tensors_names_no_heavy_package(root):
    core = root / "pagedcore"
    paths = [core / f"{name}.py" for name in CONTRACT]
    paths += [*core.glob("scheduling/**/*.py"), *core.glob("text/**/*.py")]
    wrong = {
        f"{path.relative_to(root)}: {name}"
        for path in paths
        for name in imports(path, types_too=True)
        if name.split(".")[0] in HEAVY
    }
    assert not wrong


def test_what_knows_no_tensors_imports_where_torch_is_missing(root):
    core = root / "pagedcore"
    names = [f"pagedcore.{name}" for name in sorted(CONTRACT)]
    for layer in ("scheduling", "text"):
        names += [f"pagedcore.{layer}.{path.stem}" for path in core.glob(f"{layer}/[!_]*.py")]
    fresh_python(
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({HEAVY}))\n"
        f"for name in {names}: importlib.import_module(name)"
    )


def test_importing_the_package_loads_neither_torch_nor_transformers():
    loaded = fresh_python("import pagedcore, sys; print(*sys.modules)")
    assert not {"torch", "transformers"} & set(loaded)


def test_the_core_imports_no_member_and_a_member_no_other(root, packages):
    wrong = set()
    for package in packages:
        allowed = {package.name} | ({"pagedcore_openai"} if package.name in MOUNTS else set())
        for path in package.rglob("*.py"):
            for name in imports(path, types_too=True):
                owner = name.split(".")[0]
                if owner.startswith("pagedcore_") and owner not in allowed:
                    wrong.add(f"{path.relative_to(root)}: {name}")
    assert not wrong
