"""A model in a Triton: the callable behind it, and what Triton is told of it.

`bind_paged_model` is for a program's own PyTriton:

    prepare_environment()
    with Triton() as triton, bind_paged_model(triton, "llm", EngineConfig.from_options(...)):
        triton.serve()
"""

import logging
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pagedcore.config import EngineConfig
from pagedcore.engine.info import EngineInfo
from pagedcore.engine.process import BUILD, EngineProcess
from pagedcore.errors import ConfigError, PagedcoreError
from pagedcore.server_config import ServerConfig
from pagedcore_openai.counters import Counters
from pagedcore_openai.surface import load_inputs
from pagedcore_pytriton import shim
from pagedcore_pytriton.cancellation import Cancellations
from pagedcore_pytriton.completions import Completions
from pagedcore_pytriton.environment import is_prepared, prepare_environment
from pagedcore_pytriton.metrics import METRICS_SOCKET, MetricsPusher
from pagedcore_pytriton.tensors import INPUTS, OUTPUTS

logger = logging.getLogger(__name__)


class TritonModel:
    """One model of one Triton; a context manager, to be left before Triton is stopped."""

    def __init__(
        self,
        triton: Any,
        name: str,
        address: str,
        server: ServerConfig,
        counters: Counters,
        slot: int = 0,
    ) -> None:
        """`address` is the engine's socket. Nothing is bound yet."""
        self._triton = triton
        self._name = name
        self._address = address
        self._server = server
        self._counters = counters
        self._workspace = Path(triton._workspace.path)
        self._stack = ExitStack()
        cancellations = Cancellations(self._workspace, name)
        self.completions = Completions(address, server, cancellations, counters.slot(slot))
        """The callable."""

    def bind(self) -> None:
        """Declare the model; where tritonserver runs, it is loaded at once."""
        from pytriton.model_config import ModelConfig, Tensor

        with_stub = shim.bind(
            self._triton,
            self._name,
            infer_func=self.completions.infer,
            inputs=[Tensor(name=n, dtype=t, shape=(-1,), optional=True) for n, t in INPUTS.items()],
            outputs=[Tensor(name=n, dtype=t, shape=(-1,)) for n, t in OUTPUTS.items()],
            config=ModelConfig(batching=False, decoupled=True),
        )
        if with_stub:
            path = self._workspace / METRICS_SOCKET.format(self._name)
            alias = self._server.metrics_alias
            self._stack.enter_context(MetricsPusher(self._address, path, self._counters, alias))

    def begin(self, config: EngineConfig, info: EngineInfo) -> None:
        """Serve from now on; raises ModelError where the model's text side cannot load."""
        self.completions.begin(load_inputs(config, info))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.completions.abort()
        self._stack.close()


class BoundModel:
    """A model that `bind_paged_model` has bound, and its engine; a context manager."""

    def __init__(self, model: TritonModel, engine: EngineProcess, config: EngineConfig) -> None:
        self._model = model
        self._engine = engine
        self._config = config
        self._ready = threading.Event()
        self._error: PagedcoreError | None = None
        threading.Thread(target=self._load, name="pagedcore-load", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the engine runs, be it loaded or not; requests are refused without one."""
        return self._engine.alive

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until requests are served; raises what the start failed with, and TimeoutError."""
        if not self._ready.wait(timeout_s):
            raise TimeoutError(f"the model is not ready after {timeout_s} s")
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End what runs, and the engine; before Triton is stopped."""
        self._model.__exit__(None, None, None)
        self._engine.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _load(self) -> None:
        try:
            self._model.begin(self._config, self._engine.wait_ready())
        except PagedcoreError as error:
            self._error = error
            logger.error("%s", error)
        self._ready.set()


def bind_paged_model(
    triton: Any,
    name: str,
    engine: EngineConfig | None = None,
    *,
    server: ServerConfig | None = None,
    build: str = BUILD,
) -> BoundModel:
    """Bind a model to a program's own `Triton`, before or after that runs.

    Its engine starts in a child process, which ends with this one; until it is loaded, requests
    are refused as UNAVAILABLE. `server` has keys and limits; its addresses are not used.
    Raises ConfigError where Triton runs in an environment that cannot load the model.
    """
    if triton.is_alive() and not is_prepared():
        raise ConfigError(
            "call pagedcore_pytriton.prepare_environment() before Triton(...) is entered: "
            "tritonserver could not load this interpreter"
        )
    prepare_environment()
    config = engine or EngineConfig()
    process = EngineProcess(config, build=build)
    try:
        model = TritonModel(triton, name, process.address, server or ServerConfig(), Counters())
        model.bind()
    except BaseException:
        process.stop()
        raise
    return BoundModel(model, process, config)
