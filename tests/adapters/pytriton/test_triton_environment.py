"""What must be as PyTriton 0.7.0 has it, and what happens where it is not."""

import logging
import os
import sys
import threading

import pytest

from pagedcore.errors import ConfigError
from pagedcore_pytriton import environment, shim
from pagedcore_pytriton.tritonserver import Ports, check_main_thread


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.delenv("PYTRITON_NO_TENSORSTORE", raising=False)


def test_this_interpreters_library_is_found_before_any_other(monkeypatch):  # D1
    monkeypatch.setenv("LD_LIBRARY_PATH", "/other:/more")
    assert not environment.is_prepared()
    environment.prepare_environment()
    environment.prepare_environment()  # again changes nothing
    first, *others = os.environ["LD_LIBRARY_PATH"].split(":")
    library = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    assert os.path.exists(f"{first}/{library}")
    assert others == ["/other", "/more"]
    assert environment.is_prepared()


def test_a_python_that_was_moved_is_found_where_it_is(monkeypatch):  # D1
    environment.prepare_environment()
    folder = os.environ.pop("LD_LIBRARY_PATH")
    monkeypatch.setattr(environment.sysconfig, "get_config_var", lambda name: "/install/lib")
    monkeypatch.setattr(environment.sys, "base_prefix", os.path.dirname(folder))
    environment.prepare_environment()
    assert os.environ["LD_LIBRARY_PATH"] == folder


def test_a_python_without_a_shared_library_is_refused_in_one_line(monkeypatch, tmp_path):  # D1
    monkeypatch.setattr(environment.sysconfig, "get_config_var", lambda name: "/nowhere")
    monkeypatch.setattr(environment.sys, "base_prefix", str(tmp_path))
    with pytest.raises(ConfigError, match=r"a shared libpython3\.1\d\.so.*--enable-shared"):
        environment.prepare_environment()


def test_tritonserver_is_started_in_the_main_thread_only():  # D8
    check_main_thread()
    errors = []

    def elsewhere():
        try:
            check_main_thread()
        except ConfigError as error:
            errors.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "start it in the main thread" in errors[0]


def test_pytriton_has_every_name_that_the_shim_needs():  # D14
    assert shim.missing_names() == []


class OtherTriton:
    """Takes what is bound."""

    def bind(self, **options):
        self.options = options


def test_without_one_of_them_the_model_is_bound_with_a_warning(monkeypatch, caplog):  # D14
    monkeypatch.setattr(shim, "NAMES", ("def gone(", "def lost("))
    triton = OtherTriton()
    with caplog.at_level(logging.WARNING):
        assert not shim.bind(triton, "llm", infer_func=len)
    assert triton.options == {"model_name": "llm", "infer_func": len}
    assert "has no def gone( and no def lost(: clients that leave are not noticed" in caplog.text


@pytest.mark.parametrize("port", [0, 65533])
def test_a_port_without_room_for_tritons_is_refused(port):
    with pytest.raises(ConfigError, match=r"port must be in 1\.\.65532"):
        Ports.after(port)


def test_tritons_ports_can_be_chosen(monkeypatch):
    monkeypatch.setenv("PYTRITON_TRITON_CONFIG_GRPC_PORT", "9001")
    assert Ports.after(8000) == Ports(http=8001, grpc=9001, metrics=8003)
    monkeypatch.setenv("PYTRITON_TRITON_CONFIG_GRPC_PORT", "x")
    with pytest.raises(ConfigError, match=r"GRPC_PORT must be a port in 1\.\.65535, not 'x'"):
        Ports.after(8000)
