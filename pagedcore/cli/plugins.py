"""`pagedcore plugins`: what is installed, whether it loads, and whether it keeps its contract."""

import os

from cyclopts import App
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pagedcore.cli.installed import describe, examine, installed, offers, origin
from pagedcore.testing.plugin_checks import INTERPRETED, find_plugin, plugin_checks

app = App(name="plugins", help="Look at what is installed.")


@app.command(name="list")
def show() -> int:
    """List installed plugins and what each one offers."""
    table = Table("plugin", "from", "offers")
    for entry in installed():
        try:
            told = "\n".join(f"{kind}: {', '.join(names)}" for kind, names in offers(entry).items())
        except Exception as error:
            told = f"does not load: {describe(error)} (see `pagedcore plugins doctor`)"
        table.add_row(entry.name, origin(entry), escape(told))
    Console().print(table)
    return 0


@app.command
def doctor() -> int:
    """Load every plugin, and look for names that two offer. The status is 1 if one fails."""
    examined = list(examine())
    for each in examined:
        _say("ok" if each.is_ok else "failed", f"{each.what}. {each.remedy}".removesuffix(". "))
    num_problems = sum(not each.is_ok for each in examined)
    print(f"plugins: {len(installed())}, problems: {num_problems}")
    return 1 if num_problems else 0


@app.command(name="test")
def check(name: str, *, backend: tuple[str, ...] = ("torch",), serve: bool = False) -> int:
    """Put what one plugin promises to the test, on the CPU: see docs/plugins.md.

    Parameters
    ----------
    name
        The plugin, as `pagedcore plugins list` shows it, or its distribution.
    backend
        Where its models run. `triton` runs in Triton's interpreter.
    serve
        Start the servers that it offers, too.
    """
    entry = find_plugin(installed(), name)
    if INTERPRETED in backend:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    try:
        checks = list(plugin_checks(entry.name, entry.load(), backends=backend, serves=serve))
    except Exception as error:
        _say("failed", f"{name} does not load: {describe(error)}")
        return 1
    num_failed = 0
    for promise in checks:
        try:
            remark = promise()
            _say("ok", f"{promise}: {remark}" if remark else str(promise))
        except Exception as error:
            num_failed += 1
            _say("failed", f"{promise}: {describe(error)}")
    print(f"checks: {len(checks)}, failed: {num_failed}")
    return 1 if num_failed else 0


def _say(verdict: str, text: str) -> None:
    color = "green" if verdict == "ok" else "red"
    Console(highlight=False).print(f"[{color}]{verdict:7}[/] {escape(text)}", soft_wrap=True)
