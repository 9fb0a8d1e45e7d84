"""Each kernel says what it works on."""

import ast
import re


def kernel_modules(root):
    paths = sorted((root / "kernels" / "pagedcore_kernels").rglob("*.py"))
    return [path for path in paths if re.search(r"\b_\w+\[\(", path.read_text(encoding="utf-8"))]


def test_a_kernels_head_names_its_letters_and_shapes(root):
    assert kernel_modules(root)
    for path in kernel_modules(root):
        head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert re.search(r"\[[A-Z][^\]]*\]", head), path.name
