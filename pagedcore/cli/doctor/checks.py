"""What keeps pagedcore from running on a machine, or makes it slow there, and what mends it.

A check looks at one thing and returns one finding, or several. None of them changes anything.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pagedcore.cli.doctor.system import System, Torch

Verdict = Literal["ok", "warn", "fail"]

GIB = 2**30
PYTHONS = ((3, 11), (3, 12))
"""Those that pagedcore is made for."""

LEAST_GLIBC = (2, 28)
"""What torch's packages are built for."""

LEAST_GLIBC_TRITON = (2, 35)
"""What nvidia-pytriton's package is built for."""

LEAST_CAPABILITY = (8, 0)
"""Of a GPU: see `pagedcore.execution.devices`."""

FULL, SCARCE = 1 * GIB, 20 * GIB
"""Free space of the cache folder: less fails a download, less is soon used up."""

LEAST_SHARED_MEMORY = GIB
"""Of /dev/shm for `--server pytriton`; containers have 64 MiB unless they are told."""

LEAST_FILES, FEW_FILES = 256, 4096
"""Open files: each connection is one."""

_CPU_ONLY = "start with --device cpu"
_HIDES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of a diagnosis."""

    name: str
    verdict: Verdict
    text: str
    remedy: str = ""
    """What to run or to do; empty where all is well."""


Check = Callable[[System], Iterator[Finding]]


def diagnose(system: System, *, host: str, port: int) -> list[Finding]:
    """All findings. A check that fails itself is a finding, too."""
    found: list[Finding] = []
    checks: tuple[Check, ...] = (
        _python,
        _libc,
        _torch,
        _driver,
        _gpus,
        _triton,
        _compiler,
        _pytriton,
        lambda system: _port(system, host, port),
        _disk,
        _files,
        _plugins,
    )
    for check in checks:
        found += check(system)
    return found


def _ok(name: str, text: str) -> Finding:
    return Finding(name=name, verdict="ok", text=text)


def _warn(name: str, text: str, remedy: str) -> Finding:
    return Finding(name=name, verdict="warn", text=text, remedy=remedy)


def _fail(name: str, text: str, remedy: str) -> Finding:
    return Finding(name=name, verdict="fail", text=text, remedy=remedy)


def _python(system: System) -> Iterator[Finding]:
    version = system.python()
    if version[:2] in PYTHONS:
        yield _ok("python", _dotted(version))
        return
    allowed = " and ".join(map(_dotted, PYTHONS))
    remedy = "uv venv --python 3.12, and install pagedcore in it"
    yield _fail("python", f"{_dotted(version)}, and pagedcore is made for {allowed}", remedy)


def _libc(system: System) -> Iterator[Finding]:
    name, version = system.libc()
    text = f"{name} {_dotted(version)}".strip()
    if name != "glibc":
        remedy = "use an image with glibc, such as python:3.12-slim in place of python:3.12-alpine"
        yield _fail("libc", f"{text}, and torch's packages need glibc", remedy)
    elif version < LEAST_GLIBC:
        remedy = "use a newer system: Debian 11, Ubuntu 20.04, RHEL 8, or later"
        yield _fail("libc", f"{text}, and torch needs {_dotted(LEAST_GLIBC)}", remedy)
    else:
        yield _ok("libc", text)


def _torch(system: System) -> Iterator[Finding]:
    torch = system.torch()
    if torch is None:
        yield _fail("torch", "it is not installed", "pip install pagedcore, which brings it")
        return
    if torch.error is not None:
        remedy = f"pip install --force-reinstall torch=={torch.version.partition('+')[0]}"
        yield _fail("torch", f"{torch.version} cannot be imported: {torch.error}", remedy)
        return
    build = "for CPUs" if torch.cuda is None else f"for CUDA {_dotted(torch.cuda)}"
    text = f"{torch.version}, built {build}"
    if torch.cuda is None and system.has_nvidia_device():
        remedy = f"pip install --force-reinstall torch, in its build for CUDA; or {_CPU_ONLY}"
        yield _fail("torch", f"{text}, and there is an NVIDIA GPU", remedy)
    else:
        yield _ok("torch", text)


def _driver(system: System) -> Iterator[Finding]:
    torch = _usable_torch(system)
    if not system.has_nvidia_device():
        yield _ok("driver", "no NVIDIA GPU here: models run on the CPU")
        return
    cuda = system.driver_cuda()
    if isinstance(cuda, str):
        remedy = (
            "sudo ubuntu-drivers install, or the system's package of NVIDIA's driver, and restart; "
            "in a container, docker run --gpus all"
        )
        yield _fail("driver", f"it cannot be used: {cuda}", remedy)
        return
    text = f"it runs CUDA {_dotted(cuda)}"
    told = system.nvidia_smi()
    if torch is not None and torch.cuda is not None and cuda[0] < torch.cuda[0]:
        remedy = (
            f"sudo ubuntu-drivers install, for a driver of CUDA {torch.cuda[0]} or later; or a "
            f"build of torch for CUDA {cuda[0]}"
        )
        needed = _dotted(torch.cuda)
        yield _fail("driver", f"{text}, and torch was built for CUDA {needed}", remedy)
    elif told is None:
        remedy = "install the driver's tools, such as nvidia-utils"
        yield _warn("driver", f"{text}, but nvidia-smi does not run", remedy)
    else:
        yield _ok("driver", f"{text}: {'; '.join(told.splitlines())}")


def _gpus(system: System) -> Iterator[Finding]:
    torch = _usable_torch(system)
    if torch is None or torch.cuda is None or not system.has_nvidia_device():
        return
    driver = system.driver_cuda()
    if isinstance(driver, str) or driver[0] < torch.cuda[0]:
        return  # which is said already
    hidden = system.variable(_HIDES)
    if not torch.gpus and hidden is not None:
        remedy = f"unset {_HIDES}, or name a device that there is"
        yield _fail("gpu", f"torch sees none: {_HIDES} is {hidden!r}", remedy)
    elif not torch.gpus:
        remedy = "nvidia-smi, which says more; after an update of the driver, restart the machine"
        yield _fail("gpu", "torch sees none", remedy)
    for gpu in torch.gpus:
        text = f"{gpu.name}, {gpu.num_bytes / GIB:.1f} GiB, capability {_dotted(gpu.capability)}"
        if gpu.capability < LEAST_CAPABILITY:
            needed = f"{_dotted(LEAST_CAPABILITY)} (A100 and later)"
            yield _fail("gpu", f"{text}, and at least {needed} is needed", _CPU_ONLY)
        else:
            yield _ok("gpu", text)


def _triton(system: System) -> Iterator[Finding]:
    torch = _usable_torch(system)
    if torch is None or torch.cuda is None or not torch.gpus:
        return
    version, wanted = system.version("triton"), torch.wants_triton
    install = "pip install triton" + (f"=={wanted}" if wanted else "")
    if version is None:
        yield _fail("triton", "it is not installed: kernels would be plain torch", install)
    elif wanted is not None and version != wanted:
        yield _fail("triton", f"{version}, and torch {torch.version} needs {wanted}", install)
    elif (error := system.import_error("triton")) is not None:
        remedy = f"pip install --force-reinstall triton=={version}"
        yield _fail("triton", f"{version} cannot be imported: {error}", remedy)
    else:
        yield _ok("triton", version)


def _compiler(system: System) -> Iterator[Finding]:
    """Triton compiles a launcher for each kernel; on a CPU, kernels are in C."""
    torch = _usable_torch(system)
    on_gpu = torch is not None and bool(torch.gpus)
    compiler, missing = system.compiler(), list(system.missing_cpu_features())
    asked = system.variable("CC")
    remedy = "sudo apt install gcc" if asked is None else "unset CC, or set it to a C compiler"
    lacks = "there is no C compiler" if asked is None else f"CC is {asked!r}, and there is none"
    if on_gpu and compiler is None:
        yield _fail("compiler", f"{lacks}: Triton's kernels cannot be started", remedy)
    elif on_gpu and not system.has_python_headers():
        remedy = "sudo apt install python3-dev, or a Python of uv, which has them"
        yield _fail("compiler", f"{compiler}, but Python.h is missing, which Triton needs", remedy)
    elif on_gpu:
        yield _ok("compiler", str(compiler))
    elif missing:
        text = f"not needed: the processor has no {', '.join(missing)}, so CPU models run in torch"
        yield _ok("compiler", text)
    elif compiler is None:
        yield _warn("compiler", f"{lacks}: models on the CPU run in plain torch, slower", remedy)
    else:
        yield _ok("compiler", str(compiler))


def _pytriton(system: System) -> Iterator[Finding]:
    """What `--server pytriton` needs, where it is installed."""
    version = system.version("nvidia-pytriton")
    if version is None:
        yield _ok("pytriton", "not installed, and needed for --server pytriton alone")
        return
    problems = False
    name, libc = system.libc()
    if name == "glibc" and libc < LEAST_GLIBC_TRITON:
        problems = True
        remedy = "use --server litserve; or Ubuntu 22.04, Debian 12 or later"
        needed = f"glibc {_dotted(LEAST_GLIBC_TRITON)}"
        yield _fail("pytriton", f"{version} needs {needed}, and this is {_dotted(libc)}", remedy)
    if not system.has_shared_python():
        problems = True
        remedy = "use --server litserve; or uv python install 3.12, whose Python has the library"
        library = f"libpython{_dotted(system.python()[:2])}.so.1.0"
        yield _fail("pytriton", f"{version} loads {library}, which is not there", remedy)
    shared = system.shared_memory_bytes()
    if shared is None or shared < LEAST_SHARED_MEMORY:
        problems = True
        remedy = "docker run --shm-size=1g, or sudo mount -o remount,size=1G /dev/shm"
        size = "is missing" if shared is None else f"has {shared / 2**20:.0f} MiB"
        yield _warn("pytriton", f"/dev/shm {size}: large requests may fail", remedy)
    if not problems:
        yield _ok("pytriton", version)


def _port(system: System, host: str, port: int) -> Iterator[Finding]:
    error = system.listen_error(host, port)
    if error is None:
        yield _ok("port", f"{host} port {port} is free")
        return
    remedy = f"ss -ltnp 'sport = :{port}', which names who listens; or another --port"
    if port < 1024:
        remedy = "take a --port from 1024 on; those below are for root alone"
    yield _fail("port", f"{host} port {port} cannot be had: {error}", remedy)


def _disk(system: System) -> Iterator[Finding]:
    folder = system.cache_root()
    elsewhere = "or set PAGEDCORE_CACHE to another folder"
    if not system.is_writable(folder):
        remedy = f'sudo chown -R "$USER" {folder}, {elsewhere}'
        yield _fail("disk", f"{folder} cannot be written", remedy)
        return
    free = system.free_bytes(folder)
    text = f"{folder} has {free / GIB:.1f} GiB free"
    remedy = f"du -sh {folder}/models/*, and remove what is not needed, {elsewhere}"
    if free < FULL:
        yield _fail("disk", text, remedy)
    elif free < SCARCE:
        yield _warn("disk", f"{text}: many models are larger", remedy)
    else:
        yield _ok("disk", text)


def _files(system: System) -> Iterator[Finding]:
    soft, hard = system.open_files()
    text = f"a process may have {soft} files open"
    remedy = f"ulimit -n {min(65536, hard)}"
    if hard < FEW_FILES:
        remedy = "LimitNOFILE=65536 in the systemd unit, or docker run --ulimit nofile=65536"
    if soft < LEAST_FILES:
        yield _fail("files", f"{text}: a server runs out at once", remedy)
    elif soft < FEW_FILES:
        yield _warn("files", f"{text}, and each connection is one", remedy)
    else:
        yield _ok("files", text)


def _plugins(system: System) -> Iterator[Finding]:
    for each in system.plugins():
        verdict: Verdict = "ok" if each.is_ok else "fail"
        remedy = each.remedy or ("" if each.is_ok else "start with --disable-plugin for one")
        yield Finding(name="plugin", verdict=verdict, text=each.what, remedy=remedy)


def _usable_torch(system: System) -> Torch | None:
    torch = system.torch()
    return None if torch is None or torch.error is not None else torch


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
