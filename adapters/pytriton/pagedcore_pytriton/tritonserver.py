"""Tritonserver with one model, as this mount needs it: the pitfalls of PyTriton 0.7.0, cured."""

import importlib.util
import logging
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig
from pagedcore_pytriton.completions import KEY_HEADER, Completions
from pagedcore_pytriton.tensors import INPUTS, OUTPUTS

logger = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 10
"""Seconds that tritonserver waits for open connections; with 2, its stub process is orphaned."""

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


def prepare_environment() -> None:
    """Set what PyTriton and tritonserver read from the environment; before they are imported.

    Raises ConfigError where Triton could not load this interpreter.
    """
    # Without it each response goes through a shared-memory store: gaps of up to 0.8 s.
    os.environ["PYTRITON_NO_TENSORSTORE"] = "1"
    # Triton's stub would otherwise find the distribution's libpython, not this interpreter's.
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    library = sysconfig.get_config_var("INSTSONAME") or ""
    if not library.startswith("libpython") or ".so" not in library:
        library = f"libpython{sysconfig.get_python_version()}.so.1.0"
    if not (folder / library).exists():
        raise ConfigError(
            f"Triton needs a shared {library}, which is not in {folder}: use a Python that was "
            "built with --enable-shared"
        )
    paths = [str(folder), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys(filter(None, paths)))


@contextmanager
def temporary_workspace() -> Iterator[Path]:
    """A folder for tritonserver's files and sockets, which only its owner may enter.

    It is where PyTriton would make one: programs must be allowed to run from there.
    """
    from pytriton.constants import PYTRITON_HOME

    PYTRITON_HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PYTRITON_HOME, prefix="pagedcore-") as folder:
        yield Path(folder) / "workspace"


class TritonServer:
    """One tritonserver with one model; a context manager, to be entered in the main thread.

    tritonserver ends with the thread that has started it.
    """

    def __init__(self, workspace: Path, server: ServerConfig, ports: Ports) -> None:
        """`workspace` is a folder that is made here."""
        from pytriton.triton import Triton, TritonConfig

        self._triton = Triton(
            workspace=workspace,
            config=TritonConfig(
                http_address=server.host,
                http_port=ports.http,
                grpc_address=server.host,
                grpc_port=ports.grpc,
                grpc_header_forward_pattern=KEY_HEADER if server.api_key else None,
                metrics_address=server.host,
                metrics_port=ports.metrics,
                allow_gpu_metrics=False,
                log_verbose=0,
                exit_timeout_secs=EXIT_TIMEOUT_S,
            ),
        )

    def bind(self, name: str, completions: Completions) -> None:
        """Declare the model, before the server is entered."""
        from pytriton.model_config import ModelConfig, Tensor

        self._triton.bind(
            model_name=name,
            infer_func=completions.infer,
            inputs=[Tensor(name=n, dtype=t, shape=(-1,), optional=True) for n, t in INPUTS.items()],
            outputs=[Tensor(name=n, dtype=t, shape=(-1,)) for n, t in OUTPUTS.items()],
            config=ModelConfig(batching=False, decoupled=True),
        )
        for model in self._triton._model_manager.models:
            _ship_stub(model)

    @property
    def alive(self) -> bool:
        """Whether tritonserver and the threads that talk to it run."""
        return bool(self._triton.is_alive())

    def __enter__(self) -> Self:
        try:
            self._triton.run()
        except BaseException:
            self._triton.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._triton.stop()


def _ship_stub(model: Any) -> None:
    """Let `stub_model.py` run in Triton, with PyTriton's own model beside it."""
    original = model.get_proxy_model_files
    spec = importlib.util.find_spec("pagedcore_pytriton.stub_model")
    assert spec is not None
    assert spec.origin is not None
    stub = Path(spec.origin).read_bytes()

    def files() -> dict[str, bytes]:
        shipped: dict[str, bytes] = original()
        folder = f"file:{model.model_version}"
        shipped[f"{folder}/pytriton_model.py"] = shipped[f"{folder}/model.py"]
        shipped[f"{folder}/model.py"] = stub
        return shipped

    model.get_proxy_model_files = files
