"""The mount kit: does a server start, answer, stream, drain and leave nothing behind?

It runs `pagedcore serve --server NAME` as a process with a tiny model on the CPU, on 127.0.0.1.
"""

import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pagedcore.errors import PluginError
from pagedcore.testing.checks import Check

READY_S = 180
"""Until /readyz says so."""

END_S = 60
"""From SIGTERM to the end of the process."""

NUM_TOKENS = 5
POLL_S = 0.1


def mount_checks(name: str) -> Iterator[Check]:
    """What one mount promises, as one check: the server is started once."""
    yield Check(f"server {name}", "starts, answers, streams and ends", partial(check_mount, name))


def check_mount(name: str) -> str:
    """Run a server from start to end; raise PluginError for the first promise that it breaks."""
    from pagedcore.testing.tiny_models import save_tiny_model

    with tempfile.TemporaryDirectory(prefix="pagedcore-mount-kit-") as folder:
        save_tiny_model(Path(folder))
        with (Path(folder) / "log").open("w+b") as log:
            server = _Server(name, folder, log)
            try:
                started = time.monotonic()
                server.wait_ready()
                ready = time.monotonic()
                server.check_completion()
                server.check_stream()
                server.check_refusal()
                server.check_end()
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                raise server.complaint(f"{type(error).__name__}: {error}") from error
            finally:
                server.kill()
    return f"ready after {ready - started:.0f} s"


@dataclass(slots=True)
class _Answer:
    status: int
    kind: str
    body: str


class _Server:
    """The process, and what it is asked."""

    def __init__(self, name: str, folder: str, log: Any) -> None:
        self._log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        options = ["--host", "127.0.0.1", "--port", str(self._port), "--device", "cpu"]
        options += ["--dtype", "float32", "--num-gpu-blocks-override", "64"]
        command = [sys.executable, "-m", "pagedcore.cli", "serve", folder, "--server", name]
        self._process = subprocess.Popen([*command, *options], stdout=log, stderr=log)

    def complaint(self, what: str) -> PluginError:
        """A PluginError with the end of what the server wrote."""
        self._log.flush()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        said = "\n".join(lines[-15:])
        return PluginError(f"{what}; the server wrote:\n{said}")

    def wait_ready(self) -> None:
        """Wait for 200 of /readyz."""
        last: object = None

        def ready() -> bool:
            nonlocal last
            try:
                last = self._ask("GET", "/readyz").status
            except OSError as error:
                last = error
            if self._process.poll() is not None:
                raise self.complaint(f"it ended with the status {self._process.returncode}")
            return last == 200

        if not _wait(ready, READY_S):
            raise self.complaint(f"/readyz says {last} after {READY_S} s")

    def check_completion(self) -> None:
        """A completion has the tokens that were asked for."""
        answer = self._complete(stream=False)
        usage = json.loads(answer.body)["usage"]
        if answer.status != 200 or usage["completion_tokens"] != NUM_TOKENS:
            raise self.complaint(f"a completion was answered by {answer.status} with {usage}")

    def check_stream(self) -> None:
        """A stream's events are the same text, and end as they should."""
        whole = json.loads(self._complete(stream=False).body)["choices"][0]["text"]
        answer = self._complete(stream=True)
        if answer.status != 200 or not answer.kind.startswith("text/event-stream"):
            raise self.complaint(f"a stream was answered by {answer.status}, as {answer.kind!r}")
        events = [line[6:] for line in answer.body.splitlines() if line.startswith("data: ")]
        if not events or events[-1] != "[DONE]":
            raise self.complaint("a stream does not end with [DONE]")
        chunks = [json.loads(event) for event in events[:-1]]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
        if text != whole:
            raise self.complaint(f"a stream says {text!r}, the whole answer {whole!r}")

    def check_refusal(self) -> None:
        """A bad request is the caller's mistake, in OpenAI's shape."""
        answer = self._ask("POST", "/v1/completions", {"prompt": "a", "temperature": -1})
        if answer.status != 400 or json.loads(answer.body)["error"]["param"] != "temperature":
            raise self.complaint(f"a bad temperature was answered by {answer.status}")

    def check_end(self) -> None:
        """SIGTERM ends it with 0, and the port is free."""
        self._process.send_signal(signal.SIGTERM)
        if not _wait(lambda: self._process.poll() is not None, END_S):
            raise self.complaint(f"it still runs {END_S} s after SIGTERM")
        if self._process.returncode != 0:
            raise self.complaint(f"SIGTERM ended it with the status {self._process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                raise self.complaint("its port is still open")

    def kill(self) -> None:
        """End it, whatever state it is in."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _complete(self, *, stream: bool) -> _Answer:
        body = {"prompt": "hello", "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        return self._ask("POST", "/v1/completions", {**body, "stream": stream})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> _Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"content-type": "application/json"})
            answer = connection.getresponse()
            kind = answer.getheader("content-type") or ""
            return _Answer(answer.status, kind, answer.read().decode())
        finally:
            connection.close()


def _wait(condition: Callable[[], bool], limit_s: float) -> bool:
    """Whether the condition came to hold in time."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True
