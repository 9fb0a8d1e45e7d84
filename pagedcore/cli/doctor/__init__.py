"""`pagedcore doctor`: what is wrong with this machine, and the command that mends it."""

import json as text
from collections import Counter
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from pagedcore.cli.doctor.checks import Finding, diagnose
from pagedcore.cli.doctor.system import System, ThisSystem

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(*, host: str = "127.0.0.1", port: int = 8000, json: bool = False) -> int:
    """Look for what keeps pagedcore from running here. The status is 1 if something does.

    Parameters
    ----------
    host
        Address that a server would listen on.
    port
        Port that a server would listen on.
    json
        Print one JSON object.
    """
    return report(ThisSystem(), host=host, port=port, json=json)


def report(system: System, *, host: str, port: int, json: bool) -> int:
    """Print a diagnosis of any machine; returns the exit status."""
    findings = diagnose(system, host=host, port=port)
    counts = Counter(finding.verdict for finding in findings)
    if json:
        told = {"ok": not counts["fail"], "findings": [asdict(each) for each in findings]}
        print(text.dumps(told, indent=2))
    else:
        console = Console(highlight=False)
        for finding in findings:
            _show(console, finding)
        print(f"checks: {len(findings)}, warnings: {counts['warn']}, failures: {counts['fail']}")
    return 1 if counts["fail"] else 0


def _show(console: Console, finding: Finding) -> None:
    color = _COLORS[finding.verdict]
    line = f"[{color}]{finding.verdict:5}[/] {finding.name:9} {escape(finding.text)}"
    console.print(line, soft_wrap=True)
    if finding.remedy:
        console.print(f"{'':15} [bold]mend:[/] {escape(finding.remedy)}", soft_wrap=True)
