"""Models, tokens, versions, probes, and routes that only say that they are not built."""

import json

import pytest

UNBUILT = [
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/pooling",
    "/classify",
    "/generate",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
]
LORA = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
ADMIN = ["/sleep", "/wake_up"]


def test_models_are_listed_by_every_name(client):
    models = list(client.models.list())
    assert [model.id for model in models] == ["fake", "alias"]
    assert models[1].root == "fake"
    assert client.models.retrieve("alias").id == "alias"
    assert client.models.retrieve("fake").max_model_len == 4096


def test_tokenize_and_detokenize_undo_each_other(server):
    answer = server.request("POST", "/tokenize", {"prompt": "héllo"}).json
    assert bytes(answer["tokens"]).decode() == "héllo"
    assert (answer["count"], answer["max_model_len"]) == (6, 4096)
    back = server.request("POST", "/detokenize", {"tokens": answer["tokens"]})
    assert back.json == {"prompt": "héllo"}


def test_a_conversation_is_tokenized_as_its_template_renders_it(server):
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert bytes(server.request("POST", "/tokenize", body).json["tokens"]) == b"user:hi;assistant:"
    body["add_generation_prompt"] = False
    assert bytes(server.request("POST", "/tokenize", body).json["tokens"]) == b"user:hi;"


def test_a_text_longer_than_the_model_can_be_counted(server):
    assert server.request("POST", "/tokenize", {"prompt": "x" * 9000}).json["count"] == 9000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [512]}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {"tokens": [1.0]}),
        ("/invocations", {}),
        ("/invocations", {"inputs": "x"}),
    ],
)
def test_what_they_cannot_read_is_400(server, path, body):
    assert server.request("POST", path, body).error["code"] == 400


def test_unknown_fields_are_told_by_them_too(server):  # REQ-3
    answer = server.request("POST", "/tokenize", {"prompt": "a", "zebra": 1})
    assert answer.headers["x-pagedcore-ignored-params"] == "zebra"


def test_invocations_do_what_their_fields_say(server):
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    assert server.request("POST", "/invocations", chat).json["object"] == "chat.completion"
    completion = {"prompt": "abc", "max_tokens": 1}
    assert server.request("POST", "/invocations", completion).json["object"] == "text_completion"
    vector = server.request("POST", "/invocations", {"input": "abc"}).json
    assert vector["data"][0]["object"] == "embedding"


def test_probes_answer_when_all_is_well(server):
    for path in ("/livez", "/readyz", "/health", "/health_generate", "/ping"):
        assert server.get(path).status == 200
    assert server.request("POST", "/ping").status == 200


def test_load_counts_what_runs(server, client):
    assert server.get("/load").json == {"server_load": 0}
    server.engine.pause()
    stream = client.completions.create(model="fake", prompt="abc", stream=True)
    assert server.get("/load").json == {"server_load": 1}
    stream.close()


def test_the_version_is_this_softwares(server):
    from pagedcore import __version__

    assert server.get("/version").json == {"version": __version__}


@pytest.mark.parametrize("path", UNBUILT)
def test_a_route_that_is_not_built_says_so(server, path):  # HTTP-1, HTTP-2
    error = server.request("POST", path, {}).error
    assert (error["code"], error["type"]) == (501, "NotImplementedError")
    assert server.get(path).status == 405


@pytest.mark.parametrize("path", [*ADMIN, *LORA, "/reset_prefix_cache"])
def test_administration_does_not_exist_unless_asked_for(server, path):  # HTTP-3
    assert server.request("POST", path).error["code"] == 404
    assert server.get("/is_sleeping").status == 404


def test_administration_can_forget_cached_prefixes(generous):  # HTTP-3, POOL-7
    assert generous.get("/is_sleeping").json == {"is_sleeping": False}
    for path in ADMIN:
        assert generous.request("POST", path).status == 501
    asked = {"lora_name": "mine", "lora_path": "folder"}
    for path in LORA:
        assert "--enable-lora" in generous.request("POST", path, asked).error["message"]
    assert generous.request("POST", "/reset_prefix_cache").status == 200
    generous.engine.pause()
    with generous.client() as client:
        stream = client.completions.create(model="fake", prompt="abc", stream=True)
        assert generous.request("POST", "/reset_prefix_cache").status == 503
        stream.close()


def test_the_chat_page_needs_nothing_from_elsewhere(server):
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    text = page.body.decode()
    assert "http://" not in text
    assert "https://" not in text
    assert "src=" not in text
    assert '<meta name="viewport"' in text
    assert 'lang="en"' in text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_no_route_answers_a_range(server):  # IN-41
    ranges = "bytes=" + ",".join(f"{i}-" for i in range(1000))
    answer = server.get("/", range=ranges)
    assert answer.status == 200
    assert answer.body.endswith(b"</html>\n")


def test_browsers_of_allowed_origins_may_call_and_no_others(locked):
    def preflight(origin):
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        return locked.request("OPTIONS", "/v1/completions", headers=headers)

    good = preflight("https://example.org")
    assert good.status == 200
    assert good.headers["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-origin" not in preflight("https://example.com").headers
    refused = locked.get("/v1/models", origin="https://example.org")
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == "https://example.org"


def test_without_allowed_origins_no_browser_may_call(server):  # IN-42
    answer = server.get("/v1/models", origin="https://example.org")
    assert "access-control-allow-origin" not in answer.headers


def test_the_openapi_document_tells_of_every_route(server):
    document = server.get("/openapi.json").json
    paths = document["paths"]
    for path in (*UNBUILT, "/v1/completions", "/v1/chat/completions", "/v1/responses", "/metrics"):
        assert path in paths
    completion = paths["/v1/completions"]["post"]
    schema = completion["requestBody"]["content"]["application/json"]["schema"]
    name = schema["$ref"].rpartition("/")[2]
    assert "max_tokens" in document["components"]["schemas"][name]["properties"]
    assert "200" not in paths["/pooling"]["post"]["responses"]
    assert "501" in paths["/pooling"]["post"]["responses"]
    refs = json.dumps(document).split('"#/components/schemas/')[1:]
    assert {ref.partition('"')[0] for ref in refs} <= set(document["components"]["schemas"])
