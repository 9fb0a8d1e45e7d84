"""A real tritonserver, with an engine without a model behind it."""

import contextlib
import json
import random
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pagedcore.config import EngineConfig
from pagedcore.engine.server import EngineServer
from pagedcore.server_config import ServerConfig
from pagedcore.testing.fake_engine import FakeEngine
from pagedcore_openai.counters import Counters
from pagedcore_pytriton.environment import prepare_environment, temporary_workspace
from pagedcore_pytriton.model import TritonModel
from pagedcore_pytriton.tritonserver import Ports, TritonServer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(path)
    return path


@pytest.fixture(scope="session")
def write_model():
    return make_model


def make_model(path):
    """A model folder without weights: 256 byte tokens, and an end-of-sequence token."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["<end>"] = 256
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    config = {"eos_token": "<end>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text("{}")


@pytest.fixture(scope="session", name="free_port")
def _free_port():
    return free_port


def free_port():
    """The first of four free ports in a row, below those that outgoing connections take."""
    while True:
        port = random.randrange(12000, 30000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for offset in range(4):
                stack.enter_context(socket.create_server(("127.0.0.1", port + offset)))
            return port


@dataclass
class Mounted:
    """A running tritonserver, and what stands behind it."""

    engine: FakeEngine
    completions: Any
    http: str
    grpc: str
    metrics: str


@pytest.fixture(scope="session")
def mount(folder, tmp_path_factory):
    """Start tritonservers: `with mount(api_key=("key",)) as mounted`."""
    prepare_environment()

    @contextmanager
    def start(**options):
        server = ServerConfig(port=free_port(), **options)
        ports = Ports.after(server.port)
        engine = FakeEngine(model=str(folder), max_model_len=1 << 20)
        sockets = tmp_path_factory.mktemp("s")
        sockets.chmod(0o700)
        with (
            serving(engine, str(sockets / "s")) as address,
            temporary_workspace() as workspace,
            TritonServer(workspace, server, ports) as triton,
            TritonModel(triton.triton, "fake", address, server, Counters()) as model,
        ):
            model.begin(EngineConfig(), engine.info)
            model.bind()
            doors = (ports.http, ports.grpc, ports.metrics)
            yield Mounted(engine, model.completions, *(f"127.0.0.1:{port}" for port in doors))

    return start


@contextmanager
def serving(engine, address):
    server = EngineServer(engine, address)
    server.listen()
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield address
    finally:
        engine.release()
        server.stop()
        thread.join()


@pytest.fixture(scope="module")
def mounted(mount):
    with mount() as running:
        yield running
