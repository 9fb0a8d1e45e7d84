"""A real tritonserver, with an engine without a model behind it."""

import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pagedcore.engine.server import EngineServer
from pagedcore.server_config import ServerConfig
from pagedcore.testing.fake_engine import FakeEngine
from pagedcore.text.inputs import InputProcessor
from pagedcore.text.tokenizer import Tokenizer as OurTokenizer
from pagedcore_pytriton.cancellation import Cancellations
from pagedcore_pytriton.completions import Completions
from pagedcore_pytriton.tritonserver import (
    Ports,
    TritonServer,
    prepare_environment,
    temporary_workspace,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder without weights: 256 byte tokens, and an end-of-sequence token."""
    path = tmp_path_factory.mktemp("model")
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
    return path


@pytest.fixture
def port():
    return free_port()


def free_port():
    """The first of four free ports in a row."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port > 65000:
            continue
        try:
            for offset in range(4):
                with socket.create_server(("127.0.0.1", port + offset)):
                    pass
        except OSError:
            continue
        return port


@dataclass
class Mounted:
    """A running tritonserver, and what stands behind it."""

    engine: FakeEngine
    completions: Any
    http: str
    grpc: str


@pytest.fixture(scope="session")
def mount(folder, tmp_path_factory):
    """Start tritonservers: `with mount(api_key=("key",)) as mounted`."""
    prepare_environment()

    @contextmanager
    def start(**options):
        server = ServerConfig(port=free_port(), **options)
        ports = Ports.after(server.port)
        engine = FakeEngine(model=str(folder), max_model_len=1 << 20)
        inputs = InputProcessor.from_folder(
            folder, OurTokenizer.from_folder(folder), max_model_len=1 << 20, vocab_size=512
        )
        sockets = tmp_path_factory.mktemp("s")
        sockets.chmod(0o700)
        with (
            serving(engine, str(sockets / "s")) as address,
            temporary_workspace() as workspace,
        ):
            triton = TritonServer(workspace, server, ports)
            with Cancellations(workspace) as cancellations:
                completions = Completions(address, inputs, server, cancellations)
                triton.bind("fake", completions)
                with triton:
                    http, grpc = (f"127.0.0.1:{port}" for port in (ports.http, ports.grpc))
                    yield Mounted(engine, completions, http, grpc)
                    completions.abort()

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
