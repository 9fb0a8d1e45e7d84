"""Routes of plugins in the OpenAI surface (`pagedcore_routes`)."""

import pytest
from starlette.testclient import TestClient

from pagedcore import hookimpl
from pagedcore.config import EngineConfig
from pagedcore.engine.client import EngineClient
from pagedcore.errors import PluginError
from pagedcore.plugins import register
from pagedcore.server_config import ServerConfig
from pagedcore_openai.app import build_app


class Usage:
    @hookimpl
    def pagedcore_routes(self, router, client):
        @router.get("/usage/{month}")
        async def usage(month: int):
            return {"month": month, "ready": client.ready}


class Without:
    """Needs no client."""

    @hookimpl
    def pagedcore_routes(self, router):
        @router.post("/echo", openapi_extra={"x": 1})
        async def echo():
            return "echo"


def adding(path, method="get"):
    class Plugin:
        @hookimpl
        def pagedcore_routes(self, router):
            getattr(router, method)(path)(lambda: None)

    return Plugin()


def app_of(tmp_path, server=None, **plugins):
    client = EngineClient(str(tmp_path / "nobody"))
    return build_app(client, EngineConfig(), server, plugins=register(plugins))


def test_a_plugins_routes_answer_beside_ours(tmp_path):
    client = TestClient(app_of(tmp_path, usage=Usage(), without=Without()))
    assert client.get("/usage/7").json() == {"month": 7, "ready": False}
    assert client.post("/echo").json() == "echo"
    assert client.get("/livez").status_code == 200
    assert "x-request-id" in client.get("/usage/7").headers
    assert "/usage/{month}" not in client.get("/openapi.json").json()["paths"]


def test_a_plugins_routes_need_a_key_where_ours_do(tmp_path):
    server = ServerConfig(api_key=("secret",))
    client = TestClient(app_of(tmp_path, server, usage=Usage()))
    assert client.get("/usage/7").status_code == 401
    assert client.get("/usage/7", headers={"X-API-Key": "secret"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/completions", "get"),
        ("/v1/models/mine", "get"),
        ("/readyz", "post"),
        ("/", "get"),
        ("/{rest:path}", "get"),
        ("/v1/{anything}", "post"),
    ],
)
def test_a_path_that_is_taken_stops_the_start_and_names_the_plugin(tmp_path, path, method):
    with pytest.raises(PluginError, match=r"the plugin stranger adds the path .* has taken") as e:
        app_of(tmp_path, stranger=adding(path, method))
    assert "--disable-plugin stranger" in str(e.value)


def test_two_plugins_may_not_add_one_path(tmp_path):
    with pytest.raises(PluginError, match="adds the path /mine, which /mine has taken"):
        app_of(tmp_path, one=adding("/mine"), other=adding("/mine", "post"))


def test_only_http_routes_can_be_added(tmp_path):
    class Socket:
        @hookimpl
        def pagedcore_routes(self, router):
            router.add_api_websocket_route("/socket", lambda websocket: None)

    with pytest.raises(PluginError, match=r"the plugin socket adds .* no HTTP route"):
        app_of(tmp_path, socket=Socket())


def test_a_plugin_that_fails_to_add_its_routes_is_named(tmp_path):
    class Broken:
        @hookimpl
        def pagedcore_routes(self):
            raise RuntimeError("gone")

    with pytest.raises(PluginError, match="the plugin broken could not add its routes: Runtime"):
        app_of(tmp_path, broken=Broken())
