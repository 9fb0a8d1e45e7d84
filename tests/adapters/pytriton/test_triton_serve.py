"""`pagedcore serve --server pytriton` as a process: its start, its end, its ends by accident."""

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest

SERVE = """
    import logging, sys
    from pagedcore.config import EngineConfig
    from pagedcore.errors import PagedcoreError
    from pagedcore.server_config import ServerConfig
    from pagedcore.testing.fake_engine import BUILD_FAKE
    from pagedcore_pytriton.mount import serve

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = EngineConfig.from_options(model={model!r}, max_model_len=10**9, **{engine!r})
    try:
        sys.exit(serve(config, ServerConfig(port={port}, **{server!r}), build=BUILD_FAKE))
    except PagedcoreError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(1)
"""


@contextmanager
def serving(folder, port, engine=None, **server):
    code = textwrap.dedent(SERVE).format(
        model=str(folder), port=port, engine=engine or {}, server=server
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_for_line(process, text):
    """Read the log up to a line that has `text`."""
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"the process has ended without {text!r}")


def children_of(pid):
    """Process ids of all descendants."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        direct = [int(child) for child in file.read().split()]
    return direct + [grandchild for child in direct for grandchild in children_of(child)]


def command_of(pid):
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def wait_for_end(pids):
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([fd], [], [], 30)[0], f"{command_of(pid)} lives on"
        os.close(fd)


def open_stream(port, name, max_tokens):
    connection = http.client.HTTPConnection("127.0.0.1", port + 1, timeout=60)
    body = {"text_input": "abc", "stream": True, "max_tokens": max_tokens}
    connection.request("POST", f"/v2/models/{name}/generate_stream", json.dumps(body))
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    return connection, answer


@pytest.mark.parametrize("at_once", [True, False], ids=["abort", "drain"])
def test_sigterm_ends_everything_with_status_0(folder, port, at_once):
    timeout = 0 if at_once else 60
    with serving(folder, port, shutdown_timeout=timeout) as process:
        wait_for_line(process, f"http {port + 1}")
        children = children_of(process.pid)
        assert len(children) >= 3  # the engine, tritonserver, its stub
        num_tokens = 10**9 if at_once else 100_000
        connection, answer = open_stream(port, folder.name, num_tokens)
        process.send_signal(signal.SIGTERM)
        last = json.loads(answer.read().decode().strip().splitlines()[-1].removeprefix("data: "))
        assert ("error" in last) is at_once
        assert (last.get("finish_reason") == "length") is not at_once
        connection.close()
        assert process.wait(60) == 0
        wait_for_end(children)


@pytest.mark.parametrize("victim", ["pagedcore.engine.process", "bin/tritonserver"])
def test_the_death_of_a_child_ends_the_server_with_status_1(folder, port, victim):
    with serving(folder, port) as process:
        wait_for_line(process, f"http {port + 1}")
        children = children_of(process.pid)
        (pid,) = [
            child
            for child in children
            if victim in command_of(child) and "stub" not in command_of(child).split("\0")[0]
        ]
        os.kill(pid, signal.SIGKILL)
        assert "has ended" in wait_for_line(process, "error:")
        assert process.wait(60) == 1
        wait_for_end([child for child in children if child != pid])


def test_an_engine_that_cannot_start_says_so_in_one_line(folder, port):
    with serving(folder, port, engine={"device": "none"}) as process:
        assert "'none' cannot run anything" in wait_for_line(process, "error:")
        assert process.wait(60) == 1


def test_a_port_in_use_is_told_before_a_model_is_loaded(folder, port):
    with (
        socket.create_server(("127.0.0.1", port + 2)),
        serving(folder, port, engine={"device": "none"}) as process,
    ):
        assert f"port {port + 2}: Address already in use" in wait_for_line(process, "error:")
        assert process.wait(60) == 1
