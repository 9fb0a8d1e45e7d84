"""Every way to serve, with an engine without a model behind it: the same cases for all of them.

A *face* is a mount that the cases run against. A new one is a line in FACES: a function that takes
an EngineConfig, a ServerConfig and `build=`, serves until SIGTERM, and returns the exit status.
"""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pagedcore.testing.steered_engine import BUILD_STEERED, START_PIPE, EngineHandle

FACES = {
    "asgi": "pagedcore_openai.serve:serve",
    "litserve": "pagedcore_litserve.serve:serve",
    "pytriton": "pagedcore_pytriton.mount:serve",
}

END = 256
"""The end-of-sequence token of the served model; lower ids are bytes."""

MODEL_LENGTH = 4096
READY_S = 120

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def pytest_configure(config):
    config.addinivalue_line("markers", "hostile(*rows): inputs that must not hurt, by numbers")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("hostile")
    if report.when == "call" and marker is not None:
        report.user_properties.append(("hostile", [report.outcome, *marker.args]))
    return report


def pytest_terminal_summary(terminalreporter):
    tried = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "hostile"
    ]
    if tried:
        withstood = sum(outcome == "passed" for outcome, *_ in tried)
        rows = {row for _, *named in tried for row in named}
        broken = {row for outcome, *named in tried if outcome != "passed" for row in named}
        terminalreporter.write_line(
            f"hostile inputs withstood: {withstood} of {len(tried)}, "
            f"which are {len(rows - broken)} of {len(rows)} rows IN-*"
        )


def write_model(folder, template=TEMPLATE, task="generate"):
    """A model folder without weights: 256 byte tokens, an end-of-sequence token, a template."""
    vocab = {symbol: i for i, symbol in enumerate(byte_symbols())}
    vocab["<end>"] = END
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<end>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"fake_task": task}))


def byte_symbols():
    """The characters that stand for the bytes 0..255 in a byte-level vocabulary, in this order."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    symbols = {byte: chr(byte) for byte in own}
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


@dataclass
class Answer:
    """An HTTP answer; header names are lower-case."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """The error, which has exactly OpenAI's fields (ERR-1)."""
        assert self.headers["content-type"].startswith("application/json")
        assert list(self.json) == ["error"]
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        assert len(error["message"].encode()) <= 2048
        return error

    @property
    def events(self):
        """The data of a stream's events, without the comments."""
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        lines = [block for block in blocks if not block.startswith(":")]
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        return [line.removeprefix("data: ") for line in lines]

    @property
    def chunks(self):
        """The JSON of a stream that ended as it should."""
        *events, end = self.events
        assert end == "[DONE]"
        return [json.loads(event) for event in events]


@dataclass
class Running:
    """A server, the process that it is, and the engine behind it."""

    face: str
    port: int
    engine: EngineHandle
    process: subprocess.Popen
    log: Path
    options: dict = field(default_factory=dict)
    document: dict | None = None
    """What /openapi.json says, once it was asked for."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def request(self, method, path, body=None, headers=None, timeout_s=60):
        """One request on a connection of its own; `body` is bytes, or a value that becomes JSON."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("content-type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            answer = Answer(response.status, fields, response.read())
        if path != "/openapi.json" and method in ("GET", "POST", "DELETE"):
            self.check_declared(method, path.partition("?")[0], answer)
        return answer

    def check_declared(self, method, path, answer):
        """What is answered is what /openapi.json says."""
        if self.document is None:
            keys = self.options.get("api_key", ["none"])
            found = self.get("/openapi.json", authorization=f"Bearer {keys[0]}")
            if found.status == 401:  # its keys are elsewhere
                return
            self.document = found.json
        paths = self.document["paths"]
        known = max((known for known in paths if matches(known, path)), key=len, default=None)
        declared = paths.get(known, {})
        if method.lower() not in declared:
            assert answer.status in ((401, 405) if declared else (401, 404))
            return
        responses = declared[method.lower()]["responses"]
        assert str(answer.status) in responses, f"{method} {path}: {answer.status}"
        kinds = responses[str(answer.status)].get("content", {})
        assert answer.headers.get("content-type", "").partition(";")[0] in (kinds or ("",))

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def complete(self, prompt="abc", *, path="/v1/completions", headers=None, **fields):
        return self.request("POST", path, {"prompt": prompt, **fields}, headers)

    def chat(self, content="abc", *, headers=None, **fields):
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, "max_tokens": 4, **fields}
        return self.request("POST", "/v1/chat/completions", body, headers)

    def connect(self, timeout_s=60):
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def raw(self, data, timeout_s=60):
        """Send bytes, and return what comes until the server closes."""
        with self.connect(timeout_s) as link:
            link.sendall(data)
            return read_all(link)

    def client(self, **options):
        """The official client."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def wait_ready(self):
        """Wait until requests are served, and fail with the log where that never happens."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.get("/readyz").status == 200:
                    return
            self.process_tick()
        raise AssertionError(f"the server is not ready:\n{self.log.read_text()}")

    def wait_listening(self):
        """Wait until the port answers, be it with what it may."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                return self.get("/livez")
            self.process_tick()
        raise AssertionError(f"the server has ended:\n{self.log.read_text()}")

    def finish_start(self):
        """Let the engine of a server with `slow_start` be loaded."""
        (self.log.parent / START_PIPE).write_bytes(b"go")

    def process_tick(self):
        """Give a starting server some time: it has no way to tell us that it listens."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.05)

    def stop(self, number=signal.SIGTERM, timeout_s=60):
        """Signal the server, and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def matches(known, path):
    """Whether a path of the document, such as /v1/models/{name}, is that of a request."""
    return re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(known)), path) is not None


def read_all(link):
    """What a socket gives until its end, be that orderly or not."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := link.recv(1 << 16):
            data += piece
    return data


def free_port():
    """The first of four free ports in a row, below those that outgoing connections take."""
    while True:
        port = random.randrange(12000, 30000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for offset in range(4):
                stack.enter_context(socket.create_server(("127.0.0.1", port + offset)))
            return port


@pytest.fixture(scope="session", params=sorted(FACES))
def face(request):
    return request.param


@pytest.fixture(scope="session")
def start(face, tmp_path_factory):
    """Start a server of one's own: `with start(max_n=2, engine={"max_num_seqs": 1}) as server`."""

    @contextlib.contextmanager
    def starting(
        *,
        folder=None,
        build=BUILD_STEERED,
        engine=None,
        template=TEMPLATE,
        task="generate",
        environment=None,
        wait=True,
        slow_start=False,
        **options,
    ):
        if folder is None:
            folder = tmp_path_factory.mktemp("model")
            write_model(folder, template, task)
        if slow_start:
            os.mkfifo(folder / START_PIPE)
        port = free_port()
        settings = {"model": str(folder), "served_model_name": ["fake", "alias"], **(engine or {})}
        settings.setdefault("max_model_len", MODEL_LENGTH)
        given = {"engine": settings, "server": {"port": port, **options}, "build": build}
        log = folder / "log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "pagedcore.testing.serve_steered"]
            process = subprocess.Popen(
                [*command, FACES[face], json.dumps(given)],
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )
        server = Running(face, port, EngineHandle(folder), process, log, options)
        try:
            if wait:
                server.wait_ready()
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    raise AssertionError(f"did not end:\n{log.read_text()}") from None

    return starting


@pytest.fixture(scope="session")
def shared(start):
    """Servers that tests share, one for each set of options, started when first asked for."""
    with contextlib.ExitStack() as stack:
        running = {}

        def of(**options):
            key = json.dumps(options, sort_keys=True)
            if key not in running:
                running[key] = stack.enter_context(start(**options))
            return running[key]

        of.running = running
        yield of


@pytest.fixture(autouse=True)
def _nothing_left(request, shared):
    """After a test nothing runs any more; after a hostile one a good request is served (EN-1)."""
    yield
    is_hostile = request.node.get_closest_marker("hostile") is not None
    for server in shared.running.values():
        server.engine.release()
        server.engine.wait_for_live(0)
        if is_hostile and "api_key" not in server.options:
            assert server.complete(max_tokens=1).status == 200


@pytest.fixture
def server(shared):
    """With every setting at its default."""
    return shared()


@pytest.fixture
def generous(shared):
    """With everything on that is off by default."""
    return shared(
        stream_interval=3,
        sse_keepalive_interval=0.05,
        enable_force_include_usage=True,
        enable_prompt_tokens_details=True,
        enable_admin_api=True,
        metrics_alias="vllm",
        trust_request_chat_template=True,
        template_timeout=2,
        engine={"scheduling_policy": "priority", "max_num_seqs": 8, "max_model_len": 1 << 20},
    )


@pytest.fixture
def strict(shared):
    """Without patience for unknown fields, and without a chat template."""
    return shared(strict_params=True, template=None)


@pytest.fixture
def locked(shared):
    """With keys."""
    return shared(
        api_key=["first-key", "second-key"],
        allowed_origins=["https://example.org"],
        max_inflight_per_key=2,
    )


@pytest.fixture
def small(shared):
    """With limits that are easily reached."""
    return shared(
        max_request_bytes=4000,
        max_header_bytes=2000,
        max_header_count=20,
        max_body_chunks=20,
        max_json_depth=10,
        max_json_values=50,
        max_n=3,
        max_prompts_per_request=4,
        max_stop_strings=2,
        max_bad_words=2,
        max_logit_bias=2,
        max_logprobs=3,
        http_read_timeout=0.5,
        engine={"max_num_seqs": 1, "max_num_queued_reqs": 8},
    )


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
