"""What a name leads to, and what is said of one that leads nowhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagedcore.errors import ConfigError, ModelError, UnknownNameError
from pagedcore.plugins import collect, load_plugins
from pagedcore.sources import ALIASES, Source, builtin_sources, find_model


class FakeSource:
    """Knows one model, and remembers what it was asked."""

    def __init__(self, folder):
        self.folder = folder
        self.asked = []

    def fetch(self, name, revision):
        self.asked.append((name, revision))
        return self.folder


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def fake(folder):
    return FakeSource(folder)


def test_a_folder_is_the_model(folder, monkeypatch):
    assert find_model(str(folder), {}) == folder
    monkeypatch.chdir(folder.parent)
    assert find_model("model", {}) == find_model("./model", {}) == folder.relative_to(folder.parent)


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("~/model", {}) == folder


def test_a_scheme_asks_its_source(folder, fake):
    assert find_model("my:some/name", {"my": lambda: fake}, revision="v1") == folder
    assert fake.asked == [("some/name", "v1")]


def test_only_the_source_that_is_asked_is_made(fake):
    def broken():
        pytest.fail("this source was not asked for")

    find_model("my:x", {"my": lambda: fake, "other": broken})


def test_an_alias_is_a_pinned_model(folder, fake):
    assert find_model("smollm2-135m", {"wheel": lambda: fake}) == folder
    (name, revision), *_ = fake.asked
    assert f"wheel:{name}" == ALIASES["smollm2-135m"].name
    assert revision.startswith("sha256:")


def test_a_gguf_path_asks_the_gguf_source(tmp_path, fake):
    path = tmp_path / "X.GGUF"
    path.write_bytes(b"GGUF")
    assert find_model(str(path), {"gguf": lambda: fake}) == fake.folder
    assert fake.asked == [(str(path), None)]


def test_a_path_that_looks_like_a_scheme_is_a_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("hf:model")
    assert find_model("hf:model", {}) == Path("hf:model")


def test_a_folder_for_its_tokenizer_needs_no_config(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").unlink()
    assert find_model(str(folder), {}, holding="tokenizer.json") == folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at/all", "there is no folder or GGUF file '/nowhere/at/all'. Check the path"),
        ("smollm-135m", "Did you mean 'smollm2-135m'?"),
        ("Qwen/Qwen3-0.6B", "write hf:Qwen/Qwen3-0.6B"),
        ("", "there is no folder or GGUF file ''"),
        ("missing.gguf", "there is no folder or GGUF file 'missing.gguf'"),
        ("a\0b", "there is no folder"),
        ("x" * 100_000, "there is no folder"),
        ("C:\\models", "there is no folder"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_would(name, words):
    with pytest.raises(ModelError) as caught:
        find_model(name, builtin_sources())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_unknown_scheme_names_the_nearest():
    with pytest.raises(UnknownNameError, match="no source is named 'hff': did you mean 'hf'"):
        find_model("hff:org/name", builtin_sources())


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json\. Name the folder"):
        find_model(str(tmp_path), {})


def test_a_folder_of_gguf_files_says_to_name_the_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"name the file: .*m\.gguf"):
        find_model(str(tmp_path), {})


def test_what_a_source_finds_must_be_a_model_too(tmp_path):
    with pytest.raises(ModelError, match=r"'my:x' is no model: .* holds no config\.json"):
        find_model("my:x", {"my": lambda: FakeSource(tmp_path)})


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"a model is a folder or a GGUF file"):
        find_model(str(tmp_path / "model.bin"), {})


def test_a_revision_of_what_has_none_is_refused(folder, tiny, cache):
    path = tiny.save(folder.parent / "x.gguf")
    for name in (str(folder), "smollm2-135m", str(path)):
        with pytest.raises(ConfigError, match=r"revision 'v1' was asked for, but"):
            find_model(name, builtin_sources(), revision="v1")


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tiny, cache, tmp_path):
    path = tiny.save(tmp_path / "x.gguf")
    sources = builtin_sources()

    first = find_model(str(path), sources)
    (first / "mark").touch()

    assert first.is_relative_to(cache)
    assert find_model(f"gguf:{path}", sources) == first
    assert (first / "mark").exists()
    tiny.set("llama.context_length", 128).save(path)
    second = find_model(str(path), sources)
    assert second != first
    assert json.loads((second / "config.json").read_text())["max_position_embeddings"] == 128


def test_a_broken_gguf_file_leaves_nothing_behind(cache, tmp_path, tiny):
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny.build()[:-1])
    with pytest.raises(ModelError, match="it is cut off"):
        find_model(str(path), builtin_sources())
    assert [entry for entry in (cache / "models").iterdir() if entry.is_dir()] == []


def test_the_core_offers_its_sources_as_a_plugin_does():
    offered = collect(load_plugins(), "pagedcore_sources")
    assert {"gguf", "hf", "modelscope", "wheel"} <= offered.keys()
    for make in offered.values():
        source: Source = make()
        assert callable(source.fetch)


def test_finding_a_folder_imports_neither_numpy_nor_the_hubs(folder):
    code = (
        "import sys; from pagedcore.sources import builtin_sources, find_model\n"
        f"find_model({str(folder)!r}, builtin_sources())\n"
        "print(*{'numpy', 'torch', 'tokenizers', 'huggingface_hub', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert result.stdout.split() == []


def test_a_packed_gguf_file_is_another_folder_than_the_widened_one(tiny, cache, tmp_path):
    path = tiny.save(tmp_path / "x.gguf")
    packed = find_model(f"packed:{path}", builtin_sources())
    assert packed != find_model(str(path), builtin_sources())
    assert packed == find_model(f"packed:gguf:{path}", builtin_sources())
    assert "quantization_config" in json.loads((packed / "config.json").read_text())


def test_what_is_no_gguf_file_is_never_packed(folder, fake):
    with pytest.raises(ConfigError, match="packed: is for GGUF files"):
        find_model(f"packed:{folder}", {})
    with pytest.raises(ConfigError, match="packed: is for GGUF files"):
        find_model("packed:my:model", {"my": lambda: fake})
