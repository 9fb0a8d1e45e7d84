"""`pagedcore serve --server pytriton`: Triton, and the OpenAI surface beside it, over one engine.

this process    PyTriton, the callable behind the model, the OpenAI surface in a thread
tritonserver    HTTP, gRPC and metrics; a stub process per model
the engine      a child process that both front ends are clients of
"""

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Self

from pagedcore.config import EngineConfig
from pagedcore.engine.info import EngineInfo
from pagedcore.engine.process import BUILD, EngineProcess
from pagedcore.errors import EngineDeadError
from pagedcore.server_config import API_KEY_VARIABLE, ServerConfig
from pagedcore_openai.collector import settle_collector
from pagedcore_openai.counters import OPEN, Counters
from pagedcore_openai.serve import listen
from pagedcore_pytriton.completions import Completions
from pagedcore_pytriton.environment import prepare_environment, temporary_workspace
from pagedcore_pytriton.model import TritonModel
from pagedcore_pytriton.sidecar import Sidecar
from pagedcore_pytriton.tritonserver import Ports, TritonServer, check_main_thread

logger = logging.getLogger("pagedcore.server")

_LOOK_S = 0.2


def serve(config: EngineConfig, server: ServerConfig, *, build: str = BUILD) -> int:
    """Serve until SIGTERM or SIGINT, and return 0; in the main thread.

    Raises what an engine cannot start with, ConfigError for an address in use, and EngineDeadError
    when the engine or tritonserver ends.
    """
    check_main_thread()
    ports = Ports.after(server.port)
    prepare_environment()
    os.environ.pop(API_KEY_VARIABLE, None)  # `server` has the keys; children need not
    # PyTriton logs each error that a client gets, with a traceback.
    logging.getLogger("pytriton").setLevel(logging.ERROR)
    counters = Counters(2)
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_signals())
        listener = stack.enter_context(listen(server.host, server.port))
        for port in _in_order(ports):
            listen(server.host, port).close()
        engine = stack.enter_context(EngineProcess(config, build=build))
        sidecar = Sidecar(engine.address, config, server, listener, counters)
        stack.enter_context(sidecar)
        logger.info("the OpenAI surface answers at port %d; the model is loading", server.port)
        drain = stack.enter_context(_Drain(sidecar, server.shutdown_timeout, stop))
        workspace = stack.enter_context(temporary_workspace())
        triton = stack.enter_context(TritonServer(workspace, server, ports))
        info = _wait_ready(engine, stop)
        if info is not None:
            sidecar.wait_loaded()
            name = _model_name(info.served_model_names[0])
            model = TritonModel(triton.triton, name, engine.address, server, counters, slot=1)
            stack.enter_context(model)
            model.begin(config, info)
            model.bind()
            triton.watch()
            drain.include(model.completions)
            counters.slot(1).add(OPEN)
            settle_collector()
            logger.info("model %s: http %d, grpc %d, metrics %d", name, *_in_order(ports))
        while not stop.asked.wait(_LOOK_S):
            if not engine.alive:
                raise EngineDeadError(f"the engine process has ended with status {engine.wait()}")
            if not triton.alive:
                raise EngineDeadError("tritonserver, or what talks to it, has ended")
        drain.wait()
    return 0


class _Stop:
    """What signals have asked for."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.at_once = threading.Event()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal drains, the second does not wait."""
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {n: signal.signal(n, stop.handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_ready(engine: EngineProcess, stop: _Stop) -> EngineInfo | None:
    while not stop.asked.is_set():
        try:
            return engine.wait_ready(_LOOK_S)
        except TimeoutError:
            pass
    return None


class _Drain:
    """Refuses at every door once a signal has come, and lets requests end (LIFE-4).

    A thread, so that this begins at once, wherever the main thread is. A context manager: what
    has not ended when it is left is aborted.
    """

    def __init__(self, sidecar: Sidecar, timeout_s: float, stop: _Stop) -> None:
        self._sidecar = sidecar
        self._timeout_s = timeout_s
        self._stop = stop
        self._completions: Completions | None = None
        self._thread = threading.Thread(target=self._run, name="pagedcore-drain", daemon=True)

    def include(self, completions: Completions) -> None:
        """Let these requests end, too."""
        self._completions = completions
        if self._stop.asked.is_set():
            completions.drain()

    def wait(self) -> None:
        """Wait until nothing runs any more."""
        self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.at_once.set()
        self._stop.asked.set()
        self.wait()

    def _run(self) -> None:
        self._stop.asked.wait()
        if self._completions is not None:
            self._completions.drain()
        beside = self._sidecar.drain(self._timeout_s)
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline and not self._stop.at_once.wait(0.05):
            if beside.done() and not (self._completions and self._completions.num_active):
                break
        if self._completions is not None:
            self._completions.abort()
        self._sidecar.abort_all()
        beside.result()


def _model_name(served: str) -> str:
    """What Triton allows in a model's name: of a path or a hub's name, the last part."""
    return re.sub(r"[^a-zA-Z0-9._-]", "-", served.rstrip("/").rpartition("/")[2]) or "model"


def _in_order(ports: Ports) -> tuple[int, int, int]:
    return ports.http, ports.grpc, ports.metrics
