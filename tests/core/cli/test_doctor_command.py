"""`pagedcore doctor` on machines that are broken in one way each, and on this one."""

import json
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pagedcore.cli import main
from pagedcore.cli.doctor import report
from pagedcore.cli.doctor.checks import GIB, diagnose
from pagedcore.cli.doctor.system import System, ThisSystem, Torch, TorchGpu
from pagedcore.cli.installed import Examined

H100 = TorchGpu(name="NVIDIA H100", capability=(9, 0), num_bytes=80 * GIB)
TORCH = Torch(version="2.11.0", cuda=(13, 0), wants_triton="3.6.0", gpus=(H100,))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A `System` that says what it is told; one with a GPU and nothing wrong by default."""

    interpreter: tuple = (3, 12, 4)
    c_library: tuple = ("glibc", (2, 39))
    shared_python: bool = True
    headers: bool = True
    cc: str | None = "/usr/bin/cc"
    lacking: tuple = ()
    device: bool = True
    driver: object = (13, 0)
    smi: str | None = "NVIDIA H100, 580.65, 81559 MiB"
    installed_torch: Torch | None = TORCH
    versions: dict = field(default_factory=lambda: {"triton": "3.6.0", "nvidia-pytriton": "0.7.0"})
    broken: dict = field(default_factory=dict)
    listening: str | None = None
    free: int = 500 * GIB
    writable: bool = True
    shm: int | None = 8 * GIB
    files: tuple = (65536, 1048576)
    variables: dict = field(default_factory=dict)
    installed: tuple = (Examined(is_ok=True, what="core from pagedcore 1.0"),)

    def python(self):
        return self.interpreter

    def libc(self):
        return self.c_library

    def has_shared_python(self):
        return self.shared_python

    def has_python_headers(self):
        return self.headers

    def compiler(self):
        return self.cc

    def missing_cpu_features(self):
        return self.lacking

    def has_nvidia_device(self):
        return self.device

    def driver_cuda(self):
        return self.driver

    def nvidia_smi(self):
        return self.smi

    def torch(self):
        return self.installed_torch

    def version(self, distribution):
        return self.versions.get(distribution)

    def import_error(self, module):
        return self.broken.get(module)

    def listen_error(self, host, port):
        return self.listening

    def cache_root(self):
        return Path("/cache")

    def free_bytes(self, folder):
        return self.free

    def is_writable(self, folder):
        return self.writable

    def shared_memory_bytes(self):
        return self.shm

    def open_files(self):
        return self.files

    def variable(self, name):
        return self.variables.get(name)

    def plugins(self):
        return self.installed


GOOD = Machine()
NO_GPU = Machine(
    device=False, driver="no libcuda", smi=None, installed_torch=replace(TORCH, gpus=())
)


def findings(machine, verdict):
    return [
        each for each in diagnose(machine, host="127.0.0.1", port=8000) if each.verdict == verdict
    ]


@pytest.mark.parametrize("machine", [GOOD, NO_GPU], ids=["gpu", "cpu"])
def test_nothing_is_wrong_with_a_good_machine(machine):
    assert findings(machine, "fail") == findings(machine, "warn") == []
    assert all(not each.remedy for each in findings(machine, "ok"))


BROKEN = {
    "an old python": (
        Machine(interpreter=(3, 9, 2)),
        ("python", "3.9.2, and pagedcore is made for 3.11 and 3.12", "uv venv --python 3.12"),
    ),
    "a system with musl": (
        Machine(c_library=("musl", (1, 2))),
        ("libc", "torch's packages need glibc", "python:3.12-slim"),
    ),
    "an old system": (
        Machine(c_library=("glibc", (2, 17)), versions={"triton": "3.6.0"}),
        ("libc", "glibc 2.17, and torch needs 2.28", "newer system"),
    ),
    "no torch": (Machine(installed_torch=None), ("torch", "not installed", "pip install")),
    "a torch that does not load": (
        Machine(installed_torch=Torch(version="2.11.0+cu130", error="OSError: libcudart.so.13")),
        ("torch", "cannot be imported: OSError: libcudart.so.13", "reinstall torch==2.11.0"),
    ),
    "a torch for CPUs beside a GPU": (
        Machine(installed_torch=replace(TORCH, cuda=None, gpus=())),
        ("torch", "built for CPUs, and there is an NVIDIA GPU", "--device cpu"),
    ),
    "no driver": (
        Machine(
            driver="libcuda.so.1: cannot open shared object file",
            installed_torch=replace(TORCH, gpus=()),
        ),
        ("driver", "libcuda.so.1: cannot open", "docker run --gpus all"),
    ),
    "an old driver": (
        Machine(driver=(12, 4), installed_torch=replace(TORCH, gpus=())),
        ("driver", "it runs CUDA 12.4, and torch was built for CUDA 13.0", "ubuntu-drivers"),
    ),
    "a hidden GPU": (
        Machine(installed_torch=replace(TORCH, gpus=()), variables={"CUDA_VISIBLE_DEVICES": "3"}),
        ("gpu", "CUDA_VISIBLE_DEVICES is '3'", "unset CUDA_VISIBLE_DEVICES"),
    ),
    "a GPU that is too old": (
        Machine(
            installed_torch=replace(TORCH, gpus=(replace(H100, name="V100", capability=(7, 0)),))
        ),
        ("gpu", "V100, 80.0 GiB, capability 7.0, and at least 8.0", "--device cpu"),
    ),
    "no triton": (Machine(versions={}), ("triton", "not installed", "pip install triton==3.6.0")),
    "another triton": (
        Machine(versions={"triton": "3.2.0"}),
        ("triton", "3.2.0, and torch 2.11.0 needs 3.6.0", "pip install triton==3.6.0"),
    ),
    "a triton that does not load": (
        Machine(broken={"triton": "ImportError: libtriton.so"}),
        ("triton", "ImportError: libtriton.so", "pip install --force-reinstall triton==3.6.0"),
    ),
    "a GPU without a compiler": (
        Machine(cc=None),
        ("compiler", "there is no C compiler", "sudo apt install gcc"),
    ),
    "a compiler that is not there": (
        Machine(cc=None, variables={"CC": "clang-99"}),
        ("compiler", "CC is 'clang-99', and there is none", "unset CC"),
    ),
    "no headers of python": (
        Machine(headers=False),
        ("compiler", "Python.h is missing", "sudo apt install python3-dev"),
    ),
    "a python that is no library": (
        Machine(shared_python=False),
        ("pytriton", "loads libpython3.12.so.1.0, which is not there", "uv python install"),
    ),
    "a system too old for Triton's server": (
        Machine(c_library=("glibc", (2, 31))),
        ("pytriton", "needs glibc 2.35, and this is 2.31", "--server litserve"),
    ),
    "a port that is taken": (
        Machine(listening="Address already in use"),
        ("port", "127.0.0.1 port 8000 cannot be had: Address already in use", "ss -ltnp"),
    ),
    "a full disk": (
        Machine(free=GIB // 2),
        ("disk", "/cache has 0.5 GiB free", "PAGEDCORE_CACHE"),
    ),
    "a cache that is not ours": (
        Machine(writable=False),
        ("disk", "/cache cannot be written", "chown"),
    ),
    "few open files": (
        Machine(files=(64, 1048576)),
        ("files", "64 files open", "ulimit -n 65536"),
    ),
    "a plugin that does not load": (
        Machine(installed=(Examined(is_ok=False, what="x from y: boom", remedy="Uninstall it"),)),
        ("plugin", "x from y: boom", "Uninstall it"),
    ),
    "two plugins with one name": (
        Machine(installed=(Examined(is_ok=False, what="two plugins offer the server 'a'"),)),
        ("plugin", "two plugins offer the server 'a'", "--disable-plugin"),
    ),
}


@pytest.mark.parametrize(("machine", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_named_with_what_mends_it(machine, expected, capsys):
    (found,) = findings(machine, "fail")
    name, text, remedy = expected
    assert found.name == name
    assert text in found.text
    assert remedy in found.remedy
    assert report(machine, host="127.0.0.1", port=8000, json=False) == 1
    out = capsys.readouterr().out
    assert f"fail  {name}" in out
    assert f"mend: {found.remedy}" in out
    assert "failures: 1" in out


DOUBTFUL = {
    "no nvidia-smi": (Machine(smi=None), ("driver", "nvidia-smi does not run")),
    "a container's shared memory": (Machine(shm=64 << 20), ("pytriton", "/dev/shm has 64 MiB")),
    "no shared memory": (Machine(shm=None), ("pytriton", "/dev/shm is missing")),
    "little space": (Machine(free=5 * GIB), ("disk", "many models are larger")),
    "not many open files": (Machine(files=(1024, 4096)), ("files", "each connection is one")),
    "a CPU without a compiler": (replace(NO_GPU, cc=None), ("compiler", "plain torch, slower")),
}


@pytest.mark.parametrize(("machine", "expected"), DOUBTFUL.values(), ids=DOUBTFUL.keys())
def test_what_is_doubtful_is_a_warning_and_no_failure(machine, expected, capsys):
    (found,) = findings(machine, "warn")
    assert found.name == expected[0]
    assert expected[1] in found.text
    assert found.remedy
    assert report(machine, host="127.0.0.1", port=8000, json=False) == 0
    assert "warnings: 1, failures: 0" in capsys.readouterr().out


def test_a_compiler_is_not_missed_where_the_processor_has_no_use_for_it():
    assert findings(replace(NO_GPU, cc=None, lacking=("avx512_bf16",)), "warn") == []


def test_a_diagnosis_can_be_read_by_a_program(capsys):
    assert report(BROKEN["a full disk"][0], host="127.0.0.1", port=8000, json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert {"name", "verdict", "text", "remedy"} == set(told["findings"][0])
    assert [each["name"] for each in told["findings"] if each["verdict"] == "fail"] == ["disk"]


def test_markup_in_a_plugins_error_is_shown_as_it_is(capsys):
    machine = Machine(installed=(Examined(is_ok=False, what="[/red] from [x]"),))
    report(machine, host="127.0.0.1", port=8000, json=False)
    assert "[/red] from [x]" in capsys.readouterr().out


def test_this_machine_answers_everything(capsys):
    system: System = ThisSystem()
    assert system.python() == sys.version_info[:3]
    assert system.libc()[0] == "glibc"
    assert system.version("pagedcore")
    assert system.version("no-such-distribution") is None
    assert system.import_error("no_such_module").startswith("ModuleNotFoundError")
    assert system.torch().error is None
    assert isinstance(system.driver_cuda(), str | tuple)
    assert system.free_bytes(Path("/no/such/folder")) > 0
    assert all(each.is_ok for each in system.plugins())
    soft, hard = system.open_files()
    assert 0 < soft <= hard
    main(["doctor", "--port", "0", "--json"])
    names = {each["name"] for each in json.loads(capsys.readouterr().out)["findings"]}
    assert names >= {"python", "libc", "torch", "driver", "port", "disk", "files", "plugin"}


def test_a_port_that_is_taken_on_this_machine_is_found(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["doctor", "--port", str(port)]) == 1
    assert f"port {port} cannot be had" in capsys.readouterr().out


def test_the_doctor_comes_where_torch_is_missing():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pagedcore.cli import main; sys.exit(main(['doctor', '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot be imported: ModuleNotFoundError" in done.stdout
