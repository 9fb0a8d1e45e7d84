"""Compiles the kernels where a compiler is at hand, once for each version of them, and loads them.

A kernel is called with addresses and sizes, as its head in the .c file says.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagedcore.errors import ConfigError

SOURCES = Path(__file__).parent
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "fma")
"""As /proc/cpuinfo names them."""

_FLAGS = [
    *("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"),
]

_TYPES: dict[str, Any] = {
    "a": ctypes.c_void_p,
    "l": ctypes.c_long,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
}
"""Of parameters: an address, a size, a small number or flag, a real number."""

Kernel = Callable[..., int]


class Library:
    """The kernels, as functions."""

    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))
        self.threads = self._kernel("threads", "i")
        self.pack = self._kernel("pack", "alla")
        self.linear = self._kernel("linear", "allalaai")
        self.pack_codes = self._kernel("pack_codes", "allia")
        self.widen = self._kernel("widen", "laiaiaailla")
        self.grouped = self._kernel("grouped", "allaiaiaaillaail")
        self.bytes = self._kernel("bytes", "allaalaaa")
        self.rms_norm = self._kernel("rms_norm", "aaafall")
        self.silu_mul = self._kernel("silu_mul", "aall")
        self.rope_and_cache = self._kernel("rope_and_cache", "alllllaliaafaaa")
        self.argmax = self._kernel("argmax", "aall")
        self.attention = self._kernel("attention", "alaalaaallllllffaa")

    def _kernel(self, name: str, types: str) -> Kernel:
        kernel = self._loaded[f"pagedcore_{name}"]
        kernel.argtypes = [_TYPES[letter] for letter in types]
        return kernel


def load_library() -> Library:
    """The kernels; the first call on a machine compiles them, which takes two seconds.

    Raises ConfigError, saying why, where that cannot be.
    """
    missing = missing_features(Path("/proc/cpuinfo"))
    if missing:
        raise ConfigError(
            f"backend native needs a processor with {' and '.join(missing)}: use --backend torch"
        )
    try:
        return Library(_compiled())
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"backend native could not be compiled ({_reason(error)}): install a C compiler "
            "such as gcc, or use --backend torch"
        ) from error


def missing_features(cpuinfo: Path) -> list[str]:
    """What the processor lacks."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [name for name in NEEDED if name not in flags]


def _compiled() -> Path:
    """The library of exactly these sources, out of the user's cache."""
    flags = [*_FLAGS, *(f"-m{name.replace('_', '')}" for name in NEEDED)]
    sources = sorted(SOURCES.glob("*.c"))
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in [*sources, *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.read_bytes())
    folder = _cache_folder()
    target = folder / f"native-{digest.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        made = Path(unfinished, target.name)
        subprocess.run(
            [compiler, *flags, *map(str, sources), "-o", str(made), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        made.replace(target)
    return target


def _cache_folder() -> Path:
    chosen = os.environ.get("PAGEDCORE_CACHE")
    root = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "pagedcore"
    return root / "native"


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return lines[0] if lines else str(error)
    return str(error)
