"""Tracing disturbs nothing: not a process that traces, and not where its receiver is down.

What spans say is in tests/surface/test_traces.py.
"""

import asyncio
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from opentelemetry import trace
from starlette.testclient import TestClient
from tokenizers import Tokenizer, models

from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.engine.server import EngineServer
from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig
from pagedcore.testing.fake_engine import FakeEngine
from pagedcore_openai import tracing
from pagedcore_openai.app import build_app

URL = "http://localhost:4318/v1/traces"


@contextmanager
def served(folder, server):
    """A client of an application over an engine in a thread."""
    Tokenizer(models.BPE({"a": 0, "<end>": 1}, [])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (folder / "config.json").write_text("{}")
    folder.chmod(0o700)
    engine = EngineServer(FakeEngine(model=str(folder), vocab_size=2), str(folder / "s"))
    engine.listen()
    thread = threading.Thread(target=engine.serve)
    thread.start()
    try:
        app = build_app(EngineClient(engine.address), EngineConfig(), server)
        with TestClient(app) as client:
            client.portal.call(lambda: asyncio.wait_for(app.state.surface.loaded(), 60))
            yield client
    finally:
        engine.stop()
        thread.join()


@contextmanager
def a_silent_receiver():
    """The address of something that accepts a connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def no_receiver():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    yield address


@pytest.fixture
def nothing_is_left():
    """No thread goes on to log in the tests that follow."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith(("OtelBatch", "pagedcore-traces")):
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("receiver", [a_silent_receiver, no_receiver])
def test_a_receiver_that_does_not_take_spans_delays_nothing(
    tmp_path, monkeypatch, caplog, receiver
):  # LIFE-6
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    asked = {"prompt": "a", "max_tokens": 1}
    with receiver() as address, served(tmp_path, ServerConfig(otlp_traces_endpoint=address)) as web:
        for _ in range(20):  # more than the queue holds
            assert web.post("/v1/completions", json=asked).status_code == 200
    if receiver is a_silent_receiver:
        assert "they are lost" in caplog.text


def test_the_tracing_of_the_process_stays_as_it_is(tmp_path):
    before = trace.get_tracer_provider()
    with no_receiver() as address:
        app = build_app(
            EngineClient(str(tmp_path / "s")),
            EngineConfig(),
            ServerConfig(otlp_traces_endpoint=address),
        )
        assert app.state.surface.ready is False
        found = tracing.Tracing(address)
        found.start()
        asyncio.run(found.close())
    assert trace.get_tracer_provider() is before


def test_without_an_address_no_tracing_library_is_imported():
    program = (
        "import sys; from pagedcore.config import EngineConfig;"
        "from pagedcore.engine.client import EngineClient;"
        "from pagedcore_openai.app import build_app;"
        "build_app(EngineClient('s'), EngineConfig());"
        "wanted = 'opentelemetry.sdk', 'opentelemetry.exporter', 'google.protobuf';"
        "print([name for name in sys.modules if name.startswith(wanted)])"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["opentelemetry.sdk", "opentelemetry.exporter"])
def test_an_address_without_the_library_stops_the_start_with_the_command(monkeypatch, module):
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'pagedcore\[tracing\]'"):
        ServerConfig(otlp_traces_endpoint=URL)


@pytest.mark.parametrize(
    "address",
    ["", "localhost:4318", "grpc://localhost:4317", "http://", "http://x:99999", "http://["],
)
def test_what_is_no_address_of_a_receiver_stops_the_start(address):
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be the http or https"):
        ServerConfig(otlp_traces_endpoint=address)


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_TRACES_HEADERS") as caught:
        ServerConfig(otlp_traces_endpoint="http://me:s3cret@localhost:4318")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://localhost:4318", URL),
        ("http://localhost:4318/", URL),
        (URL, URL),
        ("https://x/otlp", "https://x/otlp"),
    ],
)
def test_an_address_without_a_path_gets_that_of_receivers(given, used):
    assert tracing.with_path(given) == used
