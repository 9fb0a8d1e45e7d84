"""Settings of the server that are files."""

import pytest

from pagedcore.errors import ConfigError
from pagedcore.server_config import ServerConfig
from pagedcore_openai.tls import tls_options


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch):
    monkeypatch.delenv("PAGEDCORE_API_KEY", raising=False)


def test_keys_of_file_and_flag_are_joined(tmp_path):
    path = tmp_path / "keys"
    path.write_text("  one \n#two\n\nthree\n")
    assert ServerConfig(api_key=("zero",), api_key_file=str(path)).api_key == (
        "zero",
        "one",
        "three",
    )


def test_keys_are_never_shown(tmp_path):  # AUTH-3
    path = tmp_path / "keys"
    path.write_text("s3cret")
    assert "s3cret" not in repr(ServerConfig(api_key_file=str(path)))


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe"])
def test_a_file_without_a_key_stops_the_start(tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="api_key_file"):
        ServerConfig(api_key_file=str(path))


def test_a_key_needs_its_certificate(tmp_path):
    with pytest.raises(ConfigError, match="ssl_keyfile needs ssl_certfile"):
        ServerConfig(ssl_keyfile=str(tmp_path / "key.pem"))
    with pytest.raises(ConfigError, match="no file that can be read"):
        ServerConfig(ssl_certfile=str(tmp_path / "certificate.pem"))


def test_a_file_that_holds_no_certificate_stops_the_start(tmp_path):
    path = tmp_path / "certificate.pem"
    path.write_text("nothing")
    with pytest.raises(ConfigError, match="do not hold a certificate"):
        tls_options(ServerConfig(ssl_certfile=str(path)))


def test_without_a_certificate_nothing_is_set():
    assert tls_options(ServerConfig()) == {}
