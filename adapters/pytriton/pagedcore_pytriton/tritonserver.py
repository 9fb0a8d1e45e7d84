"""Tritonserver as this mount needs it: where it listens, how it runs, what it is made of."""

import contextlib
import os
import select
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig
from pagedcore_pytriton.completions import KEY_HEADERS
from pagedcore_pytriton.environment import processes_in

EXIT_TIMEOUT_S = 3
"""Seconds that tritonserver waits for open connections when it ends, idle ones included."""

_VARIABLE = "PYTRITON_TRITON_CONFIG_{}_PORT"


@dataclass(frozen=True, slots=True)
class Ports:
    """Where tritonserver listens."""

    http: int
    grpc: int
    metrics: int

    @classmethod
    def after(cls, port: int) -> Self:
        """The next three ports, or those that PyTriton's environment variables name."""
        if port == 0 or port > 65532:
            raise ConfigError(
                f"with --server pytriton, port must be in 1..65532, not {port}: Triton takes the "
                "next three, for HTTP, gRPC and metrics"
            )
        names = ("HTTP", "GRPC", "METRICS")
        ports = {}
        for offset, name in enumerate(names, 1):
            value = os.environ.get(_VARIABLE.format(name), str(port + offset))
            if not value.isdecimal() or not 1 <= int(value) <= 65535:
                raise ConfigError(
                    f"{_VARIABLE.format(name)} must be a port in 1..65535, not {value!r}"
                )
            ports[name.lower()] = int(value)
        return cls(**ports)


class TritonServer:
    """One tritonserver, as this mount needs it; a context manager.

    tritonserver ends with the thread that has started it, so that must be the main thread.
    """

    def __init__(self, workspace: Path, server: ServerConfig, ports: Ports) -> None:
        """`workspace` is a folder that is made here."""
        from pytriton.triton import Triton, TritonConfig

        self._workspace = workspace
        self._processes: dict[int, int] = {}
        self._needed: set[str] = set()
        self._lost = False
        self.triton: Any = Triton(
            workspace=workspace,
            config=TritonConfig(
                http_address=server.host,
                http_port=ports.http,
                grpc_address=server.host,
                grpc_port=ports.grpc,
                grpc_header_forward_pattern="|".join(KEY_HEADERS) if server.api_key else None,
                metrics_address=server.host,
                metrics_port=ports.metrics,
                allow_gpu_metrics=False,
                log_verbose=0,
                exit_timeout_secs=EXIT_TIMEOUT_S,
            ),
        )
        """PyTriton's own object."""

    def watch(self) -> None:
        """From now on the processes that there are belong to it: tritonserver, and its stubs."""
        programs = processes_in(self._workspace)
        self._needed = set(programs.values())
        for pid in programs:
            if pid not in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    self._processes[pid] = os.pidfd_open(pid)

    @property
    def alive(self) -> bool:
        """Whether tritonserver, its stubs and the threads that talk to them run."""
        ended, _, _ = select.select(list(self._processes.values()), [], [], 0)
        if ended:  # perhaps one that was there only while the model was loaded
            self._processes = {p: fd for p, fd in self._processes.items() if fd not in ended}
            for descriptor in ended:
                os.close(descriptor)
            self._lost = self._lost or not self._needed <= set(
                processes_in(self._workspace).values()
            )
        return not self._lost and bool(self.triton.is_alive())

    def __enter__(self) -> Self:
        check_main_thread()
        try:
            self.triton.run()
        except BaseException:
            self.triton.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.alive:  # requests wait for what will not come, and tritonserver for them
            self._kill()
        self.triton.stop()
        self._kill()  # a tritonserver in a hurry leaves its stubs
        for descriptor in self._processes.values():
            os.close(descriptor)

    def _kill(self) -> None:
        for pid in processes_in(self._workspace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def check_main_thread() -> None:
    """Raise ConfigError in any other thread."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "tritonserver ends with the thread that has started it: start it in the main thread"
        )
