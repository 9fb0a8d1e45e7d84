"""Real LitServe servers, as processes, with an engine without a model behind them."""

import contextlib
import http.client
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pagedcore.testing.steered_engine import EngineHandle

READY_S = 60

SERVE = """
    import json, logging, sys
    from pagedcore.config import EngineConfig
    from pagedcore.errors import PagedcoreError
    from pagedcore.server_config import ServerConfig
    from pagedcore_litserve.serve import serve

    if __name__ == "__main__":
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        given = json.loads(sys.argv[1])
        config = EngineConfig.from_options(**given["engine"])
        try:
            sys.exit(serve(config, ServerConfig(**given["server"]), build=given["build"]))
        except PagedcoreError as error:
            print("error:", error, file=sys.stderr)
            sys.exit(1)
"""

BUILDERS = """
    import os, sys
    from pathlib import Path
    from pagedcore.testing.steered_engine import build_steered_engine

    def slow(config, *, usage):
        \"\"\"Loads until the test opens the other end of a pipe.\"\"\"
        with open(Path(config.model.model) / "load", "rb") as pipe:
            pipe.read()
        return build_steered_engine(config, usage=usage)

    def dying(config, *, usage):
        gate = Path(config.model.model) / "load"
        if gate.exists():  # until the test opens it
            gate.open().close()
        with open(Path(config.model.model) / "starts", "a") as starts:
            starts.write("x")
        os._exit(3)
"""

STEERED = "pagedcore.testing.steered_engine:build_steered_engine"


@dataclass
class Program:
    """A process, what it says, and the engine behind it."""

    process: subprocess.Popen
    port: int
    folder: Path
    scratch: Path

    @property
    def engine(self):
        return EngineHandle(self.folder)

    @property
    def log(self):
        return (self.scratch / "log").read_text()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def open(self, method, path, body=None, headers=None):
        """A connection, and the answer's head."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"content-type": "application/json", **(headers or {})}
        connection.request(method, path, body and json.dumps(body), headers)
        return connection, connection.getresponse()

    def request(self, method, path, body=None, headers=None):
        """Status, headers and body of an answer."""
        connection, answer = self.open(method, path, body, headers)
        with contextlib.closing(connection):
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def get(self, path):
        return self.request("GET", path)[0]

    def complete(self, path="/v1/completions", **fields):
        status, _, body = self.request("POST", path, {"prompt": "abc", **fields})
        return status, json.loads(body)

    def stream(self, path="/v1/completions", **fields):
        """A stream that has begun: its connection and answer."""
        connection, answer = self.open("POST", path, {"prompt": "abc", "stream": True, **fields})
        assert answer.status == 200
        return connection, answer

    def wait_for(self, status, path="/readyz"):
        """Wait until a path answers with a status; the log is the reason where it never does."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.get(path) == status:
                    return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        raise AssertionError(f"{path} is never {status}:\n{self.log}")

    def tree(self):
        """Its descendants."""
        return descendants(self.process.pid)

    def worker(self):
        """The process that the engine lives in."""
        return self.engine.state()["pid"]

    @staticmethod
    def wait_for_end(pids):
        """Wait until processes have ended that are not our children."""
        for pid in pids:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            assert select.select([fd], [], [], 30)[0], f"{pid} lives on"
            os.close(fd)

    def port_is_free(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0

    def stop(self, number=signal.SIGTERM):
        """Signal it, and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)


def descendants(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        direct = [int(child) for child in file.read().split()]
    return direct + [grandchild for child in direct for grandchild in descendants(child)]


def free_port():
    """A free port below those that outgoing connections take."""
    while True:
        port = random.randrange(12000, 30000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def write_model(folder):
    """A model folder without weights: 256 byte tokens, and an end-of-sequence token."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["<end>"] = 256
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<end>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")


@pytest.fixture(scope="session", name="write_model")
def _write_model():
    return write_model


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Start a program that serves: `with launch(code, argument) as program`.

    Everything that it leaves in the folder for temporary files is an error.
    """

    @contextlib.contextmanager
    def starting(code=SERVE, *, engine=None, build=STEERED, port=None, prepare=None, **server):
        scratch = tmp_path_factory.mktemp("p")
        folder = scratch / "model"
        folder.mkdir()
        write_model(folder)
        if prepare is not None:
            prepare(folder)
        (scratch / "tmp").mkdir()
        (scratch / "builders.py").write_text(textwrap.dedent(BUILDERS))
        program = scratch / "program.py"
        program.write_text(textwrap.dedent(code))
        port = port or free_port()
        settings = {"model": str(folder), "max_model_len": 10**9, **(engine or {})}
        given = {"engine": settings, "server": {"port": port, **server}, "build": build}
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(scratch),
            "TMPDIR": str(scratch / "tmp"),
        }
        with (scratch / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(program), json.dumps(given)],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=scratch,
            )
        running = Program(process, port, folder, scratch)
        try:
            yield running
            if process.poll() is None:
                process.terminate()
                process.wait(60)
            assert [path.name for path in (scratch / "tmp").iterdir()] == []
        finally:
            if process.poll() is None:
                children = running.tree()
                process.kill()
                process.wait()
                running.wait_for_end(children)

    return starting


@pytest.fixture(scope="module")
def served(launch):
    """One server with two API servers, for the tests of a module."""
    with launch(num_api_servers=2) as program:
        program.wait_for(200)
        yield program


@pytest.fixture(autouse=True)
def _nothing_runs_on(request):
    """Tests leave a shared server idle."""
    yield
    if "served" in request.fixturenames:
        engine = request.getfixturevalue("served").engine
        engine.release()
        engine.wait_for_live(0)
