"""A server whose front ends share a port is ready when all of them are."""

import asyncio
import threading
from contextlib import contextmanager

from starlette.testclient import TestClient
from tokenizers import Tokenizer, models

from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.engine.server import EngineServer
from pagedcore.testing.fake_engine import FakeEngine
from pagedcore_openai.app import build_app
from pagedcore_openai.counters import OPEN, Counters


@contextmanager
def serving(engine, address):
    server = EngineServer(engine, address)
    server.listen()
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        thread.join()


def test_a_port_that_front_ends_share_is_ready_when_each_of_them_is(tmp_path):  # LIFE-1
    Tokenizer(models.BPE({"a": 0, "<end>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (tmp_path / "config.json").write_text("{}")
    counters = Counters(2)
    tmp_path.chmod(0o700)
    address = str(tmp_path / "s")
    with serving(FakeEngine(model=str(tmp_path), vocab_size=2), address):
        app = build_app(EngineClient(address), EngineConfig(), counters=counters, slot=0)
        with TestClient(app) as client:
            client.portal.call(lambda: asyncio.wait_for(app.state.surface.loaded(), 60))
            assert client.get("/readyz").status_code == 503
            assert client.get("/health").status_code == 200
            asked = {"prompt": "a", "max_tokens": 1}
            assert client.post("/v1/completions", json=asked).status_code == 200
            counters.slot(1).add(OPEN)
            assert client.get("/readyz").status_code == 200
