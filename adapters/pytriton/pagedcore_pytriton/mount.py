"""`pagedcore serve --server pytriton`: Triton, and the OpenAI surface beside it, over one engine.

this process    PyTriton, the callable behind the model, the OpenAI surface in a thread
tritonserver    HTTP, gRPC and metrics; a stub process per model
the engine      a child process that both front ends are clients of
"""

import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.engine.info import EngineInfo
from pagedcore.engine.process import BUILD, EngineProcess
from pagedcore.errors import ConfigError, EngineDeadError
from pagedcore.server_config import ServerConfig
from pagedcore.text.inputs import InputProcessor
from pagedcore.text.tokenizer import Tokenizer
from pagedcore_pytriton.cancellation import Cancellations
from pagedcore_pytriton.completions import Completions
from pagedcore_pytriton.tritonserver import (
    Ports,
    TritonServer,
    prepare_environment,
    temporary_workspace,
)

logger = logging.getLogger(__name__)

_LOOK_S = 0.2


def serve(config: EngineConfig, server: ServerConfig, *, build: str = BUILD) -> int:
    """Serve until SIGTERM or SIGINT, and return 0; in the main thread.

    Raises what an engine cannot start with, ConfigError for an address in use, and EngineDeadError
    when the engine or tritonserver ends.
    """
    ports = Ports.after(server.port)
    prepare_environment()
    for port in (ports.http, ports.grpc, ports.metrics):
        _listen(server.host, port).close()
    # PyTriton logs each error that a client gets, with a traceback.
    logging.getLogger("pytriton").setLevel(logging.ERROR)
    with ExitStack() as stack:
        stop = stack.enter_context(_stop_signals())
        listener = stack.enter_context(_listen(server.host, server.port))
        engine = stack.enter_context(EngineProcess(config, build=build))
        if find_spec("pagedcore_openai.app") is None:
            logger.warning("pagedcore-openai has no app: only Triton serves")
        else:
            stack.enter_context(_surface(engine.address, config, server, listener))
        info = _wait_ready(engine, stop)
        if info is not None:
            _serve_triton(config, server, ports, engine, info, stop)
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


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}. Choose another --port (Triton "
            "takes the next three), or stop what listens there."
        ) from None


@contextmanager
def _surface(
    address: str, config: EngineConfig, server: ServerConfig, listener: socket.socket
) -> Iterator[None]:
    """The OpenAI surface, in a thread with an event loop of its own."""
    import uvicorn
    from pagedcore_openai.app import build_app

    app = build_app(EngineClient(address), config, server)
    uvicorn_server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=int(server.shutdown_timeout))
    )
    thread = threading.Thread(
        target=uvicorn_server.run, args=([listener],), name="pagedcore-openai"
    )
    thread.start()
    try:
        yield
    finally:
        uvicorn_server.should_exit = True
        thread.join()


def _wait_ready(engine: EngineProcess, stop: _Stop) -> EngineInfo | None:
    while not stop.asked.is_set():
        try:
            return engine.wait_ready(_LOOK_S)
        except TimeoutError:
            pass
    return None


def _serve_triton(
    config: EngineConfig,
    server: ServerConfig,
    ports: Ports,
    engine: EngineProcess,
    info: EngineInfo,
    stop: _Stop,
) -> None:
    inputs = _inputs(config, info)
    name = _model_name(info.served_model_names[0])
    with ExitStack() as stack:
        workspace = stack.enter_context(temporary_workspace())
        triton = TritonServer(workspace, server, ports)
        cancellations = stack.enter_context(Cancellations(workspace))
        completions = Completions(engine.address, inputs, server, cancellations)
        triton.bind(name, completions)
        stack.enter_context(triton)
        logger.info("model %s: http %d, grpc %d, metrics %d", name, *_in_order(ports))
        while not stop.asked.wait(_LOOK_S):
            if not engine.alive:
                raise EngineDeadError(f"the engine process has ended with status {engine.wait()}")
            if not triton.alive:
                raise EngineDeadError("tritonserver, or what talks to it, has ended")
        _drain(completions, server.shutdown_timeout, stop)


def _drain(completions: Completions, timeout_s: float, stop: _Stop) -> None:
    """Let requests end, for as long as is allowed (semantics LIFE-4)."""
    completions.drain()
    deadline = time.monotonic() + timeout_s
    while completions.num_active and time.monotonic() < deadline and not stop.at_once.is_set():
        stop.at_once.wait(0.05)
    completions.abort()


def _inputs(config: EngineConfig, info: EngineInfo) -> InputProcessor:
    folder = Path(info.model)
    return InputProcessor.from_folder(
        folder,
        Tokenizer.from_folder(Path(config.model.tokenizer or folder)),
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        generation_config=config.model.generation_config,
        chat_template=config.model.chat_template,
    )


def _model_name(served: str) -> str:
    """What Triton allows in a model's name: of a path or a hub's name, the last part."""
    return re.sub(r"[^a-zA-Z0-9._-]", "-", served.rstrip("/").rpartition("/")[2]) or "model"


def _in_order(ports: Ports) -> tuple[int, int, int]:
    return ports.http, ports.grpc, ports.metrics
