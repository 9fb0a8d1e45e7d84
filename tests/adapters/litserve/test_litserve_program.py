"""A program's own LitServer: models beside other LitAPIs, callbacks, loggers, replicas."""

import json
import os
import pickle
import signal
from pathlib import Path

import litserve as ls
import pytest
from litserve.loops.continuous_batching_loop import ContinuousBatchingLoop
from litserve.loops.streaming_loops import StreamingLoop
from litserve.utils import wrap_litserve_start
from starlette.testclient import TestClient

from pagedcore.config import EngineConfig
from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig
from pagedcore.testing.fake_engine import BUILD_FAKE
from pagedcore_litserve import PagedLitAPI
from pagedcore_litserve.worker import PagedLoop, on_device

# Two models, one of them with two workers, and a LitAPI that has nothing to do with either.
PROGRAM = """
    import json, sys
    import litserve as ls
    from pagedcore import EngineConfig
    from pagedcore.server_config import ServerConfig
    from pagedcore_litserve import PagedLitAPI

    class Square(ls.LitAPI):
        def predict(self, request):
            return {"output": request["input"] ** 2}

    class Note(ls.Callback):
        def on_request(self, active_requests, litserver):
            note("request")

        def on_response(self, litserver):
            note("response")

    class Keep(ls.Logger):
        def process(self, key, value):
            note(f"{key}={value}")

    def note(text):
        with open("notes", "a") as file:
            file.write(text + "\\n")

    if __name__ == "__main__":
        given = json.loads(sys.argv[1])
        port = given["server"].pop("port")
        model = given["engine"].pop("model")
        models = [
            PagedLitAPI(
                engine=EngineConfig.from_options(
                    model=model, served_model_name=(name,), **given["engine"]
                ),
                server=ServerConfig(**given["server"]),
                api_path=path,
                stats_interval_s=0.1,
                build=build,
            )
            for name, path, build in (
                ("big", "/", given["build"]),
                ("twin", "/twin", "pagedcore.testing.fake_engine:build_fake_engine"),
            )
        ]
        server = ls.LitServer(
            [*models, Square(api_path="/square")],
            accelerator="cpu",
            workers_per_device={"/twin": 2},
            timeout=False,
            restart_workers=True,
            callbacks=[Note()],
            loggers=[Keep()],
        )
        server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="warning")
"""


@pytest.fixture(scope="module")
def program(launch):
    with launch(PROGRAM) as running:
        running.wait_for(200)
        running.wait_for(200, "/twin/readyz")
        running.wait_for(200, "/health")
        yield running
        children = running.tree()
        assert running.stop(signal.SIGINT) == 0
        running.wait_for_end(children)


def test_each_model_answers_under_its_own_path(program):
    for path, name in (("", "big"), ("/twin", "twin")):
        status, answer = program.complete(f"{path}/v1/completions", max_tokens=4)
        assert (status, answer["model"], answer["choices"][0]["text"]) == (200, name, "abca")
        status, _, body = program.request("GET", f"{path}/v1/models")
        assert [model["id"] for model in json.loads(body)["data"]] == [name]


def test_other_litapis_and_litserves_own_routes_stay_as_they_are(program):
    status, _, body = program.request("POST", "/square", {"input": 7})
    assert (status, json.loads(body)) == (200, {"output": 49})
    assert program.get("/health") == program.get("/info") == program.get("/docs") == 200
    assert json.loads(program.request("GET", "/openapi.json")[2])["paths"]["/square"]
    assert program.request("GET", "/")[2] == b"litserve running"
    assert program.request("GET", "/twin/")[2].startswith(b"<!doctype html>")


def test_metrics_tell_of_every_engine_of_a_model(program):
    for _ in range(4):
        program.complete("/twin/v1/completions", max_tokens=2)
    lines = program.request("GET", "/twin/metrics")[2].decode().splitlines()
    for engine in (0, 1):
        labels = f'{{engine="{engine}",model_name="twin"}}'
        assert any(line.startswith(f"pagedcore:num_requests_running{labels}") for line in lines)
    assert not any('model_name="big"' in line for line in lines)


def test_our_paths_have_our_errors_and_others_litserves(program):
    assert "error" in json.loads(program.request("GET", "/v1/completions")[2])
    assert json.loads(program.request("GET", "/nothing")[2]) == {"detail": "Not Found"}


def test_callbacks_hear_of_requests_and_loggers_of_the_engine(program):
    notes = program.scratch / "notes"
    notes.write_text("")
    program.complete(max_tokens=1)
    lines = []
    while "response" not in lines or "/twin/engine/1/num_requests_running=0" not in lines:
        assert program.get("/info") == 200  # which no callback hears of
        lines = notes.read_text().splitlines()
    assert [line for line in lines if "=" not in line] == ["request", "response"]


def test_health_is_litserves_and_sees_the_engine(program):  # S13
    os.kill(program.worker(), signal.SIGKILL)
    program.wait_for(503, "/health")
    assert program.complete("/twin/v1/completions", max_tokens=1)[0] == 200
    program.wait_for(200, "/health")
    program.wait_for(200)


@pytest.fixture
def in_process(tmp_path):
    """A LitServer with its app in this process and its workers in others."""
    engine = EngineConfig.from_options(model=str(tmp_path))
    api = PagedLitAPI(engine=engine, build=BUILD_FAKE)
    return ls.LitServer(api, accelerator="cpu", timeout=False)


def test_litserves_response_buffer_is_never_used(in_process, write_model, tmp_path):  # D17
    write_model(tmp_path)
    with wrap_litserve_start(in_process) as server, TestClient(server.app) as client:
        while client.get("/readyz").status_code != 200:
            pass
        for _ in range(100):
            body = {"prompt": "abc", "max_tokens": 2, "n": 3}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert not server.response_buffer
        folder = Path(server.lit_api.spec.plan.folder)
    assert list(folder.glob("engine-*")) == []


@pytest.mark.parametrize(
    ("chosen", "litserves", "expected"),
    [
        ("auto", "cuda:1", "cuda:1"),
        ("auto", "cpu", "auto"),  # what LitServe says where it knows of no accelerator
        ("cpu", "cuda:0", "cpu"),
        ("cuda:3", "cuda:0", "cuda:3"),
    ],
)
def test_a_workers_engine_runs_where_litserve_says_unless_it_was_told(chosen, litserves, expected):
    config = EngineConfig.from_options(device=chosen, max_num_seqs=7)
    moved = on_device(config, litserves)
    assert moved.execution.device == expected
    assert moved.scheduler.max_num_seqs == 7


@pytest.mark.parametrize("path", ["", "twin", "/twin/"])
def test_an_api_path_must_be_one(path):
    with pytest.raises(ConfigError, match="api_path must be"):
        PagedLitAPI(api_path=path)


def test_what_goes_to_a_worker_is_plain_data():  # S17
    api = PagedLitAPI(server=ServerConfig(api_key=("k",)))
    again = pickle.loads(pickle.dumps(api))
    assert again.spec.plan == api.spec.plan
    assert again.spec.stream


# Stock LitServe still does what our mount keeps away from; an upgrade that cures it is noticed.


def test_guard_fast_queue_has_no_effect():  # D26, S2
    server = ls.LitServer(ls.test_examples.SimpleLitAPI(), accelerator="cpu", fast_queue=True)
    assert server.transport_config.transport_type == "mp"


def test_litserves_own_loops_and_queues_are_never_reached():  # D25, D26
    api = PagedLitAPI()
    ls.LitServer(api, accelerator="cpu", timeout=False)
    assert type(api.loop) is PagedLoop
    assert not issubclass(PagedLoop, ContinuousBatchingLoop | StreamingLoop)
    assert api.spec.endpoints == []


def test_guard_the_names_that_the_mount_uses():
    api = PagedLitAPI()
    server = ls.LitServer(api, accelerator="cpu", timeout=False)
    assert api.spec._server is server
    assert server._inference_workers_config_for_api("/") == ["cpu"]
    assert callable(server._callback_runner.trigger_event)
    assert server._shutdown_event is None
    assert server.app.user_middleware[0].cls.__name__ == "Front"
