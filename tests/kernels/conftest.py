"""Kernels run on the GPU where there is one, and in triton's interpreter elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which tests do after this


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def compile_kernels(tmp_path):
    """Run a script of this folder for a compute capability: names, shared memory, spilled bytes."""

    def run(script, capability):
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "TRITON_CACHE_DIR": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), str(capability)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [line.split() for line in done.stdout.splitlines()]
        return [(name, int(shared), int(spilled)) for name, shared, spilled in lines]

    return run
