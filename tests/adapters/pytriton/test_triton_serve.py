"""`pagedcore serve --server pytriton` as a process: its doors, its start and its ends."""

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from pagedcore.testing.steered_engine import EngineHandle

SERVE = """
    import json, logging, sys
    from pagedcore.config import EngineConfig
    from pagedcore.errors import PagedcoreError
    from pagedcore.server_config import ServerConfig
    from pagedcore.testing.steered_engine import BUILD_STEERED
    from pagedcore_pytriton.mount import serve

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = json.loads(sys.argv[1])
    config = EngineConfig.from_options(**given["engine"])
    try:
        sys.exit(serve(config, ServerConfig(**given["server"]), build=BUILD_STEERED))
    except PagedcoreError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(1)
"""

# A program's own Triton, with a model of its own beside ours.
PROGRAM = """
    import json, sys
    import numpy as np
    from pagedcore import EngineConfig
    from pagedcore.testing.steered_engine import BUILD_STEERED
    from pagedcore_pytriton import bind_paged_model, prepare_environment
    from pytriton.decorators import batch
    from pytriton.model_config import ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    @batch
    def square(numbers):
        return {"squares": numbers**2}

    given = json.loads(sys.argv[1])
    port = given["server"]["port"]
    config = TritonConfig(
        http_address="127.0.0.1", http_port=port + 1, grpc_port=port + 2,
        grpc_address="127.0.0.1", metrics_address="127.0.0.1", metrics_port=port + 3,
        allow_gpu_metrics=False, exit_timeout_secs=3,
    )
    engine = EngineConfig.from_options(**given["engine"])
    prepare_environment()
    triton = Triton(config=config)
    triton.bind(
        model_name="square", infer_func=square, config=ModelConfig(max_batch_size=4),
        inputs=[Tensor(name="numbers", dtype=np.float32, shape=(1,))],
        outputs=[Tensor(name="squares", dtype=np.float32, shape=(1,))],
    )
    with triton, bind_paged_model(triton, "llm", engine, build=BUILD_STEERED) as model:
        model.wait_ready(60)
        print("ready", file=sys.stderr, flush=True)
        triton.serve()
"""

READY_S = 60


@dataclass
class Program:
    """A process that serves, and the engine behind it."""

    process: subprocess.Popen
    port: int
    name: str
    engine: EngineHandle
    log_file: Path
    key: str | None = None

    @property
    def log(self):
        return self.log_file.read_text()

    def wait_for_log(self, text):
        """Wait until the log has a text; returns its line."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            found = re.search(f".*{re.escape(text)}.*", self.log)
            if found:
                return found[0]
            if ended:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        raise AssertionError(f"the log never says {text!r}:\n{self.log}")

    def open(self, method, path, body=None, *, port=None):
        """A connection and the answer's head; Triton's HTTP by default."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port + 1, timeout=60)
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        connection.request(method, path, body and json.dumps(body), headers)
        return connection, connection.getresponse()

    def request(self, method, path, body=None, *, port=None):
        """Status and body of an answer."""
        connection, answer = self.open(method, path, body, port=port)
        with contextlib.closing(connection):
            return answer.status, answer.read().decode()

    def surface(self, path):
        """The status of the OpenAI surface's answer."""
        return self.request("GET", path, port=self.port)[0]

    def ask_triton(self, **fields):
        """A connection on which a stream was asked for; Triton answers with its first text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port + 1, timeout=60)
        keys = {"api_key": self.key} if self.key else {}
        body = {"text_input": "abc", "stream": True, **keys, **fields}
        path = f"/v2/models/{self.name}/generate_stream"
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        return connection

    def triton_stream(self, **fields):
        connection = self.ask_triton(**fields)
        return connection, connection.getresponse()

    def openai_stream(self, **fields):
        body = {"prompt": "abc", "stream": True, **fields}
        return self.open("POST", "/v1/completions", body, port=self.port)

    def grpc_stream(self, answers, **params):
        """Append what comes over gRPC to a list; returns the client."""
        client = triton_grpc.InferenceServerClient(f"127.0.0.1:{self.port + 2}")
        headers = {"authorization": f"Bearer {self.key}"} if self.key else None
        client.start_stream(lambda result, error: answers.append(error or result), headers=headers)
        inputs = {
            "text_input": np.array([b"abc"], object),
            "stream": np.array([True]),
            "sampling_parameters": np.array([json.dumps(params).encode()], object),
        }
        tensors = []
        for name, array in inputs.items():
            kind = "BOOL" if array.dtype == bool else "BYTES"
            tensors.append(triton_grpc.InferInput(name, array.shape, kind))
            tensors[-1].set_data_from_numpy(array)
        client.async_stream_infer(self.name, tensors)
        return client

    def children(self):
        """Its descendants' ids and command lines, but the resource tracker's."""
        return {pid: command_of(pid) for pid in descendants(self.process.pid)}

    def child(self, part):
        """The one child whose program has this in its name."""
        (pid,) = [pid for pid, words in self.children().items() if part in words.split("\0")[0]]
        return pid


def command_of(pid):
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def descendants(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        direct = [int(child) for child in file.read().split()]
    return direct + [grandchild for child in direct for grandchild in descendants(child)]


def wait_for_end(pids):
    """Wait until processes have ended that are not our children."""
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([fd], [], [], 30)[0], f"{command_of(pid)} lives on"
        os.close(fd)


@pytest.fixture(scope="module")
def launch(write_model, free_port, tmp_path_factory):
    """Start a program: `with launch(shutdown_timeout=9) as program`."""

    @contextlib.contextmanager
    def starting(code=SERVE, *, engine=None, environment=None, port=None, **server):
        scratch = tmp_path_factory.mktemp("p")
        folder = scratch / "fake"
        folder.mkdir()
        write_model(folder)
        port = port or free_port()
        settings = {"model": str(folder), "max_model_len": 10**9, **(engine or {})}
        given = {"engine": settings, "server": {"port": port, **server}}
        log_file = scratch / "log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(code), json.dumps(given)],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTRITON_HOME": str(scratch / "h"),
                    **(environment or {}),
                },
            )
        try:
            yield Program(process, port, "fake", EngineHandle(folder), log_file)
        finally:
            children = descendants(process.pid) if process.poll() is None else []
            process.kill()
            process.wait()
            wait_for_end(children)

    return starting


@pytest.fixture(scope="module")
def served(launch):
    """One server that asks for a key which only its environment has, for the module's tests."""
    environment = {"PAGEDCORE_API_KEY": "hush-hush"}
    with launch(environment=environment, engine={"max_num_seqs": 2}) as program:
        program.key = "hush-hush"
        program.wait_for_log(f"http {program.port + 1}")
        yield program


def test_all_doors_share_one_batch(served):
    served.engine.pause()
    over_grpc = []
    client = served.grpc_stream(over_grpc, max_tokens=4)
    served.engine.wait_for_live(1)
    triton = served.ask_triton(max_tokens=4)
    openai, answer = served.openai_stream(max_tokens=4)
    with contextlib.closing(triton), contextlib.closing(openai):
        served.engine.wait_for_live(3)
        served.engine.release()
        assert "data: [DONE]" in answer.read().decode()
        lines = [line for line in triton.getresponse().read().decode().splitlines() if line]
        parts = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert "".join(part["text_output"] for part in parts) == "abca"
    client.stop_stream()
    client.close()
    assert b"".join(r.as_numpy("text_output")[0] for r in over_grpc) == b"abca"


def test_a_request_that_waits_holds_no_other_up(served):  # D13
    served.engine.pause()
    with contextlib.ExitStack() as stack:
        for _ in range(2):  # which fill the batch
            stack.enter_context(contextlib.closing(served.openai_stream(max_tokens=1000)[0]))
        served.engine.wait_for_live(2)
        stack.enter_context(contextlib.closing(served.ask_triton(max_tokens=3)))
        served.engine.wait_for_live(3)
        status, text = served.request("POST", "/v2/models/fake/generate", {"text_input": "abc"})
        assert (status, "API key" in text) == (400, True)  # answered while the other waits
    served.engine.release()  # Triton notices only at the first text that a client over HTTP is gone
    served.engine.wait_for_live(0)


def test_our_metrics_stand_on_tritons_port(served):  # D12
    status, _ = served.request(
        "POST", "/v2/models/fake/generate", {"text_input": "abc", "api_key": served.key}
    )
    assert status == 200
    connection, _ = served.triton_stream(max_tokens=10**8)
    served.engine.wait_for_live(1)
    connection.close()
    served.engine.wait_for_live(0)

    def metric(page, name, **labels):
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in page.splitlines():
            if line.startswith(f"{name}{{") and all(label in line for label in wanted):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    series = "pagedcore:request_success_total"
    page = ""
    bucket = "pagedcore:time_to_first_token_seconds_bucket"
    running = "pagedcore:num_requests_running"
    while (  # the page is pushed from time to time
        not metric(page, series, finished_reason="abort")
        or not metric(page, bucket, le="+Inf")
        or metric(page, running)
    ):
        page = served.request("GET", "/metrics", port=served.port + 3)[1]
    assert f"\n{running}{{" in page
    assert metric(page, series, finished_reason="length", engine="0")
    # A guard: Triton takes the request that was cancelled for a success.
    success = metric(page, "nv_inference_request_success", model="fake")
    assert success >= 2
    assert metric(page, "nv_inference_request_failure", model="fake", reason="CANCELED") == 0


def test_a_stopped_engine_is_seen_by_the_surfaces_health_alone(served):  # D10
    pid = served.engine.state()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        while served.surface("/readyz") != 503:
            pass
        assert served.surface("/livez") == 503
        assert served.request("GET", "/v2/models/fake/ready")[0] == 200  # a guard
        body = {"text_input": "abc", "api_key": served.key}
        status, text = served.request("POST", "/v2/models/fake/generate", body)
        assert status >= 400
        assert "does not answer" in text
    finally:
        os.kill(pid, signal.SIGCONT)
    while served.surface("/readyz") != 200:
        pass
    served.engine.wait_for_live(0)


def test_no_key_is_where_others_can_read_it(served):  # D11
    assert served.request("POST", "/v2/models/fake/generate", {"text_input": "abc"})[0] == 400
    key = b"hush-hush"
    assert len(served.children()) >= 3
    for pid in served.children():
        assert key not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert key not in Path(f"/proc/{pid}/environ").read_bytes()
    assert key.decode() not in served.log


@pytest.mark.parametrize("at_once", [True, False], ids=["abort", "drain"])
def test_sigterm_ends_everything_with_status_0(launch, at_once):  # D6, D7
    with launch(shutdown_timeout=0 if at_once else 60) as program:
        program.wait_for_log(f"http {program.port + 1}")
        children = program.children()
        assert len(children) >= 3  # the engine, tritonserver, its stub
        idle = [socket.create_connection(("127.0.0.1", program.port + 1)) for _ in range(10)]
        for link in idle:
            link.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert link.recv(1000).startswith(b"HTTP/1.1 200")
        program.engine.pause()
        over_grpc = []
        client = program.grpc_stream(over_grpc, max_tokens=4)
        program.engine.wait_for_live(1)
        openai, second = program.openai_stream(max_tokens=4)
        connection = program.ask_triton(max_tokens=4)
        program.engine.wait_for_live(3)
        program.process.send_signal(signal.SIGTERM)
        if not at_once:
            while program.surface("/readyz") != 503:
                pass
            body = {"text_input": "abc"}
            status, text = program.request("POST", "/v2/models/fake/generate", body)
            assert (status >= 400, "shutting down" in text) == (True, True)
            program.engine.release()
        last = json.loads(connection.getresponse().read().decode().split("data: ")[-1])
        assert ("error" in last) is at_once
        *_, final, end = second.read().decode().strip().split("data: ")
        reason = json.loads(final)["choices"][0]["finish_reason"]
        assert (reason, end) == ("abort" if at_once else "length", "[DONE]")
        for link in (openai, connection):
            link.close()
        client.stop_stream()
        client.close()
        assert len(over_grpc) >= 1
        assert program.process.wait(60) == 0
        wait_for_end(children)
        for link in idle:
            link.close()
        assert not list(Path("/dev/shm").glob(f"pytrtion{program.process.pid}-*"))
        assert "Traceback" not in program.log


@pytest.mark.parametrize("victim", ["bin/python", "bin/tritonserver", "triton_python_backend_stub"])
def test_the_death_of_a_child_ends_the_server_with_status_1(launch, victim):  # D5, D9
    with launch() as program:
        program.wait_for_log(f"http {program.port + 1}")
        children = program.children()
        pid = program.child(victim)
        connection, answer = program.triton_stream(max_tokens=10**9)
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
            answer.read()  # which ends
        connection.close()
        assert "has ended" in program.wait_for_log("error:")
        assert program.process.wait(60) == 1
        wait_for_end(children)


def test_what_a_killed_server_leaves_is_gone_after_the_next(launch, tmp_path_factory):  # T15
    home = tmp_path_factory.mktemp("h")
    environment = {"PYTRITON_HOME": str(home)}
    with launch(environment=environment) as program:
        program.wait_for_log(f"http {program.port + 1}")
        children = program.children()
        program.process.kill()
        program.process.wait()
        wait_for_end(children)
        assert [path.name.split("-")[1] for path in home.iterdir()] == [str(program.process.pid)]
        assert not list(Path("/dev/shm").glob(f"pytrtion{program.process.pid}-*"))
    with launch(environment=environment, engine={"device": "none"}) as program:
        assert program.process.wait(60) == 1
        assert list(home.iterdir()) == []


def test_an_engine_that_cannot_start_says_so_in_one_line(launch):
    with launch(engine={"device": "none"}) as program:
        assert "'none' cannot run anything" in program.wait_for_log("error:")
        assert program.process.wait(60) == 1
        assert "Traceback" not in program.log


def test_a_port_in_use_is_told_before_a_model_is_loaded(launch, free_port):
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", port + 2)),
        launch(port=port, engine={"device": "none"}) as program,
    ):
        assert f"port {port + 2}: Address already in use" in program.wait_for_log("error:")
        assert program.process.wait(60) == 1


def test_a_program_binds_a_model_to_its_own_triton(launch):
    with launch(PROGRAM) as program:
        program.name = "llm"
        program.wait_for_log("ready")
        body = {"text_input": "abc", "max_tokens": 4, "exclude_input_in_output": True}
        status, text = program.request("POST", "/v2/models/llm/generate", body)
        assert (status, json.loads(text)["text_output"]) == (200, "abca")
        connection, _ = program.triton_stream(max_tokens=10**8)
        program.engine.wait_for_live(1)
        connection.close()
        program.engine.wait_for_live(0)
        seven = {"name": "numbers", "shape": [1, 1], "datatype": "FP32", "data": [7]}
        status, text = program.request("POST", "/v2/models/square/infer", {"inputs": [seven]})
        assert status == 200, text
        assert json.loads(text)["outputs"][0]["data"] == [49]
        while "pagedcore:" not in program.request("GET", "/metrics", port=program.port + 3)[1]:
            pass
        children = program.children()
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(60) == 0
        wait_for_end(children)
