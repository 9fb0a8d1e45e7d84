"""The engine, in LitServe's inference worker.

LitServe's queue and its loops are not used: front ends talk to the engine's own socket. The engine
is built here and not in `setup`, so that the port is open while the model loads.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from types import FrameType
from typing import Any

import msgspec
from litserve.loops.base import LitLoop

from pagedcore.config import EngineConfig
from pagedcore.engine.server import EngineServer, ServedEngine
from pagedcore.engine.start import StartFailure, build_by_name
from pagedcore.logs import configure_logs
from pagedcore_litserve.manager import end_manager
from pagedcore_litserve.plan import Plan, join_log

logger = logging.getLogger(__name__)

_LOOK_S = 0.05
_LAST_WORDS_S = 10.0
"""Seconds beyond the drain's limit after which a worker ends whatever it is doing."""


class PagedLoop(LitLoop):  # type: ignore[misc]  # LitServe ships no types
    """Serves an engine for as long as the worker lives."""

    def pre_setup(self, lit_api: Any, spec: Any = None) -> None:
        """Nothing of LitServe's own loops applies."""

    def __call__(
        self,
        lit_api: Any,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """Called by LitServe in the worker's main thread."""
        manager = request_queue._token.address
        sys.exit(_Worker(lit_api.spec.plan, device, worker_id, manager).run())


def on_device(config: EngineConfig, device: str) -> EngineConfig:
    """The configuration for LitServe's choice of a device.

    An accelerator that LitServe names is for an engine whose device is left open; "cpu" is also
    what LitServe says without one, and leaves the choice to the engine.
    """
    if config.execution.device != "auto" or not device.startswith("cuda"):
        return config
    return replace(config, execution=replace(config.execution, device=device))


class _Worker:
    """One engine and its end: by SIGTERM, or with the main process."""

    def __init__(self, plan: Plan, device: str, worker_id: int, manager: Any) -> None:
        """`manager` is the address of LitServe's."""
        self._plan = plan
        self._manager = manager
        self._config = on_device(plan.engine, device)
        self._address = plan.address(worker_id)
        self._lock = threading.Lock()
        self._serving: tuple[ServedEngine, EngineServer] | None = None
        self._told = threading.Event()

    def run(self) -> int:
        """Serve until told to end; returns the exit status."""
        configure_logs()  # unless the program did
        if self._plan.server.log_format == "json":
            join_log()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
        signal.signal(signal.SIGTERM, self._on_sigterm)
        for work in (self._watch_main, self._end):
            threading.Thread(target=work, name=f"pagedcore{work.__name__}", daemon=True).start()
        try:
            engine = build_by_name(self._plan.build, self._config, "serve")
            server = EngineServer(engine, self._address, on_stuck=lambda: os._exit(1))
            with self._lock:  # not entered when this process is ending already
                self._serving = (engine, server)
            server.listen()
        except Exception as error:
            self._tell(StartFailure.of(error))
            return 1
        try:
            server.serve()
        except Exception:
            logger.exception("the engine has failed")
            return 1
        finally:
            engine.shutdown()
            self._clear_up()
        return 0

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._told.set()

    def _watch_main(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            main = os.pidfd_open(self._plan.main_pid)
            if os.getppid() == self._plan.main_pid:  # and not a later process of the same id
                select.select([main], [], [])
        self._told.set()

    def _end(self) -> None:
        """When told to, let what runs end; for as long as front ends may drain, and no longer."""
        self._told.wait()
        with self._lock:
            if self._serving is not None:
                engine, server = self._serving
                limit_s = self._plan.server.shutdown_timeout + _LAST_WORDS_S
                deadline = time.monotonic() + limit_s
                while engine.has_work and time.monotonic() < deadline:
                    time.sleep(_LOOK_S)
                server.stop()
                time.sleep(_LAST_WORDS_S)  # this thread ends with the process
            self._clear_up()
            os._exit(1)

    def _clear_up(self) -> None:
        """Where the main process is gone, nobody else does: API servers may not be there yet."""
        if os.getppid() != self._plan.main_pid:
            self._plan.remove_folder()
            end_manager(self._manager)

    def _tell(self, failure: StartFailure) -> None:
        logger.error("%s", failure.message)
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.sendto(msgspec.msgpack.encode(failure), self._plan.failures)
