"""How a server on LitServe starts, goes on without its worker, and ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess

import pytest

from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig
from pagedcore_litserve.serve import serve


def open_streams(program, stack, count, **fields):
    """Answers of streams that have begun, while the engine pauses."""
    program.engine.pause()
    answers = []
    for _ in range(count):
        connection, answer = program.stream(**fields)
        stack.enter_context(contextlib.closing(connection))
        answers.append(answer)
    program.engine.wait_for_live(count)
    return answers


def rest(answer):
    """The data of the events that are still to come."""
    lines = answer.read().decode().splitlines()
    return [line.removeprefix("data: ") for line in lines if line]


def load(program):
    """Let an engine that loads go on."""
    with open(program.folder / "load", "wb"):
        pass


def test_the_port_answers_while_a_model_loads_and_while_it_loads_again(launch):  # D29, D21
    with launch(
        build="builders:slow", prepare=lambda folder: os.mkfifo(folder / "load")
    ) as program:
        program.wait_for(200, "/livez")
        status, headers, body = program.request("POST", "/v1/completions", {"prompt": "abc"})
        assert (status, json.loads(body)["error"]["code"]) == (503, 503)
        assert int(headers["retry-after"]) > 0
        assert program.get("/readyz") == 503
        load(program)
        program.wait_for(200)

        with contextlib.ExitStack() as stack:
            answers = open_streams(program, stack, 8, max_tokens=1000)
            os.kill(program.worker(), signal.SIGKILL)
            for answer in answers:  # D21: none is left in silence
                *_, error, end = rest(answer)
                assert end == "[DONE]"
                assert json.loads(error)["error"]["code"] >= 500
        assert program.get("/readyz") == 503
        assert program.complete(max_tokens=1)[0] == 503
        load(program)
        program.wait_for(200)
        assert program.complete(max_tokens=3)[1]["choices"][0]["text"] == "abc"
        assert "Traceback" not in program.log


def test_sigterm_lets_streams_end_and_refuses_new_ones(launch):  # D23
    with launch(num_api_servers=2, shutdown_timeout=60) as program:
        program.wait_for(200)
        with contextlib.ExitStack() as stack:
            answers = open_streams(program, stack, 16, max_tokens=50)
            children = program.tree()
            program.process.send_signal(signal.SIGTERM)
            program.wait_for(503)  # the port stays open
            while program.get("/readyz") != 503:  # at the other API server, too
                pass
            status, headers, _ = program.request("POST", "/v1/completions", {"prompt": "abc"})
            assert status == 503
            assert "retry-after" in headers
            program.engine.release()
            for answer in answers:
                *_, last, end = rest(answer)
                assert json.loads(last)["choices"][0]["finish_reason"] == "length"
                assert end == "[DONE]"
        assert program.process.wait(60) == 0
        program.wait_for_end(children)
        assert "Traceback" not in program.log  # S10
        assert program.port_is_free()


@pytest.mark.parametrize("how", ["no-time", "second-signal", "ctrl-c"])
def test_without_time_to_drain_streams_are_aborted(launch, how):  # D23, LIFE-4
    number = signal.SIGINT if how == "ctrl-c" else signal.SIGTERM
    timeout = 60 if how == "second-signal" else 0
    with launch(shutdown_timeout=timeout) as program:
        program.wait_for(200)
        with contextlib.ExitStack() as stack:
            (answer,) = open_streams(program, stack, 1, max_tokens=1000)
            children = program.tree()
            if how == "ctrl-c":  # a terminal signals all of them
                for pid in children:
                    os.kill(pid, number)
            program.process.send_signal(number)
            if how == "second-signal":
                program.wait_for(503)
                program.process.send_signal(number)
            *_, last, end = rest(answer)
            assert json.loads(last)["choices"][0]["finish_reason"] == "abort"
            assert end == "[DONE]"
        assert program.process.wait(60) == 0
        program.wait_for_end(children)
        assert "Traceback" not in program.log
        assert program.port_is_free()


def test_a_server_can_be_stopped_while_its_model_loads(launch):
    with launch(
        build="builders:slow", prepare=lambda folder: os.mkfifo(folder / "load")
    ) as program:
        program.wait_for(200, "/livez")
        children = program.tree()
        assert program.stop() == 0
        program.wait_for_end(children)


def test_a_killed_main_process_leaves_nothing(launch):
    with launch() as program:
        program.wait_for(200)
        children = program.tree()
        program.process.kill()
        program.process.wait()
        program.wait_for_end(children)
        assert program.port_is_free()


def test_a_main_process_that_is_killed_at_its_start_leaves_nothing(launch):
    with launch() as program:
        children = program.tree()
        while len(children) < 3:  # LitServe's Manager, the resource tracker, the worker
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(0.01)
            children = program.tree()
        program.process.kill()
        program.process.wait()
        program.wait_for_end(children)


def test_the_end_of_an_api_server_ends_the_server_with_status_1(launch):
    with launch(num_api_servers=2) as program:
        program.wait_for(200)
        children = program.tree()
        os.kill(children[-1], signal.SIGKILL)  # the last to be started
        assert program.process.wait(60) == 1
        program.wait_for_end(children)
        assert "error: an API server has ended unexpectedly" in program.log


def test_an_engine_that_dies_at_its_start_is_not_started_for_ever(launch):  # D22
    with launch(
        build="builders:dying", prepare=lambda folder: os.mkfifo(folder / "load")
    ) as program:
        program.wait_for(200, "/livez")  # a worker that dies before is not started again at all
        with open(program.folder / "load", "w"):
            os.unlink(program.folder / "load")
        assert program.process.wait(120) == 1
        assert "workers have ended 4 times" in program.log
        starts = (program.folder / "starts").read_text()
        assert starts in ("xxxx", "xxxxx")  # LitServe may be starting one while it is stopped


def test_an_engine_that_cannot_start_says_so_in_one_line(launch):
    with launch(engine={"device": "none"}) as program:
        assert program.process.wait(60) == 1
        assert "error: the device 'none' cannot run anything" in program.log
        assert "Traceback" not in program.log


def test_a_port_in_use_is_one_line_before_a_model_is_loaded(launch):
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        launch(port=other.getsockname()[1], build="builders:dying") as program,
    ):
        assert program.process.wait(60) == 1
        assert "error: cannot listen on 127.0.0.1 port" in program.log
        assert not (program.folder / "starts").exists()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ({"host": "localhost"}, "not on 'localhost'"),
        ({"host": "192.0.2.1"}, "127.0.0.1, 0.0.0.0, ::"),
        ({"port": 80}, "1024 to 65535, not on 80"),
        ({"port": 0}, "not on 0"),
    ],
)
def test_an_address_that_litserve_cannot_take_is_refused_with_a_remedy(address, says):
    with pytest.raises(ConfigError, match=says) as caught:
        serve(EngineConfig(), ServerConfig(**address))
    assert "--server asgi" in str(caught.value)
