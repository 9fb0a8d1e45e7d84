"""The two hubs: a small Hugging Face hub of our own, and a library that fails in every way."""

import http.server
import json
import re
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import errors, snapshot_download

from pagedcore.errors import ConfigError, ModelError
from pagedcore.sources import find_config, find_model
from pagedcore.sources.hub import HuggingFaceSource, ModelScopeSource, split_revision

COMMIT = "0123456789" * 4
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"import os",
    "consolidated.safetensors": b"the same weights",
    "original/model.safetensors": b"the same weights",
    "onnx/config.json": b"{}",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as a snapshot takes."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        if "/gone/" in path:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
        if "/gated/" in path:
            return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
        if "/nowhere" in path:
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body=body)
        if re.match(r"/api/models/[\w/-]+/revision/", path):
            siblings = [{"rfilename": name} for name in FILES]
            model = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            return self.reply(200, json.dumps(model).encode(), body=body)
        if match := re.match(r"/api/models/[\w/-]+/tree/", path):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{i:040x}"}
                for i, (name, data) in enumerate(FILES.items())
            ]
            return self.reply(200, json.dumps(tree).encode(), body=body)
        if match := re.match(rf"/org/name/resolve/{COMMIT}/(.+)", path):
            data = FILES[match[1]]
            etag = f'"{list(FILES).index(match[1]):040x}"'
            headers = {"X-Repo-Commit": COMMIT, "ETag": etag}
            return self.reply(200, data, headers, body=body)
        return self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body=body)

    def reply(self, status, data, headers=None, *, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """A hub at a port of its own; `asked` lists what was asked of it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def source(hub, tmp_path):
    """The real library, at our hub, with a cache of its own."""

    def download(name, **options):
        return snapshot_download(
            name, endpoint=hub.url, cache_dir=tmp_path / "hub", token=False, **options
        )

    return HuggingFaceSource(download)


def test_a_snapshot_has_what_a_model_needs_and_nothing_that_runs(source, hub):
    folder = find_model("hf:org/name", {"hf": lambda: source})
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == WANTED
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_to_plan_config_json_alone_is_fetched_and_later_the_rest(source, hub):
    folder = find_config("hf:org/name", {"hf": lambda: source})
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert source.fetch("org/name", None) == folder
    assert {path.name for path in folder.iterdir()} == WANTED


def test_the_second_time_no_file_is_fetched(source, hub):
    first = source.fetch("org/name", None)
    hub.asked.clear()
    assert source.fetch("org/name", None) == first
    assert not [path for path in hub.asked if "/resolve/" in path]


def test_a_fetched_model_is_found_without_its_hub(source, hub, tmp_path):
    folder = source.fetch("org/name", None)

    def offline(name, **options):
        return snapshot_download(
            name, endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "hub", **options
        )

    assert HuggingFaceSource(offline).fetch("org/name", None) == folder


@pytest.mark.parametrize("way", ["name", "option"])
def test_a_revision_is_asked_for(source, hub, way):
    if way == "name":
        source.fetch("org/name@v1.0", None)
    else:
        source.fetch("org/name", "v1.0")
    assert any("/revision/v1.0" in path or "/tree/v1.0" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone/model", "has no model 'gone/model', or it is private: check the name, or set HF_"),
        ("gated/model", "accept them on its page, and set HF_TOKEN"),
        ("org/name@nowhere", "has no revision 'nowhere': name a branch"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(source, name, words):
    with pytest.raises(ModelError) as caught:
        source.fetch(name, None)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_says_what_to_do(tmp_path):
    def offline(name, **options):
        return snapshot_download(name, endpoint="http://127.0.0.1:9", cache_dir=tmp_path, **options)

    with pytest.raises(ModelError, match="not in the cache, and the hub cannot be asked") as caught:
        HuggingFaceSource(offline).fetch("org/name", None)
    assert "a local folder" in str(caught.value)


class Failing:
    """A library's download that fails; `local` is what it finds in its cache."""

    def __init__(self, error, local=None):
        self.error, self.local = error, local

    def __call__(self, name, *, revision, allow_patterns, ignore_patterns, local_files_only=False):
        if local_files_only and self.local is not None:
            return str(self.local)
        raise self.error


@pytest.mark.parametrize("source", [HuggingFaceSource, ModelScopeSource])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("odd\nin two lines"), Exception()]
)
def test_whatever_a_library_raises_is_one_line(source, error):
    with pytest.raises(ModelError, match="cannot be fetched") as caught:
        source(Failing(error)).fetch("org/name", "v1")
    assert "org/name@v1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hugging_face_offline_by_choice_says_so():
    with pytest.raises(ModelError, match="without HF_HUB_OFFLINE"):
        HuggingFaceSource(Failing(errors.OfflineModeIsEnabled("x"))).fetch("org/name", None)


def test_modelscope_gives_what_it_has_when_the_network_is_gone(tmp_path, caplog):
    source = ModelScopeSource(Failing(ConnectionError("no network"), local=tmp_path))
    assert source.fetch("org/name", None) == tmp_path
    assert "cannot be asked whether modelscope:org/name is current" in caplog.text
    with pytest.raises(ModelError, match="not in the cache, and the hub cannot be asked"):
        ModelScopeSource(Failing(ConnectionError("no network"))).fetch("org/name", None)


def test_modelscope_is_asked_for_the_same_files(tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    assert ModelScopeSource(download).fetch("org/name@v2", None) == Path(tmp_path)
    assert (asked["name"], asked["revision"]) == ("org/name", "v2")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*.py", "*.bin", "*"} & set(asked["allow_patterns"])


def test_a_model_that_modelscope_does_not_have_says_so():
    class NotExistError(Exception):
        """As modelscope calls it, in one module or another."""

    with pytest.raises(ModelError, match="check the name and the revision"):
        ModelScopeSource(Failing(NotExistError("404"))).fetch("org/name", None)


def test_modelscope_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub", None)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match=r"pip install 'pagedcore\[modelscope\]'"):
        ModelScopeSource().fetch("org/name", None)


@pytest.mark.parametrize("name", ["name", "a/b/c", "../x", "a/..", "a b/c", "", "org/name@", "@x"])
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(ModelError, match="write hf:org/name"):
        split_revision("hf", name, None)


def test_two_revisions_that_disagree_are_refused():
    assert split_revision("hf", "org/name@v1", "v1") == ("org/name", "v1")
    with pytest.raises(ConfigError, match="give the revision once"):
        split_revision("hf", "org/name@v1", "v2")
