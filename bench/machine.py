"""What every result file says about where it came from: machine, versions, commit, date."""

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "transformers", "litserve", "nvidia-pytriton")


def describe() -> dict[str, Any]:
    """Facts that a reader needs to judge a figure."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _gpu(),
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
    }


def write_result(path: str | Path, **result: Any) -> None:
    """Write one result file: the description of the machine, then the figures."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if "arguments" in result:  # where the file is, it need not say
        result["arguments"] = {k: v for k, v in result["arguments"].items() if k != "out"}
    target.write_text(json.dumps({**describe(), **result}, indent=1) + "\n")


def _commit() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PAGEDCORE_COMMIT", "unknown")
    return run.stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
