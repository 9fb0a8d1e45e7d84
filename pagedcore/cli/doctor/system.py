"""What the doctor asks of a machine, and a machine that answers."""

import ctypes
import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pagedcore.cli.installed import Examined, examine
from pagedcore.cli.serve import listen_error
from pagedcore.execution.native.library import missing_features
from pagedcore.sources.cache import cache_root

_CPUINFO = Path("/proc/cpuinfo")
_SHARED_MEMORY = Path("/dev/shm")
_ENDLESS = 2**30
_PATIENCE = 20  # seconds; nvidia-smi takes a few where the driver sleeps


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchGpu:
    """A GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """An installed torch. `error` is what its import raised; the rest is then unknown."""

    version: str
    cuda: tuple[int, int] | None = None
    """The CUDA version it was built for; None is a build for CPUs."""
    wants_triton: str | None = None
    """The version of triton that it asks for."""
    gpus: tuple[TorchGpu, ...] = ()
    error: str | None = None


class System(Protocol):
    """Facts of a machine. Nothing raises: what cannot be known is None, or an error's text."""

    def python(self) -> tuple[int, int, int]:
        """The version of this interpreter."""
        ...

    def libc(self) -> tuple[str, tuple[int, ...]]:
        """The C library's name and version, such as ("glibc", (2, 36))."""
        ...

    def has_shared_python(self) -> bool:
        """Whether this interpreter is a library that another program can load."""
        ...

    def has_python_headers(self) -> bool:
        """Whether C programs can be compiled against this interpreter."""
        ...

    def compiler(self) -> str | None:
        """The C compiler that would be called."""
        ...

    def missing_cpu_features(self) -> Sequence[str]:
        """What the processor lacks for the kernels in C."""
        ...

    def has_nvidia_device(self) -> bool:
        """Whether the system has device files of an NVIDIA GPU."""
        ...

    def driver_cuda(self) -> tuple[int, int] | str:
        """The CUDA version that the driver runs, or why it cannot be asked."""
        ...

    def nvidia_smi(self) -> str | None:
        """Name, driver and memory of each GPU, one a line; None where that fails."""
        ...

    def torch(self) -> Torch | None:
        """The installed torch, if any."""
        ...

    def version(self, distribution: str) -> str | None:
        """The version of an installed distribution."""
        ...

    def import_error(self, module: str) -> str | None:
        """What importing a module raises."""
        ...

    def listen_error(self, host: str, port: int) -> str | None:
        """Why one cannot listen there."""
        ...

    def cache_root(self) -> Path:
        """The folder of models and compiled kernels."""
        ...

    def free_bytes(self, folder: Path) -> int:
        """Free space for a folder, or for the nearest one above it that exists."""
        ...

    def is_writable(self, folder: Path) -> bool:
        """Whether files can be made in a folder, which may have to be made first."""
        ...

    def shared_memory_bytes(self) -> int | None:
        """Size of /dev/shm; None where there is none."""
        ...

    def open_files(self) -> tuple[int, int]:
        """How many files a process may have open, and the most that may be asked for."""
        ...

    def variable(self, name: str) -> str | None:
        """A variable of the environment."""
        ...

    def plugins(self) -> Sequence[Examined]:
        """What the installed plugins are good for."""
        ...


class ThisSystem:
    """The machine that this process runs on."""

    def python(self) -> tuple[int, int, int]:
        """See `System.python`."""
        return sys.version_info[:3]

    def libc(self) -> tuple[str, tuple[int, ...]]:
        """See `System.libc`."""
        name, version = platform.libc_ver()
        return name or "another", _numbers(version)

    def has_shared_python(self) -> bool:
        """See `System.has_shared_python`."""
        library = f"libpython{sysconfig.get_python_version()}.so.1.0"
        told = Path(sysconfig.get_config_var("LIBDIR") or "")
        multiarch = sysconfig.get_config_var("MULTIARCH") or ""
        folders = (told, told / multiarch, Path(sys.base_prefix) / "lib")
        return any((folder / library).exists() for folder in folders)

    def has_python_headers(self) -> bool:
        """See `System.has_python_headers`."""
        return Path(sysconfig.get_path("include"), "Python.h").exists()

    def compiler(self) -> str | None:
        """See `System.compiler`."""
        asked = os.environ.get("CC")
        return next(filter(None, map(shutil.which, [asked] if asked else ["cc", "gcc"])), None)

    def missing_cpu_features(self) -> Sequence[str]:
        """See `System.missing_cpu_features`."""
        return missing_features(_CPUINFO)

    def has_nvidia_device(self) -> bool:
        """See `System.has_nvidia_device`."""
        return any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/dxg"))

    def driver_cuda(self) -> tuple[int, int] | str:
        """See `System.driver_cuda`."""
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            return str(error)
        version = ctypes.c_int()
        status = driver.cuDriverGetVersion(ctypes.byref(version))
        if status:
            return f"the driver answers with error {status}"
        return version.value // 1000, version.value % 1000 // 10

    def nvidia_smi(self) -> str | None:
        """See `System.nvidia_smi`."""
        program = shutil.which("nvidia-smi")
        if program is None:
            return None
        query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            done = subprocess.run(
                [program, *query], capture_output=True, text=True, timeout=_PATIENCE, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    def torch(self) -> Torch | None:
        """See `System.torch`."""
        version = self.version("torch")
        if version is None:
            return None
        error = self.import_error("torch")
        if error is not None:
            return Torch(version=version, error=error)
        import torch

        gpus = []
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            facts = torch.cuda.get_device_properties(i)
            capability = (facts.major, facts.minor)
            gpu = TorchGpu(name=facts.name, capability=capability, num_bytes=facts.total_memory)
            gpus.append(gpu)
        cuda = _numbers(torch.version.cuda or "")
        wanted = [each for each in importlib.metadata.requires("torch") or () if "triton" in each]
        pinned = [each.partition("==")[2].partition(";")[0].strip() for each in wanted]
        return Torch(
            version=version,
            cuda=(cuda[0], cuda[1]) if len(cuda) > 1 else None,
            wants_triton=next(filter(None, pinned), None),
            gpus=tuple(gpus),
        )

    def version(self, distribution: str) -> str | None:
        """See `System.version`."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def import_error(self, module: str) -> str | None:
        """See `System.import_error`."""
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken package raises what it likes
            return f"{type(error).__name__}: {error}"
        return None

    def listen_error(self, host: str, port: int) -> str | None:
        """See `System.listen_error`."""
        return listen_error(host, port)

    def cache_root(self) -> Path:
        """See `System.cache_root`."""
        return cache_root()

    def free_bytes(self, folder: Path) -> int:
        """See `System.free_bytes`."""
        return shutil.disk_usage(_existing(folder)).free

    def is_writable(self, folder: Path) -> bool:
        """See `System.is_writable`."""
        return os.access(_existing(folder), os.W_OK | os.X_OK)

    def shared_memory_bytes(self) -> int | None:
        """See `System.shared_memory_bytes`."""
        try:
            return shutil.disk_usage(_SHARED_MEMORY).total
        except OSError:
            return None

    def open_files(self) -> tuple[int, int]:
        """See `System.open_files`."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return _bounded(soft), _bounded(hard)

    def variable(self, name: str) -> str | None:
        """See `System.variable`."""
        return os.environ.get(name)

    def plugins(self) -> Sequence[Examined]:
        """See `System.plugins`."""
        return list(examine())


def _bounded(limit: int) -> int:
    return _ENDLESS if limit == resource.RLIM_INFINITY else limit


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
