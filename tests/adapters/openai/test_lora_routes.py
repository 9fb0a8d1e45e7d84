"""Adapters (LoRA) over HTTP: chosen by the model's name, loaded and unloaded at run time."""

import asyncio
import copy
import os
import threading

import pytest
import torch
from starlette.testclient import TestClient

from pagedcore.config import EngineConfig
from pagedcore.engine.build import build_engine
from pagedcore.engine.client import EngineClient
from pagedcore.engine.server import EngineServer
from pagedcore.server_config import ServerConfig
from pagedcore.testing.drawn_adapters import linear_shapes, save_drawn_adapter
from pagedcore.testing.tiny_models import greedy_tokens, save_tiny_model
from pagedcore_openai.app import build_app

PROMPT = [5, 99, 7, 140, 33, 8, 61, 250, 17, 2]
NUM_TOKENS = 6
KEY = {"X-API-Key": "secret"}


class Served:
    """A tiny model with adapters, behind the surface."""

    def __init__(self, http, root, says):
        self.http = http
        self.root = root
        self.says = says

    def post(self, path, **body):
        return self.http.post(path, json=body, headers=KEY)

    def complete(self, model, **body):
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, **body}
        body |= {"ignore_eos": True, "return_token_ids": True}
        return self.post("/v1/completions", model=model, **body)

    def tokens(self, model):
        answer = self.complete(model).json()
        assert answer["model"] == model
        return answer["choices"][0]["token_ids"]

    def load(self, name, path):
        return self.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path))

    def unload(self, name):
        return self.post("/v1/unload_lora_adapter", lora_name=name)

    def models(self):
        return {m["id"]: m for m in self.http.get("/v1/models", headers=KEY).json()["data"]}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    folder.chmod(0o700)
    reference = save_tiny_model(folder / "model", num_hidden_layers=2)
    root = folder / "adapters"
    says = {"tiny": greedy_tokens(reference, PROMPT, NUM_TOKENS)}
    for seed, name in enumerate(("first", "second")):
        shapes = linear_shapes(reference, "q_proj", "v_proj", "up_proj")
        changes = save_drawn_adapter(root / name, shapes, seed=seed)
        merged = copy.deepcopy(reference)
        with torch.no_grad():
            for layer, change in changes.items():
                merged.get_submodule(layer).weight.add_(change)
        says[name] = greedy_tokens(merged, PROMPT, NUM_TOKENS)
    save_drawn_adapter(root / "high", shapes, rank=17)
    save_drawn_adapter(folder / "outside", shapes)
    (root / "link").symlink_to(folder / "outside")
    (root / "inner").mkdir()
    for file in (folder / "outside").iterdir():
        (root / "inner" / file.name).symlink_to(file)
    config = EngineConfig.from_options(
        model=str(folder / "model"), served_model_name="tiny", dtype="float32", device="cpu",
        max_num_seqs=4, num_gpu_blocks_override=100, enable_lora=True, max_cpu_loras=2,
        lora_root=str(root),
    )  # fmt: skip
    server = EngineServer(build_engine(config, usage="serve"), str(folder / "s"))
    server.listen()
    thread = threading.Thread(target=server.serve)
    thread.start()
    settings = ServerConfig(api_key=("secret",), enable_admin_api=True)
    app = build_app(EngineClient(str(folder / "s")), config, settings)
    try:
        with TestClient(app) as http:
            http.portal.call(lambda: asyncio.wait_for(app.state.surface.loaded(), 60))
            yield Served(http, root, says)
    finally:
        server.stop()
        thread.join()


@pytest.fixture(autouse=True)
def _nothing_loaded(served):
    yield
    for name, card in served.models().items():
        if card["parent"] is not None:
            assert served.unload(name).status_code == 200


def test_the_models_name_selects_the_adapter(served):  # LORA-1
    for name in ("first", "second"):
        assert served.load(name, served.root / name).status_code == 200
    assert {name: served.tokens(name) for name in served.says} == served.says


def test_models_lists_adapters_with_their_parent(served):
    assert served.load("mine", "first").status_code == 200
    cards = served.models()
    assert [(name, card["parent"]) for name, card in cards.items()] == [
        ("tiny", None),
        ("mine", "tiny"),
    ]
    assert served.http.get("/v1/models/mine", headers=KEY).json() == cards["mine"]
    assert served.http.get("/v1/models/other", headers=KEY).status_code == 404
    assert served.post("/tokenize", model="mine", prompt="a").status_code == 200
    assert served.post("/tokenize", model="other", prompt="a").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_name_that_was_unloaded_does_not_exist(served, stream):  # LORA-2
    served.load("mine", "first")
    assert served.unload("mine").status_code == 200
    answer = served.complete("mine", stream=stream)
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    assert "`mine` does not exist" in answer.json()["error"]["message"]
    assert served.unload("mine").status_code == 404


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("../outside", 400, "below the one that --lora-root allows"),
        ("/", 400, "below the one that --lora-root allows"),
        ("link", 400, "below the one that --lora-root allows"),
        ("inner", 400, "below the one that --lora-root allows"),
        ("a\0b", 400, "below the one that --lora-root allows"),
        ("first/../../outside", 400, "below the one that --lora-root allows"),
        ("nowhere", 404, "there is no folder"),
        ("first/adapter_config.json", 404, "there is no folder"),
        ("high", 400, "has the rank 17, and at most 16"),
        (".", 400, "adapter_config.json cannot be read"),
        ("", 400, "must not be empty"),
    ],
)
def test_what_may_not_be_loaded_is_refused_and_nothing_changes(served, path, status, message):
    answer = served.load("mine", path)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "lora_path"
    assert list(served.models()) == ["tiny"]


@pytest.mark.parametrize("name", ["tiny", "", " x", "a\nb", "x" * 256])
def test_a_name_that_cannot_be_an_adapters_is_refused(served, name):
    answer = served.load(name, "first")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lora_name"


def test_a_name_that_is_taken_and_a_full_store_are_refused(served):
    served.load("one", "first")
    assert "loaded already" in served.load("one", "second").json()["error"]["message"]
    served.load("two", "second")
    assert "--max-cpu-loras" in served.load("three", "first").json()["error"]["message"]


def test_only_who_has_a_key_may_load(served):
    body = {"lora_name": "mine", "lora_path": "first"}
    assert served.http.post("/v1/load_lora_adapter", json=body).status_code == 401


def test_without_administration_the_routes_do_not_exist(tmp_path):  # HTTP-3
    app = build_app(EngineClient(os.fspath(tmp_path / "s")), EngineConfig(), ServerConfig())
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert TestClient(app).post(path, json={}).status_code == 404
