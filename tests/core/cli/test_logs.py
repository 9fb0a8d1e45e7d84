"""Logs as JSON: one object a line, whatever is in the message."""

import json
import logging
import subprocess
import sys

import pytest

from pagedcore.logs import VARIABLE, JsonFormatter

PROGRAM = """
import logging, subprocess, sys
from pagedcore.logs import configure_logs
configure_logs(*sys.argv[1:])
logging.getLogger("pagedcore.server").info("it serves")
if sys.argv[1:]:
    subprocess.run([sys.executable, "-c", sys.stdin.read()], check=True)
"""


def record(message, *arguments, exc_info=None):
    return logging.LogRecord("a.b", logging.WARNING, "file", 1, message, arguments, exc_info)


def test_a_line_has_what_a_collector_asks_for():
    entry = json.loads(JsonFormatter().format(record("%d of %s", 3, "ten")))
    assert list(entry) == ["time", "level", "logger", "pid", "message"]
    assert (entry["level"], entry["logger"], entry["message"]) == ("WARNING", "a.b", "3 of ten")
    assert entry["time"].endswith("Z")


def test_no_message_makes_two_lines():  # R27
    line = JsonFormatter().format(record("a\r\nERROR forged \u2028 \x00"))
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == "a\r\nERROR forged \u2028 \x00"


def test_a_traceback_stands_in_its_line():
    try:
        raise ValueError("what")
    except ValueError:
        line = JsonFormatter().format(record("it failed", exc_info=sys.exc_info()))
    assert "ValueError: what" in json.loads(line)["exception"]
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_processes_that_are_started_log_in_the_same_way(log_format, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, log_format],
        input=PROGRAM,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = ended.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        if log_format == "json":
            assert json.loads(line)["message"] == "it serves"
        else:
            assert line.endswith(" INFO pagedcore.server: it serves")
