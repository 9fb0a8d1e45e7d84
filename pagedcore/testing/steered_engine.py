"""A FakeEngine in another process, and the handle by which a test steers it.

A mount starts its engine in a process of its own, so a test cannot reach it as an object. This one
listens at `steer.sock` in its model folder and does what an `EngineHandle` of that folder says.
"""

import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from pagedcore.config import EngineConfig, Usage
from pagedcore.testing.fake_engine import FakeEngine, build_fake_engine

BUILD_STEERED = "pagedcore.testing.steered_engine:build_steered_engine"
"""For `EngineProcess(config, build=BUILD_STEERED)`, and for the mounts."""

START_PIPE = "start"

WAIT_S = 30.0
"""Seconds after which a state that was waited for counts as never reached."""


def build_steered_engine(config: EngineConfig, *, usage: Usage) -> FakeEngine:
    """A FakeEngine that also takes orders; `config.model.model` must be a folder.

    Where that holds a named pipe `start`, loading lasts until somebody writes to it.
    """
    gate = Path(config.model.model) / START_PIPE
    if gate.exists():
        gate.read_bytes()
    engine = build_fake_engine(config, usage=usage)
    path = _socket_path(Path(config.model.model))
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(16)
    threading.Thread(target=_accept, args=(engine, listener), daemon=True).start()
    return engine


class EngineHandle:
    """Steers the engine of a model folder. Every method waits until it is done."""

    def __init__(self, folder: Path) -> None:
        self._path = _socket_path(folder)

    def hold(self) -> None:
        """See `FakeEngine.hold`."""
        self._order("hold")

    def pause(self) -> None:
        """See `FakeEngine.pause`."""
        self._order("pause")

    def advance(self, num_steps: int) -> None:
        """See `FakeEngine.advance`."""
        self._order("advance", num_steps)

    def release(self) -> None:
        """See `FakeEngine.release`."""
        self._order("release")

    def fail_running(self, message: str) -> None:
        """See `FakeEngine.fail_running`."""
        self._order("fail_running", message)

    def break_down(self, message: str) -> None:
        """Let every further step raise RuntimeError."""
        self._order("break_down", message)

    def kill(self) -> None:
        """End the engine's process as the system's out-of-memory killer would."""
        os.kill(self.state()["pid"], signal.SIGKILL)

    def state(self) -> dict[str, int]:
        """`live`, `aborted`, `added`, `steps` and `pid`, all numbers."""
        return self._order("state")

    def wait_for_live(self, count: int) -> dict[str, int]:
        """Wait until exactly `count` sequences wait or run; raises TimeoutError."""
        return self._order("wait_for_live", count)

    def wait_for_steps(self, count: int) -> dict[str, int]:
        """Wait until `count` steps were run in all; raises TimeoutError."""
        return self._order("wait_for_steps", count)

    def _order(self, name: str, *arguments: Any) -> dict[str, int]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(2 * WAIT_S)
            link.connect(str(self._path))
            link.sendall(json.dumps([name, *arguments]).encode() + b"\n")
            with link.makefile("rb") as answers:
                answer: dict[str, int] | None = json.loads(answers.readline())
        if answer is None:
            raise TimeoutError(f"the engine did not do {name} {arguments}")
        return answer


def _socket_path(folder: Path) -> Path:
    return folder / "steer.sock"


def _accept(engine: FakeEngine, listener: socket.socket) -> None:
    while True:
        link, _ = listener.accept()
        threading.Thread(target=_obey, args=(engine, link), daemon=True).start()


def _obey(engine: FakeEngine, link: socket.socket) -> None:
    with link, link.makefile("rwb") as stream:
        name, *arguments = json.loads(stream.readline())
        try:
            _do(engine, name, *arguments)
        except TimeoutError:
            answer = None
        else:
            answer = _state(engine)
        stream.write(json.dumps(answer).encode() + b"\n")


def _do(engine: FakeEngine, name: str, *arguments: Any) -> None:
    match name, arguments:
        case "hold" | "pause" | "release", []:
            getattr(engine, name)()
        case "advance", [num_steps]:
            engine.advance(num_steps, WAIT_S)
        case "fail_running", [message]:
            engine.fail_running(message)
        case "break_down", [message]:
            engine.break_down(RuntimeError(message))
        case "wait_for_live", [count]:
            engine.wait_for(lambda engine: len(engine.live_ids) == count, WAIT_S)
        case "wait_for_steps", [count]:
            engine.wait_for(lambda engine: engine.num_steps >= count, WAIT_S)
        case "state", []:
            pass


def _state(engine: FakeEngine) -> dict[str, int]:
    return {
        "live": len(engine.live_ids),
        "aborted": len(engine.aborted),
        "added": engine.num_added,
        "steps": engine.num_steps,
        "pid": os.getpid(),
    }
